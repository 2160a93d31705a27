# SPDX-License-Identifier: Apache-2.0
"""Augmentation: image and mask stay together."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdlvfm.data.transforms import Augmentation

PADDING = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]


def scene(height=60, width=80):
    """An image whose red is 20 times the class and whose regions are large and axis-aligned."""
    mask = torch.zeros(height, width, dtype=torch.int64)
    mask[height // 3 :, width // 4 :] = 4
    mask[height // 2 :, width // 2 :] = 9
    image = (mask * 20).to(torch.uint8).expand(3, -1, -1).contiguous()
    return image, mask


@pytest.mark.parametrize("crop", [(40, 48), (96, 64), (150, 200), None])
def test_geometry_of_image_and_mask_is_the_same(crop):
    torch.manual_seed(0)
    image, mask = scene()
    augmentation = Augmentation(scale=(0.5, 2.0), crop=crop)
    for _ in range(40):
        image_out, mask_out = augmentation(image, mask)
        assert image_out.shape == (3, *(crop or (60, 80)))
        assert mask_out.shape == image_out.shape[1:]
        assert (image_out.dtype, mask_out.dtype) == (torch.uint8, torch.int64)
        assert set(mask_out.unique().tolist()) <= {0, 4, 9, 255}
        pad = mask_out == 255
        assert (image_out == PADDING)[:, pad].all()
        # The bilinear resize blurs the edges between regions, also those just cropped off; two pixels from any edge the
        # two must agree.
        shown = mask_out.float()[None]
        highest, lowest = (F.max_pool2d(sign * shown, 5, 1, 2) * sign for sign in (1, -1))
        inside = (highest == lowest)[0] & ~pad
        inside[:2] = inside[-2:] = inside[:, :2] = inside[:, -2:] = False
        assert inside.float().mean() > 0.2 * (~pad).float().mean()
        assert ((image_out[0].long() - 20 * mask_out).abs() <= 1)[inside].all()


def test_edges_of_mask_and_image_coincide_on_average():
    """The centre of mass of a bright square moves with its mask, without a shift of a fraction of a pixel."""
    mask = torch.zeros(64, 64, dtype=torch.int64)
    mask[20:44, 20:44] = 1
    image = (mask * 255).to(torch.uint8).expand(3, -1, -1).contiguous()
    axis = torch.arange(64.0)
    torch.manual_seed(1)
    shifts = []
    augmentation = Augmentation(scale=(0.5, 0.9), flip=0.0)
    for _ in range(200):
        image_out, mask_out = augmentation(image, mask)
        inside = mask_out != 255
        weights = [(image_out[0].double() * inside).sum(0), (mask_out * inside).double().sum(0)]
        centre = [(weight * axis).sum() / weight.sum() for weight in weights]
        shifts.append(centre[1] - centre[0])
    assert abs(torch.stack(shifts).mean()) < 0.05


def test_flip_mirrors_both():
    image, mask = scene()
    image_out, mask_out = Augmentation(scale=(1, 1), flip=1.0)(image, mask)
    assert torch.equal(image_out, image.flip(-1))
    assert torch.equal(mask_out, mask.flip(-1))


def test_nothing_random_leaves_the_sample_alone():
    image, mask = scene()
    image_out, mask_out = Augmentation(scale=(1, 1), flip=0.0)(image, mask)
    assert torch.equal(image_out, image)
    assert torch.equal(mask_out, mask)


def test_colour_changes_the_image_alone():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    mask = torch.randint(0, 5, (20, 20))
    augmentation = Augmentation(scale=(1, 1), flip=0.0, brightness=0.4, contrast=0.4, saturation=0.4)
    image_out, mask_out = augmentation(image, mask)
    assert not torch.equal(image_out, image)
    assert torch.equal(mask_out, mask)


def test_unlabelled_stays_unlabelled_and_padding_is_void():
    torch.manual_seed(0)
    image, mask = scene()
    _, mask_out = Augmentation(scale=(0.5, 0.5), crop=(60, 80))(image, torch.full_like(mask, -1))
    assert mask_out.unique().tolist() == [-1, 255]
    assert (mask_out == -1).sum() == 30 * 40


def test_the_seed_decides():
    image, mask = scene()
    augmentation = Augmentation(crop=(40, 40), brightness=0.4)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(augmentation(image, mask)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (2.0, 0.5)}, r"augmentation\.scale"),
        ({"scale": (0.0, 1.0)}, r"augmentation\.scale"),
        ({"crop": (0, 10)}, r"augmentation\.crop"),
        ({"crop": (10,)}, r"augmentation\.crop"),
        ({"flip": 1.5}, r"augmentation\.flip"),
        ({"contrast": -0.1}, r"augmentation\.contrast"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)
