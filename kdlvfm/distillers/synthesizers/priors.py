# SPDX-License-Identifier: Apache-2.0
"""What tells an image from noise without data: smoothness, and what the layers of a teacher are used to."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from kdlvfm.core.align import promote


def total_variation(images: Tensor) -> Tensor:
    r"""TV_l2: the Frobenius norms of the finite differences of a batch, summed over four directions.

    .. math:: L = \sum_{(i, j)} \lVert x_{\cdot,\cdot,h,w} - x_{\cdot,\cdot,h+i,w+j} \rVert_F, \quad
        (i, j) \in \{(0, 1), (1, 0), (1, 1), (1, -1)\}

    Args:
        images: (B, C, H, W).

    Returns:
        A scalar; 0 for images of one colour.

    Source:
        Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 3.0], [0.0, 0.0]]]])).item()  # 3 across, 3 down, 0, 3 askew
        9.0
    """
    differences = (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, :-1] - images[..., 1:, 1:],
        images[..., :-1, 1:] - images[..., 1:, :-1],
    )
    return torch.stack([torch.linalg.vector_norm(promote(x)) for x in differences]).sum()


def patch_entropy(vectors: Tensor, *, bandwidth: float = 0.01, points: int = 10, margin: float = 3.0) -> Tensor:
    r"""Differential entropy of the cosines between all pairs of patches of an image: high if they differ in many ways.

    .. math:: \hat f(x) = \frac{1}{P^2} \sum_{a, b} \mathcal{N}\big(x;\, \cos(v_a, v_b),\, h\big), \quad
        H = -\int \hat f(x) \ln\big(\hat f(x) + 10^{-4}\big)\, dx

    by the trapezoid rule on equally spaced points between the smallest and the largest cosine of the image, to which
    `margin` bandwidths are added at both ends. The margin is ours: without it the integral of an image of equal patches
    is one over nothing and gives 0, more than most photographs have.

    Args:
        vectors: (B, P, D), one for each patch.
        bandwidth: h, of the Gaussian kernel.
        points: of the trapezoid rule.
        margin: 0 is the paper's.

    Returns:
        A scalar: the mean over images.

    Source:
        Li et al., "Patch Similarity Aware Data-Free Quantization for Vision Transformers", ECCV 2022 (PSAQ-ViT).

    Example:
        >>> equal, different = torch.ones(1, 16, 8), torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
        >>> bool(patch_entropy(different) > patch_entropy(equal))
        True
    """
    with torch.autocast(vectors.device.type, enabled=False):  # a bandwidth of 0.01 is finer than half precision
        directions = F.normalize(promote(vectors), dim=2)
        cosines = (directions @ directions.mT).flatten(1)
        low, high = cosines.detach().aminmax(dim=1, keepdim=True)
        low, high = low - margin * bandwidth, high + margin * bandwidth
        steps = torch.linspace(0, 1, points, dtype=cosines.dtype, device=cosines.device)
        places = low + (high - low) * steps
        kernels = [torch.exp(-((cosines - x) / bandwidth).square() / 2).mean(dim=1) for x in places.T.unsqueeze(2)]
        density = torch.stack(kernels, dim=1) / (bandwidth * math.sqrt(2 * math.pi))
        return torch.trapezoid(-density * (density + 1e-4).log(), places, dim=1).mean()


def centred_patches(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as patches (B, H * W, C), without the mean over each image's own positions."""
    patches = promote(x).flatten(2).mT
    return patches - patches.mean(dim=1, keepdim=True)


def statistics_gap(norms: Sequence[_BatchNorm], inputs: Sequence[Tensor], first: float = 10.0) -> Tensor:
    r"""How far the statistics of a batch are from those that batch normalisation has kept from training.

    .. math:: L = \sum_l w_l \big(\lVert \mu_l - \hat\mu_l \rVert_2 + \lVert \sigma^2_l - \hat\sigma^2_l \rVert_2\big)

    Args:
        norms: the layers, with running statistics.
        inputs: what each was given, (B, C, ...).
        first: weight of the first layer; 1 for all others.

    Returns:
        A scalar.

    Raises:
        ValueError: there is no layer.

    Source:
        Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020.

    Example:
        >>> statistics_gap([nn.BatchNorm2d(1)], [torch.tensor([3.0, 5.0]).view(1, 1, 1, 2)]).item()  # 10 * (4 + 0)
        40.0
    """
    if not norms:
        raise ValueError("there must be layers of batch normalisation with running statistics.")
    gaps = []
    for norm, x in zip(norms, inputs, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        dims = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(promote(x), dim=dims, unbiased=False)
        pairs = (mean - norm.running_mean, var - norm.running_var)
        gaps.append(torch.stack([torch.linalg.vector_norm(difference) for difference in pairs]).sum())
    return torch.stack(gaps).sum() + (first - 1) * gaps[0]


def norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers of batch normalisation that have kept statistics, in the order of the network."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


@dataclass(frozen=True)
class Attention:
    """A block's attention, read where its heads still lie side by side: at the input of its last projection.

    Attributes:
        projection: the layer.
        heads: how many.
        prefix: tokens before those of patches: class and register tokens.
    """

    projection: nn.Module
    heads: int
    prefix: int

    def patches(self, tokens: Tensor) -> Tensor:
        """The input of the projection (B, N, heads * D) as one vector for each patch, (B, N - prefix, D)."""
        patches = tokens[:, self.prefix :]
        return patches.reshape(*patches.shape[:2], self.heads, -1).mean(dim=2)


def attention_layers(model: nn.Module) -> list[Attention]:
    """The attention of every block of a plain vision transformer as timm builds it, rotary or not; else none."""
    found = []
    for network in model.modules():
        blocks = dict(network.named_children()).get("blocks")
        if blocks is None or "num_prefix_tokens" not in vars(network):
            continue
        for block in blocks.children():
            attention = dict(block.named_children()).get("attn", nn.Identity())
            projection = dict(attention.named_children()).get("proj")
            if projection is not None and "num_heads" in vars(attention):
                heads, prefix = vars(attention)["num_heads"], vars(network)["num_prefix_tokens"]
                found.append(Attention(projection, heads, prefix))
    return found


@contextmanager
def inputs_of(layers: Collection[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Within the context, what each layer was last given, by layer; those that did not run are absent."""
    inputs: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, arguments: Any) -> None:
        inputs[layer] = arguments[0]

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
