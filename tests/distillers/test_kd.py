# SPDX-License-Identifier: Apache-2.0
"""KD against loops over positions in plain Python, worked examples and the properties of the formula."""

import math

import pytest
import torch

from kdlvfm.core.align import match_size
from kdlvfm.distillers import KD, kd_loss

VOID, UNLABELLED = 255, -1


def logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def softmax(values, temperature):
    peak = max(values)
    powers = [math.exp((value - peak) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def standardised(values):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return [(value - mean) / std for value in values]


def reference(student, teacher, temperature, target=None, ignore_index=VOID, standardize=False):
    """The mean over samples or positions, one at a time."""
    rows = [x.movedim(1, -1).reshape(-1, x.shape[1]).tolist() for x in (student, teacher)]
    labels = [None] * len(rows[0]) if target is None else target.flatten().tolist()
    divergences = []
    for first, second, label in zip(*rows, labels, strict=True):
        if label is not None and label == ignore_index:
            continue
        if standardize:
            first, second = standardised(first), standardised(second)
        p_student, p_teacher = softmax(first, temperature), softmax(second, temperature)
        divergences.append(sum(p * math.log(p / q) for p, q in zip(p_teacher, p_student, strict=True)))
    return temperature**2 * sum(divergences) / max(len(divergences), 1)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 5), (1, 2), (2, 7, 3, 4)])
def test_against_loops(shape, temperature, standardize):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    expected = reference(student, teacher, temperature, standardize=standardize)
    assert kd_loss(student, teacher, temperature, standardize=standardize).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("ignore_index", [VOID, UNLABELLED, 2])
def test_masked_mean_against_loops(ignore_index, standardize):
    student, teacher = logits(2, 5, 3, 4, seed=3), logits(2, 5, 3, 4, seed=4)
    target = torch.tensor([0, 2, 4, VOID, UNLABELLED, 1]).repeat(4).view(2, 3, 4)
    expected = reference(student, teacher, 2.0, target, ignore_index, standardize)
    got = kd_loss(student, teacher, 2.0, target, ignore_index, standardize=standardize)
    assert got.item() == pytest.approx(expected, rel=1e-9)
    assert got.item() != pytest.approx(kd_loss(student, teacher, 2.0, standardize=standardize).item(), rel=1e-3)


def test_masked_samples_of_a_classifier():
    student, teacher = logits(4, 3, seed=5), logits(4, 3, seed=6)
    target = torch.tensor([0, VOID, 1, VOID])
    assert torch.isclose(kd_loss(student, teacher, 4.0, target), kd_loss(student[::2], teacher[::2], 4.0))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.130812036), (2.0, 0.145363131)])
def test_worked_example(temperature, expected):
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-9)


def test_zero_exactly_when_equal_up_to_a_shift_and_positive_otherwise():
    teacher = logits(4, 5)
    shift = logits(4, 1, seed=9)
    assert kd_loss(teacher, teacher).item() == 0
    assert kd_loss(teacher + shift, teacher).item() == pytest.approx(0, abs=1e-12)
    for seed in range(10):
        assert kd_loss(logits(4, 5, seed=100 + seed), teacher).item() > 1e-3


def test_a_shift_of_either_networks_logits_changes_nothing():
    student, teacher = logits(2, 5, 3, 4, seed=1), logits(2, 5, 3, 4, seed=2)
    shift = logits(2, 1, 3, 4, seed=3)
    expected = kd_loss(student, teacher)
    torch.testing.assert_close(kd_loss(student + shift, teacher), expected)
    torch.testing.assert_close(kd_loss(student, teacher - shift), expected)


def test_limit_of_high_temperature():
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)
    centred = [x - x.mean(1, keepdim=True) for x in (student, teacher)]
    limit = (centred[0] - centred[1]).square().sum(1).div(2 * 5).mean()
    torch.testing.assert_close(kd_loss(student, teacher, 1e4), limit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_the_difference_of_the_probabilities(temperature):
    student, teacher = logits(6, 5, seed=1).requires_grad_(), logits(6, 5, seed=2)
    kd_loss(student, teacher, temperature).backward()
    probabilities = [(x.detach() / temperature).softmax(1) for x in (student, teacher)]
    torch.testing.assert_close(student.grad, temperature * (probabilities[0] - probabilities[1]) / 6)


def test_standardized_forgets_a_positive_affine_change_of_either_side():
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    expected = kd_loss(student, teacher, 2.0, standardize=True)
    torch.testing.assert_close(kd_loss(7 * student - 3, teacher, 2.0, standardize=True), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(kd_loss(student, teacher / 9 + 5, 2.0, standardize=True), expected, rtol=1e-6, atol=0)
    assert kd_loss(3 * teacher + 1, teacher, 2.0, standardize=True).item() == pytest.approx(0, abs=1e-10)
    assert kd_loss(3 * teacher + 1, teacher, 2.0).item() > 0.1


@pytest.mark.parametrize("standardize", [False, True])
def test_gradcheck(standardize):
    student, teacher = logits(2, 4, 2, 3, seed=1, scale=1.0).requires_grad_(), logits(2, 4, 2, 3, seed=2, scale=1.0)
    target = torch.tensor([0, 1, VOID, UNLABELLED, 2, 3]).expand(2, 6).reshape(2, 2, 3)
    assert torch.autograd.gradcheck(
        lambda x: kd_loss(x, teacher, 2.0, target, standardize=standardize), (student,), raise_exception=True
    )


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e30])
def test_an_ignored_position_has_no_gradient_whatever_its_logits(poison, standardize):
    student, teacher = logits(2, 5, 3, 4, seed=1), logits(2, 5, 3, 4, seed=2)
    target = torch.zeros(2, 3, 4, dtype=torch.int64)
    target[:, 1] = VOID
    expected = kd_loss(student, teacher, 2.0, target, standardize=standardize)
    student[:, 0, 1], teacher[:, 3, 1] = poison, poison
    student.requires_grad_()
    loss = kd_loss(student, teacher, 2.0, target, standardize=standardize)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert (student.grad[:, :, 1] == 0).all()
    assert (student.grad[:, :, [0, 2]] != 0).all()


def test_unlabelled_positions_are_distilled_on():
    student, teacher = logits(2, 5, 3, 4, seed=1).requires_grad_(), logits(2, 5, 3, 4, seed=2)
    target = torch.full((2, 3, 4), UNLABELLED)
    KD()({"logits": student}, {"logits": teacher}, target)["kd"].backward()
    assert (student.grad != 0).all()


@pytest.mark.parametrize("standardize", [False, True])
def test_nothing_valid_gives_zero_with_a_graph(standardize):
    student = logits(1, 3, 2, 2).requires_grad_()
    loss = kd_loss(student, logits(1, 3, 2, 2, seed=1), 1.0, torch.full((1, 2, 2), VOID), standardize=standardize)
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_the_teacher_gets_no_gradient():
    student, teacher = logits(4, 5, seed=1).requires_grad_(), logits(4, 5, seed=2).requires_grad_()
    kd_loss(student, teacher, standardize=True).backward()
    assert teacher.grad is None
    torch.testing.assert_close(kd_loss(student, teacher), kd_loss(student, teacher.detach()))


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.0, 1e4), (1e4, -1e4), (1e4, 1e4), (1e-6, 1e4)])
def test_half_precision_at_extreme_values(first, second, dtype, standardize):
    """One sample; each network is constant but for one class of its own, and at 0 for all classes."""
    student, teacher = (torch.full((1, 3, 2, 2), value, dtype=dtype) for value in (first, second))
    student[:, 0], teacher[:, 1] = -first, 0
    student.requires_grad_()
    loss = kd_loss(student, teacher, standardize=standardize)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_half_precision_is_promoted_before_any_arithmetic():
    student, teacher = logits(4, 5, seed=1).bfloat16(), logits(4, 5, seed=2).bfloat16()
    torch.testing.assert_close(kd_loss(student, teacher), kd_loss(student.double(), teacher.double()).float())


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\) \(student\) and \(2, 7\) \(teacher\).*number of classes"):
        kd_loss(logits(2, 5), logits(2, 7))
    with pytest.raises(ValueError, match="resize the maps"):
        kd_loss(logits(2, 5, 4, 4), logits(2, 5, 8, 8))


@pytest.mark.parametrize("shape", [(2, 4, 3), (2,), (2, 1, 3, 4)])
def test_a_target_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"target .* does not fit logits"):
        kd_loss(logits(2, 5, 3, 4), logits(2, 5, 3, 4), 1.0, torch.zeros(shape, dtype=torch.int64))


def test_the_class_weighs_the_function():
    student, teacher = logits(2, 5, 3, 4, seed=1), logits(2, 5, 3, 4, seed=2)
    target = torch.tensor([0, VOID, 1, UNLABELLED]).expand(2, 3, 4)
    terms = KD(loss_weight=9.0, temperature=2.0, standardize=True)({"logits": student}, {"logits": teacher}, target)
    assert list(terms) == ["kd"]
    assert terms["kd"].item() == pytest.approx(9 * reference(student, teacher, 2.0, target, standardize=True), rel=1e-9)


def test_the_class_can_keep_void_pixels_or_leave_out_others():
    student, teacher = {"logits": logits(1, 3, 2, 2, seed=1)}, {"logits": logits(1, 3, 2, 2, seed=2)}
    target = torch.tensor([[[0, VOID], [VOID, UNLABELLED]]])
    everywhere = KD()(student, teacher)["kd"]
    assert torch.equal(KD(ignore_index=None)(student, teacher, target)["kd"], everywhere)
    labelled = reference(student["logits"], teacher["logits"], 4.0, target, UNLABELLED)
    assert KD(ignore_index=UNLABELLED)(student, teacher, target)["kd"].item() == pytest.approx(labelled, rel=1e-9)


@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_maps_of_two_sizes_meet_and_void_stays_out(resize):
    student, teacher = logits(1, 3, 8, 8, seed=1), logits(1, 3, 4, 4, seed=2)
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[:, :4] = VOID
    got = KD(resize=resize)({"logits": student}, {"logits": teacher}, target)["kd"].item()
    first, second = match_size(student, teacher, resize)
    half = first.shape[-2] // 2
    assert got == pytest.approx(reference(first[:, :, half:], second[:, :, half:], 4.0), rel=1e-9)


def test_a_classifiers_logits_and_other_taps():
    kd = KD(student_tap="cls.0", teacher_tap="logits")
    assert kd.student_taps == ("cls.0",)
    assert kd.teacher_taps == ("logits",)
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    got = kd({"cls.0": student}, {"logits": teacher}, torch.tensor([0, 1, 2, 3]))["kd"]
    assert got.item() == pytest.approx(reference(student, teacher, 4.0), rel=1e-9)
