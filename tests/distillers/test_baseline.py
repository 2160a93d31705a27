# SPDX-License-Identifier: Apache-2.0
"""The baseline asks for nothing and adds nothing."""

from kdlvfm.core import Context
from kdlvfm.distillers import Baseline


def test_it_taps_nothing_holds_nothing_and_adds_nothing(student, task):
    baseline = Baseline.from_context(Context(student, None, task, num_classes=5, num_samples=3))
    assert baseline.student_taps == baseline.teacher_taps == ()
    assert list(baseline.parameters()) == []
    assert baseline.state_dict() == {}
    assert baseline({}, {}) == {}


def test_a_step_is_the_task_alone_and_runs_no_teacher(make_step, teacher, student):
    (update,) = Baseline().updates(make_step())
    assert list(update.terms) == ["cross_entropy"]
    assert update.group == "student"
    assert teacher.model.calls == []
    assert student.calls == [("logits",)]
