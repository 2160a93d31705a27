# SPDX-License-Identifier: Apache-2.0
"""Principal components of a teacher's channels, fitted to training images, so that a cache holds fewer numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import Self

from kdlvfm.training.cache.formats import CacheError, TapFormat

if TYPE_CHECKING:
    from kdlvfm.training.cache.source import FeatureSource, Key


@dataclass(frozen=True, eq=False)
class Projection:
    """The affine subspace in which features are stored.

    Attributes:
        mean: float32 (C,).
        components: float32 (K, C), orthonormal, the one with the largest variance first.
        variance: the share of the variance that they keep, in (0, 1].
    """

    mean: Tensor
    components: Tensor
    variance: float
    _placed: dict[torch.device, Projection] = field(default_factory=dict, repr=False)

    def reduce(self, features: Tensor, channel: int) -> Tensor:
        """Coefficients, float32, of features (B, ...) whose channels are dimension `channel` of an image's."""
        own = self._on(features.device)
        with torch.autocast(features.device.type, enabled=False):
            centred = features.float().movedim(channel + 1, -1) - own.mean
            return (centred @ own.components.T).movedim(-1, channel + 1)

    def restore(self, coefficients: Tensor, channel: int) -> Tensor:
        """Features, float32, of coefficients (B, ...), as `reduce` gives them."""
        own = self._on(coefficients.device)
        with torch.autocast(coefficients.device.type, enabled=False):
            return (coefficients.float().movedim(channel + 1, -1) @ own.components + own.mean).movedim(-1, channel + 1)

    def tensors(self) -> dict[str, Tensor]:
        """What a safetensors file can hold."""
        return {"mean": self.mean, "components": self.components, "variance": torch.tensor(self.variance)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], format: TapFormat) -> Self:
        """The projection that gave `tensors`.

        Raises:
            KeyError, ValueError: they are none, or none for this format.
        """
        mean, components, variance = (tensors[name] for name in ("mean", "components", "variance"))
        channels = format.shape[format.channel]
        if tuple(mean.shape) != (channels,) or tuple(components.shape) != (format.components, channels):
            raise ValueError(f"components {tuple(components.shape)} do not fit features {format.shape}")
        return cls(mean.float(), components.float(), float(variance))

    def _on(self, device: torch.device) -> Projection:
        """The projection with its tensors on a device, to which they are brought once."""
        if device == self.mean.device:
            return self
        if device not in self._placed:
            self._placed[device] = Projection(self.mean.to(device), self.components.to(device), self.variance)
        return self._placed[device]


class Moments:
    """Count, mean and covariance of vectors that come batch by batch, in double precision.

    Args:
        channels: of a vector.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._scatter = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Take in vectors (N, C).

        Each batch is centred on its own mean, and the means are accounted for afterwards (Chan, Golub and LeVeque
        1983), since a difference of large sums would lose what small components are.
        """
        vectors = vectors.detach().double().cpu()
        mean = vectors.mean(0)
        centred, shift = vectors - mean, mean - self.mean
        total = self.count + len(vectors)
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(vectors) / total)
        self.mean += shift * (len(vectors) / total)
        self.count = total

    def project(self, components: int) -> Projection:
        """The projection onto the components with the largest variance.

        Raises:
            CacheError: values that are not finite.
        """
        if not self._scatter.isfinite().all():
            raise CacheError("the teacher gives features that are not finite: no principal components fit them.")
        variances, vectors = torch.linalg.eigh(self._scatter / self.count)
        variances, basis = variances.flip(0).clamp(min=0), vectors.flip(1).T[:components]
        # An eigenvector is one but for its sign; the largest entry decides, so that the files of two machines agree.
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        total = variances.sum()
        kept = float(variances[:components].sum() / total) if total > 0 else 1.0
        return Projection(self.mean.float(), (basis * largest.sign()).float().contiguous(), kept)


def check_fit(format: TapFormat, images: int) -> None:
    """Raise `CacheError` where some images have too few positions to determine the components that are asked for."""
    if format.projected and images * format.positions <= format.components:
        raise CacheError(
            f"{images} images with {format.positions} positions each at {format.tap} do not determine "
            f"{format.components} principal components: set teacher_cache.pca to fewer, or to null."
        )


def fit(source: FeatureSource, formats: Sequence[TapFormat], keys: Sequence[Key]) -> dict[TapFormat, Projection]:
    """Fit the projections of taps, in one pass over some training images.

    Args:
        source: of the features.
        formats: of the taps, all of them `projected`.
        keys: view and sample of the images.

    Raises:
        CacheError: features that are not finite.
    """
    moments = {format: Moments(format.shape[format.channel]) for format in formats}
    for drawn in source.draw(keys):
        features = source.features(drawn.images, [format.tap for format in formats])
        for format, found in moments.items():
            found.add(_vectors(features[format.tap][: len(drawn.keys)], format))
    return {format: found.project(format.components) for format, found in moments.items()}


def _vectors(features: Tensor, format: TapFormat) -> Tensor:
    """Features (B, ...) as one vector (C,) for each position of each image."""
    return features.movedim(format.channel + 1, -1).flatten(0, -2)
