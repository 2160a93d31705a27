# SPDX-License-Identifier: Apache-2.0
import torch

from kdlvfm.models.geometry import crop_to_image


def test_the_part_over_the_image_is_kept():
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    assert torch.equal(crop_to_image(x, (9, 17), 4), x[..., :3, :5])


def test_a_map_with_nothing_to_crop_is_returned_itself():
    x = torch.rand(1, 2, 4, 6)
    assert crop_to_image(x, (16, 24), 4) is x
    assert crop_to_image(x, (13, 21), 4) is x
