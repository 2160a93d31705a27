# SPDX-License-Identifier: Apache-2.0
"""SCKD: a distillation term counts in a step only if its gradient does not oppose the task's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kdlvfm.core import Distiller, Step
from kdlvfm.core.gradients import inner_products
from kdlvfm.core.weight import Weight
from kdlvfm.distillers.compose import Compose


def gradient_gate(
    distillation: Tensor | Sequence[Tensor | None], task: Tensor | Sequence[Tensor | None], threshold: float = 0.0
) -> Tensor:
    r"""Whether two gradients point in directions similar enough.

    .. math:: \gamma = 1\big[\cos(\nabla L_\mathrm{distillation}, \nabla L_\mathrm{task}) \geq \varphi\big]

    The lengths of the gradients do not matter. Where one of them is 0 or not finite, the cosine is taken to be 0. In a
    distributed run the gradients of all processes are taken as parts of one, and all processes get the same gate.

    Args:
        distillation: gradient of a distillation term, of any shape, or one for each of several inputs, with `None` for
            an input on which the term does not depend.
        task: gradient of the task's loss at the same inputs.
        threshold: φ; 0 in the paper.

    Returns:
        A scalar, 0 or 1, without gradient.

    Raises:
        ValueError: the gradients differ in shape.

    Source:
        Zhu and Wang, "Student Customized Knowledge Distillation", ICCV 2021.

    Example:
        >>> import torch
        >>> task = torch.tensor([1.0, 0.0])
        >>> [gradient_gate(torch.tensor(gradient), task).item() for gradient in ([0.1, 9.0], [-0.1, 9.0])]
        [1.0, 0.0]
    """
    first, second = ([x] if isinstance(x, Tensor) else x for x in (distillation, task))
    dot, own, goal = inner_products(first, second)
    cosine = (dot / (own.sqrt() * goal.sqrt())).nan_to_num(0.0, 0.0, 0.0)
    return torch.ge(cosine, threshold).to(dot.dtype)


class SCKD(Compose):
    """Any distillers, each of their terms gated by the direction of its gradient at every step of the student.

    A term whose gate is closed is left out of the step. Weights, schedules and calibration are those of `Compose`; they
    never change a gate, since it looks at directions alone. Gates belong to `updates`: `forward` gives all terms.

    No code was published. The paper compares gradients at the parameters that task and distillation share.

    Args:
        parts: the distillers, by the names that their terms and groups begin with.
        weights: of the parts, see `Compose`.
        threshold: φ: a gate is open if the cosine is at least this; 0 in the paper.
        at: where gradients are compared: at a tap of the student, which costs a part of a backward pass for the task
            and for each term, or with `None` at all its parameters, as in the paper, which costs whole ones. The tap
            must be one that the task's loss and every term depend on: an earlier one than the last map if a part reads
            that.
        calibrate_every: see `Compose`.

    Raises:
        ValueError: see `Compose`, or a threshold that no cosine can have.

    Example:
        >>> import torch
        >>> from kdlvfm.distillers import CWD, KD
        >>> gated = SCKD({"kd": KD(), "cwd": CWD()})
        >>> gated.student_taps
        ('logits', 'map.-1')
    """

    def __init__(
        self,
        parts: Mapping[str, Distiller],
        weights: Mapping[str, float | Weight | Mapping[str, Any]] = MappingProxyType({}),
        *,
        threshold: float = 0.0,
        at: str | None = "map.-1",
        calibrate_every: int = 50,
    ) -> None:
        super().__init__(parts, weights, calibrate_every=calibrate_every, at=at)
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold is a cosine, from -1 to 1, not {threshold}.")
        self.threshold = threshold
        self.needs_truth = True  # for the task's gradient
        self.moves_subsets = True  # a closed gate leaves the projector of its term without a gradient

    def _chosen(self, step: Step, task: Mapping[str, Tensor], terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms whose gates are open; all of them in an update without the task's terms."""
        if not task or not terms:
            return terms
        goal = self._gradients(step, task)
        gates = {
            name: gradient_gate(self._gradients(step, {name: term}), goal, self.threshold)
            for name, term in terms.items()
        }
        return {name: term for name, term in terms.items() if gates[name]}
