# SPDX-License-Identifier: Apache-2.0
"""FGD against loops in plain Python, the masks of boxes, and the global term written out."""

import math

import numpy as np
import pytest
import torch

from kdlvfm.core import Context, TapError
from kdlvfm.distillers import FGD, fgd_loss, fgd_masks
from kdlvfm.distillers.fgd import GcBlock

SIZE = torch.tensor([24, 32])


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def target(*images, size=SIZE):
    return [{"boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), "size": size} for boxes in images]


def cells(box, height, width, stride):
    """Cells that share some area with a box."""
    left, top, right, bottom = box
    return [
        (i, j)
        for i in range(height)
        for j in range(width)
        if min(bottom, (i + 1) * stride[0]) > max(top, i * stride[0])
        and min(right, (j + 1) * stride[1]) > max(left, j * stride[1])
    ]


def masks_reference(images, sizes, height, width, stride):
    foreground, background = np.zeros((2, len(images), height, width))
    for b, (boxes, size) in enumerate(zip(images, sizes, strict=True)):
        for box in boxes:
            covered = cells(box, height, width, stride)
            for cell in covered:
                foreground[b][cell] = max(foreground[b][cell], 1 / len(covered))
        for i in range(height):
            for j in range(width):
                middle = ((i + 0.5) * stride[0], (j + 0.5) * stride[1])
                background[b, i, j] = foreground[b, i, j] == 0 and middle[0] < size[0] and middle[1] < size[1]
        background[b] /= max(background[b].sum(), 1)
    return foreground, background


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def attention(x, temperature):
    """Of one map (C, H, W): to positions, row by row, and to channels."""
    channels, height, width = x.shape
    flat = np.abs(x.reshape(channels, -1))
    positions = softmax([sum(flat[:, i]) / channels / temperature for i in range(height * width)])
    strengths = softmax([sum(flat[c]) / (height * width) / temperature for c in range(channels)])
    return [height * width * value for value in positions], [channels * value for value in strengths]


def reference(student, teacher, foreground, background, temperature=0.5, weights=(1e-3, 5e-4, 1e-3)):
    total = 0.0
    for s, t, front, back in zip(*(x.numpy() for x in (student, teacher, foreground, background)), strict=True):
        (own_positions, own_channels), (positions, channels) = attention(s, temperature), attention(t, temperature)
        for c in range(len(s)):
            for i, (a, b) in enumerate(zip(s[c].flatten(), t[c].flatten(), strict=True)):
                share = weights[0] * front.flatten()[i] + weights[1] * back.flatten()[i]
                total += share * positions[i] * channels[c] * (a - b) ** 2
        for mine, theirs in ((own_positions, positions), (own_channels, channels)):
            total += weights[2] * sum(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    return total / len(student)


@pytest.mark.parametrize(("size", "stride"), [((6, 8), (4.0, 4.0)), ((3, 4), (8.0, 8.0)), ((5, 4), (4.8, 8.0))])
def test_masks_against_loops(size, stride):
    images = ([[2, 3, 15, 13], [9, 6, 27.5, 20]], [], [[0, 0, 32, 24]], [[4, 8, 8, 16], [31.5, 23.5, 32, 24]])
    labels = target(*images)
    labels[0]["size"] = torch.tensor([16, 32])
    got = fgd_masks(labels, size, stride)
    expected = masks_reference(images, [label["size"].tolist() for label in labels], *size, stride)
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-6)


def test_an_object_weighs_1_whatever_its_size_and_so_does_the_background():
    foreground, background = fgd_masks(target([[0, 0, 3, 3], [8, 4, 29, 23]]), (6, 8), (4.0, 4.0))
    assert foreground[0, 0, 0] == 1
    assert foreground.sum().item() == pytest.approx(2)
    assert background.sum().item() == pytest.approx(1)
    assert not (foreground * background).any()


def test_of_boxes_that_overlap_the_smaller_counts():
    small, large = [4, 4, 8, 8], [0, 0, 16, 16]
    foreground, _ = fgd_masks(target([large, small]), (6, 8), (4.0, 4.0))
    assert foreground[0, 1, 1] == 1
    assert foreground[0, 0, 0] == 1 / 16


def test_padding_is_neither():
    foreground, background = fgd_masks(target([[0, 0, 4, 4]], size=torch.tensor([8, 16])), (6, 8), (4.0, 4.0))
    assert foreground.count_nonzero() == 1
    assert background.count_nonzero() == 7
    assert (background[0, 2:] == 0).all()
    assert (background[0, :, 4:] == 0).all()


def test_a_box_over_everything_leaves_no_background():
    foreground, background = fgd_masks(target([[0, 0, 32, 24]]), (6, 8), (4.0, 4.0))
    assert (foreground == 1 / 48).all()
    assert (background == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 0.8, 3.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 4), (3, 2, 4, 1)])
def test_function_against_loops(shape, temperature):
    student, teacher = maps(*shape, seed=1), maps(*shape, seed=2)
    foreground, background = maps(shape[0], *shape[2:], seed=3).abs(), maps(shape[0], *shape[2:], seed=4).abs()
    got = fgd_loss(student, teacher, foreground, background, temperature=temperature)
    assert got.item() == pytest.approx(reference(student, teacher, foreground, background, temperature), rel=1e-9)
    weights = {"foreground_weight": 0.3, "background_weight": 0.7, "attention_weight": 0.2}
    got = fgd_loss(student, teacher, foreground, background, **weights)
    expected = reference(student, teacher, foreground, background, weights=tuple(weights.values()))
    assert got.item() == pytest.approx(expected, rel=1e-9)


def test_zero_at_equality_and_positive_otherwise():
    student, teacher = maps(2, 5, 3, 4, seed=1), maps(2, 5, 3, 4, seed=2)
    masks = fgd_masks(target([[2, 3, 15, 13]], []), (3, 4), (8.0, 8.0))
    assert fgd_loss(teacher, teacher, *masks).item() == 0
    assert fgd_loss(student, teacher, *masks).item() > 0
    assert fgd_loss(-teacher, teacher, *masks, attention_weight=1.0).item() == pytest.approx(
        fgd_loss(-teacher, teacher, *masks, attention_weight=0.0).item()
    )


def test_each_mask_weighs_its_own_positions():
    student, teacher = maps(1, 5, 3, 4, seed=1).requires_grad_(), maps(1, 5, 3, 4, seed=2)
    foreground, background = fgd_masks(target([[0, 0, 16, 16]]), (3, 4), (8.0, 8.0))
    fgd_loss(student, teacher, foreground, background, background_weight=0.0, attention_weight=0.0).backward()
    assert ((student.grad != 0).any(1) == (foreground > 0)).all()


def test_gradcheck():
    student, teacher = maps(2, 3, 2, 3, seed=1).requires_grad_(), maps(2, 3, 2, 3, seed=2)
    masks = maps(2, 2, 3, seed=3).abs(), maps(2, 2, 3, seed=4).abs()
    assert torch.autograd.gradcheck(
        lambda x: fgd_loss(x, teacher, *masks, foreground_weight=1.0, background_weight=0.5, attention_weight=0.2),
        (student,),
    )


def test_the_teacher_gets_no_gradient():
    student, teacher = maps(2, 3, 2, 3, seed=1).requires_grad_(), maps(2, 3, 2, 3, seed=2).requires_grad_()
    fgd_loss(student, teacher, torch.ones(2, 2, 3), torch.ones(2, 2, 3)).backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()


def test_shapes_that_do_not_fit_are_refused():
    x = maps(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 5, 4, 4\) \(teacher\)"):
        fgd_loss(x, maps(2, 5, 4, 4), torch.ones(2, 4, 4), torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match=r"masks \(2, 4, 4\) and \(1, 4, 4\) do not fit"):
        fgd_loss(x, x, torch.ones(2, 4, 4), torch.ones(1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (1e4, -1e4), (1e4, 1e4), (0.0, 1e4)])
def test_half_precision_at_extreme_values(first, second, batch, dtype):
    fgd = FGD([3, 3], [3, 3], [4, 8])
    values = [torch.full((batch, 3, 6, 8), value, dtype=dtype) for value in (first, second)]
    values[1][:, 0, 0] = 0
    student = {f"fpn.{i}": values[0][:, :, :: i + 1, :: i + 1].clone().requires_grad_() for i in range(2)}
    teacher = {f"fpn.{i}": values[1][:, :, :: i + 1, :: i + 1] for i in range(2)}
    boxes = target(*[[[2, 3, 15, 13]], []][:batch])
    with torch.autocast("cpu", dtype=dtype):
        terms = fgd(student, teacher, boxes)
    sum(terms.values()).backward()
    for term in terms.values():
        assert term.dtype == torch.float32
        assert term.isfinite()
    assert all(x.grad.isfinite().all() for x in (*student.values(), *fgd.parameters()))


def test_a_global_context_block_against_its_formula():
    torch.manual_seed(0)
    block, x = GcBlock(6).double(), maps(2, 6, 3, 4)
    torch.testing.assert_close(block(x), x)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    attention_weight, first, norm, last = (
        block.attention.weight.detach().numpy()[0, :, 0, 0],
        block.transform[0],
        block.transform[1],
        block.transform[3],
    )
    for sample, got in zip(x.numpy(), block(x).detach().numpy(), strict=True):
        weights = np.array(softmax([float(attention_weight @ sample[:, i, j]) for i in range(3) for j in range(4)]))
        context = sample.reshape(6, 12) @ weights
        hidden = first.weight.detach().numpy() @ context + first.bias.detach().numpy()
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
        hidden = np.maximum(hidden * norm.weight.detach().numpy() + norm.bias.detach().numpy(), 0)
        added = last.weight.detach().numpy() @ hidden + last.bias.detach().numpy()
        np.testing.assert_allclose(got, sample + added[:, None, None], rtol=1e-9)


def test_the_class_adds_levels_and_weighs_both_terms():
    fgd = FGD([3, 3], [3, 3], [4, 8], foreground_weight=0.1, global_weight=0.01, temperature=0.8, target="raw")
    shapes = {"fpn.0": (2, 3, 6, 8), "fpn.1": (2, 3, 3, 4)}
    student = {tap: maps(*shape, seed=i) for i, (tap, shape) in enumerate(shapes.items())}
    teacher = {tap: maps(*shape, seed=8 + i) for i, (tap, shape) in enumerate(shapes.items())}
    boxes = target([[2, 3, 15, 13]], [])
    terms = fgd.double()(student, teacher, boxes)
    assert list(terms) == ["fgd_focal", "fgd_global"]
    focal = 0.0
    for (tap, shape), stride in zip(shapes.items(), (4.0, 8.0), strict=True):
        masks = fgd_masks(boxes, shape[2:], (stride, stride))
        focal += reference(student[tap], teacher[tap], *masks, 0.8, (0.1, 5e-4, 1e-3))
    assert terms["fgd_focal"].item() == pytest.approx(focal, rel=1e-6)
    # Both blocks still add nothing.
    relations = sum((student[tap] - teacher[tap]).square().sum() for tap in shapes) / 2
    assert terms["fgd_global"].item() == pytest.approx(0.01 * relations.item(), rel=1e-9)


def test_the_global_term_is_zero_where_features_and_blocks_are_equal():
    fgd = FGD([6], [6], [4], target="raw").double()
    torch.nn.init.ones_(fgd.student_blocks[0].transform[-1].weight)
    x = {"fpn.0": maps(2, 6, 6, 8)}
    assert fgd(x, x, target([], []))["fgd_global"].item() > 0
    fgd.teacher_blocks.load_state_dict(fgd.student_blocks.state_dict())
    assert fgd(x, x, target([], []))["fgd_global"].item() == 0


def test_without_the_global_term():
    fgd = FGD([3], [3], [4], global_weight=0.0)
    assert list(fgd.parameters()) == []
    x = {"fpn.0": maps(2, 3, 6, 8)}
    assert list(fgd(x, x, target([], []))) == ["fgd_focal"]


def test_boxes_land_where_they_are_on_a_map_that_was_resized():
    boxes = target([[0, 0, 8, 8]])
    terms = {}
    for side in (1, 2):
        fgd = FGD([3], [3], [8], resize="student", background_weight=0.0, attention_weight=0.0, target="raw").double()
        student = {"fpn.0": torch.zeros(1, 3, 3, 4, dtype=torch.float64)}
        teacher = {"fpn.0": torch.zeros(1, 3, 3 * side, 4 * side, dtype=torch.float64)}
        teacher["fpn.0"][:, :, :side, :side] = 1e-6
        terms[side] = fgd(student, teacher, boxes)["fgd_focal"].item()
    assert terms[1] == pytest.approx(terms[2], rel=1e-3)
    assert terms[1] == pytest.approx(1e-3 * 3 * 1e-12, rel=1e-3)


def test_other_targets_and_levels_are_refused():
    fgd = FGD([3], [3], [4])
    x = {"fpn.0": torch.zeros(2, 3, 6, 8)}
    with pytest.raises(ValueError, match="reads boxes"):
        fgd(x, x)
    with pytest.raises(ValueError, match="each level needs one of these"):
        FGD([3, 3], [3], [4, 8])


def test_from_context_takes_the_whole_pyramid(detection_context):
    fgd = FGD.from_context(detection_context)
    assert fgd.student_taps == fgd.teacher_taps == ("fpn.0", "fpn.1", "fpn.2")
    assert fgd.strides == (4, 8, 16)
    assert [aligner.projector.weight.shape for aligner in fgd.aligners] == [(8, 6, 1, 1)] * 3
    fgd = FGD.from_context(detection_context, student_taps=["fpn.1"], teacher_taps=["map.-1"])
    assert fgd.strides == (8,)
    assert fgd.aligners[0].projector.weight.shape == (12, 6, 1, 1)


def test_from_context_refuses_networks_without_a_pyramid(context, detection_context):
    with pytest.raises(TapError, match=r"no taps 'fpn\.<i>'"):
        FGD.from_context(context)
    mixed = Context(detection_context.student, context.teacher, context.task, num_classes=5, num_samples=12)
    with pytest.raises(TapError, match=r"toy has no taps 'fpn\.<i>'"):
        FGD.from_context(mixed)


def test_of_unlabelled_images_neither_objects_nor_background_count_and_the_mean_is_over_the_others():
    known, unknown = target([[2.0, 3.0, 15.0, 13.0]], [])
    unknown["labelled"] = torch.tensor(False)
    alone, mixed = (fgd_masks(images, (6, 8), (4.0, 4.0)) for images in ([known], [known, unknown, unknown]))
    for one, many in zip(alone, mixed, strict=True):
        torch.testing.assert_close(many[0], 3 * one[0])
        assert not many[1:].any()
    student, teacher = maps(3, 2, 6, 8, seed=1), maps(3, 2, 6, 8, seed=2)
    squares = {"attention_weight": 0.0, "foreground_weight": 1.0, "background_weight": 0.5}
    torch.testing.assert_close(
        fgd_loss(student, teacher, *mixed, **squares), fgd_loss(student[:1], teacher[:1], *alone, **squares)
    )
