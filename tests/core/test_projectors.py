# SPDX-License-Identifier: Apache-2.0
"""Projectors: shapes, what each can and cannot see, and the attention against loops."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.core.projectors import AttentionProjector, OrthogonalProjector, build_projector

KINDS = ["linear", "mlp", "conv_bn", "orthogonal", "attention"]


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dims", [(6, 10), (10, 6), (8, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_keeps_the_grid_changes_the_channels_and_trains_all_it_has(kind, dims):
    projector = build_projector(kind, *dims).double()
    x = maps(2, dims[0], 4, 5).requires_grad_()
    projected = projector(x)
    assert projected.shape == (2, dims[1], 4, 5)
    (projected * maps(2, dims[1], 4, 5, seed=1)).sum().backward()
    assert (x.grad != 0).any()
    assert all((parameter.grad != 0).any() for parameter in projector.parameters())


def test_none_is_as_little_as_will_do():
    assert isinstance(build_projector(None, 5, 5), nn.Identity)
    assert build_projector(None, 3, 5).weight.shape == (5, 3, 1, 1)
    assert build_projector(None, 3, 5, bias=False).bias is None
    assert build_projector("conv_bn", 3, 5, bias=False)[-1].bias is None


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'attention', not 'magic'"):
        build_projector("magic", 3, 5)


def reach(kind):
    """Which positions of a 5x5 map change what leaves at the centre."""
    projector = build_projector(kind, 3, 4).double().eval()
    x = maps(1, 3, 5, 5).requires_grad_()
    projector(x)[0, :, 2, 2].sum().backward()
    return (x.grad[0] != 0).any(0)


@pytest.mark.parametrize("kind", ["linear", "mlp", "orthogonal"])
def test_pointwise_kinds_see_their_position(kind):
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[2, 2] = True
    assert torch.equal(reach(kind), expected)


def test_a_convolution_sees_a_neighbourhood_and_attention_everything():
    neighbourhood = torch.zeros(5, 5, dtype=torch.bool)
    neighbourhood[1:4, 1:4] = True
    assert torch.equal(reach("conv_bn"), neighbourhood)
    assert reach("attention").all()


@pytest.mark.parametrize("dims", [(4, 7), (7, 4), (5, 5)])
def test_an_orthogonal_projector_stays_orthogonal_in_training(dims):
    projector = OrthogonalProjector(*dims).double()
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.5, weight_decay=0.1)
    for seed in range(5):
        optimizer.zero_grad()
        projector(maps(3, dims[0], 2, 2, seed=seed)).square().sum(1).sqrt().sin().sum().backward()
        optimizer.step()
    weight = projector.weight
    gram = weight.T @ weight if dims[0] <= dims[1] else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(dims), dtype=torch.float64), rtol=0, atol=1e-12)


def test_attention_against_loops():
    projector = AttentionProjector(3, 4, heads=2, grid=2).double().requires_grad_(False)
    x = maps(1, 3, 2, 2)
    tokens = x[0].flatten(1).T
    queries, places = (grid[0].flatten(1).T for grid in (projector.queries, projector.places))
    out = torch.zeros(4, 4, dtype=torch.float64)
    keys, values = projector.key(tokens) + places, projector.value(tokens)
    for head in (slice(0, 2), slice(2, 4)):
        for i in range(4):
            scores = [float(queries[i, head] @ keys[j, head]) / math.sqrt(2) for j in range(4)]
            total = sum(math.exp(score) for score in scores)
            out[i, head] = sum(math.exp(score) / total * values[j, head] for j, score in enumerate(scores))
    out = projector.out(out) + queries
    out = out + projector.perceptron(F.layer_norm(out, (4,), projector.norm.weight, projector.norm.bias))
    torch.testing.assert_close(projector(x)[0].flatten(1).T, out)


def test_attention_can_leave_on_another_grid():
    projector = AttentionProjector(3, 128)
    assert projector.heads == 2
    assert projector(torch.rand(2, 3, 4, 4), size=(7, 5)).shape == (2, 128, 7, 5)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="3 heads do not divide 10 channels"):
        AttentionProjector(4, 10, heads=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_under_autocast(kind, dtype):
    projector = build_projector(kind, 6, 8)
    with torch.autocast("cpu", dtype=dtype):
        projected = projector(torch.rand(2, 6, 4, 4).to(dtype))
    projected.float().sum().backward()
    assert projected.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in projector.parameters())
