# SPDX-License-Identifier: Apache-2.0
"""Image priors against sums written out, their invariances, and what they read inside networks of timm."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.distillers.synthesizers.priors import (
    attention_layers,
    centred_patches,
    inputs_of,
    norm_layers,
    patch_entropy,
    statistics_gap,
    total_variation,
)
from kdlvfm.models.open_clip import OpenClipEncoder
from kdlvfm.models.timm import TimmEncoder


@pytest.fixture
def patches():
    return torch.randn(3, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def entropy_by_hand(vectors, bandwidth, points, margin):
    """The definition, one image, one pair and one point at a time."""
    found = []
    for image in vectors.numpy():
        unit = [v / np.linalg.norm(v) for v in image]
        cosines = [float(a @ b) for a in unit for b in unit]
        places = np.linspace(min(cosines) - margin * bandwidth, max(cosines) + margin * bandwidth, points)
        density = [
            np.mean([math.exp(-(((c - x) / bandwidth) ** 2) / 2) for c in cosines])
            / (bandwidth * math.sqrt(2 * math.pi))
            for x in places
        ]
        integrand = [-p * math.log(p + 1e-4) for p in density]
        found.append(
            sum((places[i + 1] - places[i]) * (integrand[i] + integrand[i + 1]) / 2 for i in range(points - 1))
        )
    return np.mean(found)


@pytest.mark.parametrize(("bandwidth", "points", "margin"), [(0.01, 10, 0.0), (0.01, 10, 3.0), (0.2, 30, 1.0)])
def test_entropy_is_its_definition(patches, bandwidth, points, margin):
    value = patch_entropy(patches, bandwidth=bandwidth, points=points, margin=margin)
    assert value.item() == pytest.approx(entropy_by_hand(patches, bandwidth, points, margin), rel=1e-9)


def test_entropy_sees_directions_alone(patches):
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    lengths = torch.rand(3, 12, 1, dtype=torch.float64) + 0.1
    changed = (patches * lengths @ rotation)[:, torch.randperm(12)]
    torch.testing.assert_close(patch_entropy(changed), patch_entropy(patches))


def test_equal_patches_have_the_least_entropy_and_a_finite_gradient(patches):
    equal = torch.ones(2, 9, 4, dtype=torch.float64, requires_grad=True)
    value = patch_entropy(equal)
    # That of a Gaussian of the kernel's width, but for the tails and the rule.
    assert value.item() == pytest.approx(math.log(0.01 * math.sqrt(2 * math.pi * math.e)), abs=0.1)
    assert value < patch_entropy(patches)
    value.backward()
    assert equal.grad.isfinite().all()
    # The paper's own integral is over nothing here.
    assert patch_entropy(equal.detach(), margin=0.0) == 0


def test_entropy_is_not_computed_in_half_precision(patches):
    vectors = patches.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(patch_entropy(vectors), patch_entropy(patches).float())


def test_total_variation_is_its_definition():
    images = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    expected = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = [
            float((images[:, :, h, w] - images[:, :, h + down, w + right]).square().sum())
            for h in range(5 - down)
            for w in range(max(0, -right), 4 - max(0, right))
        ]
        expected += math.sqrt(sum(squares))
    assert total_variation(images).item() == pytest.approx(expected)
    assert total_variation(torch.full((2, 3, 4, 4), 0.3)) == 0


def test_statistics_are_compared_layer_by_layer():
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(3), nn.BatchNorm1d(4), nn.BatchNorm2d(2)]
    inputs = [torch.randn(5, 3, 4, 4) * 2 + 1, torch.randn(7, 4), torch.randn(5, 2, 3, 3)]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    gaps = []
    for norm, x in zip(norms, inputs, strict=True):
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        mean = (rows.mean(0) - norm.running_mean).square().sum().sqrt()
        var = (rows.var(0, unbiased=False) - norm.running_var).square().sum().sqrt()
        gaps.append(mean + var)
    torch.testing.assert_close(statistics_gap(norms, inputs), 10 * gaps[0] + gaps[1] + gaps[2])
    torch.testing.assert_close(statistics_gap(norms, inputs, first=1.0), sum(gaps))


def test_statistics_that_are_met_cost_nothing():
    x, norm = torch.randn(4, 3, 5, 5), nn.BatchNorm2d(3)
    norm.running_var, norm.running_mean = torch.var_mean(x, dim=(0, 2, 3), unbiased=False)
    assert statistics_gap([norm], [x]) < 1e-5
    with pytest.raises(ValueError, match="must be layers"):
        statistics_gap([], [])


def test_layers_without_statistics_are_passed_over():
    network = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.BatchNorm2d(3))
    assert norm_layers(network) == [network[2]]


def test_centred_patches_have_no_mean():
    x = torch.randn(2, 5, 3, 4) + 7
    patches = centred_patches(x)
    assert patches.shape == (2, 12, 5)
    assert patches.mean(dim=1).abs().max() < 1e-6
    torch.testing.assert_close(patches[:, 1] - patches[:, 0], x[:, :, 0, 1] - x[:, :, 0, 0])


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit_tiny_patch16_224", 1), ("vit_small_patch16_dinov3", 5), ("vit_base_patch16_siglip_224", 0)],
)
def test_attention_is_read_of_patches_alone(name, prefix):
    """Class and register tokens stand before the patches, with learned positions and with rotary ones."""
    torch.manual_seed(0)
    model = TimmEncoder(name, pretrained=False, model_kwargs={"depth": 2}).eval()
    layers = attention_layers(model)
    assert [layer.prefix for layer in layers] == [prefix, prefix]
    with torch.no_grad(), inputs_of([layer.projection for layer in layers]) as inputs:
        features = model(torch.rand(2, 3, 48, 64), ("map.0",))
    assert layers[1].projection not in inputs, "the network stops after the block that is needed"
    vectors = layers[0].patches(inputs[layers[0].projection])
    assert vectors.shape == (2, 12, features["map.0"].shape[1] // layers[0].heads)


def test_attention_is_its_weights_times_its_values():
    torch.manual_seed(0)
    model = TimmEncoder("vit_tiny_patch16_224", pretrained=False, model_kwargs={"depth": 1}).eval()
    attention, seen = model.net.blocks[0].attn, []
    handle = attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    (layer,) = attention_layers(model)
    with torch.no_grad(), inputs_of([layer.projection]) as inputs:
        model(torch.rand(1, 3, 32, 48), ("map.0",))
        query, key, value = attention.qkv(seen[0]).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        expected = (weights @ value).mean(dim=1)[:, 1:]
    handle.remove()
    torch.testing.assert_close(layer.patches(inputs[layer.projection]), expected)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "sam2_hiera_tiny", "samvit_base_patch16"])
def test_other_networks_have_no_attention_to_read(name):
    with torch.device("meta"):
        assert attention_layers(TimmEncoder(name, pretrained=False)) == []


def test_open_clip_has_no_attention_to_read():
    assert attention_layers(OpenClipEncoder("ViT-B-32", tag="openai", pretrained=False)) == []


def test_hooks_are_gone_afterwards():
    layer = nn.Linear(2, 2)
    with inputs_of([layer]) as inputs:
        layer(torch.ones(1, 2))
    assert torch.equal(inputs[layer], torch.ones(1, 2))
    layer(torch.zeros(1, 2))
    assert torch.equal(inputs[layer], torch.ones(1, 2))
    assert F.linear(torch.zeros(1, 2), layer.weight).shape == (1, 2)
