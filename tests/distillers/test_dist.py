# SPDX-License-Identifier: Apache-2.0
"""DIST against numpy's correlation, a worked example and the properties of the formula."""

import math

import numpy as np
import pytest
import torch

from kdlvfm.core.align import match_size
from kdlvfm.distillers import DIST, dist, dist_loss


def logits(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def probabilities(x, temperature):
    """Rows of samples or positions, columns of classes."""
    rows = x.detach().movedim(1, -1).reshape(-1, x.shape[1]).numpy() / temperature
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def reference(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    first, second = probabilities(student, temperature), probabilities(teacher, temperature)
    inter = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)]
    intra = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(first.T, second.T, strict=True)]
    return temperature**2 * (beta * np.mean(inter) + gamma * np.mean(intra))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.0, 4.0), (0.0, 0.5, 0.7)])
@pytest.mark.parametrize("shape", [(6, 5), (2, 2), (2, 7, 3, 4), (1, 3, 2, 2)])
def test_against_numpy(shape, weights):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    assert dist_loss(student, teacher, *weights).item() == pytest.approx(
        reference(student, teacher, *weights), abs=1e-9
    )


def test_worked_example():
    """Two classes, two samples, all opposed: both correlations are -1, so both terms are 2."""
    student = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    assert dist_loss(student, teacher).item() == pytest.approx(4, rel=1e-12)
    assert dist_loss(student, teacher, beta=3.0, gamma=0.5, temperature=2.0).item() == pytest.approx(28, rel=1e-12)


def test_zero_at_equality_and_between_zero_and_two_each():
    teacher = logits(6, 5)
    assert dist_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    for seed in range(10):
        student = logits(6, 5, seed=100 + seed)
        for beta, gamma in ((1.0, 0.0), (0.0, 1.0)):
            assert 1e-3 < dist_loss(student, teacher, beta, gamma, 3.0).item() <= 18


def test_a_shift_of_either_networks_logits_changes_nothing_and_a_scale_does():
    student, teacher = logits(2, 5, 3, 4, seed=1), logits(2, 5, 3, 4, seed=2)
    shift = logits(2, 1, 3, 4, seed=3)
    expected = dist_loss(student, teacher)
    torch.testing.assert_close(dist_loss(student + shift, teacher), expected)
    torch.testing.assert_close(dist_loss(student, teacher - shift), expected)
    torch.testing.assert_close(dist_loss(2 * student, 2 * teacher, temperature=2.0), 4 * expected)
    assert dist_loss(student, teacher, temperature=2.0).item() != pytest.approx(expected.item(), rel=1e-2)


def test_a_less_confident_student_is_as_good():
    """An affine change of probabilities, which Kullback-Leibler divergence would punish."""
    teacher = logits(6, 5)
    blurred = (0.5 * teacher.softmax(1) + 0.1).log()
    assert dist_loss(blurred, teacher).item() == pytest.approx(0, abs=1e-12)


def test_pixels_are_samples():
    student, teacher = logits(2, 5, 3, 4, seed=1), logits(2, 5, 3, 4, seed=2)
    rows = [x.movedim(1, -1).reshape(-1, 5) for x in (student, teacher)]
    torch.testing.assert_close(dist_loss(student, teacher), dist_loss(*rows))


def test_gradcheck():
    student, teacher = logits(2, 4, 1, 2, seed=1).requires_grad_(), logits(2, 4, 1, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: dist_loss(x, teacher, 1.0, 2.0, 1.5), (student,))


def test_the_teacher_gets_no_gradient():
    student, teacher = logits(4, 5, seed=1).requires_grad_(), logits(4, 5, seed=2).requires_grad_()
    dist_loss(student, teacher).backward()
    DIST()({"logits": student}, {"logits": teacher})["dist"].backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.0, 1e4), (1e4, -1e4), (1e4, 1e4), (1e-6, 1e4)])
def test_half_precision_at_extreme_values(first, second, dtype, batch):
    """Each network is constant but for one class of its own, and so the same everywhere."""
    student, teacher = (torch.full((batch, 3, 2, 2), value, dtype=dtype) for value in (first, second))
    student[:, 0], teacher[:, 1] = -first, 0
    student.requires_grad_()
    loss = DIST()({"logits": student}, {"logits": teacher})["dist"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert 0 <= loss.item() <= 4
    assert student.grad.isfinite().all()


def test_equal_probabilities_have_a_bounded_gradient():
    student = torch.zeros(8, 5, requires_grad=True)
    dist_loss(student, logits(8, 5).float()).backward()
    assert 1e-3 < student.grad.abs().max() < 1e4


def test_a_class_that_both_rule_out_counts_as_uncorrelated():
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)
    student[:, 4], teacher[:, 4] = -1e4, -1e4
    kept = dist_loss(student[:, :4], teacher[:, :4], beta=0.0)
    torch.testing.assert_close(dist_loss(student, teacher, beta=0.0), (4 * kept + 1) / 5)


def test_half_precision_is_promoted_before_any_arithmetic():
    student, teacher = logits(4, 5, seed=1).bfloat16(), logits(4, 5, seed=2).bfloat16()
    torch.testing.assert_close(dist_loss(student, teacher), dist_loss(student.double(), teacher.double()).float())


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\) \(student\) and \(2, 7\) \(teacher\).*number of classes"):
        dist_loss(logits(2, 5), logits(2, 7))


@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_weighs_the_function_on_one_size(resize):
    student, teacher = logits(2, 3, 4, 4, seed=1), logits(2, 3, 3, 6, seed=2)
    method = DIST(loss_weight=3.0, beta=2.0, gamma=0.5, temperature=4.0, resize=resize, student_tap="cls.0")
    terms = method({"cls.0": student}, {"logits": teacher})
    expected = 3 * reference(*match_size(student, teacher, resize), 2.0, 0.5, 4.0)
    assert list(terms) == ["dist"]
    assert terms["dist"].item() == pytest.approx(expected, rel=1e-9)


def test_a_classifiers_logits():
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    got = DIST()({"logits": student}, {"logits": teacher})["dist"]
    assert math.isclose(got.item(), reference(student, teacher), rel_tol=1e-9)


def test_gathered_processes_equal_one(monkeypatch):
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    rest = iter((student[2:], teacher[2:]))
    monkeypatch.setattr(dist, "gather_batch", lambda x: torch.cat([x, next(rest)]))
    got = DIST(gather=True)({"logits": student[:2]}, {"logits": teacher[:2]})
    torch.testing.assert_close(got, DIST()({"logits": student}, {"logits": teacher}))
