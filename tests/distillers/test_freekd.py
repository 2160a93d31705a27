# SPDX-License-Identifier: Apache-2.0
"""FreeKD against loops over two-by-two squares, and the part of the run in which its masks are learned."""

import pytest
import torch

from kdlvfm.core import TapError
from kdlvfm.core.learned_masks import mask_diversity_loss
from kdlvfm.distillers import FreeKD, freekd_loss, haar_bands, haar_inverse


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def split(plane):
    """One channel's low band and its changes downwards, to the right and along the diagonal, as nested lists."""
    height, width = len(plane), len(plane[0])
    low, down, right, diagonal = [], [], [], []
    for i in range(0, height, 2):
        rows = ([], [], [], [])
        for j in range(0, width, 2):
            below, beside = min(i + 1, height - 1), min(j + 1, width - 1)
            a, b, c, d = plane[i][j], plane[i][beside], plane[below][j], plane[below][beside]
            for row, value in zip(rows, (a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d), strict=True):
                row.append(value / 2)
        for band, row in zip((low, down, right, diagonal), rows, strict=True):
            band.append(row)
    return low, (down, right, diagonal)


def transformed(plane, levels):
    """The low band, then the three directions of each level, from the coarsest on."""
    bands, low = [], plane
    for _ in range(levels):
        low, high = split(low)
        bands.insert(0, high)
    return [(low,), *bands]


def reference(student, teacher, masks):
    """One value of one band at a time."""
    total = 0.0
    batch, channels = student.shape[:2]
    for number, mask in enumerate(masks):
        values = []
        for b in range(batch):
            for c in range(channels):
                both = [transformed(x[b, c].tolist(), len(masks) - 1)[number] for x in (student, teacher)]
                for own, goal in zip(*both, strict=True):
                    distance = (torch.tensor(own).double() - torch.tensor(goal).double()).abs()
                    values += [] if mask is None else [(inside * distance).mean().item() for inside in mask[b]]
        total += sum(values) / max(len(values), 1)
    return total


def random_masks(x, levels, count, seed=0):
    grids = [band.shape[3:] for band in haar_bands(x, levels)]
    return [maps(len(x), count, *grid, seed=seed + i).sigmoid() for i, grid in enumerate(grids)]


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 16), (5, 7), (3, 4), (1, 1), (6, 1)])
def test_bands_against_loops_and_back(size, levels):
    x = maps(2, 3, *size)
    bands = haar_bands(x, levels)
    assert len(bands) == levels + 1
    for b, c in ((0, 0), (1, 2)):
        for band, expected in zip(bands, transformed(x[b, c].tolist(), levels), strict=True):
            torch.testing.assert_close(band[b, c], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(haar_inverse(bands, size), x)


def test_bands_keep_lengths_and_a_constant_has_none_but_the_low():
    x = maps(2, 3, 8, 16)
    torch.testing.assert_close(sum(band.square().sum() for band in haar_bands(x, 3)), x.square().sum())
    low, *high = haar_bands(torch.full((1, 2, 5, 7), 3.0), 3)
    assert (low == 24).all()
    assert all((band == 0).all() for band in high)


@pytest.mark.parametrize("size", [(8, 16), (5, 7), (1, 2)])
@pytest.mark.parametrize("low", [True, False])
def test_function_against_loops(size, low):
    student, teacher = maps(2, 3, *size, seed=1), maps(2, 3, *size, seed=2)
    masks = random_masks(student, 2, 4)
    if not low:
        masks[0] = None
    assert freekd_loss(student, teacher, masks).item() == pytest.approx(reference(student, teacher, masks), rel=1e-6)


def test_worked_example():
    """Changes of 2 downwards and 1 to the right, none along the diagonal, a low band of 5."""
    student, teacher = torch.zeros(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]]).view(1, 1, 2, 2)
    ones = torch.ones(1, 1, 1, 1)
    assert freekd_loss(student, teacher, [None, ones]).item() == pytest.approx((2 + 1 + 0) / 3)
    assert freekd_loss(student, teacher, [ones, ones]).item() == pytest.approx(5 + 1)
    assert freekd_loss(student, teacher, [ones, None]).item() == pytest.approx(5)
    halves = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    assert freekd_loss(student, teacher, [None, halves]).item() == pytest.approx(0.5)


def test_properties():
    student, teacher = maps(2, 3, 8, 8, seed=1), maps(2, 3, 8, 8, seed=2)
    masks = random_masks(student, 3, 4)
    loss = freekd_loss(student, teacher, masks)
    assert freekd_loss(teacher, teacher, masks).item() == 0
    torch.testing.assert_close(freekd_loss(teacher, student, masks), loss)
    torch.testing.assert_close(freekd_loss(-3 * student, -3 * teacher, masks), 3 * loss)
    torch.testing.assert_close(freekd_loss(student, teacher, [mask.flip(1) for mask in masks]), loss)
    high = [None, *masks[1:]]
    torch.testing.assert_close(freekd_loss(student + 5, teacher, high), freekd_loss(student, teacher, high))
    assert freekd_loss(student, teacher, high).item() < loss.item()


def test_what_no_mask_shows_gets_no_gradient():
    student, teacher = maps(1, 2, 4, 4, seed=1).requires_grad_(), maps(1, 2, 4, 4, seed=2).requires_grad_()
    mask = torch.tensor([[1.0, 0.0], [0.5, 0.0]], requires_grad=True).view(1, 1, 2, 2)
    freekd_loss(student, teacher, [None, mask]).backward()
    assert (student.grad[..., 2:] == 0).all()
    assert (student.grad[..., :2] != 0).any()
    assert teacher.grad is None


def test_gradcheck():
    student, teacher = maps(2, 2, 4, 3, seed=1).requires_grad_(), maps(2, 2, 4, 3, seed=2)
    masks = random_masks(teacher, 2, 3)
    assert torch.autograd.gradcheck(lambda x: freekd_loss(x, teacher, masks), (student,), raise_exception=True)


def test_wrong_input_is_refused():
    x = maps(2, 3, 8, 8)
    masks = random_masks(x, 1, 4)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) \(student\) and \(2, 3, 4, 4\) \(teacher\)"):
        freekd_loss(x, maps(2, 3, 4, 4), masks)
    with pytest.raises(ValueError, match=r"a mask \(2, 4, 8, 8\) does not fit its band, which needs \(2, 'T', 4, 4\)"):
        freekd_loss(x, x, [None, torch.ones(2, 4, 8, 8)])
    with pytest.raises(ValueError, match="every mask is None"):
        freekd_loss(x, x, [None, None])
    with pytest.raises(ValueError, match="levels must be at least 1, not 0"):
        freekd_loss(x, x, masks[:1])
    for wrong in ({"num_tokens": 0}, {"levels": 0}):
        with pytest.raises(ValueError, match="num_tokens and levels must be at least 1"):
            FreeKD(3, 4, 5, **wrong)
    with pytest.raises(ValueError, match="mask_share must be above 0 and at most 1, not 0"):
        FreeKD(3, 4, 5, mask_share=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_half_precision_at_extreme_values(value, dtype):
    student = torch.full((1, 4, 3, 3), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = freekd_loss(student, -student.detach(), [torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1), None])
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(8 * value, rel=1e-2)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("low", [False, True])
def test_class_against_the_function(low):
    torch.manual_seed(0)
    freekd = FreeKD(3, 4, 5, loss_weight=2.0, map_weight=3.0, levels=2, low=low, num_tokens=3).double()
    for i, prompt in enumerate(freekd.prompts):
        prompt.vectors.data = maps(3, 4, seed=10 + i)
    student, teacher = maps(2, 3, 6, 5, seed=1), maps(2, 4, 6, 5, seed=2, scale=6) + 1
    flat = teacher.transpose(0, 1).flatten(1)
    goal = (teacher - flat.mean(1).view(-1, 1, 1)) / flat.std(1, correction=0).view(-1, 1, 1)
    weight, bias = freekd.align.projector.weight.detach()[:, :, 0, 0], freekd.align.projector.bias.detach()
    projected = torch.einsum("oc,bchw->bohw", weight, student) + bias.view(-1, 1, 1)
    masks = [
        torch.einsum("tc,bchw->bthw", prompt.vectors.detach(), band.sum(2)).sigmoid()
        for prompt, band in zip(freekd.prompts, haar_bands(goal, 2), strict=True)
    ]
    if not low:
        masks[0] = None
    terms = freekd({"map.-1": student}, {"map.-1": teacher})
    assert list(terms) == ["freekd", "freekd_map"]
    assert terms["freekd"].item() == pytest.approx(2 * reference(projected, goal, masks), rel=1e-6)
    assert terms["freekd_map"].item() == pytest.approx(3 * (projected - goal).square().mean().item(), rel=1e-8)


def test_the_map_itself_can_be_left_out():
    freekd = FreeKD(3, 4, 5, map_weight=0.0)
    assert list(freekd({"map.-1": torch.rand(2, 3, 4, 4)}, {"map.-1": torch.rand(2, 4, 4, 4)})) == ["freekd"]


def test_distillation_moves_student_and_projector_and_no_mask():
    freekd = FreeKD(3, 4, 5, low=True)
    student, teacher = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 4, 8, 8, requires_grad=True)
    freekd({"map.-1": student}, {"map.-1": teacher})["freekd"].backward()
    groups = freekd.parameter_groups(torch.nn.Identity())
    assert (student.grad != 0).any()
    assert all((p.grad != 0).any() for p in groups["student"])
    assert len(groups["masks"]) == 4 + 2
    assert all(p.grad is None for p in groups["masks"])
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_autocast_with_a_constant_teacher(batch, dtype):
    freekd = FreeKD(3, 5, 4)
    student = torch.full((batch, 3, 4, 4), 10.0, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        terms = freekd({"map.-1": student}, {"map.-1": torch.full((batch, 5, 2, 2), -1e4, dtype=dtype)})
    sum(terms.values()).backward()
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert all(x.grad.isfinite().all() for x in (student, *freekd.align.parameters()))


@pytest.mark.parametrize("tap", ["map.-1", "decoder"])
def test_masks_are_learned_first_and_then_kept(context, make_step, teacher, tap):
    freekd = FreeKD.from_context(context, num_tokens=3, mask_share=0.5, teacher_tap=tap)
    assert (freekd.masked_task.head is None) == (tap == "decoder")
    teacher.model.calls.clear()
    masks, student = freekd.updates(make_step(progress=0.49))
    assert len(teacher.model.calls) == 1
    assert (masks.group, student.group) == ("masks", "student")
    assert list(masks.distillation) == ["mask_diversity"]
    assert list(student.distillation) == ["freekd", "freekd_map"]
    torch.stack(list(masks.terms.values())).sum().backward()
    groups = freekd.parameter_groups(context.student)
    assert all((p.grad != 0).any() for p in groups["masks"])
    assert all(p.grad is None for p in (*groups["student"], *teacher.model.parameters()))
    (kept,) = freekd.updates(make_step(progress=0.5))
    assert kept.group == "student"


def test_the_masks_see_the_task_through_the_map_put_together_again(context, make_step, teacher):
    freekd = FreeKD.from_context(context, num_tokens=3, levels=2, teacher_tap="decoder", diversity_weight=4.0)
    step = make_step()
    update, _ = freekd.updates(step)
    features = teacher(step.images, ("decoder",))["decoder"]
    masks = [
        prompt(band.sum(2))
        for prompt, band in zip(freekd.prompts, haar_bands(freekd.align.targets(features), 2), strict=True)
    ]
    maps_of_masks = [
        haar_inverse(
            [band * mask[:, None, None, t] for band, mask in zip(haar_bands(features, 2), masks, strict=True)], (6, 8)
        )
        for t in range(3)
    ]
    outputs = teacher.model.apply_head({"decoder": sum(maps_of_masks)}, (24, 32))
    expected = step.task.loss(None, outputs, step.target)["cross_entropy"]
    torch.testing.assert_close(update.terms["mask_cross_entropy"], expected)
    torch.testing.assert_close(update.terms["mask_diversity"], 4 * sum(mask_diversity_loss(mask) for mask in masks))


@pytest.mark.parametrize("options", [{"num_tokens": 1}, {"diversity_weight": 0.0}])
def test_diversity_that_means_nothing_is_left_out(context, make_step, options):
    update, _ = FreeKD.from_context(context, **options).updates(make_step())
    assert list(update.terms) == ["mask_cross_entropy"]


def test_from_context_reads_the_dimensions(context, detection_context):
    freekd = FreeKD.from_context(context)
    assert freekd.align.projector.weight.shape == (12, 8, 1, 1)
    assert [prompt.vectors.shape for prompt in freekd.prompts] == [(6, 12)] * 4
    assert freekd.masked_task.head.weight.shape == (5, 12, 1, 1)
    freekd = FreeKD.from_context(context, student_tap="map.0", teacher_tap="decoder", levels=1)
    assert [prompt.vectors.shape for prompt in freekd.prompts] == [(6, 24)] * 2
    assert (freekd.student_taps, freekd.teacher_taps) == (("map.0",), ("decoder",))
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        FreeKD.from_context(context, student_tap="map.3")
    with pytest.raises(ValueError, match="FreeKD learns masks with the loss of dense labels"):
        FreeKD.from_context(detection_context)
