# SPDX-License-Identifier: Apache-2.0
"""Files of ONNX: what they compute, what stands in them, and what has none."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from kdlvfm.core import TapInfo
from kdlvfm.export.graph import OPSET, CandidatesGraph, ExportError, LogitsGraph, graph_of, trace, write_onnx
from kdlvfm.models.head import EncoderHead
from kdlvfm.models.smp import SMPModel
from kdlvfm.models.timm import TimmEncoder

SIZES = [(1, 64, 64), (2, 96, 160), (3, 97, 131), (1, 50, 201), (1, 32, 32)]


def check(graph, path, sizes=SIZES):
    """The file computes what the student does, for every number and size of images."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in sizes:
        images = torch.rand(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(size[1]))
        with torch.no_grad():
            expected = graph.student(images, ("logits",))["logits"]
        (logits,) = session.run(None, {"images": images.numpy()})
        assert logits.shape[-2:] == size[1:]
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-4)


def test_the_file_computes_what_the_student_does_for_any_number_and_size_of_images(segmenter):
    check(*segmenter)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["pspnet", "unet", "deeplabv3plus"])
def test_students_of_smp(decoder, tmp_path):
    torch.manual_seed(2)
    graph = graph_of(SMPModel("test_resnet", decoder, 3, pretrained=False))
    write_onnx(graph, tmp_path / "student.onnx", {})
    check(graph, tmp_path / "student.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "head"), [("test_resnet", "linear"), ("test_vit", "pyramid")])
def test_students_that_resize_images_to_their_stride(encoder, head, tmp_path):
    torch.manual_seed(3)
    timm = TimmEncoder(encoder, pretrained=False, model_kwargs={"num_classes": 0})
    graph = graph_of(EncoderHead(timm, 3, head=head, freeze=False))
    write_onnx(graph, tmp_path / "student.onnx", {})
    check(graph, tmp_path / "student.onnx")


def test_what_stands_in_the_file(segmenter):
    model = onnx.load(segmenter.path)
    onnx.checker.check_model(model, full_check=True)
    assert {x.domain: x.version for x in model.opset_import} == {"": OPSET}
    assert {x.key: x.value for x in model.metadata_props} == {"classes": '["a", "b"]'}
    (images,), (logits,) = model.graph.input, model.graph.output
    sizes = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in (images, logits)]
    assert (images.name, logits.name) == ("images", "logits")
    assert sizes == [["batch", 3, "height", "width"], ["batch", 5, "height", "width"]]


def test_no_path_of_this_machine_stands_in_the_file(segmenter):
    content = segmenter.path.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b".py" not in content


def test_the_student_is_exported_in_evaluation_mode(segmenter):
    assert not any(module.training for module in segmenter.graph.modules())
    assert isinstance(segmenter.graph, LogitsGraph)


def test_what_cannot_be_traced_is_named(toy_model):
    class Choosy(toy_model):
        def forward(self, images, taps):
            return super().forward(images if images.sum() > 0 else -images, taps)

    with pytest.raises(ExportError, match=r"^toy cannot be traced: "):
        trace(graph_of(Choosy()))


def test_a_classifier_of_images_has_no_graph():
    with pytest.raises(ExportError, match="neither labels pixels nor detects boxes"):
        graph_of(TimmEncoder("test_resnet", pretrained=False))


def test_nms_is_for_detectors(segmenter):
    with pytest.raises(ExportError, match="detects no boxes"):
        graph_of(segmenter.graph.student, nms=True)


def test_a_detector_without_a_dense_head_has_no_graph(toy_model):
    class Detector(toy_model):
        num_classes, task_taps = 5, ("pooled",)

        def loss(self, features, target):
            pytest.fail("it is described, not run")

        def predict(self, features, sizes):
            pytest.fail("it is described, not run")

    with pytest.raises(ExportError, match="toy does not give its boxes at every position"):
        graph_of(Detector())


def test_a_detector_whose_head_decodes_in_another_way_has_no_graph():
    pytest.importorskip("mmdet")
    from kdlvfm.models.mmdet import MMDetModel

    encoder = TimmEncoder("test_resnet", pretrained=False, model_kwargs={"num_classes": 0})
    student = MMDetModel("faster-rcnn_r50_fpn_1x_coco", 3, encoder=encoder)
    with pytest.raises(ExportError, match="GFL, RetinaNet, FCOS and ATSS"):
        graph_of(student)
    gfl = graph_of(MMDetModel("gfl_r50_fpn_1x_coco", 3, encoder=encoder))
    assert isinstance(gfl, CandidatesGraph)
    assert gfl.student.tap_info("cls.0") == TapInfo(3, 8)
