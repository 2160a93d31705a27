# SPDX-License-Identifier: Apache-2.0
"""Detectors of mmdet: taps, loss on features already computed, predictions."""

import copy

import pytest
import torch
from torch import nn

from kdlvfm.core import Detector
from kdlvfm.models.mmdet import MMDetModel
from kdlvfm.models.timm import TimmEncoder

pytest.importorskip("mmdet")

DENSE = {
    "gfl": "gfl_r50_fpn_1x_coco",
    "retinanet": "retinanet_r50_fpn_1x_coco",
    "fcos": "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "atss": "atss_r50_fpn_1x_coco",
}
NARROW = {"neck": {"out_channels": 64}, "bbox_head": {"in_channels": 64, "feat_channels": 64}}
PROPOSALS = {
    "neck": {"out_channels": 64},
    "rpn_head": {"in_channels": 64, "feat_channels": 64},
    "roi_head": {
        "bbox_roi_extractor": {"out_channels": 64},
        "bbox_head": {"in_channels": 64, "fc_out_channels": 64},
    },
}
QUERIES = {
    "num_queries": 20,
    "encoder": {"num_layers": 1},
    "decoder": {"num_layers": 2},
    "test_cfg": {"max_per_img": 20},
}
EVERY = {
    **{name: (config, NARROW) for name, config in DENSE.items()},
    "faster_rcnn": ("faster-rcnn_r50_fpn_1x_coco", PROPOSALS),
    "dino": ("dino-4scale_r50_8xb2-12e_coco", QUERIES),
}
CLASSES = 3


def encoder(name="test_resnet", **arguments):
    return TimmEncoder(name, pretrained=False, model_kwargs={"num_classes": 0}, **arguments)


def build(name, **arguments):
    torch.manual_seed(0)
    config, changes = EVERY[name]
    return MMDetModel(config, CLASSES, encoder(), changes=changes, **arguments)


@pytest.fixture(params=EVERY)
def name(request):
    return request.param


@pytest.fixture(params=DENSE)
def dense(request):
    return request.param


@pytest.fixture
def images():
    return torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def target():
    return [
        {
            "boxes": torch.tensor([[8.0, 8.0, 60.0, 50.0], [30.0, 40.0, 90.0, 90.0]]),
            "labels": torch.tensor([0, 2]),
            "size": torch.tensor([96, 128]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "size": torch.tensor([80, 100])},
    ]


def test_it_is_a_detector_that_trains_and_predicts(name, images, target):
    model = build(name)
    assert isinstance(model, Detector)
    assert model.num_classes == CLASSES
    features = model.train()(images, model.task_taps)
    terms = model.loss(features, target)
    assert all(term.dim() == 0 and term.isfinite() and "loss" in name for name, term in terms.items())
    sum(terms.values()).backward()
    idle = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    # The first feature map is no level of the pyramid, but the next ones come from it; a label that DINO's noise has
    # not drawn leaves its embedding without a gradient only in value.
    assert idle == []

    with torch.no_grad():
        found = model.eval().predict(model(images, model.task_taps), [item["size"] for item in target])
    assert len(found) == len(images)
    for one, item in zip(found, target, strict=True):
        height, width = item["size"].tolist()
        count = len(one["boxes"])
        assert one["boxes"].shape == (count, 4)
        assert one["scores"].shape == one["labels"].shape == (count,)
        assert ((one["boxes"] >= 0) & (one["boxes"] <= torch.tensor([width, height, width, height]))).all()
        assert ((one["scores"] >= 0) & (one["scores"] <= 1)).all()
        assert ((one["labels"] >= 0) & (one["labels"] < CLASSES)).all()


def test_taps_are_what_comes_out(name, images):
    model = build(name).eval()
    facts = model.taps()
    with torch.no_grad():
        features = model(images, list(facts))
    for tap, info in facts.items():
        assert features[tap].shape[2 if tap == "tokens" else 1] == info.dim, tap
        if info.stride is not None and features[tap].dim() == 4:
            assert features[tap].shape[-2:] == (-(-96 // info.stride), -(-128 // info.stride)), tap
    assert facts["fpn.0"].dim == (256 if name == "dino" else 64)
    assert [info.stride for tap, info in facts.items() if tap.startswith("fpn.")][:2] == (
        [4, 8] if name == "faster_rcnn" else [8, 16]
    )


def test_outputs_of_the_heads_have_the_channels_of_their_papers():
    widths = {name: [build(name).tap_info(f"{kind}.0").dim for kind in ("cls", "reg")] for name in DENSE}
    assert widths == {
        "gfl": [CLASSES, 4 * 17],
        "retinanet": [9 * CLASSES, 9 * 4],
        "fcos": [CLASSES, 4],
        "atss": [CLASSES, 4],
    }
    assert build("fcos").tap_info("ctr.4").dim == build("atss").tap_info("ctr.0").dim == 1


def test_loss_and_predictions_equal_mmdets_own_run(dense, images, target):
    """mmdet's detector on the normalised images, from its backbone on, as its training loop would call it."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    model = build(dense)
    x = model.encoder.normalise(images)

    class Backbone(nn.Module):
        def forward(self, x):
            return tuple(encoder_net.forward_intermediates(x, intermediates_only=True)[1:])

    encoder_net = model.encoder.net
    net = copy.deepcopy(model.net)
    net.backbone = Backbone()
    samples = []
    for item in target:
        shape = tuple(item["size"].tolist())
        meta = {"img_shape": shape, "ori_shape": shape, "pad_shape": (96, 128), "batch_input_shape": (96, 128)}
        sample = DetDataSample(metainfo={**meta, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=item["boxes"], labels=item["labels"])
        samples.append(sample)
    expected, _ = net.parse_losses(net.loss(x, samples))
    terms = model.loss(model(images, model.task_taps), target)
    torch.testing.assert_close(sum(terms.values()), expected)

    model.eval()
    net.eval()
    for stack in (model.net.bbox_head, net.bbox_head):
        for module in stack.children():
            if isinstance(module, nn.Conv2d) and module.out_channels in (CLASSES, 9 * CLASSES):
                module.bias.data += 4  # so that something is above the threshold
    with torch.no_grad():
        boxes = [sample.pred_instances for sample in net.predict(x, samples, rescale=False)]
        found = model.predict(model(images, model.task_taps), [item["size"] for item in target])
    assert len(boxes[0]) > 0
    for one, other in zip(found, boxes, strict=True):
        torch.testing.assert_close(one["boxes"], other.bboxes)
        torch.testing.assert_close(one["scores"], other.scores)
        assert torch.equal(one["labels"], other.labels)


def test_loss_and_predictions_run_nothing_of_the_encoder_again(name, images, target):
    model = build(name)
    features = model(images, model.task_taps)
    calls = []
    model.net.neck.register_forward_hook(lambda *_: calls.append("neck"))
    model.encoder.net.register_forward_hook(lambda *_: calls.append("encoder"))
    model.loss(features, target)
    with torch.no_grad():
        model.eval().predict(features, [item["size"] for item in target])
    assert calls == []


def test_crowds_are_passed_over(images, target):
    model = build("gfl")
    features = model(images, model.task_taps)
    alone = [{**target[0], "boxes": target[0]["boxes"][:1], "labels": target[0]["labels"][:1]}, target[1]]
    marked = [
        {**target[0], "iscrowd": torch.tensor([False, True])},
        {**target[1], "iscrowd": torch.zeros(0, dtype=torch.bool)},
    ]
    assert model.loss(features, marked) == model.loss(features, alone)
    assert model.loss(features, marked) != model.loss(features, target)


def test_half_precision_under_autocast(images, target):
    model = build("gfl")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(images, model.task_taps)
        assert features["cls.0"].dtype == torch.bfloat16
        terms = model.loss(features, target)
    assert all(term.dtype == torch.float32 for term in terms.values())
    full = model.loss({tap: value.float() for tap, value in features.items()}, target)
    assert {name: term.item() for name, term in terms.items()} == {name: term.item() for name, term in full.items()}


def test_half_precision_on_a_level_of_one_pixel():
    """Only the middle of a kernel ever sees it. Torch leaves the gradient of the rest to what is in the memory."""
    model = build("gfl")
    weight = model.net.neck.fpn_convs[-1].conv.weight
    for _ in range(5):
        spoilt = [torch.full((weight.numel(),), torch.nan) for _ in range(20)]
        del spoilt
        with torch.autocast("cpu", dtype=torch.bfloat16):
            last = model(torch.rand(2, 3, 64, 64), ["fpn.4"])["fpn.4"]
        (gradient,) = torch.autograd.grad(last.float().sum(), weight)
        assert gradient[..., 1, 1].any()
        gradient[..., 1, 1] = 0
        assert not gradient.any()


def test_images_of_any_size_are_padded_below_and_right():
    model = build("gfl").eval()
    images = torch.rand(1, 3, 70, 90)
    padded = torch.zeros(1, 3, 96, 96)
    padded[..., :70, :90] = images
    with torch.no_grad():
        small, large = (model(x, ["map.1", "fpn.0", "cls.0"]) for x in (images, padded))
    assert all(torch.equal(small[tap], large[tap]) for tap in small)


def test_a_teacher_on_a_vit_matches_a_student_level_by_level(images, target):
    config, changes = EVERY["gfl"]
    teacher = MMDetModel(config, CLASSES, encoder("test_vit"), freeze=True, changes=changes)
    student = build("gfl")
    taps = [tap for tap in student.taps() if tap.startswith(("fpn", "cls", "reg"))]
    for size in ((96, 128), (70, 90)):
        x = torch.rand(1, 3, *size)
        ours, theirs = student(x, taps), teacher(x, taps)
        assert all(ours[tap].shape == theirs[tap].shape for tap in taps)
    assert all(student.tap_info(tap) == teacher.tap_info(tap) for tap in taps)
    teacher.train()
    assert not teacher.encoder.training
    assert teacher.net.bbox_head.training
    sum(teacher.loss(teacher(images, teacher.task_taps), target).values()).backward()
    assert all(parameter.grad is None for parameter in teacher.encoder.parameters())
    assert all(parameter.grad is not None for parameter in teacher.net.neck.parameters())


def test_it_can_be_copied(images):
    model = build("gfl").eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        taps = [*model.task_taps, "cls_mid.0"]
        first, second = model(images, taps), other(images, taps)
        assert all(torch.equal(first[tap], second[tap]) for tap in taps)
        other.net.bbox_head.gfl_cls.weight.data.zero_()
        assert torch.equal(model(images, ["cls.0"])["cls.0"], first["cls.0"])
