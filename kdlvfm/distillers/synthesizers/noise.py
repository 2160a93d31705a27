# SPDX-License-Identifier: Apache-2.0
"""Noise: images without anything on them, which a method that synthesises has to beat."""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import replace

import torch

from kdlvfm.core import Step, Update
from kdlvfm.core.synthesizer import Synthesizer


class Noise(Synthesizer):
    """Pixels drawn uniformly from [0, 1], each by itself: the lower bound of a comparison.

    Example:
        >>> Noise()
        Noise()
    """

    def synthesize(self, step: Step, taps: Collection[str]) -> Generator[Update, None, Step]:
        """See `Synthesizer.synthesize`."""
        del taps
        yield from ()
        return replace(step, images=torch.rand_like(step.images))
