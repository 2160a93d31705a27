# SPDX-License-Identifier: Apache-2.0
import csv
import io

import pytest
from rich.console import Console

from kdlvfm.reporting.render import to_csv, to_markdown, to_rich
from kdlvfm.reporting.tables import Table, summarise


@pytest.fixture
def table(make_record):
    baseline = [0.40, 0.44, 0.42]
    records = [make_record("none", seed, score, teacher=None) for seed, score in enumerate(baseline)]
    for name, gain in {"kd": 0.1, "fitnet": -0.05}.items():
        scores = [score + gain + 0.001 * seed for seed, score in enumerate(baseline)]
        records += [make_record(name, seed, score) for seed, score in enumerate(scores)]
    return summarise([*records, make_record("cwd", 0, status="failed", error="it broke | badly")])


def in_terminal(table, width=120):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(to_rich(table))
    return console.file.getvalue()


def test_terminal_fits_120_columns_and_cuts_nothing(table):
    text = in_terminal(table)
    assert "…" not in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert "42.0 ± 2.0" in lines["baseline"]
    assert "80.0" in lines["teacher"]
    assert "+10.1 [+9.9, +10.3]" in lines["kd"]
    assert "better" in lines["kd"]
    assert "worse" in lines["fitnet"]
    assert "1 failed" in lines["cwd"]
    assert "cwd, seed 0 failed: it broke | badly" in text
    assert "dinov3-license" in text


def test_random_teacher_is_loud_in_every_rendering(make_record):
    card = make_record()["teacher"] | {"weights": "random", "licence": None}
    table = summarise([make_record("none", teacher=None), make_record("kd", teacher=card)])
    for text in (in_terminal(table), to_markdown(table)):
        assert "RANDOM weights" in text
        assert "weights are RANDOM" in text
    assert ",random," in to_csv(table)


def test_verdict_has_a_column_only_where_there_is_one(make_record, table):
    few = summarise([make_record("none", teacher=None), make_record("kd")])
    assert "| verdict |" in to_markdown(table)
    assert "| verdict |" not in to_markdown(few)


def test_markdown_lines_have_equal_numbers_of_cells(table):
    text = to_markdown(table)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    assert len({line.count("|") for line in lines}) == 1
    assert "| kd | 52.1 ± 2.1 | +10.1 [+9.9, +10.3] | 27 [23, 31] | better | 12.3 | 0.35 | 12 | 25 | 3 |" in lines
    assert "- cwd, seed 0 failed: it broke | badly" in text


def test_markdown_escapes_bars(make_record):
    records = [make_record("kd", settings={"tap": tap}) for tap in ("a|b", "c")]
    assert 'kd tap="a\\|b"' in to_markdown(summarise(records))


def test_csv_has_full_precision(table):
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(to_csv(table)))}
    kd = next(row for row in table.blocks[0].rows if row.method == "kd")
    assert float(rows["kd"]["mean_fraction"]) == kd.score.mean
    assert float(rows["kd"]["difference_low_95_fraction"]) == kd.difference.interval[0]
    assert float(rows["kd"]["gap_closed_fraction"]) == kd.gap_closed
    assert rows["kd"]["verdict"] == "better"
    assert rows["kd"]["finished"] == "3"
    assert rows["cwd"]["mean_fraction"] == ""
    assert rows["cwd"]["failed"] == "1"
    assert rows["teacher"]["teacher_licence"] == "dinov3-license"


def test_empty_table():
    assert (to_csv(Table(())), to_markdown(Table(())), in_terminal(Table(())).strip()) == ("", "", "")
