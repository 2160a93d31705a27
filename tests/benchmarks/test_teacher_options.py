# SPDX-License-Identifier: Apache-2.0
"""The benchmark of teacher options measures what it says, and the page shows its committed records."""

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import losses_page
import teacher_options

SETTING = {
    "student": "test_resnet",
    "teacher": "test_vit",
    "size": 32,
    "batch": 2,
    "turns": 2,
    "warmup": 1,
    "device": "cpu",
}


@pytest.fixture
def eager(monkeypatch):
    """The variants that wait for no compiler."""
    chosen = [x for x in teacher_options.VARIANTS if not any("compile" in options for options in x[1:])]
    monkeypatch.setattr(teacher_options, "VARIANTS", tuple(chosen))
    return chosen


def test_every_variant_is_measured_beside_the_plain_one(eager):
    cases = teacher_options.measured(SETTING)
    assert [case["options"] for case in cases] == [name for name, _, _ in eager]
    plain, half = cases[0], cases[1]
    assert plain["error"] == 0
    assert plain["teacher"]["faster"] == plain["step"]["faster"] == 1
    assert 1e-4 < half["error"] < 0.1
    for case in cases:
        assert 0 < case["teacher"]["ms"] < case["step"]["ms"]


def test_ratios_are_those_of_steps_in_the_same_turn():
    plain, other = (object.__new__(teacher_options.Variant) for _ in range(2))
    plain.teachers, other.teachers = [9.0, 1.0, 2.0, 8.0], [9.0, 1.0, 1.0, 1.0]
    plain.steps, other.steps = [9.0, 4.0, 4.0, 4.0], [1.0, 8.0, 8.0, 2.0]
    found = teacher_options.entry("x", other, plain, 0.123456, turns=3)
    assert found == {
        "options": "x",
        "error": 0.123,
        "teacher": {"ms": 1000.0, "faster": 2.0},
        "step": {"ms": 8000.0, "faster": 0.5},
    }


def test_the_page_shows_the_records(tmp_path, monkeypatch):
    assert teacher_options.page() == losses_page.PAGE.read_text()
    case = {"error": 0.0041, "teacher": {"ms": 12.34, "faster": 2.0}, "step": {"ms": 100.0, "faster": 1.239}}
    record = {
        "setting": copy.deepcopy(SETTING),
        "environment": {"versions": {"torch": "2"}, "hardware": {"cpu": "C", "gpu": None}},
        "cases": [{"options": "teacher.precision=bf16", **case}],
    }
    paths = {"cpu": tmp_path / "record.json", "cuda": tmp_path / "missing.json"}
    paths["cpu"].write_text(json.dumps(record))
    monkeypatch.setattr(
        teacher_options, "record_path", lambda device: tmp_path / f"{'record' * (device == 'cpu')}.json"
    )
    text = teacher_options.page()
    assert "| `teacher.precision=bf16` | 12.3 ms | **2.00** | 100.0 ms | **1.24** | 0.41 % |" in text
    assert "test_resnet learns from test_vit, 2 images of 32x32; C, 1 thread, torch 2, 2 turns." in text
