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


def test_heads_of_proposals_cannot_be_entered():
    model = build("faster-rcnn_r50_fpn_1x_coco", {})
    with pytest.raises(TapError, match="cannot be entered"):
        model.head_tails(0)
    with pytest.raises(TapError, match=r"no tap 'cls\.0'"):
        model(torch.rand(1, 3, 64, 64), ["cls.0"])
