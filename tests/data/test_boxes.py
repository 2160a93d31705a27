# SPDX-License-Identifier: Apache-2.0
"""Image and boxes stay together."""

from __future__ import annotations

import pytest
import torch

from kdlvfm.data.box_transforms import BoxAugmentation
from kdlvfm.data.boxes import clip, cut, fitting_factor, flip, make_boxes, resize

PADDING = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]
CORNERS = [(8, 10, 28, 40), (40, 30, 76, 54)]


def scene(height=60, width=80, corners=CORNERS):
    """A black image with bright rectangles: the first red, the second green."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for label, (x1, y1, x2, y2) in enumerate(corners):
        image[label, y1:y2, x1:x2] = 255
    return image, make_boxes(corners, range(len(corners)))


def extent(image, label):
    """The smallest box around what is bright in a channel; the bilinear resize blurs an edge over a pixel or two."""
    bright = image[label] > 127
    rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def agree(sample, slack):
    image, boxes = sample
    for corners, label in zip(boxes.corners, boxes.labels.tolist(), strict=True):
        assert (extent(image, label) - corners).abs().max() <= slack


def test_areas_and_crowds_have_defaults():
    boxes = make_boxes(CORNERS, [3, 4])
    assert boxes.area.tolist() == [20 * 30, 36 * 24]
    assert boxes.iscrowd.tolist() == [False, False]
    assert len(make_boxes([], [])) == 0
    assert make_boxes([], []).corners.shape == (0, 4)


@pytest.mark.parametrize(
    ("size", "limits", "factor"),
    [
        ((480, 640), (240, 320), 0.5),
        ((480, 640), (240, 300), 300 / 640),
        ((100, 50), (100, 400), 2.0),
        ((7, 9), None, 1),
    ],
)
def test_an_image_fills_the_tighter_of_two_limits(size, limits, factor):
    assert fitting_factor(size, limits) == factor


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_resize_and_flip_move_boxes_with_the_pixels(factor):
    sample = resize(scene(), factor)
    assert sample[0].shape == (3, round(60 * factor), round(80 * factor))
    agree(sample, 1.0)
    agree(flip(sample), 1.0)
    assert type(sample[1].corners) is torch.Tensor


def test_a_cut_ends_boxes_at_its_border_and_drops_those_hardly_left():
    image, boxes = cut(scene(), 20, 20, (30, 40), least_visible=0.1)
    assert image.shape == (3, 30, 40)
    # The first keeps 8 x 20 of 20 x 30 pixels, the second 20 x 20 of 36 x 24.
    assert boxes.corners.tolist() == [[0, 0, 8, 20], [20, 10, 40, 30]]
    assert cut(scene(), 20, 20, (30, 40), least_visible=0.3)[1].labels.tolist() == [1]
    assert len(cut(scene(), 0, 28, (20, 10), least_visible=0.0)[1]) == 0


def test_clip_drops_what_is_outside():
    image, boxes = scene(corners=[])[0], make_boxes([(-3, -2, 5, 6), (70, 50, 90, 70), (79.5, 0, 90, 9)], [0, 1, 2])
    assert clip((image, boxes))[1].corners.tolist() == [[0, 0, 5, 6], [70, 50, 80, 60]]


def others(count):
    return [scene(40, 50, [(5, 5, 25, 15), (30, 20, 45, 35)])] * count


@pytest.mark.parametrize("crop", [None, (32, 40), (200, 300)])
def test_augmented_boxes_are_where_the_pixels_are(crop):
    torch.manual_seed(0)
    augmentation = BoxAugmentation(scale=(0.6, 1.8), crop=crop, least_visible=0.0)
    kept = 0
    for _ in range(40):
        image, boxes = augmentation(scene(), lambda size: 1.0, others)
        assert image.dtype == torch.uint8
        if crop is not None:
            assert image.shape[1] <= crop[0]
            assert image.shape[2] <= crop[1]
        agree((image, boxes), 2.0)
        kept += len(boxes)
    assert kept > 30


def test_a_mosaic_has_the_size_of_one_and_the_boxes_of_four():
    torch.manual_seed(0)
    augmentation = BoxAugmentation(mosaic=1.0, least_visible=0.0, flip=0.0)
    counts = []
    for _ in range(30):
        image, boxes = augmentation(scene(), lambda size: 1.0, others)
        assert image.shape == (3, 60, 80)
        counts.append(len(boxes))
        for (x1, y1, x2, y2), label in zip(boxes.corners.round().int().tolist(), boxes.labels.tolist(), strict=True):
            inside = image[label, y1:y2, x1:x2].float()
            assert inside.numel() == 0 or inside.mean() > 127 or min(inside.shape) < 3
    assert max(counts) == 8


def test_padding_is_grey_in_a_mosaic():
    torch.manual_seed(1)
    large, small = ((torch.zeros(3, side, side, dtype=torch.uint8), make_boxes([], [])) for side in (64, 8))
    large, small = ((torch.zeros(3, side, side, dtype=torch.uint8), make_boxes([], [])) for side in (64, 8))
    image, _ = BoxAugmentation(mosaic=1.0)(large, lambda size: 1.0, lambda count: [small] * count)
    grey = (image == PADDING).all(0)
    assert (image[:, ~grey] == 0).all()
    assert grey.float().mean() > 0.5


def test_one_state_of_the_generator_gives_one_sample():
    augmentation = BoxAugmentation(scale=(0.5, 2.0), crop=(40, 40), mosaic=0.5, brightness=0.4)
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append([augmentation(scene(), lambda size: 1.0, others) for _ in range(5)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1].corners, other[1].corners)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0, 1)}, "augmentation.scale"),
        ({"crop": (0, 4)}, "augmentation.crop"),
        ({"flip": 2}, "augmentation.flip"),
        ({"mosaic": -1}, "augmentation.mosaic"),
        ({"least_visible": 1.5}, "augmentation.least_visible"),
        ({"contrast": 2}, "augmentation.contrast"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BoxAugmentation(**arguments)
