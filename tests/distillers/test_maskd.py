# SPDX-License-Identifier: Apache-2.0
"""MasKD against loops, and the part of the run in which its masks are learned."""

import math

import pytest
import torch

from kdlvfm.core import TapError
from kdlvfm.core.learned_masks import mask_diversity_loss
from kdlvfm.distillers import MasKD, maskd_loss


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(student, teacher, masks, weights=None):
    """One mask of one channel of one sample at a time."""
    batch, channels = student.shape[:2]
    count, total = masks.shape[1], 0.0
    for b in range(batch):
        for t in range(count):
            inside = masks[b, t].flatten().tolist()
            share = 1 / count if weights is None else weights[b, t].item()
            for c in range(channels):
                difference = (student[b, c] - teacher[b, c]).flatten().tolist()
                squares = sum((m * d) ** 2 for m, d in zip(inside, difference, strict=True))
                total += share * squares / sum(inside) / channels
    return total / batch


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 4, 5, 6), (3, 4, 2, 3, 1)])
def test_function_against_loops(shape, weighted):
    batch, channels, height, width, count = shape
    student, teacher = maps(batch, channels, height, width, seed=1), maps(batch, channels, height, width, seed=2)
    masks = maps(batch, count, height, width, seed=3).sigmoid()
    weights = maps(batch, count, seed=4).softmax(1) if weighted else None
    expected = reference(student, teacher, masks, weights)
    assert maskd_loss(student, teacher, masks, weights).item() == pytest.approx(expected, rel=1e-12)


def test_worked_example():
    student = torch.zeros(1, 1, 1, 2)
    teacher = torch.tensor([3.0, 1.0]).view(1, 1, 1, 2)
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    masks = torch.stack([left, right]).view(1, 2, 1, 2)
    assert maskd_loss(student, teacher, masks[:, :1]).item() == 9
    assert maskd_loss(student, teacher, masks).item() == 5
    assert maskd_loss(student, teacher, masks, torch.tensor([[0.25, 0.75]])).item() == 3


def test_properties():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    masks = maps(2, 4, 4, 5, seed=3).sigmoid()
    loss = maskd_loss(student, teacher, masks)
    assert maskd_loss(teacher, teacher, masks).item() == 0
    torch.testing.assert_close(maskd_loss(3 * student, 3 * teacher, masks), 9 * loss)
    torch.testing.assert_close(maskd_loss(student, teacher, masks.flip(1)), loss)
    uniform = torch.full((2, 4), 0.25, dtype=torch.float64)
    torch.testing.assert_close(maskd_loss(student, teacher, masks, uniform), loss)
    ones = torch.ones_like(masks)
    torch.testing.assert_close(maskd_loss(student, teacher, ones), (student - teacher).square().mean())
    torch.testing.assert_close(maskd_loss(student, teacher, ones / 2), (student - teacher).square().mean() / 2)


def test_what_no_mask_shows_gets_no_gradient():
    student, teacher = maps(1, 2, 2, 2, seed=1).requires_grad_(), maps(1, 2, 2, 2, seed=2).requires_grad_()
    masks = torch.tensor([[1.0, 0.5], [0.0, 1.0]]).view(1, 1, 2, 2).requires_grad_()
    maskd_loss(student, teacher, masks).backward()
    assert (student.grad[0, :, 1, 0] == 0).all()
    assert (student.grad != 0).sum().item() == 6
    assert teacher.grad is None
    assert masks.grad is None


def test_gradcheck():
    student, teacher = maps(2, 3, 2, 2, seed=1).requires_grad_(), maps(2, 3, 2, 2, seed=2)
    masks, weights = maps(2, 4, 2, 2, seed=3).sigmoid(), maps(2, 4, seed=4).softmax(1)
    assert torch.autograd.gradcheck(lambda x: maskd_loss(x, teacher, masks, weights), (student,), raise_exception=True)


def test_wrong_input_is_refused():
    x, masks = maps(2, 3, 4, 4), torch.ones(2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\) \(teacher\)"):
        maskd_loss(x, maps(2, 3, 8, 8), masks)
    for wrong in (masks[:1], masks[..., :3], masks[:, 0]):
        with pytest.raises(ValueError, match=r"masks .* do not fit maps"):
            maskd_loss(x, x, wrong)
    with pytest.raises(ValueError, match=r"weights \(2, 4\) do not fit masks \(2, 5, 4, 4\)"):
        maskd_loss(x, x, masks, torch.ones(2, 4))
    with pytest.raises(ValueError, match="num_tokens must be at least 1, not 0"):
        MasKD(3, 4, 5, num_tokens=0)
    for share in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="mask_share must be above 0 and at most 1"):
            MasKD(3, 4, 5, mask_share=share)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [0.0, 1e-7, 1.0])
def test_half_precision_at_extreme_values(mask, dtype):
    student = torch.full((1, 4, 3, 3), 1e4, dtype=dtype, requires_grad=True)
    loss = maskd_loss(student, -student.detach(), torch.full((1, 2, 3, 3), mask))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("customised", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_class_against_the_reference(weighted, customised):
    torch.manual_seed(0)
    maskd = MasKD(3, 4, 5, loss_weight=2.0, num_tokens=3, weighted=weighted, customised=customised).double()
    maskd.tokens.vectors.data = maps(3, 4, seed=5)
    student, teacher = maps(2, 3, 4, 6, seed=1), maps(2, 4, 4, 6, seed=2, scale=6) + 1
    flat = teacher.transpose(0, 1).flatten(1)
    goal = (teacher - flat.mean(1).view(-1, 1, 1)) / flat.std(1, correction=0).view(-1, 1, 1)
    weight, bias = maskd.align.projector.weight.detach()[:, :, 0, 0], maskd.align.projector.bias.detach()
    projected = torch.einsum("oc,bchw->bohw", weight, student) + bias.view(-1, 1, 1)
    masks = torch.einsum("tc,bchw->bthw", maskd.tokens.vectors.detach(), goal).sigmoid()
    if customised:
        masks = masks * torch.einsum("tc,bchw->bthw", maskd.tokens.vectors.detach(), projected).sigmoid()
    weights = None
    if weighted:
        pooled = maskd.weigher[0](goal).mean((2, 3), keepdim=True)
        weights = maskd.weigher[2](pooled).flatten(1).softmax(1)
    terms = maskd({"map.-1": student}, {"map.-1": teacher})
    assert list(terms) == ["maskd"]
    assert terms["maskd"].item() == pytest.approx(2 * reference(projected, goal, masks, weights), rel=1e-8)


def test_distillation_moves_student_and_projector_and_no_mask():
    maskd = MasKD(3, 4, 5, weighted=True, customised=True)
    student, teacher = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 4, 2, 2, requires_grad=True)
    maskd({"map.-1": student}, {"map.-1": teacher})["maskd"].backward()
    groups = maskd.parameter_groups(torch.nn.Identity())
    assert (student.grad != 0).any()
    assert all((p.grad != 0).any() for p in groups["student"])
    assert len(groups["masks"]) == 1 + 2 + 4
    assert all(p.grad is None for p in groups["masks"])
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_autocast_with_a_constant_teacher(batch, dtype):
    maskd = MasKD(3, 5, 4, weighted=True, customised=True)
    student = torch.full((batch, 3, 4, 4), 10.0, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = maskd({"map.-1": student}, {"map.-1": torch.full((batch, 5, 2, 2), -1e4, dtype=dtype)})["maskd"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in (student, *maskd.align.parameters()))


@pytest.mark.parametrize("tap", ["map.-1", "decoder"])
def test_masks_are_learned_first_and_then_kept(context, make_step, teacher, tap):
    maskd = MasKD.from_context(context, num_tokens=3, mask_share=0.5, teacher_tap=tap, weighted=True)
    assert (maskd.masked_task.head is None) == (tap == "decoder")
    teacher.model.calls.clear()
    masks, student = maskd.updates(make_step(progress=0.49))
    assert len(teacher.model.calls) == 1
    assert (masks.group, student.group) == ("masks", "student")
    assert list(masks.terms) == ["mask_cross_entropy", "mask_diversity"]
    assert list(masks.distillation) == ["mask_diversity"]
    assert list(student.distillation) == ["maskd"]
    torch.stack(list(masks.terms.values())).sum().backward()
    groups = maskd.parameter_groups(context.student)
    assert all((p.grad != 0).any() for p in groups["masks"])
    assert all(p.grad is None for p in (*groups["student"], *teacher.model.parameters()))
    (kept,) = maskd.updates(make_step(progress=0.5))
    assert kept.group == "student"


def test_the_masks_see_the_task_through_the_sum_of_what_they_show(context, make_step, teacher):
    maskd = MasKD.from_context(context, num_tokens=3, teacher_tap="decoder", weighted=True, diversity_weight=4.0)
    step = make_step()
    update, _ = maskd.updates(step)
    features = teacher(step.images, ("decoder",))["decoder"]
    goal = maskd.align.targets(features)
    masks, weights = maskd.tokens(goal), maskd.weigher(goal).softmax(1)
    masked = sum(weights[:, t, None, None, None] * masks[:, t : t + 1] * features for t in range(3))
    outputs = teacher.model.apply_head({"decoder": masked}, (24, 32))
    expected = step.task.loss(None, outputs, step.target)["cross_entropy"]
    torch.testing.assert_close(update.terms["mask_cross_entropy"], expected)
    torch.testing.assert_close(update.terms["mask_diversity"], 4 * mask_diversity_loss(masks))


@pytest.mark.parametrize("options", [{"num_tokens": 1}, {"diversity_weight": 0.0}])
def test_diversity_that_means_nothing_is_left_out(context, make_step, options):
    update, _ = MasKD.from_context(context, **options).updates(make_step())
    assert list(update.terms) == ["mask_cross_entropy"]


def test_learning_lowers_both_terms_of_the_masks(context, make_step):
    torch.manual_seed(0)
    maskd = MasKD.from_context(context, num_tokens=4)
    optimizer = torch.optim.Adam(maskd.parameter_groups(context.student)["masks"], lr=0.05)
    seen = []
    for _ in range(30):
        update = next(maskd.updates(make_step()))
        optimizer.zero_grad()
        torch.stack(list(update.terms.values())).sum().backward()
        optimizer.step()
        seen.append([term.item() for term in update.terms.values()])
    assert all(last < first - 0.05 for first, last in zip(seen[0], seen[-1], strict=True))


def test_a_run_that_is_resumed_between_its_phases_is_the_same_run(context, make_step):
    def build():
        torch.manual_seed(0)
        maskd = MasKD.from_context(context, mask_share=0.5)
        return maskd, {name: torch.optim.SGD(group, lr=0.1) for name, group in groups_of(maskd).items()}

    def groups_of(maskd):
        return {"masks": maskd.parameter_groups(context.student)["masks"], "student": list(maskd.align.parameters())}

    def train(maskd, optimizers, steps):
        for number in steps:
            for update in maskd.updates(make_step(progress=number / 4, number=number)):
                optimizers[update.group].zero_grad()
                torch.stack(list(update.terms.values())).sum().backward()
                optimizers[update.group].step()

    context.student.eval()
    whole, optimizers = build()
    train(whole, optimizers, range(4))
    for stop in (1, 2, 3):
        first, optimizers = build()
        train(first, optimizers, range(stop))
        second, optimizers = build()
        second.load_state_dict(first.state_dict())
        train(second, optimizers, range(stop, 4))
        assert all(torch.equal(whole.state_dict()[key], value) for key, value in second.state_dict().items())
    assert math.isfinite(whole.tokens.vectors.sum().item())


def test_from_context_reads_the_dimensions(context):
    maskd = MasKD.from_context(context)
    assert maskd.align.projector.weight.shape == (12, 8, 1, 1)
    assert maskd.tokens.vectors.shape == (8, 12)
    assert maskd.masked_task.head.weight.shape == (5, 12, 1, 1)
    maskd = MasKD.from_context(context, student_tap="map.0", teacher_tap="decoder", num_tokens=2)
    assert maskd.tokens.vectors.shape == (2, 24)
    assert (maskd.student_taps, maskd.teacher_taps) == (("map.0",), ("decoder",))
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        MasKD.from_context(context, student_tap="map.3")
