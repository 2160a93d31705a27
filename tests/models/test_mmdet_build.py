# SPDX-License-Identifier: Apache-2.0
"""From configurations of mmdet to detectors: weights, what is frozen, and what is refused."""

import pytest
import torch
from torch import nn

from kdlvfm.models.mmcv_ops import MissingOperatorError, provide_operators
from kdlvfm.models.mmdet import MMDetModel
from kdlvfm.models.mmdet_config import ConfigError
from kdlvfm.models.timm import TimmEncoder
from kdlvfm.models.weights import WeightsError

pytest.importorskip("mmdet")

GFL, FCOS = "gfl_r50_fpn_1x_coco", "fcos_r50-caffe_fpn_gn-head_1x_coco"
NARROW = {"neck": {"out_channels": 64}, "bbox_head": {"in_channels": 64, "feat_channels": 64}}
OWN_RESNET18 = {
    **NARROW,
    "backbone": {"depth": 18},
    "neck": {"in_channels": [64, 128, 256, 512], "out_channels": 64},
}
CLASSES = 3


def encoder(name="test_resnet", **arguments):
    return TimmEncoder(name, pretrained=False, model_kwargs={"num_classes": 0}, **arguments)


@pytest.fixture
def images():
    return torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))


def test_pretrained_encoders_keep_their_statistics_and_random_ones_learn_whole(tmp_path):
    net = encoder("resnet18").net
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    held = encoder("resnet18", checkpoint=tmp_path / "weights.pt")
    weights = {name: value.clone() for name, value in held.net.state_dict().items()}
    model = MMDetModel(GFL, CLASSES, held, freeze=2, changes=NARROW).train()
    assert all(torch.equal(value, weights[name]) for name, value in model.net.backbone.state_dict().items())
    norms = [module for module in model.net.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(module.training for module in norms)
    still = {name for name, parameter in model.net.backbone.named_parameters() if not parameter.requires_grad}
    assert {name.partition(".")[0] for name in still} == {"conv1", "bn1", "layer1"}

    model = MMDetModel(GFL, CLASSES, encoder("resnet18"), freeze=2, changes=NARROW).train()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_of_a_timm_resnet_are_those_of_mmdets_own(images):
    ours = MMDetModel(GFL, CLASSES, encoder("resnet18"), changes=NARROW).eval()
    theirs = MMDetModel(GFL, CLASSES, changes=OWN_RESNET18).eval()
    theirs.net.load_state_dict(ours.net.state_dict())
    with torch.no_grad():
        expected, found = ours(images, ours.task_taps), theirs(images, theirs.task_taps)
    assert all(torch.equal(found[tap], expected[tap]) for tap in expected)
    assert [theirs.tap_info(f"map.{i}").stride for i in range(4)] == [4, 8, 16, 32]


def test_own_backbones_start_unfrozen_and_see_the_colours_they_are_made_for(images):
    model = MMDetModel(FCOS, CLASSES, changes=OWN_RESNET18).train()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    seen = []
    model.net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images, ["fpn.0"])
    blue = 255 * images[:, 2] - 102.9801  # caffe's networks see blue first, in 0..255
    torch.testing.assert_close(seen[0][:, 0], blue, rtol=1e-4, atol=1e-3)


def test_a_checkpoint_of_the_whole_detector(tmp_path, images):
    first = MMDetModel(GFL, CLASSES, changes=OWN_RESNET18).eval()
    torch.save({"state_dict": first.net.state_dict(), "meta": {"epoch": 12}}, tmp_path / "epoch_12.pth")
    second = MMDetModel(GFL, CLASSES, changes=OWN_RESNET18, checkpoint=tmp_path / "epoch_12.pth").eval()
    with torch.no_grad():
        assert torch.equal(first(images, ["cls.0"])["cls.0"], second(images, ["cls.0"])["cls.0"])
    assert second.card.weights == "file"
    with pytest.raises(WeightsError, match="does not fit"):
        MMDetModel(GFL, CLASSES + 1, changes=OWN_RESNET18, checkpoint=tmp_path / "epoch_12.pth")


def test_a_checkpoint_as_mmengine_writes_them_while_it_trains(tmp_path, images):
    from mmengine.logging import MessageHub

    first = MMDetModel(GFL, CLASSES, changes=OWN_RESNET18).eval()
    hub = MessageHub("training")
    hub.update_scalar("train/loss", 1.5)
    meta = {"cfg": "model = dict()", "dataset_meta": {"classes": ("a", "b"), "palette": [(1, 2, 3)]}, "epoch": 12}
    optimizer = torch.optim.SGD(first.net.parameters(), 0.1, momentum=0.9)
    parts = {"state_dict": first.net.state_dict(), "message_hub": hub.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"meta": meta, **parts, "param_schedulers": [{"last_step": 3}]}, tmp_path / "epoch_12.pth")
    second = MMDetModel(GFL, CLASSES, changes=OWN_RESNET18, checkpoint=tmp_path / "epoch_12.pth").eval()
    with torch.no_grad():
        assert torch.equal(first(images, ["cls.0"])["cls.0"], second(images, ["cls.0"])["cls.0"])


def test_what_cannot_be_a_detector_of_boxes_is_refused():
    with pytest.raises(ConfigError, match="masks too"):
        MMDetModel("mask-rcnn_r50_fpn_1x_coco", CLASSES, encoder())
    with pytest.raises(ConfigError, match="neither bbox_head nor roi_head"):
        MMDetModel("solo_r50_fpn_1x_coco", CLASSES, encoder(), changes={"mask_head": None})
    with pytest.raises(ConfigError, match="mmdet cannot build"):
        MMDetModel(GFL, CLASSES, encoder(), changes={"bbox_head": {"type": "NoSuchHead"}})


@pytest.mark.parametrize(
    "changes",
    [
        {"bbox_head": {"type": "subprocess.Popen"}},
        {"test_cfg": {"nms": {"type": "__import__('os').system('true')"}}},
        {"train_cfg": {"assigner": {"type": "mmdet.models.os.getcwd"}}},
    ],
)
def test_names_of_other_things_than_parts_of_mmdet_are_refused(changes):
    with pytest.raises(ConfigError, match="is no part of mmdet"):
        MMDetModel(GFL, CLASSES, encoder(), changes=changes)


def test_parts_that_do_not_fit_are_told_before_any_training():
    with pytest.raises(ConfigError, match=r"GFLHead cannot read what comes before it \(.*\): make in_channels"):
        MMDetModel(GFL, CLASSES, encoder(), changes={"neck": {"out_channels": 32}})
    with pytest.raises(ConfigError, match="cannot use an init_cfg of GFL: KeyError: 'type'"):
        MMDetModel(GFL, CLASSES, encoder(), changes={"bbox_head": {"init_cfg": {"override": {"bias_prob": 0.5}}}})
    with pytest.raises(ConfigError, match="changes must be settings"):
        MMDetModel(GFL, CLASSES, encoder(), changes="neck")


def test_freezing_is_for_an_encoder():
    for arguments in ({"freeze": True}, {"freeze": 2}, {"encoder": encoder(), "freeze": "maybe"}):
        with pytest.raises(ValueError, match="freeze is true, false or a number"):
            MMDetModel(GFL, CLASSES, **arguments)


def test_no_weights_are_fetched():
    start = {"type": "Pretrained", "checkpoint": "https://example.invalid/weights.pth"}
    changes = {**NARROW, "init_cfg": start, "neck": {"init_cfg": start, "out_channels": 64}}
    changes["bbox_head"] = {
        **NARROW["bbox_head"],
        "init_cfg": [start, {"type": "Constant", "layer": "Conv2d", "val": 0.5}],
    }
    model = MMDetModel(GFL, CLASSES, encoder(), changes=changes)
    assert (model.net.bbox_head.gfl_cls.weight == 0.5).all()


def test_missing_operators_are_told_before_any_training():
    if not provide_operators():
        pytest.skip("a compiled mmcv is installed")
    with pytest.raises(MissingOperatorError, match="deform_conv"):
        MMDetModel("vfnet_r50_fpn_1x_coco", CLASSES, encoder())


def test_building_leaves_no_trace(capfd):
    from mmengine.registry import DefaultScope

    before = DefaultScope.get_current_instance()
    MMDetModel(GFL, CLASSES, encoder(), changes=NARROW)
    assert DefaultScope.get_current_instance() is before
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("kdlvfm.models.mmdet_build.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kdlvfm\[mmdet\]'") as caught:
        MMDetModel(GFL, CLASSES, encoder(), changes=NARROW)
    assert caught.value.name == "mmdet"


def test_a_missing_library_of_the_system_is_named_with_its_package(monkeypatch):
    def fail():
        raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("kdlvfm.models.mmdet_build.provide_operators", fail)
    with pytest.raises(OSError, match=r"libGL\.so\.1.*apt-get install libgl1 libglib2\.0-0"):
        MMDetModel(GFL, CLASSES, encoder(), changes=NARROW)
