# SPDX-License-Identifier: Apache-2.0
"""The stand-in for mmcv's compiled operators, against slow references and torchvision."""

import math
import sys
from types import ModuleType

import pytest
import torch
import torchvision

from kdlvfm.models.mmcv_ops import MissingOperatorError, provide_operators

pytest.importorskip("mmcv")


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    if not provide_operators():
        pytest.skip("a compiled mmcv is installed")


@pytest.fixture
def ops():
    import mmcv.ops

    return mmcv.ops


def boxes_and_scores(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 40, (count, 2), generator=generator).float()
    sides = torch.randint(1, 25, (count, 2), generator=generator).float()
    scores = torch.randperm(count, generator=generator).float() / count
    return torch.cat([corners, corners + sides], dim=1), scores


def overlap(a, b, offset):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area_a, area_b = ((x[2] - x[0] + offset) * (x[3] - x[1] + offset) for x in (a, b))
    return width * height / (area_a + area_b - width * height)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_nms_keeps_what_no_better_box_covers(ops, seed, offset):
    boxes, scores = boxes_and_scores(40, seed)
    expected = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.4 for j in expected):
            expected.append(i)
    dets, kept = ops.nms(boxes, scores, 0.4, offset=offset)
    assert kept.tolist() == expected
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)[kept])


def soft_nms_reference(boxes, scores, method, offset, threshold=0.3, sigma=0.5, min_score=0.05):
    left = dict(enumerate(scores.tolist()))
    found = []
    while left:
        best = max(left, key=lambda i: left[i])
        score = left.pop(best)
        found.append((best, score))
        for i in list(left):
            shared = overlap(boxes[best].tolist(), boxes[i].tolist(), offset)
            if method == "gaussian":
                left[i] *= math.exp(-(shared**2) / sigma)
            elif shared >= threshold:
                left[i] *= 1 - shared if method == "linear" else 0
            if left[i] < min_score:
                del left[i]
    return found


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_lets_scores_decay(ops, method, offset):
    boxes, scores = boxes_and_scores(30, seed=5)
    dets, kept = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    expected = soft_nms_reference(boxes, scores, method, offset)
    assert kept.tolist() == [i for i, _ in expected]
    assert dets[:, 4].tolist() == pytest.approx([score for _, score in expected], rel=1e-4)
    assert torch.equal(dets[:, :4], boxes[kept])


def test_nms_of_no_boxes(ops):
    empty = torch.zeros(0, 4), torch.zeros(0)
    assert ops.nms(*empty, 0.5)[1].tolist() == []
    assert ops.soft_nms(*empty)[1].tolist() == []


REGIONS = torch.tensor([[0, 2.0, 3.0, 14.0, 12.0], [1, 0.0, 0.0, 7.5, 15.0], [0, 4.2, 1.1, 9.9, 5.3]])


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_is_torchvisions_in_both_directions(ops, aligned):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    ours = ops.roi_align(x, REGIONS, (4, 5), 0.5, 2, "avg", aligned)
    theirs = torchvision.ops.roi_align(other, REGIONS, (4, 5), 0.5, 2, aligned)
    weights = torch.rand_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert torch.equal(ours, theirs)
    assert torch.equal(x.grad, other.grad)


def test_roi_align_of_a_ramp_is_the_centre_of_each_bin(ops):
    ramp = (torch.arange(16.0) + 0.5).expand(1, 1, 16, 16)
    bins = ops.roi_align(ramp, torch.tensor([[0, 2.0, 4.0, 14.0, 10.0]]), 3, 1.0, 4, "avg", True)
    torch.testing.assert_close(bins[0, 0, 1], torch.tensor([4.0, 8.0, 12.0]))


def test_roi_pool_takes_the_maximum_of_each_bin(ops):
    torch.manual_seed(0)
    x = torch.rand(1, 2, 12, 12, requires_grad=True)
    region = [2, 3, 9, 10]  # of 8 x 8 positions, ends included
    pooled = ops.roi_pool(x, torch.tensor([[0.0, *map(float, region)]]), 4, 1.0)
    chosen = torch.zeros_like(x)
    for channel in range(2):
        for i in range(4):
            for j in range(4):
                top, left = region[1] + 2 * i, region[0] + 2 * j
                patch = x[0, channel, top : top + 2, left : left + 2]
                assert pooled[0, channel, i, j] == patch.max()
                row, column = divmod(int(patch.argmax()), 2)
                chosen[0, channel, top + row, left + column] = 1
    pooled.sum().backward()
    assert torch.equal(x.grad, chosen)


def test_maximum_of_aligned_regions_is_missing(ops):
    with pytest.raises(MissingOperatorError, match="pool_mode='max'"):
        ops.roi_align(torch.rand(1, 1, 8, 8), REGIONS[:1], 2, 1.0, 2, "max", True)


def test_sigmoid_focal_loss_is_its_formula(ops):
    torch.manual_seed(0)
    logits = (4 * torch.randn(6, 3, dtype=torch.float32)).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 3, 0])  # 3 is the background
    loss = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    loss.sum().backward()
    for i in range(6):
        for k in range(3):
            x = logits[i, k].item()
            p = 1 / (1 + math.exp(-x))
            if target[i] == k:
                expected = -0.25 * (1 - p) ** 2 * math.log(p)
                slope = -0.25 * (1 - p) ** 2 * (1 - p - 2 * p * math.log(p))
            else:
                expected = -0.75 * p**2 * math.log(1 - p)
                slope = -0.75 * p**2 * (2 * (1 - p) * math.log(1 - p) - p)
            assert loss[i, k].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
            assert logits.grad[i, k].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_softmax_focal_loss_is_its_formula(ops):
    torch.manual_seed(0)
    logits = torch.randn(5, 4, requires_grad=True)
    target = torch.tensor([0, 3, 1, 2, -1])  # negative: passed over
    loss = ops.softmax_focal_loss(logits, target, 2.0, 0.25, None, "sum")
    loss.backward()
    other = logits.detach().double().requires_grad_()
    log_hit = other.log_softmax(dim=1)[range(4), target[:4]]
    expected = (-0.25 * (1 - log_hit.exp()) ** 2 * log_hit).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad, other.grad.float())
    assert logits.grad[4].tolist() == [0, 0, 0, 0]


def test_focal_losses_are_finite_at_the_ends(ops):
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    for loss in (ops.sigmoid_focal_loss, ops.softmax_focal_loss):
        value = loss(logits, torch.tensor([0, 0]), 2.0, 0.25, None, "sum")
        (grad,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert grad.isfinite().all()


def test_class_weights_of_focal_losses_are_refused(ops):
    with pytest.raises(ValueError, match="class weights"):
        ops.sigmoid_focal_loss(torch.zeros(1, 2), torch.tensor([0]), 2.0, 0.25, torch.ones(2), "sum")


def test_deformable_attention_samples_between_positions(ops):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    torch.manual_seed(0)
    shapes = torch.tensor([[3, 4], [2, 2]])
    starts = torch.tensor([0, 12])
    value = torch.rand(1, 16, 2, 3, dtype=torch.float64, requires_grad=True)
    where = torch.rand(1, 5, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 5, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    found = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, where, weights, 64)
    expected = torch.zeros(1, 5, 2, 3, dtype=torch.float64)
    for query in range(5):
        for head in range(2):
            for level, (height, width) in enumerate(shapes.tolist()):
                grid = value[0, starts[level] :][: height * width, head].reshape(height, width, 3)
                for point in range(2):
                    x, y = where[0, query, head, level, point].tolist()
                    sample = bilinear(grid, x * width - 0.5, y * height - 0.5)
                    expected[0, query, head] += weights[0, query, head, level, point] * sample
    torch.testing.assert_close(found, expected.flatten(2))
    inputs = (value, where, weights)
    assert torch.autograd.gradcheck(
        lambda v, p, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, p, w, 64), inputs
    )


def bilinear(grid, x, y):
    total = torch.zeros(grid.shape[2], dtype=grid.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * grid[row, column]
    return total


def test_any_other_operator_says_its_name_and_the_remedy_when_it_is_called(ops):
    module = ops.DeformConv2d(2, 2, 3, padding=1)  # building it is fine
    with pytest.raises(MissingOperatorError, match=r"'deform_conv_forward'.*replace mmcv-lite"):
        module(torch.rand(1, 2, 5, 5), torch.zeros(1, 18, 5, 5))


def test_the_stand_in_is_an_ordinary_module_otherwise():
    module = sys.modules["mmcv._ext"]
    assert not hasattr(module, "__path__")
    assert provide_operators()
    assert sys.modules["mmcv._ext"] is module


def test_a_compiled_module_is_left_alone(monkeypatch):
    compiled = ModuleType("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    assert not provide_operators()
    assert sys.modules["mmcv._ext"] is compiled
