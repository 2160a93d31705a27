# SPDX-License-Identifier: Apache-2.0
"""ReviewKD: the hierarchical loss against loops over fields, the fusion against matrices, and the levels joined."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import TapError
from kdlvfm.distillers import ReviewKD, hcl_loss
from kdlvfm.distillers.review_kd import ABF


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def fields(x, size):
    """Means over size x size fields, which overlap by a row or column where the map does not divide."""
    rows, columns = x.shape[2:]

    def edges(length):
        return [(i * length // size, math.ceil((i + 1) * length / size)) for i in range(size)]

    means = [[x[:, :, a:b, c:d].mean((2, 3)) for c, d in edges(columns)] for a, b in edges(rows)]
    return np.array(means)


def reference(student, teacher):
    student, teacher = student.detach().numpy(), teacher.detach().numpy()
    total, weight, weights = np.mean((student - teacher) ** 2), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            total += weight * np.mean((fields(student, size) - fields(teacher, size)) ** 2)
            weights += weight
    return total / weights


def pointwise(x, conv):
    """A 1x1 convolution as a matrix at every position."""
    result = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x)
    return result if conv.bias is None else result + conv.bias.view(-1, 1, 1)


def normalised(x):
    """Batch normalisation in its first training step."""
    var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt()


def onto(x, size):
    if x.shape[2:] == size:
        return x
    shrinks = any(new < old for new, old in zip(size, x.shape[2:], strict=True))
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 7, 9), (2, 3, 4, 6), (2, 3, 5, 3), (2, 1, 2, 2), (3, 2, 1, 1)])
def test_function_against_loops(shape):
    student, teacher = maps(*shape, seed=1), maps(*shape, seed=2)
    assert hcl_loss(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_weights_sum_to_one(size):
    """A difference of 3 everywhere is one of 3 at all scales."""
    x = maps(2, 3, size, size)
    assert hcl_loss(x + 3, x).item() == pytest.approx(9, rel=1e-12)


def test_worked_example():
    """+1 and -1 in a checkerboard vanish under all fields: 1 / (1 + 1/2 + 1/4 + 1/8)."""
    checks = torch.tensor([1.0, -1.0]).repeat(4)
    student = (checks[:, None] * checks[None, :]).view(1, 1, 8, 8)
    assert hcl_loss(student, torch.zeros_like(student)).item() == pytest.approx(8 / 15, rel=1e-6)


def test_zero_exactly_at_equality_symmetric_and_of_degree_two():
    student, teacher = maps(2, 3, 8, 8, seed=1), maps(2, 3, 8, 8, seed=2)
    loss = hcl_loss(student, teacher)
    assert hcl_loss(teacher, teacher).item() == 0
    assert loss.item() > 0
    torch.testing.assert_close(hcl_loss(teacher, student), loss)
    torch.testing.assert_close(hcl_loss(3 * student, 3 * teacher), 9 * loss)
    assert loss < F.mse_loss(student, teacher)


@pytest.mark.parametrize("size", [2, 5])
def test_gradcheck(size):
    student, teacher = maps(1, 2, size, size, seed=1).requires_grad_(), maps(1, 2, size, size, seed=2)
    assert torch.autograd.gradcheck(lambda x: hcl_loss(x, teacher), (student,), raise_exception=True)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 5, 4, 4\) \(teacher\)"):
        hcl_loss(maps(2, 3, 4, 4), maps(2, 5, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_half_precision_is_promoted_before_any_arithmetic(value, dtype):
    student = torch.full((1, 4, 5, 5), value, dtype=dtype, requires_grad=True)
    loss = hcl_loss(student, -student.detach())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((2 * student[0, 0, 0, 0].item()) ** 2, rel=1e-5)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("deeper_size", [(3, 2), (6, 4), (4, 3)])
def test_fusion_against_matrices(deeper_size):
    torch.manual_seed(0)
    abf = ABF(4).double()
    x, deeper = maps(2, 4, 6, 4, seed=1), maps(2, 4, *deeper_size, seed=2)
    rows, columns = ([i * had // has for i in range(has)] for had, has in zip(deeper_size, (6, 4), strict=True))
    raised = deeper[:, :, rows][:, :, :, columns]
    gates = 1 / (1 + torch.exp(-pointwise(torch.cat([x, raised], 1), abf.gates[0])))
    torch.testing.assert_close(abf(x, deeper), x * gates[:, 0:1] + raised * gates[:, 1:2])


@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_reviews_from_deep_to_shallow(resize, target):
    torch.manual_seed(0)
    taps = {"student_taps": ["map.0", "map.1"], "teacher_taps": ["map.2", "map.3"]}
    review = ReviewKD([3, 4], [5, 6], loss_weight=2.0, resize=resize, target=target, **taps).double()
    student = {"map.0": maps(2, 3, 12, 8, seed=1), "map.1": maps(2, 4, 6, 4, seed=2)}
    teacher = {"map.2": maps(2, 5, 6, 10, seed=3, scale=4.0), "map.3": maps(2, 6, 6, 10, seed=4, scale=4.0)}
    sizes = {"larger": [(12, 10), (6, 10)], "student": [(6, 10), (6, 10)], "teacher": [(12, 8), (6, 4)]}[resize]
    entered = [normalised(pointwise(x, entry[0])) for x, entry in zip(student.values(), review.entries, strict=True)]
    expected = 0.0
    for projector, x, y, size in (
        (review.projectors[1], entered[1], teacher["map.3"], sizes[1]),
        (review.projectors[0], review.fusions[0](*entered), teacher["map.2"], sizes[0]),
    ):
        if target != "raw":
            axes, eps = ((1,), 1e-5) if target == "layernorm" else ((0, 2, 3), 0.0)
            var, mean = torch.var_mean(y, axes, keepdim=True, unbiased=False)
            y = (y - mean) / (var + eps).sqrt()
        out = F.conv2d(onto(x, size), projector[0].weight, padding=1)
        expected += reference(normalised(out), onto(y, size))
    terms = review(student, teacher)
    assert list(terms) == ["review_kd"]
    assert terms["review_kd"].item() == pytest.approx(2 * expected, rel=1e-8)


def test_a_shallow_level_learns_from_the_deeper_maps():
    torch.manual_seed(0)
    review = ReviewKD([3, 4], [5, 5], student_taps=["map.0", "map.1"], teacher_taps=["map.-1", "map.-1"])
    student = {"map.0": torch.rand(2, 3, 8, 8), "map.1": torch.rand(2, 4, 4, 4, requires_grad=True)}
    teacher = {"map.-1": torch.rand(2, 5, 4, 4)}
    fused = review.fusions[0](*(entry(x) for entry, x in zip(review.entries, student.values(), strict=True)))
    hcl_loss(review.projectors[0](onto(fused, (4, 4))), teacher["map.-1"]).backward()
    assert (student["map.1"].grad != 0).any()
    assert review(student, teacher)["review_kd"].isfinite()


def test_student_and_networks_get_a_gradient_and_the_teacher_none():
    review = ReviewKD([3, 4], [5, 5], student_taps=["map.0", "map.1"], teacher_taps=["map.0", "map.1"]).double()
    student = {"map.0": maps(2, 3, 4, 4, seed=1), "map.1": maps(2, 4, 2, 2, seed=2)}
    teacher = {"map.0": maps(2, 5, 3, 3, seed=3), "map.1": maps(2, 5, 3, 3, seed=4)}
    for x in (*student.values(), *teacher.values()):
        x.requires_grad_()
    review(student, teacher)["review_kd"].backward()
    assert all((x.grad != 0).any() for x in (*student.values(), *review.parameters()))
    assert all(x.grad is None for x in teacher.values())


@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_autocast_at_extreme_values(batch, dtype, target):
    review = ReviewKD([3], [5], student_taps=["map.0"], teacher_taps=["map.0"], target=target)
    student = torch.full((batch, 3, 4, 4), 1e4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = review({"map.0": student}, {"map.0": torch.full((batch, 5, 2, 2), -1e4, dtype=dtype)})["review_kd"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in (student, *review.parameters()))


def test_the_width_of_the_fusion():
    assert ReviewKD([3, 4, 700], [5, 6, 7]).entries[0][0].out_channels == 512
    assert ReviewKD([3, 4, 30], [5, 6, 7]).entries[0][0].out_channels == 30
    assert ReviewKD([3, 4, 30], [5, 6, 7], hidden_dim=11).entries[0][0].out_channels == 11


def test_levels_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="2 student_dims, 3 teacher_dims"):
        ReviewKD([3, 4], [6, 7, 8])


def test_from_context_reads_all_dimensions(context):
    review = ReviewKD.from_context(context)
    shapes = [
        (entry[0].weight.shape[:2], projector[0].weight.shape[:2])
        for entry, projector in zip(review.entries, review.projectors, strict=True)
    ]
    assert shapes == [((8, 4), (7, 8)), ((8, 6), (9, 8)), ((8, 8), (12, 8))]
    review = ReviewKD.from_context(context, student_taps=["map.0"], teacher_taps=["decoder"], loss_weight=1.0)
    assert (review.student_taps, review.teacher_taps) == (("map.0",), ("decoder",))
    assert review.projectors[0][0].out_channels == 24
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        ReviewKD.from_context(context, student_taps=["map.3"], teacher_taps=["map.0"])
