# SPDX-License-Identifier: Apache-2.0
"""Noising and steps back against the formulas of the papers, number by number in plain Python."""

import math
from functools import partial

import pytest
import torch

from kdlvfm.core.diffusion import Schedule, sample

T = 12


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_betas(steps):
    """Ho et al. (2020), section 4, for 1000 steps; for others scaled so that as much noise is added in all."""
    return [(1e-4 + (0.02 - 1e-4) * t / (steps - 1)) * 1000 / steps for t in range(steps)]


def cosine_betas(steps):
    """Nichol and Dhariwal (2021), equation 17."""

    def level(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - level(t + 1) / level(t), 0.999) for t in range(steps)]


def alpha_bar(betas, t):
    return math.prod(1 - beta for beta in betas[: t + 1])


def posterior(betas, t, clean, state):
    """Mean and variance of x_{t-1} given x_t and x_0, Ho et al. (2020), equations 6 and 7."""
    now, before = alpha_bar(betas, t), alpha_bar(betas, t - 1) if t else 1.0
    mean = math.sqrt(before) * betas[t] / (1 - now) * clean + math.sqrt(1 - betas[t]) * (1 - before) / (1 - now) * state
    return mean, (1 - before) / (1 - now) * betas[t]


BETAS = {"linear": linear_betas(60), "cosine": cosine_betas(60)}


@pytest.fixture(params=["linear", "cosine"])
def name(request):
    return request.param


def test_signal_and_noise_add_up_to_one_and_the_signal_fades(name):
    schedule = Schedule.named(name, 60)
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(60))
    assert (schedule.signal.diff() < 0).all()
    assert schedule.signal[-1] < 0.05


@pytest.mark.parametrize("t", [0, 1, 30, 59])
def test_noising_is_that_of_the_paper(name, t):
    schedule, clean, noise = Schedule.named(name, 60), normal(1, 1, 2, 2, seed=1), normal(1, 1, 2, 2, seed=2)
    noised = schedule.add_noise(clean, noise, torch.tensor([t]))
    level = alpha_bar(BETAS[name], t)
    expected = [
        math.sqrt(level) * x + math.sqrt(1 - level) * e for x, e in zip(clean.view(-1), noise.view(-1), strict=True)
    ]
    assert noised.view(-1).tolist() == pytest.approx([float(x) for x in expected], abs=1e-5)


def test_noising_in_one_go_is_noising_step_by_step():
    steps, count = 30, 200_000
    betas, schedule = linear_betas(steps), Schedule.named("linear", steps)
    states = torch.full((count,), 0.7)
    for t in range(steps):
        states = math.sqrt(1 - betas[t]) * states + math.sqrt(betas[t]) * normal(count, seed=t)
    at_once = schedule.add_noise(
        torch.full((1, 1, 1, count), 0.7), normal(1, 1, 1, count, seed=99), torch.tensor([steps - 1])
    )
    assert states.mean().item() == pytest.approx(at_once.mean().item(), abs=0.01)
    assert states.std().item() == pytest.approx(at_once.std().item(), abs=0.01)


@pytest.mark.parametrize("t", [1, 7, 59])
@pytest.mark.parametrize("share", [None, -1.0, 0.3, 1.0])
def test_a_step_back_has_mean_and_spread_of_the_paper(name, t, share):
    betas, schedule = BETAS[name], Schedule.named(name, 60)
    state, noise, fresh = normal(1, 1, 2, 2, seed=1), normal(1, 1, 2, 2, seed=2), normal(1, 1, 2, 2, seed=3)
    features = {"noise": noise} if share is None else {"noise": noise, "variance": torch.full_like(noise, share)}
    found = schedule.step_back(state, features, torch.tensor([t]), fresh)
    expected = []
    for x, e, z in zip(state.view(-1).tolist(), noise.view(-1).tolist(), fresh.view(-1).tolist(), strict=True):
        level = alpha_bar(betas, t)
        clean = max(-1.0, min(1.0, (x - math.sqrt(1 - level) * e) / math.sqrt(level)))
        mean, variance = posterior(betas, t, clean, x)
        v = 0.0 if share is None else (share + 1) / 2  # Nichol and Dhariwal, equation 15
        expected.append(mean + math.sqrt(math.exp(v * math.log(betas[t]) + (1 - v) * math.log(variance))) * z)
    assert found.view(-1).tolist() == pytest.approx(expected, abs=2e-5)


def test_the_last_step_back_adds_no_noise_and_gives_the_clean_state():
    schedule, clean, noise = Schedule.named("cosine", T), normal(2, 1, 2, 2).clamp(-1, 1), normal(2, 1, 2, 2, seed=1)
    steps = torch.zeros(2, dtype=torch.int64)
    found = schedule.step_back(
        schedule.add_noise(clean, noise, steps), {"noise": noise}, steps, normal(2, 1, 2, 2, seed=2)
    )
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=0)


def test_each_state_of_a_batch_is_at_its_own_step():
    schedule, states, noise, fresh = Schedule.named("cosine", T), *(normal(3, 1, 2, 2, seed=s) for s in (1, 2, 3))
    steps = torch.tensor([0, 5, T - 1])
    together = schedule.step_back(states, {"noise": noise}, steps, fresh)
    for i in range(3):
        one = slice(i, i + 1)
        alone = schedule.step_back(states[one], {"noise": noise[one]}, steps[one], fresh[one])
        torch.testing.assert_close(together[one], alone)


def test_without_noise_found_or_added_a_state_is_only_scaled():
    betas, schedule = linear_betas(60), Schedule.named("linear", 60)
    state = 1e-3 * normal(1, 1, 2, 2)  # so small that the clean state is within its bounds
    steps = torch.tensor([30])
    found = schedule.step_back(state, {"noise": torch.zeros_like(state)}, steps, torch.zeros_like(state))
    torch.testing.assert_close(found, state / math.sqrt(1 - betas[30]))


@pytest.mark.parametrize("t", [1, 20])
def test_divergence_is_that_of_two_gaussians(name, t):
    betas, schedule, steps = BETAS[name], Schedule.named(name, 60), torch.tensor([t])
    state, a, b, v = (normal(1, 1, 2, 2, seed=s) for s in range(4))
    found = schedule.divergence(a, schedule.log_variance(None, steps), b, schedule.log_variance(v, steps), steps)
    level = alpha_bar(betas, t)
    for x, one, other, w, value in zip(*(y.view(-1).tolist() for y in (state, a, b, v, found)), strict=True):
        means, variances = [], []
        for noise in (one, other):
            mean, variance = posterior(betas, t, (x - math.sqrt(1 - level) * noise) / math.sqrt(level), x)
            means.append(mean)
            variances.append(variance)
        share = (w + 1) / 2
        variances[1] = math.exp(share * math.log(betas[t]) + (1 - share) * math.log(variances[1]))
        gaussians = [
            torch.distributions.Normal(torch.tensor(m).double(), s**0.5) for m, s in zip(means, variances, strict=True)
        ]
        expected = torch.distributions.kl_divergence(*gaussians).item()
        assert value == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_respacing_keeps_the_noise_at_the_steps_that_stay():
    schedule = Schedule.named("cosine", 50)
    short = schedule.respaced(5)
    assert short.timesteps.tolist() == [0, 12, 24, 36, 49]
    torch.testing.assert_close(short.signal, schedule.signal[short.timesteps])
    assert schedule.respaced(50).matches(schedule)
    assert not short.matches(schedule)


def test_sampling_with_the_true_noise_ends_at_the_image():
    """A network that knows the image leads any noise to it, in all steps or in few."""
    clean = torch.tensor([0.5, -1.0, 1.0, 0.0]).view(1, 1, 2, 2)
    schedule, calls = Schedule.named("cosine", 20), []

    def network(states, taps, timesteps):
        calls.append(timesteps.tolist())
        at = timesteps.view(-1, 1, 1, 1)
        return {"noise": (states - schedule.signal[at] * clean) / schedule.noise[at]}

    for steps in (20, 4):
        calls.clear()
        draw = partial(torch.randn, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        made = sample(network, ("noise",), schedule.respaced(steps), draw)
        torch.testing.assert_close(made, clean.expand(3, -1, -1, -1), atol=1e-4, rtol=0)
        assert calls == [[t] * 3 for t in reversed(schedule.respaced(steps).timesteps.tolist())]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.named("square", 10), "'linear' or 'cosine', not 'square'"),
        (lambda: Schedule.named("linear", 10), "use more steps"),
        (lambda: Schedule.named("cosine", 1), "two steps or more"),
        (lambda: Schedule(torch.tensor([0.1, 1.0])), "between 0 and 1"),
        (lambda: Schedule.named("cosine", 10).respaced(11), "from 2 to the 10 steps"),
    ],
)
def test_what_is_no_schedule_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_of_it_is_saved_or_trained():
    schedule = Schedule.named("cosine", T)
    assert not schedule.state_dict()
    assert not [*schedule.parameters()]
