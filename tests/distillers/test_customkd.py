# SPDX-License-Identifier: Apache-2.0
"""CustomKD against numpy, its two phases, and what each of them leaves as it was."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import TapError
from kdlvfm.core.phi_s import PHISTransform
from kdlvfm.distillers import CustomKD


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def linear(conv, x):
    """A 1x1 convolution in numpy."""
    weight, bias = conv.weight.detach().numpy()[:, :, 0, 0], conv.bias.detach().numpy()
    return np.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None]


def standardised(x):
    return (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)


def state(*networks):
    return copy.deepcopy([network.state_dict() for network in networks])


def equal(before, after):
    return all(torch.equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in a)


def take(distiller, step, rate=0.1):
    """One optimizer step of every update; the groups that moved."""
    groups = distiller.parameter_groups(step.student)
    moved = []
    for update in distiller.updates(step):
        sum(update.terms.values()).backward()
        with torch.no_grad():
            for parameter in groups[update.group]:
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        for network in (step.student, distiller):
            network.zero_grad()
        moved.append(update.group)
    return moved


def test_terms_against_numpy():
    customkd = CustomKD([3], [5], general_weight=2.0, specific_weight=3.0).double()
    student, teacher = maps(2, 3, 4, 6, seed=1), maps(2, 5, 4, 6, seed=2, scale=40.0) + 7
    goal = standardised(teacher.numpy())
    terms = customkd({"decoder": student}, {"map.-1": teacher})
    general = np.mean((linear(customkd.projectors[0], student.numpy()) - goal) ** 2)
    specific = np.mean((student.numpy() - linear(customkd.customisers[0], goal)) ** 2)
    assert list(terms) == ["customkd_general", "customkd_specific"]
    assert terms["customkd_general"].item() == pytest.approx(2 * general, rel=1e-9)
    assert terms["customkd_specific"].item() == pytest.approx(3 * specific, rel=1e-9)


@pytest.mark.parametrize(("resize", "grid"), [("student", (2, 3)), ("teacher", (4, 6)), ([5, 5], (5, 5))])
def test_each_term_has_the_grid_of_one_network(resize, grid):
    customkd = CustomKD([3], [5], target="raw", resize=resize).double()
    student, teacher = maps(2, 3, 4, 6, seed=1), maps(2, 5, 2, 3, seed=2)
    onto = {
        size: F.interpolate(teacher, size=size, mode="bilinear", align_corners=False) for size in ((4, 6), (5, 5))
    } | {(2, 3): teacher}
    projected = torch.from_numpy(linear(customkd.projectors[0], student.numpy()))
    shrinks = grid != (4, 6)
    if grid != (4, 6):
        projected = F.interpolate(projected, size=grid, mode="bilinear", align_corners=False, antialias=shrinks)
    general = np.mean((projected - onto[grid]).numpy() ** 2)
    specific = np.mean((student.numpy() - linear(customkd.customisers[0], onto[4, 6].numpy())) ** 2)
    terms = customkd({"decoder": student}, {"map.-1": teacher})
    assert terms["customkd_general"].item() == pytest.approx(general, rel=1e-9)
    assert terms["customkd_specific"].item() == pytest.approx(specific, rel=1e-9)


def test_a_student_that_is_where_the_teacher_was_brought_has_nothing_to_learn_of_the_task():
    customkd = CustomKD([3], [5], target="layernorm").double()
    teacher = maps(2, 5, 4, 6, seed=2)
    with torch.no_grad():
        student = customkd.customisers[0](customkd.targets[0](teacher))
    terms = customkd({"decoder": student}, {"map.-1": teacher})
    assert terms["customkd_specific"].item() == 0
    assert terms["customkd_general"].item() > 0


def test_gradcheck():
    customkd = CustomKD([2], [3]).double()
    student, teacher = maps(2, 2, 2, 2, seed=1).requires_grad_(), maps(2, 3, 3, 2, seed=2)
    assert torch.autograd.gradcheck(
        lambda x: tuple(customkd({"decoder": x}, {"map.-1": teacher}).values()), (student,), raise_exception=True
    )


def test_student_and_projector_get_a_gradient_teacher_and_customiser_none():
    customkd = CustomKD([3], [5]).double()
    student, teacher = maps(2, 3, 4, 4, seed=1).requires_grad_(), maps(2, 5, 2, 2, seed=2).requires_grad_()
    for term in customkd({"decoder": student}, {"map.-1": teacher}).values():
        student.grad = None
        term.backward()
        assert (student.grad != 0).any()
    assert all((parameter.grad != 0).any() for parameter in customkd.projectors[0].parameters())
    assert all(parameter.grad is None for parameter in customkd.customisers[0].parameters())
    assert teacher.grad is None


def test_customisation_is_the_task_through_the_students_head(make_step, context, student, teacher, batch):
    customkd = CustomKD.from_context(context)
    (update,) = customkd.updates(make_step())
    with torch.no_grad():
        goal = standardised(teacher(batch["image"], ["map.-1"])["map.-1"].numpy())
    coarse = linear(student.net["head"], linear(customkd.customisers[0], goal))
    logits = F.interpolate(torch.from_numpy(coarse), batch["mask"].shape[1:], mode="bilinear").double()
    losses = [
        logits[b, :, row, column].logsumexp(0) - logits[b, label, row, column]
        for (b, row, column), label in np.ndenumerate(batch["mask"].numpy())
        if label not in (255, -1)
    ]
    assert update.group == "customiser"
    assert set(update.task_terms) == set(update.terms) == {"cross_entropy"}
    assert update.terms["cross_entropy"].item() == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("customiser", ["linear", "conv_bn"])
def test_customisation_moves_the_customiser_and_nothing_else(make_step, context, student, teacher, customiser):
    """The student is in training mode, so its batch norms would move if they were not frozen too."""
    customkd = CustomKD.from_context(context, customiser=customiser)
    student.net["head"] = torch.nn.Sequential(torch.nn.BatchNorm2d(16), student.net["head"])
    student.train()
    student.net["stages"][0].eval()
    modes = [module.training for module in student.modules()]
    before = state(student, customkd.projectors[0], teacher.model)
    customised = state(customkd.customisers[0])
    (update,) = customkd.updates(make_step())
    assert [module.training for module in student.modules()] == modes
    assert all(parameter.requires_grad for parameter in student.parameters())
    sum(update.terms.values()).backward()
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all((parameter.grad != 0).any() for parameter in customkd.customisers[0].parameters() if parameter.dim() > 1)
    assert take(customkd, make_step()) == ["customiser"]
    assert equal(before, state(student, customkd.projectors[0], teacher.model))
    assert not equal(customised, state(customkd.customisers[0]))


@pytest.mark.parametrize("customiser", ["linear", "conv_bn"])
def test_distillation_leaves_customiser_and_teacher_as_they_were(make_step, context, student, teacher, customiser):
    customkd = CustomKD.from_context(context, customiser=customiser)
    before, moving = state(customkd.customisers[0], teacher.model), state(student, customkd.projectors[0])
    assert take(customkd, make_step(epoch=1)) == ["student"]
    assert equal(before, state(customkd.customisers[0], teacher.model))
    for was, now in zip(moving, state(student, customkd.projectors[0]), strict=True):
        assert not any(torch.equal(was[key], now[key]) for key in was if was[key].dim() > 1 or "running" in key)
    assert customkd.customisers[0].training
    assert all(parameter.requires_grad for parameter in customkd.customisers[0].parameters())


def test_distillation_is_the_task_and_the_two_terms(make_step, context):
    customkd = CustomKD.from_context(context)
    (update,) = customkd.updates(make_step(epoch=1))
    assert list(update.terms) == ["cross_entropy", "customkd_general", "customkd_specific"]
    assert list(update.distillation) == ["customkd_general", "customkd_specific"]
    for off, left in (("general_weight", "customkd_specific"), ("specific_weight", "customkd_general")):
        (update,) = CustomKD.from_context(context, **{off: 0}).updates(make_step(epoch=1))
        assert list(update.distillation) == [left]


def test_phases_take_turns_by_epoch_or_by_steps(make_step, context):
    def groups(customkd, **position):
        return [update.group for update in customkd.updates(make_step(**position))]

    by_epoch = CustomKD.from_context(context)
    assert [groups(by_epoch, epoch=epoch, batch=9, number=7) for epoch in range(4)] == [
        ["customiser"],
        ["student"],
        ["customiser"],
        ["student"],
    ]
    by_steps = CustomKD.from_context(context, phase_steps=3)
    turns = [groups(by_steps, epoch=number // 2, batch=number % 2, number=number) for number in range(9)]
    assert turns == [["customiser"]] * 3 + [["student"]] * 3 + [["customiser"]] * 3


def test_customisation_teaches_the_head_to_read_the_teacher(make_step, context):
    torch.manual_seed(0)
    customkd = CustomKD.from_context(context)
    step = make_step(target=torch.full((4, 24, 32), 2))
    losses = []
    for _ in range(30):
        (update,) = customkd.updates(step)
        losses.append(update.terms["cross_entropy"].item())
        take(customkd, step)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2


def test_unlabelled_images_train_the_student_and_not_the_customiser(make_step, context, batch):
    customkd = CustomKD.from_context(context)
    batch["mask"][1:] = -1
    step = make_step()
    (update,) = customkd.updates(step)
    features = step.teacher_features(["map.-1"])["map.-1"]
    assert features.shape[0] == 4
    logits = step.student.apply_head({"decoder": customkd.customisers[0](customkd.targets[0](features))}, (24, 32))[
        "logits"
    ]
    known = batch["mask"][:1]
    expected = F.cross_entropy(logits[:1], known, ignore_index=255)
    torch.testing.assert_close(update.terms["cross_entropy"], expected)
    (update,) = customkd.updates(make_step(epoch=1))
    assert all(term.isfinite() and term > 0 for term in update.distillation.values())


def test_phi_s_sees_each_step_once(make_step, context):
    customkd = CustomKD.from_context(context, target="phi_s")
    take(customkd, make_step())
    take(customkd, make_step(epoch=1))
    assert isinstance(customkd.targets[0].phi_s, PHISTransform)
    assert int(customkd.targets[0].seen) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_autocast_at_extreme_values(dtype, batch_size, value):
    customkd = CustomKD([3], [5])
    student = torch.full((batch_size, 3, 4, 4), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        terms = customkd({"decoder": student}, {"map.-1": torch.full((batch_size, 5, 2, 2), -value, dtype=dtype)})
    sum(terms.values()).backward()
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert student.grad.isfinite().all()
    # What half precision cannot hold is the sum over the batch in the gradient of a weight, which loss scaling is for.
    assert dtype == torch.float16 or all(p.grad.isfinite().all() for p in customkd.projectors[0].parameters())


def test_wrong_options_are_refused_when_built():
    with pytest.raises(ValueError, match="phase_steps must be at least 1"):
        CustomKD([3], [5], phase_steps=0)
    with pytest.raises(ValueError, match="resize must be"):
        CustomKD([3], [5], resize="smaller")
    with pytest.raises(ValueError, match="projector must be"):
        CustomKD([3], [5], customiser="magic")


def test_from_context_reads_both_dimensions_and_what_the_head_reads(context, toy_model, make_step):
    customkd = CustomKD.from_context(context)
    assert customkd.projectors[0].weight.shape == (12, 16, 1, 1)
    assert customkd.customisers[0].weight.shape == (16, 12, 1, 1)
    with pytest.raises(ValueError, match=r"head of toy does not read map\.-1: set student_taps to decoder"):
        CustomKD.from_context(context, student_taps=["map.-1"])
    headless = toy_model(num_classes=0)
    with pytest.raises(ValueError, match=r"head of toy does not read decoder: use a student whose head does"):
        CustomKD.from_context(type(context)(headless, context.teacher, context.task, 5, 12))
    with pytest.raises(TapError, match=r"no tap .map\.7"):
        CustomKD.from_context(context, teacher_taps=["map.7"])
    assert math.prod(CustomKD.from_context(context, projector="mlp").projectors[0][0].weight.shape) == 12 * 16


@pytest.mark.parametrize(
    ("steps", "epoch", "given", "expected"),
    [(100, 500, {}, 10), (100, 4, {}, 4), (5, 9, {}, 1), (100, 9, {"phase_steps": 7}, 7)],
)
def test_a_short_run_still_has_both_phases(context, steps, epoch, given, expected):
    run = replace(context, steps=steps, batches_per_epoch=epoch)
    assert CustomKD.from_context(run, **given).phase_steps == expected
    assert CustomKD.from_context(context).phase_steps is None


def test_a_head_that_predicts_otherwise_out_of_training_stays_in_training(make_step, context, student):
    """Its layers do not: their statistics must not move."""
    customkd = CustomKD.from_context(context)
    student.net["head"] = torch.nn.Sequential(torch.nn.BatchNorm2d(16), student.net["head"])
    student.train()
    modes = []
    student.net["head"].register_forward_hook(lambda head, *_: modes.append((head.training, head[0].training)))
    next(iter(customkd.updates(make_step())))
    assert modes == [(True, False)]
    assert student.net["head"][0].training
