# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from kdlvfm.reporting.overlays import box_overlay, mask_overlay

NAMES = ("road", "sky", "a class with a long name")
PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def read(path):
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))


@pytest.mark.parametrize(("height", "width", "side"), [(20, 30, 20), (610, 605, 1), (7, 599, 2)])
def test_every_pixel_has_the_colour_of_its_class_over_the_image(tmp_path, height, width, side):
    generator = torch.Generator().manual_seed(0)
    image, mask = torch.rand(3, height, width, generator=generator), torch.randint(2, (height, width))
    path = tmp_path / "new" / "overlay.png"
    mask_overlay(image, mask, NAMES, PALETTE, path, alpha=0.25)
    picture = read(path)
    assert picture.shape[1] == width * side
    assert picture.shape[0] > height * side  # the legend
    centres = picture[side // 2 : height * side : side, side // 2 :: side].double()
    expected = 0.75 * 255 * image.permute(1, 2, 0) + 0.25 * torch.tensor(PALETTE)[mask]
    assert (centres - expected).abs().max() <= 1


def test_the_legend_shows_the_classes_that_occur(tmp_path):
    image = torch.zeros(3, 300, 600)
    for present in ([0], [0, 1], [0, 1, 2]):
        mask = torch.arange(600).mul(len(present)).div(600, rounding_mode="floor").expand(300, -1)
        mask_overlay(image, mask, NAMES, PALETTE, tmp_path / "a.png")
        legend = read(tmp_path / "a.png")[300:].reshape(-1, 3).tolist()
        assert [list(colour) in legend for colour in PALETTE] == [index in present for index in range(3)]


def test_a_legend_grows_with_names_that_find_no_room_beside_each_other(tmp_path):
    heights = []
    for length in (3, 30, 60):
        names = [letter * length for letter in "abcdef"]
        mask_overlay(
            torch.zeros(3, 10, 700),
            torch.arange(700).remainder(6).expand(10, -1),
            names,
            PALETTE * 2,
            tmp_path / "a.png",
        )
        heights.append(read(tmp_path / "a.png").shape[0])
    assert heights[0] < heights[1] < heights[2]


def test_boxes_are_drawn_where_they_are(tmp_path):
    objects = {
        "boxes": torch.tensor([[100.0, 100.0, 300.0, 200.0], [400.0, 0.0, 640.0, 480.0]]),
        "labels": torch.tensor([0, 2]),
        "scores": torch.tensor([0.9, 0.5]),
    }
    box_overlay(torch.full((3, 480, 640), 0.5), objects, NAMES, PALETTE, tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    assert picture.shape == (480, 640, 3)
    for y, x, colour in ((150, 100, 0), (150, 300, 0), (200, 200, 0), (240, 400, 2)):
        assert picture[y, x].tolist() == list(PALETTE[colour])
    for y, x in ((150, 200), (300, 300), (240, 500)):
        assert (picture[y, x].float() - 127.5).abs().max() <= 1


def test_labels_stay_inside_the_picture(tmp_path):
    """One at the top stands inside its box, one at the right ends where its box ends."""
    image = torch.zeros(3, 480, 640)
    corners = {"top": [10.0, -2.0, 200.0, 100.0], "right": [600.0, 200.0, 639.0, 300.0]}
    for corner in corners.values():
        objects = {"boxes": torch.tensor([corner]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
        box_overlay(image, objects, NAMES, PALETTE, tmp_path / "a.png")
        written = (read(tmp_path / "a.png") > 240).all(dim=-1).nonzero()  # its letters are white on blue
        assert len(written) > 50
        assert written.min() > 0
        assert written[:, 1].max() < 639


def test_an_image_without_boxes_is_the_image(tmp_path):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    image = torch.rand(3, 11, 700)
    box_overlay(image, nothing, NAMES, PALETTE, tmp_path / "a.png")
    assert (read(tmp_path / "a.png").double() - 255 * image.permute(1, 2, 0)).abs().max() <= 1
