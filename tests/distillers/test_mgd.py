# SPDX-License-Identifier: Apache-2.0
"""MGD against loops and convolutions written out, the masks that it draws and the networks that it trains."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.core import TapError
from kdlvfm.distillers import MGD, mgd_loss
from kdlvfm.distillers.mgd import random_mask


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(generated, teacher):
    """One element at a time."""
    pairs = zip(generated.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) / len(generated)


def convolved(x, conv):
    """A 3x3 convolution with zero padding as nine shifted matrix products."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[2:]
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    shifted = [
        np.einsum("oc,bchw->bohw", weight[:, :, i, j], padded[:, :, i : i + height, j : j + width])
        for i in range(3)
        for j in range(3)
    ]
    return sum(shifted) + bias[:, None, None]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (3, 7, 1, 2)])
def test_function_against_loops(shape):
    generated, teacher = maps(*shape, seed=1), maps(*shape, seed=2)
    assert mgd_loss(generated, teacher).item() == pytest.approx(reference(generated, teacher), rel=1e-12)


def test_zero_exactly_at_equality_symmetric_and_growing_with_the_map():
    generated, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    loss = mgd_loss(generated, teacher)
    assert mgd_loss(teacher, teacher).item() == 0
    assert torch.equal(mgd_loss(teacher, generated), loss)
    torch.testing.assert_close(mgd_loss(generated.repeat(1, 1, 1, 2), teacher.repeat(1, 1, 1, 2)), 2 * loss)
    torch.testing.assert_close(mgd_loss(generated.repeat(3, 1, 1, 1), teacher.repeat(3, 1, 1, 1)), loss)


def test_gradcheck():
    generated, teacher = maps(2, 3, 2, 2, seed=1).requires_grad_(), maps(2, 3, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: mgd_loss(x, teacher), (generated,), raise_exception=True)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(generated\) and \(2, 3, 8, 8\) \(teacher\)"):
        mgd_loss(maps(2, 3, 4, 4), maps(2, 3, 8, 8))


@pytest.mark.parametrize(("unit", "shape"), [("position", (8, 1, 50, 60)), ("channel", (8, 400, 1, 1))])
@pytest.mark.parametrize("drop_ratio", [0.0, 0.15, 0.75])
def test_a_mask_drops_the_share_asked_for_and_differs_between_samples(unit, shape, drop_ratio):
    torch.manual_seed(0)
    mask = random_mask(torch.empty(8, 400, 50, 60, dtype=torch.bfloat16), drop_ratio, unit)
    assert mask.shape == shape
    assert mask.dtype == torch.bfloat16
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert 1 - mask.float().mean().item() == pytest.approx(drop_ratio, abs=0.02)
    assert torch.equal(mask[0], mask[1]) == (drop_ratio == 0)


def test_masks_follow_the_seed():
    x = maps(2, 3, 8, 8)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(random_mask(x, 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_worked_example(monkeypatch):
    """An identity for a generator, the student equal to the teacher, and one position of value 3 masked: 9."""
    mgd = MGD(1, 1, loss_weight=1.0, target="raw")
    mgd.generator = nn.Identity()
    x = torch.tensor([[3.0, 1.0], [2.0, 5.0]]).view(1, 1, 2, 2)
    mask = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    monkeypatch.setattr("kdlvfm.distillers.mgd.random_mask", lambda *_: mask)
    assert mgd({"map.-1": x}, {"map.-1": x})["mgd"].item() == 9.0


@pytest.mark.parametrize("unit", ["position", "channel"])
def test_class_against_convolutions_written_out(unit):
    mgd = MGD(3, 5, loss_weight=2.0, drop_ratio=0.5, unit=unit, target="raw").double()
    student, teacher = maps(2, 3, 4, 6, seed=1), maps(2, 5, 4, 6, seed=2)
    torch.manual_seed(7)
    terms = mgd({"map.-1": student}, {"map.-1": teacher})
    torch.manual_seed(7)
    mask = (torch.rand((2, 1, 4, 6) if unit == "position" else (2, 5, 1, 1)) >= 0.5).numpy()
    weight, bias = mgd.align.projector.weight.detach()[:, :, 0, 0].numpy(), mgd.align.projector.bias.detach().numpy()
    projected = np.einsum("oc,bchw->bohw", weight, student.numpy()) + bias[:, None, None]
    hidden = np.maximum(convolved(projected * mask, mgd.generator[0]), 0)
    generated = torch.from_numpy(convolved(hidden, mgd.generator[2]))
    assert 0 < mask.mean() < 1
    assert list(terms) == ["mgd"]
    assert terms["mgd"].item() == pytest.approx(2 * reference(generated, teacher), rel=1e-9)


def test_what_is_masked_gets_exactly_no_gradient():
    mgd = MGD(3, 5, drop_ratio=0.75).double()
    student, teacher = maps(2, 3, 8, 8, seed=1).requires_grad_(), maps(2, 5, 8, 8, seed=2)
    torch.manual_seed(7)
    mgd({"map.-1": student}, {"map.-1": teacher})["mgd"].backward()
    torch.manual_seed(7)
    kept = (torch.rand(2, 1, 8, 8) >= 0.75).expand(2, 3, 8, 8)
    assert (student.grad[~kept] == 0).all()
    assert (student.grad[kept] != 0).all()


def test_without_a_mask_it_is_plain_generation():
    mgd = MGD(5, 5, drop_ratio=0.0, target="raw").double()
    student, teacher = maps(2, 5, 4, 4, seed=1), maps(2, 5, 4, 4, seed=2)
    expected = 2e-5 * mgd_loss(mgd.generator(student), teacher)
    torch.testing.assert_close(mgd({"map.-1": student}, {"map.-1": teacher})["mgd"], expected)


@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_maps_of_two_sizes_meet_before_the_mask(resize):
    mgd = MGD(5, 5, drop_ratio=0.5, resize=resize, target="raw", loss_weight=1.0).double()
    mgd.generator = nn.Identity()
    student, teacher = maps(2, 5, 6, 4, seed=1), maps(2, 5, 3, 8, seed=2)
    torch.manual_seed(7)
    terms = mgd({"map.-1": student}, {"map.-1": teacher})
    size = {"larger": (6, 8), "student": (3, 8), "teacher": (6, 4)}[resize]
    pair = []
    for x in (student, teacher):
        if x.shape[2:] != size:
            shrinks = any(new < old for new, old in zip(size, x.shape[2:], strict=True))
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
        pair.append(x)
    torch.manual_seed(7)
    masked = pair[0] * (torch.rand(2, 1, *size) >= 0.5)
    assert terms["mgd"].item() == pytest.approx(reference(masked, pair[1]), rel=1e-9)


def test_the_teacher_is_standardised_unless_told_otherwise():
    mgd = MGD(3, 2).double()
    student, teacher = {"map.-1": maps(2, 3, 4, 4, seed=1)}, maps(2, 2, 4, 4, seed=2)
    outlier = teacher * torch.tensor([1.0, 500.0]).view(2, 1, 1) + 40
    losses = []
    for goal in (teacher, outlier):
        torch.manual_seed(7)
        losses.append(mgd(student, {"map.-1": goal})["mgd"])
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_student_and_networks_get_a_gradient_and_the_teacher_none():
    mgd = MGD(3, 5).double()
    student, teacher = maps(2, 3, 4, 4, seed=1).requires_grad_(), maps(2, 5, 2, 2, seed=2).requires_grad_()
    mgd({"map.-1": student}, {"map.-1": teacher})["mgd"].backward()
    assert (student.grad != 0).any()
    assert all((parameter.grad != 0).any() for parameter in mgd.parameters())
    assert teacher.grad is None


@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_autocast_at_extreme_values(batch, dtype, target):
    mgd = MGD(3, 5, target=target, resize="student")
    student = torch.full((batch, 3, 4, 4), 1e4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = mgd({"map.-1": student}, {"map.-1": torch.full((batch, 5, 2, 2), -1e4, dtype=dtype)})["mgd"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in (student, *mgd.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_before_any_arithmetic(dtype):
    generated = torch.full((2, 4, 3, 3), 1e4, dtype=dtype)
    loss = mgd_loss(generated, -generated)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(36 * (2 * generated[0, 0, 0, 0].item()) ** 2, rel=1e-6)


def test_wrong_choices_are_refused():
    for drop_ratio in (-0.1, 1.0, 75):
        with pytest.raises(ValueError, match="drop_ratio must be at least 0 and below 1"):
            MGD(3, 5, drop_ratio=drop_ratio)
    with pytest.raises(ValueError, match="unit must be 'position' or 'channel', not 'patch'"):
        random_mask(maps(1, 2, 3, 3), 0.5, "patch")


def test_a_projector_is_built_only_where_channels_differ():
    assert isinstance(MGD(5, 5).align.projector, nn.Identity)
    assert MGD(3, 5).align.projector.bias is not None


def test_from_context_reads_both_dimensions(context):
    mgd = MGD.from_context(context)
    assert mgd.align.projector.weight.shape == (12, 8, 1, 1)
    assert [layer.weight.shape for layer in mgd.generator[::2]] == [(12, 12, 3, 3)] * 2
    mgd = MGD.from_context(context, student_tap="map.0", teacher_tap="decoder", loss_weight=1.0)
    assert mgd.align.projector.weight.shape == (24, 4, 1, 1)
    assert (mgd.student_taps, mgd.teacher_taps) == (("map.0",), ("decoder",))
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        MGD.from_context(context, student_tap="map.3")
