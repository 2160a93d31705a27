# SPDX-License-Identifier: Apache-2.0
"""Between an encoder and a detector's head: a pyramid from a ViT's one map, or a neck fitted to a CNN's pyramid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kdlvfm.core.align import resize_map
from kdlvfm.core.features import FeatureModel


class SimpleFeaturePyramid(nn.Module):
    """Levels of several strides from one map, each of a branch of its own.

    Finer levels come from transposed convolutions, the next coarser one from max pooling, all with a 1x1 and a 3x3
    convolution after them (Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, 2022); further
    ones from convolutions of stride 2 on the level before, as in one-stage detectors.

    Args:
        dim: channels of the map.
        channels: of every level.
        stride: of the map, in pixels. One that is no power of two, such as 14, is brought to the nearest one by
            resizing the map.
        strides: of the levels, each twice the one before.
    """

    def __init__(self, dim: int, channels: int, stride: int, strides: Sequence[int]) -> None:
        super().__init__()
        base = 1 << round(math.log2(stride))
        self._scale = stride / base
        self.branches = nn.ModuleList(_branch(dim, channels, base, s) for s in strides if s <= 2 * base)
        self.coarser = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) for s in strides if s > 2 * base
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One map (B, dim, h, w), in a tuple, to the levels, from fine to coarse."""
        (x,) = maps
        x = resize_map(x, [round(side * self._scale) for side in x.shape[-2:]])
        levels = [branch(x) for branch in self.branches]
        for convolution in self.coarser:
            levels.append(convolution(levels[-1]))
        return tuple(levels)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of a map (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised map."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _branch(dim: int, channels: int, base: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while stride < base:
        layers += [] if not layers else [ChannelNorm(dim), nn.GELU()]
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
        dim, stride = dim // 2, stride * 2
    if stride > base:
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
    return nn.Sequential(
        *layers,
        nn.Conv2d(dim, channels, 1, bias=False),
        ChannelNorm(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        ChannelNorm(channels),
    )


def fit_neck(neck: Any, encoder: FeatureModel) -> tuple[Any, tuple[str, ...]]:
    """Settings of mmdet's neck, or necks, changed to read an encoder's maps.

    Returns:
        The settings, and the taps of the encoder that the neck reads, from fine to coarse.

    Raises:
        ValueError: the neck does not say which maps it reads, or the encoder has too few of them.
    """
    first, *others = neck if isinstance(neck, list) else [neck]
    if not isinstance(first, Mapping) or "in_channels" not in first:
        raise ValueError("this configuration has no neck that an encoder could feed: leave the encoder out.")
    infos = encoder.taps()
    by_stride = {info.stride: tap for tap, info in infos.items() if tap.startswith("map.") and info.stride is not None}
    several = isinstance(first["in_channels"], Sequence)
    count = len(first["in_channels"]) if several else 1
    if count > 1 and len(by_stride) == 1:
        ((stride, tap),) = by_stride.items()
        fitted = _simple_pyramid(first, count, infos[tap].dim, stride)
        taps: tuple[str, ...] = (tap,)
    else:
        if len(by_stride) < count:
            raise ValueError(
                f"the neck reads {count} maps of different stride, and {encoder.card.name} has {len(by_stride)} "
                f"(strides {', '.join(map(str, sorted(by_stride)))})."
            )
        taps = tuple(by_stride[stride] for stride in sorted(by_stride)[-count:])
        dims = [infos[tap].dim for tap in taps]
        fitted = {**first, "in_channels": dims if several else dims[0]}
    return ([fitted, *others] if others else fitted), taps


def _simple_pyramid(neck: Mapping[str, Any], count: int, dim: int, stride: int) -> dict[str, Any]:
    """Settings of a simple feature pyramid with the levels of a neck that reads maps up to stride 32."""
    if "num_outs" not in neck or "out_channels" not in neck:
        raise ValueError(f"a simple feature pyramid cannot stand in for the neck {neck['type']}: use a CNN as encoder.")
    finest = 32 >> (count - 1 - neck.get("start_level", 0))
    return {
        "type": SimpleFeaturePyramid,
        "dim": dim,
        "channels": neck["out_channels"],
        "stride": stride,
        "strides": [finest << i for i in range(neck["num_outs"])],
    }
