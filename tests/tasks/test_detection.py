# SPDX-License-Identifier: Apache-2.0
"""Detection: the student's own loss and decoder, and average precision as pycocotools has it."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdlvfm.core import ModelCard
from kdlvfm.tasks.detection import Detection

CLASSES = ("cat", "dog", "cow", "owl")
STATS = {"mAP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}


class Stub:
    """A detector of four classes that says what it is given."""

    card = ModelCard("stub", "random")
    num_classes = 4
    task_taps = ("cls.0", "reg.0")

    def loss(self, features, target):
        return {"loss": features["cls.0"].sum() * len(target)}

    def predict(self, features, sizes):
        return [features["cls.0"].dtype, *(tuple(size.tolist()) for size in sizes)]


def scenes(count=30, seed=0):
    """Predictions near the truth, in the geometry of resized images, with crowds, areas and images without objects."""
    rng = np.random.default_rng(seed)
    predictions, target = [], []
    for _ in range(count):
        height, width = (int(side) for side in rng.integers(200, 400, 2))
        factor = rng.uniform(0.5, 1.5)
        size = torch.tensor([round(height * factor), round(width * factor)])
        original = torch.tensor([height, width])
        scale = size / original

        def made(amount, width=width, height=height):
            corner = rng.uniform(0, (width - 20, height - 20), (amount, 2))
            sides = np.exp(rng.uniform(np.log(8), np.log(150), (amount, 2)))
            end = np.minimum(corner + sides, (width, height))
            return torch.tensor(np.concatenate([corner, end], 1), dtype=torch.float32)

        truth = made(int(rng.integers(0, 8)))
        labels = torch.tensor(rng.integers(0, 3, len(truth)))  # no owl anywhere
        near = truth + torch.tensor(rng.normal(0, 2, truth.shape), dtype=torch.float32)
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 2)
        found = torch.cat([near, made(6)])
        guessed = torch.cat([labels, torch.tensor(rng.integers(0, 3, 6))])
        factors = scale.flip(0).repeat(2)
        area = (truth[:, 2:] - truth[:, :2]).prod(1) * torch.tensor(
            rng.uniform(0.5, 1, len(truth)), dtype=torch.float32
        )
        predictions.append(
            {
                "boxes": found * factors,
                "labels": guessed,
                "scores": torch.tensor(rng.random(len(found)), dtype=torch.float32),
            }
        )
        target.append(
            {
                "boxes": truth * factors,
                "labels": labels,
                "size": size,
                "scale": scale,
                "original_size": original,
                "iscrowd": torch.tensor(rng.random(len(truth)) < 0.2),
                "area": area,
                "repeated": torch.tensor(False),
            }
        )
    return predictions, target


def by_pycocotools(predictions, target):
    """The same through COCO's own code, in original pixels."""
    images, annotations, results = [], [], []
    for i, (found, truth) in enumerate(zip(predictions, target, strict=True)):
        height, width = truth["original_size"].tolist()
        images.append({"id": i, "height": height, "width": width})
        factors = truth["scale"].flip(0).repeat(2)

        def flat(boxes, factors=factors):
            corners = boxes / factors
            return torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()

        for box, label, crowd, area in zip(
            flat(truth["boxes"]), truth["labels"], truth["iscrowd"], truth["area"], strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(label),
                    "bbox": box,
                    "iscrowd": int(crowd),
                    "area": float(area),
                }
            )
        results += [
            {"image_id": i, "category_id": int(label), "bbox": box, "score": float(score)}
            for box, label, score in zip(flat(found["boxes"]), found["labels"], found["scores"], strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES)],
        }
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes, all areas, 100 boxes
    classes = [float(p[p > -1].mean()) if (p := precision[:, :, k]).max() > -1 else np.nan for k in range(len(CLASSES))]
    return {
        **{name: judge.stats[i] for name, i in STATS.items()},
        **{f"AP/{n}": c for n, c in zip(CLASSES, classes, strict=True)},
    }


def measured(predictions, target, batch=4):
    metrics = Detection(4, class_names=CLASSES).metrics()
    for first in range(0, len(target), batch):
        metrics.update(predictions[first : first + batch], target[first : first + batch])
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize("seed", range(3))
def test_precision_is_that_of_pycocotools(seed):
    predictions, target = scenes(seed=seed)
    assert any(truth["iscrowd"].any() for truth in target)
    assert any(len(truth["labels"]) == 0 for truth in target)
    expected = by_pycocotools(predictions, target)
    assert 0.1 < expected["mAP"] < 0.9
    found = measured(predictions, target)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
    assert np.isnan(found["AP/owl"])


def test_area_and_crowds_matter():
    predictions, target = scenes()
    found = measured(predictions, target)
    plain = [{**truth, "iscrowd": torch.zeros_like(truth["iscrowd"])} for truth in target]
    assert abs(measured(predictions, plain)["mAP"] - found["mAP"]) > 1e-3
    large = [{**truth, "area": truth["area"] * 100} for truth in target]
    assert measured(predictions, large)["APl"] != pytest.approx(found["APl"], abs=1e-3)


def test_a_repeated_image_does_not_count():
    predictions, target = scenes(6)
    again = {**target[0], "repeated": torch.tensor(True)}
    assert measured([*predictions, predictions[0]], [*target, again]) == pytest.approx(
        measured(predictions, target), nan_ok=True
    )


def test_perfect_none_and_forgotten():
    _, target = scenes(8)
    target = [{**truth, "iscrowd": torch.zeros_like(truth["iscrowd"])} for truth in target]
    perfect = [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))} for t in target]
    nothing = [{name: value[:0] for name, value in found.items()} for found in perfect]
    metrics = Detection(4).metrics()
    metrics.to("cpu")
    metrics.update(perfect, target)
    assert float(metrics.compute()["mAP"]) == pytest.approx(1)
    metrics.reset()
    metrics.update(nothing, target)
    assert float(metrics.compute()["mAP"]) == 0


def test_more_than_a_hundred_boxes_are_no_reason_to_warn():
    truth = scenes(1)[1][0]
    many = {"boxes": torch.rand(150, 4).cumsum(1), "labels": torch.zeros(150).long(), "scores": torch.rand(150)}
    assert measured([many], [truth])["mAP"] == pytest.approx(0, abs=0.5)


def test_the_task_asks_the_student(detection_batch):
    task, stub = Detection(4, class_names=CLASSES), Stub()
    images, target, index = task.unpack({"image": 1, "target": [2], "index": 3})
    assert (images, target, index) == (1, [2], 3)
    assert (task.primary_metric, task.truth) == ("mAP", "boxes")
    assert task.student_taps(stub) == ("cls.0", "reg.0")
    assert task.solves(stub)
    features = {"cls.0": torch.ones(2, dtype=torch.bfloat16)}
    sizes = [{"size": torch.tensor([4, 5])}, {"size": torch.tensor([6, 7])}]
    loss = task.loss(stub, features, sizes)["loss"]
    assert (loss.dtype, float(loss)) == (torch.float32, 4.0)
    assert task.predict(stub, features, sizes) == [torch.float32, (4, 5), (6, 7)]


def test_a_student_that_is_none_is_refused(student):
    with pytest.raises(ValueError, match="toy is no detector: choose one, for example student=resnet18_gfl"):
        Detection(4).student_taps(student)
    with pytest.raises(ValueError, match="stub detects 4 classes, the data has 3"):
        Detection(3).student_taps(Stub())
    assert not Detection(4).solves(student)
    assert not Detection(3).solves(Stub())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, {}), "at least 1"), ((2, {"class_names": ["a"]}), "class_names has 1 entries for 2 classes")],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    count, names = arguments
    with pytest.raises(ValueError, match=message):
        Detection(count, **names)


def test_unlabelled_images_have_no_part_in_the_loss(monkeypatch):
    monkeypatch.setattr("kdlvfm.tasks.detection._detector", lambda model: model)
    features = {tap: torch.arange(8.0).view(4, 1, 1, 2) for tap in (*Stub.task_taps, "map.0")}
    flags = [{}, {"labelled": torch.tensor(False)}, {"labelled": torch.tensor(True)}, {"labelled": torch.tensor(False)}]
    task = Detection(4)
    assert task.loss(Stub(), features, flags)["loss"] == (0 + 1 + 4 + 5) * 2
    assert task.loss(Stub(), features, flags[1::2]) == {}
