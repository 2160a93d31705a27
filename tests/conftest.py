# SPDX-License-Identifier: Apache-2.0
"""Toy networks, a toy task and a batch: everything a distiller meets in a run, in milliseconds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.core import Context, FeatureModel, ModelCard, Step, TapInfo, Task, Teacher, resolve_tap

NUM_CLASSES = 5
SIZE = (24, 32)
VOID, UNLABELLED = 255, -1


class ToyModel(FeatureModel):
    """Three convolutions with batch normalisation, and a dense head.

    Args:
        dims: channels of `map.0` to `map.2`.
        strides: of the three convolutions; `map.<i>` has the product of the first i + 1.
        num_classes: of `logits`; 0 for a network without a head.
    """

    def __init__(self, dims=(4, 6, 8), strides=(2, 2, 2), num_classes=NUM_CLASSES):
        super().__init__()
        self.card = ModelCard("toy", "random")
        stages, before = [], 3
        for dim, stride in zip(dims, strides, strict=True):
            stages.append(nn.Sequential(nn.Conv2d(before, dim, 3, stride, 1), nn.BatchNorm2d(dim), nn.SiLU()))
            before = dim
        self.net = nn.ModuleDict({"stages": nn.ModuleList(stages), "decoder": nn.Conv2d(before, 2 * before, 1)})
        if num_classes:
            self.net["head"] = nn.Conv2d(2 * before, num_classes, 1)
        self._facts, stride = {}, 1
        for i, (dim, step) in enumerate(zip(dims, strides, strict=True)):
            stride *= step
            self._facts[f"map.{i}"] = TapInfo(dim, stride)
        self._facts["tokens"] = TapInfo(before, stride)
        self._facts["pooled"] = TapInfo(before, None)
        self._facts["decoder"] = TapInfo(2 * before, stride)
        if num_classes:
            self._facts["logits"] = TapInfo(num_classes, 1)
        self.calls = []

    def taps(self):
        return dict(self._facts)

    def forward(self, images, taps):
        self.calls.append(tuple(taps))
        names = {tap: resolve_tap(tap, self._facts, self.card.name)[0] for tap in taps}
        features, x = {}, images - 0.5
        for i, stage in enumerate(self.net["stages"]):
            x = features[f"map.{i}"] = stage(x)
        features["tokens"] = x.flatten(2).transpose(1, 2)
        features["pooled"] = x.mean((2, 3))
        features["decoder"] = self.net["decoder"](x)
        if "head" in self.net:
            coarse = self.net["head"](features["decoder"])
            features["logits"] = F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=False)
        return {tap: features[name] for tap, name in names.items()}


class ToyTask(Task):
    """Pixel-wise cross-entropy that passes over void and unlabelled pixels."""

    student_taps = ("logits",)
    primary_metric = "accuracy"

    def unpack(self, batch):
        return batch["image"], batch["mask"], batch["index"]

    def loss(self, student, features, target):
        known = target.where(target != UNLABELLED, VOID)
        return {"cross_entropy": F.cross_entropy(features["logits"].float(), known, ignore_index=VOID)}

    def predict(self, features):
        return features["logits"].argmax(1)

    def metrics(self):
        raise NotImplementedError


@pytest.fixture
def toy_model():
    """The class, for tests that choose its sizes."""
    return ToyModel


@pytest.fixture
def student():
    torch.manual_seed(1)
    return ToyModel()


@pytest.fixture
def teacher():
    """Wider than the student and, like a ViT, of one stride on all maps."""
    torch.manual_seed(2)
    return Teacher(ToyModel(dims=(7, 9, 12), strides=(4, 1, 1)))


@pytest.fixture
def task():
    return ToyTask()


@pytest.fixture
def context(student, teacher, task):
    return Context(student, teacher, task, num_classes=NUM_CLASSES, num_samples=12)


@pytest.fixture
def batch():
    """Four images; the third is unlabelled, and all have a void border."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.randint(0, NUM_CLASSES, (4, *SIZE), generator=generator)
    mask[2] = UNLABELLED
    mask[:, :2] = VOID
    return {"image": torch.rand(4, 3, *SIZE, generator=generator), "mask": mask, "index": torch.tensor([5, 0, 11, 3])}


@pytest.fixture
def make_step(student, teacher, task, batch):
    """A factory of steps on the one batch; `changes` replace fields."""

    def make(**changes):
        images, target, index = task.unpack(batch)
        fields = {
            "images": images,
            "target": target,
            "index": index,
            "epoch": 0,
            "batch": 0,
            "student": student,
            "teacher": teacher,
            "task": task,
        }
        return Step(**{**fields, **changes})

    return make
