# SPDX-License-Identifier: Apache-2.0
"""CustomKD: the teacher's features are first customised to the student's head, then distilled, in turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features, Step, Update
from kdlvfm.core.align import Resize, check_resize, match_size, promote
from kdlvfm.core.aligner import Target, Targets
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

    Lee et al., "CustomKD: Customizing Large Vision Foundation for Edge Model Improvement via Knowledge Distillation",
    CVPR 2025: a method for classifiers of images, of which no code was published. Ours are its form for maps, the
    weights, the depth of both networks and the normalised targets. The paper alternates at every epoch, the best ratio
    that it tried.

    Args:
        student_dim: channels of the student's feature.
        teacher_dim: channels of the teacher's map.
        general_weight: λ_g, of the term `customkd_general`: it knows the teacher and not the task.
        specific_weight: λ_s, of the term `customkd_specific`: it knows both.
        phase_steps: steps that a phase lasts; `None` for an epoch (the paper). Customisation comes first, so a run of
            a single phase never trains the student: where it is not given, a run of less than ten epochs has phases of
            a tenth of its steps.
        student_tap: what the student's head reads.
        teacher_tap: the teacher's map.
        projector: g, see `kdlvfm.core.projectors.build_projector`.
        customiser: h, one of the same kinds.
        resize: who is resized in the general term, see `kdlvfm.core.align.match_size`. By default each term compares
            in the space and on the grid of one network: the general one of the teacher, the specific one of the
            student.
        target: how the teacher's features are normalised, for both terms and for h; see `kdlvfm.core.aligner.Targets`.

    Raises:
        ValueError: `phase_steps` is below 1, or another option is none of those there are.

    Example:
        >>> import torch
        >>> customkd = CustomKD(student_dim=64, teacher_dim=192)
        >>> terms = customkd({"decoder": torch.rand(2, 64, 8, 8)}, {"map.-1": torch.rand(2, 192, 4, 4)})
        >>> list(terms)
        ['customkd_general', 'customkd_specific']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        general_weight: float = 1.0,
        specific_weight: float = 1.0,
        phase_steps: int | None = None,
        student_tap: str = "decoder",
        teacher_tap: str = "map.-1",
        projector: Projector | None = "linear",
        customiser: Projector | None = "linear",
        resize: Resize = "student",
        target: Target = "standardize",
    ) -> None:
        super().__init__()
        if phase_steps is not None and phase_steps < 1:
            raise ValueError(f"phase_steps must be at least 1, or None for an epoch, not {phase_steps}.")
        check_resize(resize)
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.general_weight = general_weight
        self.specific_weight = specific_weight
        self.phase_steps = phase_steps
        self.resize = resize
        self.targets = Targets(teacher_dim, target)
        self.projector = build_projector(projector, student_dim, teacher_dim)
        self.customiser = build_projector(customiser, teacher_dim, student_dim)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps, and the length of a phase from that of the run.

        Raises:
            ValueError: the student's tap is not what its head reads.
        """
        if context.steps is not None and context.batches_per_epoch is not None:
            phase_steps = min(context.batches_per_epoch, max(context.steps // 10, 1))
            hparams = {"phase_steps": phase_steps, **hparams}
        distiller = cls(**context.tap_dims(cls, hparams), **hparams)
        if context.student.head_taps != distiller.student_taps:
            reads = ", ".join(context.student.head_taps)
            advice = f"set student_tap to {reads}" if reads else "use a student whose head does, such as resnet18_fpn"
            raise ValueError(
                f"CustomKD needs a tap that the student's head reads, and the head of {context.student.card.name} does "
                f"not read {distiller.student_taps[0]}: {advice}."
            )
        return distiller

    def parameter_groups(self, student: nn.Module) -> dict[str, list[Parameter]]:
        """The student with the projector, and the customiser."""
        moved = (*student.parameters(), *self.projector.parameters())
        return {
            "student": [parameter for parameter in moved if parameter.requires_grad],
            "customiser": [parameter for parameter in self.customiser.parameters() if parameter.requires_grad],
        }

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms of the distillation phase; one whose weight is 0 is left out."""
        del target
        own, goal = promote(student[self.student_taps[0]]), self.targets(teacher[self.teacher_taps[0]])
        terms = {}
        if self.general_weight:
            pair = match_size(promote(self.projector(own)), goal, self.resize)
            terms["customkd_general"] = self.general_weight * F.mse_loss(*pair)
        if self.specific_weight:
            with _frozen(self.customiser):
                pair = match_size(own, promote(self.customiser(goal)), "teacher")
            terms["customkd_specific"] = self.specific_weight * F.mse_loss(*pair)
        return terms

    def updates(self, step: Step) -> Iterator[Update]:
        """One update, of the group `customiser` or `student` by the phase that the step falls in."""
        phase = step.epoch if self.phase_steps is None else step.number // self.phase_steps
        if phase % 2:
            yield from super().updates(step)
            return
        goal = self.targets(step.teacher_features(self.teacher_taps)[self.teacher_taps[0]])
        height, width = step.images.shape[-2:]
        with _frozen(step.student):
            outputs = step.student.apply_head({self.student_taps[0]: self.customiser(goal)}, (height, width))
        terms = step.task.loss(step.student, outputs, step.target)
        yield Update(terms, group="customiser", task_terms=tuple(terms))


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Within the context `network` is a constant: in eval mode and without parameters that take a gradient."""
    modes = {module: module.training for module in network.modules()}
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)
