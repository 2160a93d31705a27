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
    assert (tmp_path / "paper/figure.svg").read_text().startswith("<?xml")
    assert (tmp_path / "paper/figure.pdf").read_bytes().startswith(b"%PDF")


def test_one_seed_is_compared_over_images(kdlvfm, study):
    rows = list(csv.DictReader(io.StringIO(kdlvfm("table", study, "--format", "csv").out)))
    for row in rows:
        assert row["difference_interval_over"] == ("images" if row["role"] == "method" else "")
        assert row["verdict"] == ""
    assert "† One seed: 95 % interval over the images of the test split" in kdlvfm("table", study).out


def test_costs_are_shown_and_written_where_asked(kdlvfm, study, tmp_path):
    ended = kdlvfm("table", study, "--cost", "--format", "markdown", "--out", tmp_path / "paper")
    assert "| trained<br>min |" in ended.out
    assert "vs baseline" not in ended.out
    assert (tmp_path / "paper/cost.md").read_text() == ended.out
    assert "vs baseline" in (tmp_path / "paper/table.md").read_text()
    assert r"\begin{table}" in (tmp_path / "paper/cost.tex").read_text()
    refused = kdlvfm("table", study, "--cost", "--format", "csv")
    assert refused.err == "kdlvfm table: error: --cost chooses columns, which csv does not need: leave it out.\n"


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


def test_a_model_index_names_papers_and_where_the_records_are(kdlvfm, study):
    import yaml

    ended = kdlvfm("table", study, "--format", "model-index", "--source", "https://example.org")
    assert ended.code == 0
    found = yaml.safe_load(ended.out)["model-index"]
    assert [entry["name"].split(", ")[1].split(" (")[0] for entry in found] == ["baseline", "cwd", "kd"]
    assert {entry["results"][0]["source"]["url"] for entry in found} == {"https://example.org"}
    assert "# kd: Hinton et al., Distilling the Knowledge in a Neural Network, 2015\n" in ended.out


def test_a_source_is_for_a_model_index(kdlvfm, study):
    ended = kdlvfm("table", study, "--source", "https://example.org")
    assert (ended.code, ended.out) == (1, "")
    assert "add --format model-index" in ended.err
