# SPDX-License-Identifier: Apache-2.0
"""CustomKD: the teacher's features are first customised to the student's head, then distilled, in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features, Step, Update
from kdlvfm.core.align import Resize, check_levels, check_resize, match_size, promote
from kdlvfm.core.aligner import Target, Targets
from kdlvfm.core.frozen import frozen
from kdlvfm.core.levels import head_pairs
from kdlvfm.core.projectors import Projector, build_projector


class CustomKD(Distiller):
    r"""Two phases in turns: customisation of the teacher's features, and distillation of both kinds of them.

    *Customisation* moves the customiser h alone. It learns to bring the teacher's feature f_T to where the student's
    head, as it is at this moment and frozen, already gets the labels y right:

    .. math:: L = L_\mathrm{task}\big(\mathrm{head}_S(h(f_T)), y\big)

    *Distillation* moves the student and the projector g, on the task's loss and two terms, with h frozen:

    .. math:: L = L_\mathrm{task} + \lambda_g\,\mathrm{MSE}\big(g(f_S), f_T\big)
                + \lambda_s\,\mathrm{MSE}\big(f_S, h(f_T)\big)

    Frozen means batch normalisation too: neither phase touches the statistics of the other's networks. Since only the
    second phase moves the student, it takes half as many steps as with other methods in a run of the same length.

    A head that reads several maps, as a detector's does, has all of them customised, each by a network of its own; the
    terms of all levels are added.

    Lee et al., "CustomKD: Customizing Large Vision Foundation for Edge Model Improvement via Knowledge Distillation",
    CVPR 2025: a method for classifiers of images, of which no code was published. Ours are its form for maps, the
    weights, the depth of both networks and the normalised targets. The paper alternates at every epoch, the best ratio
    that it tried.

    Args:
        student_dims: channels of the student's maps.
        teacher_dims: channels of the teacher's maps.
        general_weight: λ_g, of the term `customkd_general`: it knows the teacher and not the task.
        specific_weight: λ_s, of the term `customkd_specific`: it knows both.
        phase_steps: steps that a phase lasts; `None` for an epoch (the paper). Customisation comes first, so a run of
            a single phase never trains the student: where it is not given, a run of less than ten epochs has phases of
            a tenth of its steps.
        student_taps: what the student's head reads.
        teacher_taps: the teacher's maps, one for each of the student's; one may be named several times.
        projector: g, see `kdlvfm.core.projectors.build_projector`.
        customiser: h, one of the same kinds.
        resize: who is resized in the general term, see `kdlvfm.core.align.match_size`. By default each term compares
            in the space and on the grid of one network: the general one of the teacher, the specific one of the
            student.
        target: how the teacher's features are normalised, for both terms and for h; see `kdlvfm.core.aligner.Targets`.

    Raises:
        ValueError: `phase_steps` is below 1, taps and dimensions are not equally many, or another option is none of
            those there are.

    Example:
        >>> import torch
        >>> customkd = CustomKD([64], [192])
        >>> terms = customkd({"decoder": torch.rand(2, 64, 8, 8)}, {"map.-1": torch.rand(2, 192, 4, 4)})
        >>> list(terms)
        ['customkd_general', 'customkd_specific']
    """

    needs_truth = True

    def __init__(
        self,
        student_dims: Sequence[int],
        teacher_dims: Sequence[int],
        *,
        general_weight: float = 1.0,
        specific_weight: float = 1.0,
        phase_steps: int | None = None,
        student_taps: Sequence[str] = ("decoder",),
        teacher_taps: Sequence[str] = ("map.-1",),
        projector: Projector | None = "linear",
        customiser: Projector | None = "linear",
        resize: Resize = "student",
        target: Target = "standardize",
    ) -> None:
        super().__init__()
        check_levels(
            student_dims=student_dims, teacher_dims=teacher_dims, student_taps=student_taps, teacher_taps=teacher_taps
        )
        if phase_steps is not None and phase_steps < 1:
            raise ValueError(f"phase_steps must be at least 1, or None for an epoch, not {phase_steps}.")
        check_resize(resize)
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.general_weight = general_weight
        self.specific_weight = specific_weight
        self.phase_steps = phase_steps
        self.resize = resize
        dims = list(zip(student_dims, teacher_dims, strict=True))
        self.targets = nn.ModuleList(Targets(theirs, target) for _, theirs in dims)
        self.projectors = nn.ModuleList(build_projector(projector, ours, theirs) for ours, theirs in dims)
        self.customisers = nn.ModuleList(build_projector(customiser, theirs, ours) for ours, theirs in dims)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads the channels from the taps, and the length of a phase from that of the run.

        Where no taps are given for a detector, its head's levels are paired with those of the teacher, or with the maps
        of an encoder, of the nearest strides.

        Raises:
            ValueError: the student's taps are not what its head reads.
        """
        pairs = head_pairs(context) if context.task.truth == "boxes" else []
        if pairs and not hparams.keys() & {"student_taps", "teacher_taps"}:
            own, other = zip(*pairs, strict=True)
            hparams = {"student_taps": own, "teacher_taps": other, **hparams}
        if context.steps is not None and context.batches_per_epoch is not None:
            phase_steps = min(context.batches_per_epoch, max(context.steps // 10, 1))
            hparams = {"phase_steps": phase_steps, **hparams}
        distiller = cls(**context.level_dims(cls, hparams), **hparams)
        if context.student.head_taps != distiller.student_taps:
            reads = ", ".join(context.student.head_taps)
            advice = f"set student_taps to {reads}" if reads else "use a student whose head does, such as resnet18_fpn"
            raise ValueError(
                f"CustomKD needs the taps that the student's head reads, and the head of {context.student.card.name} "
                f"does not read {', '.join(distiller.student_taps)}: {advice}."
            )
        return distiller

    def parameter_groups(self, student: nn.Module) -> dict[str, list[Parameter]]:
        """The student with the projector, and the customiser."""
        moved = (*student.parameters(), *self.projectors.parameters())
        return {
            "student": [parameter for parameter in moved if parameter.requires_grad],
            "customiser": [parameter for parameter in self.customisers.parameters() if parameter.requires_grad],
        }

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms of the distillation phase; one whose weight is 0 is left out."""
        del target
        general, specific = [], []
        for level, (own_tap, other) in enumerate(zip(self.student_taps, self.teacher_taps, strict=True)):
            own, goal = promote(student[own_tap]), self.targets[level](teacher[other])
            if self.general_weight:
                pair = match_size(promote(self.projectors[level](own)), goal, self.resize)
                general.append(F.mse_loss(*pair))
            if self.specific_weight:
                with frozen(self.customisers[level]):
                    pair = match_size(own, promote(self.customisers[level](goal)), "teacher")
                specific.append(F.mse_loss(*pair))
        terms = {
            "customkd_general": (self.general_weight, general),
            "customkd_specific": (self.specific_weight, specific),
        }
        return {name: weight * torch.stack(losses).sum() for name, (weight, losses) in terms.items() if losses}

    def updates(self, step: Step) -> Iterator[Update]:
        """One update, of the group `customiser` or `student` by the phase that the step falls in."""
        phase = step.epoch if self.phase_steps is None else step.number // self.phase_steps
        if phase % 2:
            yield from super().updates(step)
            return
        teacher = step.teacher_features(self.teacher_taps)
        customised = {
            own: customiser(targets(teacher[other]))
            for own, other, targets, customiser in zip(
                self.student_taps, self.teacher_taps, self.targets, self.customisers, strict=True
            )
        }
        height, width = step.images.shape[-2:]
        with frozen(step.student):
            outputs = step.student.apply_head(customised, (height, width))
            terms = step.task.loss(step.student, outputs, step.target)
        yield Update(terms, group="customiser", task_terms=tuple(terms))
