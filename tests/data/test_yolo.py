# SPDX-License-Identifier: Apache-2.0
"""Boxes in YOLO's format."""

from __future__ import annotations

import pytest

from kdlvfm.data.base import DataError


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 0.5 0.5 0.1 0.1", r"1 boxes in 'val' of a class outside 0 to 2: d.txt \(3\)"),
        ("1 0.5 0.5 0.1", "d.txt, line 1, is not `class x y width height`: it has 4 values"),
        ("cat 0.5 0.5 0.1 0.1", "d.txt, line 1, is not"),
        ("1 0.5 0.5 0 0.1", "1 boxes in 'val' without area"),
        ("1 nan 0.5 0.1 0.1", "1 boxes in 'val' without area"),
        ("1 20 15 8 6", "1 boxes in 'val' without area or outside their image"),
    ],
)
def test_a_bad_line_of_yolo_is_named(yolo, tmp_path, line, message):
    (tmp_path / "farm" / "labels" / "val" / "d.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        yolo().check()


def test_boxes_of_no_image_are_named(yolo, tmp_path):
    (tmp_path / "farm" / "labels" / "val" / "zz.txt").write_text("1 0.5 0.5 0.1 0.1\n")
    with pytest.raises(DataError, match=r"1 text files in 'val' are of no image: zz.txt"):
        yolo().check()
