# SPDX-License-Identifier: Apache-2.0
"""The detector: a feature model whose head has a loss and a decoder of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

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


class Candidates(NamedTuple):
    """All that a dense head says of images: a box for each of its N anchors, of all levels, before any is left out.

    Attributes:
        boxes: (B, N, 4), corners x1, y1, x2, y2 in pixels of the image given.
        scores: of each level (B, n, K), in [0, 1]; the n sum to N.
        quality: (B, N), in [0, 1], which the scores are multiplied by, such as FCOS' centerness; `None` without.
    """

    boxes: Tensor
    scores: tuple[Tensor, ...]
    quality: Tensor | None


@dataclass(frozen=True)
class Selection:
    """How a detector comes from candidates to what it detects.

    Attributes:
        score_threshold: scores, before they are multiplied by a quality, must be above it.
        per_level: of each level, as many of the best scores go on.
        iou_threshold: of two boxes of a class that overlap more, the one with the lower score is suppressed.
        limit: as many of the best are detected in an image.
    """

    score_threshold: float
    per_level: int
    iou_threshold: float
    limit: int


class BoxDecoder(Protocol):
    """From the outputs of a dense head to boxes in pixels, in operations that can be exported.

    Attributes:
        selection: what the detector does with the candidates.
        rates: whether they have a quality.
    """

    selection: Selection
    rates: bool

    def __call__(self, features: Features, size: tuple[int, int]) -> Candidates:
        """The candidates of a batch.

        Args:
            features: the detector's `task_taps`.
            size: height and width of the images; boxes end there.
        """


@runtime_checkable
class DenseDetector(Detector, Protocol):
    """A detector whose head may classify and regress at every position of every level."""

    def box_decoder(self) -> BoxDecoder:
        """What decodes its outputs.

        Raises:
            ValueError: its head has no such outputs, or decodes them in another way.
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
