# SPDX-License-Identifier: Apache-2.0
"""What a folder says of the teacher that labelled it."""

from __future__ import annotations

import json

import pytest

from kdlvfm.data.base import DataError
from kdlvfm.data.labels import read_labels

TEACHER = {
    "name": "vit",
    "weights": "file",
    "licence": None,
    "sha256": "0" * 64,
    "source": "vit.pt",
    "weights_hash": "1" * 64,
}
CONTENT = {
    "schema": "kdlvfm.labels/1",
    "teacher": {**TEACHER, "settings": {"input_size": None}},
    "confidence": 0.5,
    "images": {"train": 3, "val": 1, "sha256": "2" * 64},
    "kept": {"of": 9, "boxes": 4, "by_class": {"cat": 4}},
}


def write(folder, **changes):
    (folder / "labels.json").write_text(json.dumps({**CONTENT, **changes}))


def test_a_folder_of_people_says_nothing(tmp_path):
    assert read_labels(tmp_path, ("train", "val")) is None


def test_only_splits_that_are_read_count(tmp_path):
    write(tmp_path)
    made = {"teacher": TEACHER, "confidence": 0.5}
    assert read_labels(tmp_path, ("train", "val", "test")) == {**made, "images": {"train": 3, "val": 1}}
    assert read_labels(tmp_path, ("train", "test")) == {**made, "images": {"train": 3}}
    assert read_labels(tmp_path, ("test",)) is None


def test_what_is_not_finished_is_no_data(tmp_path):
    write(tmp_path, kept=None)
    with pytest.raises(DataError, match="is not labelled to its end: give its command again"):
        read_labels(tmp_path, ("train",))


@pytest.mark.parametrize(
    "changes", [{"schema": "kdlvfm.labels/2"}, {"teacher": {}}, {"teacher": None}, {"confidence": "x"}, {"images": 3}]
)
def test_what_is_something_else_is_named(tmp_path, changes):
    write(tmp_path, **changes)
    with pytest.raises(DataError, match=r"labels\.json is not as kdlvfm label writes it"):
        read_labels(tmp_path, ("train",))
