# SPDX-License-Identifier: Apache-2.0
"""A discriminator of maps, and what keeps it smooth: adversarial methods train it against the student."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from kdlvfm.core.align import promote


class SelfAttention(nn.Module):
    """All positions of a map attend to all; what they gather is added with a weight that starts at 0.

    Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(dim, dim // 8, kernel_size=1)
        self.key = nn.Conv2d(dim, dim // 8, kernel_size=1)
        self.value = nn.Conv2d(dim, dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        query, key, value = (part(x).flatten(2) for part in (self.query, self.key, self.value))
        # Written out: the gradient penalty differentiates it twice, which fused attention does not offer.
        attention = (query.mT @ key).softmax(dim=2)
        attended: Tensor = (value @ attention.mT).view_as(x)
        return self.gamma * attended + x


class Discriminator(nn.Module):
    """Scores a map, alone or with the image it is of.

    Batch normalisation, which brings map and image to one scale, four convolutions of stride 2 under spectral
    normalisation, self-attention after the last two of them, and a convolution that leaves one number. The batch
    normalisation has no running statistics: student and teacher are each judged by those of the batch at hand.

    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019.

    Args:
        dim: channels of the map, and of the image where it is judged along.
        width: channels of the first convolution; each further one has twice as many.

    Attributes:
        size: height and width of the maps; four halvings leave the 4x4 that the last convolution covers.

    Example:
        >>> Discriminator(dim=5 + 3)(torch.rand(2, 5, 64, 64), torch.rand(2, 3, 64, 64)).shape
        torch.Size([2])
    """

    size = (64, 64)

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(dim, track_running_stats=False)]
        dims = [dim, width, 2 * width, 4 * width, 8 * width]
        for level in range(4):
            convolution = nn.Conv2d(dims[level], dims[level + 1], kernel_size=4, stride=2, padding=1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(0.1)]
            if level >= 2:
                layers.append(SelfAttention(dims[level + 1]))
        self.layers = nn.Sequential(*layers, nn.Conv2d(dims[-1], 1, kernel_size=4))

    def forward(self, x: Tensor, images: Tensor | None = None) -> Tensor:
        """Maps (B, C, 64, 64), and images (B, 3, 64, 64) where they are judged along, to scores (B,)."""
        # In single precision: slopes of slopes do not survive in half.
        with torch.autocast(x.device.type, enabled=False):
            scores: Tensor = self.layers(promote(x) if images is None else torch.cat([promote(x), promote(images)], 1))
        return scores.flatten()


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, share: Tensor
) -> Tensor:
    r"""How far the slope of a discriminator is from 1 between the student's maps and the teacher's.

    .. math::
        L = \frac{1}{B} \sum_b \big(\lVert \nabla_{x_b} \textstyle\sum_a D(x_a) \rVert_2 - 1\big)^2, \quad
        x_b = u_b F^T_b + (1 - u_b) F^S_b

    Args:
        discriminator: D, from maps (B, C, H, W) to scores (B, ...).
        student: (B, C, H, W); receives no gradient.
        teacher: (B, C, H, W); receives no gradient.
        share: u, (B, 1, 1, 1), drawn from 0 to 1.

    Returns:
        A scalar, with a gradient for the parameters of the discriminator.

    Source:
        Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017.
    """
    mixed = (share * teacher.detach() + (1 - share) * student.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(mixed).sum(), mixed, create_graph=True)
    lengths: Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return (lengths - 1).square().mean()
