# SPDX-License-Identifier: Apache-2.0
"""DKD against loops over positions in plain Python, worked examples, and its identity with KD."""

import math

import pytest
import torch

from kdlvfm.core.align import match_size, resize_labels
from kdlvfm.distillers import DKD, dkd_loss, kd_loss

VOID, UNLABELLED = 255, -1


def logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(*shape, num_classes=5, seed=0):
    return torch.randint(0, num_classes, shape, generator=torch.Generator().manual_seed(seed))


def softmax(values, temperature):
    powers = [math.exp((value - max(values)) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reference(student, teacher, target, alpha=1.0, beta=8.0, temperature=4.0):
    """The mean over labelled samples or positions, one at a time, from the probabilities themselves."""
    rows = [x.detach().movedim(1, -1).reshape(-1, x.shape[1]).tolist() for x in (student, teacher)]
    losses = []
    for first, second, label in zip(*rows, target.flatten().tolist(), strict=True):
        if label in (VOID, UNLABELLED):
            continue
        p, q = softmax(second, temperature), softmax(first, temperature)
        binary = divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        rest = [[value / (1 - x[label]) for k, value in enumerate(x) if k != label] for x in (p, q)]
        losses.append(alpha * binary + beta * divergence(*rest))
    return temperature**2 * sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize("weights", [(1.0, 8.0, 4.0), (0.3, 0.0, 1.0), (0.0, 2.0, 2.0)])
@pytest.mark.parametrize("shape", [(6, 5), (1, 2), (2, 7, 3, 4)])
def test_against_loops(shape, weights):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    target = labels(shape[0], *shape[2:], num_classes=shape[1])
    expected = reference(student, teacher, target, *weights)
    assert dkd_loss(student, teacher, target, *weights).item() == pytest.approx(expected, rel=1e-9)


def test_masked_mean_against_loops():
    student, teacher = logits(2, 5, 3, 4, seed=3), logits(2, 5, 3, 4, seed=4)
    target = torch.tensor([0, 2, 4, VOID, UNLABELLED, 1]).repeat(4).view(2, 3, 4)
    assert dkd_loss(student, teacher, target).item() == pytest.approx(reference(student, teacher, target), rel=1e-9)


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(RuntimeError, match="out of bounds"):
        dkd_loss(logits(2, 5), logits(2, 5), torch.tensor([0, 5]))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_two_parts_make_up_kd(temperature):
    """KD = TCKD + (1 - p_y of the teacher) NCKD, sample by sample."""
    student, teacher, target = logits(6, 5, seed=1), logits(6, 5, seed=2), labels(6)
    for i in range(6):
        sample = student[i : i + 1], teacher[i : i + 1], target[i : i + 1]
        rest = 1 - (sample[1] / temperature).softmax(1)[0, target[i]].item()
        together = dkd_loss(*sample, alpha=1.0, beta=rest, temperature=temperature)
        torch.testing.assert_close(together, kd_loss(*sample[:2], temperature))


def test_worked_examples():
    """With two classes there is only the first part, which is KD."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    for label in (0, 1):
        got = dkd_loss(student, teacher, torch.tensor([label]), alpha=3.0, beta=1e6, temperature=1.0)
        assert got.item() == pytest.approx(3 * 0.130812036, abs=1e-8)
    # Three classes, the first the label: (1/2, 1/2) against (1/4, 3/4) among the other two.
    student = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[5.0, 1.0, 3.0]], dtype=torch.float64)
    teacher[0, 1:] = torch.tensor([0.25, 0.75]).log()
    got = dkd_loss(student, teacher, torch.tensor([0]), alpha=0.0, beta=1.0, temperature=1.0)
    assert got.item() == pytest.approx(0.130812036, abs=1e-7)


def test_zero_at_equality_linear_in_its_weights_and_positive():
    student, teacher, target = logits(6, 5, seed=1), logits(6, 5, seed=2), labels(6)
    assert dkd_loss(teacher + logits(6, 1, seed=3), teacher, target).item() == pytest.approx(0, abs=1e-12)
    first, second = (dkd_loss(student, teacher, target, *weights) for weights in ((1.0, 0.0), (0.0, 1.0)))
    assert min(first.item(), second.item()) > 1e-3
    torch.testing.assert_close(dkd_loss(student, teacher, target, 2.5, 0.5), 2.5 * first + 0.5 * second)


def test_the_second_part_does_not_see_the_labels_logit():
    student, teacher, target = logits(4, 5, seed=1), logits(4, 5, seed=2), torch.tensor([0, 3, 3, 1])
    expected = dkd_loss(student, teacher, target, alpha=0.0)
    student.requires_grad_()
    changed = student.scatter_add(1, target.unsqueeze(1), logits(4, 1, seed=3))
    loss = dkd_loss(changed, teacher.scatter(1, target.unsqueeze(1), -40.0), target, alpha=0.0)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert (student.grad.gather(1, target.unsqueeze(1)) == 0).all()


def test_gradcheck():
    student, teacher = logits(2, 4, 2, 3, seed=1, scale=1.0).requires_grad_(), logits(2, 4, 2, 3, seed=2, scale=1.0)
    target = torch.tensor([0, 1, VOID, UNLABELLED, 2, 3]).expand(2, 6).reshape(2, 2, 3)
    assert torch.autograd.gradcheck(lambda x: dkd_loss(x, teacher, target, 1.0, 2.0, 2.0), (student,))


@pytest.mark.parametrize("left_out", [VOID, UNLABELLED])
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e30])
def test_a_position_that_is_left_out_has_no_gradient_whatever_its_logits(poison, left_out):
    student, teacher, target = logits(2, 5, 3, 4, seed=1), logits(2, 5, 3, 4, seed=2), labels(2, 3, 4)
    target[:, 1] = left_out
    expected = dkd_loss(student, teacher, target)
    student[:, 0, 1], teacher[:, 3, 1] = poison, poison
    student.requires_grad_()
    loss = dkd_loss(student, teacher, target)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert (student.grad[:, :, 1] == 0).all()
    assert (student.grad[:, :, [0, 2]] != 0).all()


@pytest.mark.parametrize("left_out", [VOID, UNLABELLED])
def test_nothing_labelled_gives_zero_with_a_graph(left_out):
    student = logits(1, 3, 2, 2).requires_grad_()
    loss = dkd_loss(student, logits(1, 3, 2, 2, seed=1), torch.full((1, 2, 2), left_out))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_the_teacher_gets_no_gradient():
    student, teacher = logits(4, 5, seed=1).requires_grad_(), logits(4, 5, seed=2).requires_grad_()
    dkd_loss(student, teacher, labels(4)).backward()
    DKD()({"logits": student}, {"logits": teacher}, labels(4))["dkd"].backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.0, 1e4), (1e4, -1e4), (1e4, 1e4), (1e-6, 1e4)])
def test_half_precision_at_extreme_values(first, second, dtype, label):
    """One sample with one class; each network is constant but for one class of its own."""
    student, teacher = (torch.full((1, 3, 2, 2), value, dtype=dtype) for value in (first, second))
    student[:, 0], teacher[:, 1] = -first, 0
    student.requires_grad_()
    loss = dkd_loss(student, teacher, torch.full((1, 2, 2), label))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_half_precision_is_promoted_before_any_arithmetic():
    student, teacher, target = logits(4, 5, seed=1).bfloat16(), logits(4, 5, seed=2).bfloat16(), labels(4)
    expected = dkd_loss(student.double(), teacher.double(), target).float()
    torch.testing.assert_close(dkd_loss(student, teacher, target), expected)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\) \(student\) and \(2, 7\) \(teacher\).*number of classes"):
        dkd_loss(logits(2, 5), logits(2, 7), labels(2))
    with pytest.raises(ValueError, match="at least 2"):
        dkd_loss(logits(2, 1), logits(2, 1), labels(2, num_classes=1))


@pytest.mark.parametrize("shape", [(2, 4, 3), (2,), (2, 1, 3, 4)])
def test_a_target_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"target .* does not fit logits"):
        dkd_loss(logits(2, 5, 3, 4), logits(2, 5, 3, 4), torch.zeros(shape, dtype=torch.int64))


def test_no_target_is_refused():
    with pytest.raises(ValueError, match="DKD needs labels"):
        DKD()({"logits": logits(2, 5)}, {"logits": logits(2, 5)})


@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_weighs_the_function_and_resizes_logits_and_labels(resize):
    student, teacher, target = logits(1, 3, 8, 6, seed=1), logits(1, 3, 4, 9, seed=2), labels(1, 8, 6, num_classes=3)
    target[:, :3] = VOID
    dkd = DKD(loss_weight=0.5, alpha=2.0, beta=3.0, temperature=1.0, resize=resize, teacher_tap="cls.0")
    terms = dkd({"logits": student}, {"cls.0": teacher}, target)
    first, second = match_size(student, teacher, resize)
    expected = reference(first, second, resize_labels(target, first.shape[-2:]), 2.0, 3.0, 1.0)
    assert list(terms) == ["dkd"]
    assert terms["dkd"].item() == pytest.approx(0.5 * expected, rel=1e-9)


def test_a_classifiers_logits_and_another_void():
    student, teacher, target = logits(4, 5, seed=1), logits(4, 5, seed=2), torch.tensor([0, 3, 2, 1])
    got = DKD(ignore_index=3)({"logits": student}, {"logits": teacher}, target)["dkd"]
    assert got.item() == pytest.approx(reference(student, teacher, target.where(target != 3, VOID)), rel=1e-9)
