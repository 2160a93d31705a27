# SPDX-License-Identifier: Apache-2.0
"""OFA against loops over positions in plain Python, worked examples, and the projectors of the stages."""

import math

import pytest
import torch

from kdlvfm.core import TapError
from kdlvfm.core.align import match_size, resize_labels
from kdlvfm.distillers import OFA, kd_loss, ofa_loss

VOID, UNLABELLED = 255, -1


def logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(*shape, num_classes=5, seed=0):
    return torch.randint(0, num_classes, shape, generator=torch.Generator().manual_seed(seed))


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def reference(student, teacher, target, epsilon=1.0):
    """The mean over labelled samples or positions, one at a time."""
    rows = [x.detach().movedim(1, -1).reshape(-1, x.shape[1]).tolist() for x in (student, teacher)]
    losses = []
    for first, second, label in zip(*rows, target.flatten().tolist(), strict=True):
        if label in (VOID, UNLABELLED):
            continue
        loss = 0.0
        for k, (q, p) in enumerate(zip(softmax(first), softmax(second), strict=True)):
            weight = (p + 1) ** epsilon - 1 if k == label else p**epsilon
            loss -= weight * math.log(q)
        losses.append(loss)
    return sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("shape", [(6, 5), (1, 2), (2, 7, 3, 4)])
def test_against_loops(shape, epsilon):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    target = labels(shape[0], *shape[2:], num_classes=shape[1])
    expected = reference(student, teacher, target, epsilon)
    assert ofa_loss(student, teacher, target, epsilon).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("epsilon", [1.0, 1.5])
def test_masked_mean_against_loops(epsilon):
    student, teacher = logits(2, 5, 3, 4, seed=3), logits(2, 5, 3, 4, seed=4)
    target = torch.tensor([0, 2, 4, VOID, UNLABELLED, 1]).repeat(4).view(2, 3, 4)
    expected = reference(student, teacher, target, epsilon)
    assert ofa_loss(student, teacher, target, epsilon).item() == pytest.approx(expected, rel=1e-9)
    renamed = target.where(target != VOID, 7)
    got = ofa_loss(student, teacher, renamed, epsilon, ignore_index=7)
    assert got.item() == pytest.approx(expected, rel=1e-9)


def test_worked_examples():
    """A student that knows nothing: ln 2 whatever the teacher; with epsilon 2, (1.25^2 - 1 + 0.75^2) ln 2."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    target = torch.tensor([0])
    assert ofa_loss(student, teacher, target).item() == pytest.approx(math.log(2), rel=1e-12)
    assert ofa_loss(student, teacher, target, 2.0).item() == pytest.approx(1.125 * math.log(2), rel=1e-12)


def test_epsilon_one_is_kd_and_the_teachers_entropy_whatever_the_labels():
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    for seed in range(3):
        target = labels(6, seed=seed)
        torch.testing.assert_close(ofa_loss(student, teacher, target), kd_loss(student, teacher, 1.0) + entropy)
        torch.testing.assert_close(ofa_loss(teacher, teacher, target), entropy)


def test_a_larger_epsilon_favours_the_label():
    """The gradient of the label's logit grows in size, as a share of that of all."""
    teacher, target = logits(6, 5, seed=2, scale=1.0), labels(6)
    shares = []
    for epsilon in (0.5, 1.0, 1.5):
        student = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
        ofa_loss(student, teacher, target, epsilon).backward()
        shares.append((student.grad.gather(1, target.unsqueeze(1)).sum() / student.grad.abs().sum()).item())
    assert shares[0] > shares[1] > shares[2]


def test_a_shift_of_either_networks_logits_changes_nothing():
    student, teacher, target = logits(2, 5, 3, 4, seed=1), logits(2, 5, 3, 4, seed=2), labels(2, 3, 4)
    shift = logits(2, 1, 3, 4, seed=3)
    torch.testing.assert_close(
        ofa_loss(student + shift, teacher - shift, target, 1.5), ofa_loss(student, teacher, target, 1.5)
    )


def test_gradcheck():
    student, teacher = logits(2, 4, 2, 3, seed=1, scale=1.0).requires_grad_(), logits(2, 4, 2, 3, seed=2, scale=1.0)
    target = torch.tensor([0, 1, VOID, UNLABELLED, 2, 3]).expand(2, 6).reshape(2, 2, 3)
    assert torch.autograd.gradcheck(lambda x: ofa_loss(x, teacher, target, 1.5), (student,))


@pytest.mark.parametrize("left_out", [VOID, UNLABELLED])
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e30])
def test_a_position_that_is_left_out_has_no_gradient_whatever_its_logits(poison, left_out):
    student, teacher, target = logits(2, 5, 3, 4, seed=1), logits(2, 5, 3, 4, seed=2), labels(2, 3, 4)
    target[:, 1] = left_out
    expected = ofa_loss(student, teacher, target, 1.5)
    student[:, 0, 1], teacher[:, 3, 1] = poison, poison
    student.requires_grad_()
    loss = ofa_loss(student, teacher, target, 1.5)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert (student.grad[:, :, 1] == 0).all()
    assert (student.grad[:, :, [0, 2]] != 0).all()


@pytest.mark.parametrize("left_out", [VOID, UNLABELLED])
def test_nothing_labelled_gives_zero_with_a_graph(left_out):
    student = logits(1, 3, 2, 2).requires_grad_()
    loss = ofa_loss(student, logits(1, 3, 2, 2, seed=1), torch.full((1, 2, 2), left_out))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.0, 1e4), (1e4, -1e4), (1e4, 1e4), (1e-6, 1e4)])
def test_half_precision_at_extreme_values(first, second, dtype, label):
    """One sample with one class; each network is constant but for one class of its own."""
    student, teacher = (torch.full((1, 3, 2, 2), value, dtype=dtype) for value in (first, second))
    student[:, 0], teacher[:, 1] = -first, 0
    student.requires_grad_()
    loss = ofa_loss(student, teacher, torch.full((1, 2, 2), label), 1.5)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_half_precision_is_promoted_before_any_arithmetic():
    student, teacher, target = logits(4, 5, seed=1).bfloat16(), logits(4, 5, seed=2).bfloat16(), labels(4)
    expected = ofa_loss(student.double(), teacher.double(), target).float()
    torch.testing.assert_close(ofa_loss(student, teacher, target), expected)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\) \(student\) and \(2, 7\) \(teacher\).*number of classes"):
        ofa_loss(logits(2, 5), logits(2, 7), labels(2))
    with pytest.raises(ValueError, match=r"target \(2,\) does not fit logits"):
        ofa_loss(logits(2, 5, 3, 4), logits(2, 5, 3, 4), labels(2))
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        ofa_loss(logits(2, 5), logits(2, 5), labels(2), epsilon=-1.0)
    with pytest.raises(RuntimeError, match="out of bounds"):
        ofa_loss(logits(2, 5), logits(2, 5), torch.tensor([0, 5]))


def test_wrong_arguments_of_the_class_are_refused():
    with pytest.raises(ValueError, match="one number or 2, for each stage and the logits, not 3"):
        OFA({"map.0": 4}, 3, epsilon=[1.0, 1.0, 1.5])
    for stages in ({}, {"logits": 3}):
        with pytest.raises(ValueError, match="at least one map, and not 'logits'"):
            OFA(stages, 3)
    with pytest.raises(ValueError, match="OFA needs labels"):
        OFA({"map.0": 4}, 3)({"map.0": logits(2, 4, 3, 3), "logits": logits(2, 3)}, {"logits": logits(2, 3)})


@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_class_compares_each_stage_and_the_logits(resize):
    ofa = OFA({"map.0": 4, "map.1": 6}, 3, loss_weight=2.0, stage_weight=0.5, epsilon=[1.0, 1.2, 1.5], resize=resize)
    ofa = ofa.double().eval()
    student = {"map.0": logits(2, 4, 4, 6, seed=1), "map.1": logits(2, 6, 2, 3, seed=2)}
    student["logits"] = logits(2, 3, 8, 12, seed=3)
    teacher, target = logits(2, 3, 8, 12, seed=4), labels(2, 8, 12, num_classes=3)
    target[:, :2], target[1, 4:] = VOID, UNLABELLED

    def compare(found, epsilon):
        first, second = match_size(found, teacher, resize)
        return reference(first, second, resize_labels(target, first.shape[-2:]), epsilon)

    stages = [projector(student[tap]) for tap, projector in zip(("map.0", "map.1"), ofa.projectors, strict=True)]
    assert [tuple(found.shape) for found in stages] == [(2, 3, 4, 6), (2, 3, 2, 3)]
    terms = ofa(student, {"logits": teacher}, target)
    assert list(terms) == ["ofa", "ofa_stages"]
    assert terms["ofa"].item() == pytest.approx(2 * compare(student["logits"], 1.5), rel=1e-9)
    expected = 0.5 * (compare(stages[0], 1.0) + compare(stages[1], 1.2))
    assert terms["ofa_stages"].item() == pytest.approx(expected, rel=1e-9)


def test_a_classifiers_stages_are_averaged_over_positions():
    ofa = OFA({"map.-1": 6}, 3).double().eval()
    student, teacher = {"map.-1": logits(4, 6, 3, 2, seed=1), "logits": logits(4, 3, seed=2)}, logits(4, 3, seed=3)
    target = labels(4, num_classes=3)
    terms = ofa(student, {"logits": teacher}, target)
    stage = ofa.projectors[0](student["map.-1"]).flatten(2).mean(2)
    assert terms["ofa"].item() == pytest.approx(reference(student["logits"], teacher, target), rel=1e-9)
    assert terms["ofa_stages"].item() == pytest.approx(reference(stage, teacher, target), rel=1e-9)


def test_stages_and_projectors_get_a_gradient_and_the_teacher_none():
    ofa = OFA({"map.0": 4, "map.1": 6}, 3).double()
    student = {"map.0": logits(2, 4, 4, 6, seed=1), "map.1": logits(2, 6, 2, 3, seed=2), "logits": logits(2, 3, 8, 12)}
    teacher = logits(2, 3, 8, 12, seed=4).requires_grad_()
    for value in student.values():
        value.requires_grad_()
    sum(ofa(student, {"logits": teacher}, labels(2, 8, 12, num_classes=3)).values()).backward()
    assert teacher.grad is None
    assert all((value.grad != 0).any() for value in student.values())
    assert all((parameter.grad != 0).any() for parameter in ofa.parameters())


def test_from_context_takes_the_last_four_maps_or_those_named(context):
    ofa = OFA.from_context(context)
    assert ofa.student_taps == ("map.0", "map.1", "map.2", "logits")
    assert [projector[0].in_channels for projector in ofa.projectors] == [4, 6, 8]
    assert {projector[-1].out_channels for projector in ofa.projectors} == {5}
    ofa = OFA.from_context(context, stage_taps=["map.-1"], epsilon=1.5)
    assert ofa.student_taps == ("map.-1", "logits")
    assert ofa.epsilons == (1.5, 1.5)
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        OFA.from_context(context, stage_taps=["map.3"])
