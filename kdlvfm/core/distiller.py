# SPDX-License-Identifier: Apache-2.0
"""The distiller: a method of distillation, as a module that works on plain tensors."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from kdlvfm.core.features import FeatureModel, Features
from kdlvfm.core.task import Task
from kdlvfm.core.teacher import Teacher


@dataclass(frozen=True)
class Context:
    """What is known when a distiller is built inside a run: enough to size its projectors, memories and phases.

    Attributes:
        student: the network to train.
        teacher: the frozen network; `None` in a run without one.
        task: loss on ground truth.
        num_classes: classes of the data.
        num_samples: images in the training set.
        steps: batches of the whole run; `None` where that is not settled.
        batches_per_epoch: batches in one pass over the training set; `None` where that is not settled.
        batch_shape: images in a training batch, over all processes, and their height and width; `None` where that is
            not settled.
    """

    student: FeatureModel
    teacher: Teacher | None
    task: Task
    num_classes: int
    num_samples: int
    steps: int | None = None
    batches_per_epoch: int | None = None
    batch_shape: tuple[int, int, int] | None = None

    def require_teacher(self) -> Teacher:
        """The teacher.

        Raises:
            ValueError: the run has none.
        """
        if self.teacher is None:
            raise ValueError("this distiller needs a teacher: pass one, for example teacher=dinov3_vits16.")
        return self.teacher

    def require_batch_shape(self) -> tuple[int, int, int]:
        """Images in a training batch, their height and their width.

        Raises:
            ValueError: they are not settled.
        """
        if self.batch_shape is None:
            raise ValueError("the size of the training images is not known here: pass image_size=(height, width).")
        return self.batch_shape

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


@dataclass
class Seen:
    """What was already computed in a step: features by tap, and the task's terms by name."""

    student: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    task: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What one training step hands to `Distiller.updates`.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        target: the task's ground truth; `None` where there is none, and then the task has no terms.
        index: (B,) position of each sample in its data set.
        epoch: epochs completed; all that a phase may depend on, so that resuming is exact, are this, `batch`,
            `number` and `progress`.
        batch: batches completed in this epoch.
        student: the network being trained.
        teacher: the frozen network; `None` in a run without one.
        task: loss on ground truth.
        progress: share of the run completed, from 0 to below 1.
        number: batches completed in the run.
        seen: what was already computed for these images, which several distillers of one step share.
    """

    images: Tensor
    target: Any
    index: Tensor
    epoch: int
    batch: int
    student: FeatureModel
    teacher: Teacher | None
    task: Task
    progress: float = 0.0
    number: int = 0
    seen: Seen = field(default_factory=Seen)

    def student_features(self, taps: Collection[str]) -> dict[str, Tensor]:
        """The student's features of the images; a forward pass unless `seen` has them all."""
        if not all(tap in self.seen.student for tap in taps):
            features: dict[str, Tensor] = self.student(self.images, tuple(dict.fromkeys(taps)))
            return features
        return {tap: self.seen.student[tap] for tap in taps}

    def teacher_features(self, taps: Collection[str]) -> dict[str, Tensor]:
        """The teacher's features of the images; a forward pass unless `seen` has them all.

        Raises:
            ValueError: taps are asked of a teacher, and the step has none.
        """
        if all(tap in self.seen.teacher for tap in taps):
            return {tap: self.seen.teacher[tap] for tap in taps}
        if self.teacher is None:
            raise ValueError(f"a distiller taps {', '.join(taps)} of a teacher, and this step has none.")
        features: dict[str, Tensor] = self.teacher(self.images, tuple(dict.fromkeys(taps)))
        return features

    def task_loss(self, features: Features) -> dict[str, Tensor]:
        """The task's terms for the student's features of the images, the task's taps among them, unless `seen`."""
        if self.target is None:
            return {}
        return dict(self.seen.task) or self.task.loss(self.student, features, self.target)


@dataclass(frozen=True)
class Update:
    """One optimizer step to take now: the terms are summed, and the parameters of `group` move.

    Attributes:
        terms: what is summed, each a scalar.
        group: whose parameters move.
        task_terms: which of the terms are the task's own; the rest is distillation.
    """

    terms: Mapping[str, Tensor]
    group: str = "student"
    task_terms: Collection[str] = ()

    @property
    def distillation(self) -> dict[str, Tensor]:
        """The terms that are not the task's."""
        return {name: term for name, term in self.terms.items() if name not in self.task_terms}


class Distiller(nn.Module, ABC):
    """A method. Subclasses set the two tap tuples and define `forward`; three other methods may be replaced.

    Attributes:
        student_taps: taps of the student that `forward` reads.
        teacher_taps: taps of the teacher that `forward` reads; empty means that no teacher is needed.
        moves_subsets: an update may leave trainable parameters of its group without a gradient, for instance since a
            term is switched off; training on several processes must know.
        calls_teacher: it wants more of the teacher than its features of a step's images at `teacher_taps`, for instance
            a part of its network, or features of other images; what was stored of a teacher does not serve it.
        needs_truth: the method learns from ground truth, so that it has nothing to teach on images without.
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    moves_subsets: bool = False
    calls_teacher: bool = False
    needs_truth: bool = False

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Distiller:
        """Build inside a run: a distiller of this class or, for some task, of one that takes its place there.

        Override where dimensions must be read from `context`.
        """
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
        """One `Update` for each optimizer step of the method; code after a `yield` runs after that step was taken.

        A term that is switched off, for now or for good, is left out rather than 0: a term that stays 0 is taken for a
        mistake.
        """
        student = step.student_features((*step.task.student_taps(step.student), *self.student_taps))
        teacher = step.teacher_features(self.teacher_taps)
        terms = step.task_loss(student)
        distillation = self(student, teacher, step.target)
        clash = terms.keys() & distillation.keys()
        if clash:
            raise ValueError(f"task and distiller both have a term called {', '.join(sorted(clash))}.")
        yield Update({**terms, **distillation}, task_terms=tuple(terms))
