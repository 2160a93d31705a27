# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from kdlvfm.reporting.figures import prediction_grid, scene_miou

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
    prediction_grid(images, truth, {"teacher": truth.clamp(0, 2), "kd": 2 - truth.clamp(0, 2)}, NAMES, PALETTE, path)
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
        prediction_grid(images[:count], truth[:count], chosen, NAMES, PALETTE, tmp_path / "a.png")
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
        prediction_grid(**{**good, **change}, path=tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_scene_miou_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 255, -1]])
    prediction = torch.tensor([[0, 1, 1, 1], [0, 0, 2, 2]])
    assert scene_miou(prediction, truth) == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert scene_miou(truth.clamp(0, 1), truth) == 1.0
    assert scene_miou(prediction, torch.full_like(truth, 255)) is None
