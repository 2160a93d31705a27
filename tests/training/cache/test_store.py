# SPDX-License-Identifier: Apache-2.0
"""The folder of a cache: rows come back under the image that they belong to, or not at all."""

import errno
import json
import os

import pytest
import torch

from kdlvfm.training.cache.formats import CacheError, TapFormat
from kdlvfm.training.cache.rows import RowError, image_digest
from kdlvfm.training.cache.store import CacheStore

SAMPLES = 5


@pytest.fixture
def store(tmp_path):
    made = CacheStore(tmp_path / "caches" / "one", SAMPLES, 4, {"seed": 0}, {"teacher": None}, {"begun": "now"})
    made.write_index()
    return made


@pytest.fixture
def format(store):
    found = TapFormat.of("dino/map.-1", torch.zeros(2, 3, 2, 2), "fp32")
    store.add_format(found, {"cosine": 1.0, "relative_rms": 0.0}, 2)
    return found


def picture(row):
    return torch.full((3, 4, 4), row / 100)


def fill(store, format, rows):
    features = torch.stack([torch.full((3, 2, 2), float(row)) for row in rows])
    store.write(format, rows, [image_digest(picture(row)) for row in rows], format.encode(features))


def test_an_index_comes_back(store, format):
    again = CacheStore.open(store.folder)
    assert again == store
    assert again.format("dino/map.-1", "fp32") == format
    assert again.format("dino/map.-1", "fp16") is None
    assert again.formats() == {"dino%2Fmap.-1.fp32": (format, {"cosine": 1.0, "relative_rms": 0.0, "images": 2})}


def test_views_of_samples_have_rows_of_their_own(store):
    rows = [store.row(view, sample) for view in range(3) for sample in range(SAMPLES)]
    assert rows == list(range(15))
    assert store.by_shard([13, 2, 4, 3]) == {0: [2, 3], 1: [4], 3: [13]}


def test_what_was_written_is_read_and_the_rest_is_missing(store, format):
    fill(store, format, [0, 3])
    fill(store, format, [9])
    assert store.stored(format) == [0, 3, 9]
    assert store.missing(format, [9, 3, 4, 100]) == [4, 100]
    for row in (0, 3, 9):
        found = format.decode(store.read(format, row, image_digest(picture(row)))[None])
        assert found.eq(row).all()


@pytest.mark.parametrize("row", [1, 7])  # in a file that there is, and in one that there is not
def test_a_missing_row_is_named(store, format, row):
    fill(store, format, [0])
    with pytest.raises(RowError, match=f"view {row // 5} of sample {row % 5} at dino/map.-1 is not stored") as error:
        store.read(format, row, image_digest(picture(row)))
    assert error.value.cause == "is not stored"
    assert not store.is_whole(format, row)


def test_another_image_does_not_get_the_features(store, format):
    fill(store, format, [2])
    changed = picture(2)
    changed[0, 0, 0] += 1e-6
    with pytest.raises(RowError, match="is of another image"):
        store.read(format, 2, image_digest(changed))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_row_is_noticed_dropped_and_written_again(store, format, damage):
    fill(store, format, [0, 1])
    (path,) = store.folder.rglob("*.bin")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-3])
    with pytest.raises(RowError, match=r"is damaged.*--drop takes out what is wrong"):
        store.read(format, 1, image_digest(picture(1)))
    assert [store.is_whole(format, row) for row in (0, 1)] == [True, False]
    store.drop(format, 1)
    assert store.stored(format) == [0]
    fill(store, format, [1])
    assert store.is_whole(format, 1)


def test_a_row_counts_when_all_of_it_is_there(store, format, monkeypatch):
    """A process that is killed between the two writes leaves a row that does not count."""
    whole = os.pwrite

    def killed(descriptor, content, offset):
        if len(content) != format.row_bytes:
            raise KeyboardInterrupt
        return whole(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(store, format, [0])
    assert store.missing(format, [0]) == [0]


def test_short_writes_are_finished(store, format, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, at: whole(descriptor, content[:7], at))
    fill(store, format, [0, 1])
    assert [store.is_whole(format, row) for row in (0, 1)] == [True, True]


def test_a_disk_that_takes_no_more_is_an_error_and_loses_nothing(store, format, monkeypatch):
    fill(store, format, [0])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheError, match=r"No space left on device.*kept"):
        fill(store, format, [1])
    assert store.stored(format) == [0]


def test_only_rows_that_are_there_take_room(store, format):
    fill(store, format, [3])
    (path,) = store.folder.rglob("*.bin")
    assert path.stat().st_size == 4096 + 4 * format.row_bytes
    with path.open("rb") as file:
        assert not file.read(3 * 20).strip(b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no teacher cache: index.json cannot be read"),
        ("{", "no JSON file"),
        ("[]", "no index of a teacher cache"),
        ('{"schema": "kdlvfm.teacher_cache/2"}', "this version reads kdlvfm.teacher_cache/1"),
        ('{"schema": "kdlvfm.teacher_cache/1"}', "KeyError"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(CacheError, match=message):
        CacheStore.open(tmp_path)


def test_a_format_that_is_none_is_refused(store, format):
    path = store.folder / "dino%2Fmap.-1.fp32.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "order": [7]}))
    with pytest.raises(CacheError, match=r"cannot be read.*remove the cache"):
        store.format("dino/map.-1", "fp32")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be made"):
        CacheStore(tmp_path / "file" / "one", 1, 4, {}, {}, {}).write_index()


def test_digests_tell_images_apart():
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 2, 8), torch.zeros(3, 4, 4).half(), torch.full((3, 4, 4), 1e-7)]
    assert len({image_digest(image) for image in images}) == 4
    flipped = torch.rand(3, 4, 4).flip(-1)
    assert image_digest(flipped) == image_digest(flipped.clone())
    assert image_digest(flipped.permute(0, 2, 1)) == image_digest(flipped.permute(0, 2, 1).contiguous())
    assert len(image_digest(flipped)) == 16
