# SPDX-License-Identifier: Apache-2.0
"""The denoiser: the network of a diffusion model, whose input is a noisy state and how noisy it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

from torch import Tensor

from kdlvfm.core.diffusion import Schedule
from kdlvfm.core.features import FeatureModel


class Denoiser(FeatureModel):
    """A `FeatureModel` that finds the noise in a state.

    What is diffused is a state: an image in [-1, 1], in one channel for networks that see grey. Taps besides those of
    the grammar:

    - `noise`: (B, C, H, W), the noise that is in the state;
    - `variance`: (B, C, H, W), of networks that learned it, see `Schedule.log_variance`.

    Attributes:
        schedule: the noise that it was made for.
        state_shape: (C, H, W) of its states.
    """

    schedule: Schedule
    state_shape: tuple[int, int, int]

    @property
    def step_taps(self) -> tuple[str, ...]:
        """What a step back reads: `noise` and, where it was learned, `variance`."""
        return tuple(tap for tap in ("noise", "variance") if tap in self.taps())

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] as clean states (B, C, H, W).

        Raises:
            ValueError: images of another size.
        """
        if images.shape[-2:] != self.state_shape[1:]:
            raise ValueError(
                f"{self.card.name} is for images of {self.state_shape[1:]}, not {tuple(images.shape[-2:])}."
            )
        states = 2 * images - 1
        return states.mean(1, keepdim=True) if self.state_shape[0] == 1 else states

    def decode(self, states: Tensor) -> Tensor:
        """Clean states (B, C, H, W) as images (B, 3, H, W) in [0, 1]."""
        return ((states + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    @abstractmethod
    def forward(self, images: Tensor, taps: Collection[str], timesteps: Tensor | None = None) -> dict[str, Tensor]:
        """Features, one entry for each name in `taps`.

        Args:
            images: with `timesteps`, states (B, C, H, W) as noisy as these say. Without, images (B, 3, H, W) in [0, 1]
                as for every `FeatureModel`, which are seen as the states of timestep 0.
            taps: names of the features wanted.
            timesteps: int64 (B,), from 0 on.
        """


def as_denoiser(model: FeatureModel) -> Denoiser:
    """The model itself.

    Raises:
        ValueError: it is no denoiser.
    """
    if not isinstance(model, Denoiser):
        raise ValueError(
            f"{model.card.name} is no diffusion model: choose a student that is one, such as student=diffusers_unet, "
            "and for a teacher a finished run of one (teacher=from_run teacher.run=FOLDER)."
        )
    return model
