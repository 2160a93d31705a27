# SPDX-License-Identifier: Apache-2.0
"""CWD against loops over channels in plain Python, a worked example and the properties of the formula."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.core import TapError, Teacher
from kdlvfm.distillers import CWD, cwd_loss


def maps(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def over_positions(values, temperature):
    peak = max(values)
    powers = [math.exp((value - peak) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def reference(student, teacher, temperature):
    """One channel of one sample at a time."""
    divergences = []
    for b in range(student.shape[0]):
        for c in range(student.shape[1]):
            q = over_positions(student[b, c].flatten().tolist(), temperature)
            p = over_positions(teacher[b, c].flatten().tolist(), temperature)
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return temperature**2 * sum(divergences) / len(divergences)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 4, 5), (3, 2, 1, 7)])
def test_function_against_loops(shape, temperature):
    student, teacher = maps(*shape, seed=1), maps(*shape, seed=2)
    expected = reference(student, teacher, temperature)
    assert cwd_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_worked_example():
    """Two channels of two positions: uniform against uniform, and uniform against (1/4, 3/4)."""
    student = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    teacher = student.clone()
    teacher[0, 1, 0] = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    expected = (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)) / 2
    assert expected == pytest.approx(0.065406018, abs=1e-9)
    assert cwd_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-12)


def test_zero_at_equality_and_positive_otherwise():
    teacher = maps(2, 3, 4, 5)
    assert cwd_loss(teacher, teacher).item() == 0
    for seed in range(10):
        assert cwd_loss(maps(2, 3, 4, 5, seed=100 + seed), teacher).item() > 1e-3


def test_an_offset_of_a_channel_changes_nothing():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    offset = maps(2, 3, 1, 1, seed=3)
    expected = cwd_loss(student, teacher)
    torch.testing.assert_close(cwd_loss(student + offset, teacher), expected)
    torch.testing.assert_close(cwd_loss(student, teacher + offset), expected)


def test_positions_channels_and_samples_may_be_permuted_jointly_only():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    first, second = (x.flatten(2)[:, :, order].view(2, 3, 4, 5) for x in (student, teacher))
    expected = cwd_loss(student, teacher)
    torch.testing.assert_close(cwd_loss(first, second), expected)
    torch.testing.assert_close(cwd_loss(student[:, [2, 0, 1]].flip(0), teacher[:, [2, 0, 1]].flip(0)), expected)
    assert cwd_loss(first, teacher).item() != pytest.approx(expected.item(), rel=1e-3)


def test_the_scale_matters():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    assert cwd_loss(2 * student, 2 * teacher).item() != pytest.approx(cwd_loss(student, teacher).item(), rel=0.1)
    assert cwd_loss(2 * teacher, teacher).item() > 0.1
    # The temperature is nothing but an inverse scale, up to its square in front.
    torch.testing.assert_close(cwd_loss(2 * student, 2 * teacher, 8.0), 4 * cwd_loss(student, teacher, 4.0))


def test_limit_of_high_temperature():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    centred = [x - x.mean((2, 3), keepdim=True) for x in (student, teacher)]
    limit = (centred[0] - centred[1]).square().sum((2, 3)).div(2 * 20).mean()
    torch.testing.assert_close(cwd_loss(student, teacher, 1e4), limit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_the_difference_of_the_distributions(temperature):
    student, teacher = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 3, 4, 5, seed=2)
    cwd_loss(student, teacher, temperature).backward()
    first, second = ((x.detach().flatten(2) / temperature).softmax(2).view(2, 3, 4, 5) for x in (student, teacher))
    torch.testing.assert_close(student.grad, temperature * (first - second) / 6)


def test_gradcheck():
    student, teacher = maps(2, 3, 2, 2, seed=1, scale=1.0).requires_grad_(), maps(2, 3, 2, 2, seed=2, scale=1.0)
    assert torch.autograd.gradcheck(lambda x: cwd_loss(x, teacher, 2.0), (student,), raise_exception=True)


def test_the_teacher_gets_no_gradient():
    student, teacher = maps(1, 2, 3, 3, seed=1).requires_grad_(), maps(1, 2, 3, 3, seed=2).requires_grad_()
    for standardize in (False, True):
        CWD(standardize=standardize)({"logits": student}, {"logits": teacher})["cwd"].backward()
        assert teacher.grad is None
        assert (student.grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("spike", [0.0, 1e4])
def test_half_precision_at_extreme_values(spike, standardize, dtype):
    """One sample: a constant student, and a teacher that is constant or has one outlier position."""
    student, teacher = (torch.full((1, 2, 3, 3), 1e4, dtype=dtype) for _ in range(2))
    teacher[:, :, 0, 0] -= 2 * spike
    student.requires_grad_()
    loss = CWD(standardize=standardize)({"logits": student}, {"logits": teacher})["cwd"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_before_any_arithmetic(dtype):
    student, teacher = maps(2, 3, 4, 5, seed=1).to(dtype), maps(2, 3, 4, 5, seed=2).to(dtype)
    loss = cwd_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cwd_loss(student.double(), teacher.double()).float())


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 5, 4, 4\) \(teacher\)"):
        cwd_loss(maps(2, 3, 4, 4), maps(2, 5, 4, 4))


def test_one_dimension_without_the_other_is_refused():
    for dims in ({"student_dim": 3}, {"teacher_dim": 3}):
        with pytest.raises(ValueError, match="both student_dim and teacher_dim"):
            CWD(**dims)


def test_a_projector_is_built_only_where_channels_differ():
    for cwd in (CWD(), CWD(5, 5)):
        assert list(cwd.parameters()) == []
    assert isinstance(CWD(3, 5).align.projector, nn.Conv2d)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_on_maps_of_other_channels_and_size(resize, standardize):
    cwd = CWD(3, 5, temperature=2.0, resize=resize, standardize=standardize, student_tap="map.0", teacher_tap="map.1")
    cwd = cwd.double()
    student, teacher = maps(2, 3, 6, 4, seed=1), maps(2, 5, 3, 8, seed=2)
    projected = torch.einsum("oc,bchw->bohw", cwd.align.projector.weight[:, :, 0, 0].detach(), student)
    size = {"larger": (6, 8), "student": (3, 8), "teacher": (6, 4)}[resize]
    pair = []
    for x in (projected, teacher):
        if x.shape[2:] != size:
            shrinks = any(new < old for new, old in zip(size, x.shape[2:], strict=True))
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
        if standardize:
            values = x.numpy()
            mean, std = values.mean((0, 2, 3), keepdims=True), np.std(values, (0, 2, 3), keepdims=True)
            x = torch.from_numpy((values - mean) / std)
        pair.append(x)
    terms = cwd({"map.0": student}, {"map.1": teacher})
    assert list(terms) == ["cwd"]
    assert terms["cwd"].item() == pytest.approx(3 * reference(*pair, 2.0), rel=1e-7)


def test_standardizing_forgets_the_scale_of_the_teachers_channels():
    cwd = CWD(standardize=True)
    student, teacher = {"logits": maps(2, 3, 4, 4, seed=1)}, maps(2, 3, 4, 4, seed=2)
    outlier = teacher * torch.tensor([1.0, 500.0, 0.1]).view(3, 1, 1) + 40
    torch.testing.assert_close(cwd(student, {"logits": outlier}), cwd(student, {"logits": teacher}), rtol=1e-6, atol=0)


def test_student_and_projector_get_a_gradient():
    cwd = CWD(3, 5).double()
    student = maps(2, 3, 4, 4, seed=1).requires_grad_()
    cwd({"logits": student}, {"logits": maps(2, 5, 8, 8, seed=2)})["cwd"].backward()
    assert (student.grad != 0).any()
    assert (cwd.align.projector.weight.grad != 0).any()
    assert cwd.align.projector.bias is None


@pytest.mark.parametrize("options", [{"projector": "mlp"}, {"target": "phi_s"}])
def test_what_needs_the_channels_says_so(options):
    with pytest.raises(ValueError, match="pass student_dim and teacher_dim"):
        CWD(**options)


def test_from_context_reads_both_dimensions(context):
    assert list(CWD.from_context(context).parameters()) == []
    cwd = CWD.from_context(context, student_tap="map.-1", teacher_tap="map.-1", loss_weight=50.0)
    assert cwd.align.projector.weight.shape == (12, 8, 1, 1)
    assert cwd.loss_weight == 50.0


def test_a_teacher_without_classes_is_distilled_on_standardised_maps(context, toy_model):
    class WithoutClasses(toy_model):
        def taps(self):
            return {tap: info for tap, info in super().taps().items() if tap != "logits"}

    label_free = dataclasses.replace(context, teacher=Teacher(WithoutClasses()))
    cwd = CWD.from_context(label_free)
    assert (cwd.student_taps, cwd.teacher_taps, cwd.standardize) == (("map.-1",), ("map.-1",), True)
    assert CWD.from_context(label_free, standardize=False).standardize is False
    with pytest.raises(TapError, match="has no classes"):
        CWD.from_context(label_free, student_tap="logits")


@pytest.mark.parametrize("length", [1, 4, 100])
def test_blocks_of_channels_change_nothing(length, monkeypatch):
    student, teacher = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 3, 4, 5, seed=2)
    whole = cwd_loss(student, teacher)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr("kdlvfm.distillers.cwd.block_length", lambda x, entries: length)
    value = cwd_loss(student, teacher)
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected)
