# SPDX-License-Identifier: Apache-2.0
"""The distiller: a method of distillation, as a module that works on plain tensors."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import Self

from kdlvfm.core.features import FeatureModel, Features
from kdlvfm.core.task import Task
from kdlvfm.core.teacher import Teacher


@dataclass(frozen=True)
class Context:
    """What is known when a distiller is built inside a run: enough to size its projectors and memories."""

    student: FeatureModel
    teacher: Teacher | None
    task: Task
    num_classes: int
    num_samples: int

    def require_teacher(self) -> Teacher:
        """The teacher.

        Raises:
            ValueError: the run has none.
        """
        if self.teacher is None:
            raise ValueError("this distiller needs a teacher: pass one, for example teacher=dinov3_vits16.")
        return self.teacher

    def tap_dims(self, method: type[Distiller], hparams: Mapping[str, Any]) -> dict[str, Any]:
        """Channels at the two taps of a method that has one of each: `student_dim` and `teacher_dim`.

        A dimension among `hparams` is left out: it was given because the network cannot state it (`module:<path>`).

        Args:
            method: a distiller whose constructor takes `student_tap` and `teacher_tap`.
            hparams: the arguments chosen; a tap that they do not name is the constructor's default.

        Raises:
            TapError: a network has no such tap.
        """
        defaults = {name: parameter.default for name, parameter in inspect.signature(method).parameters.items()}
        chosen = {**defaults, **hparams}
        dims: dict[str, Any] = {}
        if "student_dim" not in hparams:
            dims["student_dim"] = self.student.tap_info(chosen["student_tap"]).dim
        if "teacher_dim" not in hparams:
            dims["teacher_dim"] = self.require_teacher().tap_info(chosen["teacher_tap"]).dim
        return dims

    def level_dims(self, method: type[Distiller], hparams: Mapping[str, Any]) -> dict[str, Any]:
        """As `tap_dims`, for a method with several levels: `student_dims` and `teacher_dims`, one for each tap.

        Args:
            method: a distiller whose constructor takes `student_taps` and `teacher_taps`.
            hparams: the arguments chosen; taps that they do not name are the constructor's default.

        Raises:
            TapError: a network has no such tap.
        """
        defaults = {name: parameter.default for name, parameter in inspect.signature(method).parameters.items()}
        chosen = {**defaults, **hparams}
        dims: dict[str, Any] = {}
        if "student_dims" not in hparams:
            dims["student_dims"] = [self.student.tap_info(tap).dim for tap in chosen["student_taps"]]
        if "teacher_dims" not in hparams:
            dims["teacher_dims"] = [self.require_teacher().tap_info(tap).dim for tap in chosen["teacher_taps"]]
        return dims


@dataclass(frozen=True)
class Step:
    """What one training step hands to `Distiller.updates`.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        target: the task's ground truth.
        index: (B,) position of each sample in its data set.
        epoch: epochs completed; with `batch`, all that a phase may depend on, so that resuming is exact.
        batch: batches completed in this epoch.
        student: the network being trained.
        teacher: the frozen network; `None` in a run without one.
        task: loss on ground truth.
    """

    images: Tensor
    target: Any
    index: Tensor
    epoch: int
    batch: int
    student: FeatureModel
    teacher: Teacher | None
    task: Task


@dataclass(frozen=True)
class Update:
    """One optimizer step to take now: the terms are summed, and the parameters of `group` move."""

    terms: Mapping[str, Tensor]
    group: str = "student"


class Distiller(nn.Module, ABC):
    """A method. Subclasses set the two tap tuples and define `forward`; three other methods may be replaced.

    Attributes:
        student_taps: taps of the student that `forward` reads.
        teacher_taps: taps of the teacher that `forward` reads; empty means that no teacher is needed.
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Build inside a run. Override where dimensions must be read from `context`."""
        del context
        return cls(**hparams)

    @abstractmethod
    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """Weighted distillation terms by name, each a scalar."""

    def parameter_groups(self, student: nn.Module) -> dict[str, list[Parameter]]:
        """Trainable parameters by group; each group has its own optimizer, and `Update.group` picks one."""
        modules: list[nn.Module] = [student, self]
        return {"student": [p for module in modules for p in module.parameters() if p.requires_grad]}

    def updates(self, step: Step) -> Iterator[Update]:
        """One `Update` for each optimizer step of the method; code after a `yield` runs after that step was taken."""
        if self.teacher_taps and step.teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher, and this step has none.")
        taps = dict.fromkeys((*step.task.student_taps, *self.student_taps))
        student = step.student(step.images, tuple(taps))
        teacher = step.teacher(step.images, self.teacher_taps) if step.teacher is not None else {}
        terms = step.task.loss(step.student, student, step.target)
        distillation = self(student, teacher, step.target)
        clash = terms.keys() & distillation.keys()
        if clash:
            raise ValueError(f"task and distiller both have a term called {', '.join(sorted(clash))}.")
        yield Update({**terms, **distillation})
