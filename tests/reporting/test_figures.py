# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from kdlvfm.reporting.figures import above, box_grid, mask_grid, scene_hits, scene_miou

NAMES = ("background", "zero", "one")
PALETTE = ((0, 0, 0), (255, 0, 0), (0, 0, 255))


def read(path):
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))


@pytest.fixture
def scenes():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (2, 8, 12), generator=generator)
    return torch.rand(2, 3, 8, 12, generator=generator), truth


def test_every_pixel_becomes_an_equal_square_of_its_colour(tmp_path, scenes):
    images, truth = scenes
    truth[0, 0] = 255
    truth[0, 1] = -1
    path = tmp_path / "new" / "predictions.png"
    mask_grid(images, truth, {"teacher": truth.clamp(0, 2), "kd": 2 - truth.clamp(0, 2)}, NAMES, PALETTE, path)
    picture = read(path)
    side, left, top = 25, 10 + 310, 48
    centres = picture[top + side // 2 :: side, left + side // 2 :: side][:8, :12]
    colours = torch.tensor([*PALETTE, (196, 196, 196)], dtype=torch.uint8)
    assert torch.equal(centres, colours[truth[0].masked_fill((truth[0] == 255) | (truth[0] == -1), 3)])


def test_size_follows_from_the_number_of_scenes_and_methods(tmp_path, scenes):
    images, truth = scenes
    sizes = []
    for count, predictions in ((1, {}), (2, {}), (2, {"kd": truth})):
        chosen = {title: mask[:count] for title, mask in predictions.items()}
        mask_grid(images[:count], truth[:count], chosen, NAMES, PALETTE, tmp_path / "a.png")
        sizes.append(tuple(read(tmp_path / "a.png").shape[:2]))
    assert sizes[0][1] == sizes[1][1] == 2 * 310 + 10
    assert sizes[2][1] == 3 * 310 + 10
    assert sizes[1][0] - sizes[0][0] == 200 + 34


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": torch.zeros(2, 8, 11, dtype=torch.int64)}, "'truth' must have the shape"),
        ({"predictions": {"kd": torch.zeros(1, 8, 12, dtype=torch.int64)}}, "'kd' must have the shape"),
        ({"predictions": {"kd": torch.full((2, 8, 12), 3)}}, "'kd' holds classes 3 to 3"),
        ({"predictions": {"kd": torch.full((2, 8, 12), 255)}}, "'kd' holds classes 255"),
        ({"truth": torch.full((2, 8, 12), 7)}, "'truth' holds classes 7 to 7"),
        ({"class_names": ("a",)}, "1 class names do not match 3 colours"),
        ({"images": torch.zeros(0, 3, 8, 12)}, "images must be"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, scenes, change, message):
    images, truth = scenes
    good = {"images": images, "truth": truth, "predictions": {}, "class_names": NAMES, "palette": PALETTE}
    with pytest.raises(ValueError, match=message):
        mask_grid(**{**good, **change}, path=tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_scene_miou_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 255, -1]])
    prediction = torch.tensor([[0, 1, 1, 1], [0, 0, 2, 2]])
    assert scene_miou(prediction, truth) == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert scene_miou(truth.clamp(0, 1), truth) == 1.0
    assert scene_miou(prediction, torch.full_like(truth, 255)) is None


def objects(*found):
    """Of (x1, y1, x2, y2, label, score) each."""
    table = torch.tensor(found, dtype=torch.float64).reshape(-1, 6)
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}


@pytest.fixture
def boxes():
    """Two black images of 12x12 pixels, each with two objects."""
    return torch.zeros(2, 3, 12, 12), [objects((2, 5, 6, 11, 1, 1), (7, 4, 11, 8, 2, 1))] * 2


def test_a_box_is_an_outline_of_its_colour(tmp_path, boxes):
    images, truth = boxes
    path = tmp_path / "new" / "predictions.png"
    box_grid(images, truth, {"pkd": [objects((2, 5, 6, 11, 2, 0.9))] * 2}, NAMES, PALETTE, path)
    picture, side, top = read(path), 25, 48
    for column, colour in ((1, PALETTE[1]), (2, PALETTE[2])):
        left = 10 + 310 * column
        for y, x in ((8, 2), (8, 6), (11, 4)):  # the middles of three sides; on the fourth stands the label
            assert picture[top + side * y, left + side * x].tolist() == list(colour)
        assert picture[top + side * 8, left + side * 4].tolist() == [0, 0, 0]
    assert not (picture[top : top + 300, 10:310] != 0).any()  # on the image itself nothing is drawn


def test_boxes_with_a_low_score_are_not_drawn(tmp_path, boxes):
    images, truth = boxes
    pictures = []
    for name, least in (("all", 0.2), ("sure", 0.8), ("none", 0.95)):
        found = [objects((2, 5, 6, 11, 1, 0.9), (7, 4, 11, 8, 2, 0.3))] * 2
        box_grid(images, truth, {"pkd": found}, NAMES, PALETTE, tmp_path / f"{name}.png", least)
        cell = read(tmp_path / f"{name}.png")[48:348, 630:930].long()
        pictures.append([int((cell == torch.tensor(colour)).all(dim=-1).sum()) for colour in PALETTE[1:]])
    (red, blue), (only_red, no_blue), nothing = pictures
    assert red == only_red > 0
    assert blue > no_blue == 0
    assert nothing == [0, 0]


def test_an_image_without_objects_is_drawn(tmp_path, boxes):
    images, _ = boxes
    box_grid(images, [objects()] * 2, {"none": [objects()] * 2}, NAMES, PALETTE, tmp_path / "a.png")
    assert read(tmp_path / "a.png").shape == (48 + 2 * 334, 3 * 310 + 10, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": [objects()]}, "'truth' must have an entry for each of the 2 images, not 1"),
        ({"predictions": {"kd": [objects()] * 3}}, "'kd' must have an entry for each of the 2 images, not 3"),
        ({"predictions": {"kd": [objects((0, 0, 1, 1, 3, 1))] * 2}}, "'kd' holds classes 3 to 3"),
        ({"palette": PALETTE[:2]}, "3 class names do not match 2 colours"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(tmp_path, boxes, change, message):
    images, truth = boxes
    good = {"images": images, "truth": truth, "predictions": {}, "class_names": NAMES, "palette": PALETTE}
    with pytest.raises(ValueError, match=message):
        box_grid(**{**good, **change}, path=tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("found", "hits"),
    [
        (objects((0, 0, 10, 10, 1, 0.9)), 1),
        (objects((0, 0, 10, 10, 2, 0.9)), 0),  # the right place, another class
        (objects((0, 0, 10, 5, 1, 0.9)), 1),  # IoU exactly 0.5
        (objects((0, 0, 10, 4.9, 1, 0.9)), 0),
        (objects((0, 0, 10, 10, 1, 0.9), (1, 0, 10, 10, 1, 0.8)), 1),  # one object is found once
        (objects((0, 0, 10, 10, 1, 0.9), (20, 0, 30, 10, 1, 0.8)), 2),
        (objects((20, 20, 30, 30, 1, 0.9)), 0),
        (objects(), 0),
    ],
)
def test_scene_hits_by_hand(found, hits):
    assert scene_hits(found, objects((0, 0, 10, 10, 1, 1), (20, 0, 30, 10, 1, 1))) == hits


def test_what_is_above_a_score_comes_with_the_surest_last():
    found = above(objects((0, 0, 1, 1, 0, 0.5), (0, 0, 2, 2, 1, 0.2), (0, 0, 3, 3, 2, 0.9), (0, 0, 4, 4, 0, 0.3)), 0.3)
    assert found["scores"].tolist() == [0.3, 0.5, 0.9]
    assert found["boxes"][:, 2].tolist() == [4, 1, 3]
    assert found["labels"].tolist() == [0, 0, 2]
