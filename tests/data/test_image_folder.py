# SPDX-License-Identifier: Apache-2.0
"""A folder of images: which files are taken, and when they are read."""

import pytest
import torch
from PIL import Image

from kdlvfm.data.base import DataError
from kdlvfm.data.image_folder import ImageFolder


def test_images_of_all_folders_in_order_and_no_other_files(tmp_path):
    for number, name in enumerate(("b.png", "a/z.jpg", "a/c.PNG", "c/d/e.webp")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (5 + number, 4), color=10 * number).save(path)
    (tmp_path / "notes.txt").write_text("nothing to see")
    images = ImageFolder(tmp_path)
    assert len(images) == 4
    assert [images[i].shape for i in range(4)] == [(3, 4, 7), (3, 4, 6), (3, 4, 5), (3, 4, 8)]
    assert images[0].dtype == torch.uint8
    assert (images[0] == 20).all()


def test_files_are_not_read_before_they_are_needed(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    images = ImageFolder(tmp_path)
    with pytest.raises(DataError, match=r"broken\.jpg is not a readable image"):
        images[0]


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_without_images_is_refused(tmp_path, make):
    folder = tmp_path / "web"
    if make:
        folder.mkdir()
        (folder / "readme.md").write_text("soon")
    with pytest.raises(DataError, match="web holds no image" if make else "web is missing"):
        ImageFolder(folder)
