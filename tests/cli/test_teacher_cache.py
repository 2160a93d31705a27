# SPDX-License-Identifier: Apache-2.0
"""Runs with a teacher cache, from the command line."""

import collections
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from kdlvfm.cli.config import compose
from kdlvfm.reporting.record import config_hash, recipe_hash
from kdlvfm.training.cache.store import CacheStore

Usage = collections.namedtuple("Usage", "total used free")

AUGMENTATION = (
    "recipe.augmentation={_target_: kdlvfm.data.transforms.Augmentation, scale: [0.5, 2.0], crop: [48, 48], flip: 0.5}"
)
STEPS = "recipe.steps=12"  # three passes over sixteen samples


@pytest.fixture
def cached(train, vit, tmp_path, monkeypatch):
    """A run of three passes with random views, in a folder of its own, its caches beside it; its record."""
    monkeypatch.chdir(tmp_path)

    def call(out, *overrides, code=0):
        ended = train(*vit, "distiller=fitnet", AUGMENTATION, STEPS, f"out={out}", *overrides)
        assert ended.code == code, ended.err
        return json.loads((tmp_path / out / "record.json").read_text()), ended

    return call


def weights(tmp_path, out):
    return (tmp_path / out / "student.safetensors").read_bytes()


def test_a_cache_without_loss_is_the_run_without_a_cache(cached, tmp_path):
    """The same views and bits, the same hash; what was computed once is not computed again."""
    live, _ = cached("live", "teacher_cache.views=2")
    built, ended = cached("built", "teacher_cache=build", "teacher_cache.views=2", "teacher_cache.dtype=fp32")
    assert weights(tmp_path, "built") == weights(tmp_path, "live")
    assert built["config_hash"] == live["config_hash"]
    assert "teacher_cache" not in live
    assert "cache      map.-1, 64x3x3, fp32: 2.2 KiB an image" in ended.out
    assert "32 images in 2 views to compute, 72.0 KiB of" in ended.out
    assert "complete, 32 images computed" in ended.out
    said = built["teacher_cache"]
    assert (said["dtype"], said["views"], said["images"], said["computed"]) == ("fp32", 2, 32, 32)
    store = CacheStore.open(tmp_path / said["folder"])
    assert said["folder"] == f"caches/test_vit.r160_in1k-DigitScenes-{said['hash']}"
    assert store.description["seed"] == 0
    # One more view is all that a run of three needs; one that reads finds everything.
    third, _ = cached("third", "teacher_cache=build", "teacher_cache.dtype=fp32")
    assert third["teacher_cache"]["hash"] == said["hash"]
    assert (third["teacher_cache"]["views"], third["teacher_cache"]["computed"]) == (None, 16)
    read, ended = cached("read", "teacher_cache=read", "teacher_cache.dtype=fp32")
    assert read["teacher_cache"]["computed"] == 0
    assert "map.-1 of 48 images, all in caches/" in ended.out
    endless, _ = cached("endless")
    assert weights(tmp_path, "read") == weights(tmp_path, "third") == weights(tmp_path, "endless")
    assert weights(tmp_path, "endless") != weights(tmp_path, "live")
    assert read["config_hash"] == endless["config_hash"] != live["config_hash"]


def test_principal_components_take_the_place_of_channels(cached, tmp_path, kdlvfm):
    """One basis for all dtypes, fitted once; the run is another one, and the table's baseline the same."""
    base = ("teacher_cache=build", "teacher_cache.views=2", "teacher_cache.pca=16")
    record, ended = cached("half", *base)
    assert "cache      map.-1, 64x3x3, fp16, 16 principal components: 288 B an image" in ended.out
    assert "and 16 images before, to which principal components are fitted" in ended.out
    assert "fitting 16 principal components to 16 images" in ended.out
    assert " % of the variance" in ended.out
    said = record["teacher_cache"]
    assert (said["dtype"], said["pca"], said["bytes_per_image"], said["computed"]) == ("fp16", 16, 288, 32)
    folder = tmp_path / said["folder"]
    basis = (folder / "map.-1.pca16.safetensors").read_bytes()
    error = json.loads((folder / "map.-1.fp16.pca16.json").read_text())["measured_error"]
    assert 0 < error["variance"] < 1
    assert error["relative_rms"] > 0.01
    _, ended = cached("whole", *base, "teacher_cache.dtype=int8")
    assert "fitting" not in ended.out
    assert (folder / "map.-1.pca16.safetensors").read_bytes() == basis
    # As many components as channels are the channels, and have no components file.
    full, _ = cached("full", *base[:2], "teacher_cache.pca=64")
    plain, _ = cached("plain", *base[:2])
    assert weights(tmp_path, "full") == weights(tmp_path, "plain") != weights(tmp_path, "half")
    assert not (folder / "map.-1.pca64.safetensors").exists()
    assert {record["recipe_hash"] for record in (full, plain)} == {record["recipe_hash"]}
    again, ended = cached("again", "teacher_cache=read", *base[1:])
    assert weights(tmp_path, "again") == weights(tmp_path, "half")
    assert again["config_hash"] == record["config_hash"] != plain["config_hash"]
    ended = kdlvfm("cache", "remove", folder)
    assert ended.code == 0, ended.err
    assert not folder.exists()


def test_other_weights_and_other_seeds_have_other_caches(cached, tmp_path):
    records = [
        cached(f"run{i}", "teacher_cache=build", "teacher_cache.views=1", "teacher_cache.dtype=int8", *changes)[0]
        for i, changes in enumerate([(), ("teacher.name=test_vit2",), ("seed=1",)])
    ]
    assert len({record["teacher_cache"]["hash"] for record in records}) == 3
    assert len({record["config_hash"] for record in records}) == 3


def test_other_image_files_have_other_caches(kdlvfm, small, vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for kind, shape in (("images", (32, 32, 3)), ("masks", (32, 32))):
            folder = tmp_path / "mine" / split / kind
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 2, shape, dtype=np.uint8)
                Image.fromarray(pixels * (1 if kind == "masks" else 200)).save(folder / f"{i}.png")
    own = [override for override in small if not override.startswith("data")]
    run = [*own, *vit, "distiller=fitnet", "data=folder", "data.root=mine", "data.classes=[a,b]", "out=run"]
    assert kdlvfm("train", *run, "teacher_cache=build").code == 0
    run[-1] = "out=again"
    assert kdlvfm("train", *run, "teacher_cache=read").code == 0
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(tmp_path / "mine" / "train" / "images" / "2.png")
    run[-1] = "out=changed"
    ended = kdlvfm("train", *run, "teacher_cache=read")
    assert ended.code == 1
    assert "lacks 4 of 4 images at map.-1" in ended.err
    assert len(list((tmp_path / "caches").iterdir())) == 1


def test_without_augmentation_seeds_share_one_view(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, computed in ((0, 16), (1, 0)):
        overrides = ("teacher=digit_scenes_vit", "distiller=fitnet", STEPS, f"out=run{seed}", f"seed={seed}")
        ended = train(*overrides, "teacher_cache=build")
        assert not ended.code, ended.err
        said = json.loads((tmp_path / f"run{seed}" / "record.json").read_text())["teacher_cache"]
        assert (said["views"], said["images"], said["computed"]) == (1, 16, computed)


def test_the_baseline_has_no_cache_and_the_same_recipe(train, cached, tmp_path):
    record, _ = cached("kd", "teacher_cache=build", "teacher_cache.views=2")
    ended = train("distiller=none", AUGMENTATION, STEPS, "teacher_cache=build", "teacher_cache.views=2", "out=none")
    assert not ended.code, ended.err
    baseline = json.loads((tmp_path / "none" / "record.json").read_text())
    assert "teacher_cache" not in baseline
    assert "cache " not in ended.out
    assert baseline["recipe_hash"] == record["recipe_hash"]


def test_what_has_an_effect_is_in_the_hash():
    base = ("teacher=digit_scenes_vit", "distiller=fitnet", "data=digit_scenes")

    def hashes(*overrides):
        config = compose([*base, *overrides])
        return config_hash(config), recipe_hash(config)

    plain = hashes()
    assert hashes("teacher_cache=build", "teacher_cache.dtype=fp32", "teacher_cache.folder=elsewhere") == plain
    assert hashes("teacher_cache.dtype=int8", "teacher_cache.pca=8") == plain
    half, views = hashes("teacher_cache=build"), hashes("teacher_cache.views=4")
    assert half[0] != plain[0]
    assert half[1] == plain[1]
    assert hashes("teacher_cache=read") == half
    reduced = hashes("teacher_cache=build", "teacher_cache.dtype=fp32", "teacher_cache.pca=8")
    assert reduced[0] not in {plain[0], half[0]}
    assert reduced[1] == plain[1]
    assert views[0] != plain[0]
    assert views[1] != plain[1]
    assert hashes("teacher_cache={mode: build, views: 4, dtype: fp32, folder: caches}") == views


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher_cache=on"], "teacher_cache.mode must be none, build, read, not 'on'"),
        (["teacher_cache.dtype=fp8"], "teacher_cache.dtype must be fp32, fp16, int8, not 'fp8'"),
        (["teacher_cache.pca=0"], "teacher_cache.pca must be a whole number from 1 on, not 0"),
        (["teacher_cache.pca=many"], "teacher_cache.pca must be a whole number from 1 on, not 'many'"),
        (["teacher_cache.views=0"], "teacher_cache.views must be a whole number from 1 on, not 0"),
        (["teacher_cache=read"], "lacks 16 of 16 images at map.-1: teacher_cache=build computes them"),
        (["teacher_cache=build", "trainer.precision=bf16-true"], "trainer.precision=32-true, bf16-mixed or 16-mixed"),
        (
            ["teacher_cache=build", "distiller=scale_kd", "distiller.perception_blocks=1", "teacher.norm=false"],
            "scale_kd needs more of the teacher than its features of the training images",
        ),
        (
            ["teacher_cache=build", "distiller=fitnet+scale_kd", "distiller.parts.scale_kd.perception_blocks=1"],
            "fitnet+scale_kd needs more of the teacher",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(overrides, message, refused, vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    norm = ["teacher.norm=false"] if "scale_kd" in " ".join(overrides) else []
    assert message in refused(*vit, "distiller=fitnet", *norm, *overrides)
    assert not (tmp_path / "caches").exists()


def test_a_full_disk_is_refused_before_anything_is_computed(refused, vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2**30 + 100))
    message = refused(*vit, "distiller=fitnet", "teacher_cache=build")
    assert "the teacher cache needs 32.0 KiB more, and 1.0 GiB must stay free" in message
    assert not (tmp_path / "caches").exists()


def test_damage_is_noticed_and_repaired(cached, kdlvfm, tmp_path):
    cache = ("teacher_cache=build", "teacher_cache.views=1")
    record, _ = cached("one", *cache)
    (path,) = (tmp_path / record["teacher_cache"]["folder"]).rglob("*.bin")
    content = bytearray(path.read_bytes())
    content[-5] ^= 64  # the last row
    path.write_bytes(content)
    record, ended = cached("two", *cache, code=1)
    assert "view 0 of sample 15 at map.-1 is damaged. kdlvfm cache verify" in ended.err
    assert record["status"] == "failed"
    store = CacheStore.open(tmp_path / record["teacher_cache"]["folder"])
    store.drop(store.format("map.-1", "fp16"), 15)
    record, _ = cached("two", *cache)
    assert record["teacher_cache"]["computed"] == 1


def test_an_ensemble_is_cached_like_any_teacher(cached, tmp_path):
    members = ("teacher=ensemble", "teacher@teacher.members.a=digit_scenes_vit", "teacher@teacher.members.b=timm")
    settings = (
        "teacher.members.b.name=test_vit",
        "teacher.members.b.pretrained=false",
        "teacher.members.b.input_size=32",
    )
    taps = ("distiller=agglomerate",)
    base = [*members, *settings, *taps, "~teacher.name", "~teacher.pretrained"]
    live, _ = cached("live", *base, "teacher_cache.views=1")
    read, _ = cached("read", *base, "teacher_cache=build", "teacher_cache.views=1", "teacher_cache.dtype=fp32")
    assert weights(tmp_path, "live") == weights(tmp_path, "read")
    assert live["config_hash"] == read["config_hash"]
