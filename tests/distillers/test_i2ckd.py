# SPDX-License-Identifier: Apache-2.0
"""I2CKD against loops over pixels and pairs of classes, worked examples and the properties of the definition."""

import itertools
import math

import pytest
import torch
from torch import nn

from kdlvfm.distillers import I2CKD, i2ckd, i2ckd_loss

CLASSES, VOID, UNLABELLED = 4, 255, -1


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(*shape, seed=0):
    """Every class but the last, some void and some unlabelled pixels."""
    values = torch.tensor([0, 1, 2, VOID, UNLABELLED])
    return values[torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed))]


def prototypes_by_loops(features, target):
    pixels = {}
    for b, row, column in itertools.product(*map(range, target.shape)):
        pixels.setdefault(target[b, row, column].item(), []).append(features[b, :, row, column].tolist())
    return {
        k: [sum(values) / len(found) for values in zip(*found, strict=True)]
        for k, found in pixels.items()
        if 0 <= k < CLASSES
    }


def measure(x, y, distance):
    if distance == "cosine":
        return 1 - sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))
    return math.dist(x, y) ** (2 if distance == "squared" else 1)


def reference(
    student, teacher, target, margin=1.0, distance="l2", anchor="student", negatives="teacher", reduction="mean"
):
    own, goal = prototypes_by_loops(student, target), prototypes_by_loops(teacher, target)
    first, positive = (own, goal) if anchor == "student" else (goal, own)
    negative = own if negatives == "student" else goal
    rows = [
        [
            max(0.0, measure(first[k], positive[k], distance) - measure(first[k], negative[j], distance) + margin)
            for j in own
            if j != k
        ]
        for k in own
    ]
    flat = [value for row in rows for value in row]
    if reduction == "hardest":
        return sum(map(max, rows)) / len(rows)
    return sum(flat) / (len(flat) if reduction == "mean" else 1)


def test_prototypes_against_loops():
    features, target = maps(2, 3, 4, 5), labels(2, 4, 5)
    expected = prototypes_by_loops(features, target)
    prototypes, present = i2ckd.class_prototypes(features, target, CLASSES)
    assert present.tolist() == [True, True, True, False]
    assert prototypes.shape == (CLASSES, 3)
    assert prototypes[3].tolist() == [0, 0, 0]
    for k, values in expected.items():
        assert prototypes[k].tolist() == pytest.approx(values, rel=1e-9)


def test_prototypes_resize_labels_to_the_nearest():
    features = torch.tensor([[[[2.0, 6.0]]]])
    target = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]])
    prototypes, present = i2ckd.class_prototypes(features, target, 2)
    assert prototypes.flatten().tolist() == [2, 6]
    assert present.all()


@pytest.mark.parametrize("margin", [0.5, 3.0])
@pytest.mark.parametrize("distance", ["l2", "squared", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "hardest"])
def test_function_against_loops(reduction, distance, margin):
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2), labels(2, 4, 5)
    loss = i2ckd_loss(student, teacher, target, CLASSES, margin, distance=distance, reduction=reduction)
    expected = reference(student, teacher, target, margin, distance, reduction=reduction)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("anchor", ["student", "teacher"])
@pytest.mark.parametrize("negatives", ["student", "teacher"])
def test_roles_of_the_networks(negatives, anchor):
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2), labels(2, 4, 5)
    loss = i2ckd_loss(student, teacher, target, CLASSES, anchor=anchor, negatives=negatives)
    expected = reference(student, teacher, target, anchor=anchor, negatives=negatives)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_prototypes_of_single_images_are_averaged_over_images_with_two_classes():
    student, teacher, target = maps(3, 3, 4, 5, seed=1), maps(3, 3, 4, 5, seed=2), labels(3, 4, 5)
    target[1] = 2
    loss = i2ckd_loss(student, teacher, target, CLASSES, prototypes="image")
    parts = [reference(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]) for i in (0, 2)]
    assert loss.item() == pytest.approx(sum(parts) / 2, rel=1e-9)


def test_normalised_prototypes_do_not_know_the_scale_of_a_network():
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2), labels(2, 4, 5)
    expected = i2ckd_loss(student, teacher, target, CLASSES, normalise=True)
    torch.testing.assert_close(i2ckd_loss(7 * student, teacher / 3, target, CLASSES, normalise=True), expected)
    assert abs(i2ckd_loss(7 * student, teacher / 3, target, CLASSES) - expected) > 0.1


def test_worked_examples():
    """One channel: prototypes 0 and 3 of the student, 1 and 3.5 of the teacher."""
    student, teacher = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2), torch.tensor([1.0, 3.5]).view(1, 1, 1, 2)
    target = torch.tensor([[[0, 1]]])
    assert i2ckd_loss(student, teacher, target, 2, margin=1.0).item() == 0
    assert i2ckd_loss(student, teacher, target, 2, margin=3.0).item() == 1
    assert i2ckd_loss(student, teacher, target, 2, margin=3.0, reduction="sum").item() == 2


def test_the_order_of_classes_and_of_pixels_in_a_class_does_not_matter():
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2), labels(2, 4, 5)
    expected = i2ckd_loss(student, teacher, target, CLASSES)
    renamed = target.clone()
    for old, new in {0: 3, 1: 0, 2: 1}.items():
        renamed[target == old] = new
    torch.testing.assert_close(i2ckd_loss(student, teacher, renamed, CLASSES), expected)
    pixels = student.movedim(1, -1).clone()
    where = target == 2
    pixels[where] = pixels[where].flip(0)
    torch.testing.assert_close(i2ckd_loss(pixels.movedim(-1, 1), teacher, target, CLASSES), expected)


@pytest.mark.parametrize("prototypes", ["batch", "image"])
@pytest.mark.parametrize(
    "target", [torch.full((2, 4, 5), 2), labels(2, 4, 5).clamp(max=-1), torch.full((2, 4, 5), 255)]
)
def test_fewer_than_two_classes_give_zero_and_keep_the_graph(target, prototypes):
    student, teacher = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 3, 4, 5, seed=2)
    loss = i2ckd_loss(student, teacher, target, CLASSES, prototypes=prototypes)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("distance", ["l2", "squared", "cosine"])
def test_only_labelled_pixels_of_the_student_get_a_gradient(distance):
    student, teacher = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 3, 4, 5, seed=2).requires_grad_()
    target = labels(2, 4, 5)
    i2ckd_loss(student, teacher, target, CLASSES, margin=9.0, distance=distance).backward()
    labelled = ((target >= 0) & (target != VOID)).unsqueeze(1).expand_as(student)
    assert (student.grad[labelled] != 0).all()
    assert (student.grad[~labelled] == 0).all()
    assert teacher.grad is None


def test_another_label_may_be_void():
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2), labels(2, 4, 5).clamp(max=3)
    expected = i2ckd_loss(student, teacher, target.where(target != 1, 255), CLASSES)
    torch.testing.assert_close(i2ckd_loss(student, teacher, target, CLASSES, ignore_index=1), expected)


@pytest.mark.parametrize("distance", ["l2", "squared", "cosine"])
def test_gradcheck(distance):
    student, teacher, target = maps(1, 3, 3, 3, seed=1).requires_grad_(), maps(1, 3, 3, 3, seed=2), labels(1, 3, 3)

    def loss(x):
        return i2ckd_loss(x, teacher, target, CLASSES, margin=9.0, distance=distance, normalise=True)

    assert torch.autograd.gradcheck(loss, (student,), raise_exception=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", ["l2", "squared", "cosine"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_half_precision_at_extreme_values(value, normalise, distance, dtype):
    """Constant maps: all prototypes of a network are one, and with `value` those of both networks."""
    student = torch.full((1, 3, 2, 2), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = i2ckd_loss(
            student,
            torch.full((1, 3, 2, 2), 1e4, dtype=dtype),
            torch.tensor([[[0, 1], [2, 255]]]),
            CLASSES,
            distance=distance,
            normalise=normalise,
        )
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1, abs=1e-3)
    assert student.grad.isfinite().all()


def test_bad_arguments_are_refused():
    student, target = maps(2, 3, 4, 4), labels(2, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 5, 4, 4\) \(teacher\)"):
        i2ckd_loss(student, maps(2, 5, 4, 4), target, CLASSES)
    with pytest.raises(ValueError, match=r"target \(1, 4, 4\)"):
        i2ckd_loss(student, student, target[:1], CLASSES)
    for option in ("distance", "anchor", "negatives", "reduction", "prototypes"):
        with pytest.raises(ValueError, match=f"{option} must be one of '.*, not 'neither'"):
            i2ckd_loss(student, student, target, CLASSES, **{option: "neither"})
    with pytest.raises(ValueError, match="needs labels"):
        I2CKD(3, 3, CLASSES)({"map.-1": student}, {"map.-1": student})


@pytest.mark.parametrize("normalise", [False, True])
def test_class_on_maps_of_other_channels_and_size(normalise):
    distiller = I2CKD(3, 5, CLASSES, loss_weight=2.0, margin=3.0, normalise=normalise, resize="teacher").double()
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 5, 8, 10, seed=2), labels(2, 4, 5)
    projected = distiller.align.projector(student)
    goal = nn.functional.interpolate(teacher, size=(4, 5), mode="bilinear", antialias=True)
    expected = 2 * i2ckd_loss(projected, goal, target, CLASSES, margin=3.0, normalise=normalise)
    full = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    terms = distiller({"map.-1": student}, {"map.-1": teacher}, full)
    assert list(terms) == ["i2ckd"]
    torch.testing.assert_close(terms["i2ckd"], expected)
    if not normalise:
        assert expected.item() == pytest.approx(2 * reference(projected, goal, target, margin=3.0), rel=1e-9)


def test_gathering_makes_prototypes_over_all_processes(monkeypatch):
    """The other process is played by one that holds the same batch mirrored."""
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2), labels(2, 4, 5)
    monkeypatch.setattr(i2ckd, "gather_batch", lambda x: torch.cat([x, x.flip(-1).flip(0)]))
    features = {"map.-1": student}, {"map.-1": teacher}
    expected = I2CKD(3, 3, CLASSES)(*features, target)
    torch.testing.assert_close(I2CKD(3, 3, CLASSES, gather=True)(*features, target), expected)
    mixed = I2CKD(3, 3, CLASSES, gather=True, prototypes="image")(*features, target)
    torch.testing.assert_close(mixed, I2CKD(3, 3, CLASSES, prototypes="image")(*features, target))


def test_a_projector_is_built_only_where_channels_differ():
    assert list(I2CKD(5, 5, CLASSES).parameters()) == []
    assert isinstance(I2CKD(3, 5, CLASSES).align.projector, nn.Conv2d)


def test_student_and_projector_get_a_gradient_and_the_teacher_none():
    distiller = I2CKD(3, 5, CLASSES)
    student, teacher = (torch.randn(2, dim, 4, 4, requires_grad=True) for dim in (3, 5))
    distiller({"map.-1": student}, {"map.-1": teacher}, labels(2, 16, 16))["i2ckd"].backward()
    assert teacher.grad is None
    assert all((x.grad != 0).any() for x in (student, *distiller.parameters()))


def test_from_context_reads_dimensions_and_classes(context):
    distiller = I2CKD.from_context(context)
    assert distiller.align.projector.weight.shape == (12, 8, 1, 1)
    assert distiller.num_classes == context.num_classes
    assert I2CKD.from_context(context, num_classes=2, student_tap="decoder").num_classes == 2
