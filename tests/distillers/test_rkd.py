# SPDX-License-Identifier: Apache-2.0
"""RKD against loops over pairs and triplets, worked examples and the properties of the formulas."""

import itertools
import math

import pytest
import torch

from kdlvfm.distillers import RKD, rkd, rkd_angle_loss, rkd_distance_loss

LOSSES = pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
EQUILATERAL = torch.eye(3, dtype=torch.float64)


def embeddings(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def huber(x, y):
    difference = abs(x - y)
    return difference**2 / 2 if difference <= 1 else difference - 0.5


def distances(x):
    points = x.tolist()
    found = [math.dist(a, b) for a, b in itertools.product(points, points)]
    positive = [value for value in found if value > 0]
    return [value * len(positive) / sum(positive) for value in found] if positive else found


def cosines(x):
    points, found = x.tolist(), []
    for corner, first, second in itertools.product(points, points, points):
        if corner in (first, second):
            found.append(0.0)
            continue
        dot = sum((a - o) * (b - o) for o, a, b in zip(corner, first, second, strict=True))
        found.append(dot / math.dist(first, corner) / math.dist(second, corner))
    return found


def reference(loss, student, teacher):
    measure = {rkd_distance_loss: distances, rkd_angle_loss: cosines}[loss]
    terms = [huber(a, b) for a, b in zip(measure(student), measure(teacher), strict=True)]
    return sum(terms) / len(terms)


@LOSSES
@pytest.mark.parametrize(("batch", "dims"), [(3, (2, 2)), (6, (3, 5)), (5, (7, 1))])
def test_functions_against_loops(loss, batch, dims):
    student, teacher = embeddings(batch, dims[0], seed=1), embeddings(batch, dims[1], seed=2)
    # One point far away: its distances differ by more than 1, where Huber's loss is linear.
    student[0] += 50
    assert loss(student, teacher).item() == pytest.approx(reference(loss, student, teacher), rel=1e-9)


def test_worked_example_of_distances():
    """(1, 1, 1) against (1, 2, 3) / 2: two pairs differ by 1/2, counted both ways: 2 (1/8 + 1/8) / 9."""
    teacher = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    assert rkd_distance_loss(EQUILATERAL, teacher).item() == pytest.approx(1 / 18, rel=1e-12)


def test_worked_example_of_angles():
    """Angles of 60 degrees against 90, 45 and 45, each counted both ways."""
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    expected = (0.5**2 + 2 * (math.sqrt(0.5) - 0.5) ** 2) / 27
    assert rkd_angle_loss(EQUILATERAL, teacher).item() == pytest.approx(expected, rel=1e-12)


@LOSSES
def test_zero_at_equality_and_positive_otherwise(loss):
    teacher = embeddings(5, 4)
    assert loss(teacher, teacher).item() == 0
    for seed in range(10):
        assert loss(embeddings(5, 4, seed=100 + seed), teacher).item() > 1e-3


@LOSSES
def test_moving_turning_and_scaling_either_side_changes_nothing(loss):
    student, teacher = embeddings(5, 4, seed=1), embeddings(5, 6, seed=2)
    expected = loss(student, teacher)
    rotation = torch.linalg.qr(embeddings(4, 4, seed=3)).Q
    torch.testing.assert_close(loss(-7 * student @ rotation + embeddings(4, seed=4), teacher), expected)
    torch.testing.assert_close(loss(student, teacher / 100 - 3), expected)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(loss(student[order], teacher[order]), expected)
    assert loss(student[order], teacher).item() != pytest.approx(expected.item(), rel=1e-3)


@LOSSES
@pytest.mark.parametrize("batch", [1, 2])
def test_fewer_than_three_samples_have_no_figure(loss, batch):
    student = embeddings(batch, 4, seed=1).requires_grad_()
    value = loss(student, embeddings(batch, 6, seed=2))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


@LOSSES
def test_gradcheck(loss):
    student, teacher = embeddings(4, 3, seed=1).requires_grad_(), embeddings(4, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student,))


@LOSSES
def test_coinciding_embeddings_have_a_finite_gradient(loss):
    student, teacher = embeddings(5, 4, seed=1), embeddings(5, 6, seed=2)
    student[1], teacher[3] = student[0], teacher[2]
    expected = reference(loss, student, teacher)
    value = loss(student.requires_grad_(), teacher)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-9)
    assert 1e-4 < student.grad.abs().max() < 10


@LOSSES
def test_small_distances_survive_far_from_the_origin(loss):
    student, teacher = embeddings(5, 4, seed=1), embeddings(5, 6, seed=2)
    far = (torch.round(student * 64) / 64 + 1000).float()
    torch.testing.assert_close(loss(far, teacher.float()), loss(far.double() - 1000, teacher).float())


def test_close_neighbours_keep_their_digits():
    """Two embeddings a hundred-thousandth of the others' distances apart: value and gradient in single precision."""
    student, teacher = embeddings(6, 40, seed=1).float().double(), embeddings(6, 9, seed=2)
    student[1] = (student[0] + 1e-5 * embeddings(40, seed=3)).float().double()
    found = []
    for dtype in (torch.float32, torch.float64):
        own = student.to(dtype).requires_grad_()
        value = rkd_distance_loss(own, teacher.to(dtype))
        found.append((value.detach().double(), torch.autograd.grad(value, own)[0].double()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_second_derivative_of_the_distances_is_refused():
    student = embeddings(4, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(rkd_distance_loss(student, embeddings(4, 2)), student, create_graph=True)


def test_the_teacher_gets_no_gradient():
    student, teacher = embeddings(4, 5, seed=1).requires_grad_(), embeddings(4, 3, seed=2).requires_grad_()
    terms = RKD()({"pooled": student}, {"pooled": teacher})
    (sum(terms.values()) + rkd_distance_loss(student, teacher) + rkd_angle_loss(student, teacher)).backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e-6, 1e4])
def test_half_precision_at_extreme_values(value, dtype, normalize, batch):
    """The student has collapsed to one point; the teacher has two."""
    student = torch.full((batch, 32), value, dtype=dtype, requires_grad=True)
    teacher = torch.full((batch, 5), 1e4, dtype=dtype)
    teacher[batch // 2 :] *= -1
    with torch.autocast("cpu", dtype=dtype):
        terms = RKD(normalize=normalize)({"pooled": student}, {"pooled": teacher})
    sum(terms.values()).backward()
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert student.grad.isfinite().all()


@LOSSES
def test_autocast_computes_in_full_precision(loss):
    student, teacher = embeddings(4, 900, seed=1).float(), embeddings(4, 900, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(student, teacher)
    assert torch.equal(got, loss(student, teacher))
    torch.testing.assert_close(loss(student.bfloat16(), teacher), loss(student.bfloat16().float(), teacher))


@LOSSES
@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3, 2, 4, 4), (3, 2)), ((3, 2), (3,))])
def test_what_is_not_one_batch_of_vectors_is_refused(loss, shapes):
    with pytest.raises(ValueError, match=r"one batch.*\(student\) and .*\(teacher\); average maps"):
        loss(*(embeddings(*shape) for shape in shapes))


@pytest.mark.parametrize("normalize", [False, True])
def test_class_weighs_both_and_averages_maps(normalize):
    student, teacher = embeddings(4, 3, 2, 5, seed=1), embeddings(4, 6, seed=2)
    method = RKD(distance_weight=2.0, angle_weight=3.0, student_tap="map.-1", normalize=normalize)
    terms = method({"map.-1": student}, {"pooled": teacher})
    pair = [student.flatten(2).mean(2), teacher]
    if normalize:
        pair = [torch.stack([row / math.hypot(*row.tolist()) for row in x]) for x in pair]
    assert list(terms) == ["rkd_distance", "rkd_angle"]
    assert terms["rkd_distance"].item() == pytest.approx(2 * reference(rkd_distance_loss, *pair), rel=1e-9)
    assert terms["rkd_angle"].item() == pytest.approx(3 * reference(rkd_angle_loss, *pair), rel=1e-9)


def test_gathered_processes_equal_one(monkeypatch):
    student, teacher = embeddings(6, 3, seed=1), embeddings(6, 5, seed=2)
    # The other process's half, by the width of the own.
    rest = {3: student[3:], 5: teacher[3:]}
    monkeypatch.setattr(rkd, "gather_batch", lambda x: torch.cat([x, rest[x.shape[1]]]))
    got = RKD(gather=True)({"pooled": student[:3]}, {"pooled": teacher[:3]})
    torch.testing.assert_close(got, RKD()({"pooled": student}, {"pooled": teacher}))
