# SPDX-License-Identifier: Apache-2.0
"""The no-distillation baseline: the student alone, under the same recipe as every method."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdlvfm.core import Distiller, Features


class Baseline(Distiller):
    """A distiller without terms. It taps nothing, so no teacher is needed and none is run.

    Example:
        >>> Baseline()({}, {})
        {}
    """

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """No terms."""
        del student, teacher, target
        return {}
