# SPDX-License-Identifier: Apache-2.0
"""The sheet shows each image beside its picture."""

import pytest
import torch
from PIL import Image

from kdlvfm.reporting.sheet import component_colours, image_sheet


def test_every_image_stands_beside_its_picture(tmp_path):
    colours = torch.linspace(0, 1, 6)
    images = colours.view(6, 1, 1, 1).expand(6, 3, 10, 20).contiguous()
    pictures = torch.stack([colours, 1 - colours, 0 * colours], 1).view(6, 3, 1, 1)
    image_sheet(
        images, pictures, [f"no {i}" for i in range(6)], "seen", tmp_path / "new" / "sheet.png", [("a", (9, 9, 9))]
    )
    with Image.open(tmp_path / "new" / "sheet.png") as file:
        found = {colour for _, colour in file.convert("RGB").getcolors(file.width * file.height)}
    wanted = [(255 * x).round().int().tolist() for pair in (images[:, :, 0, 0], pictures[:, :, 0, 0]) for x in pair]
    for pixel in wanted:
        assert any(max(abs(a - b) for a, b in zip(pixel, other, strict=True)) <= 1 for other in found), pixel


def test_a_rounding_error_of_resizing_is_no_warning(tmp_path, caplog):
    images = torch.full((1, 3, 4, 4), 1 + 1e-6)
    image_sheet(images, images, [""], "seen", tmp_path / "sheet.png")
    assert not caplog.records


def test_numbers_must_agree(tmp_path):
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="2 images, 2 pictures and 1 captions"):
        image_sheet(images, images, [""], "seen", tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


def test_components_are_those_of_the_largest_variance():
    torch.manual_seed(0)
    strong = torch.randn(2, 1, 3, 4) * 10
    features = torch.cat([torch.randn(2, 1, 3, 4), strong, 0.1 * torch.randn(2, 2, 3, 4)], dim=1)
    first = component_colours(features)[:, 0]
    cosine = torch.corrcoef(torch.stack([first.flatten(), strong.flatten()]))[0, 1]
    assert cosine.abs() > 0.99
    assert first.min() == 0
    assert first.max() == 1
    assert (component_colours(strong)[:, 1:] == 0).all()
    assert component_colours(torch.ones(1, 5, 2, 2)).isfinite().all()
