# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from kdlvfm.core.gradients import gradients, inner_products


def test_gradients_are_those_of_a_backward_pass_and_leave_no_trace():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    unused = nn.Parameter(torch.ones(2))
    loss = net(torch.randn(5, 3, dtype=torch.float64)).square().mean()
    parameters = [*net.parameters(), unused]
    found = gradients(loss, parameters)
    assert all(parameter.grad is None for parameter in parameters)
    loss.backward()
    assert found[-1] is None
    for gradient, parameter in zip(found, net.parameters(), strict=False):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_term_without_a_graph_has_gradients_of_zero():
    x = torch.ones(2, 3, requires_grad=True)
    (gradient,) = gradients(torch.tensor(3.0), [x])
    assert torch.equal(gradient, torch.zeros(2, 3))


def test_small_gradients_survive_half_precision():
    x = torch.ones(4, dtype=torch.float16, requires_grad=True)
    tiny = 1e-8  # below what float16 can hold
    (gradient,) = gradients((x.float() * tiny).sum(), [x])
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.full((4,), tiny), rtol=0.05, atol=0)


def test_inner_products_by_hand():
    first = [torch.tensor([1.0, 2.0]), None, torch.tensor([[3.0]]), None]
    second = [torch.tensor([4.0, -1.0]), torch.tensor([2.0]), None, None]
    assert inner_products(first, second).tolist() == [2.0, 14.0, 21.0]
    assert inner_products([None], [None]).tolist() == [0.0, 0.0, 0.0]


def test_inner_products_are_in_full_precision_under_autocast():
    x, y = torch.full((1000,), 1.001), torch.full((1000,), 1.003)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dot = inner_products([x], [y])[0]
    assert dot.item() == pytest.approx(1000 * 1.001 * 1.003, rel=1e-5)


def test_gradients_of_other_inputs_do_not_compare():
    with pytest.raises(ValueError, match=r"same inputs, not \(2,\) and \(3,\)"):
        inner_products([torch.ones(2)], [torch.ones(3)])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        inner_products([torch.ones(2)], [torch.ones(2), torch.ones(2)])
