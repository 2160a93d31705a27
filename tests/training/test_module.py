# SPDX-License-Identifier: Apache-2.0
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kdlvfm.core import Distiller, Update
from kdlvfm.distillers import KD, Baseline
from kdlvfm.distillers.kd import kd_loss
from kdlvfm.training.callbacks import NonFiniteLossError
from kdlvfm.training.module import seed_generators
from kdlvfm.training.optimizers import Plans, cosine


def batches(data):
    return [(batch["image"], batch["mask"]) for batch in data.train_dataloader()]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def moved(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


class TwoGroups(Distiller):
    """The student's weights in turns with a bias added to its logits: batches of even number train the student."""

    def __init__(self, turns=("student", "bias")):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))
        self._turns = turns
        self.seen = []

    def forward(self, student, teacher, target=None):
        return {"bias": F.cross_entropy(student["logits"] + self.bias, target)}

    def parameter_groups(self, student):
        return {"student": list(student.parameters()), "bias": [self.bias]}

    def updates(self, step):
        group = self._turns[step.batch % len(self._turns)]
        yield Update(self(step.student(step.images, ["logits"]), {}, step.target), group)
        self.seen.append(((step.epoch, step.batch, step.number), self.bias.detach().clone()))


class TwiceABatch(TwoGroups):
    """Each batch trains the bias, then the student."""

    def updates(self, step):
        for group in ("bias", "student"):
            yield Update(self(step.student(step.images, ["logits"]), {}, step.target), group)


def test_distillation_equals_a_plain_loop_bit_by_bit(make_module, make_data, make_plan, run_fit, weights_of):
    module = make_module(plans=Plans(make_plan(schedule=cosine, warmup_steps=2)))
    student, teacher = copy.deepcopy(module.student.net), copy.deepcopy(module.teacher.model.net)
    run_fit(module, make_data())

    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for step, (images, masks) in enumerate(batches(make_data())):
        with torch.no_grad():
            teachers = teacher(images - 0.5)
        logits = student(images - 0.5)
        loss = F.cross_entropy(logits, masks, reduction="sum") / masks.numel()
        loss = torch.stack([loss, kd_loss(logits, teachers, 2.0, masks, 255)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.1 * ((step + 1) / 3 if step < 2 else cosine((step - 2) / 4))
        optimizer.step()
    assert_same(weights_of(module), {f"net.{name}": value for name, value in student.state_dict().items()})


def test_accumulating_two_batches_equals_one_of_double_size(make_module, make_data, run_fit, weights_of, monkeypatch):
    one = make_module(steps=3)
    run_fit(one, make_data(steps=3, batch_size=8), "whole")
    other, data = make_module(steps=6, accumulate=2), make_data()
    parts = [part for batch in make_data(steps=3, batch_size=8).train_dataloader() for part in halves(batch)]
    monkeypatch.setattr(data, "train_dataloader", lambda: DataLoader(parts, batch_size=None))
    run_fit(other, data, "halves")
    for name, value in weights_of(one).items():
        torch.testing.assert_close(weights_of(other)[name], value, rtol=1e-5, atol=1e-6)


def halves(batch):
    return [{key: value[part] for key, value in batch.items()} for part in (slice(0, 4), slice(4, 8))]


def test_a_window_that_the_end_cuts_short_is_a_mean_too(make_module, make_data, run_fit, weights_of):
    # Three batches, two in a window: the third moves the student alone and in full.
    accumulated = make_module(steps=3, accumulate=2)
    run_fit(accumulated, make_data(steps=3), "accumulated")

    student = make_module().student.net
    teacher = make_module().teacher.model.net
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    parts = batches(make_data(steps=3))
    for window in (parts[:2], parts[2:]):
        optimizer.zero_grad()
        for images, masks in window:
            logits = student(images - 0.5)
            loss = F.cross_entropy(logits, masks) + kd_loss(logits, teacher(images - 0.5), 2.0)
            (loss / len(window)).backward()
        optimizer.step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(weights_of(accumulated)[f"net.{name}"], value, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_move(make_module, make_data, make_plan, run_fit, weights_of):
    sgd = partial(torch.optim.SGD, lr=1.0)
    for clip_norm, bound in ((1e-3, 1e-3), (None, None)):
        module = make_module(steps=1, plans=Plans(make_plan(optimizer=sgd, clip_norm=clip_norm)))
        before = weights_of(module)
        run_fit(module, make_data(steps=1), f"clip-{clip_norm}")
        norm = torch.cat([(before[name] - value).flatten() for name, value in weights_of(module).items()]).norm()
        if bound is None:
            assert norm > 1e-2
        else:
            assert norm == pytest.approx(bound, rel=1e-3)


def test_an_update_moves_its_own_group_only(make_module, make_data, run_fit, weights_of):
    distiller = TwoGroups()
    module = make_module(steps=1, distiller=distiller)
    before = weights_of(module)
    run_fit(module, make_data(steps=1), "one")
    assert len(moved(before, weights_of(module))) == 4
    assert not distiller.bias.any()

    distiller = TwoGroups(turns=("bias",))
    module = make_module(steps=1, distiller=distiller)
    before = weights_of(module)
    run_fit(module, make_data(steps=1), "other")
    assert moved(before, weights_of(module)) == []
    assert distiller.bias.all()


def test_a_phase_sees_epoch_and_batch_and_code_after_the_yield_sees_the_step_taken(make_module, make_data, run_fit):
    distiller = TwoGroups(turns=("bias", "student"))
    run_fit(make_module(steps=5, distiller=distiller), make_data(steps=5))
    assert [place for place, _ in distiller.seen] == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 3), (1, 1, 4)]
    biases = [bias for _, bias in distiller.seen]
    assert biases[0].any()
    assert torch.equal(biases[0], biases[1])
    assert not torch.equal(biases[1], biases[2])


@pytest.mark.parametrize("method", [TwoGroups, TwiceABatch])
def test_accumulation_is_each_groups_own(method, make_module, make_data, run_fit, weights_of):
    steps = 8
    distiller = method()
    module = make_module(steps=steps, distiller=distiller, accumulate=2, batches_per_epoch=4)
    run_fit(module, make_data(steps=steps))

    student, bias = make_module().student.net, torch.zeros(3, 1, 1, requires_grad=True)
    groups = {"student": list(student.parameters()), "bias": [bias]}
    optimizers = {name: torch.optim.SGD(group, lr=0.1, momentum=0.9) for name, group in groups.items()}
    sums, counts = {"student": [0] * 4, "bias": [0]}, {"student": 0, "bias": 0}
    for number, (images, masks) in enumerate(batches(make_data(steps=steps))):
        turns = ("student", "bias")[number % 2 :][:1] if method is TwoGroups else ("bias", "student")
        for name in turns:
            loss = F.cross_entropy(student(images - 0.5) + bias, masks)
            gradients = torch.autograd.grad(loss, groups[name])
            sums[name] = [total + gradient for total, gradient in zip(sums[name], gradients, strict=True)]
            counts[name] += 1
            if counts[name] == 2:
                for parameter, total in zip(groups[name], sums[name], strict=True):
                    parameter.grad = total / 2
                optimizers[name].step()
                sums[name], counts[name] = [0] * len(groups[name]), 0
    assert distiller.bias.any()
    torch.testing.assert_close(distiller.bias.detach(), bias.detach(), rtol=1e-5, atol=1e-6)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(weights_of(module)[f"net.{name}"], value, rtol=1e-5, atol=1e-6)


def test_groups_have_their_own_optimizers_and_schedules(make_module, make_data, make_plan, run_fit, weights_of):
    still = make_plan(optimizer=partial(torch.optim.SGD, lr=0.0))
    distiller = TwiceABatch()
    module = make_module(steps=2, distiller=distiller, plans=Plans(make_plan(), {"bias": still}))
    before = weights_of(module)
    run_fit(module, make_data(steps=2))
    assert not distiller.bias.any()
    assert moved(before, weights_of(module))


def test_the_learning_rate_follows_the_schedule(make_module, make_data, make_plan, run_fit):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    plan = make_plan(optimizer=partial(Watched, lr=0.1), schedule=cosine, warmup_steps=2)
    module = make_module(plans=Plans(plan))
    rates.clear()
    run_fit(module, make_data())
    assert rates == pytest.approx([0.1 * plan.factor(step, 6) for step in range(6)])


def test_the_state_dict_holds_student_and_distiller_and_no_teacher(make_module):
    keys = make_module(distiller=TwoGroups()).state_dict()
    assert {key.split(".")[0] for key in keys} == {"student", "distiller"}
    module = make_module()
    module.to(torch.float64)
    assert module.teacher.model.net[0].weight.dtype == torch.float64  # not saved, yet it moves along


def test_a_distiller_that_taps_no_teacher_does_not_hold_one(make_module):
    assert make_module(distiller=Baseline()).teacher is None


def test_bf16_trains_with_finite_weights_of_float32(make_module, make_data, run_fit, weights_of):
    module = make_module()
    before = weights_of(module)
    run_fit(module, make_data(), trainer={"precision": "bf16-mixed"})
    after = weights_of(module)
    assert len(moved(before, after)) == 4
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("steps", [3, 25], ids=["found at the end", "found on the way"])
def test_a_loss_that_is_no_number_stops_the_run(steps, make_module, make_data, make_plan, run_fit):
    exploding = make_plan(optimizer=partial(torch.optim.SGD, lr=1e30))
    module = make_module(steps=steps, plans=Plans(exploding))
    with pytest.raises(NonFiniteLossError, match=r"not finite at step \d+ .*lower the learning rate"):
        run_fit(module, make_data(steps=steps))
    assert module.completed == min(steps, 20)


def test_frozen_parts_stay_as_they_are(make_module, make_data, run_fit):
    class Frozen(type(make_module().student)):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.norm.requires_grad_(False).eval()

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, images, taps):
            return super().forward(self.norm(images), taps)

    student = Frozen()
    before = copy.deepcopy(student.norm.state_dict())
    run_fit(make_module(student=student), make_data(), val_every=2)
    assert_same(before, student.norm.state_dict())
    assert student.training
    assert not student.norm.training


def test_terms_of_one_name_are_an_error(make_module, make_data, run_fit):
    class Clash(KD):
        def forward(self, student, teacher, target=None):
            return {"cross_entropy": super().forward(student, teacher, target)["kd"]}

    with pytest.raises(ValueError, match="both have a term called cross_entropy"):
        run_fit(make_module(distiller=Clash()), make_data())


def test_no_accumulation_below_one(make_module):
    with pytest.raises(ValueError, match="accumulate must be at least 1, not 0"):
        make_module(accumulate=0)


def test_a_step_draws_the_numbers_of_its_seed_and_leaves_other_devices_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", asked.append)
    torch.manual_seed(3)
    expected = torch.rand(4)
    asked.clear()
    torch.rand(1)
    seed_generators(3, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)
    assert asked == []
    seed_generators(4, torch.device("cuda", 1))
    assert asked == [4]
    assert torch.default_generator.initial_seed() == 4
