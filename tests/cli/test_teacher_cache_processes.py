# SPDX-License-Identifier: Apache-2.0
"""Teacher caches and whole processes: two at a time, one that is killed, and the two of a distributed run."""

import json
import signal
import time

import pytest

from kdlvfm.training.cache.store import CacheStore

pytestmark = pytest.mark.slow

SCENES = (
    "teacher=digit_scenes_vit",
    "data.unlabelled=56",
    "recipe.steps=34",  # two passes and a bit
    "recipe.augmentation={_target_: kdlvfm.data.transforms.Augmentation, scale: [0.5, 2.0], crop: [64, 64]}",
    "teacher_cache=build",
    "teacher_cache.views=2",
)


@pytest.fixture
def start(shell, small, tmp_path):
    def call(out, *overrides):
        folder = f"teacher_cache.folder={tmp_path}/caches"
        return shell("train", *small, *SCENES, folder, f"out={tmp_path / out}", *overrides)

    return call


def said(tmp_path, out):
    return json.loads((tmp_path / out / "record.json").read_text())["teacher_cache"]


def store_of(tmp_path):
    (index,) = (tmp_path / "caches").rglob("index.json")
    return CacheStore.open(index.parent)


def whole(store):
    format = store.format("map.-1", "fp16")
    rows = store.stored(format)
    assert all(store.is_whole(format, row) for row in rows)
    return len(rows)


def test_two_runs_at_once_compute_everything_once(start, tmp_path):
    processes = [start(name, f"distiller={name}") for name in ("fitnet", "attention_transfer")]
    for process in processes:
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
    counts = [said(tmp_path, name)["computed"] for name in ("fitnet", "attention_transfer")]
    assert sum(counts) == said(tmp_path, "fitnet")["images"] == whole(store_of(tmp_path))
    assert not list((tmp_path / "caches").rglob("lock"))


def test_two_runs_at_once_fit_principal_components_once(start, tmp_path):
    processes = [start(name, f"distiller={name}", "teacher_cache.pca=8") for name in ("fitnet", "attention_transfer")]
    outputs = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("fitting 8 principal components" in out for out, _ in outputs) == 1
    assert sum(" % of the variance" in out for out, _ in outputs) in (1, 2)  # 2: one waited for the other
    store = store_of(tmp_path)
    format = store.format("map.-1", "fp16", 8)
    rows = store.stored(format)
    assert all(store.is_whole(format, row) for row in rows)
    assert sum(said(tmp_path, name)["computed"] for name in ("fitnet", "attention_transfer")) == len(rows)


def test_a_killed_run_goes_on_where_it_stopped(start, tmp_path):
    with start("run", "distiller=fitnet") as process:
        while process.poll() is None and not any((tmp_path / "caches").rglob("*.bin")):
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = whole(store_of(tmp_path))
    again = start("run", "distiller=fitnet")
    _, err = again.communicate(timeout=500)
    assert again.returncode == 0, err
    record = said(tmp_path, "run")
    assert record["computed"] == record["images"] - before


@pytest.mark.ddp
def test_the_processes_of_a_distributed_run_share_a_cache(start, tmp_path):
    trainer = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "distiller=fitnet")
    process = start("run", *trainer)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    record = said(tmp_path, "run")
    assert record["computed"] == record["images"] == whole(store_of(tmp_path))
    assert out.count("complete, ") == 1
