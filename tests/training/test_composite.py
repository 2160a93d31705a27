# SPDX-License-Identifier: Apache-2.0
"""A composite with everything that a checkpoint must hold: calibration, schedules, phases and a second group."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.core import Distiller, Update
from kdlvfm.distillers import CWD, KD, SCKD, Compose
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.optimizers import Plans

STEPS = 9
WEIGHTS = {"kd": {"share": 0.3, "warmup": 0.3}, "cwd": {"start": 0.4, "decay": "cosine"}}


class CrashError(Exception):
    """Stands for a kill: nothing in the library catches it."""


class Crashing(Segmentation):
    """Fails at one training step."""

    def __init__(self, at_step):
        super().__init__(3)
        self._left = at_step

    def loss(self, student, features, target):
        self._left -= 1
        if self._left == 0:
            raise CrashError
        return super().loss(student, features, target)


class Biased(Distiller):
    """The student in even epochs, a bias on its logits in odd ones."""

    student_taps = ("logits",)

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, student, teacher, target=None):
        return {"bias": F.cross_entropy(student["logits"] + self.bias, target, ignore_index=255)}

    def parameter_groups(self, student):
        return {"student": list(student.parameters()), "bias": [self.bias]}

    def updates(self, step):
        if step.epoch % 2 == 0:
            yield from super().updates(step)
        else:
            logits = step.student_features(["logits"])["logits"].detach()
            yield Update(self({"logits": logits}, {}, step.target), "bias")


@pytest.fixture(params=[Compose, partial(SCKD, at=None)], ids=["compose", "sckd"])
def run_once(request, make_module, make_data, make_plan, small_net, run_fit):
    def run(folder, task=None, **settings):
        module = make_module(
            steps=STEPS,
            student=small_net(dropout=0.3),
            distiller=request.param({"kd": KD(), "cwd": CWD(), "biased": Biased()}, WEIGHTS, calibrate_every=4),
            task=task or Segmentation(3),
            plans=Plans(make_plan(), {"biased/bias": make_plan(clip_norm=0.01)}),
            batches_per_epoch=2,
        )
        return module, run_fit(module, make_data(steps=STEPS), folder, **settings)

    return run


@pytest.mark.parametrize("at_step", [2, 3, 5, 8])
def test_a_crashed_run_resumes_to_the_same_bits(at_step, run_once):
    whole, _ = run_once("whole", checkpoint_every=2)
    with pytest.raises(CrashError):
        run_once("crashed", task=Crashing(at_step), checkpoint_every=2)
    resumed, result = run_once("crashed", checkpoint_every=2)
    assert result.finished
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert (expected["distiller._extra_state"][0] > 0).all(), "kd was never measured"
    assert (whole.distiller.parts["biased"].bias != 0).any()


def test_a_plan_may_be_for_a_group_of_a_part(run_once):
    module, _ = run_once("run")
    assert list(module._groups) == ["student", "biased/bias"]
    # Four odd steps of SGD at 0.1 with momentum and gradients of length 0.01.
    assert 0 < module.distiller.parts["biased"].bias.norm() < 0.02


def test_a_module_knows_that_an_update_may_leave_parameters_out(make_module):
    assert not make_module(distiller=Compose({"kd": KD()})).moves_subsets
    assert make_module(distiller=Compose({"kd": KD()}, {"kd": WEIGHTS["kd"]})).moves_subsets
    assert make_module(distiller=SCKD({"kd": KD()})).moves_subsets
