# SPDX-License-Identifier: Apache-2.0
import hashlib

import pytest

from kdlvfm.reporting.record import config_hash, recipe_hash

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
