# SPDX-License-Identifier: Apache-2.0
"""A light dense head on any encoder: the teacher's head, linear students, and the pre-training of a ViT."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core.align import resize_map
from kdlvfm.core.features import FeatureModel, Features, TapInfo, resolve_tap
from kdlvfm.models.adapter import Adapter

_DENSE = frozenset({"decoder", "logits"})


class LinearHead(nn.Module):
    """Batch norm, whose output is the `decoder` tap, and a 1x1 convolution."""

    upsampling = 1

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.BatchNorm2d(dim)
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim, h, w) to the map that the classifier reads, and logits (B, K, h, w)."""
        decoder = self.norm(x)
        return decoder, self.classifier(decoder)


class PyramidHead(nn.Module):
    """A 1x1 reduction, two upsamplings by 2 with a 3x3 convolution each, and the sum of the three levels."""

    upsampling = 4

    def __init__(self, dim: int, num_classes: int, channels: int) -> None:
        super().__init__()
        self.dim = channels
        self.reduce = _block(dim, channels, 1)
        self.refine = nn.ModuleList(_block(channels, channels, 3) for _ in range(2))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim, h, w) to the map that the classifier reads, and logits (B, K, 4h, 4w)."""
        levels = [self.reduce(x)]
        for refine in self.refine:
            levels.append(refine(F.interpolate(levels[-1], scale_factor=2, mode="bilinear")))
        decoder = torch.stack([resize_map(level, levels[-1].shape[-2:]) for level in levels]).sum(dim=0)
        return decoder, self.classifier(decoder)


def _block(dim: int, channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, channels, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


class EncoderHead(Adapter):
    """An encoder and a head that labels every pixel. Taps: all of the encoder's, then `decoder` and dense `logits`.

    `net` holds the two as `encoder` and `head`. The head's input is taken to cover the whole image, as maps of an
    encoder with `fit="resize"` do.

    Args:
        encoder: any `FeatureModel` with the map that the head reads.
        num_classes: channels of `logits`.
        head: `"linear"` or `"pyramid"`, which ends at a quarter of the map's stride.
        tap: the map that the head reads; the last one by default.
        freeze: keep the encoder as it is: its parameters take no gradient and it stays in eval mode, so that the
            statistics of its batch norms are untouched.
        channels: width of the pyramid head.

    Raises:
        TapError: the encoder has no such tap.
        ValueError: the tap is not a map, or its stride is too small for a pyramid.
    """

    head_taps = ("decoder",)

    def __init__(
        self,
        encoder: FeatureModel,
        num_classes: int,
        head: Literal["linear", "pyramid"] = "linear",
        tap: str = "map.-1",
        freeze: bool = True,
        channels: int = 128,
    ) -> None:
        super().__init__()
        self._tap, source = resolve_tap(tap, encoder.taps(), encoder.card.name)
        if not self._tap.startswith("map.") or source.stride is None:
            raise ValueError(f"the head reads a map, which {tap!r} is not: choose one of map.<i>.")
        dense: LinearHead | PyramidHead
        if head == "linear":
            dense = LinearHead(source.dim, num_classes)
        elif head == "pyramid":
            dense = PyramidHead(source.dim, num_classes, channels)
        else:
            raise ValueError(f"head must be 'linear' or 'pyramid', not {head!r}.")
        if source.stride % dense.upsampling:
            raise ValueError(f"a {head} head upsamples by {dense.upsampling}, and {tap} has stride {source.stride}.")
        self.net = nn.ModuleDict({"encoder": encoder, "head": dense})
        self.card = replace(encoder.card, name=f"{encoder.card.name}-{head}")
        self._taps = {
            **{name: info for name, info in encoder.taps().items() if name not in _DENSE},
            "decoder": TapInfo(dense.dim, source.stride // dense.upsampling),
            "logits": TapInfo(num_classes, 1),
        }
        self._freeze = freeze
        if freeze:
            encoder.requires_grad_(False).eval()

    @property
    def encoder(self) -> FeatureModel:
        """The encoder given."""
        encoder = self.net.get_submodule("encoder")
        assert isinstance(encoder, FeatureModel)
        return encoder

    def taps(self) -> dict[str, TapInfo]:
        """Every portable tap with its facts."""
        return dict(self._taps)

    def train(self, mode: bool = True) -> Self:
        """Training mode for the head, and for the encoder unless it is frozen."""
        super().train(mode)
        if self._freeze:
            self.encoder.eval()
        return self

    def features(self, images: Tensor, taps: frozenset[str], *, complete: bool) -> dict[str, Tensor]:
        """See `Adapter.features`; the head runs only where it is needed."""
        labels = complete or not taps.isdisjoint(_DENSE)
        found = self.encoder(images, (taps - _DENSE) | ({self._tap} if labels else set()))
        if labels:
            found["decoder"], logits = self.net.get_submodule("head")(found[self._tap])
            found["logits"] = resize_map(logits, images.shape[-2:])
        return dict(found)

    def apply_head(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """See `FeatureModel.apply_head`: the classifier alone, on a map of the tap `decoder`."""
        return {"logits": resize_map(self.net.get_submodule("head.classifier")(features["decoder"]), size)}
