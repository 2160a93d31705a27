# SPDX-License-Identifier: Apache-2.0
"""PKD against numpy's correlations and loops over channels, a worked example and the properties of the formula."""

import math
import statistics

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.core import TapError
from kdlvfm.distillers import PKD, pkd_loss


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(student, teacher):
    """Half the squared distance of standardised values, one channel at a time."""
    halves = []
    for c in range(student.shape[1]):
        pair = [x[:, c].flatten().tolist() for x in (student, teacher)]
        first, second = ([(v - statistics.mean(x)) / statistics.stdev(x) for v in x] for x in pair)
        halves.append(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first) / 2)
    return sum(halves) / len(halves)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 4, 5), (3, 2, 1, 7)])
def test_function_against_loops(shape):
    student, teacher = maps(*shape, seed=1), maps(*shape, seed=2, scale=9.0)
    assert pkd_loss(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-9)


def test_it_is_one_minus_the_correlation():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    correlations = [np.corrcoef(student[:, c].flatten(), teacher[:, c].flatten())[0, 1] for c in range(3)]
    assert pkd_loss(student, teacher).item() == pytest.approx(39 / 40 * (1 - np.mean(correlations)), rel=1e-9)


@pytest.mark.parametrize(("positions", "expected"), [(4, 1.5), (2, 1.0), (100, 1.98)])
def test_opposed_maps(positions, expected):
    x = maps(1, 3, 1, positions)
    assert pkd_loss(-x, x).item() == pytest.approx(expected, rel=1e-12)


def test_zero_at_equality_and_within_its_range_otherwise():
    teacher = maps(2, 3, 4, 5)
    assert pkd_loss(teacher, teacher).item() == 0
    for seed in range(10):
        assert 1e-3 < pkd_loss(maps(2, 3, 4, 5, seed=100 + seed), teacher).item() < 2


def test_a_positive_affine_change_of_a_channel_of_either_side_changes_nothing():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    scale, offset = torch.tensor([500.0, 1.0, 0.1]).view(3, 1, 1), torch.tensor([-40.0, 0.0, 3.0]).view(3, 1, 1)
    expected = pkd_loss(student, teacher)
    torch.testing.assert_close(pkd_loss(scale * student + offset, teacher), expected)
    torch.testing.assert_close(pkd_loss(student, scale * teacher + offset), expected)
    assert pkd_loss(-student, teacher).item() != pytest.approx(expected.item(), rel=1e-3)


def test_samples_positions_and_channels_may_be_permuted_jointly_only():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    expected = pkd_loss(student, teacher)
    torch.testing.assert_close(pkd_loss(student[:, [2, 0, 1]].flip(0, 3), teacher[:, [2, 0, 1]].flip(0, 3)), expected)
    assert pkd_loss(student.flip(3), teacher).item() != pytest.approx(expected.item(), rel=1e-3)


def test_gradcheck():
    student, teacher = maps(2, 3, 2, 2, seed=1).requires_grad_(), maps(2, 3, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: pkd_loss(x, teacher), (student,), raise_exception=True)


def test_the_gradient_is_orthogonal_to_what_does_not_matter():
    student, teacher = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 3, 4, 5, seed=2).requires_grad_()
    pkd_loss(student, teacher).backward()
    assert teacher.grad is None
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(student.grad.sum((0, 2, 3)), zero)
    torch.testing.assert_close((student.grad * student.detach()).sum((0, 2, 3)), zero)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spike", [0.0, 1e4])
@pytest.mark.parametrize("size", [1, 3])
def test_half_precision_at_extreme_values(size, spike, batch, dtype):
    """A constant student, and a teacher that is constant or has one outlier position in each channel."""
    pkd = PKD(2, 2)
    student, teacher = (torch.full((batch, 2, size, size), 1e4, dtype=dtype) for _ in range(2))
    teacher[:, :, 0, 0] -= 2 * spike
    student.requires_grad_()
    loss = pkd({"map.-1": student}, {"map.-1": teacher})["pkd"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_before_any_arithmetic(dtype):
    student, teacher = maps(2, 3, 4, 5, seed=1).to(dtype), maps(2, 3, 4, 5, seed=2).to(dtype)
    torch.testing.assert_close(pkd_loss(student, teacher), pkd_loss(student.double(), teacher.double()).float())


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 5, 4, 4\) \(teacher\)"):
        pkd_loss(maps(2, 3, 4, 4), maps(2, 5, 4, 4))


@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_on_maps_of_other_channels_and_size(resize):
    pkd = PKD(3, 5, loss_weight=2.0, resize=resize, student_tap="map.0", teacher_tap="map.1").double()
    student, teacher = maps(2, 3, 6, 4, seed=1), maps(2, 5, 3, 8, seed=2)
    projected = torch.einsum("oc,bchw->bohw", pkd.align.projector.weight[:, :, 0, 0].detach(), student)
    size = {"larger": (6, 8), "student": (3, 8), "teacher": (6, 4)}[resize]
    pair = []
    for x in (projected, teacher):
        if x.shape[2:] != size:
            shrinks = any(new < old for new, old in zip(size, x.shape[2:], strict=True))
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
        pair.append(x)
    terms = pkd({"map.0": student}, {"map.1": teacher})
    assert list(terms) == ["pkd"]
    assert terms["pkd"].item() == pytest.approx(2 * reference(*pair), rel=1e-9)


def test_student_and_projector_get_a_gradient_and_the_teacher_none():
    pkd = PKD(3, 5).double()
    student, teacher = maps(2, 3, 4, 4, seed=1).requires_grad_(), maps(2, 5, 2, 2, seed=2).requires_grad_()
    pkd({"map.-1": student}, {"map.-1": teacher})["pkd"].backward()
    assert (student.grad != 0).any()
    assert (pkd.align.projector.weight.grad != 0).any()
    assert teacher.grad is None


def test_gathered_statistics_are_those_of_the_whole_batch(monkeypatch):
    """One process with half the batch, which is handed the other half."""
    student, teacher = maps(4, 3, 4, 4, seed=1), maps(4, 3, 4, 4, seed=2)
    rest = {student[:2].sum().item(): student[2:], teacher[:2].sum().item(): teacher[2:]}
    monkeypatch.setattr("kdlvfm.distillers.pkd.gather_batch", lambda x: torch.cat([x, rest[x.sum().item()]]))
    half = {"map.-1": student[:2]}, {"map.-1": teacher[:2]}
    whole = 6 * pkd_loss(student, teacher)
    torch.testing.assert_close(PKD(3, 3, gather=True)(*half)["pkd"], whole)
    assert not math.isclose(PKD(3, 3)(*half)["pkd"].item(), whole.item(), rel_tol=1e-3)


def test_a_projector_is_built_only_where_channels_differ():
    assert list(PKD(5, 5).parameters()) == []
    assert isinstance(PKD(3, 5).align.projector, nn.Conv2d)


def test_from_context_reads_both_dimensions(context):
    assert PKD.from_context(context).align.projector.weight.shape == (12, 8, 1, 1)
    pkd = PKD.from_context(context, student_tap="map.0", teacher_tap="decoder", loss_weight=1.0)
    assert pkd.align.projector.weight.shape == (24, 4, 1, 1)
    assert (pkd.student_taps, pkd.teacher_taps) == (("map.0",), ("decoder",))
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        PKD.from_context(context, student_tap="map.3")
