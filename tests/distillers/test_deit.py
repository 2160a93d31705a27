# SPDX-License-Identifier: Apache-2.0
"""DeiT against numpy, what a dense teacher says of a whole image, and students without the token."""

import math

import numpy as np
import pytest
import torch

from kdlvfm.core import TapError
from kdlvfm.distillers import DeiT, deit_loss


def logits(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def hard(student, teacher):
    return np.mean([-math.log(softmax(z)[t.argmax()]) for z, t in zip(student, teacher, strict=True)])


def soft(student, teacher, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * np.mean([(a * np.log(a / b)).sum() for a, b in zip(p, q, strict=True)])


@pytest.mark.parametrize("shape", [(1, 2), (4, 7)])
def test_function_against_numpy(shape):
    student, teacher = logits(*shape, seed=1, scale=3.0), logits(*shape, seed=2)
    assert deit_loss(student, teacher).item() == pytest.approx(hard(student.numpy(), teacher.numpy()), rel=1e-9)
    for temperature in (1.0, 3.0):
        found = deit_loss(student, teacher, "soft", temperature).item()
        assert found == pytest.approx(soft(student.numpy(), teacher.numpy(), temperature), rel=1e-9)


def test_a_dense_teacher_says_what_share_of_the_image_each_class_covers():
    teacher = logits(3, 5, 4, 6, seed=2, scale=4.0)
    student = logits(3, 5, seed=1)
    shares = np.stack([softmax(image.reshape(5, -1).T).mean(0) for image in teacher.numpy()])
    for labels, expected in (
        ("hard", hard(student.numpy(), shares)),
        ("soft", soft(student.numpy(), np.log(shares), 3.0)),
    ):
        assert deit_loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(
        deit_loss(student, teacher[:, :, :1, :1], "soft"), deit_loss(student, teacher[:, :, 0, 0], "soft")
    )


def test_worked_examples():
    half = torch.zeros(1, 2, dtype=torch.float64)
    quarters = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    assert deit_loss(half, quarters, "soft", 1.0).item() == pytest.approx(0.130812036, abs=1e-9)
    assert deit_loss(half, quarters).item() == pytest.approx(math.log(2))
    # Two thirds of the image are the second class, beyond doubt.
    teacher = torch.full((1, 2, 1, 3), -100.0, dtype=torch.float64)
    teacher[0, [0, 1, 1], 0, [0, 1, 2]] = 100.0
    expected = math.log(2) + math.log(1 / 3) / 3 + math.log(2 / 3) * 2 / 3
    assert deit_loss(half, teacher, "soft", 1.0).item() == pytest.approx(expected)


def test_hard_labels_know_the_first_choice_only_and_soft_ones_are_zero_at_equality():
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    assert torch.equal(deit_loss(student, teacher), deit_loss(student, 7 * teacher + 3))
    assert deit_loss(teacher, teacher).item() > 0
    assert deit_loss(teacher + 3, teacher, "soft").item() == pytest.approx(0, abs=1e-12)
    assert deit_loss(student, teacher, "soft").item() != deit_loss(student, 7 * teacher, "soft").item()


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2)])
def test_gradcheck(labels, shape):
    student, teacher = logits(3, 4, seed=1).requires_grad_(), logits(*shape, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: deit_loss(x, teacher.detach(), labels), (student,), raise_exception=True)
    deit_loss(student, teacher, labels).backward()
    assert (student.grad != 0).any()
    assert teacher.grad is None


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_half_precision_at_extreme_values(labels, dtype, batch):
    student = torch.full((batch, 3), 1e4, dtype=dtype)
    student[:, 0] = -1e4
    student.requires_grad_()
    for teacher in (torch.zeros(batch, 3, 4, 4, dtype=dtype), -1e4 * torch.eye(3, dtype=dtype)[:batch]):
        loss = DeiT(labels=labels)({"logits_distilled": student}, {"logits": teacher})["deit"]
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert student.grad.isfinite().all()


def test_logits_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) \(student\) and \(2, 4\) \(teacher\)"):
        deit_loss(logits(2, 3), logits(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"must be \(B, K\)"):
        deit_loss(logits(2, 3, 8, 8), logits(2, 3, 8, 8))
    for call in (lambda: deit_loss(logits(2, 3), logits(2, 3), "firm"), lambda: DeiT(labels="firm")):
        with pytest.raises(ValueError, match="labels must be 'hard' or 'soft'"):
            call()


def test_the_class_weighs_the_function():
    student, teacher = {"logits_distilled": logits(2, 3, seed=1)}, {"logits": logits(2, 3, 4, 4, seed=2)}
    terms = DeiT(loss_weight=2.0, labels="soft", temperature=2.0)(student, teacher)
    assert list(terms) == ["deit"]
    expected = deit_loss(student["logits_distilled"], teacher["logits"], "soft", 2.0)
    torch.testing.assert_close(terms["deit"], 2 * expected)


def test_from_context_needs_the_token_and_the_teachers_classes(context, toy_model):
    assert DeiT.from_context(context, labels="soft").student_taps == ("logits_distilled",)
    headless = type(context)(toy_model(num_classes=0), context.teacher, context.task, 5, 12)
    with pytest.raises(TapError, match=r"needs a student with a distillation token.*toy has no tap.*deit_tiny_dist"):
        DeiT.from_context(headless)
    other = type(context)(toy_model(num_classes=7), context.teacher, context.task, 5, 12)
    with pytest.raises(ValueError, match=r"7 classes apart and the teacher 5: .*num_classes=5"):
        DeiT.from_context(other)
    with pytest.raises(TapError, match=r"Did you mean"):
        DeiT.from_context(context, teacher_tap="logit")
    with pytest.raises(ValueError, match="needs a teacher"):
        DeiT.from_context(type(context)(context.student, None, context.task, 5, 12))
