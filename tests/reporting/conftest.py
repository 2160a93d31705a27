# SPDX-License-Identifier: Apache-2.0
import hashlib
from dataclasses import replace

import pytest

from kdlvfm.reporting.block import OVER_IMAGES, Table
from kdlvfm.reporting.published import Published
from kdlvfm.reporting.record import config_hash, recipe_hash
from kdlvfm.reporting.tables import summarise

TEACHER = {
    "name": "vit_small_patch16_dinov3.lvd1689m",
    "weights": "pretrained",
    "licence": "dinov3-license",
    "sha256": hashlib.sha256(b"teacher").hexdigest(),
    "source": "hub",
    "parameters": 21_600_000,
    "metrics": {"test": {"miou": 0.80}},
}


@pytest.fixture
def make_record():
    """A factory of valid records; `changes` replace whole fields, `config` extends the configuration."""

    def make(distiller="kd", seed=0, score=0.5, *, settings=None, teacher=TEACHER, config=None, **changes):
        resolved = {
            "seed": seed,
            "out": f"runs/{distiller}/{seed}",
            "distiller": {"name": distiller, **(settings or {})},
            "teacher": {"name": teacher["name"]} if teacher else None,
            "student": {"name": "resnet18_fpn"},
            "data": {"name": "digit_scenes", "root": "/data", "seed": seed},
            "trainer": {"devices": 1, "max_steps": 100},
            **(config or {}),
        }
        finished = changes.get("status", "finished") == "finished"
        return {
            "schema": "kdlvfm.run/1",
            "status": "finished",
            "error": None,
            "name": f"{distiller}-{seed}",
            "started": "2026-01-01T00:00:00+00:00",
            "ended": "2026-01-01T00:02:00+00:00" if finished else None,
            "command": ["kdlvfm", "train"],
            "config": resolved,
            "config_hash": config_hash(resolved),
            "recipe_hash": recipe_hash(resolved),
            "seed": seed,
            "git": {"revision": "0" * 40, "dirty": False},
            "versions": {"python": "3.11.7", "kdlvfm": "0.1.0", "torch": "2.12.0"},
            "hardware": {"cpu": "a CPU", "cores": 2, "threads": 1, "gpu": None, "platform": "Linux"},
            "teacher": teacher,
            "student": {
                "name": "resnet18_fpn",
                "weights": "random",
                "licence": None,
                "sha256": None,
                "source": None,
                "parameters": 12_345_678,
                "macs": 345_600_000,
                "input_size": [64, 64],
            },
            "distiller": {
                "name": distiller,
                "settings": settings or {},
                "parameters": 0,
                "student_taps": [],
                "teacher_taps": [],
            },
            "task": {"name": "segmentation", "primary_metric": "miou"},
            "data": {
                "name": "digit_scenes",
                "classes": ["background", "0"],
                "licence": "BSD-3-Clause",
                "split_hash": "abc",
                "counts": {"train": 40, "val": 20, "test": 50},
            },
            "steps": 100,
            "batch_size": 16,
            "selection": "last",
            "selected_step": 100 if finished else None,
            "metrics": {"test": {"miou": score, "iou": {"background": 0.9, "0": None}}} if finished else {},
            "curve": [{"step": 50, "metrics": {"miou": 0.2}}],
            "cost": {
                "seconds": 120.0,
                "train_seconds": 100.0,
                "images_per_second": 16.0 if distiller == "none" else 12.0,
                "peak_memory_mib": None,
                "teacher_share": 0.0 if distiller == "none" else 0.25,
            }
            if finished
            else None,
            **changes,
        }

    return make


@pytest.fixture
def rows_of():
    """The only block of some records, and its rows by method."""

    def make(records, **options):
        (block,) = summarise(records, **options).blocks
        return block, {row.method: row for row in block.rows}

    return make


@pytest.fixture
def rich_table(make_record):
    """A table with everything beside seeds: intervals over images, a longer baseline, a paper, times of inference."""
    inference = {
        "device": "cpu",
        "threads": 1,
        "precision": "float32",
        "input_size": [64, 96],
        "latency_p50": 0.0123,
        "latency_p95": 0.0145,
        "repetitions": 100,
        "images_per_second": 321.0,
        "batch_size": 32,
        "batches": 20,
    }
    kd = make_record("kd", 0, 0.52, inference=inference)
    matched = {
        "run": "runs/kd",
        "method": "kd",
        "method_hash": kd["config_hash"],
        "recipe_hash": kd["recipe_hash"],
        "recipe_steps": 100,
        "steps": 130,
    }
    longer = make_record("none", 0, 0.45, teacher=None, config={"equal_time": matched}, inference=inference)
    records = [make_record("none", 0, 0.4, teacher=None, inference=inference), longer, kd, make_record("cwd", 0, 0.3)]
    (block,) = summarise(records).blocks
    rows = {row.method: row for row in block.rows}
    over_images = {"interval": (0.1, 0.14), "over": "images"}
    rows["kd"] = replace(
        rows["kd"], difference=replace(rows["kd"].difference, **over_images), published=Published(0.6821, 1)
    )
    notes = (*block.notes, f"{OVER_IMAGES} One seed.", "[1] Published: a paper.")
    return Table((replace(block, rows=tuple(rows.values()), notes=notes),))
