# SPDX-License-Identifier: Apache-2.0
"""DataFree: any method of distillation on images that a synthesiser makes, without the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features, Step, Update
from kdlvfm.core.align import promote
from kdlvfm.core.distiller import Seen
from kdlvfm.core.synthesizer import GROUP, Synthesizer
from kdlvfm.distillers.compose import Compose

Labels = Literal["none", "teacher"]


class DataFree(Distiller):
    """A distiller that is shown synthetic images instead of those of the batch, which only say how many and how large.

    In each step the synthesiser gives a batch of images and takes the optimizer steps that it needs for it, as the
    group `synthesizer`; then the distiller does with the images what it does with others. There is no ground truth, so
    the task's loss is off and methods that learn from it are refused, unless the teacher's classes stand in for it.
    The teacher sees each batch once.

    A method that reads features alone leaves the head of the student as it was: join it with one that reads logits, or
    let the teacher label the images.

    Wrapper and options are ours; the sources of each way to make images are named there.

    Args:
        distiller: the method.
        synthesizer: where images come from.
        labels: `"none"`, or `"teacher"`: its likeliest class at each pixel is the ground truth, for the task's loss and
            for the method.
        confidence: of labels, the least probability; pixels below are unlabelled.

    Raises:
        ValueError: the method learns from ground truth, or has nothing to teach; there are no such labels.

    Example:
        >>> from kdlvfm.distillers import KD
        >>> from kdlvfm.distillers.synthesizers import Noise
        >>> blind = DataFree(KD(), Noise())
        >>> blind.teacher_taps
        ('logits',)
    """

    calls_teacher = True  # on images that no store has
    moves_subsets = True  # without the task's loss nothing may reach the student's head

    def __init__(
        self, distiller: Distiller, synthesizer: Synthesizer, *, labels: Labels = "none", confidence: float = 0.0
    ) -> None:
        super().__init__()
        if labels not in ("none", "teacher"):
            raise ValueError(f"labels must be 'none' or 'teacher', not {labels!r}.")
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence is a probability from 0 to below 1, not {confidence}.")
        name = type(distiller).__name__
        if labels == "none" and distiller.needs_truth:
            raise ValueError(
                f"{name} needs ground truth, and synthetic images have none: choose another method, such as kd, cwd or "
                "pkd, or for masks let the teacher label them with distiller.labels=teacher."
            )
        if labels == "none" and not distiller.teacher_taps:
            raise ValueError(f"{name} reads nothing of the teacher, so without data there is nothing to learn from.")
        if labels == "none" and isinstance(distiller, Compose) and distiller.may_rest:
            raise ValueError("every part has a weight that is 0 at some time, and then there is nothing to learn from.")
        self.distiller = distiller
        self.synthesizer = synthesizer
        self.labels: Labels = labels
        self.confidence = confidence
        self.student_taps = distiller.student_taps
        labelling = ("logits",) if labels == "teacher" else ()
        self.teacher_taps = tuple(dict.fromkeys((*distiller.teacher_taps, *labelling)))

    @classmethod
    def from_context(
        cls,
        context: Context,
        parts: Mapping[str, Callable[[Context], Distiller]] = MappingProxyType({}),
        synthesizer: Callable[[Context], Synthesizer] | None = None,
        weights: Mapping[str, Any] = MappingProxyType({}),
        **hparams: Any,
    ) -> Self:
        """Builds the synthesiser and the method: the one part, or the sum of several.

        Args:
            context: of the run.
            parts: methods by name.
            synthesizer: where images come from.
            weights: of several parts, see `Compose`.
            **hparams: the other arguments of the class.

        Raises:
            ValueError: a part is no method, there is no synthesiser, or the teacher is to label what it cannot.
        """
        if not callable(synthesizer):
            raise ValueError(f"a run without data needs a synthesizer, which {synthesizer!r} is not.")
        if hparams.get("labels") == "teacher" and context.task.truth != "masks":
            raise ValueError("the teacher can label synthetic images with masks, not with boxes: leave labels out.")
        joint = Compose.from_context(context, parts, weights=weights)
        alone = len(parts) == 1 and not weights
        method = cast(Distiller, next(joint.parts.children())) if alone else joint
        return cls(method, synthesizer(context), **hparams)

    def parameter_groups(self, student: nn.Module) -> dict[str, list[Parameter]]:
        """The method's groups, and what the synthesiser trains."""
        groups = self.distiller.parameter_groups(student)
        own = [parameter for parameter in self.synthesizer.parameters() if parameter.requires_grad]
        return {**groups, GROUP: own} if own else groups

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The method's terms on features of any images."""
        terms: dict[str, Tensor] = self.distiller(student, teacher, target)
        return terms

    def updates(self, step: Step) -> Iterator[Update]:
        """The synthesiser's updates, then the method's."""
        blank = step.images.new_zeros(()).expand(step.images.shape)
        nowhere = torch.full_like(step.index, -1)
        made = yield from self.synthesizer.synthesize(
            replace(step, images=blank, target=None, index=nowhere, seen=Seen()), self.teacher_taps
        )
        teacher = made.teacher_features(self.teacher_taps)
        target = self._label(teacher["logits"]) if self.labels == "teacher" else None
        yield from self.distiller.updates(replace(made, target=target, seen=Seen(teacher=teacher)))

    def _label(self, logits: Tensor) -> Tensor:
        """The teacher's classes (B, H, W), -1 where it is not sure."""
        sure, classes = promote(logits).softmax(dim=1).max(dim=1)
        return classes.masked_fill(sure < self.confidence, -1)
