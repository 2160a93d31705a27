# SPDX-License-Identifier: Apache-2.0
"""Pairwise against loops over pairs of positions, a worked example and the properties of the formula."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

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
