# SPDX-License-Identifier: Apache-2.0
"""Gram against numpy's matrices, a worked example and the properties of the formula."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.distillers import Gram, gram, gram_loss, pairwise_loss


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def gram_matrix(rows):
    return np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in rows] for a in rows])


def reference(student, teacher, scope):
    values = [x.detach().movedim(1, -1).flatten(1, 2).numpy() for x in (student, teacher)]
    if scope == "batch":
        values = [x.reshape(1, -1, x.shape[2]) for x in values]
    return np.mean([(gram_matrix(s) - gram_matrix(t)) ** 2 for s, t in zip(*values, strict=True)])


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize(("dims", "size"), [((3, 5), (2, 1)), ((3, 5), (3, 4)), ((2, 2), (3, 3))])
def test_function_against_numpy(dims, size, scope):
    """With fewer patches than channels, and with more."""
    student, teacher = maps(2, dims[0], *size, seed=1), maps(2, dims[1], *size, seed=2)
    loss = gram_loss(student, teacher, scope=scope)
    assert loss.item() == pytest.approx(reference(student, teacher, scope), rel=1e-9)


def test_worked_example():
    """Patches orthogonal in the student, at 60 degrees in the teacher: two of four entries differ by a half."""
    student = torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 0.5], [0.0, 0.75**0.5]], dtype=torch.float64).view(1, 2, 1, 2)
    assert gram_loss(student, teacher).item() == pytest.approx(0.125, rel=1e-12)


def test_of_one_image_it_is_the_pairwise_loss():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 5, 4, 5, seed=2)
    torch.testing.assert_close(gram_loss(student, teacher), pairwise_loss(student, teacher))


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_zero_at_equality_and_free_of_length_and_rotation(scope):
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 6, 4, 5, seed=2)
    expected = gram_loss(student, teacher, scope=scope)
    assert expected.item() > 1e-3
    assert gram_loss(teacher, teacher, scope=scope).item() == pytest.approx(0, abs=1e-12)
    length = maps(2, 1, 4, 5, seed=3).abs() + 0.1
    rotation = torch.linalg.qr(maps(6, 6, seed=4))[0]
    changed = torch.einsum("oc,bchw->bohw", rotation, teacher) * length
    torch.testing.assert_close(gram_loss(student, changed, scope=scope), expected)
    torch.testing.assert_close(gram_loss(student * length, teacher, scope=scope), expected)


def test_only_the_scope_of_a_batch_relates_images():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 5, 4, 5, seed=2)
    turned = torch.cat([teacher[:1], -teacher[1:]])
    torch.testing.assert_close(gram_loss(student, turned), gram_loss(student, teacher))
    assert abs(gram_loss(student, turned, scope="batch") - gram_loss(student, teacher, scope="batch")) > 1e-3


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("size", [(1, 2), (2, 3)])
def test_gradcheck(size, scope):
    student, teacher = maps(2, 3, *size, seed=1).requires_grad_(), maps(2, 5, *size, seed=2)

    def loss(x):
        return gram_loss(x, teacher, scope=scope)

    assert torch.autograd.gradcheck(loss, (student,), raise_exception=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("size", [2, 6])
def test_half_precision_at_extreme_values(size, value, dtype):
    """One sample with constant maps, where all cosines are equal, or undefined and taken as 0."""
    student = torch.full((1, 3, size, size), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = gram_loss(student, torch.full((1, 5, size, size), -1e4, dtype=dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(value == 0), abs=1e-5)
    assert student.grad.isfinite().all()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\) \(teacher\)"):
        gram_loss(maps(2, 3, 4, 4), maps(2, 3, 8, 8))
    with pytest.raises(ValueError, match="scope must be"):
        gram_loss(maps(2, 3, 4, 4), maps(2, 3, 4, 4), scope="patch")
    with pytest.raises(ValueError, match="needs scope='batch'"):
        Gram(gather=True)


@pytest.mark.parametrize(
    ("resize", "target", "scope"),
    [("larger", "raw", "image"), ("teacher", "standardize", "batch"), ("student", "layernorm", "image")],
)
def test_class_on_maps_of_other_channels_and_size(resize, target, scope):
    student, teacher = maps(2, 3, 2, 3, seed=1), maps(2, 5, 4, 6, seed=2, scale=3.0) + 2
    size, goal = (2, 3) if resize == "teacher" else (4, 6), teacher
    if target != "raw":
        axes = (0, 2, 3) if target == "standardize" else (1,)
        values, eps = teacher.numpy(), 1e-5 if target == "layernorm" else 0.0
        goal = (values - values.mean(axes, keepdims=True)) / np.sqrt(values.var(axes, keepdims=True) + eps)
        goal = torch.from_numpy(goal)
    pair = [
        x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", antialias=x.shape[3] > size[1])
        for x in (student, goal)
    ]
    distiller = Gram(resize=resize, target=target, scope=scope)
    terms = distiller({"map.-1": student}, {"map.-1": teacher})
    assert list(terms) == ["gram"]
    assert terms["gram"].item() == pytest.approx(2 * reference(*pair, scope), rel=1e-6)
    assert list(distiller.parameters()) == []


def test_gathering_compares_the_patches_of_all_processes(monkeypatch):
    """The other process is played by one that holds other features of the same images."""
    monkeypatch.setattr(gram, "gather_batch", lambda x: torch.cat([x, -x.flip(1)]))
    student, teacher = maps(1, 3, 2, 2, seed=1), maps(1, 5, 2, 2, seed=2)
    both = [torch.cat([x, -x.flip(1)]) for x in (student, teacher)]
    terms = Gram(scope="batch", gather=True, loss_weight=1.0)({"map.-1": student}, {"map.-1": teacher})
    assert terms["gram"].item() == pytest.approx(reference(*both, "batch"), rel=1e-9)


def test_student_gets_a_gradient_and_the_teacher_none():
    student, teacher = maps(2, 3, 4, 4, seed=1).requires_grad_(), maps(2, 5, 8, 8, seed=2).requires_grad_()
    Gram(target="standardize")({"map.-1": student}, {"map.-1": teacher})["gram"].backward()
    assert (student.grad != 0).any()
    assert teacher.grad is None
