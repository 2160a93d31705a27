# SPDX-License-Identifier: Apache-2.0
"""IDD against loops over classes and pixels, worked examples, and pixels without a label."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.distillers import IDD, idd_loss

CLASSES = 4


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(*shape, seed=0):
    """Classes 0 to 2 of 4, with some void and some unlabelled pixels."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0, 1, 2, 255, -1])
    return values[torch.randint(0, 5, shape, generator=generator)]


def edges(features, target):
    """Distances of one graph by pair of classes; features is a list of maps, target of their labels."""
    vectors = {}
    for x, y in zip(features, target, strict=True):
        for i in range(y.shape[0]):
            for j in range(y.shape[1]):
                if 0 <= y[i, j] < CLASSES:
                    vectors.setdefault(int(y[i, j]), []).append(x[:, i, j].detach().numpy())
    nodes = {label: np.mean(found, axis=0) for label, found in vectors.items()}
    return {(k, j): math.dist(nodes[k], nodes[j]) for k in nodes for j in nodes if k != j}


def reference(student, teacher, target, prototypes="batch", normalise=False):
    graphs = [range(len(student))] if prototypes == "batch" else [[i] for i in range(len(student))]
    losses = []
    for graph in graphs:
        own, goal = (edges([x[i] for i in graph], [target[i] for i in graph]) for x in (student, teacher))
        if own:
            first, second = (np.mean(list(x.values())) if normalise else 1.0 for x in (own, goal))
            losses.append(np.mean([(own[pair] / first - goal[pair] / second) ** 2 for pair in own]))
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("prototypes", ["batch", "image"])
def test_function_against_loops(prototypes, normalise):
    student, teacher, target = maps(3, 3, 4, 5, seed=1), maps(3, 6, 4, 5, seed=2), labels(3, 4, 5)
    target[2] = 1  # an image without a pair of classes
    options = {"prototypes": prototypes, "normalise": normalise}
    loss = idd_loss(student, teacher, target, CLASSES, **options)
    assert loss.item() == pytest.approx(reference(student, teacher, target, **options), rel=1e-9)


def test_worked_examples():
    """Classes at 0, 3 and 4 in the student, all 1 apart in the teacher."""
    student = torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 3)
    teacher = torch.eye(3, dtype=torch.float64).view(1, 3, 1, 3) / math.sqrt(2)
    target = torch.tensor([[[0, 1, 2]]])
    assert idd_loss(student, teacher, target, 3).item() == pytest.approx((2**2 + 3**2 + 0) / 3)
    # Distances 3, 4 and 1 over their mean 8/3, against 1 each.
    expected = ((9 / 8 - 1) ** 2 + (12 / 8 - 1) ** 2 + (3 / 8 - 1) ** 2) / 3
    assert idd_loss(student, teacher, target, 3, normalise=True).item() == pytest.approx(expected)


def test_zero_at_equality_and_under_what_keeps_distances():
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 6, 4, 5, seed=2), labels(2, 4, 5)
    rotation = torch.linalg.qr(maps(6, 6, seed=4))[0]
    moved = torch.einsum("oc,bchw->bohw", rotation, teacher) + maps(1, 6, 1, 1, seed=5)
    assert idd_loss(teacher, teacher, target, CLASSES).item() == 0
    assert idd_loss(moved, teacher, target, CLASSES).item() == pytest.approx(0, abs=1e-12)
    expected = idd_loss(student, teacher, target, CLASSES)
    assert expected > 1e-4
    torch.testing.assert_close(idd_loss(teacher, student, target, CLASSES), expected)
    torch.testing.assert_close(idd_loss(student, moved, target, CLASSES), expected)


def test_scale_matters_unless_normalised():
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 6, 4, 5, seed=2), labels(2, 4, 5)
    assert idd_loss(3 * teacher, teacher, target, CLASSES) > 1e-2
    assert idd_loss(3 * teacher, teacher, target, CLASSES, normalise=True).item() == pytest.approx(0, abs=1e-12)
    expected = idd_loss(student, teacher, target, CLASSES, normalise=True)
    torch.testing.assert_close(idd_loss(5 * student, teacher / 7, target, CLASSES, normalise=True), expected)


def test_names_of_classes_and_places_inside_a_class_do_not_matter():
    student, teacher, target = maps(1, 3, 4, 5, seed=1), maps(1, 6, 4, 5, seed=2), labels(1, 4, 5)
    expected = idd_loss(student, teacher, target, CLASSES)
    renamed = target.clone()
    renamed[target == 0], renamed[target == 2] = 3, 0
    torch.testing.assert_close(idd_loss(student, teacher, renamed, CLASSES), expected)
    inside = (target[0] == 1).flatten().nonzero().flatten()
    order = torch.arange(20)
    order[inside] = inside.flip(0)
    permuted = student.flatten(2)[..., order].view_as(student)
    torch.testing.assert_close(idd_loss(permuted, teacher, target, CLASSES), expected)


@pytest.mark.parametrize("prototypes", ["batch", "image"])
@pytest.mark.parametrize("value", [0, 255, -1])
def test_fewer_than_two_classes_give_zero_and_no_gradient(value, prototypes):
    student, teacher = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 6, 4, 5, seed=2)
    target = torch.full((2, 4, 5), value)
    loss = idd_loss(student, teacher, target, CLASSES, prototypes=prototypes, normalise=True)
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_two_classes_alone_have_no_proportion():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 6, 4, 5, seed=2)
    target = torch.randint(0, 2, (2, 4, 5))
    assert idd_loss(student, teacher, target, CLASSES) > 1e-4
    assert idd_loss(student, teacher, target, CLASSES, normalise=True).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("prototypes", ["batch", "image"])
def test_pixels_without_a_label_carry_no_gradient(prototypes):
    student, teacher, target = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 6, 4, 5, seed=2), labels(2, 4, 5)
    idd_loss(student, teacher, target, CLASSES, prototypes=prototypes).backward()
    touched = (student.grad != 0).any(dim=1)
    assert torch.equal(touched, (target >= 0) & (target != 255))


def test_maps_of_different_grids_are_measured_each_on_its_own():
    """A class so small that the student's grid passes over it has no edges."""
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[:, :, 2:] = 1
    target[0, 3, 0] = 2
    student, teacher = maps(1, 3, 2, 2, seed=1), maps(1, 3, 4, 4, seed=2)
    coarse = F.interpolate(target[None].float(), size=(2, 2), mode="nearest-exact")[0].long()
    assert not (coarse == 2).any()
    own, goal = edges([student[0]], [coarse[0]]), edges([teacher[0]], [target[0]])
    expected = np.mean([(own[pair] - goal[pair]) ** 2 for pair in own])
    assert idd_loss(student, teacher, target, CLASSES).item() == pytest.approx(expected)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("prototypes", ["batch", "image"])
def test_gradcheck(prototypes, normalise):
    student, teacher, target = maps(2, 3, 3, 3, seed=1).requires_grad_(), maps(2, 4, 3, 3, seed=2), labels(2, 3, 3)

    def loss(x):
        return idd_loss(x, teacher, target, CLASSES, prototypes=prototypes, normalise=normalise)

    assert torch.autograd.gradcheck(loss, (student,), raise_exception=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_half_precision_at_extreme_values(batch, normalise, value, dtype):
    """Constant maps: all classes are in one place."""
    student = torch.full((batch, 3, 4, 4), value, dtype=dtype, requires_grad=True)
    teacher = torch.full((batch, 5, 4, 4), -1e4, dtype=dtype)
    target = torch.arange(16).remainder(3).view(1, 4, 4).repeat(batch, 1, 1)
    with torch.autocast("cpu", dtype=dtype):
        loss = idd_loss(student, teacher, target, CLASSES, normalise=normalise)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    student, teacher, target = maps(2, 8, 6, 6, seed=1).float(), maps(2, 8, 6, 6, seed=2).float(), labels(2, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = idd_loss(student, teacher, target, CLASSES)
    assert loss.item() == pytest.approx(reference(student.double(), teacher.double(), target), rel=1e-5)


def test_bad_arguments_are_refused():
    x, target = maps(2, 3, 4, 4), labels(2, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(1, 3, 4, 4\)"):
        idd_loss(x, x[:1], target, CLASSES)
    with pytest.raises(ValueError, match=r"B of target \(1, 4, 4\)"):
        idd_loss(x, x, target[:1], CLASSES)
    with pytest.raises(ValueError, match="'batch' or 'image', not 'pixel'"):
        idd_loss(x, x, target, CLASSES, prototypes="pixel")
    with pytest.raises(ValueError, match="needs labels"):
        IDD(CLASSES)({"map.-1": x}, {"map.-1": x})


@pytest.mark.parametrize(("resize", "size"), [("larger", (4, 6)), ("teacher", (2, 3))])
def test_class_on_maps_of_other_channels_and_size(resize, size):
    student, teacher, target = maps(2, 3, 2, 3, seed=1), maps(2, 5, 4, 6, seed=2, scale=3.0) + 2, labels(2, 4, 6)
    target[:, :2, :3], target[:, 2:, 3:], target[:, :2, 3:] = 0, 1, 2
    goal = (teacher - teacher.mean((0, 2, 3), keepdim=True)) / teacher.var((0, 2, 3), correction=0, keepdim=True).sqrt()
    first, second = (
        x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", antialias=x.shape[3] > size[1])
        for x in (student, goal)
    )
    small = F.interpolate(target[None].float(), size=size, mode="nearest-exact")[0].long()
    terms = IDD(CLASSES, loss_weight=2.0, resize=resize)({"map.-1": student}, {"map.-1": teacher}, target)
    assert list(terms) == ["idd"]
    expected = 2 * reference(first, second, small, normalise=True)
    assert terms["idd"].item() == pytest.approx(expected, rel=1e-6)


def test_student_gets_a_gradient_and_the_teacher_none():
    student, teacher = maps(2, 3, 4, 4, seed=1).requires_grad_(), maps(2, 5, 8, 8, seed=2).requires_grad_()
    distiller = IDD(CLASSES)
    distiller({"map.-1": student}, {"map.-1": teacher}, labels(2, 16, 16))["idd"].backward()
    assert (student.grad != 0).any()
    assert teacher.grad is None
    assert list(distiller.parameters()) == []


def test_from_context_reads_the_number_of_classes(context):
    assert IDD.from_context(context).num_classes == context.num_classes
    assert IDD.from_context(context, num_classes=7).num_classes == 7


def test_two_classes_have_one_distance_which_normalised_says_nothing():
    with pytest.raises(ValueError, match="pass normalise=False"):
        IDD(num_classes=2)
    assert IDD(num_classes=2, normalise=False).num_classes == 2
