# SPDX-License-Identifier: Apache-2.0
"""FGD: objects and background apart, both where the teacher looks, and the relations of all positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, check_levels, promote
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.boxes import labelled_images, read_boxes
from kdlvfm.core.features import level_taps
from kdlvfm.core.projectors import Projector


def fgd_masks(target: Any, size: tuple[int, int], stride: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """How much each cell of a map counts as foreground and as background.

    A cell that any part of a box lies on counts 1 / (cells of that box), of several boxes the most; all other cells
    count 1 / (number of them). So every object weighs the same whatever its size, and so does the background. Cells
    whose middle is padding count as neither, and so do those of an image whose objects are not known; the others of
    the batch weigh so much more that the mean over it is one over them.

    The authors' code gives a box one more row and column, to its right and below, and takes padding for background.

    Args:
        target: for each of B images `"boxes"` (n, 4) and `"size"` (2,), see `kdlvfm.core.boxes.read_boxes`.
        size: height and width (H, W) of the map.
        stride: height and width of a cell in pixels.

    Returns:
        Foreground and background, (B, H, W) each, on the device of the boxes.

    Example:
        >>> boxes = torch.tensor([[4.0, 0.0, 12.0, 8.0]])
        >>> target = [{"boxes": boxes, "size": torch.tensor([8, 16])}]
        >>> fgd_masks(target, (2, 4), (4.0, 4.0))[0][0].tolist()
        [[0.0, 0.25, 0.25, 0.0], [0.0, 0.25, 0.25, 0.0]]
    """
    height, width = size
    foregrounds, backgrounds = [], []
    known = labelled_images(target)
    for i, (boxes, (image_height, image_width)) in enumerate(read_boxes(target, len(target))):
        top, left = (torch.arange(n, device=boxes.device) * step for n, step in zip(size, stride, strict=True))
        rows = (boxes[:, 1, None] < top + stride[0]) & (boxes[:, 3, None] > top)
        columns = (boxes[:, 0, None] < left + stride[1]) & (boxes[:, 2, None] > left)
        inside = rows[:, :, None] & columns[:, None, :]
        shares = inside / inside.sum((1, 2), keepdim=True).clamp(min=1)
        # One more object, of no cell: the largest of no numbers is not defined.
        foreground = torch.cat([shares, shares.new_zeros(1, height, width)]).amax(0)
        seen = (top + stride[0] / 2 < image_height)[:, None] & (left + stride[1] / 2 < image_width)[None, :]
        rest = seen & (foreground == 0)
        weight = len(target) / len(known) if i in known else 0.0
        foregrounds.append(weight * foreground)
        backgrounds.append(weight * rest / rest.sum().clamp(min=1))
    return torch.stack(foregrounds), torch.stack(backgrounds)


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    *,
    temperature: float = 0.5,
    foreground_weight: float = 1e-3,
    background_weight: float = 5e-4,
    attention_weight: float = 1e-3,
) -> Tensor:
    r"""The focal part: squared differences where objects are and where they are not, and differences of attention.

    .. math::
        L = \frac{1}{B} \sum_b \Big[ \sum_{c,i} (\alpha M_i + \beta \bar M_i)\, A^T_i A^T_c (F_S - F_T)^2_{c,i}
            + \gamma \big(\|A^S_i - A^T_i\|_1 + \|A^S_c - A^T_c\|_1\big) \Big]

    with foreground M, background :math:`\bar M` and the attention of each network to positions and to channels,
    :math:`A_i = HW\,\mathrm{softmax}_i(\mathrm{mean}_c |F| / \tau)` and
    :math:`A_c = C\,\mathrm{softmax}_c(\mathrm{mean}_i |F| / \tau)`.

    Args:
        student: (B, C, H, W), already projected to the teacher's channels.
        teacher: (B, C, H, W); receives no gradient.
        foreground: M, (B, H, W), see `fgd_masks`.
        background: (B, H, W), see `fgd_masks`.
        temperature: τ; 0.5 in the paper, 0.8 in the authors' code for FCOS.
        foreground_weight: α; see `FGD`.
        background_weight: β.
        attention_weight: γ.

    Returns:
        A scalar: the sum over channels and positions, the mean over samples.

    Raises:
        ValueError: the shapes do not fit.

    Source:
        Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 1, 2), torch.ones(1, 2, 1, 2)
        >>> one_object = torch.tensor([[[1.0, 0.0]]])
        >>> round(fgd_loss(student, teacher, one_object, torch.zeros(1, 1, 2), foreground_weight=1.0).item(), 6)
        2.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"features must have one shape, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher)."
        )
    batch, _, height, width = student.shape
    if {foreground.shape, background.shape} != {(batch, height, width)}:
        raise ValueError(
            f"masks {tuple(foreground.shape)} and {tuple(background.shape)} do not fit features "
            f"{tuple(student.shape)}: they must be theirs without the channels."
        )
    student, teacher = promote(student), promote(teacher.detach())
    (positions, channels), (goal_positions, goal_channels) = (_attention(x, temperature) for x in (student, teacher))
    counts = (foreground_weight * foreground + background_weight * background).to(student) * goal_positions
    squares = ((student - teacher).square() * counts[:, None] * goal_channels[:, :, None, None]).sum()
    attention = (positions - goal_positions).abs().sum() + (channels - goal_channels).abs().sum()
    return (squares + attention_weight * attention) / batch


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """To positions, (B, H, W), and to channels, (B, C), each 1 in the mean."""
    strength = x.abs()
    _, channels, height, width = x.shape
    positions = (strength.mean(1).flatten(1) / temperature).softmax(1) * height * width
    return positions.view(-1, height, width), (strength.mean((2, 3)) / temperature).softmax(1) * channels


class GcBlock(nn.Module):
    """Global context: an attention over all positions pools the map, and what becomes of that is added everywhere.

    At first nothing is added. Cao et al., "GCNet", ICCV workshops 2019.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(dim // 2, 1)
        # Without bias: a softmax over positions does not see it.
        self.attention = nn.Conv2d(dim, 1, kernel_size=1, bias=False)
        last = nn.Linear(hidden, dim)
        self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), last)
        nn.init.kaiming_normal_(self.attention.weight, nonlinearity="relu")
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to the same shape, in single precision at least."""
        with torch.autocast(x.device.type, enabled=False):
            x = promote(x)
            context = torch.einsum("bcn,bn->bc", x.flatten(2), self.attention(x).flatten(1).softmax(1))
            added: Tensor = self.transform(context)[:, :, None, None]
            return x + added


class FGD(Distiller):
    r"""Focal and global distillation of a detector's pyramid; the terms of all levels are added.

    For detection only: it reads the boxes. The focal term is `fgd_loss`; of unlabelled images its squares are left out,
    while attentions and the global term, which need no boxes, are of all images. The global term compares the maps
    after a `GcBlock` G of each network, both of which train with the student:

    .. math:: L = \frac{1}{B} \sum_{b,c,i} \big(G_S(F_S) - G_T(F_T)\big)^2_{b,c,i}

    Args:
        student_dims: channels of the student's maps.
        teacher_dims: channels of the teacher's maps.
        strides: pixels between the positions of the student's maps.
        foreground_weight: of the objects. 1e-3 in the paper for one-stage detectors with anchors, with the next three
            weights; 1.6e-3, 8e-4, 8e-4 and 8e-6 for those without, 5e-5, 2.5e-5, 5e-5 and 5e-7 for two-stage ones.
        background_weight: of the background.
        attention_weight: of the attentions' differences; 5e-4 in the authors' files for GFL and RetinaNet.
        global_weight: of the global term; 0 leaves it out.
        temperature: of the attentions; 0.5 in the paper.
        student_taps: the student's maps; `None` for its whole pyramid, `fpn.0` and so on (the paper).
        teacher_taps: the teacher's maps, one for each of the student's; `None` for its whole pyramid.
        projector: see `kdlvfm.core.projectors.build_projector`; `None`, a 1x1 convolution where the channels differ, is
            the paper's.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`. The authors' maps are
            of one size.
        target: how the teacher's features are normalised, see `kdlvfm.core.aligner.Targets`; `"raw"` is the paper's.
            The default is ours: squares and attentions alike would be those of a ViT's few channels of large norm.

    Example:
        >>> fgd = FGD([64], [96], [8])
        >>> target = [{"boxes": torch.tensor([[3.0, 5.0, 20.0, 30.0]]), "size": torch.tensor([32, 32])}]
        >>> list(fgd({"fpn.0": torch.rand(1, 64, 4, 4)}, {"fpn.0": torch.rand(1, 96, 4, 4)}, target))
        ['fgd_focal', 'fgd_global']
    """

    needs_truth = True

    def __init__(
        self,
        student_dims: Sequence[int],
        teacher_dims: Sequence[int],
        strides: Sequence[int],
        *,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 1e-3,
        global_weight: float = 5e-6,
        temperature: float = 0.5,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        projector: Projector | None = None,
        resize: Resize = "larger",
        target: Target = "standardize",
    ) -> None:
        super().__init__()
        pyramid = [f"fpn.{i}" for i in range(len(student_dims))]
        self.student_taps = tuple(pyramid if student_taps is None else student_taps)
        self.teacher_taps = tuple(pyramid if teacher_taps is None else teacher_taps)
        check_levels(
            student_dims=student_dims,
            teacher_dims=teacher_dims,
            strides=strides,
            student_taps=self.student_taps,
            teacher_taps=self.teacher_taps,
        )
        self.strides = tuple(strides)
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.attention_weight = attention_weight
        self.global_weight = global_weight
        self.temperature = temperature
        self.aligners = nn.ModuleList(
            Aligner(ours, theirs, projector=projector, resize=resize, target=target)
            for ours, theirs in zip(student_dims, teacher_dims, strict=True)
        )
        blocks = [[GcBlock(dim) for dim in teacher_dims] for _ in range(2)] if global_weight else [[], []]
        self.student_blocks, self.teacher_blocks = (nn.ModuleList(half) for half in blocks)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads the levels of both pyramids, their channels and the student's strides.

        Raises:
            TapError: a network has no pyramid, and no taps were named.
        """
        for name, model in (("student_taps", context.student), ("teacher_taps", context.require_teacher().model)):
            if hparams.get(name) is None:
                hparams[name] = level_taps(model, "fpn")
        if "strides" not in hparams:
            hparams["strides"] = [context.student.tap_info(tap).stride for tap in hparams["student_taps"]]
        return cls(**context.level_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms `fgd_focal` and `fgd_global`, sums over levels."""
        read_boxes(target, len(student[self.student_taps[0]]))
        focal, relations = [], []
        for level, (student_tap, teacher_tap) in enumerate(zip(self.student_taps, self.teacher_taps, strict=True)):
            own = student[student_tap]
            projected, goal = self.aligners[level](own, teacher[teacher_tap])
            size = (int(projected.shape[2]), int(projected.shape[3]))
            stride = [self.strides[level] * old / new for old, new in zip(own.shape[2:], size, strict=True)]
            foreground, background = fgd_masks(target, size, (stride[0], stride[1]))
            loss = fgd_loss(
                projected,
                goal,
                foreground,
                background,
                temperature=self.temperature,
                foreground_weight=self.foreground_weight,
                background_weight=self.background_weight,
                attention_weight=self.attention_weight,
            )
            focal.append(loss)
            if self.global_weight:
                pair = self.student_blocks[level](projected), self.teacher_blocks[level](goal)
                relations.append(F.mse_loss(*pair, reduction="sum") / len(projected))
        terms = {"fgd_focal": torch.stack(focal).sum()}
        if self.global_weight:
            terms["fgd_global"] = self.global_weight * torch.stack(relations).sum()
        return terms
