# SPDX-License-Identifier: Apache-2.0
"""The teacher: a constant function from images to features."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kdlvfm.core.align import promote, resize_map
from kdlvfm.core.denoiser import Denoiser
from kdlvfm.core.detector import Detector
from kdlvfm.core.features import FeatureModel, ModelCard, TapInfo

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
"""What a teacher may compute in, whatever its student computes in, and what autocast calls it; `None` is without it."""


class Teacher(nn.Module):
    """A frozen `FeatureModel`, held so that it can be neither trained nor saved by accident.

    The wrapped model is not a sub-module: `parameters()`, `state_dict()` and `train()` do not reach it, so no
    optimizer, checkpoint, DDP wrapper or mode switch can. `.to()`, `.cuda()`, `.half()` and the like do reach it.

    What makes it cheaper changes its features by rounding at most, and each may be combined with the others.

    Args:
        model: the network; it is switched to eval mode and its parameters stop requiring gradients.
        input_size: side lengths (height, width) in pixels, or one for both, that images are resized to before the
            network sees them; `None` keeps the size of the images. Spatial features still cover the whole image, and
            dense logits come back in the size of the images given.
        precision: `"bf16"`, `"fp16"` or `"fp32"`: autocast of the teacher alone, within or without one of the student.
            The weights stay as they are, and features come back in float32. `None` computes as its surroundings do.
        channels_last: memory format of the weights of convolutions, and so of what they compute.
        compile: run it through `torch.compile`. Taps, `module:<path>` among them, are what they were; hooks that others
            put on parts of the network are not called.
        batch: images at most that are in the network at once, which bounds its memory.
        device: where it computes, wherever images come from and its owner is moved to; features go back to the images.

    Attributes:
        precision, compiled, batch, device: as given.

    Raises:
        ValueError: an `input_size` for a detector, whose strides and boxes are in pixels of the images it sees, or for
            a denoiser, whose noise no resizing survives; a precision or a device that there is not; a batch without
            images.
    """

    def __init__(
        self,
        model: FeatureModel,
        *,
        input_size: int | tuple[int, int] | None = None,
        precision: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
        batch: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if input_size is not None and any(isinstance(part, Detector) for part in model.modules()):
            raise ValueError(
                f"input_size is not for a detector such as {model.card.name}, since its boxes would be those of the "
                "resized image: leave it null, and let data.resize set the size of images for teacher and student."
            )
        if input_size is not None and isinstance(model, Denoiser):
            raise ValueError(f"input_size is not for {model.card.name}, which finds noise: leave it null.")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"a teacher's precision must be {', '.join(PRECISIONS)} or null, not {precision!r}.")
        if batch is not None and (not isinstance(batch, int) or batch < 1):
            raise ValueError(f"a teacher's batch must be a whole number from 1 on, or null, not {batch!r}.")
        for name, value in (("channels_last", channels_last), ("compile", compile)):
            if not isinstance(value, bool):
                raise ValueError(f"a teacher's {name} must be true or false, not {value!r}.")
        model.eval().requires_grad_(False)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.precision, self.compiled, self.batch = precision, compile, batch
        self.device = None if device is None else _usable(device)
        if self.device is not None:
            model.to(self.device)
        self._held = (model,)
        # Not the call but what it calls: hooks on the model itself are none of the compiler's business.
        self._network: Callable[..., dict[str, Tensor]] = torch.compile(model.forward) if compile else model.__call__
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
        device = self.device
        self.model._apply(fn if device is None else lambda x: fn(x).to(device), recurse)  # type: ignore[no-untyped-call]
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

        Raises:
            ValueError: features that are not one for each image, so that those of parts of a batch cannot be joined.
        """
        if not taps:
            return {}
        device = images.device if self.device is None else self.device
        batch = (images,) if timesteps is None else (images, timesteps)
        # Split only where it must be: a part is a view, and no leaf that a gradient could be asked of.
        parts = [batch] if self.batch is None else zip(*(torch.split(x, self.batch) for x in batch), strict=True)
        with torch.set_grad_enabled(input_grad and torch.is_grad_enabled()), self._autocast(device):
            found = [self._features(*(x.to(device) for x in part), taps=taps) for part in parts]
            features = found[0] if len(found) == 1 else _joined(found, len(images), self.model.card.name)
            return {tap: value.to(images.device) for tap, value in features.items()}

    def _features(self, images: Tensor, *further: Tensor, taps: Collection[str]) -> dict[str, Tensor]:
        """Features of images that are on the teacher's device, all at once."""
        size = images.shape[-2:]
        if self.precision is not None:
            images = promote(images)
        seen = images if self._input_size is None else resize_map(images, self._input_size)
        features = self._network(seen, taps, *further)
        if self.precision is not None:
            features = {tap: promote(value) for tap, value in features.items()}
        if self._input_size is not None:
            features = {
                tap: resize_map(value, size) if value.dim() == 4 and value.shape[-2:] == seen.shape[-2:] else value
                for tap, value in features.items()
            }
        return features

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        dtype = PRECISIONS[self.precision]
        # A cache would hand what was cast for the teacher to a student that computes in another precision.
        return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def _joined(parts: list[dict[str, Tensor]], count: int, name: str) -> dict[str, Tensor]:
    """The features of a whole batch from those of its parts."""
    joined = {tap: torch.cat([part[tap] for part in parts]) for tap in parts[0]}
    for tap, value in joined.items():
        if value.shape[0] != count:
            raise ValueError(
                f"{tap} of {name} has {value.shape[0]} rows for {count} images: with it a teacher's batch must be null."
            )
    return joined


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"the teacher cannot be on {device} ({reason}): name a device of this machine.") from error
