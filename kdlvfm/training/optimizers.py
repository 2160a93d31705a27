# SPDX-License-Identifier: Apache-2.0
"""From parameter groups to optimizers, and learning-rate schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.nn import Parameter
from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]
Schedule = Callable[[float], float]
"""Share of the run that is done, in [0, 1] -> factor on the initial learning rate."""


def constant(progress: float) -> float:
    """Factor 1 throughout."""
    del progress
    return 1.0


def poly(progress: float, power: float = 0.9) -> float:
    """(1 - progress) ** power, the usual schedule of semantic segmentation (DeepLab, Chen et al., 2017)."""
    return float((1.0 - progress) ** power)


def cosine(progress: float, floor: float = 0.0) -> float:
    """Half a cosine from 1 to `floor` (Loshchilov and Hutter, 2017)."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def multistep(progress: float, milestones: Sequence[float], gamma: float = 0.1) -> float:
    """`gamma` to the power of the number of `milestones`, shares of the run, that have been passed."""
    return float(gamma ** sum(progress >= milestone for milestone in milestones))


@dataclass(frozen=True)
class Plan:
    """How the parameters of one group are trained.

    Attributes:
        optimizer: called with the parameters, gives a torch optimizer.
        schedule: learning-rate factor after the warm-up, as a function of the share of steps done since.
        warmup_steps: steps over which the factor rises linearly to 1.
        clip_norm: gradients of the group are scaled down to this Euclidean norm; `None` leaves them.
    """

    optimizer: OptimizerFactory
    schedule: Schedule = constant
    warmup_steps: int = 0
    clip_norm: float | None = None

    def factor(self, step: int, steps: int) -> float:
        """Factor on the initial learning rate at `step` of `steps`: a pure function, so nothing has to be saved."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.schedule((step - self.warmup_steps) / max(1, steps - self.warmup_steps))


@dataclass(frozen=True)
class Plans:
    """The plan of every group: one for all, and others for the groups named in `groups`."""

    default: Plan
    groups: Mapping[str, Plan] = field(default_factory=dict)

    def __getitem__(self, group: str) -> Plan:
        return self.groups.get(group, self.default)

    def check(self, groups: Mapping[str, Iterable[Parameter]]) -> None:
        """Raise now for what would fail at the first step: a group or an argument that there is not.

        Args:
            groups: the parameters of each group of the distiller.

        Raises:
            ValueError: a plan is for none of the groups, or a group has no parameters.
            TypeError: an optimizer or schedule does not take an argument given.
        """
        for group in self.groups:
            if group not in groups:
                raise ValueError(
                    f"the recipe has an optimizer for the group {group!r}, but the groups are {', '.join(groups)}."
                )
        for group, parameters in groups.items():
            trained = list(parameters)
            if not trained:
                raise ValueError(f"nothing to train in the group {group!r}: all its parameters are frozen.")
            self[group].optimizer(trained)
            self[group].schedule(0.0)
