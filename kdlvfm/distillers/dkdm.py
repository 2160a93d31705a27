# SPDX-License-Identifier: Apache-2.0
"""DKDM: a diffusion model learns another one's steps on states that the other one makes on the way, without data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features, Step, Teacher, Update
from kdlvfm.core.align import promote
from kdlvfm.core.denoiser import as_denoiser
from kdlvfm.core.diffusion import Schedule
from kdlvfm.core.distributed import gather_batch, rank, world_size


def dkdm_loss(student_noise: Tensor, teacher_noise: Tensor) -> Tensor:
    r"""Mean squared difference of the noise that two networks find in the same states.

    .. math:: L = \mathrm{mean}\, (\varepsilon_T(\hat x_t, t) - \varepsilon_S(\hat x_t, t))^2

    Args:
        student_noise: (B, C, H, W).
        teacher_noise: same shape; receives no gradient.

    Returns:
        A scalar, the mean over all elements.

    Source:
        Xiang et al., "DKDM: Data-Free Knowledge Distillation for Diffusion Models with Any Architecture", CVPR 2025,
        and its official code (qianlong0502/DKDM).

    Example:
        >>> dkdm_loss(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)).item()
        9.0
    """
    return F.mse_loss(promote(student_noise), promote(teacher_noise).detach())


def dkdm_variance_loss(student: Features, teacher: Features, timesteps: Tensor, schedule: Schedule) -> Tensor:
    r"""Divergence of a step back of the student from the teacher's, which trains the student's variance alone.

    .. math:: L = \mathrm{mean}\, \mathrm{KL}\big(p_T(x_{t-1} | \hat x_t) \,\|\, p_S(x_{t-1} | \hat x_t)\big)

    Args:
        student: its `noise` and `variance`, (B, C, H, W) each; the former receives no gradient.
        teacher: the same of the teacher, which receives none at all.
        timesteps: (B,), from 0 to T - 1.
        schedule: of both.

    Returns:
        A scalar, the mean over all elements, in nats.

    Source:
        Xiang et al., DKDM, CVPR 2025; the parametrisation is that of Nichol and Dhariwal, ICML 2021.

    Example:
        >>> schedule, t = Schedule.named("linear", 50), torch.tensor([20])
        >>> step = {"noise": torch.ones(1, 1, 2, 2), "variance": torch.zeros(1, 1, 2, 2)}
        >>> dkdm_variance_loss(step, step, t, schedule).item()
        0.0
    """
    return schedule.divergence(
        teacher["noise"].detach(),
        schedule.log_variance(teacher["variance"].detach(), timesteps),
        student["noise"].detach(),
        schedule.log_variance(student["variance"], timesteps),
        timesteps,
    ).mean()


class StatePool(nn.Module):
    """States between noise and image, each with the number of steps that it has still to go.

    Drawn without replacement; one that has come to its end is replaced by fresh noise with all steps before it. The
    pool is in the memory of the host and a part of checkpoints; in a distributed run all processes have the same one.

    Args:
        size: how many states.
        shape: (C, H, W) of each.
        length: T, steps from noise to image.

    Attributes:
        states: (size, C, H, W).
        remaining: int64 (size,), from 0 to T.
        filled: whether states have been put in.

    Raises:
        ValueError: a pool that does not fit into memory.
    """

    def __init__(self, size: int, shape: Sequence[int], length: int) -> None:
        super().__init__()
        needed = 4 * size * torch.Size(shape).numel()
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            raise ValueError(
                f"a pool of {size} states {tuple(shape)} takes {needed / 2**30:.0f} GiB of memory, and this machine "
                f"has {there / 2**30:.0f} GiB: choose a smaller distiller.ratio or recipe.batch_size."
            )
        self.length = length
        self.filled = False
        # Draws are the same in all processes and known again after a resumption: functions of this and of the step.
        self._seed = int(torch.randint(2**62, ()))
        # Not buffers: DDP would send those of the first process to all others at every step.
        self.states = torch.zeros(size, *shape)
        self.remaining = torch.full((size,), length)

    def draw(self, count: int, number: int) -> Tensor:
        """Places of the states for a step, (count,), those that have come to their end replaced.

        Args:
            count: how many.
            number: of the step.
        """
        generator = torch.Generator().manual_seed((self._seed + number) % 2**63)
        chosen = torch.randperm(len(self.states), generator=generator)[:count]
        through = chosen[self.remaining[chosen] == 0]
        self.states[through] = torch.randn((len(through), *self.states.shape[1:]), generator=generator)
        self.remaining[through] = self.length
        return chosen

    def get_extra_state(self) -> dict[str, Tensor]:
        """The pool, for checkpoints."""
        return {
            "states": self.states,
            "remaining": self.remaining,
            "filled": torch.tensor(self.filled),
            "seed": torch.tensor(self._seed),
        }

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        self.states, self.remaining = state["states"].clone(), state["remaining"].clone()
        self.filled, self._seed = bool(state["filled"]), int(state["seed"])


class DKDM(Distiller):
    r"""Dynamic iterative distillation: each step of the teacher both makes a state and teaches at it.

    A pool holds round(`ratio` T) batches of states, noise that the teacher has taken any number of steps back, so that
    all stages are in it from the start. In each step of training a batch of them is drawn. The teacher is asked once
    for the noise in them; that is the student's target, and it takes the states one step further back, as which the
    pool keeps them. A state that has become an image starts again as noise. So training costs one pass of the teacher a
    step, whatever the number of steps that an image takes, and no image of the data is looked at: of a batch only the
    number counts. Filling the pool, in the first step of a run, takes about `ratio` T^2 / 2 passes on a batch besides.

    Source: Xiang et al., "DKDM: Data-Free Knowledge Distillation for Diffusion Models with Any Architecture", CVPR
    2025, and its official code (qianlong0502/DKDM).

    Args:
        schedule: of teacher and student.
        state_shape: (C, H, W) of what they denoise.
        batch_size: states in a batch, over all processes.
        ratio: states in the pool for each of the T batches that a whole walk takes. The paper's value.
        loss_weight: weight of the term.
        learned_variance: both networks learn the variance of a step back: a second term.
        variance_weight: weight of that. The paper's value; the published code adds the term unscaled, as 1 does.

    Raises:
        ValueError: a ratio that leaves no batch in the pool, or a pool that does not fit into memory.

    Example:
        >>> method = DKDM(Schedule.named("cosine", 10), (1, 8, 8), batch_size=4)
        >>> method.pool.states.shape, method.student_taps
        (torch.Size([16, 1, 8, 8]), ('noise',))
    """

    calls_teacher = True

    def __init__(
        self,
        schedule: Schedule,
        state_shape: Sequence[int],
        batch_size: int,
        *,
        ratio: float = 0.4,
        loss_weight: float = 1.0,
        learned_variance: bool = False,
        variance_weight: float = 0.001,
    ) -> None:
        super().__init__()
        batches = round(ratio * len(schedule))
        if batches < 1:
            raise ValueError(f"ratio={ratio} of {len(schedule)} steps leaves no batch in the pool: choose more.")
        self.student_taps = self.teacher_taps = ("noise", "variance") if learned_variance else ("noise",)
        self.schedule = schedule
        self.loss_weight = loss_weight
        self.variance_weight = variance_weight
        self.pool = StatePool(batches * batch_size, state_shape, len(schedule))

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """For the schedule and the states of the two networks.

        Raises:
            ValueError: a network that is no diffusion model, or two that are for different noise or states.
        """
        student, teacher = as_denoiser(context.student), as_denoiser(context.require_teacher().model)
        if student.state_shape != teacher.state_shape or not student.schedule.matches(teacher.schedule):
            raise ValueError(
                f"the student is for states {student.state_shape} in {len(student.schedule)} steps and the teacher for "
                f"{teacher.state_shape} in {len(teacher.schedule)}: give the student the teacher's channels, size, "
                "steps and betas."
            )
        if "variance" in student.step_taps and "variance" not in teacher.step_taps:
            raise ValueError(
                "the teacher did not learn a variance that it could teach: set student.learn_variance=false."
            )
        batch_size = context.require_batch_shape()[0]
        hparams.setdefault("learned_variance", "variance" in student.step_taps)
        return cls(teacher.schedule, teacher.state_shape, batch_size, **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `dkdm` and, where the variance is learned, `dkdm_variance`; then `target` is the timesteps (B,)."""
        terms = {"dkdm": self.loss_weight * dkdm_loss(student["noise"], teacher["noise"])}
        if "variance" in self.student_taps:
            terms["dkdm_variance"] = self.variance_weight * dkdm_variance_loss(student, teacher, target, self.schedule)
        return terms

    def updates(self, step: Step) -> Iterator[Update]:
        """One update on states of the pool, which the teacher takes one step further."""
        assert step.teacher is not None
        device, count = step.images.device, len(step.images)
        if not self.pool.filled:
            self._fill(step.teacher, count, device)
        chosen = self.pool.draw(count * world_size(), step.number)
        own = chosen.chunk(world_size())[rank()]
        states, timesteps = self.pool.states[own].to(device), (self.pool.remaining[own] - 1).to(device)
        taught = step.teacher(states, as_denoiser(step.teacher.model).step_taps, timesteps=timesteps)
        before = self.schedule.step_back(states, taught, timesteps, torch.randn_like(states))
        self.pool.states[chosen] = gather_batch(before).cpu()
        self.pool.remaining[chosen] -= 1
        yield Update(self(step.student(states, self.student_taps, timesteps), taught, timesteps))

    def _fill(self, teacher: Teacher, count: int, device: torch.device) -> None:
        """States that are any number of steps from noise, `count` at a time."""
        steps = len(self.schedule)
        size = len(self.pool.states) // world_size()
        # In order, so that those of a batch have about as many steps before them; batches are drawn at random anyway.
        taken = torch.randint(steps, (size,)).sort().values
        filled = []
        for goals in torch.split(taken, count):
            states = torch.randn(len(goals), *self.pool.states.shape[1:], device=device)
            for done in range(int(goals[-1])):
                first = int((goals <= done).sum())
                states[first:] = _step_back(teacher, self.schedule, states[first:], steps - 1 - done)
            filled.append(states)
        self.pool.states = gather_batch(torch.cat(filled)).cpu()
        self.pool.remaining = steps - gather_batch(taken.to(device)).cpu()
        self.pool.filled = True


def _step_back(teacher: Teacher, schedule: Schedule, states: Tensor, step: int) -> Tensor:
    """States (B, C, H, W) one step of the teacher further back, all of them at the same step."""
    steps = torch.full((len(states),), step, device=states.device)
    with torch.no_grad():
        features = teacher(states, as_denoiser(teacher.model).step_taps, timesteps=steps)
        return schedule.step_back(states, features, steps, torch.randn_like(states))
