# SPDX-License-Identifier: Apache-2.0
"""Generator: a network that makes images on which the student still differs from the teacher."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kdlvfm.core import Context, Step, Update
from kdlvfm.core.distiller import Seen
from kdlvfm.core.synthesizer import GROUP, Synthesizer
from kdlvfm.distillers.synthesizers.objective import Objective

_GRID = 16


class ImageGenerator(Synthesizer):
    """Images from a generator that plays against the student: data-free adversarial distillation.

    The generator takes one optimizer step for every `every` of the student's, on a batch that the student is then
    trained on as well. Its parameters are the group `synthesizer`, with the recipe's optimizer unless
    `recipe.groups.synthesizer` says otherwise; the papers' is Adam with 1e-3.

    A linear layer makes a grid of 16x16 at most out of noise, and each stage doubles it with a 3x3 convolution. DFAD's
    network, except that its grid is a quarter of the image whatever the size of that, and that it ends in normalised
    channels, which here a sigmoid brings to [0, 1].

    Source: Fang et al., "Data-Free Adversarial Distillation", 2019, in its form for segmentation; with the weights
    `one_hot`, `balance` and `activation` it is Chen et al., "Data-Free Learning of Student Networks", ICCV 2019 (DAFL).

    Args:
        image_size: height and width of what it makes.
        objective: what it is trained for.
        latent: length of the noise; 256 in DFAD.
        width: channels of the last stages.
        every: steps of the student for one of the generator; 5 in DFAD.

    Raises:
        ValueError: a number is not positive.

    Example:
        >>> make = ImageGenerator((24, 36), latent=8, width=4)
        >>> make(torch.randn(2, 8)).shape
        torch.Size([2, 3, 24, 36])
    """

    def __init__(
        self,
        image_size: Sequence[int],
        objective: Objective | None = None,
        *,
        latent: int = 256,
        width: int = 64,
        every: int = 5,
    ) -> None:
        super().__init__()
        if min(*image_size, latent, width, every) < 1:
            raise ValueError("image_size, latent, width and every must be positive.")
        self.objective = Objective() if objective is None else objective
        self.latent, self.every = latent, every
        self._size = (int(image_size[0]), int(image_size[1]))
        stages = max(2, math.ceil(math.log2(max(self._size) / _GRID)))
        grid = [math.ceil(side / 2**stages) for side in self._size]
        layers: list[nn.Module] = [
            nn.Linear(latent, 2 * width * grid[0] * grid[1]),
            nn.Unflatten(1, (2 * width, grid[0], grid[1])),
            nn.BatchNorm2d(2 * width),
        ]
        for stage in range(stages):
            dims = (2 * width, 2 * width if stage < stages - 1 else width)
            layers += [nn.Upsample(scale_factor=2), *_convolution(*dims), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, *_convolution(width, 3, affine=False), nn.Sigmoid())

    @classmethod
    def from_context(cls, context: Context, *, image_size: Sequence[int] | None = None, **hparams: Any) -> Self:
        """Images of the size of the run's, and the objective that the networks allow.

        Raises:
            ValueError: the size of images is neither given nor known.
        """
        weights, own = Objective.split(hparams)
        if image_size is None:
            image_size = context.require_batch_shape()[1:]
        return cls(image_size, Objective.fitting(context, **weights), **own)

    def forward(self, noise: Tensor) -> Tensor:
        """Noise (B, latent) to images (B, 3, H, W) in [0, 1]."""
        images: Tensor = self.layers(noise)
        return images[..., : self._size[0], : self._size[1]]

    def synthesize(self, step: Step, taps: Collection[str]) -> Generator[Update, None, Step]:
        """See `Synthesizer.synthesize`."""
        noise = torch.randn(len(step.images), self.latent, device=step.images.device)
        if step.number % self.every != self.every - 1:
            with torch.no_grad():
                return replace(step, images=self(noise).to(step.images.dtype))
        images = self(noise)
        terms, seen = self.objective(step, images, taps)
        yield Update(terms, group=GROUP)
        return replace(step, images=images.detach().to(step.images.dtype), seen=Seen(teacher=seen))


def _convolution(before: int, after: int, affine: bool = True) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, kernel_size=3, padding=1), nn.BatchNorm2d(after, affine=affine)
