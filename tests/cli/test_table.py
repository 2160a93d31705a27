# SPDX-License-Identifier: Apache-2.0
import csv
import io

import pytest


@pytest.fixture(scope="module")
def study(tmp_path_factory, head, small):
    """A baseline and two methods with the head as teacher, and two records that nobody can read."""
    from kdlvfm.cli import main

    folder = tmp_path_factory.mktemp("study")
    for distiller in ("none", "kd", "cwd"):
        teacher = ("teacher=from_run", f"teacher.run={head}")
        with pytest.raises(SystemExit) as ended:
            main(["train", *small, *teacher, f"distiller={distiller}", f"out={folder / distiller}"])
        assert not ended.value.code
    for name, text in (("torn", '{"schema": "kdlvfm.run/1", '), ("foreign", '{"schema": "other"}')):
        (folder / name).mkdir()
        (folder / name / "record.json").write_text(text)
    return folder


def test_teacher_baseline_and_methods_are_shown_and_the_rest_is_named(kdlvfm, study):
    ended = kdlvfm("table", study)
    assert ended.code == 0
    for word in ("teacher", "baseline", "kd", "cwd"):
        assert word in ended.out
    refused = [line for line in ended.err.splitlines() if line.startswith("not used: ")]
    assert len(refused) == 2
    assert f"{study}/torn/record.json" in ended.err
    assert f"{study}/foreign/record.json" in ended.err


def test_csv_is_csv_and_has_a_row_for_each(kdlvfm, study):
    ended = kdlvfm("table", study, "--format", "csv")
    table = list(csv.reader(io.StringIO(ended.out)))
    assert len(table) >= 5
    assert {len(row) for row in table} == {len(table[0])}


def test_it_is_written_where_asked(kdlvfm, study, tmp_path):
    ended = kdlvfm("table", study, "--format", "markdown", "--out", tmp_path / "paper")
    assert (tmp_path / "paper/table.md").read_text() == ended.out
    assert (tmp_path / "paper/table.csv").read_text() == kdlvfm("table", study, "--format", "csv").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--metric", "ap"], "has test/ap; there is"), (["--split", "holdout"], "has holdout/miou; there is")],
)
def test_a_metric_that_no_run_has(arguments, message, kdlvfm, study):
    ended = kdlvfm("table", study, *arguments)
    assert ended.code == 1
    assert message in ended.err


def test_nothing_to_show(kdlvfm, tmp_path):
    ended = kdlvfm("table", tmp_path, tmp_path / "nowhere")
    assert ended.code == 1
    assert f"not used: {tmp_path}: no record.json below" in ended.err
    assert "nowhere: does not exist" in ended.err
