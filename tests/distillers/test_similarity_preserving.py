# SPDX-License-Identifier: Apache-2.0
"""SP against loops over pairs of samples, a worked example and the properties of the formula."""

import math

import pytest
import torch

from kdlvfm.core.align import standardise
from kdlvfm.distillers import SP, similarity_preserving, sp_loss


def features(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def similarities(x):
    rows = x.flatten(1).tolist()
    gram = [[math.fsum(a * b for a, b in zip(first, second, strict=True)) for second in rows] for first in rows]
    return [[value / math.hypot(*row) for value in row] for row in gram]


def reference(student, teacher):
    rows = zip(similarities(student), similarities(teacher), strict=True)
    differences = [(a - b) ** 2 for first, second in rows for a, b in zip(first, second, strict=True)]
    return math.fsum(differences) / len(differences)


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 3), (2, 3)), ((5, 3, 4, 6), (5, 7, 2, 3)), ((4, 8), (4, 5, 3, 3)), ((1, 4), (1, 2))]
)
def test_function_against_loops(student, teacher):
    student, teacher = features(*student, seed=1), features(*teacher, seed=2)
    assert sp_loss(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-9, abs=1e-30)


def test_worked_example():
    """Two samples at a right angle against two that are the same: rows (1, 0) against (1, 1) / sqrt 2."""
    student = torch.tensor([[0.0, 3.0], [3.0, 0.0]], dtype=torch.float64)
    teacher = torch.full((2, 1, 1, 1), -7.0, dtype=torch.float64)
    assert sp_loss(student, teacher).item() == pytest.approx(1 - 1 / math.sqrt(2), rel=1e-12)


def test_zero_at_equality_and_between_zero_and_four_over_the_batch():
    teacher = features(4, 6)
    assert sp_loss(teacher, teacher).item() == 0
    for seed in range(10):
        assert 1e-4 < sp_loss(features(4, 6, seed=100 + seed), teacher).item() <= 1
    opposed = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
    assert sp_loss(*opposed).item() == pytest.approx(1)


def test_scale_and_rotation_of_either_side_change_nothing():
    student, teacher = features(5, 6, seed=1), features(5, 4, seed=2)
    expected = sp_loss(student, teacher)
    torch.testing.assert_close(sp_loss(-50 * student, teacher / 9), expected)
    rotated = student @ torch.linalg.qr(features(6, 6, seed=3)).Q
    torch.testing.assert_close(sp_loss(rotated, teacher), expected)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(sp_loss(student[order], teacher[order]), expected)
    assert sp_loss(student[order], teacher).item() != pytest.approx(expected.item(), rel=1e-3)
    # The scale of a single sample, and an offset of all, do matter.
    assert sp_loss(student * torch.tensor([9.0, 1, 1, 1, 1]).unsqueeze(1), teacher).item() != pytest.approx(
        expected.item(), rel=1e-3
    )
    assert sp_loss(student + 1, teacher).item() != pytest.approx(expected.item(), rel=1e-3)


def test_gradcheck():
    student, teacher = features(3, 2, 2, 2, seed=1).requires_grad_(), features(3, 5, seed=2)
    assert torch.autograd.gradcheck(lambda x: sp_loss(x, teacher), (student,))


def test_the_teacher_gets_no_gradient():
    student, teacher = features(3, 2, 3, 3, seed=1).requires_grad_(), features(3, 4, 3, 3, seed=2).requires_grad_()
    sp_loss(student, teacher).backward()
    SP()({"map.-1": student}, {"map.-1": teacher})["similarity_preserving"].backward()
    assert teacher.grad is None
    assert (student.grad != 0).any()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e-6, 1e4])
def test_half_precision_at_extreme_values(value, dtype, standardize, batch):
    student = torch.full((batch, 64, 8, 8), value, dtype=dtype, requires_grad=True)
    teacher = torch.full((batch, 5, 3, 3), 1e4, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = SP(standardize=standardize)({"map.-1": student}, {"map.-1": teacher})["similarity_preserving"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_no_power_of_the_scale_leaves_the_range_of_floats(scale):
    student, teacher = features(4, 6, seed=1), features(4, 6, seed=2)
    got = sp_loss((student * scale).float(), teacher.float())
    torch.testing.assert_close(got, sp_loss(student, teacher).float(), rtol=1e-4, atol=0)


def test_autocast_multiplies_in_full_precision():
    student, teacher = features(4, 900, seed=1).float(), features(4, 900, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sp_loss(student, teacher)
    assert torch.equal(got, sp_loss(student, teacher))


def test_different_batches_are_refused():
    with pytest.raises(ValueError, match=r"3 samples \(student\) and 4 \(teacher\)"):
        sp_loss(features(3, 2), features(4, 2))


@pytest.mark.parametrize("standardize", [False, True])
def test_class_weighs_and_standardises_both(standardize):
    student, teacher = features(3, 4, 2, 3, seed=1), features(3, 2, 5, 5, seed=2, scale=9.0) + 3
    pair = (standardise(student), standardise(teacher)) if standardize else (student, teacher)
    sp = SP(loss_weight=2.0, standardize=standardize, student_tap="map.1", teacher_tap="map.7")
    terms = sp({"map.1": student}, {"map.7": teacher})
    assert list(terms) == ["similarity_preserving"]
    assert terms["similarity_preserving"].item() == pytest.approx(2 * reference(*pair), rel=1e-9)


def test_an_outlier_channel_of_the_teacher_does_not_hide_the_others():
    student, teacher = {"map.-1": features(3, 3, 4, 4, seed=1)}, features(3, 5, 4, 4, seed=2)
    outlier = teacher * torch.tensor([1.0, 1e3, 1.0, 1.0, 1.0]).view(5, 1, 1) + 50
    torch.testing.assert_close(
        SP()(student, {"map.-1": outlier}), SP()(student, {"map.-1": teacher}), rtol=1e-6, atol=0
    )


def test_gathered_processes_equal_one(monkeypatch):
    student, teacher = features(4, 3, 2, 2, seed=1), features(4, 5, 2, 2, seed=2)
    # The other process's half, by the width of the own.
    rest = {3: student[2:], 5: teacher[2:]}
    monkeypatch.setattr(similarity_preserving, "gather_batch", lambda x: torch.cat([x, rest[x.shape[1]]]))
    got, alone = (SP(gather=gather)({"map.-1": student[:2]}, {"map.-1": teacher[:2]}) for gather in (True, False))
    torch.testing.assert_close(got, SP()({"map.-1": student}, {"map.-1": teacher}))
    assert got["similarity_preserving"].item() != pytest.approx(alone["similarity_preserving"].item(), rel=1e-3)
