# SPDX-License-Identifier: Apache-2.0
"""How alike the features of two networks are, whatever their dimensions and their sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kdlvfm.core.align import promote, resize_map, self_product
from kdlvfm.core.blocks import block_length, check_first_derivative


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Linear centred kernel alignment of two sets of features of the same samples.

    .. math::
        \mathrm{CKA} = \frac{\langle K, L \rangle_F}{\|K\|_F \|L\|_F}
                     = \frac{\|X^\top Y\|_F^2}{\|X^\top X\|_F \|Y^\top Y\|_F}, \quad K = X X^\top, \; L = Y Y^\top

    with X (N, D_S) and Y (N, D_T) the features, their mean over samples subtracted. The smaller of the two forms is
    computed. A positive scale, an offset and a rotation of either side change nothing.

    Args:
        student: (N, ...): N samples; the rest is flattened.
        teacher: (N, ...): the same samples, of any dimension; receives no gradient.

    Returns:
        A scalar from 0 to 1: 1 for equal features, and for any two samples; 0 where all samples of a side are equal.

    Raises:
        ValueError: the numbers of samples differ.

    Source:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019.
    """
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"both need the same samples, not {len(student)} (student) and {len(teacher)} (teacher).")
    x, y = promote(student).flatten(1), promote(teacher.detach()).flatten(1)
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[0] <= max(x.shape[1], y.shape[1]):
            first, second = _centred_kernel(x), _centred_kernel(y)
            shared = (first * second).sum()
        else:
            x, y = _centred(x), _centred(y)
            first, second = self_product(x.T), self_product(y.T)
            shared = (x.T @ y).square().sum()
        similarity: Tensor = shared / (first.norm() * second.norm()).clamp(min=1e-12)
    return similarity


def _centred(x: Tensor) -> Tensor:
    """Rows of (N, D) without their mean, of norm 1 together; 0 where the rows differ by no more than rounding."""
    deviation = x - x.mean(0)
    norm = deviation.norm()
    unit = deviation / norm.clamp(min=1e-12)
    return torch.where(norm > 1e-6 * x.norm(), unit, torch.zeros_like(unit))


def _centred_kernel(x: Tensor) -> Tensor:
    """Inner products (N, N) of the rows that `_centred` gives, which are never held."""
    kernel: Tensor
    kernel, squares = _CentredProduct.apply(x)
    trace = kernel.trace()
    return torch.where(trace > 1e-12 * squares, kernel / trace.clamp(min=1e-24), torch.zeros_like(kernel))


def scaled_product(x: Tensor, scale: Tensor) -> Tensor:
    """Inner products (N, N) of the rows of (N, D) times a scalar that has no gradient; the scaled rows are never held.

    No product leaves the range of floats where those of the scaled rows do not.
    """
    product: Tensor = _ScaledProduct.apply(x, scale)
    return product


class _ScaledProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        product = x.new_zeros((len(x), len(x)))
        for columns in _pieces(x):
            scaled = columns * scale
            product.addmm_(scaled, scaled.T)
        return product

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        check_first_derivative()
        x, scale = ctx.saved_tensors
        both, found = (slope + slope.T) * scale, torch.empty_like(x)
        for columns, part in zip(_pieces(x), _pieces(found), strict=True):
            torch.mm(both, columns * scale, out=part)
        return found, None


class _CentredProduct(Function):
    """d dᵀ of the rows d of (N, D) less their mean, and the sum of all squares of (N, D), which has no gradient.

    Few rows are long, so they are read in blocks of columns.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        product, squares = x.new_zeros((len(x), len(x))), x.new_zeros(())
        for columns in _pieces(x):
            mean = columns.mean(0)
            deviation = columns - mean
            product.addmm_(deviation, deviation.T)
            squares += len(x) * mean.dot(mean)
        squares += product.trace()
        ctx.mark_non_differentiable(squares)
        return product, squares

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> Tensor:
        check_first_derivative()
        (x,) = ctx.saved_tensors
        both = slope + slope.T
        both = both - both.mean(0)
        found = torch.empty_like(x)
        for columns, part in zip(_pieces(x), _pieces(found), strict=True):
            torch.mm(both, columns - columns.mean(0), out=part)
        return found


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Blocks of columns of (N, D)."""
    return torch.split(x, block_length(x, len(x)), dim=1)


@torch.no_grad()
def tap_cka(student: Tensor, teacher: Tensor, samples: int = 1024) -> Tensor | None:
    """`cka` of what two taps yield for the same images.

    The samples are positions where both are maps, the larger one resized to the grid of the smaller, or both are tokens
    of one number. Of more than `samples` of them some are compared, spread over the batch and always the same ones.
    Anything else is compared by one vector for each image, maps and tokens by their mean.

    Args:
        student: (B, C, H, W), (B, N, C) or (B, C).
        teacher: one of these, of any dimension and size.
        samples: most samples compared.

    Returns:
        A scalar from 0 to 1; `None` of fewer than three samples, of which CKA is always 1, or where the images are not
        equally many. Of few samples in many dimensions it is high for any two networks.
    """
    if student.dim() == teacher.dim() == 4:
        size = [min(sides) for sides in zip(student.shape[-2:], teacher.shape[-2:], strict=True)]
        student, teacher = (resize_map(x, size).flatten(2).mT for x in (student, teacher))
    if student.dim() == teacher.dim() == 3 and student.shape[:2] == teacher.shape[:2]:
        image, position = _spread(student.shape[0], student.shape[1], samples)
        student, teacher = (x[image.to(x.device), position.to(x.device)] for x in (student, teacher))
    else:
        student, teacher = _pooled(student), _pooled(teacher)
    if len(student) != len(teacher) or len(student) < 3:
        return None
    return cka(student, teacher)


def _spread(images: int, positions: int, samples: int) -> tuple[Tensor, Tensor]:
    """Image and position of at most `samples` places: one drawn from each of as many equal parts of the batch."""
    places = images * positions
    if places <= samples:
        flat = torch.arange(places)
    else:
        # Drawn, since places in equal steps may all lie in a few columns; from a generator of its own, since nothing
        # that is random in the run may depend on it.
        offset = torch.rand(samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        flat = ((torch.arange(samples) + offset) * (places / samples)).long()
    return flat // positions, flat % positions


def _pooled(x: Tensor) -> Tensor:
    """One vector for each image."""
    return x.flatten(2).mean(2) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x.flatten(1)
