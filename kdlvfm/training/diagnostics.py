# SPDX-License-Identifier: Apache-2.0
"""What a run's distillation does, looked at now and then: the pull of each term, and how alike the features become."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle

from kdlvfm.core import Update
from kdlvfm.core.gradients import gradients
from kdlvfm.core.similarity import tap_cka
from kdlvfm.training.dead_terms import DeadTerms
from kdlvfm.training.module import DistillationModule

EARLY = (1, 10)
MOST_POINTS = 30
MOST_PAIRS = 16
TASK = "task"

Point = dict[str, Any]
Gradients = Sequence[Tensor | None]


class Diagnostics(Callback):
    """Writes down, at steps 1 and 10 and every so many, what the terms and the features of a step are like.

    Of each distillation term, and of the task's terms together: the value, the norm of its gradient, and of a
    distillation term the cosine of its gradient to the task's. The gradients are those of the student's parameters, or
    in a group that has none of them those of the group; a term that a step has several times is looked at the first
    time. Of each pair of taps: the linear CKA of student and teacher. An update without distillation terms is passed
    over, so the baseline costs nothing.

    Nothing here changes the run: gradients are computed beside those that move it, and no random number is drawn. Each
    process looks at its own share of the batch; what is written is the first one's.

    Args:
        every: steps between looks; `None` never looks.
        dead_term_steps: steps after which a term that every look finds dead ends the run, see `DeadTerms`; `None` never
            does.

    Attributes:
        points: the looks, oldest first, thinned out evenly to a few dozen: `step`, `terms` by `<group>/<name>`, and
            `cka` by `<student tap>~<teacher tap>`. A number that is not finite or not defined is `None`.
    """

    def __init__(self, every: int | None = 100, dead_term_steps: int | None = 500) -> None:
        if every is not None and every < 1:
            raise ValueError(f"run.diagnose_every must be at least 1, not {every}; null switches diagnostics off.")
        self._every = every
        self._dead = DeadTerms(dead_term_steps)
        self._parameters: dict[str, list[Parameter]] = {}
        self._looking = False
        self._distillation: set[str] = set()
        self._terms: dict[str, dict[str, float | None]] = {}
        self._features: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        self._hooks: list[RemovableHandle] = []
        self.points: list[Point] = []

    def due(self, step: int) -> bool:
        """Whether the step, counted from 1, is looked at."""
        return self._every is not None and (step in EARLY or step % self._every == 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask to be shown every update."""
        del trainer
        if self._every is not None and isinstance(pl_module, DistillationModule):
            groups = pl_module.distiller.parameter_groups(pl_module.student)
            self._parameters = {name: _students(group, pl_module.student) for name, group in groups.items()}
            pl_module.observers.append(self._observe)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to both networks if the step is due."""
        del trainer, batch
        self._looking = self.due(batch_idx + 1)
        self._distillation, self._terms = set(), {}
        if self._looking and isinstance(pl_module, DistillationModule) and pl_module.teacher is not None:
            for role, network in (("student", pl_module.student), ("teacher", pl_module.teacher)):
                self._hooks.append(network.register_forward_hook(_keep_in(self._features[role])))

    def _observe(self, update: Update) -> None:
        """Look at an update whose gradients are still to be computed."""
        terms = {f"{update.group}/{name}": term for name, term in update.distillation.items()}
        self._distillation.update(terms)
        if not self._looking or terms.keys() <= self._terms.keys():
            return
        label = f"{update.group}/{TASK}"
        if label in terms:
            raise ValueError(f"a distillation term cannot be called {TASK!r}: so diagnostics call the task's terms.")
        parameters = self._parameters[update.group]
        own = [term.float() for name, term in update.terms.items() if name in update.task_terms]
        if own:
            terms = {label: torch.stack(own).sum(), **terms}
        reference: tuple[Gradients, Tensor] | None = None
        for name, term in terms.items():
            found = gradients(term, parameters)
            norm = _norm(found)
            cosine = None if reference is None else _dot(found, reference[0]) / (norm * reference[1])
            self._terms[name] = {"value": _finite(term), "grad_norm": _finite(norm), "cosine": _finite(cosine)}
            if name == label:
                reference = found, norm

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write down what was seen, and end a run that distils nothing."""
        del outputs, batch
        step = batch_idx + 1
        self._dead.present(self._distillation)
        if not self._looking or not isinstance(pl_module, DistillationModule):
            return
        point = {"step": step, "terms": self._terms, "cka": self._similarities(pl_module)}
        self._stop_listening()
        if self._terms:
            self.points.append(point)
            thin(self.points, MOST_POINTS)
            for logger in trainer.loggers:
                logger.log_metrics(_flat(point), step=batch_idx)
        for name, facts in self._terms.items():
            if name in self._distillation:
                self._dead.observe(name, facts["value"], facts["grad_norm"])
        error = self._dead.error(step)
        # Each process sees other images: unless all agree, those that went on would wait for the others for ever.
        if trainer.strategy.reduce_boolean_decision(error is not None, all=True) and error is not None:
            raise error

    def _similarities(self, module: DistillationModule) -> dict[str, float | None]:
        """CKA of the pairs of taps that both networks were asked for."""
        student, teacher = self._features["student"], self._features["teacher"]
        pairs = tap_pairs(module.distiller.student_taps, module.distiller.teacher_taps)
        return {
            f"{one}~{other}": _finite(tap_cka(student[one], teacher[other]))
            for one, other in pairs
            if one in student and other in teacher
        }

    def _stop_listening(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for kept in self._features.values():
            kept.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        del trainer
        if isinstance(pl_module, DistillationModule) and self._observe in pl_module.observers:
            pl_module.observers.remove(self._observe)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        del exception
        self._stop_listening()
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Looks so far, and how long each term may have been dead."""
        return {"points": self.points, "dead": self._dead.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.points = state_dict["points"]
        self._dead.load_state_dict(state_dict["dead"])


def tap_pairs(student: Sequence[str], teacher: Sequence[str]) -> list[tuple[str, str]]:
    """Taps in the order given if both sides have equally many, else each with each, sixteen pairs at most."""
    pairs = zip(student, teacher, strict=True) if len(student) == len(teacher) else itertools.product(student, teacher)
    return list(dict.fromkeys(itertools.islice(pairs, MOST_PAIRS)))


def thin(points: list[Point], most: int) -> None:
    """Take out, in place, what lies closest between its neighbours until `most` points are left; never the ends."""
    while len(points) > most:
        gaps = [after["step"] - before["step"] for before, after in zip(points, points[2:], strict=False)]
        del points[1 + gaps.index(min(gaps))]


def _students(group: Sequence[Parameter], student: nn.Module) -> list[Parameter]:
    """The student's parameters in a group; all of a group that has none."""
    own = {id(parameter) for parameter in student.parameters()}
    return [parameter for parameter in group if id(parameter) in own] or list(group)


def _keep_in(kept: dict[str, Tensor]) -> Callable[[nn.Module, Any, dict[str, Tensor]], None]:
    def keep(module: nn.Module, inputs: Any, output: dict[str, Tensor]) -> None:
        del module, inputs
        for tap, value in output.items():
            kept.setdefault(tap, value.detach())

    return keep


def _norm(found: Gradients) -> Tensor:
    return get_total_norm([gradient for gradient in found if gradient is not None])


def _dot(a: Gradients, b: Gradients) -> Tensor:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return torch.stack([(x * y).sum() for x, y in pairs]).sum() if pairs else torch.zeros(())


def _finite(value: Tensor | None) -> float | None:
    number = math.nan if value is None else float(value.detach())
    return number if math.isfinite(number) else None


def _flat(point: Mapping[str, Any]) -> dict[str, float]:
    """A point under the names of a logger."""
    named = {f"{term}/{name}": x for term, facts in point["terms"].items() for name, x in facts.items()}
    named.update({f"cka/{pair}": x for pair, x in point["cka"].items()})
    return {f"diagnostics/{name}": x for name, x in named.items() if x is not None}
