# SPDX-License-Identifier: Apache-2.0
"""A student without batch normalisation, its data and its module: whole runs in a fraction of a second."""

from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from kdlvfm.core import Distiller, FeatureModel, ModelCard, TapInfo, Teacher
from kdlvfm.data.segmentation import SegmentationData
from kdlvfm.distillers import KD
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.fit import fit
from kdlvfm.training.module import DistillationModule
from kdlvfm.training.optimizers import Plan, Plans

CLASSES = 3
SIZE = 8


class SmallNet(FeatureModel):
    """Two convolutions with dropout between them."""

    def __init__(self, width=6, dropout=0.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.card = ModelCard("small", "random")
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(width, CLASSES, 1)
        )

    def taps(self):
        return {"logits": TapInfo(CLASSES, 1)}

    def forward(self, images, taps):
        return {"logits": self.net(images - 0.5)}


class NoiseSamples:
    """Random images whose class depends on the brightest colour, so that there is something to learn."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.images[index].argmax(0)


class NoiseData(SegmentationData):
    """Twelve training samples, six of validation."""

    name = "noise"
    class_names = ("r", "g", "b")
    palette = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    licence = None
    splits = ("train", "val")

    def samples(self, split):
        return NoiseSamples(12 if split == "train" else 6, seed=len(split))

    def split_hash(self):
        return "0" * 64


def plan(**changes):
    return Plan(**{"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9), **changes})


@pytest.fixture
def small_net():
    return SmallNet


@pytest.fixture
def make_plan():
    return plan


@pytest.fixture
def make_data():
    def make(steps=6, batch_size=4, seed=5, **changes):
        return NoiseData(steps=steps, batch_size=batch_size, seed=seed, **changes)

    return make


@pytest.fixture
def make_module():
    """A factory of modules; each call starts from the same weights."""

    def make(steps=6, *, distiller=None, student=None, teacher="default", plans=None, task=None, **changes):
        return DistillationModule(
            student=student or SmallNet(),
            distiller=distiller or KD(temperature=2.0),
            teacher=Teacher(SmallNet(width=9, seed=7)) if teacher == "default" else teacher,
            task=task or Segmentation(CLASSES),
            plans=plans or Plans(plan()),
            steps=steps,
            **{"batches_per_epoch": 3, **changes},
        )

    return make


@pytest.fixture
def run_fit(tmp_path, capsys):
    """`fit` on the CPU, quiet, in a folder of the test's own."""

    def run(module, data, folder=None, trainer=None, **changes):
        settings = {"checkpoint_every": 100, "progress": "none", **changes}
        where = tmp_path / (folder or "run")
        options = {"accelerator": "cpu", "devices": 1, "precision": "32-true", **(trainer or {})}
        return fit(module=module, data=data, folder=where, trainer=options, **settings)

    return run


class Noted(Logger):
    """Keeps what it is given."""

    name, version = "noted", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        """There are none to keep."""


@pytest.fixture
def make_noted():
    return Noted


@pytest.fixture
def weights_of():
    def weights(module):
        return {name: value.detach().clone() for name, value in module.student.state_dict().items()}

    return weights


class Logits(Distiller):
    """What its function makes of the logits, of a weight of its own, and of the number of the call."""

    student_taps = teacher_taps = ("logits",)

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
        self._function = function
        self.calls = 0

    def forward(self, student, teacher, target=None):
        self.calls += 1
        return self._function(self.weight * student["logits"], teacher["logits"], self.calls)


@pytest.fixture
def logits_distiller():
    """The class."""
    return Logits
