# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core.blocks import sum_over_blocks
from kdlvfm.core.relation import relation_divergence

SHAPES = {"groups": (3, 4, 1, 5), "sets": (1, 6, 2, 3), "both": (2, 3, 2, 4), "no rows": (1, 0, 1, 4)}


def values(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def case(shape):
    groups, rows, sets, keys = shape
    return (
        values(groups, rows, 3, seed=1).requires_grad_(),
        values(groups, rows, 2, seed=2),
        values(groups, sets, keys, 3, seed=3).requires_grad_(),
        values(groups, sets, keys, 2, seed=4),
    )


def direct(student, teacher, own, goal, temperature):
    first, second = (torch.einsum("grc,gkmc->grkm", *pair) / temperature for pair in ((student, own), (teacher, goal)))
    return F.kl_div(first.log_softmax(3), second.softmax(3), reduction="sum")


@pytest.mark.parametrize("block", [1, 7, 16, 2**20])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_blocks_give_value_and_gradients_of_whole_matrices(shape, block):
    inputs = case(shape)
    found, expected = relation_divergence(*inputs, 0.5, block), direct(*inputs, 0.5)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(3 * x, inputs[::2]) for x in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("block", [4, 2**20])
def test_gradcheck(block):
    student, teacher, own, goal = case(SHAPES["both"])
    assert torch.autograd.gradcheck(lambda x, y: relation_divergence(x, teacher, y, goal, 0.7, block), (student, own))


def test_rows_that_are_their_own_keys():
    x, y = values(2, 5, 3, seed=1).requires_grad_(), values(2, 5, 4, seed=2)
    assert torch.autograd.gradcheck(
        lambda x: relation_divergence(x, y, x.unsqueeze(1), y.unsqueeze(1), 0.5, block=12), (x,)
    )


def test_no_gradient_without_need_and_no_second_one():
    inputs = case(SHAPES["both"])
    with torch.no_grad():
        assert not relation_divergence(*inputs, 0.5).requires_grad
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(relation_divergence(*inputs, 0.5), inputs[0], create_graph=True)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_sum_over_blocks(size):
    own, goal = values(5, 3, seed=1).requires_grad_(), values(5, 3, seed=2)

    def loss(x, y):
        return (x.exp() * y).sum()

    found = sum_over_blocks(loss, own, goal, size)
    torch.testing.assert_close(found, loss(own, goal))
    assert torch.autograd.gradcheck(lambda x: sum_over_blocks(loss, x, goal, size), (own,))
    with torch.no_grad():
        assert not sum_over_blocks(loss, own, goal, size).requires_grad
