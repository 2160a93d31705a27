# SPDX-License-Identifier: Apache-2.0
"""Compose: several distillers at once, each with a weight that is constant, scheduled or calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features, Step, Update
from kdlvfm.core.align import promote
from kdlvfm.core.distiller import Seen
from kdlvfm.core.gradients import gradients, inner_products
from kdlvfm.core.weight import Weight


class Compose(Distiller):
    r"""A weighted sum of distillers, trained together in one run.

    .. math:: L = L_\mathrm{task} + \sum_i w_i(t)\, L_i

    A part is any distiller. Its term `t` is called `<part>/t`, so that one method may be there twice, and its group `g`
    of parameters, unless it is the student's, `<part>/g`. The student moves as often in a batch as it does for the part
    that moves it most often: updates of the student are collected from all parts and taken as one, with the task's
    terms once. Updates of other groups are taken when their part asks for them. Features and the task's loss are
    computed once for all parts. So an update of another group must take the student's features detached.

    *Calibration.* With `share=s` the full weight of a part is s ‖∇L_task‖ / ‖∇L_i‖, the gradients being those of the
    student. They are measured at the part's first step and again every `calibrate_every` steps. A new length counts for
    half, all earlier ones for the other half. Where a length is 0 or not finite the last measurement holds; as long as
    there is none the full weight is 1. In a distributed run the squared lengths are averaged over the processes.

    Schedules and calibration are ours; DKD (Zhao et al., CVPR 2022) and ReviewKD (Chen et al., CVPR 2021) have warm-ups
    of this kind.

    Args:
        parts: the distillers, by the names that their terms and groups begin with.
        weights: of the parts, each a number, a `Weight` or its settings; 1 for a part that is not named.
        calibrate_every: steps between two measurements of the gradients.
        at: where they are measured: at a tap of the student, which costs a part of a backward pass for each part, or
            with `None` at all its parameters, which costs a whole one and is right whatever the parts tap. With a
            measurement every 50 steps the difference does not matter, so `None` is the default.

    Raises:
        ValueError: no parts, a name that none can have, or a weight that is none or for a part that there is not.

    Example:
        >>> from kdlvfm.distillers import CWD, KD
        >>> both = Compose({"kd": KD(), "cwd": CWD()}, {"cwd": {"value": 0.5, "warmup": 0.1}})
        >>> list(both({"logits": torch.rand(2, 3, 8, 8)}, {"logits": torch.rand(2, 3, 8, 8)}))
        ['kd/kd', 'cwd/cwd']
    """

    def __init__(
        self,
        parts: Mapping[str, Distiller],
        weights: Mapping[str, float | Weight | Mapping[str, Any]] = MappingProxyType({}),
        *,
        calibrate_every: int = 50,
        at: str | None = None,
    ) -> None:
        super().__init__()
        if calibrate_every < 1:
            raise ValueError(f"calibrate_every must be at least 1, not {calibrate_every}.")
        if not parts or not all(isinstance(name, str) and "/" not in name for name in parts):
            raise ValueError(f"there must be parts, with names without a slash, not {list(parts)}.")
        self.weights = _weights(parts, weights)
        try:
            self.parts = nn.ModuleDict(parts)
        except KeyError as error:
            raise ValueError(f"a part needs another name: {error.args[0]}.") from error
        self.calibrate_every = calibrate_every
        self.at = at
        self.student_taps = _union(*(part.student_taps for part in parts.values()), () if at is None else (at,))
        self.teacher_taps = _union(*(part.teacher_taps for part in parts.values()))
        self.calls_teacher = any(part.calls_teacher for part in parts.values())
        calibrated = any(weight.share is not None for weight in self.weights.values())  # against the task's gradient
        self.needs_truth = calibrated or any(part.needs_truth for part in parts.values())
        resting = [weight.at(0.0) == 0 or weight.stop < 1 for weight in self.weights.values()]
        self.may_rest = all(resting)
        self.moves_subsets = any(part.moves_subsets for part in parts.values()) or any(resting)
        # Of each calibrated part: the step of the last measurement, the lengths of the task's gradient and of its own.
        self._measured: dict[str, tuple[int, float, float]] = {}

    @classmethod
    def from_context(
        cls,
        context: Context,
        parts: Mapping[str, Callable[[Context], Distiller]] = MappingProxyType({}),
        **hparams: Any,
    ) -> Self:
        """Builds each part from the context. A part starts with the random weights that it would have alone.

        Raises:
            ValueError: something among `parts` builds no distiller.
        """
        if not isinstance(parts, Mapping):
            raise ValueError(f"parts must be distillers by name, not {parts!r}.")
        state, built = torch.get_rng_state(), {}
        for name, build in parts.items():
            if not callable(build):
                raise ValueError(
                    f"the part {name!r} is no method: choose one with distiller@distiller.parts.{name}=NAME, or mean "
                    f"another part, {', '.join(part for part, found in parts.items() if callable(found))}."
                )
            torch.set_rng_state(state)
            built[name] = build(context)
        return cls(built, **hparams)

    @property
    def _distillers(self) -> dict[str, Distiller]:
        return cast("dict[str, Distiller]", dict(self.parts.items()))

    def parameter_groups(self, student: nn.Module) -> dict[str, list[Parameter]]:
        """The student with all that the parts train along with it, and the parts' further groups.

        Raises:
            ValueError: two groups claim one parameter.
        """
        groups: dict[str, list[Parameter]] = {}
        owners: dict[int, str] = {}
        for name, part in self._distillers.items():
            for own, parameters in part.parameter_groups(student).items():
                group = own if own == "student" else f"{name}/{own}"
                held = groups.setdefault(group, [])
                for parameter in parameters:
                    if id(parameter) not in owners:
                        owners[id(parameter)] = group
                        held.append(parameter)
                    elif owners[id(parameter)] != group:
                        raise ValueError(
                            f"the groups {owners[id(parameter)]} and {group} have a parameter in common, and it can "
                            "have one optimizer only: leave out one of the parts."
                        )
        return groups

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms of all parts at full weight; schedules belong to `updates`, which knows how far the run is."""
        return {
            f"{name}/{term}": weight.value * self._ratio(name) * value
            for name, weight in self.weights.items()
            if weight.value
            for term, value in self._distillers[name](student, teacher, target).items()
        }

    def updates(self, step: Step) -> Iterator[Update]:
        """The updates of the parts that do not rest, those of the student collected."""
        weights = {name: now for name, weight in self.weights.items() if (now := weight.at(step.progress))}
        parts = {name: self._distillers[name] for name in weights}
        own = () if self.at is None else (self.at,)
        taps = (step.task.student_taps(step.student), own, *(part.student_taps for part in parts.values()))
        student = step.student_features(_union(*taps))
        teacher = step.teacher_features(_union(*(part.teacher_taps for part in parts.values())))
        shared = replace(step, seen=Seen({**student}, {**teacher}, step.task_loss(student)))
        if not parts:
            yield Update(shared.seen.task, task_terms=tuple(shared.seen.task))
        running = {name: part.updates(shared) for name, part in parts.items()}
        while running:
            moving: dict[str, Update] = {}
            for name, updates in list(running.items()):
                for update in updates:
                    if update.group == "student":
                        moving[name] = update
                        break
                    yield replace(update, group=f"{name}/{update.group}")
                else:
                    del running[name]
            if moving:
                yield self._collect(shared, moving, weights)
                # The student has moved: a part that goes on with it in this step must look at it again.
                shared.seen.student.clear()
                shared.seen.task.clear()

    def _collect(self, step: Step, moving: Mapping[str, Update], weights: Mapping[str, float]) -> Update:
        """One update of the student out of those of several parts."""
        task: dict[str, Tensor] = {}
        for update in moving.values():
            task |= {term: update.terms[term] for term in update.task_terms if term not in task}
        for name, update in moving.items():
            twice = update.distillation.keys() & {*task, *step.seen.task}
            if twice:
                raise ValueError(
                    f"{', '.join(sorted(twice))} would count twice: the updates of the part {name!r} must say in "
                    "task_terms which terms are the task's."
                )
        self._calibrate(step, task, {name: update.distillation for name, update in moving.items()})
        terms = {
            f"{name}/{term}": weights[name] * self._ratio(name) * value
            for name, update in moving.items()
            for term, value in update.distillation.items()
        }
        return Update({**task, **self._chosen(step, task, terms)}, task_terms=tuple(task))

    def _chosen(self, step: Step, task: Mapping[str, Tensor], terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weighted distillation terms that an update of the student takes: all of them."""
        del step, task
        return terms

    def _ratio(self, name: str) -> float:
        """What calibration makes of a weight of 1."""
        share, measured = self.weights[name].share, self._measured.get(name)
        return 1.0 if share is None or measured is None else share * measured[1] / measured[2]

    def _calibrate(self, step: Step, task: Mapping[str, Tensor], found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Measure the parts for which it is time."""
        due = [name for name, terms in found.items() if terms and self._is_due(name, step.number)]
        if not due or not task:
            return
        goal = self._gradients(step, task)
        for name in due:
            products = inner_products(goal, self._gradients(step, found[name]))
            lengths = products[1:].sqrt().tolist()
            if all(0 < length < math.inf for length in lengths):
                _, *before = self._measured.get(name, (0, *lengths))
                mean = [(old + new) / 2 for old, new in zip(before, lengths, strict=True)]
                self._measured[name] = (step.number, mean[0], mean[1])

    def _is_due(self, name: str, number: int) -> bool:
        if self.weights[name].share is None:
            return False
        return name not in self._measured or number - self._measured[name][0] >= self.calibrate_every

    def _gradients(self, step: Step, terms: Mapping[str, Tensor]) -> list[Tensor | None]:
        """The gradient of the sum of some terms, at the tap `at` or at all trainable parameters of the student.

        Raises:
            ValueError: the terms do not depend on the tap, or the tap is not known any more.
        """
        total = torch.stack([promote(term) for term in terms.values()]).sum()
        if self.at is None:
            return gradients(total, [p for p in step.student.parameters() if p.requires_grad])
        if self.at not in step.seen.student:
            raise ValueError(
                f"a part takes several steps of the student in a batch, and at={self.at} is known in the first: set "
                "at to null, for all parameters."
            )
        tap = step.seen.student[self.at]
        found = gradients(total, [tap]) if tap.requires_grad else []
        if not found or found[0] is None:
            raise ValueError(
                f"{', '.join(terms)} cannot be judged at={self.at}, since nothing of it depends on that tap as it was "
                "handed out: choose an earlier tap or, where maps of padded images are crops, one of the form "
                "module:<path>, or set at to null, for all parameters."
            )
        return found

    def get_extra_state(self) -> Tensor:
        """The measurements, for checkpoints: a resumed run weighs as one that was not stopped."""
        return torch.tensor([self._measured.get(name, (-1, 0, 0)) for name in self.weights], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take them back."""
        rows = zip(self.weights, state.tolist(), strict=True)
        self._measured = {name: (int(step), task, own) for name, (step, task, own) in rows if step >= 0}


def _union(*groups: Collection[str]) -> tuple[str, ...]:
    """All names once, in their order."""
    return tuple(dict.fromkeys(name for group in groups for name in group))


def _weights(
    parts: Mapping[str, Distiller], given: Mapping[str, float | Weight | Mapping[str, Any]]
) -> dict[str, Weight]:
    if not given.keys() <= parts.keys():
        unknown = ", ".join(sorted(given.keys() - parts.keys()))
        raise ValueError(f"there is a weight for {unknown}, and the parts are {', '.join(parts)}.")
    weights = {}
    for name in parts:
        try:
            weights[name] = Weight.of(given.get(name, 1.0))
        except (ValueError, TypeError) as error:
            raise ValueError(f"the weight of {name!r}: {error}") from error
    return weights
