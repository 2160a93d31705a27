# SPDX-License-Identifier: Apache-2.0
"""Masks over a teacher's map that a task teaches: tokens, their overlap, the task's loss, and when they learn."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import Self

from kdlvfm.core.align import promote, resize_map
from kdlvfm.core.aligner import Aligner
from kdlvfm.core.distiller import Context, Distiller, Seen, Step, Update
from kdlvfm.core.features import FeatureModel, TapError, resolve_tap


class ReceptiveTokens(nn.Module):
    r"""Learned vectors, each of which makes a mask: how much the feature at a position points its way.

    .. math:: m_{ti} = \mathrm{sigmoid}(e_t^\top f_i)

    Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023.

    Args:
        count: T.
        dim: channels of the map.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(0.01 * torch.randn(count, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to masks (B, T, H, W) from 0 to 1, in single precision at least."""
        with torch.autocast(x.device.type, enabled=False):
            return torch.einsum("tc,bchw->bthw", promote(self.vectors), promote(x)).sigmoid()


def mask_diversity_loss(masks: Tensor) -> Tensor:
    r"""How much the masks of an image overlap: the mean Dice coefficient of its pairs.

    .. math:: L = \frac{1}{B\,T (T - 1)} \sum_b \sum_{t \neq u}
        \frac{2 \sum_i m_{ti} m_{ui}}{\sum_i m_{ti}^2 + \sum_i m_{ui}^2}

    Args:
        masks: (B, T, H, W), T at least 2.

    Returns:
        A scalar from 0 (disjoint) to 1 (equal): the mean over images and pairs.

    Raises:
        ValueError: there is one mask only, which has nothing to differ from.

    Source:
        Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023.

    Example:
        >>> mask_diversity_loss(torch.eye(2).view(1, 2, 1, 2)).item()
        0.0
    """
    count = masks.shape[1]
    if count < 2:
        raise ValueError(f"diversity needs at least 2 masks, not {count}.")
    flat = promote(masks).flatten(2)
    with torch.autocast(masks.device.type, enabled=False):
        products = flat @ flat.mT
    squares = products.diagonal(dim1=1, dim2=2)
    dice = 2 * products / (squares.unsqueeze(1) + squares.unsqueeze(2)).clamp(min=1e-12)
    return (dice.sum() - dice.diagonal(dim1=1, dim2=2).sum()) / (len(masks) * count * (count - 1))


class MaskedTask(nn.Module):
    """The task's loss on what a teacher's masked map still tells about the labels.

    Args:
        tap: the teacher's tap that is masked.
        dim: its channels.
        num_classes: classes of a linear head that learns along with the masks; `None` uses the teacher's own head,
            frozen, which reads the tap.
    """

    def __init__(self, tap: str, dim: int, num_classes: int | None) -> None:
        super().__init__()
        self.tap = tap
        self.head = None if num_classes is None else nn.Conv2d(dim, num_classes, kernel_size=1)

    @staticmethod
    def arguments(context: Context, method: type[Distiller], hparams: Mapping[str, Any]) -> dict[str, Any]:
        """As `Context.tap_dims`, and `num_classes`: of the task, or `None` where the teacher's head reads its tap.

        Args:
            context: the run.
            method: a distiller whose constructor takes `student_tap`, `teacher_tap` and `num_classes`.
            hparams: the arguments chosen; what is among them is left out.

        Raises:
            TapError: a network has no such tap.
            ValueError: the task is not one of dense labels.
        """
        if context.task.truth != "masks":
            raise ValueError(
                f"{method.__name__} learns masks with the loss of dense labels, and the task learns from "
                f"{context.task.truth}: choose another distiller."
            )
        found = context.tap_dims(method, hparams)
        if "num_classes" not in hparams:
            defaults = {name: parameter.default for name, parameter in inspect.signature(method).parameters.items()}
            model = context.require_teacher().model
            tap = {**defaults, **hparams}["teacher_tap"]
            own = model.head_taps == (_canonical(tap, model),) and context.task.solves(model)
            found["num_classes"] = None if own else context.num_classes
        return found

    def shown(self, features: Tensor, targets: Tensor) -> Tensor:
        """What is to be masked: the teacher's features as they are for its own head, normalised for a new one."""
        return promote(features.detach()) if self.head is None else targets

    def forward(self, step: Step, masked: Tensor) -> dict[str, Tensor]:
        """The task's terms, named `mask_<term>`, of a masked map (B, C, h, w)."""
        height, width = step.images.shape[-2:]
        if self.head is not None:
            outputs = {"logits": resize_map(promote(self.head(masked)), (height, width))}
        else:
            if step.teacher is None:
                raise ValueError("the masks are learned with the teacher's head, and this step has no teacher.")
            model = step.teacher.model
            # Where the teacher is and in its precision, which may be others than the student's.
            read = {_canonical(self.tap, model): masked.to(next(model.parameters()))}
            outputs = {tap: value.to(masked.device) for tap, value in model.apply_head(read, (height, width)).items()}
        terms = step.task.loss(step.student, outputs, step.target)
        return {f"mask_{name}": term for name, term in terms.items()}


class MaskLearner(Distiller):
    """A distiller whose masks are learned in the first part of the run, with the task's loss, and then kept.

    In that part each step has an update of the masks, and in all of the run one of the student. What the distiller
    trains besides its projector is the group `masks`.

    Args:
        align: brings the student's map to the teacher's.
        masked_task: the task's loss on a masked map.
        mask_share: share of the run in which the masks are learned.

    Raises:
        ValueError: the share is none.
    """

    needs_truth = True

    def __init__(self, align: Aligner, masked_task: MaskedTask, mask_share: float) -> None:
        super().__init__()
        if not 0 < mask_share <= 1:
            raise ValueError(f"mask_share must be above 0 and at most 1, not {mask_share}: masks must be learned.")
        self.align = align
        self.masked_task = masked_task
        self.mask_share = mask_share

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps, and the classes unless the teacher's head reads its tap.

        Raises:
            ValueError: the task is not one of dense labels.
        """
        return cls(**MaskedTask.arguments(context, cls, hparams), **hparams)

    @abstractmethod
    def mask_terms(self, step: Step, features: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the masks learn from: the task's terms on the teacher's masked map, and further terms.

        Args:
            step: the training step.
            features: the teacher's map.
        """

    def parameter_groups(self, student: nn.Module) -> dict[str, list[Parameter]]:
        """The student with the projector, and what is learned with the masks."""
        projector = {id(parameter) for parameter in self.align.parameters()}
        moved = (*student.parameters(), *self.align.parameters())
        return {
            "student": [parameter for parameter in moved if parameter.requires_grad],
            "masks": [parameter for parameter in self.parameters() if id(parameter) not in projector],
        }

    def updates(self, step: Step) -> Iterator[Update]:
        """In the first part of the run an update of the masks, then in all of it the student's."""
        if step.progress < self.mask_share:
            teacher = step.teacher_features(self.teacher_taps)
            step = replace(step, seen=Seen(step.seen.student, {**step.seen.teacher, **teacher}, step.seen.task))
            task, others = self.mask_terms(step, teacher[self.teacher_taps[0]])
            yield Update({**task, **others}, group="masks", task_terms=tuple(task))
        yield from super().updates(step)


def _canonical(tap: str, model: FeatureModel) -> str:
    """The tap's name as the model's head knows it; one without stated facts, `module:<path>`, keeps its own."""
    try:
        return resolve_tap(tap, model.taps(), model.card.name)[0]
    except TapError:
        return tap
