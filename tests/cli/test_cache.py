# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm cache`: list, verify, remove."""

import json
import re
import shutil

import pytest

from kdlvfm.cli import main
from kdlvfm.cli.lock import RunLock
from kdlvfm.training.cache.store import CacheStore

PRETRAINED = "teacher=digit_scenes_vit"


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """A cache of a pretrained teacher, in fp16 and int8, and of 16 principal components."""
    root = tmp_path_factory.mktemp("caches")
    for dtype, pca in (("fp16", "null"), ("int8", "null"), ("fp16", "16")):
        cache = ("teacher_cache=build", f"teacher_cache.folder={root}", f"teacher_cache.dtype={dtype}")
        more = (*cache, f"teacher_cache.pca={pca}", f"out={root}/run-{dtype}-{pca}")
        with pytest.raises(SystemExit) as ended:
            main(["train", *small, PRETRAINED, "distiller=fitnet", *more])
        assert not ended.value.code
    (folder,) = (path for path in root.iterdir() if path.name.startswith("digit_scenes_vit-DigitScenes-"))
    return folder


@pytest.fixture
def cache(made, tmp_path):
    """A copy, to be harmed."""
    return shutil.copytree(made, tmp_path / "caches" / made.name)


def test_list_shows_what_is_stored(kdlvfm, cache):
    ended = kdlvfm("cache", "list", cache.parent)
    assert ended.code == 0
    assert "digit_scenes_vit on DigitScenes, images of 64x64, not augmented" in ended.out
    rows = [line.split() for line in ended.out.splitlines() if line.strip().startswith("map.-1")]
    assert [row[:5] for row in rows] == [
        ["map.-1", "144x8x8", "fp16", "16", "1"],
        ["map.-1", "144x8x8", "fp16", "pca16", "16"],
        ["map.-1", "144x8x8", "int8", "16", "1"],
    ]
    assert f"next  kdlvfm cache verify {cache}" in ended.out


def test_verify_computes_a_sample_again(kdlvfm, cache):
    ended = kdlvfm("cache", "verify", cache, "--images", "5", "--all")
    assert ended.code == 0, ended.out
    assert "map.-1 fp16: 5 of 16 images computed again, lowest cosine 1.000000 (at least 0.999)" in ended.out
    assert "map.-1 int8: 5 of 16 images computed again, lowest cosine 0.999" in ended.out
    assert "(at least 0.99); error by storing at most: 1/254 of the largest value of the channel" in ended.out
    assert "map.-1 fp16 pca16: 5 of 16 images computed again, lowest cosine 1.000000 (at least 0.999)" in ended.out
    assert re.search(r"among coefficients; the components keep \d\d\.\d % of the variance", ended.out)
    assert "checksums of all 16 images compared" in ended.out
    assert f"{cache} is what the teacher gives." in ended.out


def test_verify_finds_damage_and_takes_it_out(kdlvfm, cache):
    path = cache / "shards" / "00000" / "map.-1.fp16.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ended = kdlvfm("cache", "verify", cache, "--images", "1", "--all", "--drop")
    assert ended.code == 1
    assert "WRONG  map.-1, view 0 of sample 15 is damaged" in ended.out
    assert "1 stored images are wrong: and taken out" in ended.out
    store = CacheStore.open(cache)
    assert store.stored(store.format("map.-1", "fp16")) == list(range(15))
    assert kdlvfm("cache", "verify", cache, "--all").code == 0


def test_verify_finds_features_of_something_else(kdlvfm, cache):
    """A row whose checksum is right and whose features are another image's."""
    store = CacheStore.open(cache)
    format = store.format("map.-1", "fp16")
    path = cache / "shards" / "00000" / "map.-1.fp16.bin"
    content = bytearray(path.read_bytes())
    first, second = (20480 + row * format.row_bytes for row in (0, 1))
    content[first : first + format.row_bytes] = content[second : second + format.row_bytes]
    content[16:20] = content[36:40]
    path.write_bytes(content)
    ended = kdlvfm("cache", "verify", cache)
    assert ended.code == 1
    assert "WRONG  map.-1, view 0 of sample 0 has cosine" in ended.out
    assert "--drop takes them out" in ended.out
    assert len(store.stored(format)) == 16


def change(cache, **parts):
    path = cache / "index.json"
    index = json.loads(path.read_text())
    for part, changes in parts.items():
        for key, value in changes.items():
            index[part][key] |= value
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"description": {"data": {"split_hash": "0" * 64}}}, "the data is not what it was"),
        ({"description": {"teacher": {"weights": "0" * 64}}}, "has other weights than the one whose features"),
        ({"config": {"teacher": {"_target_": "os.system"}}}, "asks to call 'os.system', which is no class of kdlvfm"),
        ({"config": {"data": {"_target_": "kdlvfm.data.files.io.open"}}}, "it was not loaded"),
    ],
)
def test_verify_refuses_what_is_not_as_it_was_and_executes_nothing(kdlvfm, cache, parts, message):
    change(cache, **parts)
    ended = kdlvfm("cache", "verify", cache)
    assert ended.code == 1
    assert message in ended.err


def test_remove_takes_away_a_cache_and_nothing_else(kdlvfm, cache):
    (cache / "notes.txt").write_text("mine")
    ended = kdlvfm("cache", "remove", cache)
    assert ended.code == 1
    assert f"{cache} holds notes.txt besides a cache; nothing was removed" in ended.err
    (cache / "notes.txt").unlink()
    ended = kdlvfm("cache", "remove", cache)
    assert ended.code == 0
    assert ended.out.startswith(f"removed  {cache}, ")
    assert not cache.exists()
    assert cache.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify",), "verify needs the FOLDER of a cache"),
        (("remove", "."), ". is no teacher cache: index.json cannot be read"),
        (("list", "nowhere"), "there is no teacher cache in nowhere"),
        (("verify", ".", "--images", "0"), "--images must be at least 1, not 0"),
    ],
)
def test_wrong_calls_are_told(kdlvfm, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    ended = kdlvfm("cache", *arguments)
    assert ended.code == 1
    assert message in ended.err


@pytest.mark.slow
def test_a_cache_that_another_process_computes_is_not_removed(cache, shell):
    with RunLock(cache / "shards" / "00000"):
        process = shell("cache", "remove", cache)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 1, out
    assert "is being computed by process" in err
    assert cache.exists()
