# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from kdlvfm.models.geometry import crop_to_image
from kdlvfm.models.smp import SMPModel


def test_the_part_over_the_image_is_kept():
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    assert torch.equal(crop_to_image(x, (9, 17), 4), x[..., :3, :5])


def test_a_map_with_nothing_to_crop_is_returned_itself():
    x = torch.rand(1, 2, 4, 6)
    assert crop_to_image(x, (16, 24), 4) is x
    assert crop_to_image(x, (13, 21), 4) is x


@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_the_logits_of_a_padded_network_depend_on_its_last_map_as_handed_out(size):
    features = SMPModel("resnet18", "fpn", num_classes=3, pretrained=False)(
        torch.rand(2, 3, *size), ["logits", "map.-1"]
    )
    (gradient,) = torch.autograd.grad(features["logits"].square().mean(), features["map.-1"])
    assert (gradient != 0).any()
