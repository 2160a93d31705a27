# SPDX-License-Identifier: Apache-2.0
"""Inside the context a network is a constant, and afterwards what it was."""

import pytest
import torch
from torch import nn

from kdlvfm.core.frozen import frozen


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    network[3].requires_grad_(False)
    network[2].eval()
    return network


def test_it_passes_a_gradient_on_and_takes_none(network):
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with frozen(network):
        y = network(x)
        assert torch.equal(y, network(x)), "dropout and statistics rest"
    y.sum().backward()
    assert (x.grad != 0).any()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_afterwards_it_is_as_before_also_after_an_error(network):
    modes = [module.training for module in network.modules()]
    wanted = [parameter.requires_grad for parameter in network.parameters()]

    def fail():
        assert not any(parameter.requires_grad for parameter in network.parameters())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), frozen(network):
        fail()
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == wanted
