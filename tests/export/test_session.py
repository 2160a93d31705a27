# SPDX-License-Identifier: Apache-2.0
"""A file as a model: what a task reads of it, and what goes wrong with it."""

import pytest
import torch

from kdlvfm.core.detector import Selection
from kdlvfm.export.graph import ExportError, graph_of
from kdlvfm.export.session import OnnxDetector, OnnxModel, open_graph
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.fit import evaluate

CLASSES = 5


def batches():
    generator = torch.Generator().manual_seed(0)
    for index in range(3):
        images = torch.rand(2, 3, 64, 48 + 16 * index, generator=generator)
        masks = torch.randint(0, CLASSES, (2, *images.shape[-2:]), generator=generator)
        yield {"image": images, "mask": masks, "index": torch.arange(2)}


def test_a_task_measures_a_file_as_it_measures_the_student(segmenter):
    model = open_graph(segmenter.path, segmenter.graph)
    assert type(model) is OnnxModel
    assert model.taps().keys() == {"logits"}
    assert model.tap_info("logits").dim == CLASSES
    task = Segmentation(CLASSES)
    measured, expected = (evaluate(x, batches(), task) for x in (model, segmenter.graph.student))
    assert measured["miou"] == pytest.approx(expected["miou"], abs=1e-4)
    assert measured["iou"] == pytest.approx(expected["iou"], abs=1e-3)


def test_a_broken_file_is_named(segmenter, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(segmenter.path.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"onnxruntime cannot load broken.onnx"):
        open_graph(tmp_path / "broken.onnx", segmenter.graph)


def test_images_that_do_not_fit_are_named(segmenter):
    with pytest.raises(ExportError, match=r"segmenter.onnx fails on images \(1, 4, 64, 64\)"):
        open_graph(segmenter.path, segmenter.graph).everything(torch.zeros(1, 4, 64, 64))


class Decoder:
    """What the graph of a detector knows of selection."""

    def __init__(self, rates):
        self.selection, self.rates = Selection(0.3, 50, 0.5, 4), rates


@pytest.fixture
def detector(segmenter, toy_model):
    """The model of a detector's file; it is not run, so any file will do."""

    class ToyDense(toy_model):
        num_classes, task_taps, rates = 2, (), False

        def box_decoder(self):
            return Decoder(self.rates)

        def loss(self, features, target):
            pytest.fail("it is described, not run")

        def predict(self, features, sizes):
            pytest.fail("it is described, not run")

    def make(nms, rates=False):
        student = ToyDense()
        student.rates = rates
        model = open_graph(segmenter.path, graph_of(student, nms))
        assert isinstance(model, OnnxDetector)
        return model

    return make


BOXES = torch.tensor([[[0.0, 0, 50, 90], [0, 2, 50, 90], [60, 10, 90, 40]]])
SIZES = [torch.tensor([80, 70])]


def test_detections_end_where_the_image_ends(detector):
    features = {"boxes": BOXES, "scores": torch.tensor([[0.9, 0.5, 0.0]]), "labels": torch.tensor([[1, 0, -1]])}
    (found,) = detector(nms=True).predict(features, SIZES)
    assert found["boxes"].tolist() == [[0, 0, 50, 80], [0, 2, 50, 80]]
    assert found["labels"].tolist() == [1, 0]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5])


@pytest.mark.parametrize(("rates", "count"), [(False, 2), (True, 3)])
def test_without_nms_in_the_file_detections_are_selected_here(detector, rates, count):
    scores = torch.tensor([[[0.9, 0.0], [0.5, 0.1], [0.0, 0.4]]])
    (found,) = detector(False, rates).predict({"boxes": BOXES, "scores": scores}, SIZES)
    # The second box is suppressed in class 0; in class 1 it is below the threshold, which is none of rated scores.
    assert found["labels"].tolist() == [0, 1, 1][:count]
    assert found["boxes"][0].tolist() == [0, 0, 50, 80]


def test_a_graph_cannot_be_trained(detector):
    with pytest.raises(TypeError, match="cannot be trained"):
        detector(nms=True).loss({}, [])
