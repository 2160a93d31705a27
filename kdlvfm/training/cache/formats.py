# SPDX-License-Identifier: Apache-2.0
"""How the features of one tap become bytes, and features again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self

if TYPE_CHECKING:
    from kdlvfm.training.cache.projection import Projection

DTYPES = ("fp32", "fp16", "int8")

BOUNDS = {
    "fp32": "none",
    "fp16": "2^-11 of a value, or 2^-25 where that is more",
    "int8": "1/254 of the largest value of the channel in the image",
}
"""How far a stored value can be from the teacher's, before it is rounded to the dtype in which the teacher gives it."""

LEAST_COSINE = {"fp32": 0.999, "fp16": 0.999, "int8": 0.99}
"""What the features of an image must have in common, stored and computed anew, perhaps on another machine."""

_STORED = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
_LIVE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SCALE_BYTES = 4


class CacheError(ValueError):
    """A cache that cannot be made, read or used for this run; the message names the cause and the fix."""


@dataclass(frozen=True)
class TapFormat:
    """The form in which the features of a tap are stored, an image a row.

    `int8` has one scale for each channel of each image, the largest of its absolute values over 127. Features without
    positions, (B, D), which would be all scales, are stored in fp16 instead; they are small.

    With `pca`, coefficients of so many principal components take the place of the channels. Features without positions,
    and those with no more channels than that, are stored as they are.

    Attributes:
        tap: whose features they are.
        dtype: what was asked for: `"fp32"` (no loss), `"fp16"` or `"int8"`.
        shape: of one image's features.
        order: the dimensions of `shape` from the outermost to the innermost in memory. What is read has the strides of
            what the teacher gave: networks sum in an order that depends on them.
        live: the dtype in which the teacher gives them.
        pca: the number of principal components that was asked for, if any.
        projection: on these components; `None` also before it is fitted.
    """

    tap: str
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    live: str
    pca: int | None = None
    projection: Projection | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, tap: str, features: Tensor, dtype: str, pca: int | None = None) -> Self:
        """The format for features (B, ...) that a teacher gave.

        Raises:
            CacheError: they are of a dtype that is not stored, or none for each image.
        """
        live = str(features.dtype).removeprefix("torch.")
        if live not in _LIVE or features.dim() < 2:
            raise CacheError(
                f"the teacher gives {live} {tuple(features.shape)} at {tap}, which cannot be cached: floats are, with "
                "the batch as their first dimension."
            )
        strides = features.stride()[1:]
        order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
        return cls(tap, dtype, tuple(features.shape[1:]), tuple(order), live, pca)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Self:
        """The format that `plain` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        pca = plain.get("pca")
        shape, order = tuple(plain["shape"]), tuple(plain["order"])
        found = cls(str(plain["tap"]), plain["dtype"], shape, order, str(plain["live"]), pca)
        whole = pca is None or (isinstance(pca, int) and pca > 0)
        if found.dtype not in DTYPES or found.live not in _LIVE or sorted(order) != [*range(len(shape))] or not whole:
            raise ValueError(f"{plain} is no format of a tap")
        return found

    def plain(self) -> dict[str, Any]:
        """What a JSON file can hold."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.compare}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}

    def with_projection(self, projection: Projection) -> Self:
        """The same format, able to encode and decode."""
        return replace(self, projection=projection)

    @property
    def key(self) -> tuple[str, str, int | None]:
        """What tells it from other formats of a cache: tap, dtype and number of components, as they were asked for."""
        return self.tap, self.dtype, self.pca

    @property
    def stored(self) -> str:
        """The dtype in which values are stored: fp16 instead of int8 for features without positions."""
        return "fp16" if self.dtype == "int8" and len(self.shape) == 1 else self.dtype

    @property
    def label(self) -> str:
        """How values are stored, for people."""
        return f"{self.stored} pca{self.pca}" if self.projected else self.stored

    @property
    def row_bytes(self) -> int:
        """Bytes of an image's features."""
        scales = _SCALE_BYTES * self.components if self.stored == "int8" else 0
        return self.positions * self.components * _STORED[self.stored].itemsize + scales

    @property
    def channel(self) -> int:
        """The dimension of channels: the last of tokens (N, D), the first of maps (C, H, W)."""
        return 1 if len(self.shape) == 2 else 0

    @property
    def projected(self) -> bool:
        """Whether coefficients of principal components are stored, not channels."""
        return self.pca is not None and len(self.shape) > 1 and self.pca < self.shape[self.channel]

    @property
    def components(self) -> int:
        """How many numbers a position has where it is stored."""
        return self.pca if self.pca is not None and self.projected else self.shape[self.channel]

    @property
    def positions(self) -> int:
        """Of an image."""
        return math.prod(self.shape) // self.shape[self.channel]

    def kept(self, features: Tensor) -> Tensor:
        """What of features (B, ...) is to be stored: all, or what lies in the subspace of the principal components."""
        basis = self._basis
        return basis.restore(basis.reduce(features, self.channel), self.channel) if basis else features

    @property
    def _basis(self) -> Projection | None:
        if self.projected and self.projection is None:
            raise ValueError(f"{self.tap}: the principal components are not fitted yet")
        return self.projection

    def encode(self, features: Tensor) -> Tensor:
        """Features (B, ...) as uint8 (B, row_bytes).

        Raises:
            CacheError: a value is not finite, or too large for fp16.
        """
        basis, reduced = self._basis, features.detach()
        if basis is not None:
            reduced = basis.reduce(reduced, self.channel)
        count, values = len(features), reduced.permute(0, *(dim + 1 for dim in self.order))
        if self.stored == "int8":
            axis = self.order.index(self.channel) + 1
            others = [dim for dim in range(1, values.dim()) if dim != axis]
            scales = values.float().abs().amax(others, keepdim=True) / 127
            whole = (values.float() / scales.where(scales > 0, 1)).round()
            finite, parts = scales, [whole.to(torch.int8), scales]
        else:
            finite = values.to(_STORED[self.stored])
            parts = [finite]
        if not finite.isfinite().all():
            largest = reduced.abs().max().item()
            cure = "store fp32" if math.isfinite(largest) else "the teacher itself gives it"
            raise CacheError(f"{self.tap} has a value of {largest:.4g}, which {self.stored} does not hold: {cure}.")
        return torch.cat([part.reshape(count, -1).view(torch.uint8) for part in parts], dim=1)

    def decode(self, stored: Tensor) -> Tensor:
        """Features (B, ...), in dtype and strides as the teacher gives them, of uint8 (B, row_bytes)."""
        physical = [self.components if dim == self.channel else self.shape[dim] for dim in self.order]
        if self.stored == "int8":
            split = math.prod(physical)
            axis = self.order.index(self.channel)
            scales = stored[:, split:].contiguous().view(torch.float32)
            spread = [-1 if dim == axis else 1 for dim in range(len(physical))]
            whole = stored[:, :split].contiguous().view(torch.int8).view(-1, *physical)
            values = whole.float() * scales.view(len(stored), *spread)
        else:
            values = stored.contiguous().view(_STORED[self.stored]).view(-1, *physical)
        back = [0, *(self.order.index(dim) + 1 for dim in range(len(physical)))]
        basis = self._basis
        if basis is not None:
            restored = basis.restore(values.permute(back), self.channel)
            values = restored.permute(0, *(dim + 1 for dim in self.order)).contiguous()
        return values.to(_LIVE[self.live]).permute(back)


def likeness(first: Tensor, second: Tensor) -> Tensor:
    """Cosine (B,) of the features of each image, all positions and channels as one vector; 1 where both are 0."""
    a, b = (x.flatten(1).double() for x in (first, second))
    lengths = a.norm(dim=1) * b.norm(dim=1)
    same = (a == b).all(dim=1)
    return torch.where(same, 1.0, (a * b).sum(1) / lengths.clamp(min=1e-300))


def measured_error(features: Tensor, decoded: Tensor) -> dict[str, float]:
    """What storing did to features (B, ...): the lowest cosine of an image, and the rms error as a share of the rms."""
    a, b = features.double(), decoded.double()
    relative = (b - a).square().mean().sqrt() / a.square().mean().sqrt().clamp(min=1e-300)
    return {"cosine": float(likeness(features, decoded).min()), "relative_rms": float(relative)}
