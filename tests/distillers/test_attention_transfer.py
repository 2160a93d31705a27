# SPDX-License-Identifier: Apache-2.0
"""AT against loops over positions and channels, a worked example and the properties of the formula."""

import math

import pytest
import torch

from kdlvfm.core.align import match_size, standardise
from kdlvfm.distillers import AT, attention_transfer_loss


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def attention(sample, power):
    """The unit vector over positions of one sample (C, H, W)."""
    columns = sample.flatten(1).T.tolist()
    strengths = [sum(abs(value) ** power for value in column) / len(column) for column in columns]
    return [strength / math.hypot(*strengths) for strength in strengths]


def reference(student, teacher, power=2):
    differences = []
    for first, second in zip(student, teacher, strict=True):
        pair = zip(attention(first, power), attention(second, power), strict=True)
        differences += [(a - b) ** 2 for a, b in pair]
    return sum(differences) / len(differences)


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 4, 5), (2, 1, 7)])
def test_function_against_loops(shape, power):
    student, teacher = maps(shape[0], 3, *shape[1:], seed=1), maps(shape[0], 5, *shape[1:], seed=2)
    expected = reference(student, teacher, power)
    assert attention_transfer_loss(student, teacher, power).item() == pytest.approx(expected, rel=1e-9)


def test_worked_example():
    """Two positions, each network at one of them: (1, 0) against (0, 1)."""
    student = torch.tensor([3.0, 0.0]).view(1, 1, 1, 2)
    teacher = torch.tensor([[0.0, 1.0], [0.0, -7.0]]).view(1, 2, 1, 2)
    assert attention_transfer_loss(student, teacher).item() == 1.0


def test_zero_at_equality_and_never_above_two_over_the_positions():
    teacher = maps(2, 3, 4, 5)
    assert attention_transfer_loss(teacher, teacher).item() == 0
    for seed in range(10):
        assert 1e-4 < attention_transfer_loss(maps(2, 3, 4, 5, seed=100 + seed), teacher).item() <= 2 / 20


def test_invariances():
    student, teacher = maps(2, 3, 4, 5, seed=1), maps(2, 6, 4, 5, seed=2)
    expected = attention_transfer_loss(student, teacher)
    per_sample = torch.tensor([2.0, 1e5], dtype=torch.float64).view(2, 1, 1, 1)
    torch.testing.assert_close(attention_transfer_loss(student * per_sample, teacher / per_sample), expected)
    signs = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(attention_transfer_loss((student * signs)[:, [2, 0, 1]], teacher), expected)
    rotation = torch.linalg.qr(maps(6, 6, seed=3)).Q
    rotated = torch.einsum("oc,bchw->bohw", rotation, teacher)
    torch.testing.assert_close(attention_transfer_loss(student, rotated), expected)
    by_sum = attention_transfer_loss(student, teacher, power=1).item()
    assert attention_transfer_loss(student, rotated, power=1).item() != pytest.approx(by_sum, rel=1e-3)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    pair = [x.flatten(2)[:, :, order].view(x.shape) for x in (student, teacher)]
    torch.testing.assert_close(attention_transfer_loss(*pair), expected)


def test_the_scale_of_a_position_matters():
    teacher = maps(1, 3, 2, 2)
    stronger = teacher * torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    assert attention_transfer_loss(stronger, teacher).item() > 0.01


@pytest.mark.parametrize("power", [2, 3])
def test_gradcheck(power):
    student, teacher = maps(2, 3, 2, 2, seed=1).requires_grad_(), maps(2, 4, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: attention_transfer_loss(x, teacher, power), (student,))


def test_the_teacher_gets_no_gradient():
    student, teacher = maps(1, 2, 3, 3, seed=1).requires_grad_(), maps(1, 4, 3, 3, seed=2).requires_grad_()
    attention_transfer_loss(student, teacher).backward()
    AT()({"map.-1": student}, {"map.-1": teacher})["attention_transfer"].backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.0, 1e4), (1e4, 0.0), (1e4, 1e4), (1e-6, 1e4)])
def test_half_precision_at_extreme_values(first, second, dtype, power):
    student = torch.full((1, 2, 3, 3), first, dtype=dtype, requires_grad=True)
    teacher = torch.full((1, 4, 3, 3), second, dtype=dtype)
    loss = attention_transfer_loss(student, teacher, power)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0 if (first > 0) == (second > 0) else 1 / 9, abs=1e-6)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_no_power_of_the_scale_leaves_the_range_of_floats(scale):
    student, teacher = maps(2, 3, 4, 4, seed=1), maps(2, 3, 4, 4, seed=2)
    got = attention_transfer_loss((student * scale).float(), teacher.float(), 3)
    torch.testing.assert_close(got, attention_transfer_loss(student, teacher, 3).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shapes", [((2, 3, 4, 4), (2, 3, 8, 8)), ((2, 3, 4, 4), (3, 3, 4, 4))])
def test_different_batch_or_size_is_refused(shapes):
    with pytest.raises(ValueError, match=r"one batch and size.*\(student\).*\(teacher\).*only the channels may differ"):
        attention_transfer_loss(*(maps(*shape) for shape in shapes))


def test_a_power_below_one_is_refused():
    with pytest.raises(ValueError, match="power must be at least 1, not 0"):
        attention_transfer_loss(maps(1, 1, 2, 2), maps(1, 1, 2, 2), power=0)


def test_taps_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match=r"\['map.0', 'map.1'\] and teacher_taps \['map.-1'\] must pair up"):
        AT(student_taps=["map.0", "map.1"])
    with pytest.raises(ValueError, match="at least one"):
        AT(student_taps=(), teacher_taps=())


def test_a_target_without_attention_is_refused():
    with pytest.raises(ValueError, match="after a layernorm"):
        AT(target="layernorm")


@pytest.mark.parametrize("target", ["raw", "standardize"])
@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_sums_weighs_resizes_and_normalises(resize, target):
    at = AT(student_taps=["map.0", "map.1"], teacher_taps=["map.5", "map.5"], resize=resize, target=target, power=1)
    student = {"map.0": maps(2, 3, 6, 8, seed=1), "map.1": maps(2, 4, 3, 2, seed=2)}
    teacher = maps(2, 5, 4, 4, seed=3)
    goal = standardise(teacher) if target == "standardize" else teacher
    expected = 1000 * sum(reference(*match_size(x, goal, resize), power=1) for x in student.values())
    assert (at.student_taps, at.teacher_taps) == (("map.0", "map.1"), ("map.5",))
    terms = at(student, {"map.5": teacher})
    assert list(terms) == ["attention_transfer"]
    assert terms["attention_transfer"].item() == pytest.approx(expected, rel=1e-9)


def test_an_outlier_channel_of_the_teacher_does_not_hide_the_others():
    student, teacher = {"map.-1": maps(2, 3, 4, 4, seed=1)}, maps(2, 5, 4, 4, seed=2)
    outlier = teacher * torch.tensor([1.0, 1e3, 1.0, 1.0, 1.0]).view(5, 1, 1) + 50
    got, expected = (AT()(student, {"map.-1": x})["attention_transfer"] for x in (outlier, teacher))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_the_weight_is_another_on_a_pyramid(context, detection_context):
    assert AT.from_context(context).loss_weight == AT().loss_weight == 1000.0
    assert AT.from_context(detection_context, student_taps=["fpn.0"], teacher_taps=["fpn.0"]).loss_weight == 10.0
    assert AT.from_context(detection_context, loss_weight=3.0).loss_weight == 3.0
