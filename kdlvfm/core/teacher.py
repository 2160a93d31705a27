# SPDX-License-Identifier: Apache-2.0
"""The teacher: a constant function from images to features."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kdlvfm.core.align import resize_map
from kdlvfm.core.denoiser import Denoiser
from kdlvfm.core.detector import Detector
from kdlvfm.core.features import FeatureModel, ModelCard, TapInfo


class Teacher(nn.Module):
    """A frozen `FeatureModel`, held so that it can be neither trained nor saved by accident.

    The wrapped model is not a sub-module: `parameters()`, `state_dict()` and `train()` do not reach it, so no
    optimizer, checkpoint, DDP wrapper or mode switch can. `.to()`, `.cuda()`, `.half()` and the like do reach it.

    Args:
        model: the network; it is switched to eval mode and its parameters stop requiring gradients.
        input_size: side lengths (height, width) in pixels, or one for both, that images are resized to before the
            network sees them; `None` keeps the size of the images. Spatial features still cover the whole image, and
            dense logits come back in the size of the images given.

    Raises:
        ValueError: an `input_size` for a detector, whose strides and boxes are in pixels of the images it sees, or for
            a denoiser, whose noise no resizing survives.
    """

    def __init__(self, model: FeatureModel, *, input_size: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        if input_size is not None and any(isinstance(part, Detector) for part in model.modules()):
            raise ValueError(
                f"input_size is not for a detector such as {model.card.name}, since its boxes would be those of the "
                "resized image: leave it null, and let data.resize set the size of images for teacher and student."
            )
        if input_size is not None and isinstance(model, Denoiser):
            raise ValueError(f"input_size is not for {model.card.name}, which finds noise: leave it null.")
        model.eval().requires_grad_(False)
        self._held = (model,)
        self._input_size = (input_size, input_size) if isinstance(input_size, int) else input_size

    @property
    def model(self) -> FeatureModel:
        """The wrapped network."""
        return self._held[0]

    @property
    def card(self) -> ModelCard:
        """Name, weights and licence of the network."""
        return self.model.card

    def taps(self) -> dict[str, TapInfo]:
        """Every portable tap with its facts."""
        return self.model.taps()

    def tap_info(self, tap: str) -> TapInfo:
        """Facts about `tap`; raises `TapError` if there is no such tap."""
        return self.model.tap_info(tap)

    def check_tap(self, tap: str) -> None:
        """Raise `TapError` if there is no such tap."""
        self.model.check_tap(tap)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self, images: Tensor, taps: Collection[str], *, input_grad: bool = False, timesteps: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Features of `images` (B, 3, H, W) in [0, 1], one entry for each tap.

        Args:
            images: the batch, in the student's geometry.
            taps: names of the features wanted; none of them means no work is done.
            input_grad: let gradients flow to `images` (data-free methods); the teacher itself stays frozen.
            timesteps: of a `Denoiser`, which then takes noisy states for images.
        """
        if not taps:
            return {}
        size = images.shape[-2:]
        with torch.set_grad_enabled(input_grad and torch.is_grad_enabled()):
            seen = images if self._input_size is None else resize_map(images, self._input_size)
            features: dict[str, Tensor] = self.model(seen, taps, *(() if timesteps is None else (timesteps,)))
            if self._input_size is not None:
                features = {
                    tap: resize_map(value, size) if value.dim() == 4 and value.shape[-2:] == seen.shape[-2:] else value
                    for tap, value in features.items()
                }
        return features
