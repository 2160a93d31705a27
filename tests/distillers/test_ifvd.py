# SPDX-License-Identifier: Apache-2.0
"""IFVD against loops over pixels, a worked example and the properties of the formula."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.distillers import IFVD, ifvd_loss

CLASSES, VOID, UNLABELLED = 4, 255, -1


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3


def labels(*shape, seed=0):
    """Every class but the last, some void and some unlabelled pixels."""
    values = torch.tensor([0, 1, 2, VOID, UNLABELLED])
    return values[torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed))]


def variation(features, labels):
    """Pixel (row, column) -> cosine to the mean of its class, of one image (C, H, W)."""
    pixels = {}
    for row, column in itertools.product(*map(range, labels.shape)):
        if 0 <= labels[row, column] < CLASSES:
            pixels.setdefault(labels[row, column].item(), {})[row, column] = features[:, row, column].tolist()
    result = {}
    for members in pixels.values():
        mean = [sum(values) / len(members) for values in zip(*members.values(), strict=True)]
        for place, vector in members.items():
            dot = sum(a * b for a, b in zip(vector, mean, strict=True))
            result[place] = dot / (math.hypot(*vector) * math.hypot(*mean))
    return result


def reference(student, teacher, target):
    squares = []
    for s, t, y in zip(student.detach(), teacher.detach(), target, strict=True):
        own, goal = variation(s, y), variation(t, y)
        squares += [(own[place] - goal[place]) ** 2 for place in own]
    return sum(squares) / len(squares)


@pytest.mark.parametrize(("student_dim", "teacher_dim"), [(3, 3), (2, 5), (6, 1)])
def test_function_against_loops(student_dim, teacher_dim):
    student, teacher = maps(2, student_dim, 4, 5, seed=1), maps(2, teacher_dim, 4, 5, seed=2)
    target = labels(2, 4, 5)
    assert ifvd_loss(student, teacher, target, CLASSES).item() == pytest.approx(
        reference(student, teacher, target), rel=1e-9
    )


def test_worked_example():
    """Two pixels of one class: at 45 degrees from their mean in the student, on it in the teacher."""
    student = torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2)
    loss = ifvd_loss(student, torch.ones_like(student), torch.tensor([[[0, 0]]]), 1)
    assert loss.item() == pytest.approx((1 - math.sqrt(0.5)) ** 2, rel=1e-12)
    apart = ifvd_loss(student, torch.ones_like(student), torch.tensor([[[0, 1]]]), 2)
    assert apart.item() == pytest.approx(0, abs=1e-12)


def test_zero_at_equality_and_scale_free():
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 5, 4, 5, seed=2), labels(2, 4, 5)
    loss = ifvd_loss(student, teacher, target, CLASSES)
    assert ifvd_loss(teacher, teacher, target, CLASSES).item() == 0
    assert loss.item() > 1e-3
    torch.testing.assert_close(ifvd_loss(9 * student, teacher / 9, target, CLASSES), loss)
    rotation = torch.linalg.qr(maps(5, 5, seed=3))[0]
    rotated = torch.einsum("oc,bchw->bohw", rotation, teacher)
    torch.testing.assert_close(ifvd_loss(student, rotated, target, CLASSES), loss)


def test_prototypes_belong_to_their_image():
    """Two copies of an image, one negated: a prototype of both would be zero."""
    student, teacher, target = maps(1, 3, 4, 5, seed=1), maps(1, 5, 4, 5, seed=2), labels(1, 4, 5)
    expected = ifvd_loss(student, teacher, target, CLASSES)
    both = [torch.cat([x, -x]) for x in (student, teacher)]
    torch.testing.assert_close(ifvd_loss(*both, torch.cat([target, target]), CLASSES), expected)


def test_labels_are_resized_to_the_nearest():
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 5, 4, 5, seed=2), labels(2, 4, 5)
    full = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(ifvd_loss(student, teacher, full, CLASSES), ifvd_loss(student, teacher, target, CLASSES))


def test_only_labelled_pixels_of_the_student_get_a_gradient():
    student, teacher = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 3, 4, 5, seed=2).requires_grad_()
    target = labels(2, 4, 5)
    ifvd_loss(student, teacher, target, CLASSES).backward()
    labelled = ((target >= 0) & (target != VOID)).unsqueeze(1).expand_as(student)
    assert (student.grad[labelled] != 0).any()
    assert (student.grad[~labelled] == 0).all()
    assert teacher.grad is None


def test_another_label_may_be_void():
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2), labels(2, 4, 5).clamp(max=3)
    expected = ifvd_loss(student, teacher, target.where(target != 1, 255), CLASSES)
    torch.testing.assert_close(ifvd_loss(student, teacher, target, CLASSES, ignore_index=1), expected)


@pytest.mark.parametrize("nothing", [VOID, UNLABELLED])
def test_without_labels_the_loss_is_zero_and_keeps_the_graph(nothing):
    student = maps(2, 3, 4, 5).requires_grad_()
    loss = ifvd_loss(student, maps(2, 3, 4, 5, seed=1), torch.full((2, 4, 5), nothing), CLASSES)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_gradcheck():
    student, teacher, target = maps(2, 3, 3, 3, seed=1).requires_grad_(), maps(2, 4, 3, 3, seed=2), labels(2, 3, 3)

    def loss(x):
        return ifvd_loss(x, teacher, target, CLASSES)

    assert torch.autograd.gradcheck(loss, (student,), raise_exception=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("target", [torch.zeros(1, 2, 2, dtype=torch.long), torch.tensor([[[0, 1], [2, 255]]])])
def test_half_precision_at_extreme_values(target, value, dtype):
    """One sample with constant maps, where all cosines are 1, or undefined and taken as 0."""
    student = torch.full((1, 3, 2, 2), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = ifvd_loss(student, torch.full((1, 5, 2, 2), -1e4, dtype=dtype), target, CLASSES)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(value == 0), abs=1e-5)
    assert student.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    student, teacher, target = maps(2, 8, 6, 6, seed=1).float(), maps(2, 8, 6, 6, seed=2).float(), labels(2, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ifvd_loss(student, teacher, target, CLASSES)
    expected = ifvd_loss(student.double(), teacher.double(), target, CLASSES)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\) \(teacher\)"):
        ifvd_loss(maps(2, 3, 4, 4), maps(2, 3, 8, 8), labels(2, 4, 4), CLASSES)
    with pytest.raises(ValueError, match=r"target \(1, 4, 4\)"):
        ifvd_loss(maps(2, 3, 4, 4), maps(2, 3, 4, 4), labels(1, 4, 4), CLASSES)
    with pytest.raises(ValueError, match="needs labels"):
        IFVD(CLASSES)({"map.-1": maps(2, 3, 4, 4)}, {"map.-1": maps(2, 3, 4, 4)})


@pytest.mark.parametrize("resize", ["larger", "teacher"])
@pytest.mark.parametrize("normalisation", ["raw", "standardize"])
def test_class_on_maps_of_other_channels_and_size(normalisation, resize):
    student, teacher, target = maps(2, 3, 2, 3, seed=1), maps(2, 5, 4, 6, seed=2, scale=3.0), labels(2, 8, 12)
    values, size = teacher.numpy(), (4, 6) if resize == "larger" else (2, 3)
    goal = teacher
    if normalisation == "standardize":
        mean, std = values.mean((0, 2, 3), keepdims=True), np.std(values, (0, 2, 3), keepdims=True)
        goal = torch.from_numpy((values - mean) / std)
    first, second = (
        x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", antialias=x.shape[3] > size[1])
        for x in (student, goal)
    )
    nearest = F.interpolate(target.unsqueeze(1).double(), size=size, mode="nearest-exact").squeeze(1).long()
    distiller = IFVD(CLASSES, loss_weight=2.0, target=normalisation, resize=resize)
    terms = distiller({"map.-1": student}, {"map.-1": teacher}, target)
    assert list(terms) == ["ifvd"]
    assert terms["ifvd"].item() == pytest.approx(2 * reference(first, second, nearest), rel=1e-7)
    assert list(distiller.parameters()) == []


def test_from_context_reads_the_number_of_classes(context):
    assert IFVD.from_context(context).num_classes == context.num_classes
    assert IFVD.from_context(context, num_classes=2).num_classes == 2
