# SPDX-License-Identifier: Apache-2.0
"""What loggers are given of a run, and of one that goes on."""

import torch

from kdlvfm.tasks.segmentation import Segmentation


class CrashError(Exception):
    """Stands for a kill: nothing in the library catches it."""


class Crashing(Segmentation):
    """Fails in its sixteenth step."""

    def __init__(self):
        super().__init__(3)
        self._left = 16

    def loss(self, student, features, target):
        self._left -= 1
        if not self._left:
            raise CrashError
        return super().loss(student, features, target)


def test_loggers_get_the_terms_of_every_tenth_step_of_a_resumed_run_too(make_module, make_data, run_fit, make_noted):
    def run(folder, task=None):
        noted = make_noted()
        module = make_module(steps=33, task=task)
        try:
            run_fit(module, make_data(steps=33), folder, loggers=[noted], checkpoint_every=13, diagnose_every=None)
        except CrashError:
            assert task is not None
        return module, [(step + 1, row) for step, row in noted.rows]

    module, rows = run("whole")
    assert [step for step, _ in rows] == [10, 20, 30]
    assert all(row.keys() >= {"train/student/cross_entropy", "train/student/kd"} for _, row in rows)
    assert set(module.terms) == {"train/student/cross_entropy", "train/student/kd"}
    torch.testing.assert_close(module.loss, torch.stack([*module.terms.values()]).sum())
    assert not module.loss.requires_grad
    assert run("crashed", Crashing())[1] == rows[:1]
    assert run("crashed")[1] == rows[1:]
