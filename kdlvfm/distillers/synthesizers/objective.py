# SPDX-License-Identifier: Apache-2.0
"""What a synthesiser is to make: images that the student gets wrong, the teacher knows, and photographs resemble."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlvfm.core import Context, FeatureModel, Features, Step, Teacher
from kdlvfm.core.align import match_size, promote, resize_map
from kdlvfm.core.frozen import frozen
from kdlvfm.distillers.synthesizers.priors import (
    attention_layers,
    centred_patches,
    inputs_of,
    norm_layers,
    patch_entropy,
    statistics_gap,
    total_variation,
)

Gap = Literal["logits", "relations"]
Terms = dict[str, Tensor]

_MAP = "map.-1"
_SIDE = 16
_EVERY = 3


@dataclass(frozen=True)
class Objective:
    r"""The loss of an image, or of what makes it. Each field but the last is the weight of a term; 0 leaves it out.

    .. math::
        L = -\alpha \ln(1 + d) + \lambda_o\,\mathrm{CE}(z_T, \arg\max z_T) + \lambda_b \sum_c \bar p_c \ln \bar p_c
            - \lambda_a\,\mathrm{mean}|f_T| + \lambda_n L_\mathrm{BN} - \lambda_e H + \lambda_v\,\mathrm{TV}

    where d is how far the student is from the teacher and :math:`\bar p` the teacher's mean probability over the batch
    and, for dense logits, over its pixels. The teacher is a constant that passes gradients on to the image, and so is
    the student, in eval mode.

    Terms of four papers: DFAD's adversarial one in its form for segmentation (Fang et al., "Data-Free Adversarial
    Distillation", 2019), DAFL's on the teacher's classes (Chen et al., "Data-Free Learning of Student Networks", ICCV
    2019), DeepInversion's statistics of batch normalisation and total variation (Yin et al., CVPR 2020), and for
    teachers without batch normalisation PSAQ-ViT's entropy of patch similarities (Li et al., ECCV 2022). To put them
    together is ours, and so are the default weights.

    A term of layers that the teacher has not is left out.

    Attributes:
        adversarial: α.
        one_hot: λ_o; the teacher is to be sure.
        balance: λ_b; all classes are to occur.
        activation: λ_a; the feature that the teacher's head reads, or else its last map, is to be strong.
        bn: λ_n, see `statistics_gap`.
        entropy: λ_e, see `patch_entropy`, summed over every third block of the teacher, the last one among them: of the
            attention's output, averaged over heads, and of networks that are no plain ViT of timm's of their maps, each
            centred (ours).
        tv: λ_v, see `total_variation`.
        gap: d. `"logits"` is the mean absolute difference of logits, DFAD's. `"relations"`, for teachers that have not
            the student's classes, is the mean absolute difference of the cosines between all positions of the last
            maps, on a grid of 16x16 at most; it is ours, and needs no projector between the two.

    Raises:
        ValueError: a weight is negative, all are 0, or there is no such gap.
    """

    adversarial: float = 1.0
    one_hot: float = 0.1
    balance: float = 1.0
    activation: float = 0.0
    bn: float = 1.0
    entropy: float = 1.0
    tv: float = 1e-4
    gap: Gap = "logits"

    def __post_init__(self) -> None:
        weights = {name: value for name, value in vars(self).items() if name != "gap"}
        wrong = [f"{name}={value!r}" for name, value in weights.items() if not value >= 0]
        if wrong:
            raise ValueError(f"the weights of a synthesiser's terms must not be negative: {', '.join(wrong)}.")
        if not any(weights.values()):
            raise ValueError(f"all of {', '.join(weights)} are 0: there is nothing to synthesise for.")
        if self.gap not in ("logits", "relations"):
            raise ValueError(f"gap must be 'logits' or 'relations', not {self.gap!r}.")

    @classmethod
    def fitting(cls, context: Context, **chosen: Any) -> Objective:
        """The objective for the networks of a run: what was chosen, and of the rest what they have to offer.

        Logits, where both networks tell the same classes apart; terms of classes, where the teacher has some; the
        statistics of batch normalisation or, where the teacher has none, the entropy of patches.

        Raises:
            TapError: a term was chosen for which the teacher lacks classes or maps.
        """
        student, teacher = context.student, context.require_teacher()
        offered: dict[str, Any] = {"entropy": 0.0} if norm_layers(teacher.model) else {"bn": 0.0}
        if "logits" not in teacher.taps():
            offered |= {"one_hot": 0.0, "balance": 0.0}
        if "logits" not in teacher.taps() or student.taps().get("logits") != teacher.tap_info("logits"):
            offered["gap"] = "relations"
        objective = cls(**{**offered, **chosen})
        for tap in objective.teacher_taps(teacher.model):
            teacher.check_tap(tap)
        for tap in objective.student_taps:
            student.check_tap(tap)
        return objective

    @classmethod
    def split(cls, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of an objective, and all others."""
        own = {field.name for field in dataclasses.fields(cls)}
        chosen = {name: value for name, value in arguments.items() if name in own}
        return chosen, {name: value for name, value in arguments.items() if name not in own}

    @property
    def student_taps(self) -> tuple[str, ...]:
        """What is read of the student."""
        return () if not self.adversarial else ("logits",) if self.gap == "logits" else (_MAP,)

    def teacher_taps(self, model: FeatureModel) -> tuple[str, ...]:
        """What is read of the teacher."""
        taps = set(self.student_taps)
        if self.one_hot or self.balance:
            taps.add("logits")
        if self.activation:
            taps.add(_read_by_head(model))
        if self.bn or self.entropy:
            taps.update(["logits"] if "logits" in model.taps() else _maps(model)[-1:])  # to reach all layers
        if self.entropy and not attention_layers(model):
            taps.update(_every_third(_maps(model)))
        return tuple(sorted(taps))

    def __call__(self, step: Step, images: Tensor, taps: Collection[str]) -> tuple[Terms, Terms]:
        """The terms of a batch, in one pass of each network.

        Args:
            step: the networks.
            images: (B, 3, H, W) in [0, 1], with a gradient.
            taps: further taps of the teacher to hand out.

        Returns:
            Weighted terms by name; the teacher's features at `taps`, detached.

        Raises:
            ValueError: the step has no teacher.
        """
        teacher = _required(step.teacher)
        norms = norm_layers(teacher.model) if self.bn else []
        attention = _every_third(attention_layers(teacher.model)) if self.entropy else []
        own = self.teacher_taps(teacher.model)
        with inputs_of([*norms, *(layer.projection for layer in attention)]) as inputs:
            features = teacher(images, tuple(dict.fromkeys((*taps, *own))), input_grad=True)
        with frozen(step.student):
            from_student = step.student(images, self.student_taps) if self.student_taps else {}
        ran = [norm for norm in norms if norm in inputs]
        terms: Terms = {}
        if self.adversarial:
            terms["adversarial"] = -self.adversarial * torch.log1p(self._distance(from_student, features))
        if self.one_hot:
            logits = promote(features["logits"])
            terms["one_hot"] = self.one_hot * F.cross_entropy(logits, logits.argmax(dim=1))
        if self.balance:
            share = promote(features["logits"]).softmax(dim=1).transpose(0, 1).flatten(1).mean(dim=1)
            terms["balance"] = self.balance * torch.special.entr(share).sum().neg()
        if self.activation:
            terms["activation"] = -self.activation * promote(features[_read_by_head(teacher.model)]).abs().mean()
        if ran:
            terms["bn"] = self.bn * statistics_gap(ran, [inputs[norm] for norm in ran])
        if self.entropy:
            vectors = [layer.patches(inputs[layer.projection]) for layer in attention if layer.projection in inputs]
            if not attention:
                vectors = [centred_patches(features[tap]) for tap in _every_third(_maps(teacher.model))]
            if vectors:
                terms["entropy"] = -self.entropy * torch.stack([patch_entropy(x) for x in vectors]).sum()
        if self.tv:
            terms["tv"] = self.tv * total_variation(images)
        return terms, {tap: features[tap].detach() for tap in taps}

    def _distance(self, student: Features, teacher: Features) -> Tensor:
        """d, with a gradient from both networks."""
        if self.gap == "logits":
            one, other = promote(student["logits"]), promote(teacher["logits"])
            return F.l1_loss(*match_size(one, other) if one.dim() == 4 else (one, other))
        return relation_gap(student[_MAP], teacher[_MAP])


def relation_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean absolute difference of the cosines between all positions of two maps.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H', W'); both are brought to the teacher's grid, or to 16x16 where that is finer. Either
            passes a gradient on.

    Returns:
        A scalar from 0 to 2.

    Example:
        >>> x = torch.rand(2, 4, 3, 3)
        >>> relation_gap(x, 5 * x).item() < 1e-6
        True
    """
    with torch.autocast(student.device.type, enabled=False):
        side = [min(length, _SIDE) for length in teacher.shape[-2:]]
        one, other = (F.normalize(resize_map(promote(x), side).flatten(2), dim=1) for x in (student, teacher))
        return F.l1_loss(one.mT @ one, other.mT @ other)


def _required(teacher: Teacher | None) -> Teacher:
    if teacher is None:
        raise ValueError("images are synthesised for a teacher, and this step has none.")
    return teacher


def _maps(model: FeatureModel) -> list[str]:
    """Taps of all maps; of an ensemble, those of every member."""
    return [tap for tap in model.taps() if tap.rpartition("/")[2].startswith("map.")]


def _read_by_head(model: FeatureModel) -> str:
    return model.head_taps[0] if model.head_taps else _MAP


def _every_third(layers: list[Any]) -> list[Any]:
    return layers[::-1][::_EVERY][::-1]
