# SPDX-License-Identifier: Apache-2.0
"""DKDM: its loss and its pool against what the paper says, one teacher pass a step, and a resumption in the middle."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import Context, Denoiser, ModelCard, Step, TapInfo, Teacher
from kdlvfm.core.diffusion import Schedule
from kdlvfm.distillers import DKDM, dkdm_loss, dkdm_variance_loss

T, BATCH, SHAPE = 10, 4, (1, 4, 4)
RATIO = 0.4


class Toy(Denoiser):
    """A convolution that is told the time, and counts what it is shown."""

    def __init__(self, *, variance=False, steps=T, shape=SHAPE):
        super().__init__()
        self.card, self.state_shape, self.schedule = ModelCard("toy", "random"), shape, Schedule.named("cosine", steps)
        self.net = torch.nn.Conv2d(shape[0] + 1, 2 * shape[0] if variance else shape[0], 3, padding=1)
        self.names = ("noise", "variance") if variance else ("noise",)
        self.seen = []

    def taps(self):
        return dict.fromkeys(self.names, TapInfo(self.state_shape[0], 1))

    def forward(self, images, taps, timesteps=None):
        self.seen.append((images.detach().clone(), timesteps.clone()))
        time = (timesteps / T).view(-1, 1, 1, 1).expand(-1, 1, *images.shape[2:])
        found = self.net(torch.cat([images, time], 1)).split(self.state_shape[0], 1)
        return {tap: dict(zip(self.names, found, strict=True))[tap] for tap in taps}


def make(*, variance=False, seed=0, **hparams):
    torch.manual_seed(seed)
    student, teacher = Toy(variance=variance), Teacher(Toy(variance=variance))
    task = SimpleNamespace(truth="images")
    context = Context(student, teacher, task, 10, 50, batch_shape=(BATCH, *SHAPE[1:]))
    return DKDM.from_context(context, ratio=RATIO, **hparams), student, teacher


def step_of(student, teacher, number, images=None):
    images = torch.full((BATCH, 3, *SHAPE[1:]), torch.nan) if images is None else images
    index = torch.arange(BATCH)
    return Step(images, None, index, 0, number, student, teacher, None, number=number)


def run(method, student, teacher, numbers, rate=0.05):
    """Steps of plain gradient descent, as the trainer takes them; the value of each update."""
    values = []
    for number in numbers:
        torch.manual_seed(1000 + number)
        for update in method.updates(step_of(student, teacher, number)):
            loss = torch.stack(list(update.terms.values())).sum()
            student.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter -= rate * parameter.grad
            values.append(loss.item())
    return values


def test_loss_is_the_mean_of_squares():
    a, b = torch.randn(2, 1, 3, 3).double(), torch.randn(2, 1, 3, 3).double().requires_grad_()
    expected = sum((x - y) ** 2 for x, y in zip(a.view(-1).tolist(), b.view(-1).tolist(), strict=True)) / 18
    assert dkdm_loss(a, b).item() == pytest.approx(expected)
    student = a.clone().requires_grad_()
    dkdm_loss(student, b).backward()
    torch.testing.assert_close(student.grad, 2 * (a - b.detach()) / 18)
    assert b.grad is None
    assert torch.autograd.gradcheck(dkdm_loss, (student, b.detach()))


def test_variance_loss_trains_the_students_variance_and_nothing_else():
    schedule, steps = Schedule.named("linear", 50), torch.tensor([3, 40])
    student = {tap: torch.randn(2, 1, 3, 3).requires_grad_() for tap in ("noise", "variance")}
    teacher = {tap: torch.randn(2, 1, 3, 3).requires_grad_() for tap in ("noise", "variance")}
    loss = dkdm_variance_loss(student, teacher, steps, schedule)
    loss.backward()
    assert loss > 0
    assert student["variance"].grad.abs().min() > 0
    assert student["noise"].grad is None
    assert all(value.grad is None for value in teacher.values())
    assert dkdm_variance_loss(teacher, teacher, steps, schedule).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("ratio", [0.25, 0.4, 1.0])
def test_the_pool_has_as_many_batches_as_the_paper_says(ratio):
    method = DKDM(Schedule.named("cosine", T), SHAPE, BATCH, ratio=ratio)
    assert len(method.pool.states) == round(ratio * T) * BATCH


def test_filling_takes_every_state_as_far_as_its_age_says():
    method, student, teacher = make()
    next(method.updates(step_of(student, teacher, 0)))
    calls = teacher.model.seen[:-1]
    # The last call is the step's own; before it a state with r steps to go was shown T - r times, at T - 1 and down.
    remaining = method.pool.remaining.clone()
    remaining[method.pool.draw(BATCH, 0)] += 1
    assert sum(len(states) for states, _ in calls) == int((T - remaining).sum())
    for t in range(T):
        shown = sum(int((timesteps == t).sum()) for _, timesteps in calls)
        assert shown == int((remaining <= t).sum())


def test_ages_start_spread_over_the_whole_walk():
    torch.manual_seed(0)
    teacher = Teacher(Toy())
    method = DKDM(teacher.model.schedule, SHAPE, 100, ratio=1.0)
    method._fill(teacher, 100, torch.device("cpu"))
    counts = torch.bincount(method.pool.remaining, minlength=T + 1)
    assert counts[0] == 0
    assert (counts[1:] - 100).abs().max() < 40  # 1000 states over 10 ages: 100 each, give or take four deviations


def test_properties_of_the_pool_hold_over_many_steps():
    method, student, teacher = make()
    pool, size, resets = method.pool, len(method.pool.states), 0
    run(method, student, teacher, [0])
    for number in range(1, 120):
        before, states = pool.remaining.clone(), pool.states.clone()
        teacher.model.seen.clear()
        run(method, student, teacher, [number])
        ((shown, timesteps),) = teacher.model.seen  # exactly one pass of the teacher
        assert len(shown) == BATCH
        assert len(pool.states) == len(pool.remaining) == size
        assert pool.states.isfinite().all()
        assert ((pool.remaining >= 0) & (pool.remaining < T)).all()
        assert ((timesteps >= 0) & (timesteps < T)).all()
        changed = (pool.states != states).flatten(1).any(1)
        assert int(changed.sum()) == BATCH  # without replacement, and the others are as they were
        drawn = changed.nonzero().flatten()
        expected = torch.where(before[drawn] == 0, T, before[drawn]) - 1
        assert torch.equal(pool.remaining[drawn], expected)
        assert sorted(timesteps.tolist()) == sorted(expected.tolist())
        fresh = shown[timesteps == T - 1]
        resets += len(fresh)
        for state in fresh:
            assert not any(torch.equal(state, old) for old in states)
    assert resets > 20


def test_what_starts_again_is_standard_normal():
    method, *_ = make()
    pool = method.pool
    pool.states.fill_(7.0)
    seen = []
    for number in range(400):
        pool.remaining.zero_()
        seen.append(pool.states[pool.draw(BATCH, number)].clone())
    states = torch.cat(seen).flatten(1)
    assert abs(states.mean()) < 0.03
    assert abs(states.std() - 1) < 0.03
    assert len(states.unique(dim=0)) == len(states)


def test_the_student_learns_at_the_state_that_the_teacher_saw_and_the_pool_gets_the_step_back():
    method, student, teacher = make()
    run(method, student, teacher, [0])
    teacher.model.seen.clear()
    student.seen.clear()
    torch.manual_seed(5)
    update = next(method.updates(step_of(student, teacher, 1)))
    (states, timesteps), (by_student, at) = teacher.model.seen[0], student.seen[0]
    assert torch.equal(states, by_student)
    assert torch.equal(timesteps, at)
    with torch.no_grad():
        taught, found = (m(states, ["noise"], timesteps)["noise"] for m in (teacher.model, student))
    assert update.terms["dkdm"].item() == pytest.approx(F.mse_loss(found, taught).item())
    torch.manual_seed(5)
    expected = method.schedule.step_back(states, {"noise": taught}, timesteps, torch.randn_like(states))
    kept = {tuple(state.flatten().tolist()) for state in method.pool.states}
    assert all(tuple(state.flatten().tolist()) in kept for state in expected)


def test_no_image_of_the_data_is_looked_at():
    blind, shown = make(), make()
    for (method, student, teacher), images in ((blind, torch.nan), (shown, 0.5)):
        torch.manual_seed(3)
        images = torch.full((BATCH, 3, *SHAPE[1:]), images)
        (update,) = method.updates(step_of(student, teacher, 0, images))
        assert not update.task_terms
        update.terms["dkdm"].backward()
    assert torch.equal(blind[1].net.weight.grad, shown[1].net.weight.grad)


def test_the_teacher_is_left_bit_equal_and_the_student_learns():
    method, student, teacher = make()
    before = copy.deepcopy(teacher.model.state_dict())
    values = run(method, student, teacher, range(150))
    assert sum(values[-10:]) < 0.2 * sum(values[:10])
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert not any(states.requires_grad for states, _ in teacher.model.seen)
    assert not method.pool.states.requires_grad


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    whole, half = make(), make()
    run(*whole, range(40))
    run(*half, range(17))
    torch.save({"method": half[0].state_dict(), "student": half[1].state_dict()}, tmp_path / "stopped.pt")
    method, student, teacher = make(seed=0)
    loaded = torch.load(tmp_path / "stopped.pt", weights_only=True)
    method.load_state_dict(loaded["method"])
    student.load_state_dict(loaded["student"])
    run(method, student, teacher, range(17, 40))
    assert torch.equal(student.net.weight, whole[1].net.weight)
    assert torch.equal(method.pool.states, whole[0].pool.states)
    assert torch.equal(method.pool.remaining, whole[0].pool.remaining)


def test_learned_variances_add_a_term_of_the_given_weight():
    method, student, teacher = make(variance=True, variance_weight=0.5)
    run(method, student, teacher, [0])
    teacher.model.seen.clear()
    (update,) = method.updates(step_of(student, teacher, 1))
    states, timesteps = teacher.model.seen[0]
    with torch.no_grad():
        taught, found = (m(states, ["noise", "variance"], timesteps) for m in (teacher.model, student))
    expected = 0.5 * dkdm_variance_loss(found, taught, timesteps, method.schedule)
    assert update.terms["dkdm_variance"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (Toy(), Toy(steps=T + 1), "in 10 steps and the teacher for"),
        (Toy(), Toy(shape=(1, 8, 8)), r"states \(1, 4, 4\) .* teacher for \(1, 8, 8\)"),
        (Toy(variance=True), Toy(), "learn_variance=false"),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused(student, teacher, message):
    context = Context(student, Teacher(teacher), None, 10, 50, batch_shape=(BATCH, 4, 4))
    with pytest.raises(ValueError, match=message):
        DKDM.from_context(context)


def test_a_student_without_variance_learns_from_a_teacher_with_one():
    context = Context(Toy(), Teacher(Toy(variance=True)), None, 10, 50, batch_shape=(BATCH, 4, 4))
    method = DKDM.from_context(context)
    assert method.student_taps == ("noise",)
    (update,) = method.updates(step_of(context.student, context.teacher, 0))
    assert set(update.terms) == {"dkdm"}


def test_networks_that_denoise_nothing_are_refused(context):
    shape = (BATCH, 4, 4)
    with pytest.raises(ValueError, match="toy is no diffusion model"):
        DKDM.from_context(replace(context, batch_shape=shape))
    with pytest.raises(ValueError, match="needs a teacher"):
        DKDM.from_context(Context(Toy(), None, None, 10, 50, batch_shape=shape))


def test_a_pool_that_is_empty_or_larger_than_memory_is_refused():
    with pytest.raises(ValueError, match="leaves no batch in the pool"):
        DKDM(Schedule.named("cosine", T), SHAPE, BATCH, ratio=0.01)
    with pytest.raises(ValueError, match=r"takes \d+ GiB of memory, .* smaller distiller.ratio"):
        DKDM(Schedule.named("cosine", 1000), (3, 1024, 1024), 512)
