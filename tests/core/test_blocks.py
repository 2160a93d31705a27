# SPDX-License-Identifier: Apache-2.0
"""Sums in blocks against the whole sum, in value and gradient."""

import pytest
import torch

from kdlvfm.core.blocks import block_length, sum_over_blocks


def distance(own, goal):
    return (own.sigmoid() - goal).square().sum()


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_a_sum_over_blocks_is_the_sum(size):
    torch.manual_seed(0)
    own, goal = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, 5, dtype=torch.float64)
    found, expected = sum_over_blocks(distance, own, goal, size), distance(own, goal)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(3 * value, own)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert not sum_over_blocks(distance, own, goal, size).requires_grad


def test_a_second_derivative_is_refused():
    own = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(sum_over_blocks(distance, own, torch.zeros(2, 2), 1), own, create_graph=True)


def test_a_block_holds_at_least_one_and_no_more_than_a_mebibyte():
    x = torch.zeros(1)
    assert block_length(x, 10**9) == 1
    assert block_length(x, 0) > 0
    for entries in (1, 1000, 4096):
        assert 2**18 - entries < block_length(x, entries) * entries <= 2**18
