# SPDX-License-Identifier: Apache-2.0
"""Sheets of labels: the colours of classes, grey where there is none, boxes where they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from kdlvfm.reporting.label_sheet import UNSURE, box_sheet, fitted, mask_sheet

PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
NAMES = ["sky", "road", "car"]


def colours_of(path):
    with Image.open(path) as file:
        pixels = np.array(file.convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(map(int, colour)): int(count) for colour, count in zip(found, counts, strict=True)}


def test_masks_of_different_sizes_share_a_sheet(tmp_path):
    images = [torch.zeros(3, 32, 64), torch.zeros(3, 64, 32), torch.zeros(3, 600, 300)]
    masks = [torch.zeros(32, 64), torch.full((64, 32), 255), torch.full((600, 300), -1)]
    masks[0][:, 32:] = 1
    mask_sheet(images, [mask.long() for mask in masks], NAMES, PALETTE, "teacher", tmp_path / "new" / "sheet.png")
    shown = colours_of(tmp_path / "new" / "sheet.png")
    assert shown[PALETTE[0]] == pytest.approx(shown[PALETTE[1]], rel=0.02)  # but for the squares of the legend
    assert shown[UNSURE] == pytest.approx(4 * shown[PALETTE[0]], rel=0.05)  # two masks of half a square, all grey
    assert PALETTE[2] not in shown


def test_boxes_are_drawn_in_the_pixels_of_the_sheet(tmp_path):
    objects = {"boxes": torch.tensor([[0.0, 0, 100, 50]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
    none = {key: value[:0] for key, value in objects.items()}
    images = [torch.ones(3, 100, 100), torch.ones(3, 50, 80)]
    box_sheet(images, [objects, none], NAMES, PALETTE, "teacher", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as file:
        pixels = np.array(file.convert("RGB")).astype(int)
    rows, columns = np.nonzero(np.abs(pixels - PALETTE[2]).sum(axis=2) < 30)
    assert columns.max() - columns.min() == pytest.approx(512, abs=12)  # the image's width
    assert rows.max() - rows.min() == pytest.approx(256, abs=12)  # half of its height


def test_small_images_grow_and_large_ones_shrink():
    small = torch.rand(3, 8, 16)
    assert fitted(small).shape == (3, 128, 256)
    assert {*fitted(small).unique().tolist()} == {*small.unique().tolist()}
    assert fitted(torch.full((3, 2000, 10), 0.25)).shape == (3, 256, 1)
