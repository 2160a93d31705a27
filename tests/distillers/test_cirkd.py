# SPDX-License-Identifier: Apache-2.0
"""CIRKD inside a batch against loops over pairs of images, a worked example and the properties of the formula."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.distillers import CIRKD, cirkd, cirkd_pixel_loss


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def distribution(anchor, others, temperature):
    """Softmax of the cosines of one vector to each column of (C, M)."""
    powers = []
    for j in range(others.shape[1]):
        dot = sum(a * b for a, b in zip(anchor.tolist(), others[:, j].tolist(), strict=True))
        powers.append(math.exp(dot / (math.hypot(*anchor) * math.hypot(*others[:, j])) / temperature))
    return [power / sum(powers) for power in powers]


def reference(student, teacher, temperature):
    own, goal = student.detach().flatten(2).numpy(), teacher.detach().flatten(2).numpy()
    divergences = []
    for a in range(own.shape[0]):
        for b in range(own.shape[0]):
            for i in range(own.shape[2]):
                q = distribution(own[a, :, i], own[b], temperature)
                p = distribution(goal[a, :, i], goal[b], temperature)
                divergences.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    return np.mean(divergences)


@pytest.fixture(params=[2**24, 13], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(cirkd, "_BLOCK", request.param)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("dims", [(3, 5), (2, 2)])
def test_function_against_loops(dims, temperature, block):
    student, teacher = maps(3, dims[0], 2, 3, seed=1), maps(3, dims[1], 2, 3, seed=2)
    loss = cirkd_pixel_loss(student, teacher, temperature)
    assert loss.item() == pytest.approx(reference(student, teacher, temperature), rel=1e-9)


def test_worked_example():
    """Two positions: of one direction in the student, orthogonal in the teacher."""
    student = torch.ones(1, 3, 1, 2, dtype=torch.float64)
    teacher = torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2)
    p = math.e / (1 + math.e)
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert expected == pytest.approx(0.110944072, abs=1e-9)
    assert cirkd_pixel_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-12)


def test_zero_at_equality_and_positive_otherwise():
    teacher = maps(2, 5, 3, 3)
    assert cirkd_pixel_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    for seed in range(5):
        assert cirkd_pixel_loss(maps(2, 3, 3, 3, seed=10 + seed), teacher).item() > 1e-3


def test_the_length_of_a_vector_and_a_rotation_of_channels_change_nothing():
    student, teacher = maps(2, 3, 2, 3, seed=1), maps(2, 5, 2, 3, seed=2)
    expected = cirkd_pixel_loss(student, teacher)
    length = maps(2, 1, 2, 3, seed=3).abs() + 0.1
    rotation = torch.linalg.qr(maps(5, 5, seed=4))[0]
    torch.testing.assert_close(cirkd_pixel_loss(student * length, teacher), expected)
    torch.testing.assert_close(cirkd_pixel_loss(student, teacher * length), expected)
    rotated = torch.einsum("oc,bchw->bohw", rotation, teacher)
    torch.testing.assert_close(cirkd_pixel_loss(student, rotated), expected)


def test_images_and_positions_may_be_permuted_jointly_only():
    student, teacher = maps(3, 3, 2, 3, seed=1), maps(3, 5, 2, 3, seed=2)
    expected = cirkd_pixel_loss(student, teacher)
    torch.testing.assert_close(cirkd_pixel_loss(student.flip(0, 3), teacher.flip(0, 3)), expected)
    assert abs(cirkd_pixel_loss(student.flip(0), teacher) - expected) > 1e-3
    assert abs(cirkd_pixel_loss(student.flip(3), teacher) - expected) > 1e-3


def test_images_are_related_to_each_other():
    """What each image is by itself does not determine the loss."""
    student, teacher = maps(2, 3, 2, 3, seed=1), maps(2, 5, 2, 3, seed=2)
    rotation = torch.linalg.qr(maps(5, 5, seed=4))[0]
    turned = torch.cat([teacher[:1], torch.einsum("oc,bchw->bohw", rotation, teacher[1:])])
    assert abs(cirkd_pixel_loss(student, turned) - cirkd_pixel_loss(student, teacher)) > 1e-3
    for i in range(2):
        torch.testing.assert_close(
            cirkd_pixel_loss(student[i : i + 1], turned[i : i + 1]),
            cirkd_pixel_loss(student[i : i + 1], teacher[i : i + 1]),
        )


def test_gradcheck(block):
    student, teacher = maps(2, 3, 2, 2, seed=1).requires_grad_(), maps(2, 4, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: cirkd_pixel_loss(x, teacher, 0.5), (student,), raise_exception=True)


def test_blocks_do_not_change_the_gradient(monkeypatch):
    student, teacher = maps(2, 3, 3, 4, seed=1).requires_grad_(), maps(2, 4, 3, 4, seed=2)
    gradients = []
    for size in (2**24, 50, 1):
        monkeypatch.setattr(cirkd, "_BLOCK", size)
        gradients.append(torch.autograd.grad(cirkd_pixel_loss(student, teacher), student)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_half_precision_at_extreme_values(value, dtype, block):
    """One sample with constant maps: both distributions are uniform."""
    student = torch.full((1, 3, 3, 3), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = cirkd_pixel_loss(student, torch.full((1, 5, 3, 3), -1e4, dtype=dtype))
        loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision(block):
    student, teacher = maps(2, 8, 3, 3, seed=1).float(), maps(2, 8, 3, 3, seed=2).float()
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cirkd_pixel_loss(student, teacher)
    expected = cirkd_pixel_loss(student.double(), teacher.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-6)


def test_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\) \(teacher\)"):
        cirkd_pixel_loss(maps(2, 3, 4, 4), maps(2, 3, 8, 8))


@pytest.mark.parametrize(("pool", "resize", "target"), [(None, "larger", "raw"), (2, "teacher", "standardize")])
def test_class_on_maps_of_other_channels_and_size(pool, resize, target):
    student, teacher = maps(2, 3, 2, 3, seed=1), maps(2, 5, 4, 6, seed=2, scale=3.0) + 2
    size, goal = (4, 6) if resize == "larger" else (2, 3), teacher
    if target == "standardize":
        values = teacher.numpy()
        mean, std = values.mean((0, 2, 3), keepdims=True), np.std(values, (0, 2, 3), keepdims=True)
        goal = torch.from_numpy((values - mean) / std)
    pair = [
        x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", antialias=x.shape[3] > size[1])
        for x in (student, goal)
    ]
    if pool:
        pair = [torch.stack([x[..., :2].mean((2, 3)), x[..., 2:].mean((2, 3))], dim=2) for x in pair]
    distiller = CIRKD(pixel_weight=2.0, temperature=0.5, pool=pool, resize=resize, target=target)
    terms = distiller({"map.-1": student}, {"map.-1": teacher})
    assert list(terms) == ["cirkd_pixel"]
    assert terms["cirkd_pixel"].item() == pytest.approx(2 * reference(*pair, 0.5), rel=1e-6)
    assert list(distiller.parameters()) == []


def test_gathering_relates_the_images_of_all_processes(monkeypatch):
    """The other process is played by one that holds the batch negated."""
    monkeypatch.setattr(cirkd, "gather_batch", lambda x: torch.cat([x, -x]))
    student, teacher = maps(1, 3, 2, 2, seed=1), maps(1, 5, 2, 2, seed=2)
    expected = reference(torch.cat([student, -student]), torch.cat([teacher, -teacher]), 0.1)
    terms = CIRKD(gather=True)({"map.-1": student}, {"map.-1": teacher})
    assert terms["cirkd_pixel"].item() == pytest.approx(expected, rel=1e-9)


def test_student_gets_a_gradient_and_the_teacher_none():
    student, teacher = maps(2, 3, 4, 4, seed=1).requires_grad_(), maps(2, 5, 8, 8, seed=2).requires_grad_()
    CIRKD(target="standardize")({"map.-1": student}, {"map.-1": teacher})["cirkd_pixel"].backward()
    assert (student.grad != 0).any()
    assert teacher.grad is None
