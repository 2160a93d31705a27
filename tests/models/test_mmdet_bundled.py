# SPDX-License-Identifier: Apache-2.0
"""Which of mmdet's detectors build, train and predict without compiled operators."""

import pytest
import torch

from kdlvfm.models.mmcv_ops import MissingOperatorError, provide_operators
from kdlvfm.models.mmdet import MMDetModel
from kdlvfm.models.timm import TimmEncoder

pytest.importorskip("mmdet")

pytestmark = pytest.mark.slow

# Fewer queries and layers than in the papers: images are small here.
FEW = {"num_queries": 20, "encoder": {"num_layers": 1}, "decoder": {"num_layers": 1}, "test_cfg": {"max_per_img": 20}}
RUN = {
    "atss_r50_fpn_1x_coco": {},
    "autoassign_r50-caffe_fpn_1x_coco": {},
    "cascade-rcnn_r50_fpn_1x_coco": {},
    "conditional-detr_r50_8xb2-50e_coco": FEW,
    "dab-detr_r50_8xb2-50e_coco": FEW,
    "deformable-detr_r50_16xb2-50e_coco": FEW,
    "detr_r50_8xb2-150e_coco": FEW,
    "dino-4scale_r50_8xb2-12e_coco": FEW,
    "faster-rcnn_r50_fpn_1x_coco": {},
    "fcos_r50-caffe_fpn_gn-head_1x_coco": {},
    "fovea_r50_fpn_4xb4-1x_coco": {},
    "freeanchor_r50_fpn_1x_coco": {},
    "fsaf_r50_fpn_1x_coco": {},
    "gfl_r50_fpn_1x_coco": {},
    "libra-retinanet_r50_fpn_1x_coco": {},
    "paa_r50_fpn_1x_coco": {},
    "retinanet_r50_fpn_1x_coco": {},
    "sparse-rcnn_r50_fpn_1x_coco": {},
    "yolof_r50-c5_8xb8-1x_coco": {},
}
RUN_ON_THEIR_OWN_BACKBONE = ("rtmdet_tiny_8xb32-300e_coco", "yolox_tiny_8xb8-300e_coco")
NEED_COMPILED_OPERATORS = (
    "ddod_r50_fpn_1x_coco",
    "reppoints-moment_r50_fpn-gn_head-gn_1x_coco",
    "tood_r50_fpn_1x_coco",
    "vfnet_r50_fpn_1x_coco",
)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def encoder():
    return TimmEncoder("test_resnet", pretrained=False, model_kwargs={"num_classes": 0})


def step_and_predict(model):
    images = torch.rand(2, 3, 128, 128)
    boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0], [30.0, 40.0, 120.0, 120.0]])
    size = torch.tensor([128, 128])
    target = [{"boxes": boxes, "labels": torch.tensor([0, 2]), "size": size}] * 2
    terms = model.train().loss(model(images, model.task_taps), target)
    assert all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        found = model.eval().predict(model(images, model.task_taps), [size, size])
    assert all(one["boxes"].shape == (len(one["scores"]), 4) for one in found)


@pytest.mark.parametrize("name", RUN)
def test_it_runs_on_an_encoder_of_ours(name):
    step_and_predict(MMDetModel(name, 3, encoder(), changes=RUN[name]))


@pytest.mark.parametrize("name", RUN_ON_THEIR_OWN_BACKBONE)
def test_it_runs_on_its_own_backbone(name):
    step_and_predict(MMDetModel(name, 3))


@pytest.mark.parametrize("name", NEED_COMPILED_OPERATORS)
def test_it_says_that_it_needs_compiled_operators(name):
    if not provide_operators():
        pytest.skip("a compiled mmcv is installed")
    with pytest.raises(MissingOperatorError, match="deform_conv"):
        MMDetModel(name, 3, encoder())
