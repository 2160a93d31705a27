# SPDX-License-Identifier: Apache-2.0
"""ScaleKD: attention brings the student's map to a ViT's, which is compared in two views and after later blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features, Teacher, resolve_tap
from kdlvfm.core.align import promote, tokens_to_map, unit_vectors
from kdlvfm.core.projectors import AttentionProjector

View = Literal["map", "alternating"]
Perception = Callable[[Tensor, Features], Tensor]
"""What the teacher's later layers make of a map (B, C_T, h, w), given the teacher's features of the same images."""


def scale_kd_loss(student: Tensor, teacher: Tensor, view: View = "map") -> Tensor:
    r"""Squared distance between the directions of feature vectors, in one of two views of the maps.

    .. math:: L = \frac{1}{B} \sum_{b,i} \left\| \frac{v(F_S)_{bi}}{\|v(F_S)_{bi}\|} -
        \frac{v(F_T)_{bi}}{\|v(F_T)_{bi}\|} \right\|^2

    over the positions i. A ViT's map is mostly what all its positions have in common. The view `"alternating"` sets
    that aside, the first coefficient of a two-dimensional discrete cosine transform of each channel, and transforms
    back: exactly a subtraction of the channel's mean over positions, which is how it is computed here.

    Args:
        student: (B, C, H, W), already projected to the teacher's channels.
        teacher: (B, C, H, W); receives no gradient.
        view: v, `"map"` (the maps as they are) or `"alternating"`.

    Returns:
        A scalar from 0 to 4 H W: the sum over positions, the mean over samples.

    Raises:
        ValueError: the shapes differ, or there is no such view.

    Source:
        Fan et al., "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", NeurIPS 2024: dual-view feature
        mimicking.

    Example:
        >>> x = torch.eye(2).view(1, 2, 1, 2)
        >>> scale_kd_loss(x.flip(3), x).item(), scale_kd_loss(x + 7, x, view="alternating").item()
        (4.0, 0.0)
    """
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            f"maps must have one shape (B, C, H, W), not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    if view not in ("map", "alternating"):
        raise ValueError(f"view must be 'map' or 'alternating', not {view!r}.")
    pair = promote(student), promote(teacher.detach())
    if view == "alternating":
        pair = pair[0] - pair[0].mean((2, 3), keepdim=True), pair[1] - pair[1].mean((2, 3), keepdim=True)
    return F.mse_loss(unit_vectors(pair[0]), unit_vectors(pair[1]), reduction="sum") / len(student)


class LaterBlocks:
    """The last blocks of a plain ViT of timm, as a function of the map that enters them.

    Class and register tokens, where the ViT has any, are the teacher's own of the same image.

    Args:
        teacher: a teacher with such a ViT, by itself or under a head.
        count: how many blocks, at least 1 and fewer than there are.

    Raises:
        ValueError: there is no such ViT, or it has too few blocks.

    Attributes:
        taps: the teacher's taps that a call reads.
        last: the tap whose map the blocks lead to.
    """

    def __init__(self, teacher: Teacher, count: int) -> None:
        found = [
            (path, module)
            for path, module in teacher.model.net.named_modules()
            if hasattr(module, "num_prefix_tokens") and "blocks" in dict(module.named_children())
        ]
        if not found:
            raise ValueError(
                f"perception_blocks={count} needs a teacher that is a plain ViT of timm, with one stack of blocks; "
                f"{teacher.card.name} is none: leave perception_blocks=0."
            )
        path, vit = found[0]
        children = dict(vit.named_children())
        depth = len(list(children["blocks"].children()))
        if not 1 <= count < depth:
            raise ValueError(f"perception_blocks must be from 1 to {depth - 1} with {teacher.card.name}, not {count}.")
        self._blocks: list[tuple[int, Any]] = list(enumerate(children["blocks"].children()))[depth - count :]
        self._rope: Any = children.get("rope")
        self._prefix = int(vit.num_prefix_tokens)
        before = ".".join(filter(None, (path, "blocks", str(depth - count - 1))))
        self.taps = (f"module:{before}",) if self._prefix else ()
        self.last = f"map.{depth - 1}"

    def __call__(self, x: Tensor, teacher: Features) -> Tensor:
        """A map (B, C_T, h, w) to one of the same shape."""
        height, width = int(x.shape[2]), int(x.shape[3])
        weight = next(self._blocks[0][1].parameters())
        tokens = x.flatten(2).mT.to(weight.dtype)
        if self.taps:
            tokens = torch.cat([teacher[self.taps[0]][:, : self._prefix].detach().to(tokens.dtype), tokens], dim=1)
        places = None if self._rope is None else self._rope.get_embed(shape=(height, width))
        for index, block in self._blocks:
            if places is None:
                tokens = block(tokens)
            else:  # a fourth dimension: rotations that each block has learned for itself
                tokens = block(tokens, rope=places[index] if places.dim() == 4 else places)
        return tokens_to_map(tokens[:, self._prefix :], (height, width))


class ScaleKD(Distiller):
    """Two views of the teacher's map, each through a cross-attention projector, and of what its later blocks perceive.

    Attention lets each position that leaves a projector draw on the student's whole map, as a ViT's does, and on any
    grid: the teacher's. With `perception` an earlier map of the student is projected, too, passes the teacher's frozen
    later layers, and is compared with what these make of the teacher's own.

    The released code adds KD on the class logits (temperature 1, weight 0.5), which is a distiller of its own here. It
    lets the perceived map be the query of the last stage's projector; here each projector has its own learned queries.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map.
        map_weight: weight of the view of the maps as they are; 0.08 in the released code. 0 leaves the view out.
        alternating_weight: weight of the view without the mean over positions; 0.06 in the released code.
        positions: the weights are for a map of so many positions, and the sum over those there are is scaled to as
            many: 49 is the released code's 7x7 map. `None` leaves the sum, which grows with the map. Ours.
        perception: the teacher's later layers; parameters are neither trained nor saved. The released code uses the
            last stage of a Swin, the last two blocks of a BEiT.
        perception_taps: the teacher's taps that `perception` reads.
        early_dim: channels of the map that is perceived; needed with `perception`.
        student_tap: the student's map.
        early_tap: the student's map that is perceived, one stage earlier as in the released code.
        teacher_tap: the teacher's map; with `perception` the one that it leads to.
        target: bring each channel of the teacher to zero mean and unit variance over batch and positions
            (`"standardize"`), and what was perceived by the same numbers; or leave both as they are (`"raw"`, the
            paper). The default is ours: a ViT's few channels of very large norm would decide all directions.

    Raises:
        ValueError: `perception` without `early_dim`, or no such target.

    Example:
        >>> scale_kd = ScaleKD(student_dim=64, teacher_dim=96)
        >>> list(scale_kd({"map.-1": torch.rand(2, 64, 2, 2)}, {"map.-1": torch.rand(2, 96, 4, 4)}))
        ['scale_kd_map', 'scale_kd_alternating']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        map_weight: float = 0.08,
        alternating_weight: float = 0.06,
        positions: int | None = 49,
        perception: Perception | None = None,
        perception_taps: Sequence[str] = (),
        early_dim: int | None = None,
        student_tap: str = "map.-1",
        early_tap: str = "map.-2",
        teacher_tap: str = "map.-1",
        target: Literal["raw", "standardize"] = "standardize",
    ) -> None:
        super().__init__()
        if target not in ("raw", "standardize"):
            raise ValueError(f"target must be 'raw' or 'standardize', not {target!r}.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        views: dict[View, float] = {"map": map_weight, "alternating": alternating_weight}
        self.weights = {view: weight for view, weight in views.items() if weight}
        self.positions = positions
        self.target = target
        self.projectors = self._build_projectors(student_dim, teacher_dim)
        # Held in a tuple: a module would become a part of this one, to be trained and saved.
        self._perception = (perception,)
        self.calls_teacher = perception is not None
        if perception is not None:
            if early_dim is None:
                raise ValueError("perception needs early_dim, the channels of the student's map that is perceived.")
            self.student_taps, self.teacher_taps = (student_tap, early_tap), (teacher_tap, *perception_taps)
            self.early_projectors = self._build_projectors(early_dim, teacher_dim)

    def _build_projectors(self, student_dim: int, teacher_dim: int) -> nn.ModuleDict:
        """One for each view."""
        return nn.ModuleDict({str(view): AttentionProjector(student_dim, teacher_dim) for view in self.weights})

    @classmethod
    def from_context(cls, context: Context, *, perception_blocks: int = 0, **hparams: Any) -> Self:
        """Reads the channel counts from the taps.

        Args:
            context: the run.
            perception_blocks: how many of the last blocks of a timm ViT perceive an early map of the student; its maps
                must be those of the blocks (`norm=False`). 2 of 24 in the released code. The default of none is ours:
                it suits teachers without blocks, too, and each block costs a pass forward and back for each view.
            hparams: arguments of the constructor.

        Raises:
            TapError: a network has no such tap.
            ValueError: the teacher has no such blocks, or `teacher_tap` is not the last.
        """
        dims = context.tap_dims(cls, hparams)
        if perception_blocks:
            defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
            chosen = {**defaults, **hparams}
            teacher = context.require_teacher()
            blocks = LaterBlocks(teacher, perception_blocks)
            tap, _ = resolve_tap(chosen["teacher_tap"], teacher.taps(), teacher.card.name)
            if tap != blocks.last:
                raise ValueError(f"perception_blocks lead to {blocks.last}: teacher_tap must be it, not {tap}.")
            dims |= {"perception": blocks, "perception_taps": blocks.taps}
            if "early_dim" not in hparams:
                dims["early_dim"] = context.student.tap_info(chosen["early_tap"]).dim
        return cls(**dims, **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms `scale_kd_map` and `scale_kd_alternating`, with perception also `scale_kd_perceived_<view>`."""
        del target
        goal = promote(teacher[self.teacher_taps[0]].detach())
        size = (int(goal.shape[2]), int(goal.shape[3]))
        share = 1.0 if self.positions is None else self.positions / (size[0] * size[1])
        shift, scale = torch.zeros(()), torch.ones(())
        if self.target == "standardize":
            variance, shift = torch.var_mean(goal, dim=(0, 2, 3), keepdim=True, unbiased=False)
            scale = variance.clamp(min=1e-6).sqrt()
        goal = (goal - shift) / scale
        terms = {}
        for view, weight in self.weights.items():
            projected = self.projectors[view](student[self.student_taps[0]], size)
            terms[f"scale_kd_{view}"] = share * weight * scale_kd_loss(projected, goal, view)
        (perception,) = self._perception
        if perception is not None:
            for view, weight in self.weights.items():
                projected = self.early_projectors[view](student[self.student_taps[1]], size)
                perceived = (promote(perception(projected, teacher)) - shift) / scale
                terms[f"scale_kd_perceived_{view}"] = share * weight * scale_kd_loss(perceived, goal, view)
        return terms
