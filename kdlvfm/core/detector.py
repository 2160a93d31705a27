# SPDX-License-Identifier: Apache-2.0
"""The detector: a feature model whose head has a loss and a decoder of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from kdlvfm.core.features import FeatureModel, Features, level_taps


@runtime_checkable
class Detector(Protocol):
    """What a `FeatureModel` that detects can do besides.

    Attributes:
        num_classes: K, the classes of its head.
        task_taps: taps that `loss` and `predict` read.
    """

    num_classes: int
    task_taps: tuple[str, ...]

    def loss(self, features: Features, target: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Supervised terms by name, each a scalar, on features already computed.

        Args:
            features: the `task_taps` of a batch.
            target: for each image `"boxes"`, float (n, 4), corners x1, y1, x2, y2 in pixels of the image given;
                `"labels"`, int64 (n,), classes 0..K-1; `"size"`, int64 (2,), height and width of the part that is no
                padding.
        """

    def predict(self, features: Features, sizes: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """For each image `"boxes"` (m, 4), as in the target, `"scores"` (m,) in [0, 1] and `"labels"` (m,).

        Args:
            features: the `task_taps` of a batch.
            sizes: for each image, int64 (2,), height and width of the part that is no padding; boxes end there.
        """


def boxes_per_position(model: FeatureModel, num_classes: int) -> int:
    """How many boxes a head with the taps `cls.<i>` predicts at every position.

    Args:
        model: a detector.
        num_classes: classes of a model that does not state its own.

    Raises:
        TapError: it has no such taps.
    """
    classes = model.num_classes if isinstance(model, Detector) else num_classes
    return max(model.tap_info(level_taps(model, "cls")[0]).dim // classes, 1)
