# SPDX-License-Identifier: Apache-2.0
"""ScoreKD against loops, what it divides by, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from kdlvfm.core import TapError, Teacher
from kdlvfm.distillers import KD, ScoreKD, crosskd_cls_loss, score_kd_loss


def scores(*shape, seed=0):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_loops(student, teacher, beta):
    total = 0.0
    for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = sigmoid(a), sigmoid(b)
        total += abs(p - q) ** beta * -(q * math.log(p) + (1 - q) * math.log(1 - p))
    return total


@pytest.mark.parametrize("beta", [1.0, 2.0, 2.5])
def test_loss_against_loops(beta):
    student, teacher = scores(2, 3, 4, 5, seed=1), scores(2, 3, 4, 5, seed=2)
    expected = by_loops(student, teacher, beta)
    assert score_kd_loss(student, teacher, beta).item() == pytest.approx(expected / 40, rel=1e-9)
    factor = torch.tensor(7.0, dtype=torch.float64)
    loss = score_kd_loss(student, teacher, beta, avg_factor=factor)
    assert loss.item() == pytest.approx(expected / 7, rel=1e-9)
    torch.testing.assert_close(loss, crosskd_cls_loss(student, teacher, beta, avg_factor=factor))


def test_nothing_to_learn_where_scores_are_equal():
    student = scores(2, 3, 4, 4).requires_grad_()
    loss = score_kd_loss(student, student.detach())
    loss.backward()
    assert loss.item() == 0
    # |x| has no slope at 0, and none is taken; the cross-entropy has its least value there.
    assert student.grad.abs().max() == 0


def test_gradcheck():
    student, teacher = scores(1, 2, 2, 3, seed=1).requires_grad_(), scores(1, 2, 2, 3, seed=2)
    assert torch.autograd.gradcheck(lambda x: score_kd_loss(x, teacher), (student,))


def test_the_teacher_receives_no_gradient():
    student, teacher = scores(1, 2, 2, 3, seed=1).requires_grad_(), scores(1, 2, 2, 3, seed=2).requires_grad_()
    score_kd_loss(student, teacher).backward()
    assert teacher.grad is None


def test_all_levels_share_what_the_teacher_takes_for_objects():
    student = {f"cls.{i}": scores(2, 3, 4 // (i + 1), 2, seed=i) for i in range(2)}
    teacher = {f"cls.{i}": scores(2, 3, 4 // (i + 1), 2, seed=9 + i) for i in range(2)}
    taps = ["cls.0", "cls.1"]
    score_kd = ScoreKD(3, loss_weight=2.0, student_taps=taps, teacher_taps=taps)
    objects = sum(teacher[tap].sigmoid().amax(1).sum().item() for tap in taps)
    expected = sum(by_loops(student[tap], teacher[tap], 1.0) for tap in taps)
    assert score_kd(student, teacher)["kd"].item() == pytest.approx(2 * expected / objects, rel=1e-9)


def test_each_of_several_boxes_at_a_position_counts():
    """Two boxes of three classes: channels are the classes of the first box, then those of the second."""
    student, teacher = scores(1, 6, 2, 2, seed=1), scores(1, 6, 2, 2, seed=2)
    objects = sum(teacher[:, part].sigmoid().amax(1).sum().item() for part in (slice(0, 3), slice(3, 6)))
    expected = by_loops(student, teacher, 1.0) / objects
    assert ScoreKD(3)({"cls.0": student}, {"cls.0": teacher})["kd"].item() == pytest.approx(expected, rel=1e-9)


def test_a_teacher_that_sees_nothing_divides_by_one():
    student, teacher = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), -100.0)
    assert ScoreKD(3)({"cls.0": student}, {"cls.0": teacher})["kd"].item() == pytest.approx(12 * 0.5 * math.log(2))


def test_levels_of_other_sizes_are_resized():
    terms = ScoreKD(3)({"cls.0": torch.rand(1, 3, 2, 3)}, {"cls.0": torch.rand(1, 3, 4, 6)})
    assert terms["kd"].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_autocast_at_extreme_values(dtype, value):
    student = torch.full((1, 3, 2, 2), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        (term,) = ScoreKD(3)({"cls.0": student}, {"cls.0": -student.detach()}).values()
    term.backward()
    assert term.dtype == torch.float32
    assert term.isfinite()
    assert student.grad.isfinite().all()


def test_kd_is_this_for_a_detector_and_itself_for_others(detection_context, context, toy_detector):
    score_kd = KD.from_context(detection_context, loss_weight=3.0)
    assert isinstance(score_kd, ScoreKD)
    assert score_kd.loss_weight == 3.0
    assert score_kd.student_taps == score_kd.teacher_taps == ("cls.0", "cls.1", "cls.2")
    assert isinstance(KD.from_context(context, temperature=1.0), KD)
    with pytest.raises(TypeError, match="temperature"):
        KD.from_context(detection_context, temperature=1.0)
    other = replace(detection_context, teacher=Teacher(toy_detector(levels=(2, 4, 8))))
    assert KD.from_context(other).teacher_taps == ("cls.1", "cls.2", "cls.2")


def test_from_context_refuses_what_has_no_scores_in_common(detection_context, teacher):
    with pytest.raises(TapError, match=r"has no taps 'cls\.<i>'"):
        ScoreKD.from_context(replace(detection_context, teacher=teacher))


def test_from_context_refuses_heads_of_one_and_of_three_boxes(detection_context, toy_detector):
    class Anchors(toy_detector):
        def taps(self):
            return {tap: replace(x, dim=15) if "cls." in tap else x for tap, x in super().taps().items()}

    with pytest.raises(ValueError, match="toy detector has 1 at a position, toy detector has 3"):
        ScoreKD.from_context(replace(detection_context, teacher=Teacher(Anchors())))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.5}, "beta must be at least 1"),
        ({"num_classes": 0}, "num_classes and beta must be at least 1"),
        ({"student_taps": ["cls.0", "cls.1"]}, "each level needs one of these"),
        ({"resize": "smaller"}, "resize must be"),
    ],
)
def test_wrong_options_are_refused_when_built(options, words):
    with pytest.raises(ValueError, match=words):
        ScoreKD(**{"num_classes": 3, **options})


def test_wrong_arguments_of_the_loss():
    with pytest.raises(ValueError, match="must have one shape"):
        score_kd_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="beta must be at least 1"):
        score_kd_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), beta=0.0)
