# SPDX-License-Identifier: Apache-2.0
"""Detectors of mmdet as files of ONNX, with NMS and without: what onnxruntime detects is what the student detects."""

import pytest
import torch

pytest.importorskip("mmdet")

from kdlvfm.export.graph import ExportError, graph_of, write_onnx
from kdlvfm.export.parity import check_parity
from kdlvfm.export.session import open_graph
from kdlvfm.models.mmdet import MMDetModel
from kdlvfm.models.timm import TimmEncoder

CONFIGS = {
    "GFL": "gfl_r50_fpn_1x_coco",
    "RetinaNet": "retinanet_r50_fpn_1x_coco",
    "FCOS": "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "ATSS": "atss_r50_fpn_1x_coco",
}
NARROW = {"neck": {"out_channels": 64}, "bbox_head": {"in_channels": 64, "feat_channels": 64, "stacked_convs": 2}}
SHAPES = [(1, 192, 256), (2, 97, 131), (3, 64, 160)]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.meshgrid")]  # mmdet's, in the points of FCOS


@pytest.fixture
def detector():
    """A detector with weights that make it see things everywhere."""

    def make(name):
        torch.manual_seed(0)
        encoder = TimmEncoder("test_resnet", pretrained=False, model_kwargs={"num_classes": 0})
        student = MMDetModel(CONFIGS[name], 3, encoder=encoder, changes=NARROW).eval()
        for module in student.net.bbox_head.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.normal_(module.weight, std=0.05)
                if module.bias is not None:
                    torch.nn.init.normal_(module.bias, std=0.5)
        return student

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_with_nms(name, detector, tmp_path):
    graph = graph_of(detector(name), nms=True)
    write_onnx(graph, tmp_path / "student.onnx", {})
    model = open_graph(tmp_path / "student.onnx", graph)
    checks = check_parity(graph, model, SHAPES)
    assert all(check.detections > 20 for check in checks)
    found = model.everything(torch.rand(2, 3, 64, 64))
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "boxes": (2, 100, 4),
        "scores": (2, 100),
        "labels": (2, 100),
    }
    assert (found["scores"].diff(dim=1) <= 0).all()
    with torch.no_grad():
        graph.student.net.bbox_head.get_submodule("cls_convs")[0].conv.weight.mul_(0.5)
    with pytest.raises(ExportError, match="detects otherwise than the student"):
        check_parity(graph, model, SHAPES)


def test_without_nms(detector, tmp_path):
    student = detector("ATSS")
    graph = graph_of(student)
    write_onnx(graph, tmp_path / "student.onnx", {})
    model = open_graph(tmp_path / "student.onnx", graph)
    check_parity(graph, model, SHAPES)
    images = torch.rand(2, 3, 70, 90)
    found = model.everything(images)
    with torch.no_grad():
        expected = student.predict(student(images, student.task_taps), [torch.tensor([70, 90])] * 2)
    for boxes, scores, image in zip(found["boxes"], found["scores"], expected, strict=True):
        for box, score, label in zip(image["boxes"], image["scores"], image["labels"], strict=True):
            nearest = (boxes - box).abs().amax(dim=1) + (scores[:, label] - score).abs()
            assert nearest.min() < 1e-3
