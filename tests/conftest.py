# SPDX-License-Identifier: Apache-2.0
"""Toy networks, a toy task and a batch: everything a distiller meets in a run, in milliseconds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.core import Context, FeatureModel, ModelCard, Step, TapInfo, Task, Teacher, resolve_tap
from kdlvfm.core.split_head import HeadTails

NUM_CLASSES = 5
SIZE = (24, 32)
VOID, UNLABELLED = 255, -1
BINS = 6


class ToyModel(FeatureModel):
    """Three convolutions with batch normalisation, and a dense head, which labels whole images too.

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
            self._facts["logits_distilled"] = TapInfo(num_classes, None)
        self.head_taps = ("decoder",) if num_classes else ()
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
            features |= self.apply_head(features, images.shape[-2:])
            features["logits_distilled"] = self.net["head"](features["decoder"]).mean((2, 3))
        return {tap: features[name] for tap, name in names.items()}

    def apply_head(self, features, size):
        coarse = self.net["head"](features["decoder"])
        return {"logits": F.interpolate(coarse, size, mode="bilinear", align_corners=False)}


class ToyDetector(FeatureModel):
    """Three convolutions, a simple feature pyramid on the last of them, and a head of two stacks that can be split.

    Args:
        dims: channels of `map.0` to `map.2`.
        strides: of the three convolutions; `map.<i>` has the product of the first i + 1.
        width: channels of the pyramid and of the head.
        levels: strides of the pyramid.
        bins: of the distribution of each side of a box; 1 for plain numbers.
    """

    def __init__(self, dims=(4, 6, 8), strides=(2, 2, 2), width=6, levels=(4, 8, 16), bins=BINS):
        super().__init__()
        self.card, self.levels, self.bins = ModelCard("toy detector", "random"), levels, bins
        self.net = nn.ModuleDict({"encoder": ToyModel(dims, strides, num_classes=0).net["stages"]})
        self.net["neck"] = nn.ModuleList(nn.Conv2d(dims[-1], width, 1) for _ in levels)
        outputs = {"cls": NUM_CLASSES, "reg": 4 * bins}
        self.net["stems"] = nn.ModuleDict({kind: nn.Conv2d(width, width, 3, 1, 1) for kind in outputs})
        self.net["tails"] = nn.ModuleDict({kind: nn.Conv2d(width, dim, 3, 1, 1) for kind, dim in outputs.items()})
        self.net["scales"] = nn.ParameterList(torch.tensor(1.0 + i) for i in range(len(levels)))
        self._facts, stride = {}, 1
        for i, (dim, step) in enumerate(zip(dims, strides, strict=True)):
            stride *= step
            self._facts[f"map.{i}"] = TapInfo(dim, stride)
        for kind, dim in {"fpn": width, "cls_mid": width, "reg_mid": width, **outputs}.items():
            self._facts.update({f"{kind}.{i}": TapInfo(dim, stride) for i, stride in enumerate(levels)})
        self.head_taps = tuple(f"fpn.{i}" for i in range(len(levels)))

    def taps(self):
        return dict(self._facts)

    def head_tails(self, index):
        def reg(x):
            return self.net["scales"][index] * self.net["tails"]["reg"](F.silu(x))

        boxes = F.softplus if self.bins == 1 else None
        return HeadTails(cls=lambda x: self.net["tails"]["cls"](F.silu(x)), reg=reg, boxes=boxes)

    def forward(self, images, taps):
        names = {tap: resolve_tap(tap, self._facts, self.card.name)[0] for tap in taps}
        features, x = {}, images - 0.5
        for i, stage in enumerate(self.net["encoder"]):
            x = features[f"map.{i}"] = stage(x)
        for i, stride in enumerate(self.levels):
            features[f"fpn.{i}"] = self.net["neck"][i](self._on_grid(x, stride, images.shape[-2:]))
        features |= self.apply_head(features, images.shape[-2:])
        return {tap: features[name] for tap, name in names.items()}

    def _on_grid(self, x, stride, size):
        return F.interpolate(x, [-(-side // stride) for side in size], mode="bilinear", align_corners=False)

    def apply_head(self, features, size):
        found = {}
        for i, stride in enumerate(self.levels):
            level = self._on_grid(features[f"fpn.{i}"], stride, size)
            middles = {kind: stem(level) for kind, stem in self.net["stems"].items()}
            ends = {"cls": self.head_tails(i).cls, "reg": self.head_tails(i).reg}
            for kind, middle in middles.items():
                found |= {f"{kind}_mid.{i}": middle, f"{kind}.{i}": ends[kind](middle)}
        return found


class ToyTask(Task):
    """Pixel-wise cross-entropy that passes over void and unlabelled pixels."""

    primary_metric = "accuracy"
    truth = "masks"

    def student_taps(self, student):
        return ("logits",)

    def solves(self, model):
        return True

    def unpack(self, batch):
        return batch["image"], batch["mask"], batch["index"]

    def loss(self, student, features, target):
        known = target.where(target != UNLABELLED, VOID)
        return {"cross_entropy": F.cross_entropy(features["logits"].float(), known, ignore_index=VOID)}

    def predict(self, student, features, target):
        return features["logits"].argmax(1)

    def metrics(self):
        pytest.fail("no test measures on toys")


class ToyDetectionTask(ToyTask):
    """Scores are to be low and distributions flat, wherever the boxes are."""

    primary_metric = "ap"
    truth = "boxes"
    taps = ("cls.0", "cls.1", "cls.2", "reg.0", "reg.1", "reg.2")

    def student_taps(self, student):
        return self.taps

    def unpack(self, batch):
        return batch["image"], batch["boxes"], batch["index"]

    def loss(self, student, features, target):
        scores, sides = ([features[tap].float() for tap in self.taps if kind in tap] for kind in ("cls", "reg"))
        return {
            "classes": sum(F.softplus(x).mean() for x in scores),
            "boxes": sum(x.square().mean() for x in sides),
        }

    def predict(self, student, features, target):
        pytest.fail("no test asks toys for boxes")


@pytest.fixture
def toy_model():
    """The class, for tests that choose its sizes."""
    return ToyModel


@pytest.fixture
def toy_detector():
    """The class, for tests that choose its sizes."""
    return ToyDetector


@pytest.fixture
def detector():
    """A student."""
    torch.manual_seed(1)
    return ToyDetector()


@pytest.fixture
def detector_teacher():
    """Wider than the student, with the same pyramid on an encoder that is, like a ViT, of one stride."""
    torch.manual_seed(2)
    return Teacher(ToyDetector(dims=(7, 9, 12), strides=(4, 1, 1), width=8))


@pytest.fixture
def detection_task():
    return ToyDetectionTask()


@pytest.fixture
def detection_context(detector, detector_teacher, detection_task):
    return Context(
        detector, detector_teacher, detection_task, num_classes=NUM_CLASSES, num_samples=12, batch_shape=(4, *SIZE)
    )


@pytest.fixture
def detection_batch():
    """Four images: two boxes that overlap, one small and one large box, none at all, and a box beside padding."""
    boxes = [
        [[2.0, 3.0, 15.0, 13.0], [9.0, 6.0, 27.0, 20.0]],
        [[1.0, 1.0, 4.0, 5.0], [0.0, 0.0, 32.0, 24.0]],
        [],
        [[6.5, 4.0, 17.5, 12.0]],
    ]
    sizes = [SIZE, SIZE, SIZE, (16, 24)]
    target = [
        {"boxes": torch.tensor(found).reshape(-1, 4), "labels": torch.arange(len(found)), "size": torch.tensor(size)}
        for found, size in zip(boxes, sizes, strict=True)
    ]
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(4, 3, *SIZE, generator=generator)
    return {"image": images, "boxes": target, "index": torch.tensor([5, 0, 11, 3])}


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
    return Context(student, teacher, task, num_classes=NUM_CLASSES, num_samples=12, batch_shape=(4, *SIZE))


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


@pytest.fixture
def traced(monkeypatch):
    """`torch.compile` without its code generator, which takes minutes."""
    torch._dynamo.reset()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))
