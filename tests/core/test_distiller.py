# SPDX-License-Identifier: Apache-2.0
"""What every distiller inherits: building from a context, parameter groups, and one update a step."""

import pytest
import torch
from torch import nn

from kdlvfm.core import Context, Distiller, TapError
from kdlvfm.core.align import match_size


class Regress(Distiller):
    """A projector and one term."""

    def __init__(self, student_dim, teacher_dim, *, student_tap="map.-1", teacher_tap="map.0", term="regress"):
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.projector = nn.Conv2d(student_dim, teacher_dim, 1)
        self.term = term
        self.seen = []

    @classmethod
    def from_context(cls, context, **hparams):
        return cls(**context.tap_dims(cls, hparams), **hparams)

    def forward(self, student, teacher, target=None):
        self.seen.append((set(student), set(teacher), target))
        first, second = match_size(self.projector(student[self.student_taps[0]]), teacher[self.teacher_taps[0]])
        return {self.term: (first - second).square().mean()}


class Silent(Distiller):
    """No taps, no terms."""

    def forward(self, student, teacher, target=None):
        assert teacher == {}
        return {}


def test_tap_dims_come_from_the_constructors_defaults(context):
    assert context.tap_dims(Regress, {}) == {"student_dim": 8, "teacher_dim": 7}


def test_tap_dims_follow_the_taps_chosen(context):
    chosen = {"student_tap": "map.0", "teacher_tap": "pooled"}
    assert context.tap_dims(Regress, chosen) == {"student_dim": 4, "teacher_dim": 12}
    regress = Regress.from_context(context, **chosen, term="other")
    assert regress.projector.weight.shape == (12, 4, 1, 1)
    assert regress.term == "other"


def test_tap_dims_leave_out_a_dimension_that_is_given(context):
    given = {"teacher_tap": "module:decoder", "teacher_dim": 24}
    assert context.tap_dims(Regress, given) == {"student_dim": 8}
    assert Regress.from_context(context, **given).projector.weight.shape == (24, 8, 1, 1)


def test_tap_dims_of_a_wrong_tap_or_without_a_teacher(context):
    with pytest.raises(TapError, match=r"toy has no tap 'map.9'"):
        context.tap_dims(Regress, {"student_tap": "map.9"})
    alone = Context(context.student, None, context.task, context.num_classes, context.num_samples)
    with pytest.raises(ValueError, match="needs a teacher"):
        alone.tap_dims(Regress, {})
    assert context.require_teacher() is context.teacher


def test_from_context_hands_its_arguments_on(context):
    class Chosen(Silent):
        def __init__(self, strength=1):
            super().__init__()
            self.strength = strength

    assert Chosen.from_context(context, strength=3).strength == 3
    with pytest.raises(TypeError, match="unexpected keyword"):
        Chosen.from_context(context, force=3)


def test_one_group_holds_student_and_projector_but_nothing_frozen(student):
    regress = Regress(8, 7)
    frozen = next(student.parameters()).requires_grad_(False)
    groups = regress.parameter_groups(student)
    assert list(groups) == ["student"]
    expected = [*list(student.parameters())[1:], *regress.parameters()]
    assert [id(p) for p in groups["student"]] == [id(p) for p in expected]
    assert all(p is not frozen for p in groups["student"])


def test_one_update_with_the_terms_of_task_and_distiller(make_step, batch):
    regress = Regress(8, 7)
    step = make_step()
    updates = list(regress.updates(step))
    assert len(updates) == 1
    assert updates[0].group == "student"
    assert list(updates[0].terms) == ["cross_entropy", "regress"]
    student_taps, teacher_taps, target = regress.seen[0]
    assert student_taps == {"logits", "map.-1"}
    assert teacher_taps == {"map.0"}
    assert target is batch["mask"]


def test_both_networks_run_once_on_the_taps_that_are_read(make_step, student, teacher):
    list(Regress(8, 7).updates(make_step()))
    assert student.calls == [("logits", "map.-1")]
    assert teacher.model.calls == [("map.0",)]


def test_a_tap_that_both_read_is_asked_for_once(make_step, student):
    list(Regress(5, 7, student_tap="logits").updates(make_step()))
    assert student.calls == [("logits",)]


def test_terms_are_those_computed_by_hand(make_step, student, teacher, task, batch):
    student.eval()
    regress = Regress(8, 7)
    (update,) = regress.updates(make_step())
    features = student(batch["image"], ["logits", "map.2"])
    goal = teacher(batch["image"], ["map.0"])["map.0"]
    projected, goal = match_size(regress.projector(features["map.2"]), goal)
    assert torch.equal(update.terms["regress"], (projected - goal).square().mean())
    assert torch.equal(update.terms["cross_entropy"], task.loss(student, features, batch["mask"])["cross_entropy"])


def test_a_name_used_twice_is_an_error(make_step):
    with pytest.raises(ValueError, match="both have a term called cross_entropy"):
        list(Regress(8, 7, term="cross_entropy").updates(make_step()))


def test_without_teacher_taps_no_teacher_runs(make_step, teacher):
    (update,) = Silent().updates(make_step())
    assert list(update.terms) == ["cross_entropy"]
    assert teacher.model.calls == []


def test_without_a_teacher(make_step):
    (update,) = Silent().updates(make_step(teacher=None))
    assert list(update.terms) == ["cross_entropy"]


def test_nothing_happens_before_an_update_is_asked_for(make_step, student):
    Silent().updates(make_step())
    assert student.calls == []


def test_the_tasks_loss_is_computed_unless_it_was_seen(make_step, student):
    step = make_step()
    features = step.student_features(["logits"])
    computed = step.task_loss(features)
    assert list(computed) == ["cross_entropy"]
    step.seen.task.update(cross_entropy=torch.tensor(7.0))
    found = step.task_loss(features)
    assert found == {"cross_entropy": torch.tensor(7.0)}
    found.clear()
    assert step.seen.task
    (update,) = Regress(8, 7).updates(step)
    assert update.terms["cross_entropy"] == 7
