# SPDX-License-Identifier: Apache-2.0
"""FitNet against numpy and loops, and the projector that it trains."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import TapError
from kdlvfm.distillers import FitNet, fitnet_loss


def features(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def projected_by_loops(fitnet, x):
    """The 1x1 convolution as a matrix at every position."""
    weight, bias = fitnet.align.projector.weight[:, :, 0, 0], fitnet.align.projector.bias
    result = torch.empty(x.shape[0], weight.shape[0], *x.shape[2:], dtype=x.dtype)
    for b in range(x.shape[0]):
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                result[b, :, row, column] = weight @ x[b, :, row, column] + bias
    return result.detach()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (3, 7)])
def test_function_against_numpy(shape):
    student, teacher = features(*shape, seed=1), features(*shape, seed=2)
    expected = np.mean((student.numpy() - teacher.numpy()) ** 2)
    assert fitnet_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_worked_example():
    student = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
    teacher = torch.tensor([1.0, 0.0, 3.0, 0.0]).view(1, 1, 2, 2)
    assert fitnet_loss(student, teacher).item() == 5.0


def test_zero_exactly_at_equality_symmetric_and_of_degree_two():
    student, teacher = features(2, 3, 4, 5, seed=1), features(2, 3, 4, 5, seed=2)
    loss = fitnet_loss(student, teacher)
    assert fitnet_loss(teacher, teacher).item() == 0
    assert loss.item() > 0
    assert torch.equal(fitnet_loss(teacher, student), loss)
    torch.testing.assert_close(fitnet_loss(3 * student, 3 * teacher), 9 * loss)
    torch.testing.assert_close(fitnet_loss(student + 2, teacher + 2), loss)


def test_gradcheck():
    student, teacher = features(2, 3, 2, 2, seed=1).requires_grad_(), features(2, 3, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: fitnet_loss(x, teacher), (student,), raise_exception=True)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\) \(teacher\)"):
        fitnet_loss(features(2, 3, 4, 4), features(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("student_size", "teacher_size"), [((3, 4), (3, 4)), ((3, 4), (6, 8)), ((6, 8), (3, 4)), ((5, 4), (3, 7))]
)
@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_against_loops(student_size, teacher_size, resize):
    fitnet = FitNet(3, 5, loss_weight=2.0, target="raw", resize=resize).double()
    student, teacher = features(2, 3, *student_size, seed=1), features(2, 5, *teacher_size, seed=2)
    size = {
        "larger": tuple(max(pair) for pair in zip(student_size, teacher_size, strict=True)),
        "student": teacher_size,
        "teacher": student_size,
    }[resize]

    def onto(x):
        if x.shape[2:] == size:
            return x
        shrinks = any(new < old for new, old in zip(size, x.shape[2:], strict=True))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=shrinks)

    difference = onto(projected_by_loops(fitnet, student)) - onto(teacher)
    terms = fitnet({"map.-1": student}, {"map.-1": teacher})
    assert list(terms) == ["fitnet"]
    assert terms["fitnet"].item() == pytest.approx(2 * np.mean(difference.numpy() ** 2), rel=1e-9)


@pytest.mark.parametrize(("target", "axes", "eps"), [("standardize", (0, 2, 3), 0.0), ("layernorm", (1,), 1e-5)])
def test_normalised_targets(target, axes, eps):
    fitnet = FitNet(3, 5, target=target).double()
    student, teacher = features(2, 3, 4, 4, seed=1), features(2, 5, 4, 4, seed=2, scale=7.0) + 3
    values = teacher.numpy()
    goal = (values - values.mean(axes, keepdims=True)) / np.sqrt(values.var(axes, keepdims=True) + eps)
    expected = 10 * np.mean((projected_by_loops(fitnet, student).numpy() - goal) ** 2)
    assert fitnet({"map.-1": student}, {"map.-1": teacher})["fitnet"].item() == pytest.approx(expected, rel=1e-8)


def test_a_standardized_target_forgets_the_scale_of_each_channel():
    fitnet = FitNet(3, 2, target="standardize").double()
    student, teacher = {"map.-1": features(2, 3, 4, 4, seed=1)}, features(2, 2, 4, 4, seed=2)
    outlier = teacher * torch.tensor([1.0, 500.0]).view(2, 1, 1) + 40
    torch.testing.assert_close(
        fitnet(student, {"map.-1": outlier}), fitnet(student, {"map.-1": teacher}), rtol=1e-6, atol=0
    )


def test_student_and_projector_get_a_gradient_and_the_teacher_none():
    fitnet = FitNet(3, 5, target="standardize").double()
    student, teacher = features(2, 3, 4, 4, seed=1).requires_grad_(), features(2, 5, 2, 2, seed=2).requires_grad_()
    fitnet({"map.-1": student}, {"map.-1": teacher})["fitnet"].backward()
    assert (student.grad != 0).any()
    assert all((parameter.grad != 0).any() for parameter in fitnet.parameters())
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_half_precision_at_extreme_values(value, dtype):
    student = torch.full((1, 4, 3, 3), value, dtype=dtype, requires_grad=True)
    loss = fitnet_loss(student, -student.detach())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4 * value**2, rel=1e-2)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_constant_teacher(dtype, target):
    fitnet = FitNet(3, 5, target=target)
    student, teacher = torch.ones(1, 3, 1, 1, dtype=dtype), torch.full((1, 5, 2, 2), 1e4, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = fitnet({"map.-1": student}, {"map.-1": teacher})["fitnet"]
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in fitnet.parameters())


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="target must be"):
        FitNet(3, 3, target="whiten")({"map.-1": torch.rand(1, 3, 2, 2)}, {"map.-1": torch.rand(1, 3, 2, 2)})


def test_from_context_reads_both_dimensions(context):
    assert FitNet.from_context(context).align.projector.weight.shape == (12, 8, 1, 1)
    fitnet = FitNet.from_context(context, student_tap="map.0", teacher_tap="decoder", loss_weight=1.0)
    assert fitnet.align.projector.weight.shape == (24, 4, 1, 1)
    assert (fitnet.student_taps, fitnet.teacher_taps) == (("map.0",), ("decoder",))
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        FitNet.from_context(context, student_tap="map.3")
