# SPDX-License-Identifier: Apache-2.0
"""Metrics of which less is better: shown as plain numbers, and better is what is lower."""

import csv
import io
import json

import pytest

from kdlvfm.reporting.latex import to_latex
from kdlvfm.reporting.model_index import to_model_index
from kdlvfm.reporting.reading import DISTANCE, FRACTION, reading_of
from kdlvfm.reporting.record import read_record, write_record
from kdlvfm.reporting.render import to_csv, to_markdown
from kdlvfm.reporting.tables import summarise

TASK = {"name": "diffusion", "primary_metric": "frechet_distance", "distances": ["frechet_distance"]}
TEACHER = 2.0
BASELINE = (10.0, 10.5, 9.6)


@pytest.fixture
def records(make_record):
    """A baseline at 10, one method below it and one above it, a teacher at 2."""
    base = make_record()["teacher"]
    card = {**base, "metrics": {"test": {"frechet_distance": TEACHER}}}

    def one(distiller, seed, distance, **cost):
        made = make_record(distiller, seed, task=TASK, teacher=None if distiller == "none" else card)
        made["metrics"] = {"test": {"frechet_distance": distance, "share": 0.25}}
        made["cost"].update(cost)
        return made

    return [
        *(one("none", seed, value, teacher_images=0) for seed, value in enumerate(BASELINE)),
        *(one("dkdm", seed, value - 4 - 0.1 * seed, teacher_images=64_000) for seed, value in enumerate(BASELINE)),
        *(one("worse", seed, value + 3 + 0.1 * seed) for seed, value in enumerate(BASELINE)),
    ]


def test_lower_is_better_and_closes_the_gap(records, rows_of):
    block, rows = rows_of(records)
    assert block.reading is DISTANCE
    assert {name: row.difference.verdict for name, row in rows.items() if row.role == "method"} == {
        "dkdm": "better",
        "worse": "worse",
    }
    assert rows["dkdm"].difference.mean == pytest.approx(-4.1)
    mean = sum(BASELINE) / 3
    assert rows["dkdm"].gap_closed == pytest.approx(4.1 / (mean - TEACHER))
    low, high = rows["dkdm"].gap_interval
    assert low < rows["dkdm"].gap_closed < high
    assert rows["worse"].gap_closed < 0
    assert not block.warnings


def test_a_teacher_that_is_farther_away_leaves_no_gap(records, rows_of):
    for record in records:
        if record["teacher"]:
            record["teacher"]["metrics"]["test"]["frechet_distance"] = 11.0
    block, rows = rows_of(records)
    assert rows["dkdm"].gap_closed is None
    assert any("no better than the baseline" in line for line in block.warnings)


def test_tables_show_plain_numbers(records):
    table = summarise(records)
    (head,) = [line for line in to_markdown(table).splitlines() if line.startswith("| method")]
    assert "| FD<br>less is better | vs baseline<br>[95 % CI] |" in head
    (line,) = [line for line in to_markdown(table).splitlines() if line.startswith("| dkdm")]
    assert "| 5.933 ± 0.503 | -4.100 [" in line
    (line,) = [line for line in to_markdown(table, cost=True).splitlines() if line.startswith("| dkdm")]
    assert "| 64.0 |" in line
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(to_csv(table)))}
    assert float(rows["dkdm"]["mean_fraction"]) == pytest.approx(sum(BASELINE) / 3 - 4.1)
    assert rows["dkdm"]["less_is_better"] == "True"
    assert rows["dkdm"]["teacher_images"] == "64000.0"


def test_papers_and_model_cards_have_the_lower_one_for_the_best(records):
    table = summarise(records)
    text = to_latex(table)
    assert r"\textbf{5.933}" in text
    assert "13.133" in text.replace(r"\textbf", "")
    assert "less is better" in text
    assert "type: unconditional-image-generation" in to_model_index(table, {}, None)


def test_other_metrics_of_the_task_stay_fractions(records):
    assert reading_of(records[0], "share") is FRACTION
    (line,) = [line for line in to_markdown(summarise(records, metric="share")).splitlines() if "| dkdm" in line]
    assert "| 25.0 ± 0.0 |" in line


def test_records_without_the_field_have_fractions(make_record):
    assert reading_of(make_record(), "miou") is FRACTION
    assert FRACTION.text(0.1234) == "12.34 %"
    assert DISTANCE.text(3.56312) == "3.563"


def test_a_record_may_say_so(records, tmp_path):
    write_record(tmp_path / "record.json", records[3])
    assert read_record(tmp_path / "record.json") == json.loads((tmp_path / "record.json").read_text()) == records[3]
