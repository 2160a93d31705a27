# SPDX-License-Identifier: Apache-2.0
"""The segmentation task against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.tasks.segmentation import Segmentation


def random_target(generator, classes=5, shape=(3, 9, 11)):
    target = torch.randint(0, classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.2] = 255
    target[torch.rand(shape, generator=generator) < 0.2] = -1
    return target


def loss(task, logits, target):
    terms = task.loss(None, {"logits": logits}, target)
    assert terms.keys() == {"cross_entropy"}
    return terms["cross_entropy"]


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 0.0, 3.0]])
def test_loss_is_the_mean_over_labelled_pixels(weights):
    generator = torch.Generator().manual_seed(0)
    target = random_target(generator)
    logits = torch.randn(3, 5, 9, 11, generator=generator, dtype=torch.float64)
    total = count = 0.0
    for b, y, x in np.ndindex(*target.shape):
        label = int(target[b, y, x])
        if label in (255, -1):
            continue
        weight = 1.0 if weights is None else weights[label]
        total += weight * (torch.logsumexp(logits[b, :, y, x], 0) - logits[b, label, y, x]).item()
        count += weight
    task = Segmentation(5, class_weights=weights)
    assert loss(task, logits, target).item() == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("fill", [255, -1])
def test_without_labelled_pixels_the_loss_is_zero_and_has_a_graph(fill, weights):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = loss(Segmentation(3, class_weights=weights), logits, torch.full((2, 4, 4), fill))
    assert value.item() == 0
    value.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_pixels_that_count_nowhere_get_no_gradient():
    generator = torch.Generator().manual_seed(1)
    target = random_target(generator)
    logits = torch.randn(3, 5, 9, 11, generator=generator, requires_grad=True)
    loss(Segmentation(5), logits, target).backward()
    touched = logits.grad.abs().sum(1) > 0
    assert torch.equal(touched, (target != 255) & (target != -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype):
    generator = torch.Generator().manual_seed(2)
    target = random_target(generator)
    logits = (20 * torch.randn(3, 5, 9, 11, generator=generator)).to(dtype)
    value = loss(Segmentation(5), logits, target)
    assert value.dtype == torch.float32
    known = target.where(target >= 0, 255)
    assert value.item() == pytest.approx(F.cross_entropy(logits.double(), known, ignore_index=255).item(), rel=1e-5)


def slow_scores(predictions, target, classes):
    """IoU of each class by set operations, their mean over classes that occur, and the share of right pixels."""
    counted = (target != 255) & (target != -1)
    iou = []
    for k in range(classes):
        truth, found = (target == k) & counted, (predictions == k) & counted
        union = np.logical_or(truth, found).sum()
        iou.append(np.logical_and(truth, found).sum() / union if union else math.nan)
    occurring = [value for value in iou if not math.isnan(value)]
    return iou, sum(occurring) / len(occurring), (predictions == target)[counted].mean()


def test_metrics_equal_a_slow_count_over_all_batches():
    generator = torch.Generator().manual_seed(3)
    names = ["sky", "road", "tree", "car", "never"]
    metrics = Segmentation(5, class_names=names).metrics()
    seen = []
    for size in (3, 1, 2):
        target = random_target(generator, classes=4, shape=(size, 9, 11))
        predictions = torch.where(
            torch.rand(target.shape, generator=generator) < 0.5,
            target.clamp(0, 3),
            torch.randint(0, 4, target.shape, generator=generator),
        )
        metrics.update(predictions, target)
        seen.append((predictions.numpy(), target.numpy()))
    predictions, target = (np.concatenate(part) for part in zip(*seen, strict=True))
    iou, mean, accuracy = slow_scores(predictions, target, 5)
    scores = metrics.compute()
    assert set(scores) == {"miou", "pixel_accuracy", *(f"iou/{name}" for name in names)}
    assert scores["miou"].item() == pytest.approx(mean, rel=1e-12)
    assert scores["pixel_accuracy"].item() == pytest.approx(accuracy, rel=1e-12)
    for name, value in zip(names, iou, strict=True):
        assert scores[f"iou/{name}"].item() == pytest.approx(value, rel=1e-12, nan_ok=True)
    assert math.isnan(scores["iou/never"])
    metrics.reset()
    metrics.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int64))
    assert metrics.compute()["miou"] == 1


def test_a_class_that_is_only_predicted_counts_as_zero():
    metrics = Segmentation(3).metrics()
    metrics.update(torch.tensor([[[0, 2]]]), torch.tensor([[[0, 0]]]))
    scores = metrics.compute()
    assert [scores[f"iou/{k}"].item() for k in (0, 2)] == [0.5, 0.0]
    assert scores["miou"] == 0.25


def test_what_images_add_is_counted_by_hand_and_sums_to_the_confusion():
    generator = torch.Generator().manual_seed(2)
    task, target = Segmentation(5), random_target(generator)
    predictions = torch.randint(0, 5, target.shape, generator=generator)
    found = task.per_image(predictions, target)
    for image, k in np.ndindex(len(target), 5):
        labelled = (target[image] != 255) & (target[image] != -1)
        truth, guess = (target[image] == k) & labelled, (predictions[image] == k) & labelled
        expected = {"truth": truth.sum(), "predicted": guess.sum(), "hits": (truth & guess).sum()}
        assert {name: value[image, k] for name, value in found.items()} == expected
    metrics = task.metrics()
    metrics.update(predictions, target)
    assert torch.equal(found["truth"].sum(0), metrics.confusion.sum(1))
    assert torch.equal(found["predicted"].sum(0), metrics.confusion.sum(0))
    assert torch.equal(found["hits"].sum(0), metrics.confusion.diagonal())


def test_a_batch_without_labels_adds_nothing():
    metrics = Segmentation(3).metrics()
    metrics.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.tensor([[[255, -1], [255, -1]]]))
    assert metrics.confusion.sum() == 0
    assert math.isnan(metrics.compute()["miou"])


def test_a_student_must_have_logits(toy_model):
    assert Segmentation(3).student_taps(toy_model()) == ("logits",)
    with pytest.raises(ValueError, match="toy is an encoder alone"):
        Segmentation(3).student_taps(toy_model(num_classes=0))


def test_unpack_and_predict():
    task = Segmentation(3)
    batch = {"image": torch.zeros(2, 3, 4, 4), "mask": torch.zeros(2, 4, 4), "index": torch.arange(2)}
    assert all(a is b for a, b in zip(task.unpack(batch), batch.values(), strict=True))
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2] = 1
    assert task.predict(None, {"logits": logits}, None).tolist() == [[[2, 2], [2, 2]]]
    assert task.primary_metric == "miou"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "from 2 to 255"),
        ({"num_classes": 256}, "from 2 to 255"),
        ({"num_classes": 3, "class_names": ["a"]}, "class_names has 1 entries for 3 classes"),
        ({"num_classes": 3, "class_weights": [1.0, 2.0]}, "class_weights has 2 entries for 3 classes"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Segmentation(**arguments)


def test_logits_and_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"logits \(1, 4, 2, 2\) do not fit 3 classes"):
        loss(Segmentation(3), torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="in the size of the images"):
        loss(Segmentation(3), torch.zeros(1, 3, 1, 1), torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="the mask holds 0 to 3"):
        Segmentation(3).metrics().update(torch.zeros(1, 1, 2, dtype=torch.int64), torch.tensor([[[0, 3]]]))
