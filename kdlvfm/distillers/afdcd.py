# SPDX-License-Identifier: Apache-2.0
"""AfDCD: inside small patches each group of channels is told from the others, after a masked generation as in MGD."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, promote
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.blocks import sum_over_blocks
from kdlvfm.core.projectors import Projector
from kdlvfm.distillers.mgd import mgd_generator, mgd_loss, random_mask

Negatives = Literal["channels", "all"]

_BLOCK = 2**21
"""Distances held at once: few enough for a processor's cache, enough to keep a GPU busy."""


def afdcd_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 0.07,
    patch: int = 4,
    groups: int = 16,
    *,
    negatives: Negatives = "channels",
) -> Tensor:
    r"""Contrast of the pieces that a patch is made of: a group of channels at one position each.

    .. math::
        L = -\frac{1}{B H W} \sum_{b, i, m} \ln \frac{e^{-d(i m, i m) / \tau}}
            {e^{-d(i m, i m) / \tau} + \sum_{(j, n) \in N} e^{-d(i m, j n) / \tau}}, \quad
        d(i m, j n) = \lVert f^S_{i m} - f^T_{j n} \rVert_1

    where the channels are cut into M groups m, and the map into square patches, of which i and j share one. The
    positive is the teacher's piece in the same place; the negatives are other pieces of the same patch, so that no
    second view of an image and no memory is needed. A patch has (patch² M)² distances; they are computed in blocks.

    Args:
        student: (B, C, H, W), already brought to the teacher's channels.
        teacher: (B, C, H, W); receives no gradient.
        temperature: τ; 0.07 in the authors' code.
        patch: side of the patches; 4 in the authors' code. A map that is smaller has smaller ones. Rows and columns
            that do not fill a patch, at the bottom and on the right, are left out.
        groups: M, which must divide C; 16 in the authors' code.
        negatives: `"channels"`: the pieces of other groups, at all positions of the patch, as in the authors' code.
            `"all"`: those of the same group at other positions too. Then one group contrasts positions alone, and
            patches of side 1 groups alone, the paper's two simpler designs.

    Returns:
        A scalar: the sum over groups, the mean over samples and positions.

    Raises:
        ValueError: the shapes differ, the groups do not divide the channels, or a piece has no negatives.

    Source:
        Fan et al., "Augmentation-free Dense Contrastive Knowledge Distillation for Efficient Semantic Segmentation",
        NeurIPS 2023.

    Example:
        >>> x = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
        >>> round(afdcd_loss(x, x, temperature=1.0, patch=1, groups=2).item(), 6)
        0.626523
    """
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            f"maps (B, C, H, W) must have one shape, not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    if negatives not in ("channels", "all"):
        raise ValueError(f"negatives must be 'channels' or 'all', not {negatives!r}.")
    channels, height, width = student.shape[1:]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups={groups} must divide the {channels} channels.")
    if patch < 1:
        raise ValueError(f"patch must be at least 1, not {patch}.")
    sides = (min(patch, height), min(patch, width))
    if groups == 1 and (negatives == "channels" or sides == (1, 1)):
        raise ValueError("one group of channels leaves no negatives: raise groups, or patch with negatives='all'.")
    own, goal = (_pieces(promote(x), sides, groups) for x in (student, teacher.detach()))
    excluded = torch.zeros((own.shape[1],) * 2, dtype=torch.bool, device=own.device)
    if negatives == "channels":
        group = torch.arange(own.shape[1], device=own.device) % groups
        excluded = (group.unsqueeze(1) == group).fill_diagonal_(False)
    size = max(_BLOCK // own.shape[1] ** 2, 1)
    total = sum_over_blocks(lambda x, y: _contrast(x, y, excluded, temperature), own, goal, size)
    return total * groups / own.shape[:2].numel()


def _pieces(x: Tensor, sides: tuple[int, int], groups: int) -> Tensor:
    """(B, C, H, W) to (patches, positions of a patch x groups, channels of a group)."""
    batch, channels, height, width = x.shape
    high, wide = sides
    rows, columns = height // high, width // wide
    x = x[:, :, : rows * high, : columns * wide]
    x = x.reshape(batch, groups, channels // groups, rows, high, columns, wide).permute(0, 3, 5, 4, 6, 1, 2)
    return x.reshape(batch * rows * columns, high * wide * groups, channels // groups)


def _contrast(own: Tensor, goal: Tensor, excluded: Tensor, temperature: float) -> Tensor:
    """Sum of cross-entropies over patches and the pieces of each."""
    with torch.autocast(own.device.type, enabled=False):
        distances = torch.cdist(own, goal, p=1)
    # Against the positive, before the exponential: large distances that hardly differ stay apart.
    further = distances.diagonal(dim1=1, dim2=2).unsqueeze(2) - distances
    return (further / temperature).masked_fill(excluded, -torch.inf).logsumexp(dim=2).sum()


class AfDCD(Distiller):
    """Generation of the teacher's map from the student's, most of which is masked, and a contrast of what comes out.

    The authors add KD on the logits at temperature 1 (weight 1, on ADE20K 0.5), which is a distiller of its own here.
    Their variants with a fixed mask and with a wider generator are not part of this class.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map, and of the generator: two 3x3 convolutions and a ReLU.
        feature_weight: weight of the squared differences between what was generated and the teacher's map, summed over
            channels and positions. In the authors' code 2e-6 on Cityscapes, 8e-6 on CamVid, 1e-6 on VOC and ADE20K.
        contrast_weight: weight of `afdcd_loss`. In the authors' code 5e-3 on Cityscapes and VOC, 1e-2 on CamVid, 4e-2
            on ADE20K.
        drop_ratio: share of positions that is masked; 0.75 in the authors' code.
        temperature: see `afdcd_loss`.
        patch: see `afdcd_loss`.
        groups: see `afdcd_loss`; `None` for 16, as in the authors' code, or the largest number below that divides the
            teacher's channels.
        negatives: see `afdcd_loss`.
        pool: side of max-pooling windows put over both maps before the contrast; 4 in the authors' code, for maps of
            stride 8, and none for CamVid. By default none: a ViT's map is coarse, and the maximum of its signed
            features means little.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        projector: what brings the student's channels to the teacher's, see `kdlvfm.core.projectors.build_projector`; by
            default a 1x1 convolution where they differ.
        resize: who is resized where the maps differ in size, before masking; see `kdlvfm.core.align.match_size`. The
            authors' maps are of one size.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised. The default is ours: sums of
            squares and of distances are made up almost alone by a ViT's few channels of very large norm.

    Raises:
        ValueError: the share that is masked is not one.

    Example:
        >>> afdcd = AfDCD(student_dim=64, teacher_dim=96)
        >>> list(afdcd({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 96, 8, 8)}))
        ['afdcd_feature', 'afdcd_contrast']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        feature_weight: float = 2e-6,
        contrast_weight: float = 5e-3,
        drop_ratio: float = 0.75,
        temperature: float = 0.07,
        patch: int = 4,
        groups: int | None = None,
        negatives: Negatives = "channels",
        pool: int | None = None,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        projector: Projector | None = None,
        resize: Resize = "larger",
        target: Target = "standardize",
    ) -> None:
        super().__init__()
        if not 0 <= drop_ratio < 1:
            raise ValueError(f"drop_ratio must be at least 0 and below 1, not {drop_ratio}: it is the share masked.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.feature_weight = feature_weight
        self.contrast_weight = contrast_weight
        self.drop_ratio = drop_ratio
        self.temperature = temperature
        self.patch = patch
        self.groups = groups or max(count for count in range(1, 17) if teacher_dim % count == 0)
        self.negatives: Negatives = negatives
        self.pool = pool
        self.align = Aligner(student_dim, teacher_dim, projector=projector, resize=resize, target=target)
        self.generator = mgd_generator(teacher_dim)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps."""
        return cls(**context.tap_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms `afdcd_feature` and `afdcd_contrast`; a new mask at every call."""
        del target
        projected, goal = self.align(student[self.student_taps[0]], teacher[self.teacher_taps[0]])
        generated = promote(self.generator(projected * random_mask(projected, self.drop_ratio)))
        feature = mgd_loss(generated, goal)
        if self.pool is not None:
            generated, goal = F.max_pool2d(generated, self.pool), F.max_pool2d(goal, self.pool)
        contrast = afdcd_loss(generated, goal, self.temperature, self.patch, self.groups, negatives=self.negatives)
        return {"afdcd_feature": self.feature_weight * feature, "afdcd_contrast": self.contrast_weight * contrast}
