# SPDX-License-Identifier: Apache-2.0
"""Runs that a dead term ends, and runs that were killed: what diagnostics know survives."""

import pytest
import torch

from kdlvfm.distillers.kd import kd_loss
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.dead_terms import DeadTermError


def two_terms(student, teacher, call):
    return {"square": (student - teacher).square().mean(), "kl": 0.1 * kd_loss(student, teacher, 2.0)}


DEAD = {
    "zero": lambda student, teacher, call: {"term": 0 * student.mean()},
    "without a gradient": lambda student, teacher, call: {"term": (student.detach() - teacher).square().mean()},
    "constant": lambda student, teacher, call: {"term": student.mean() / student.mean().detach()},
}


@pytest.mark.parametrize("state", ["zero", "without a gradient", "constant"])
def test_a_dead_term_stops_the_run_and_says_why(logits_distiller, state, make_module, make_data, run_fit):
    def method():
        return logits_distiller(lambda *inputs: {**two_terms(*inputs), **DEAD[state](*inputs)})

    settings = {"diagnose_every": 2, "checkpoint_every": 4}
    distiller = method()
    with pytest.raises(DeadTermError, match=rf"term student/term was {state}.*run.dead_term_steps=null") as caught:
        run_fit(make_module(steps=12, distiller=distiller), make_data(steps=12), dead_term_steps=8, **settings)
    assert caught.value.term == "student/term"
    assert (caught.value.step, distiller.calls) == (8, 8)
    module = make_module(steps=12, distiller=method())
    assert run_fit(module, make_data(steps=12), "on", dead_term_steps=None, **settings).finished
    module = make_module(steps=12, distiller=method())
    assert run_fit(module, make_data(steps=12), "long", dead_term_steps=13, **settings).finished


def test_a_projector_that_learns_from_a_detached_student_is_dead_too(logits_distiller, make_module, make_data, run_fit):
    class Detached(logits_distiller):
        def forward(self, student, teacher, target=None):
            return {"fit": (self.weight * student["logits"].detach() - teacher["logits"]).square().mean()}

    distiller = Detached(None)
    with pytest.raises(DeadTermError, match="student/fit was without a gradient at all 4 observations"):
        run_fit(make_module(steps=9, distiller=distiller), make_data(steps=9), diagnose_every=2, dead_term_steps=6)
    assert not torch.equal(distiller.weight, torch.ones(3, 1, 1))


def test_a_term_that_is_away_most_of_the_time_is_not_dead(logits_distiller, make_module, make_data, run_fit):
    def sometimes(student, teacher, call):
        return {"hinge": 0 * student.mean()} if call % 3 == 1 else {"square": (student - teacher).square().mean()}

    def run(name, limit):
        module = make_module(steps=12, distiller=logits_distiller(sometimes))
        return run_fit(module, make_data(steps=12), name, diagnose_every=1, dead_term_steps=limit)

    assert run("rare", 5).finished
    with pytest.raises(DeadTermError, match=r"4 observations in the last 4 steps that had it \(step 10\)"):
        run("often", 4)


class CrashError(Exception):
    """Stands for a kill."""


class Crashing(Segmentation):
    def __init__(self, at_step):
        super().__init__(3)
        self._left = at_step

    def loss(self, student, features, target):
        self._left -= 1
        if self._left == 0:
            raise CrashError
        return super().loss(student, features, target)


@pytest.mark.parametrize("at_step", [2, 4, 6, 7, 12])
def test_a_resumed_run_has_the_points_of_a_whole_one(logits_distiller, at_step, make_module, make_data, run_fit):
    def run(name, task=None):
        module = make_module(steps=12, distiller=logits_distiller(two_terms), task=task)
        return run_fit(module, make_data(steps=12), name, diagnose_every=2, checkpoint_every=3).diagnostics

    whole = run("whole")
    assert [point["step"] for point in whole] == [1, 2, 4, 6, 8, 10, 12]
    with pytest.raises(CrashError):
        run("crashed", Crashing(at_step))
    assert run("crashed") == whole


def test_a_resumed_run_remembers_how_long_a_term_was_dead(logits_distiller, make_module, make_data, run_fit):
    def run(task=None):
        module = make_module(steps=20, distiller=logits_distiller(DEAD["zero"]), task=task)
        return run_fit(module, make_data(steps=20), diagnose_every=4, dead_term_steps=12, checkpoint_every=3)

    with pytest.raises(CrashError):
        run(Crashing(8))
    with pytest.raises(DeadTermError, match=r"at all 5 observations in the last 12 steps that had it \(step 12\)"):
        run()
