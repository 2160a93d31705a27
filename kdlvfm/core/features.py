# SPDX-License-Identifier: Apache-2.0
"""Features, the taps that name them, and the one protocol that teachers and students share."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Features = Mapping[str, Tensor]
"""Tap name -> tensor, as returned by `FeatureModel.forward`."""


@dataclass(frozen=True)
class TapInfo:
    """What a tap yields: its channels and its stride in input pixels (`None` if it is not spatial)."""

    dim: int
    stride: int | None


@dataclass(frozen=True)
class ModelCard:
    """Where a model's weights come from; copied into every run record.

    Attributes:
        name: architecture and weights, as its library names them.
        weights: `"pretrained"` (hub), `"file"` or `"random"`.
        licence: licence of the weights as their library states it; `None` if unknown.
        sha256: checksum of the weights file, or of the weights themselves where no file is at hand.
        source: hub address or file path the weights were read from.
    """

    name: str
    weights: str
    licence: str | None = None
    sha256: str | None = None
    source: str | None = None


class TapError(ValueError):
    """A tap that the model does not have."""


class FeatureModel(nn.Module, ABC):
    """A network that yields named features. Teachers and students both speak this protocol.

    Images are (B, 3, H, W) in [0, 1] and of any size: the model normalises them with its own statistics and pads or
    resizes to its own patch multiple. What it returns is in the geometry of the images it was given: a `map.<i>` covers
    the whole image, and `logits` of a dense model have the size of the image.

    The tap grammar, the same for every library:

    - `logits`: (B, K) or, for dense models, (B, K, H, W);
    - `logits_distilled`: (B, K), of the distillation token of a vision transformer that has one;
    - `pooled`: (B, D), the embedding before a classifier;
    - `tokens`: (B, N, D), patch tokens in row-major order, without class and register tokens;
    - `map.<i>`: (B, C, H', W'), entry i of the encoder's feature pyramid; negative i counts from the last;
    - `decoder`: (B, C, H', W'), the map that a dense model's final classifier reads;
    - `fpn.<i>`, `cls.<i>` and `reg.<i>`: (B, C, H', W') of a detector at level i of its pyramid, the finest first: the
      map, the class scores before the sigmoid and the boxes, for GFL the distributions of their four sides;
    - `cls_mid.<i>` and `reg_mid.<i>`: (B, C, H', W'), inside a detector's head, see `kdlvfm.core.split_head.SplitHead`;
    - `noise` and `variance`: (B, C, H, W) of a diffusion model, see `kdlvfm.core.denoiser.Denoiser`;
    - `module:<path>`: the output of any sub-module of `net`, read with a hook. Not portable between libraries.

    Attributes:
        card: where the weights come from.
        net: the library's own network; its `state_dict()` is what leaves the house and loads into the library again.
        head_taps: what the model's head reads, and `apply_head` takes; empty for a model without a head.
    """

    card: ModelCard
    net: nn.Module
    head_taps: tuple[str, ...] = ()

    @abstractmethod
    def taps(self) -> dict[str, TapInfo]:
        """Every tap with a portable name, with its facts, in the order of the network."""

    def tap_info(self, tap: str) -> TapInfo:
        """Facts about `tap`, without a forward pass.

        Raises:
            TapError: the model has no such tap; the message names the nearest ones.
        """
        return resolve_tap(tap, self.taps(), self.card.name)[1]

    def check_tap(self, tap: str) -> None:
        """Raise `TapError` if there is no such tap. A tap without stated facts, `module:<path>`, may exist."""
        self.tap_info(tap)

    @abstractmethod
    def forward(self, images: Tensor, taps: Collection[str]) -> dict[str, Tensor]:
        """Features of `images` (B, 3, H, W) in [0, 1], one entry for each name in `taps`, keyed as asked."""

    def apply_head(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """What the head makes of features that need not be the model's own, such as a teacher's brought to its width.

        Args:
            features: the `head_taps`, with the channels that `tap_info` states. Maps cover the whole image and may be
                of any size: the head resizes them to the grid that it reads.
            size: height and width of the images.

        Returns:
            What a task reads, as `forward` would give it: `logits` (B, K, height, width) of a dense model.

        Raises:
            TapError: the model has no head.
        """
        del features, size
        raise TapError(f"{self.card.name} has no head that could read features of other networks.")


def resolve_tap(tap: str, available: Mapping[str, TapInfo], model: str) -> tuple[str, TapInfo]:
    """The canonical name (negative map indices made positive) and the facts of `tap`.

    Raises:
        TapError: no such tap among `available`.
    """
    name = tap
    if tap.startswith("map.-"):
        pyramid = [known for known in available if known.startswith("map.")]
        index = tap.removeprefix("map.")
        if index[1:].isdigit() and 0 < -int(index) <= len(pyramid):
            name = pyramid[int(index)]
    if name in available:
        return name, available[name]
    if tap == "logits":
        raise TapError(
            f"{model} has no classes, so no tap 'logits'. Logit methods need a teacher with a head: train one "
            "(distiller=none on the frozen encoder) and pass teacher=from_run, or use CLIP's zero-shot logits "
            "(teacher=clip_zeroshot_vitb16)."
        )
    near = difflib.get_close_matches(tap, available, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise TapError(f"{model} has no tap {tap!r}.{hint} It has: {', '.join(available)}.")


def level_taps(model: FeatureModel, kind: str) -> tuple[str, ...]:
    """Names of the taps `<kind>.<i>` at all levels of a detector's pyramid, the finest first.

    Args:
        model: a detector.
        kind: `"fpn"`, `"cls"`, `"reg"`, `"cls_mid"` or `"reg_mid"`.

    Raises:
        TapError: the model has no such taps.
    """
    found = tuple(tap for tap in model.taps() if tap.rpartition(".")[0] == kind)
    if not found:
        raise TapError(
            f"{model.card.name} has no taps '{kind}.<i>', which detectors such as GFL have. It has: "
            f"{', '.join(model.taps())}."
        )
    return found
