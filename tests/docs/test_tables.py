# SPDX-License-Identifier: Apache-2.0
"""Tables on the pages are what committed records say, and nothing else."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
tables = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tables)


@pytest.mark.parametrize("place", tables.TABLES, ids=" ".join)
def test_the_table_is_rendered_from_the_records(place):
    assert (ROOT / place[0]).read_text(encoding="utf-8") == tables.filled(*place), "run: python docs/tables.py"


@pytest.mark.parametrize("place", tables.EXPORTS, ids=" ".join)
def test_the_table_of_an_export_is_rendered_from_its_list(place):
    assert (ROOT / place[0]).read_text(encoding="utf-8") == tables.exported(*place), "run: python docs/tables.py"


def test_the_exported_student_is_one_of_the_study():
    listed = json.loads((ROOT / "experiments" / "camvid" / "export.json").read_text(encoding="utf-8"))
    record = ROOT / "experiments" / "camvid" / "records" / "scratch" / "fitnet-seed0" / "record.json"
    assert listed["request"]["record"] == hashlib.sha256(record.read_bytes()).hexdigest()


# Their pages say which files lay in the checkout, untracked.
NOT_CLEAN = {"digit_scenes": (1, 2)}


@pytest.mark.parametrize("experiment", sorted({experiment for _, experiment, _ in tables.TABLES}))
def test_records_are_of_finished_runs_of_a_clean_revision(experiment):
    records = tables.records_of(experiment)
    assert records
    for record in records:
        assert record["status"] == "finished"
        assert record["git"]["dirty"] is (record["seed"] in NOT_CLEAN.get(experiment, ()))


@pytest.mark.parametrize("experiment", ["digit_scenes", "camvid/scratch"])
def test_every_method_has_three_seeds_at_one_revision(experiment):
    records = tables.records_of(experiment)
    assert len({record["git"]["revision"] for record in records}) == 1
    cells = {(record["student"]["name"], record["distiller"]["name"], record["seed"]) for record in records}
    assert len(cells) == len(records) == 3 * len({cell[:2] for cell in cells})


def test_the_demo_has_three_seeds_of_every_method_at_one_revision():
    records = tables.records_of("demo")
    assert len({record["git"]["revision"] for record in records}) == 1
    assert sorted({record["seed"] for record in records}) == [0, 1, 2]
    assert len(records) == 3 * len({record["distiller"]["name"] for record in records})
