# SPDX-License-Identifier: Apache-2.0
"""SMP students: facts at odd sizes, weights in and out, the same function as plain SMP."""

import math

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file

from kdlvfm.core import TapError
from kdlvfm.models.smp import SMPModel
from kdlvfm.models.weights import UnknownModelError, WeightsError

DILATED = {"encoder_depth": 5, "output_stride": 8, "upsampling": 8}
CASES = [
    ("resnet18", "deeplabv3plus", {}, [2, 4, 8, 16, 16], 4),
    ("resnet18", "deeplabv3plus", {"encoder_output_stride": 8}, [2, 4, 8, 8, 8], 4),
    ("resnet18", "deeplabv3", {"encoder_output_stride": 8}, [2, 4, 8, 8, 8], 8),
    ("resnet18", "pspnet", DILATED, [2, 4, 8, 8, 8], 8),
    ("resnet18", "pspnet", {}, [2, 4, 8], 8),
    ("resnet18", "fpn", {}, [2, 4, 8, 16, 32], 4),
    ("resnet18", "unet", {}, [2, 4, 8, 16, 32], 1),
    ("mobilenetv2_100", "deeplabv3plus", {}, [2, 4, 8, 16, 16], 4),
    ("convnext_atto", "fpn", {}, [4, 8, 16, 32], 4),
]
PLAIN = {
    "deeplabv3": smp.DeepLabV3,
    "deeplabv3plus": smp.DeepLabV3Plus,
    "pspnet": smp.PSPNet,
    "fpn": smp.FPN,
    "unet": smp.Unet,
}


def build(name, decoder, **options):
    return SMPModel(name, decoder, 11, pretrained=False, **options).eval()


@pytest.mark.parametrize(("name", "decoder", "options", "strides", "stride"), CASES)
def test_declared_facts_are_the_actual_ones(name, decoder, options, strides, stride):
    model = build(name, decoder, decoder_kwargs=options)
    assert [info.stride for tap, info in model.taps().items() if tap.startswith("map.")] == strides
    assert model.tap_info("decoder").stride == stride
    for size in [(64, 96), (75, 101), (33, 130)]:
        with torch.no_grad():
            features = model(torch.rand(2, 3, *size), list(model.taps()))
        for tap, info in model.taps().items():
            grid = () if info.stride is None else [math.ceil(side / info.stride) for side in size]
            assert features[tap].shape == (2, info.dim, *grid), (tap, size)


@pytest.mark.parametrize(
    ("decoder", "options"),
    [("deeplabv3", {}), ("deeplabv3plus", {}), ("pspnet", DILATED), ("fpn", {}), ("unet", {})],
)
def test_state_dict_loads_into_plain_smp_which_gives_the_same_logits(decoder, options):
    model = build("resnet18", decoder, decoder_kwargs=options)
    plain = PLAIN[decoder]("tu-resnet18", encoder_weights=None, classes=11, **options).eval()
    plain.load_state_dict(model.net.state_dict())
    images = torch.rand(1, 3, 64, 96)
    mean, std = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN), torch.tensor(timm.data.IMAGENET_DEFAULT_STD)
    normalised = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        features = model(images, ["logits", "decoder", "pooled", "map.-1"])
        assert torch.allclose(features["logits"], plain(normalised), atol=1e-5)
        assert torch.allclose(plain.segmentation_head(features["decoder"]), features["logits"], atol=1e-5)
    assert torch.equal(features["pooled"], features["map.-1"].mean((2, 3)))


def test_the_decoder_runs_only_where_it_is_needed():
    model = build("resnet18", "fpn")
    model.net.decoder.register_forward_hook(lambda *_: pytest.fail("the decoder ran"))
    assert list(model(torch.rand(1, 3, 64, 64), ["map.2"])) == ["map.2"]


def fingerprint(tensor):
    return (tuple(tensor.shape), float(tensor.double().sum()))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto"])
def test_encoder_takes_a_classification_checkpoint_of_timm_entirely(name, tmp_path, caplog):
    source = timm.create_model(name).state_dict()
    save_file(source, tmp_path / "w.safetensors")
    model = SMPModel(name, "deeplabv3plus", 3, checkpoint=tmp_path / "w.safetensors")
    given = {fingerprint(value) for value in source.values()}
    assert all(fingerprint(value) in given for value in model.net.encoder.state_dict().values())
    assert (model.card.weights, model.card.source) == ("file", str(tmp_path / "w.safetensors"))
    assert "state_dict" not in model.net.encoder.model.pretrained_cfg
    assert not caplog.records


def test_whole_network_round_trip(tmp_path):
    model = build("resnet18", "fpn")
    save_file(model.net.state_dict(), tmp_path / "student.safetensors")
    again = SMPModel("resnet18", "fpn", 11, checkpoint=tmp_path / "student.safetensors").eval()
    images = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        assert torch.equal(model(images, ["logits"])["logits"], again(images, ["logits"])["logits"])
    assert again.card.weights == "file"
    assert len(again.card.sha256) == 64
    with pytest.raises(
        WeightsError, match=r"does not fit resnet18.a1_in1k-fpn: .*of another shape \(segmentation_head"
    ):
        SMPModel("resnet18", "fpn", 5, checkpoint=tmp_path / "student.safetensors")


def test_bad_arguments():
    with pytest.raises(ValueError, match="decoder must be one of deeplabv3, deeplabv3plus"):
        build("resnet18", "segformer")
    with pytest.raises(UnknownModelError, match="resnet18"):
        build("resnet81", "fpn")
    with pytest.raises(TapError, match="decoder"):
        build("resnet18", "fpn").tap_info("decodr")


def test_every_parameter_of_the_path_to_the_logits_gets_a_gradient():
    model = build("resnet18", "deeplabv3plus").train()
    model(torch.rand(2, 3, 64, 64), ["logits"])["logits"].square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("name", "decoder", "options", "strides", "stride"), CASES)
def test_the_head_on_the_models_own_map_gives_its_logits(name, decoder, options, strides, stride):
    model = build(name, decoder, decoder_kwargs=options)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features = model(images, ["decoder", "logits"])
        assert model.head_taps == ("decoder",)
        applied = model.apply_head(features, (64, 96))
        assert list(applied) == ["logits"]
        torch.testing.assert_close(applied["logits"], features["logits"])
        for grid, size in (((4, 6), (64, 96)), ((5, 7), (75, 101)), ((90, 90), (33, 130))):
            other = torch.rand(1, model.tap_info("decoder").dim, *grid)
            assert model.apply_head({"decoder": other}, size)["logits"].shape == (1, 11, *size)


def test_a_frozen_encoder_takes_no_gradient_and_keeps_its_statistics():
    model = build("test_resnet", "fpn", freeze=True).train()
    before = {key: value.clone() for key, value in model.net.encoder.state_dict().items()}
    model(torch.rand(2, 3, 64, 64), ["logits"])["logits"].square().mean().backward()
    assert not any(p.requires_grad for p in model.net.encoder.parameters())
    assert all(p.grad is not None for p in model.net.decoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.net.encoder.state_dict().items())
    assert model.net.decoder.training
