# SPDX-License-Identifier: Apache-2.0
import csv
import io

import pytest
from rich.console import Console

from kdlvfm.reporting.block import Table
from kdlvfm.reporting.render import to_csv, to_markdown, to_rich
from kdlvfm.reporting.tables import summarise


@pytest.fixture
def table(make_record):
    baseline = [0.40, 0.44, 0.42]
    records = [make_record("none", seed, score, teacher=None) for seed, score in enumerate(baseline)]
    for name, gain in {"kd": 0.1, "fitnet": -0.05}.items():
        scores = [score + gain + 0.001 * seed for seed, score in enumerate(baseline)]
        records += [make_record(name, seed, score) for seed, score in enumerate(scores)]
    return summarise([*records, make_record("cwd", 0, status="failed", error="it broke | badly")])


def in_terminal(table, width=120, **options):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(to_rich(table, **options))
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


def cells_of(markdown):
    """Method -> the cells of its line, by the heads of the columns."""
    head, _, *lines = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    names = [name.strip().partition("<br>")[0] for name in head]
    return {line[0].strip(): dict(zip(names, map(str.strip, line), strict=True)) for line in lines}


def test_a_second_baseline_and_a_paper_have_columns_in_the_place_of_costs(rich_table, table):
    cells = cells_of(to_markdown(rich_table))
    assert list(cells) == ["teacher", "baseline", "baseline, equal time to kd", "cwd", "kd"]
    assert list(cells["kd"]) == ["method", "mIoU", "vs baseline", "vs equal time", "gap", "paper", "seeds"]
    assert cells["kd"]["vs baseline"] == "+12.0 [+10.0, +14.0]†"
    assert cells["kd"]["vs equal time"] == "+7.0"
    assert cells["kd"]["paper"] == "68.2 [1]"
    assert (cells["cwd"]["vs equal time"], cells["cwd"]["paper"]) == ("–", "–")
    assert cells["baseline, equal time to kd"]["vs baseline"] == "+5.0"
    assert "- [1] Published: a paper." in to_markdown(rich_table)
    assert not {"vs equal time", "paper"} & set(cells_of(to_markdown(table))["kd"])


def test_costs_have_a_view_of_their_own(rich_table, table):
    text = to_markdown(rich_table, cost=True)
    cells = cells_of(text)
    assert list(cells["kd"]) == [
        *("method", "mIoU", "params", "MACs", "latency", "inference", "trained", "training", "teacher", "seeds"),
    ]
    assert (cells["kd"]["latency"], cells["kd"]["inference"], cells["kd"]["trained"]) == ("12.3 / 14.5", "321", "1.7")
    assert cells["cwd"]["latency"] == "–"
    (note,) = [line for line in text.splitlines() if line.startswith("- ")]
    assert "the student alone on cpu, 1 thread, float32, images of 64x96 pixels (height x width)" in note
    assert "from 100 repetitions or more; images/s in batches of 32." in note
    assert "latency" not in cells_of(to_markdown(table, cost=True))["kd"]


def test_costs_of_different_machines_are_said_not_to_compare(make_record):
    records = [make_record("none", teacher=None), make_record("kd")]
    records[1]["hardware"] = {**records[1]["hardware"], "threads": 8}
    assert "different machines: their images/s do not compare" in to_markdown(summarise(records), cost=True)


@pytest.mark.parametrize("cost", [False, True])
def test_every_view_fits_120_columns(cost, rich_table, table):
    for shown in (rich_table, table):
        text = in_terminal(shown, cost=cost)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 120
        assert any(line.split()[:1] == ["kd"] for line in text.splitlines())


def test_csv_has_every_column(rich_table):
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(to_csv(rich_table)))}
    kd = rows["kd"]
    assert (kd["difference_interval_over"], rows["cwd"]["difference_interval_over"]) == ("images", "")
    assert float(kd["difference_to_equal_time_fraction"]) == pytest.approx(0.07)
    assert (kd["published_fraction"], kd["latency_p50_seconds"]) == ("0.6821", "0.0123")
    assert (kd["latency_p95_seconds"], kd["inference_images_per_second"]) == ("0.0145", "321.0")
    assert rows["baseline, equal time to kd"]["role"] == "equal_time"


def test_empty_table():
    assert (to_csv(Table(())), to_markdown(Table(())), in_terminal(Table(())).strip()) == ("", "", "")
