# SPDX-License-Identifier: Apache-2.0
"""CrossKD's terms against loops in plain Python, and the way through the teacher's frozen head."""

import copy
import math

import pytest
import torch
from torch import nn

from kdlvfm.core import Context, TapError, Teacher
from kdlvfm.core.boxes import giou_of_distances
from kdlvfm.core.split_head import HeadTails
from kdlvfm.distillers import CrossKD, align_scale, crosskd_cls_loss, crosskd_giou_loss, crosskd_kl_loss


def maps(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def weights(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def cls_reference(student, teacher, beta=1.0):
    """The sum over positions and classes."""
    total = 0.0
    for z, goal in zip(student.flatten().tolist(), map(sigmoid, teacher.flatten().tolist()), strict=True):
        p = sigmoid(z)
        total += abs(p - goal) ** beta * -(goal * math.log(p) + (1 - goal) * math.log(1 - p))
    return total


def kl_reference(student, teacher, weight, temperature=1.0):
    """The weighted sum over positions of the mean over sides."""
    rows = [x.unflatten(1, (4, -1)).movedim((1, 2), (-2, -1)).flatten(0, -3).tolist() for x in (student, teacher)]
    total = 0.0
    for first, second, w in zip(*rows, weight.flatten().tolist(), strict=True):
        for own, goal in zip(first, second, strict=True):
            powers = [[math.exp(z / temperature) for z in side] for side in (own, goal)]
            q, p = ([power / sum(side) for power in side] for side in powers)
            total += w / 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_classes_against_loops(beta):
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 3, 4, 5, seed=2)
    expected = cls_reference(student, teacher, beta)
    assert crosskd_cls_loss(student, teacher, beta).item() == pytest.approx(expected / 40, rel=1e-9)
    got = crosskd_cls_loss(student, teacher, beta, avg_factor=torch.tensor(7.0))
    assert got.item() == pytest.approx(expected / 7, rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distributions_against_loops(temperature):
    student, teacher, weight = maps(2, 24, 2, 3, seed=1), maps(2, 24, 2, 3, seed=2), weights(2, 2, 3)
    expected = kl_reference(student, teacher, weight, temperature)
    got = crosskd_kl_loss(student, teacher, weight, temperature)
    assert got.item() == pytest.approx(expected / 12, rel=1e-9)
    got = crosskd_kl_loss(student, teacher, weight, temperature, avg_factor=weight.sum())
    assert got.item() == pytest.approx(expected / weight.sum().item(), rel=1e-9)


def test_boxes_against_their_giou():
    student, teacher, weight = maps(2, 4, 2, 3, seed=1).abs(), maps(2, 4, 2, 3, seed=2).abs(), weights(2, 2, 3)
    expected = (weight * (1 - giou_of_distances(student, teacher))).sum()
    torch.testing.assert_close(crosskd_giou_loss(student, teacher, weight), expected / 12)
    torch.testing.assert_close(
        crosskd_giou_loss(student, teacher, weight, avg_factor=weight.sum()), expected / weight.sum()
    )
    scaled = crosskd_giou_loss(8 * student, 8 * teacher, weight)
    torch.testing.assert_close(scaled, expected / 12)


def test_zero_exactly_at_equality():
    scores, sides, boxes, weight = maps(2, 3, 2, 3), maps(2, 24, 2, 3), maps(2, 4, 2, 3).abs(), weights(2, 2, 3)
    assert crosskd_cls_loss(scores, scores).item() == 0
    assert crosskd_kl_loss(sides, sides, weight).item() == 0
    assert crosskd_giou_loss(boxes, boxes, weight).item() == pytest.approx(0, abs=1e-12)
    assert crosskd_cls_loss(scores + 1e-3, scores).item() > 0


def test_gradcheck():
    student, teacher, weight = maps(1, 8, 2, 2, seed=1).requires_grad_(), maps(1, 8, 2, 2, seed=2), weights(1, 2, 2)
    assert torch.autograd.gradcheck(lambda x: crosskd_cls_loss(x, teacher), (student,))
    assert torch.autograd.gradcheck(lambda x: crosskd_kl_loss(x, teacher, weight, 2.0), (student,))
    assert torch.autograd.gradcheck(
        lambda x: crosskd_giou_loss(x.abs()[:, :4], teacher.abs()[:, :4], weight), (student,)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (1e4, -1e4), (0.0, 1e4), (-1e4, -1e4)])
def test_half_precision_at_extreme_values(first, second, dtype):
    weight = torch.ones(2, 2, 2, dtype=dtype)
    for loss in (crosskd_cls_loss, crosskd_kl_loss, crosskd_giou_loss):
        channels = 4 if loss is crosskd_giou_loss else 8
        student, teacher = (torch.full((2, channels, 2, 2), value, dtype=dtype) for value in (first, second))
        teacher[:, 0] = 0
        student.requires_grad_()
        got = loss(student, teacher) if loss is crosskd_cls_loss else loss(student, teacher, weight)
        got.backward()
        assert got.dtype == torch.float32
        assert got.isfinite()
        assert student.grad.isfinite().all()


def test_what_does_not_fit_is_refused():
    x = maps(2, 8, 2, 3)
    for loss in (crosskd_cls_loss, lambda a, b: crosskd_kl_loss(a, b, weights(2, 2, 3))):
        with pytest.raises(ValueError, match=r"\(2, 8, 2, 3\) \(student\) and \(2, 8, 3, 3\) \(teacher\)"):
            loss(x, maps(2, 8, 3, 3))
    with pytest.raises(ValueError, match=r"weight \(2, 3\) does not fit"):
        crosskd_kl_loss(x, x, weights(2, 3))
    with pytest.raises(ValueError, match="4 channels are no distributions"):
        crosskd_kl_loss(x[:, :4], x[:, :4], weights(2, 2, 3))
    with pytest.raises(ValueError, match="four distances, not 8"):
        crosskd_giou_loss(x, x, weights(2, 2, 3))
    with pytest.raises(ValueError, match="beta must be at least 1"):
        crosskd_cls_loss(x, x, 0.5)
    with pytest.raises(ValueError, match="there must be a level"):
        CrossKD([], 8, 8)


SIZES = ((4, 6), (2, 3))


def head(classes=3, sides=24):
    """A frozen head of one convolution after the activation, its scale one for each level."""
    torch.manual_seed(0)
    cls, reg = (nn.Conv2d(8, dim, 3, padding=1).double().requires_grad_(False) for dim in (classes, sides))
    return cls, reg, [HeadTails(lambda x: cls(x.relu()), lambda x, i=i: (1 + i) * reg(x.relu())) for i in range(2)]


def features(tails, seed, grad=False):
    made = {}
    for i, size in enumerate(SIZES):
        for kind in ("cls_mid", "reg_mid"):
            made[f"{kind}.{i}"] = maps(2, 8, *size, seed=seed + i).requires_grad_(grad)
        made[f"cls.{i}"], made[f"reg.{i}"] = tails[i].cls(made[f"cls_mid.{i}"]), tails[i].reg(made[f"reg_mid.{i}"])
    return made


def test_the_class_against_its_parts():
    *_, tails = head()
    student, teacher = features(tails, 1), features(tails, 50)
    crosskd = CrossKD(tails, 8, 8, cls_weight=0.5, reg_weight=3.0, beta=2.0, temperature=2.0)
    terms = crosskd(student, teacher)
    assert list(terms) == ["crosskd_cls", "crosskd_reg"]
    cls = reg = count = 0.0
    for i, level in enumerate(tails):
        weight = teacher[f"cls.{i}"].sigmoid().amax(1)
        count += weight.sum().item()
        crossed = [align_scale(student[f"{kind}.{i}"], teacher[f"{kind}.{i}"]) for kind in ("cls_mid", "reg_mid")]
        cls += cls_reference(level.cls(crossed[0]), teacher[f"cls.{i}"], 2.0)
        reg += kl_reference(level.reg(crossed[1]), teacher[f"reg.{i}"], weight, 2.0)
    assert terms["crosskd_cls"].item() == pytest.approx(0.5 * cls / count, rel=1e-9)
    assert terms["crosskd_reg"].item() == pytest.approx(3 * reg / count, rel=1e-9)


def test_features_like_the_teachers_up_to_their_scale_are_right():
    *_, tails = head()
    teacher = features(tails, 50)
    student = {tap: 7 * x - 3 for tap, x in teacher.items() if "_mid" in tap}
    assert all(term.item() == pytest.approx(0, abs=1e-10) for term in CrossKD(tails, 8, 8)(student, teacher).values())


def test_gradients_go_through_the_frozen_head_and_no_further():
    cls, reg, tails = head()
    before = copy.deepcopy((cls.state_dict(), reg.state_dict()))
    student, teacher = features(tails, 1, grad=True), features(tails, 50, grad=True)
    crosskd = CrossKD(tails, 8, 8)
    sum(crosskd(student, teacher).values()).backward()
    assert all((student[f"{kind}.{i}"].grad != 0).any() for kind in ("cls_mid", "reg_mid") for i in range(2))
    assert all(teacher[tap].grad is None for tap in crosskd.teacher_taps if "_mid" in tap)
    assert all(parameter.grad is None for net in (cls, reg) for parameter in net.parameters())
    for net, kept in zip((cls, reg), before, strict=True):
        assert all(torch.equal(kept[key], value) for key, value in net.state_dict().items())


def test_the_teachers_head_is_no_part_of_it():
    cls, reg = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 24, 1)
    crosskd = CrossKD([HeadTails(cls, reg)], 8, 8)
    assert not list(crosskd.parameters())
    assert not crosskd.state_dict()
    assert {cls, reg}.isdisjoint(crosskd.modules())


def test_terms_can_be_left_out():
    *_, tails = head()
    student, teacher = features(tails, 1), features(tails, 50)
    assert list(CrossKD(tails, 8, 8, cls_weight=0)(student, teacher)) == ["crosskd_reg"]
    assert list(CrossKD(tails, 8, 8, reg_weight=0)(student, teacher)) == ["crosskd_cls"]


def test_several_boxes_for_each_position_are_compared_one_by_one():
    """Two anchors of three classes, of boxes as centre and logarithm of the sides."""
    *_, tails = head(classes=6, sides=8)

    def boxes(x):
        x, y, width, height = x.unflatten(1, (2, 4)).unbind(2)
        half = width.exp() / 2, height.exp() / 2
        return torch.stack([half[0] - x, half[1] - y, half[0] + x, half[1] + y], dim=2).flatten(1, 2)

    tails = [HeadTails(level.cls, level.reg, boxes) for level in tails]
    student, teacher = features(tails, 1), features(tails, 50)
    crosskd = CrossKD(tails, 8, 8)
    assert crosskd.reg_weight == 1
    cls = reg = count = 0.0
    for i, level in enumerate(tails):
        crossed = [align_scale(student[f"{kind}.{i}"], teacher[f"{kind}.{i}"]) for kind in ("cls_mid", "reg_mid")]
        cls += cls_reference(level.cls(crossed[0]), teacher[f"cls.{i}"])
        scores, distances = teacher[f"cls.{i}"].sigmoid(), (boxes(level.reg(crossed[1])), boxes(teacher[f"reg.{i}"]))
        for anchor in range(2):
            weight = scores[:, 3 * anchor : 3 * anchor + 3].amax(1)
            giou = giou_of_distances(*(x[:, 4 * anchor : 4 * anchor + 4] for x in distances))
            reg += (weight * (1 - giou)).sum().item()
            count += weight.sum().item()
    terms = crosskd(student, teacher)
    assert terms["crosskd_cls"].item() == pytest.approx(cls / count, rel=1e-9)
    assert terms["crosskd_reg"].item() == pytest.approx(reg / count, rel=1e-9)


def test_heads_of_two_widths_and_grids_meet_at_the_teachers():
    *_, tails = head()
    student = {tap: x[:, :5, ::2] for tap, x in features(tails, 1).items() if "_mid" in tap}
    crosskd = CrossKD(tails, 5, 8).double()
    terms = crosskd(student, features(tails, 50))
    sum(terms.values()).backward()
    assert [name for name, _ in crosskd.named_parameters()] == [
        f"projectors.{kind}.{part}" for kind in ("cls", "reg") for part in ("weight", "bias")
    ]
    assert all((crosskd.projectors[kind].weight.grad != 0).any() for kind in ("cls", "reg"))


@pytest.mark.parametrize(("bins", "reg_weight"), [(6, 4), (1, 1)])
def test_from_context_takes_the_head_and_sees_what_it_predicts(
    bins, reg_weight, toy_detector, detection_task, detection_batch
):
    student, teacher = toy_detector(bins=bins), Teacher(toy_detector(bins=bins, width=8))
    crosskd = CrossKD.from_context(Context(student, teacher, detection_task, num_classes=5, num_samples=1))
    assert len(crosskd.tails) == 3
    assert crosskd.reg_weight == reg_weight
    assert crosskd.projectors["cls"].weight.shape == (8, 6, 1, 1)
    images = detection_batch["image"]
    terms = crosskd(student(images, crosskd.student_taps), teacher(images, crosskd.teacher_taps))
    assert all(term.isfinite() and term > 0 for term in terms.values())
    sum(terms.values()).backward()
    # Classes and boxes of the student's own head are left to the ground truth.
    assert all(tail.weight.grad is None for tail in student.net["tails"].values())
    assert all((stem.weight.grad != 0).any() for stem in student.net["stems"].values())


def test_from_context_refuses_networks_without_such_a_head(context, detection_context, detection_task, toy_detector):
    def build(student, teacher):
        return CrossKD.from_context(Context(student, Teacher(teacher), detection_task, num_classes=5, num_samples=1))

    with pytest.raises(TapError, match="the head of toy cannot be entered half-way"):
        build(detection_context.student, context.student)
    with pytest.raises(TapError, match=r"toy has no taps 'cls_mid\.<i>'"):
        build(context.student, toy_detector())
    with pytest.raises(ValueError, match="toy detector has 3, toy detector has 2"):
        build(toy_detector(), toy_detector(levels=(4, 8)))
    mute = toy_detector(bins=1)
    mute.head_tails = lambda index: HeadTails(nn.Identity(), nn.Identity())
    with pytest.raises(ValueError, match=r"how the head of toy detector describes boxes: its 4 channels are no distr"):
        build(toy_detector(bins=1), mute)
