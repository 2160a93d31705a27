# SPDX-License-Identifier: Apache-2.0
"""Bringing features of different networks into one shape, size and scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

Resize = Literal["larger", "student", "teacher"] | Sequence[int]
TargetNorm = Literal["raw", "standardize", "layernorm"]


def promote(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 (gradient checks) as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Row-major tokens (B, N, D) to a map (B, D, h, w) with N = h * w.

    Raises:
        ValueError: N is not h * w (a prefix token was left in, or the grid is another image's).
    """
    batch, count, dim = tokens.shape
    height, width = grid
    if count != height * width:
        raise ValueError(f"{count} tokens do not fill a grid of {height}x{width} = {height * width}.")
    return tokens.transpose(1, 2).reshape(batch, dim, height, width)


def resize_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of (B, C, H, W) to `size` = (height, width), corners not aligned; antialiased when shrinking."""
    target = (size[0], size[1])  # not int(): sizes that torch.export traces would become constants
    if tuple(x.shape[-2:]) == target:
        return x
    shrinks = target[0] < x.shape[-2] or target[1] < x.shape[-1]
    # In single precision: torch has no antialiased resize of half precision on a CPU.
    resized = F.interpolate(promote(x), size=target, mode="bilinear", align_corners=False, antialias=shrinks)
    return resized.to(x.dtype)


def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest label on a grid of `size` = (height, width): (B, H, W) to (B, height, width), of the same type."""
    target = (int(size[0]), int(size[1]))
    if tuple(labels.shape[-2:]) == target:
        return labels
    return F.interpolate(labels.unsqueeze(1).float(), size=target, mode="nearest-exact").squeeze(1).to(labels.dtype)


def match_size(student: Tensor, teacher: Tensor, resize: Resize = "larger") -> tuple[Tensor, Tensor]:
    """Two maps (B, C_S, H, W) and (B, C_T, H', W') on one grid.

    Args:
        student: the student's map.
        teacher: the teacher's map.
        resize: which grid both end on. `"larger"` resizes the smaller map up, which keeps all detail; `"student"`
            resizes the student's map to the teacher's grid; `"teacher"` the teacher's map to the student's grid. A pair
            of numbers (height, width) is a grid of one's own, to which both are resized.

    Raises:
        ValueError: `resize` is none of these.
    """
    check_resize(resize)
    if not isinstance(resize, str):
        return resize_map(student, resize), resize_map(teacher, resize)
    if resize == "student":
        return resize_map(student, teacher.shape[-2:]), teacher
    if resize == "teacher":
        return student, resize_map(teacher, student.shape[-2:])
    size = [max(a, b) for a, b in zip(student.shape[-2:], teacher.shape[-2:], strict=True)]
    return resize_map(student, size), resize_map(teacher, size)


def check_resize(resize: Resize) -> None:
    """Check that `resize` is one of those that `match_size` knows.

    Raises:
        ValueError: it is not.
    """
    if isinstance(resize, str):
        known = resize in ("larger", "student", "teacher")
    else:
        known = len(resize) == 2 and all(isinstance(side, int) and side > 0 for side in resize)
    if not known:
        raise ValueError(
            f"resize must be 'larger', 'student', 'teacher' or a grid [height, width] such as [16, 16], not {resize!r}."
        )


def standardise(x: Tensor, min_std: float = 1e-3) -> Tensor:
    """Zero mean and unit (biased) variance for each channel of (B, C, ...) over batch and positions.

    A channel whose standard deviation is below `min_std` is divided by that instead: a constant one becomes 0, and
    what is noise, or a gradient, grows by no more than 1 / min_std.
    """
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, dim=dims, keepdim=True, unbiased=False)
    return (x - mean) / var.clamp(min=min_std**2).sqrt()


def align_scale(student: Tensor, teacher: Tensor, min_std: float = 1e-3) -> Tensor:
    """The student's map with each channel's mean and deviation as the teacher's, over batch and positions.

    Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024.

    Args:
        student: (B, C, H, W).
        teacher: (B', C, H', W'); receives no gradient.
        min_std: least deviation that a channel of the student's is divided by, see `standardise`.

    Raises:
        ValueError: the channels differ.

    Example:
        >>> student, teacher = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2), torch.tensor([5.0, 11.0]).view(1, 1, 1, 2)
        >>> align_scale(student, teacher).flatten().tolist()
        [5.0, 11.0]
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"channels must agree, not {student.shape[1]} (student) and {teacher.shape[1]} (teacher).")
    variance, mean = torch.var_mean(promote(teacher.detach()), dim=(0, 2, 3), keepdim=True, unbiased=False)
    return standardise(promote(student), min_std) * variance.sqrt() + mean


def normalise_target(teacher: Tensor, target: TargetNorm = "raw") -> Tensor:
    """The teacher's features (B, C, ...) as a regression target.

    ViT features have a few channels of very large norm, which dominate a plain squared error.

    Args:
        teacher: features with channels in dimension 1.
        target: `"raw"`; `"standardize"` (each channel over batch and positions); `"layernorm"` (each position over its
            channels, without affine parameters).
    """
    if target == "raw":
        return teacher
    if target == "standardize":
        return standardise(teacher)
    if target == "layernorm":
        moved = teacher.movedim(1, -1)
        return F.layer_norm(moved, moved.shape[-1:]).movedim(-1, 1)
    raise ValueError(f"target must be 'raw', 'standardize' or 'layernorm', not {target!r}.")


def unit_vectors(x: Tensor, dim: int = 1, min_norm: float = 1e-4) -> Tensor:
    """`x` with its vectors along `dim` scaled to length 1.

    A vector shorter than `min_norm` is divided by that instead: zero stays zero, and what is noise, or a gradient,
    grows by no more than 1 / min_norm.
    """
    return F.normalize(x, dim=dim, eps=min_norm)


def cosines(x: Tensor, y: Tensor, dim: int = 1, min_norm: float = 1e-4) -> Tensor:
    """Inner products along `dim` of the `unit_vectors` of x and y, which are never formed."""
    lengths = [torch.linalg.vector_norm(z, dim=dim).clamp(min=min_norm) for z in (x, y)]
    found: Tensor = (x * y).sum(dim=dim) / (lengths[0] * lengths[1])
    return found


def class_masks(target: Tensor, num_classes: int, size: Sequence[int], ignore_index: int | None = 255) -> Tensor:
    """Where each class is: labels (B, H, W) to booleans (B, num_classes, h, w) on a grid of `size` = (h, w).

    Pixels that are void (`ignore_index`) or unlabelled (negative) belong to no class.

    Raises:
        RuntimeError: a label is neither one of these nor below `num_classes`.
    """
    labels = resize_labels(target, size)
    known = labels >= 0 if ignore_index is None else (labels >= 0) & (labels != ignore_index)
    return F.one_hot((labels + 1) * known, num_classes + 1)[..., 1:].movedim(-1, 1).bool()


def class_means(
    features: Tensor,
    target: Tensor,
    num_classes: int,
    ignore_index: int | None = 255,
    *,
    of_images: bool = False,
) -> tuple[Tensor, Tensor]:
    """The mean feature vector of each class, in the whole batch or in each image.

    Args:
        features: (B, C, H, W).
        target: (B, H', W') labels, see `class_masks`.
        num_classes: K.
        ignore_index: label of void pixels; `None` if there is none.
        of_images: a mean for each image instead of one for the batch.

    Returns:
        Means (G, K, C), zero for a class that is absent, and which classes are present, (G, K) booleans; G is B if
        `of_images`, else 1.
    """
    features = promote(features)
    masks = class_masks(target, num_classes, features.shape[2:], ignore_index).flatten(2).to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        sums, counts = masks @ features.flatten(2).mT, masks.sum(dim=2)
    if not of_images:
        sums, counts = sums.sum(dim=0, keepdim=True), counts.sum(dim=0, keepdim=True)
    return sums / counts.clamp(min=1).unsqueeze(2), counts > 0


def gram_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of the Gram matrices x xᵀ and y yᵀ, (B, N, N) each, of x (B, N, C) and y (B, N, C').

    With more rows than channels no N x N matrix is formed: ‖x xᵀ - y yᵀ‖² = ‖xᵀx‖² + ‖yᵀy‖² - 2 ‖xᵀy‖².
    """
    batch, rows = x.shape[:2]
    with torch.autocast(x.device.type, enabled=False):
        if rows <= max(x.shape[2], y.shape[2]):
            total = (self_product(x) - self_product(y)).square().sum()
        else:
            squares = [self_product(z.mT).square().sum() for z in (x, y)]
            total = squares[0] + squares[1] - 2 * (x.mT @ y).square().sum()
    return total / (batch * rows**2)


def self_product(x: Tensor) -> Tensor:
    """X xᵀ, (..., N, N), of (..., N, C). Its gradient takes one product; that of `x @ x.mT` takes two."""
    product: Tensor = _SelfProduct.apply(x)
    return product


class _SelfProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad: Tensor = (slope + slope.mT) @ x
        return grad


def check_levels(**levels: Sequence[object]) -> None:
    """Check that arguments of which a method of several levels needs one for each level are equally many.

    Raises:
        ValueError: they are not, or there are none.
    """
    counts = {name: len(values) for name, values in levels.items()}
    if len(set(counts.values())) != 1 or not all(counts.values()):
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"each level needs one of these, and there must be a level: {found}.")
