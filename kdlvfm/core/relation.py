# SPDX-License-Identifier: Apache-2.0
"""How the similarities of rows to keys differ between two networks, in memory that does not grow with their product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdlvfm.core.blocks import check_first_derivative

BLOCK = 2**22
"""Similarities of one network held at once: 16 MiB in single precision, which a matrix product is still large for."""


def relation_divergence(
    student: Tensor, teacher: Tensor, own: Tensor, goal: Tensor, temperature: float, block: int = BLOCK
) -> Tensor:
    r"""Sum of the Kullback-Leibler divergences between the similarities of each row to sets of keys.

    .. math::
        \sum_{g, r, k} \mathrm{KL}\big(\sigma(s^T_{grk} / \tau) \,\|\, \sigma(s^S_{grk} / \tau)\big), \quad
        s_{grk} = \big(x_{gr}^\top y_{gkm}\big)_{m = 1 \dots M}

    with a softmax over the M keys of a set. Similarities are made in blocks and forgotten. The gradient, of one block
    the difference of the two softmaxes, is made in the forward pass while the block is there, so that no block is made
    twice: the work is that of the whole matrices, the memory that of the arguments. It can be differentiated once.

    Args:
        student: (G, R, C) rows.
        teacher: (G, R, D); receives no gradient.
        own: (G, K, M, C) keys of the student: K sets of M for each group.
        goal: (G, K, M, D) keys of the teacher; they receive no gradient.
        temperature: τ.
        block: similarities of one network held at once.

    Returns:
        A scalar, in the precision of the arguments: autocast is off inside.
    """
    with torch.autocast(student.device.type, enabled=False):
        total: Tensor = _Divergence.apply(
            student, own, teacher.detach(), goal.detach(), temperature, block, torch.is_grad_enabled()
        )
    return total


class _Divergence(torch.autograd.Function):
    """The sum, with gradients for the student's rows and keys."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        keys: Tensor,
        goal_rows: Tensor,
        goal_keys: Tensor,
        temperature: float,
        block: int,
        differentiable: bool,
    ) -> Tensor:
        wanted = [differentiable and needed for needed in ctx.needs_input_grad[:2]]
        sets = keys.shape[1:3]
        flat, goal = keys.flatten(1, 2), goal_keys.flatten(1, 2)
        rows_grad, keys_grad = (
            x.new_zeros(x.shape) if due else None for x, due in zip((rows, flat), wanted, strict=True)
        )
        total = rows.new_zeros(())
        for groups, part in _blocks(rows.shape, sets.numel(), block):
            first, second = rows[groups, part] / temperature, goal_rows[groups, part] / temperature
            log_own, log_goal = (
                (x @ y[groups].mT).view(*x.shape[:2], *sets).log_softmax(dim=3)
                for x, y in ((first, flat), (second, goal))
            )
            weights = log_goal.exp()
            total += (log_goal.sub_(log_own).mul_(weights)).sum()
            slope = log_own.exp_().sub_(weights).flatten(2)
            if rows_grad is not None:
                rows_grad[groups, part] = slope @ flat[groups] / temperature
            if keys_grad is not None:
                keys_grad[groups].baddbmm_(slope.mT, first)
        ctx.save_for_backward(rows_grad, None if keys_grad is None else keys_grad.view(keys.shape))
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        found = (None if grad is None else grad * factor for grad in ctx.saved_tensors)
        return (*found, None, None, None, None, None)


def _blocks(shape: torch.Size, keys: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Groups and rows of each block: several whole groups, or a part of the rows of one."""
    groups = max(block // max(shape[1] * keys, 1), 1)
    rows = max(shape[1] if groups > 1 else min(block // max(keys, 1), shape[1]), 1)
    for group in range(0, shape[0], groups):
        for row in range(0, shape[1], rows):
            yield slice(group, group + groups), slice(row, row + rows)
