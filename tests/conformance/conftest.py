# SPDX-License-Identifier: Apache-2.0
"""A diffusion model that learns from another one, as small as the toys for masks and boxes."""

import pytest
import torch

from kdlvfm.core import Teacher


def unet(seed, width):
    from kdlvfm.models.diffusers import UNet

    torch.manual_seed(seed)
    return UNet(10, size=8, channels=1, widths=(width,), norm_groups=4, steps=6)


@pytest.fixture
def denoiser():
    """A student."""
    return unet(1, 4)


@pytest.fixture
def denoiser_teacher():
    return Teacher(unet(2, 8))


@pytest.fixture
def diffusion_task():
    from kdlvfm.models.digit_classifier import DigitClassifier
    from kdlvfm.tasks.diffusion import Diffusion

    return Diffusion(10, size=8, judge=Teacher(DigitClassifier(pretrained=False)), sampling_steps=3)


@pytest.fixture
def diffusion_batch():
    return {"image": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)), "index": torch.arange(4)}
