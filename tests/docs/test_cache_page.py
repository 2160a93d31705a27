# SPDX-License-Identifier: Apache-2.0
"""The table of docs/cache.md is what the committed record of the benchmark says."""

import importlib.util
import json
from pathlib import Path
from statistics import median

import pytest

_FILE = Path(__file__).parents[2] / "benchmarks" / "teacher_cache.py"
_SPEC = importlib.util.spec_from_file_location("benchmark", _FILE)
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)


@pytest.fixture
def record():
    return json.loads(benchmark.RECORD.read_text(encoding="utf-8"))


def test_the_table_is_rendered_from_the_record(record):
    again = "run: python benchmarks/teacher_cache.py --table"
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(record), again


def test_the_record_says_where_it_was_measured_and_its_ratios_are_medians(record):
    assert record["environment"]["hardware"]["cpu"]
    assert record["environment"]["versions"]["torch"]
    for case in record["cases"]:
        assert len(case["ratios"]) == record["setting"]["repeats"] >= 3
        assert case["ratio"] == pytest.approx(median(case["ratios"]), abs=0.011)
