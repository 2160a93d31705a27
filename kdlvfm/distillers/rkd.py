# SPDX-License-Identifier: Apache-2.0
"""RKD: the samples of a batch form the same figure for the student as for the teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from kdlvfm.core import Distiller, Features
from kdlvfm.core.align import promote, self_product
from kdlvfm.core.blocks import check_first_derivative
from kdlvfm.core.distributed import gather_batch


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Huber loss between the pairwise distances of the embeddings, each network's in units of its own mean.

    .. math::
        L = \frac{1}{B^2} \sum_{i,j} \ell\Big(\frac{\|s_i - s_j\|}{\mu_S}, \frac{\|t_i - t_j\|}{\mu_T}\Big), \quad
        \ell(x, y) = \begin{cases} (x - y)^2 / 2 & |x - y| \le 1 \\ |x - y| - 1/2 & \text{otherwise} \end{cases}

    with mu the mean of a network's distances that are not 0. Moving, turning, mirroring and scaling the embeddings of
    either network changes nothing. Two samples have one distance, which is its own unit: the loss is 0. It can be
    differentiated once.

    Args:
        student: (B, D_S) embeddings.
        teacher: (B, D_T); receives no gradient.

    Returns:
        A scalar: the mean over all pairs, those of a sample with itself included, as in the authors' code.

    Raises:
        ValueError: the embeddings are not vectors, or the batches differ.

    Source:
        Park et al., "Relational Knowledge Distillation", CVPR 2019.

    Example:
        >>> import torch
        >>> student, teacher = torch.eye(3), torch.tensor([[0.0], [1.0], [3.0]])
        >>> round(18 * rkd_distance_loss(student, teacher).item(), 6)
        1.0
    """
    _check(student, teacher)
    own, goal = _distances(promote(student)), _distances(promote(teacher.detach()))
    return 2 * F.smooth_l1_loss(own, goal, reduction="sum") / student.shape[0] ** 2


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Huber loss between the cosines of the angles that the embeddings of any three samples form.

    .. math::
        L = \frac{1}{B^3} \sum_{i,j,k} \ell(\cos \angle s_j s_i s_k, \cos \angle t_j t_i t_k), \quad
        \cos \angle x_j x_i x_k = \frac{(x_j - x_i) \cdot (x_k - x_i)}{\|x_j - x_i\| \, \|x_k - x_i\|}

    with the Huber loss of `rkd_distance_loss`. Moving, turning, mirroring and scaling the embeddings of either network
    changes nothing. An angle of which two corners coincide has cosine 0, without a gradient.

    Args:
        student: (B, D_S) embeddings; takes B B B numbers of memory.
        teacher: (B, D_T); receives no gradient.

    Returns:
        A scalar: the mean over all triplets, those with a repeated sample included, as in the authors' code.

    Raises:
        ValueError: the embeddings are not vectors, or the batches differ.

    Source:
        Park et al., "Relational Knowledge Distillation", CVPR 2019.

    Example:
        >>> import torch
        >>> figure = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> round(rkd_angle_loss(3 * figure + 1, figure).item(), 6)
        0.0
    """
    _check(student, teacher)
    return F.smooth_l1_loss(_cosines(promote(student)), _cosines(promote(teacher.detach())))


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 2 or teacher.dim() != 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"embeddings must be (B, D_S) and (B, D_T) of one batch, not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher); average maps over their positions first."
        )


def _distances(x: Tensor) -> Tensor:
    """Distance of each pair once, (B (B - 1) / 2,), in units of their mean without zeros."""
    distances: Tensor = _PairDistances.apply(x)
    mean = distances.sum() / distances.count_nonzero().clamp(min=1)
    return distances / mean.clamp(min=torch.finfo(x.dtype).tiny)


class _PairDistances(Function):
    """`F.pdist`, whose distances come from differences and so keep their digits, with a gradient by a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        distances: Tensor = F.pdist(x)
        ctx.save_for_backward(x, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        check_first_derivative()
        x, distances = ctx.saved_tensors
        # In double precision, since the rows of a small distance all but cancel. Equal ones have no direction.
        pull = x.new_zeros((len(x), len(x)), dtype=torch.float64)
        first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
        pull[first, second] = (slope / distances).masked_fill(distances == 0, 0).double()
        pull = pull + pull.T
        centred = x.double()
        centred = centred - centred.mean(0)
        with torch.autocast(x.device.type, enabled=False):
            grad: Tensor = pull.sum(1, keepdim=True) * centred - pull @ centred
        return grad.to(x.dtype)


def _cosines(x: Tensor) -> Tensor:
    """Cosine at corner i between the directions to j and k, (B, B, B)."""
    products = _products(x)
    lengths = _lengths(products)
    lengths = lengths.masked_fill(lengths == 0, math.inf)
    # (x_j - x_i) (x_k - x_i) from the products of all pairs: no direction is ever formed.
    own = products.diagonal()[:, None, None]
    rays = products.unsqueeze(0) - products.unsqueeze(2) - products.unsqueeze(1) + own
    return (rays / lengths.unsqueeze(2) / lengths.unsqueeze(1)).to(x.dtype)


def _products(x: Tensor) -> Tensor:
    """Inner products of all pairs of embeddings, (B, B), around their mean.

    In double precision, of which differences of products lose half: what is left is single precision, for embeddings
    that are close to each other and far from the origin too.
    """
    centred = x.double() - x.double().mean(0)
    with torch.autocast(x.device.type, enabled=False):
        return self_product(centred)


def _lengths(products: Tensor) -> Tensor:
    """Distances of all pairs, from products; 0 without a gradient where they are no more than rounding."""
    squares = products.diagonal()
    apart = squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * products
    same = apart <= 1e3 * torch.finfo(products.dtype).eps * squares.amax()
    return apart.masked_fill(same, 1).sqrt().masked_fill(same, 0)


class RKD(Distiller):
    """Relational distillation of embeddings: distances and angles inside a batch of at least three, no projector.

    Args:
        distance_weight: weight of the distances; 25 is mdistiller's, for CIFAR-100.
        angle_weight: weight of the angles; twice as much, in mdistiller as in the paper.
        student_tap: the student's embeddings, or a map, which is averaged over its positions.
        teacher_tap: the teacher's embeddings or map, likewise.
        normalize: bring each embedding to unit length first: an option of the authors' code.
        gather: relate the samples of all processes, whose batches must be of one size. The authors' code relates those
            of one GPU (`False`).

    Example:
        >>> import torch
        >>> terms = RKD()({"pooled": torch.rand(4, 512)}, {"pooled": torch.rand(4, 384)})
        >>> list(terms)
        ['rkd_distance', 'rkd_angle']
    """

    def __init__(
        self,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        student_tap: str = "pooled",
        teacher_tap: str = "pooled",
        normalize: bool = False,
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.normalize = normalize
        self.gather = gather

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms `rkd_distance` and `rkd_angle`."""
        del target
        pair = self._embed(student[self.student_taps[0]]), self._embed(teacher[self.teacher_taps[0]].detach())
        return {
            "rkd_distance": self.distance_weight * rkd_distance_loss(*pair),
            "rkd_angle": self.angle_weight * rkd_angle_loss(*pair),
        }

    def _embed(self, x: Tensor) -> Tensor:
        x = promote(x)
        x = x.mean((2, 3)) if x.dim() == 4 else x
        x = F.normalize(x, dim=1) if self.normalize else x
        return gather_batch(x) if self.gather else x
