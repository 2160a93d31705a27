# SPDX-License-Identifier: Apache-2.0
"""The synthesiser: where images come from in a run that sees no data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator
from typing import Any

from torch import nn

from kdlvfm.core.distiller import Context, Step, Update

GROUP = "synthesizer"
"""The group of what a synthesiser trains with optimizer steps of the run."""


class Synthesizer(nn.Module, ABC):
    """A source of images that needs no data. Its trainable parameters, if it has any, are the group `synthesizer`."""

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Synthesizer:
        """Build inside a run. Override where the networks or the size of images must be known."""
        del context
        return cls(**hparams)

    @abstractmethod
    def synthesize(self, step: Step, taps: Collection[str]) -> Generator[Update, None, Step]:
        """One batch of images, and an `Update` for each optimizer step that the synthesiser takes for it.

        Args:
            step: without data: its images are blank and say no more than how many there are, their size and their
                device.
            taps: of the teacher, which are going to be read of the images. A synthesiser that shows the images to the
                teacher itself asks for these as well and hands them on in `seen`, so that one pass serves both.

        Returns:
            The step with images (B, 3, H, W) in [0, 1], which carry no gradient.
        """
