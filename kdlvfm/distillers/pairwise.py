# SPDX-License-Identifier: Apache-2.0
"""Pairwise: the similarities between all positions of an image follow those of the teacher (SKDS)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features, Step, Update
from kdlvfm.core.align import (
    Resize,
    TargetNorm,
    gram_distance,
    match_size,
    normalise_target,
    promote,
    resize_map,
    unit_vectors,
)
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.discriminator import Discriminator, gradient_penalty
from kdlvfm.core.distiller import Seen


def pairwise_loss(student: Tensor, teacher: Tensor, pool: int | float | None = None) -> Tensor:
    r"""Mean squared difference of the cosine similarities between the positions of each image.

    .. math::
        L = \frac{1}{B M^2} \sum_b \sum_{i,j} \big(a^S_{ij} - a^T_{ij}\big)^2, \quad
        a_{ij} = \frac{f_i^\top f_j}{\lVert f_i \rVert \, \lVert f_j \rVert}

    over the M positions of the map, or of the pooled map. The M x M matrices are formed only where M is smaller than
    the number of channels; otherwise the distance comes from products of channels. The channels of the two networks
    need not agree. The authors' code holds the norms constant in the backward pass; here the gradient is that of the
    equation.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W); receives no gradient.
        pool: `None` compares single positions. An integer is the side of max-pooling windows: 2 in CIRKD's code. A
            float is that side as a share of H and W: 0.5, four nodes an image, in the authors' code.

    Returns:
        A scalar: the mean over samples and pairs of positions.

    Raises:
        ValueError: the maps differ in batch or size, or `pool` is not positive.

    Source:
        The pair-wise term of Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019.

    Example:
        >>> import torch
        >>> student = torch.eye(2).view(1, 2, 1, 2)
        >>> round(pairwise_loss(student, torch.ones(1, 3, 1, 2)).item(), 6)
        0.5
    """
    if student.dim() != 4 or (student.shape[0], *student.shape[2:]) != (teacher.shape[0], *teacher.shape[2:]):
        raise ValueError(
            f"maps (B, C, H, W) must agree in B, H and W, not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    first, second = (_nodes(promote(x), pool) for x in (student, teacher.detach()))
    return gram_distance(first, second)


def _nodes(x: Tensor, pool: int | float | None) -> Tensor:
    """Unit vectors (B, M, C) of the positions left by max pooling."""
    if pool is not None:
        if pool <= 0:
            raise ValueError(f"pool must be positive or None, not {pool}.")
        height, width = (max(int(side * pool), 1) if isinstance(pool, float) else pool for side in x.shape[2:])
        x = F.max_pool2d(x, (height, width), ceil_mode=True)
    return unit_vectors(x).flatten(2).transpose(1, 2)


class Pairwise(Distiller):
    """Pair-wise similarities between positions; optionally the paper's holistic term, a discriminator.

    Without the holistic term there is nothing to project and nothing else to train. The paper's pixel-wise term is
    `KD`.

    With `adversarial_weight` the student is rewarded for maps that a discriminator D takes for the teacher's: its loss
    gains -w mean D(S). After each of its steps the discriminator, a group of parameters of its own, takes one on
    mean D(S) - mean D(T) and the gradient penalty. Neither step moves the other network. `recipe.groups.discriminator`
    gives it an optimizer of its own: the authors' is SGD with a learning rate of 4e-4, CIRKD's is Adam with the same.
    Since the images are needed, these terms are made in `updates`, not in `forward`.

    Args:
        loss_weight: weight of the term: 10 in CIRKD's code, 1 in the authors'.
        pool: see `pairwise_loss`. The published code pools to save memory, which is not needed here, and a maximum
            over the signed features of a ViT means little, so by default there is no pooling.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised, which keeps the few channels of
            very large norm in a ViT from deciding all cosines; see `kdlvfm.core.align.normalise_target`.
        adversarial_weight: weight w of the holistic term; 0 is without it and its discriminator. 0.1 in the authors'
            code, 1e-3 in CIRKD's, which has a hinge loss and no penalty.
        penalty_weight: weight of the gradient penalty in the discriminator's loss; 10 in the authors' code.
        judged_student_tap: the student's map that is judged, resized to 64x64.
        judged_teacher_tap: the teacher's map that is judged: its logits, as in the paper, or for a teacher without
            classes a map of features, to whose channels a 1x1 convolution then brings the student's.
        judged_student_dim: channels of the student's judged map; needed where the weight is not 0.
        judged_teacher_dim: channels of the teacher's judged map; needed where the weight is not 0.
        judged_target: as `target`, for the judged maps; see `kdlvfm.core.aligner.Targets`.
        condition: judge map and image together, as the paper says; its code judges the map alone.

    Raises:
        ValueError: a weight is negative, or the discriminator lacks the channels of what it judges.

    Example:
        >>> import torch
        >>> terms = Pairwise()({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)})
        >>> list(terms)
        ['pairwise']
    """

    def __init__(
        self,
        *,
        loss_weight: float = 10.0,
        pool: int | float | None = None,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        resize: Resize = "larger",
        target: TargetNorm = "raw",
        adversarial_weight: float = 0.0,
        penalty_weight: float = 10.0,
        judged_student_tap: str = "logits",
        judged_teacher_tap: str = "logits",
        judged_student_dim: int | None = None,
        judged_teacher_dim: int | None = None,
        judged_target: Target = "raw",
        condition: bool = True,
    ) -> None:
        super().__init__()
        if adversarial_weight < 0 or penalty_weight < 0:
            raise ValueError(
                f"adversarial_weight and penalty_weight must not be negative: {adversarial_weight}, {penalty_weight}."
            )
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.pool = pool
        self.resize = resize
        self.target = target
        self.adversarial_weight = adversarial_weight
        self.penalty_weight = penalty_weight
        self.condition = condition
        self.judged: Aligner | None = None
        self.discriminator: Discriminator | None = None
        if adversarial_weight > 0:
            if judged_student_dim is None or judged_teacher_dim is None:
                raise ValueError(
                    "the discriminator needs the channels of what it judges: pass judged_student_dim and "
                    "judged_teacher_dim, or adversarial_weight=0 to go without it."
                )
            self.student_taps = tuple(dict.fromkeys((student_tap, judged_student_tap)))
            self.teacher_taps = tuple(dict.fromkeys((teacher_tap, judged_teacher_tap)))
            self.judged = Aligner(
                judged_student_dim, judged_teacher_dim, projector=None, resize=Discriminator.size, target=judged_target
            )
            self.discriminator = Discriminator(judged_teacher_dim + 3 * condition)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads the channels of what is judged from the taps."""
        defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
        chosen = {**defaults, **hparams}
        dims: dict[str, Any] = {}
        if chosen["adversarial_weight"] > 0 and "judged_student_dim" not in hparams:
            dims["judged_student_dim"] = context.student.tap_info(chosen["judged_student_tap"]).dim
        if chosen["adversarial_weight"] > 0 and "judged_teacher_dim" not in hparams:
            dims["judged_teacher_dim"] = context.require_teacher().tap_info(chosen["judged_teacher_tap"]).dim
        return cls(**dims, **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `pairwise`."""
        del target
        goal = normalise_target(promote(teacher[self.teacher_taps[0]]), self.target)
        first, second = match_size(promote(student[self.student_taps[0]]), goal, self.resize)
        return {"pairwise": self.loss_weight * pairwise_loss(first, second, self.pool)}

    def parameter_groups(self, student: nn.Module) -> dict[str, list[Parameter]]:
        """The discriminator, where there is one, apart from the student and the projector of what is judged."""
        groups = super().parameter_groups(student)
        if self.discriminator is None:
            return groups
        own = list(self.discriminator.parameters())
        held = {id(parameter) for parameter in own}
        return {"student": [p for p in groups["student"] if id(p) not in held], "discriminator": own}

    def updates(self, step: Step) -> Iterator[Update]:
        """The student's update with the term `adversarial`, then the discriminator's; or, without one, the usual."""
        if self.judged is None or self.discriminator is None:
            yield from super().updates(step)
            return
        student = step.student_features((*step.task.student_taps(step.student), *self.student_taps))
        teacher = step.teacher_features(self.teacher_taps)
        shared = replace(step, seen=Seen({**step.seen.student, **student}, {**step.seen.teacher, **teacher}))
        fake, real = self.judged(student[self.student_taps[-1]], teacher[self.teacher_taps[-1]])
        images = resize_map(step.images, Discriminator.size) if self.condition else None
        # With its parameters as constants the discriminator passes a gradient on and takes none.
        constants = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        for update in super().updates(shared):
            scores: Tensor = torch.func.functional_call(self.discriminator, constants, (fake, images))
            yield replace(update, terms={**update.terms, "adversarial": -self.adversarial_weight * scores.mean()})
        fake, discriminator = fake.detach(), self.discriminator
        share = torch.rand((len(fake), 1, 1, 1), device=fake.device)
        terms = {"discriminator": discriminator(fake, images).mean() - discriminator(real, images).mean()}
        if self.penalty_weight > 0:
            penalty = gradient_penalty(lambda mixed: discriminator(mixed, images), fake, real, share)
            terms["gradient_penalty"] = self.penalty_weight * penalty
        yield Update(terms, group="discriminator")
