# SPDX-License-Identifier: Apache-2.0
"""Between images and states, and what is no denoiser."""

import pytest
import torch

from kdlvfm.core import Denoiser, ModelCard, TapInfo, Teacher
from kdlvfm.core.denoiser import as_denoiser
from kdlvfm.core.diffusion import Schedule


class Still(Denoiser):
    """Finds that everything is noise."""

    def __init__(self, channels=1):
        super().__init__()
        self.card, self.state_shape = ModelCard("still", "random"), (channels, 4, 4)
        self.schedule = Schedule.named("cosine", 5)

    def taps(self):
        return {"noise": TapInfo(self.state_shape[0], 1)}

    def forward(self, images, taps, timesteps=None):
        return {tap: images if timesteps is None else images + timesteps.view(-1, 1, 1, 1) for tap in taps}


@pytest.mark.parametrize("channels", [1, 3])
def test_states_lie_between_minus_one_and_one_and_come_back_as_images(channels):
    model, grey = Still(channels), torch.rand(2, 1, 4, 4).expand(-1, 3, -1, -1)
    states = model.encode(grey)
    assert states.shape == (2, channels, 4, 4)
    torch.testing.assert_close(states[:, 0], 2 * grey[:, 0] - 1)
    torch.testing.assert_close(model.decode(states), grey)
    assert model.decode(3 * torch.ones(1, channels, 4, 4)).unique().tolist() == [1.0]


def test_colours_of_a_grey_network_are_averaged():
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(Still().encode(image), torch.zeros(1, 1, 4, 4))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"still is for images of \(4, 4\), not \(8, 8\)"):
        Still().encode(torch.rand(1, 3, 8, 8))


def test_a_teacher_hands_timesteps_on():
    teacher, states = Teacher(Still()), torch.rand(2, 1, 4, 4)
    assert torch.equal(teacher(states, ["noise"])["noise"], states)
    later = teacher(states, ["noise"], timesteps=torch.tensor([0, 3]))["noise"]
    assert torch.equal(later - states, (later - states).round())
    assert torch.equal(later[0], states[0])


def test_states_are_not_resized_for_a_teacher():
    with pytest.raises(ValueError, match="input_size is not for still"):
        Teacher(Still(), input_size=8)


def test_what_is_no_denoiser_is_named(student):
    assert as_denoiser(still := Still()) is still
    with pytest.raises(ValueError, match="toy is no diffusion model: choose"):
        as_denoiser(student)
