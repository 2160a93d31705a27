# SPDX-License-Identifier: Apache-2.0
"""Pairwise against loops over pairs of positions, a worked example, the formula's properties, and the adversary."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import Context, Teacher
from kdlvfm.distillers import Pairwise, pairwise_loss


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def cosines(x):
    """(M, M) of one image (C, M), one pair at a time."""
    count = x.shape[1]
    result = np.empty((count, count))
    for i in range(count):
        for j in range(count):
            first, second = x[:, i].tolist(), x[:, j].tolist()
            dot = sum(a * b for a, b in zip(first, second, strict=True))
            result[i, j] = dot / (math.hypot(*first) * math.hypot(*second))
    return result


def reference(student, teacher):
    pairs = zip(student.detach().flatten(2), teacher.detach().flatten(2), strict=True)
    return np.mean([(cosines(s) - cosines(t)) ** 2 for s, t in pairs])


@pytest.mark.parametrize(
    ("student_dim", "teacher_dim", "size"), [(3, 5, (2, 2)), (3, 5, (4, 5)), (2, 2, (1, 7)), (4, 3, (1, 1))]
)
def test_function_against_loops(student_dim, teacher_dim, size):
    """With more positions than channels, and with fewer."""
    student, teacher = maps(2, student_dim, *size, seed=1), maps(2, teacher_dim, *size, seed=2)
    assert pairwise_loss(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-9, abs=1e-12)


def test_worked_example():
    """Two positions: orthogonal in the student, of one direction in the teacher."""
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 5.0], [1.0, 5.0], [2.0, 10.0]], dtype=torch.float64).view(1, 3, 1, 2)
    assert pairwise_loss(student, teacher).item() == pytest.approx(0.5, rel=1e-12)
    assert pairwise_loss(-teacher, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("size", [(1, 2), (4, 5)])
def test_zero_at_equality_positive_otherwise_and_symmetric(size):
    student, teacher = maps(2, 3, *size, seed=1), maps(2, 3, *size, seed=2)
    assert pairwise_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert pairwise_loss(student, teacher).item() > 1e-3
    torch.testing.assert_close(pairwise_loss(student, teacher), pairwise_loss(teacher, student))


def test_the_length_of_a_vector_and_a_rotation_of_channels_change_nothing():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 6, 4, 5, seed=2)
    expected = pairwise_loss(student, teacher)
    length = maps(2, 1, 4, 5, seed=3).abs() + 0.1
    rotation = torch.linalg.qr(maps(6, 6, seed=4))[0]
    torch.testing.assert_close(pairwise_loss(student * length, teacher), expected)
    torch.testing.assert_close(pairwise_loss(student, teacher * length), expected)
    torch.testing.assert_close(pairwise_loss(student, torch.einsum("oc,bchw->bohw", rotation, teacher)), expected)


def test_positions_may_be_permuted_jointly_only():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 6, 4, 5, seed=2)
    expected = pairwise_loss(student, teacher)
    first, second = (x.flip(3) for x in (student, teacher))
    torch.testing.assert_close(pairwise_loss(first, second), expected)
    assert abs(pairwise_loss(first, teacher) - expected) > 1e-3


@pytest.mark.parametrize("pool", [2, 3, 0.5, 0.25])
def test_pooling_takes_the_largest_value_of_each_window(pool):
    student, teacher = maps(2, 3, 5, 8, seed=1), maps(2, 4, 5, 8, seed=2)
    sides = [int(side * pool) for side in (5, 8)] if isinstance(pool, float) else [pool, pool]

    def pooled(x):
        rows = []
        for top in range(0, 5, sides[0]):
            for left in range(0, 8, sides[1]):
                rows.append(x[:, :, top : top + sides[0], left : left + sides[1]].amax((2, 3)))
        return torch.stack(rows, dim=2)

    expected = reference(pooled(student), pooled(teacher))
    assert pairwise_loss(student, teacher, pool).item() == pytest.approx(expected, rel=1e-9)
    assert Pairwise(pool=pool)({"map.-1": student}, {"map.-1": teacher})["pairwise"].item() == pytest.approx(
        10 * expected, rel=1e-9
    )


@pytest.mark.parametrize("size", [(1, 3), (3, 3)])
def test_gradcheck(size):
    student, teacher = maps(2, 3, *size, seed=1).requires_grad_(), maps(2, 4, *size, seed=2)
    assert torch.autograd.gradcheck(lambda x: pairwise_loss(x, teacher), (student,), raise_exception=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("size", [2, 6])
def test_half_precision_at_extreme_values(size, value, dtype):
    """One sample with constant maps, where all cosines are equal, or undefined and taken as 0."""
    student = torch.full((1, 3, size, size), value, dtype=dtype, requires_grad=True)
    teacher = torch.full((1, 5, size, size), -1e4, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = pairwise_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(value == 0), abs=1e-5)
    assert student.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    student, teacher = maps(2, 8, 6, 6, seed=1).float(), maps(2, 8, 6, 6, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pairwise_loss(student, teacher)
    assert loss.item() == pytest.approx(pairwise_loss(student.double(), teacher.double()).item(), rel=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\) \(teacher\)"):
        pairwise_loss(maps(2, 3, 4, 4), maps(2, 3, 8, 8))
    with pytest.raises(ValueError, match="agree in B"):
        pairwise_loss(maps(2, 3, 4, 4), maps(1, 3, 4, 4))
    with pytest.raises(ValueError, match="pool must be positive"):
        pairwise_loss(maps(2, 3, 4, 4), maps(2, 3, 4, 4), pool=0)


@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
def test_class_on_maps_of_other_channels_and_size(target, resize):
    student, teacher = maps(2, 3, 2, 3, seed=1), maps(2, 5, 4, 6, seed=2, scale=3.0) + 2
    goal = teacher
    if target != "raw":
        axes = (0, 2, 3) if target == "standardize" else (1,)
        values, eps = teacher.numpy(), 1e-5 if target == "layernorm" else 0.0
        goal = (values - values.mean(axes, keepdims=True)) / np.sqrt(values.var(axes, keepdims=True) + eps)
        goal = torch.from_numpy(goal)
    size = {"larger": (4, 6), "student": (4, 6), "teacher": (2, 3)}[resize]
    first, second = (
        x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", antialias=x.shape[3] > size[1])
        for x in (student, goal)
    )
    terms = Pairwise(loss_weight=2.0, target=target, resize=resize)({"map.-1": student}, {"map.-1": teacher})
    assert list(terms) == ["pairwise"]
    assert terms["pairwise"].item() == pytest.approx(2 * reference(first, second), rel=1e-6)


def test_student_gets_a_gradient_and_the_teacher_none():
    student, teacher = maps(2, 3, 4, 4, seed=1).requires_grad_(), maps(2, 5, 8, 8, seed=2).requires_grad_()
    distiller = Pairwise(target="standardize")
    distiller({"map.-1": student}, {"map.-1": teacher})["pairwise"].backward()
    assert (student.grad != 0).any()
    assert teacher.grad is None
    assert list(distiller.parameters()) == []


ADVERSARIAL = {"adversarial_weight": 0.1, "student_tap": "map.1", "teacher_tap": "map.1"}


@pytest.fixture
def adversary(context):
    """A factory of distillers with a discriminator, built as in a run."""

    def build(**hparams):
        torch.manual_seed(0)
        return Pairwise.from_context(context, **ADVERSARIAL, **hparams)

    return build


def moving(groups, update):
    """Take a gradient; the names of the groups that got one that is not 0."""
    for parameter in (parameter for group in groups.values() for parameter in group):
        parameter.grad = None
    torch.stack(list(update.terms.values())).sum().backward()
    return {name for name, group in groups.items() if any(p.grad is not None and (p.grad != 0).any() for p in group)}


def test_without_a_weight_there_is_no_discriminator(context, student, make_step):
    distiller = Pairwise.from_context(context)
    assert list(distiller.parameters()) == []
    assert list(distiller.parameter_groups(student)) == ["student"]
    (update,) = distiller.updates(make_step())
    assert list(update.terms) == ["cross_entropy", "pairwise"]


@pytest.mark.parametrize("condition", [True, False])
def test_discriminator_is_a_second_update_that_leaves_the_student_alone(adversary, student, make_step, condition):
    distiller = adversary(condition=condition)
    groups = distiller.parameter_groups(student)
    assert list(groups) == ["student", "discriminator"]
    assert {id(p) for p in groups["discriminator"]} == {id(p) for p in distiller.discriminator.parameters()}
    first, second = distiller.updates(make_step())
    assert (first.group, second.group) == ("student", "discriminator")
    assert list(first.terms) == ["cross_entropy", "pairwise", "adversarial"]
    assert list(first.distillation) == ["pairwise", "adversarial"]
    assert list(second.terms) == ["discriminator", "gradient_penalty"]
    assert moving(groups, first) == {"student"}
    assert all(p.grad is None for p in groups["discriminator"])
    assert moving(groups, second) == {"discriminator"}
    assert all(p.grad is None for p in groups["student"])


def test_the_terms_are_the_mean_scores_of_the_logits(adversary, student, teacher, make_step, batch):
    distiller = adversary(penalty_weight=0.0).eval()  # without a power iteration at each call
    first, second = distiller.updates(make_step())
    assert list(second.terms) == ["discriminator"]
    scores = {}
    small = F.interpolate(batch["image"], size=(64, 64), mode="bilinear")
    for name, model in (("student", student), ("teacher", teacher)):
        logits = model(batch["image"], ("logits",))["logits"]
        judged = F.interpolate(logits, size=(64, 64), mode="bilinear")
        scores[name] = distiller.discriminator(torch.cat([judged, small], dim=1)).mean()
    torch.testing.assert_close(first.terms["adversarial"], -0.1 * scores["student"])
    torch.testing.assert_close(second.terms["discriminator"], scores["student"] - scores["teacher"])


def test_the_student_learns_to_pass_and_the_discriminator_to_tell(adversary, student, make_step):
    distiller = adversary()
    groups = distiller.parameter_groups(student)
    gap = []
    for _ in range(10):
        _, update = distiller.updates(make_step())
        moving(groups, update)
        with torch.no_grad():
            for parameter in groups["discriminator"]:
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        gap.append(update.terms["discriminator"].item())
    assert gap[-1] < gap[0] - 0.1
    before, _ = distiller.updates(make_step())
    term = before.terms["adversarial"]
    gradient = torch.autograd.grad(term, groups["student"], allow_unused=True)
    with torch.no_grad():
        for parameter, slope in zip(groups["student"], gradient, strict=True):
            if slope is not None:
                parameter -= 0.5 * slope
    after, _ = distiller.updates(make_step())
    assert after.terms["adversarial"] < term


def test_features_are_judged_where_the_teacher_has_no_logits(adversary, toy_model, student, task, make_step):
    teacher = Teacher(toy_model(dims=(7, 9, 12), strides=(4, 1, 1), num_classes=0))
    context = Context(student, teacher, task, num_classes=5, num_samples=12)
    with pytest.raises(ValueError, match="no tap 'logits'"):
        Pairwise.from_context(context, **ADVERSARIAL)
    judged = {"judged_student_tap": "map.2", "judged_teacher_tap": "map.2", "judged_target": "standardize"}
    distiller = Pairwise.from_context(context, **ADVERSARIAL, **judged)
    groups = distiller.parameter_groups(student)
    assert distiller.student_taps == distiller.teacher_taps == ("map.1", "map.2")
    first, second = distiller.updates(make_step(teacher=teacher))
    assert moving(groups, first) == {"student"}
    (projector,) = (m for m in distiller.judged.modules() if isinstance(m, torch.nn.Conv2d))
    assert (projector.weight.grad != 0).any()
    assert moving(groups, second) == {"discriminator"}


def test_one_map_may_be_compared_and_judged(adversary, student, make_step):
    distiller = adversary(judged_student_tap="map.1", judged_teacher_tap="map.1")
    assert distiller.student_taps == distiller.teacher_taps == ("map.1",)
    groups = distiller.parameter_groups(student)
    assert [moving(groups, update) for update in distiller.updates(make_step())] == [{"student"}, {"discriminator"}]


def test_whole_step_under_autocast(adversary, student, make_step):
    distiller = adversary()
    groups = distiller.parameter_groups(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for update in distiller.updates(make_step()):
            assert all(term.isfinite() and term.dtype == torch.float32 for term in update.terms.values())
            assert moving(groups, update) == {update.group}
            assert all(p.grad is None or p.grad.isfinite().all() for p in groups[update.group])


def test_bad_weights_and_missing_channels_are_refused():
    with pytest.raises(ValueError, match="judged_student_dim"):
        Pairwise(adversarial_weight=0.1)
    with pytest.raises(ValueError, match="must not be negative: -1"):
        Pairwise(adversarial_weight=-1)
    with pytest.raises(ValueError, match=r"must not be negative: 0\.0, -2"):
        Pairwise(penalty_weight=-2)
