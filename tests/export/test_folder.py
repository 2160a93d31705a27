# SPDX-License-Identifier: Apache-2.0
"""All files of an export or none."""

import hashlib
import json

import pytest

from kdlvfm.export.folder import MANIFEST, all_or_nothing, describe, is_complete, read_manifest, write_manifest


def write(folder, **files):
    with all_or_nothing(folder) as place:
        for name, text in files.items():
            (place / name).write_text(text)
        write_manifest(place, {"request": {"a": 1}})


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_files_arrive_with_their_list(tmp_path):
    out = tmp_path / "new" / "export"
    write(out, card="hello", weights="1")
    assert names(out) == ["card", MANIFEST, "weights"]
    manifest = read_manifest(out)
    assert manifest["files"]["card"] == {"bytes": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}
    assert manifest["request"] == {"a": 1}
    assert is_complete(out, manifest)
    assert names(out.parent) == ["export"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_everything_as_it_was(tmp_path, error):
    def fail(folder):
        with all_or_nothing(folder) as place:
            (place / "card").write_text("after")
            raise error

    write(tmp_path / "export", card="before")
    for name in ("export", "other"):
        with pytest.raises(error):
            fail(tmp_path / name)
    assert (tmp_path / "export" / "card").read_text() == "before"
    assert names(tmp_path) == ["export"]


def test_a_new_export_takes_the_place_of_the_old_one_and_of_nothing_else(tmp_path):
    write(tmp_path, card="1", nms="1")
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, card="2")
    assert names(tmp_path) == ["card", MANIFEST, "notes.txt"]
    assert (tmp_path / "card").read_text() == "2"


def test_what_was_changed_is_not_complete(tmp_path):
    write(tmp_path, card="1", other="1")
    manifest = read_manifest(tmp_path)
    (tmp_path / "card").write_text("2")
    assert not is_complete(tmp_path, manifest)
    (tmp_path / "card").unlink()
    assert not is_complete(tmp_path, manifest)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"schema": "other"}',
        '{"schema": "kdlvfm.export/1", "files": {}}',
        '{"schema": "kdlvfm.export/1", "files": [], "request": {}}',
    ],
)
def test_a_list_that_is_none(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    assert read_manifest(tmp_path) is None


def test_files_elsewhere_are_not_touched(tmp_path):
    precious, out = tmp_path / "precious", tmp_path / "export"
    precious.write_text("mine")
    out.mkdir()
    forged = {"schema": "kdlvfm.export/1", "request": {}, "files": {"../precious": describe(precious)}}
    (out / MANIFEST).write_text(json.dumps(forged))
    assert read_manifest(out) is None
    write(out, card="1")
    assert precious.read_text() == "mine"
