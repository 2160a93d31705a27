# SPDX-License-Identifier: Apache-2.0
"""Heads of mmdet that can be entered half-way, and those that cannot."""

import pytest
import torch

from kdlvfm.core import TapError
from kdlvfm.core.split_head import SplitHead
from kdlvfm.models.mmdet import MMDetModel
from kdlvfm.models.timm import TimmEncoder

pytest.importorskip("mmdet")

NARROW = {"neck": {"out_channels": 64}, "bbox_head": {"in_channels": 64, "feat_channels": 64}}
DENSE = (
    "gfl_r50_fpn_1x_coco",
    "retinanet_r50_fpn_1x_coco",
    "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "atss_r50_fpn_1x_coco",
)


def build(config, changes):
    torch.manual_seed(0)
    encoder = TimmEncoder("test_resnet", pretrained=False, model_kwargs={"num_classes": 0})
    return MMDetModel(config, 3, encoder, changes=changes).eval()


@pytest.mark.parametrize("config", DENSE)
def test_tails_lead_from_the_middle_of_the_head_to_its_end(config):
    model = build(config, NARROW)
    assert isinstance(model, SplitHead)
    head = model.net.bbox_head
    if "scales" in dict(head.named_children()):
        for i, scale in enumerate(head.scales):
            scale.scale.data.fill_(1 + i)
    features = model(torch.rand(2, 3, 96, 128), [tap for tap in model.taps() if tap.startswith(("cls", "reg"))])
    assert features["cls_mid.0"].min() < 0  # before the activation
    for i in range(5):
        tails = model.head_tails(i)
        for kind, tail in (("cls", tails.cls), ("reg", tails.reg)):
            middle = features[f"{kind}_mid.{i}"].detach().requires_grad_()
            before = middle.detach().clone()
            end = tail(middle)
            assert torch.equal(end, features[f"{kind}.{i}"])
            end.sum().backward()
            assert middle.grad.abs().sum() > 0
            assert torch.equal(middle, before)


ANCHORED = ("retinanet_r50_fpn_1x_coco", "atss_r50_fpn_1x_coco")


@pytest.mark.parametrize("config", ANCHORED)
def test_sides_are_those_of_the_boxes_that_mmdet_decodes(config):
    model = build(config, NARROW)
    head = model.net.bbox_head
    head.bbox_coder.means = (0.1, -0.1, 0.05, 0.0)
    deltas = 3 * torch.randn(2, 4 * head.num_base_priors, 2, 3)
    sides = model.head_tails(0).boxes(deltas)
    assert sides.shape == deltas.shape
    anchors = head.prior_generator.single_level_grid_priors((2, 3), 0, device="cpu")
    sizes = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    for image in range(2):
        rows = deltas[image].permute(1, 2, 0).reshape(-1, 4)
        corners = head.bbox_coder.decode(anchors, rows)
        centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).repeat(1, 2)
        expected = (corners - centres) / sizes * torch.tensor([-1.0, -1.0, 1.0, 1.0])
        found = sides[image].permute(1, 2, 0).reshape(-1, 4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_passes_through_sides():
    sides = build("retinanet_r50_fpn_1x_coco", NARROW).head_tails(0).boxes
    deltas = torch.zeros(1, 36, 1, 1, requires_grad=True)
    found = sides(deltas)
    assert torch.equal(found, torch.full_like(found, 0.5))  # the anchor itself
    found.sum().backward()
    assert (deltas.grad[:, 2::4] > 0).all()


def test_heads_of_distances_and_of_distributions_need_no_decoding():
    distances = torch.rand(1, 4, 2, 2)
    assert build("fcos_r50-caffe_fpn_gn-head_1x_coco", NARROW).head_tails(0).boxes(distances) is distances
    assert build("gfl_r50_fpn_1x_coco", NARROW).head_tails(0).boxes is None


def test_a_coder_that_is_not_known_says_nothing():
    model = build("retinanet_r50_fpn_1x_coco", NARROW)
    model.net.bbox_head.bbox_coder.add_ctr_clamp = True
    assert model.head_tails(0).boxes is None


def test_heads_of_proposals_cannot_be_entered():
    model = build("faster-rcnn_r50_fpn_1x_coco", {})
    with pytest.raises(TapError, match="cannot be entered"):
        model.head_tails(0)
    with pytest.raises(TapError, match=r"no tap 'cls\.0'"):
        model(torch.rand(1, 3, 64, 64), ["cls.0"])


@pytest.mark.parametrize("config", [*DENSE, "faster-rcnn_r50_fpn_1x_coco"])
@pytest.mark.parametrize("size", [(96, 128), (70, 90)])
def test_the_head_reads_its_own_levels_and_those_of_others(config, size):
    model = build(config, NARROW if config in DENSE else {})
    assert model.head_taps == tuple(f"fpn.{i}" for i in range(5))
    with torch.no_grad():
        own = model(torch.rand(1, 3, *size), [*model.head_taps, *model.task_taps])
        again = model.apply_head({tap: own[tap] for tap in model.head_taps}, size)
        other = model.apply_head({tap: torch.rand(1, own[tap].shape[1], 5, 7) for tap in model.head_taps}, size)
    assert all(torch.equal(again[tap], own[tap]) for tap in model.task_taps)
    assert all(other[tap].shape == own[tap].shape for tap in model.task_taps)
