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
        student_taps: taps of the student that `loss` and `predict` read.
        primary_metric: the metric that tables compare and selection maximises.
    """

    student_taps: tuple[str, ...]
    primary_metric: str

    @abstractmethod
    def unpack(self, batch: Any) -> tuple[Tensor, Any, Tensor]:
        """The batch as (images in [0, 1], target, index of each sample in its data set)."""

    @abstractmethod
    def loss(self, student: FeatureModel, features: Features, target: Any) -> dict[str, Tensor]:
        """Supervised terms by name. The student is given too, since a detector's loss lives in its head."""

    @abstractmethod
    def predict(self, features: Features) -> Any:
        """The student's features as predictions that `metrics().update` takes."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """Fresh metrics."""
