# SPDX-License-Identifier: Apache-2.0
"""Receptive tokens and their overlap against loops, and the task's loss on masked maps through either head."""

import math

import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import Context, TapError, Teacher
from kdlvfm.core.learned_masks import MaskedTask, ReceptiveTokens, mask_diversity_loss
from kdlvfm.distillers import MasKD


def maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dice(masks):
    """One pair of one image at a time."""
    coefficients = []
    for image in masks.flatten(2).tolist():
        for t, first in enumerate(image):
            for u, second in enumerate(image):
                if t != u:
                    overlap = sum(a * b for a, b in zip(first, second, strict=True))
                    coefficients.append(2 * overlap / (sum(a * a for a in first) + sum(b * b for b in second)))
    return sum(coefficients) / len(coefficients)


def test_tokens_against_loops():
    tokens = ReceptiveTokens(3, 5).double()
    tokens.vectors.data = maps(3, 5, seed=1)
    x = maps(2, 5, 4, 6)
    masks = tokens(x)
    assert masks.shape == (2, 3, 4, 6)
    for b, t, i, j in ((0, 0, 0, 0), (1, 2, 3, 5), (1, 0, 2, 4)):
        product = sum((tokens.vectors[t] * x[b, :, i, j]).tolist())
        assert masks[b, t, i, j].item() == pytest.approx(1 / (1 + math.exp(-product)), rel=1e-12)


def test_tokens_begin_near_one_half():
    torch.manual_seed(0)
    masks = ReceptiveTokens(4, 64)(torch.randn(2, 64, 8, 8))
    assert (masks - 0.5).abs().max().item() < 0.2


def test_tokens_in_half_precision():
    tokens = ReceptiveTokens(2, 3)
    x = torch.full((1, 3, 2, 2), 1e4, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = tokens(x)
    masks.sum().backward()
    assert masks.dtype == torch.float32
    assert masks.isfinite().all()
    assert tokens.vectors.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 3, 4, 5), (3, 6, 2, 2)])
def test_diversity_against_loops(shape):
    masks = maps(*shape).sigmoid()
    assert mask_diversity_loss(masks).item() == pytest.approx(dice(masks), rel=1e-12)


def test_diversity_of_equal_disjoint_and_nested_masks():
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    part = torch.tensor([1.0, 0.0, 0.0, 0.0])
    pairs = {(mask, mask): 1.0, (mask, 1 - mask): 0.0, (mask, part): 2 / 3}
    for (first, second), expected in pairs.items():
        masks = torch.stack([first, second]).view(1, 2, 2, 2)
        assert mask_diversity_loss(masks).item() == pytest.approx(expected)
        assert mask_diversity_loss(masks.flip(1)).item() == pytest.approx(expected)


def test_diversity_of_empty_masks_is_finite():
    masks = torch.zeros(1, 3, 2, 2, requires_grad=True)
    loss = mask_diversity_loss(masks)
    loss.backward()
    assert loss.item() == 0
    assert masks.grad.isfinite().all()


def test_diversity_gradcheck():
    masks = maps(2, 3, 2, 2).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(mask_diversity_loss, (masks,), raise_exception=True)


def test_one_mask_has_no_diversity():
    with pytest.raises(ValueError, match="at least 2 masks, not 1"):
        mask_diversity_loss(torch.rand(1, 1, 2, 2))


def test_loss_through_a_head_of_its_own(make_step):
    torch.manual_seed(0)
    masked_task = MaskedTask("map.-1", 12, num_classes=5)
    step, masked = make_step(), torch.randn(4, 12, 6, 8)
    logits = F.interpolate(masked_task.head(masked), (24, 32), mode="bilinear", align_corners=False)
    known = step.target.where(step.target >= 0, 255)
    expected = F.cross_entropy(logits, known, ignore_index=255)
    terms = masked_task(step, masked)
    assert list(terms) == ["mask_cross_entropy"]
    torch.testing.assert_close(terms["mask_cross_entropy"], expected)
    features, targets = torch.ones(1), torch.zeros(1)
    assert masked_task.shown(features, targets) is targets


def test_loss_through_the_head_of_the_teacher(make_step, teacher):
    masked_task = MaskedTask("decoder", 24, num_classes=None)
    step = make_step()
    features = teacher(step.images, ("decoder", "logits"))
    known = step.target.where(step.target >= 0, 255)
    shown = masked_task.shown(features["decoder"], torch.zeros(1)).requires_grad_()
    (loss,) = masked_task(step, shown).values()
    torch.testing.assert_close(loss, F.cross_entropy(features["logits"], known, ignore_index=255))
    loss.backward()
    assert (shown.grad != 0).any()
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert not list(masked_task.parameters())
    with pytest.raises(ValueError, match="this step has no teacher"):
        masked_task(make_step(teacher=None), shown)


def test_loss_through_the_head_of_a_teacher_in_half_precision(make_step, teacher):
    teacher.bfloat16()
    (loss,) = MaskedTask("decoder", 24, num_classes=None)(make_step(), torch.rand(4, 24, 6, 8)).values()
    assert loss.isfinite()


def test_whose_head_it_is_follows_from_the_run(context, toy_model, student, task, detection_context):
    assert MaskedTask.arguments(context, MasKD, {}) == {"student_dim": 8, "teacher_dim": 12, "num_classes": 5}
    assert MaskedTask.arguments(context, MasKD, {"teacher_tap": "decoder"})["num_classes"] is None
    assert MaskedTask.arguments(context, MasKD, {"num_classes": 7, "student_dim": 3}) == {"teacher_dim": 12}
    headless = Context(student, Teacher(toy_model(num_classes=0)), task, num_classes=5, num_samples=12)
    assert MaskedTask.arguments(headless, MasKD, {"teacher_tap": "decoder"})["num_classes"] == 5
    by_hook = {"teacher_tap": "module:stages.0", "teacher_dim": 7}
    assert MaskedTask.arguments(context, MasKD, by_hook)["num_classes"] == 5
    with pytest.raises(TapError, match=r"no tap .map\.9"):
        MaskedTask.arguments(context, MasKD, {"teacher_tap": "map.9"})
    with pytest.raises(
        ValueError, match="MasKD learns masks with the loss of dense labels, and the task learns from box"
    ):
        MaskedTask.arguments(detection_context, MasKD, {})
