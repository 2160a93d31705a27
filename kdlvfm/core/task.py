# SPDX-License-Identifier: Apache-2.0
"""The task: the supervised half of training, and how its result is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from kdlvfm.core.features import FeatureModel, Features


class Metrics(Protocol):
    """What a task's metrics can do; torchmetrics collections can."""

    def update(self, predictions: Any, target: Any) -> None:
        """Add one batch."""

    def compute(self) -> Mapping[str, Any]:
        """Results of all batches since the last reset, by name."""

    def reset(self) -> None:
        """Forget all batches."""

    def to(self, device: Any) -> Any:
        """Move the state to `device`."""


class Task(ABC):
    """A supervised problem: it unpacks batches, computes the loss on ground truth and owns the metrics.

    Attributes:
        primary_metric: the metric that tables compare and selection maximises, or minimises where it is a distance.
        distances: metrics that are plain numbers, of which less is better; all others are fractions, of which more is.
        truth: what ground truth it learns from, `"masks"`, `"boxes"`, `"images"` or `"no labels"`; data must have the
            same.
        has_loss: `loss` has terms. Where it has none all teaching is the distiller's, and may leave out parts of the
            student.
    """

    primary_metric: str
    distances: tuple[str, ...] = ()
    truth: str
    has_loss: bool = True

    @abstractmethod
    def student_taps(self, student: FeatureModel) -> tuple[str, ...]:
        """Taps of a student that `loss` and `predict` read; a detector's depend on its head.

        Raises:
            ValueError: the student is none for this task.
        """

    def one_pass(self, student: FeatureModel, images: Tensor) -> dict[str, Tensor]:
        """What predictions are decoded from, once: the pass that is counted and timed as a student's cost."""
        features: dict[str, Tensor] = student(images, self.student_taps(student))
        return features

    @abstractmethod
    def solves(self, model: FeatureModel) -> bool:
        """Whether a model has a head for this task and its classes, so that its predictions can be measured."""

    @abstractmethod
    def unpack(self, batch: Any) -> tuple[Tensor, Any, Tensor]:
        """The batch as (images in [0, 1], target, index of each sample in its data set)."""

    @abstractmethod
    def loss(self, student: FeatureModel, features: Features, target: Any) -> dict[str, Tensor]:
        """Supervised terms by name. The student is given too, since a detector's loss lives in its head."""

    @abstractmethod
    def predict(self, student: FeatureModel, features: Features, target: Any) -> Any:
        """The student's features as predictions that `metrics().update` takes.

        Args:
            student: the model, since a detector's decoder lives in its head.
            features: its `student_taps` of a batch.
            target: ground truth of the batch, of which nothing but the size of each image may be used.
        """

    @abstractmethod
    def metrics(self) -> Metrics:
        """Fresh metrics."""

    def per_image(self, predictions: Any, target: Any) -> dict[str, Tensor] | None:
        """What each image of a batch adds to the metrics, whole numbers (B, ...) by name.

        Reports draw the images anew from it. `None`, the default, is for a task whose metrics are no function of sums.
        """
        del predictions, target
        return None
