# SPDX-License-Identifier: Apache-2.0
"""Diffusion: how an image becomes noise step by step, and what one step back is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdlvfm.core.align import promote
from kdlvfm.core.features import Features

Betas = Literal["linear", "cosine"]
_MOST = 0.999
_EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # also where networks are only outlined


class Schedule(nn.Module):
    r"""The noise of T steps, and the distributions that follow from it.

    Step t, counted from 0, mixes noise of variance :math:`\beta_t` into a state. With
    :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`,

    .. math::
        x_{t+1} = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \varepsilon

    in one go; here `states` at step t are always this one, what a network sees when it is to take step t back. There
    are no parameters, and nothing is saved: a schedule belongs to the architecture.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020; learned variances and the cosine: Nichol
    and Dhariwal, Improved Denoising Diffusion Probabilistic Models, ICML 2021.

    Args:
        betas: (T,), each between 0 and 1, T at least 2.
        timesteps: (T,), what a network is told at each step; `None`: 0 to T - 1.

    Raises:
        ValueError: variances that are none.

    Example:
        >>> schedule = Schedule.named("cosine", 10)
        >>> len(schedule), schedule.respaced(3).timesteps
        (10, tensor([0, 4, 9]))
    """

    signal: Tensor
    noise: Tensor
    from_clean: Tensor
    from_state: Tensor
    least: Tensor
    most: Tensor
    timesteps: Tensor

    def __init__(self, betas: Tensor, timesteps: Tensor | None = None) -> None:
        super().__init__()
        betas = betas.double()
        if betas.dim() != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("a schedule needs two steps or more, each of a variance between 0 and 1: use more steps.")
        alphas_bar = (1 - betas).cumprod(0)
        before = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
        variance = betas * (1 - before) / (1 - alphas_bar)
        tables = {
            "signal": alphas_bar.sqrt(),
            "noise": (1 - alphas_bar).sqrt(),
            "from_clean": betas * before.sqrt() / (1 - alphas_bar),
            "from_state": (1 - before) * (1 - betas).sqrt() / (1 - alphas_bar),
            # The last step back has no spread; as in the official code the one before stands in for its logarithm.
            "least": torch.cat([variance[1:2], variance[1:]]).log(),
            "most": betas.log(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        known = torch.arange(len(betas), device=betas.device) if timesteps is None else timesteps
        self.register_buffer("timesteps", known, persistent=False)
        self._alphas_bar = alphas_bar

    @classmethod
    def named(cls, betas: Betas, steps: int) -> Schedule:
        """`"linear"`: variances from 0.0001 to 0.02, times 1000 / T (Ho et al.); `"cosine"`: Nichol and Dhariwal's.

        Raises:
            ValueError: no such name, or too few steps.
        """
        if betas == "linear":
            return cls(torch.linspace(1e-4, 0.02, steps, **_EXACT) * 1000 / steps)
        if betas != "cosine":
            raise ValueError(f"betas must be 'linear' or 'cosine', not {betas!r}.")
        ticks = torch.arange(steps + 1, **_EXACT) / steps
        level = ((ticks + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return cls((1 - level[1:] / level[:-1]).clamp(max=_MOST))

    def __len__(self) -> int:
        return len(self.timesteps)

    def matches(self, other: Schedule) -> bool:
        """Whether another schedule has the same noise at the same timesteps."""
        return len(self) == len(other) and bool((self._alphas_bar - other._alphas_bar).abs().max() < 1e-6)

    def respaced(self, steps: int) -> Schedule:
        """The schedule of fewer, longer steps, evenly spread from the first to the last.

        Raises:
            ValueError: more steps than there are, or fewer than 2.
        """
        if not 2 <= steps <= len(self):
            raise ValueError(
                f"sampling takes from 2 to the {len(self)} steps that the model was made for, not {steps}."
            )
        kept = torch.linspace(0, len(self) - 1, steps, **_EXACT).long()
        alphas_bar = self._alphas_bar[kept]
        before = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
        return Schedule(1 - alphas_bar / before, self.timesteps.cpu()[kept]).to(self.timesteps.device)

    def add_noise(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """States at `steps` (B,) of clean ones (B, C, H, W)."""
        return _at(self.signal, steps) * clean + _at(self.noise, steps) * noise

    def log_variance(self, variance: Tensor | None, steps: Tensor) -> Tensor:
        """Logarithm of the variance of a step back, (B, 1, 1, 1) or in the shape of `variance`.

        Args:
            variance: (B, C, H, W), a network's position between the two bounds, -1 for the true variance given the
                clean state and 1 for that of the step; `None` for the former.
            steps: (B,).
        """
        least = _at(self.least, steps)
        if variance is None:
            return least
        share = (promote(variance) + 1) / 2
        return share * _at(self.most, steps) + (1 - share) * least

    def step_back(self, states: Tensor, features: Features, steps: Tensor, fresh: Tensor) -> Tensor:
        """One step back, from states (B, C, H, W) at `steps` to those before; after step 0 they are clean.

        The clean state that a network's noise implies is kept within [-1, 1], as usual in sampling.

        Args:
            states: what the network saw.
            features: its `noise`, and its `variance` if that was learned.
            steps: (B,).
            fresh: (B, C, H, W), standard normal.
        """
        clean = (states - _at(self.noise, steps) * promote(features["noise"])) / _at(self.signal, steps)
        mean = _at(self.from_clean, steps) * clean.clamp(-1, 1) + _at(self.from_state, steps) * states
        spread = (0.5 * self.log_variance(features.get("variance"), steps)).exp()
        return mean + (steps > 0).to(mean).view(-1, 1, 1, 1) * spread * fresh

    def divergence(
        self, noise: Tensor, log_variance: Tensor, other_noise: Tensor, other_log_variance: Tensor, steps: Tensor
    ) -> Tensor:
        r"""Kullback-Leibler divergence of two steps back from the same state, in nats, elementwise (B, C, H, W).

        .. math::
            \tfrac12 \Big( \ln \frac{\sigma_b^2}{\sigma_a^2}
            + \frac{\sigma_a^2 + (\mu_a - \mu_b)^2}{\sigma_b^2} - 1 \Big)

        Args:
            noise: (B, C, H, W), from which the first one's mean follows; a network's, or the noise that is there.
            log_variance: of the first one, as `log_variance` gives it.
            other_noise: (B, C, H, W), of the second one.
            other_log_variance: of the second one.
            steps: (B,).
        """
        scale = _at(self.from_clean * self.noise / self.signal, steps)
        apart = (scale * (promote(noise) - promote(other_noise))).square()
        ratio = log_variance - other_log_variance
        return 0.5 * (ratio.exp() - ratio - 1 + apart * (-other_log_variance).exp())


def sample(
    network: Callable[..., Features], taps: tuple[str, ...], schedule: Schedule, draw: Callable[[], Tensor]
) -> Tensor:
    """Clean states (B, C, H, W) made from noise, one pass of the network for each step of the schedule.

    Args:
        network: a `Denoiser`, or a teacher that holds one.
        taps: what a step back reads of it, `Denoiser.step_taps`.
        schedule: the network's own, or that respaced.
        draw: gives standard normal noise (B, C, H, W), at first to start from and then for each step.
    """
    with torch.no_grad():
        states = draw()
        for step in reversed(range(len(schedule))):
            steps = torch.full((len(states),), step, device=states.device)
            features = network(states, taps, timesteps=schedule.timesteps[steps])
            states = schedule.step_back(states, features, steps, draw())
    return states


def _at(table: Tensor, steps: Tensor) -> Tensor:
    return table[steps].view(-1, 1, 1, 1)
