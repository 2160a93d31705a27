# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def rows(text):
    """Metric -> the two columns of numbers, as they are printed."""
    found = {}
    for line in text.splitlines():
        *name, now, before = line.split() if len(line.split()) > 2 else ("", "", "")
        if name != [""] and name:
            found[" ".join(name)] = (now, before)
    return found


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_numbers_of_the_record_come_out_again(split, kdlvfm, head):
    ended = kdlvfm("evaluate", head, "--split", split)
    assert ended.code == 0, ended.err
    printed, metrics = rows(ended.out), record_of(head)["metrics"][split]
    assert printed["miou"] == (f"{100 * metrics['miou']:.2f}",) * 2
    assert printed["pixel_accuracy"] == (f"{100 * metrics['pixel_accuracy']:.2f}",) * 2
    for name, value in metrics["iou"].items():
        shown = "–" if value is None else f"{100 * value:.2f}"
        assert printed[f"iou {name}"] == (shown, shown)
    assert "note:" not in ended.out


def test_the_training_split_can_be_measured_and_has_no_record(kdlvfm, head):
    ended = kdlvfm("evaluate", head, "--split", "train")
    assert ended.code == 0, ended.err
    assert "in the record" not in ended.out


def test_the_student_can_be_timed_instead(kdlvfm, head):
    ended = kdlvfm("evaluate", head, "--time", "0.5", "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "images of 64x64 pixels (height x width), float32" in ended.out
    assert re.search(r"now +cpu, threads \d+; one image \d+\.\d ms \(median of \d+\)", ended.out)
    assert "miou" not in ended.out
    assert "record  " not in ended.out


def test_evaluating_changes_nothing(kdlvfm, head):
    before = {path: path.stat().st_mtime_ns for path in head.rglob("*")}
    kdlvfm("evaluate", head)
    assert {path: path.stat().st_mtime_ns for path in head.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "holdout"], "no split 'holdout'; it has train, val, test"),
        (["--time", "0"], "--time must be above 0 seconds, not 0."),
        (["--device", "gpu"], "--device gpu cannot be used here"),
        (["--data-root", "elsewhere"], "'root'"),
    ],
)
def test_what_cannot_be_measured(arguments, message, kdlvfm, head):
    ended = kdlvfm("evaluate", head, *arguments)
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert message in ended.err


def test_a_folder_that_is_no_run(kdlvfm, tmp_path):
    ended = kdlvfm("evaluate", tmp_path)
    assert ended.code == 1
    assert ended.err == f"kdlvfm evaluate: error: {tmp_path} is not a run: it has no record.json.\n"


@pytest.mark.parametrize("broken", ["truncated", "another schema", "no weights"])
def test_a_run_that_is_damaged(broken, kdlvfm, head, tmp_path):
    text = (head / "record.json").read_text()
    if broken == "truncated":
        text = text[:400]
    elif broken == "another schema":
        text = text.replace("kdlvfm.run/1", "kdlvfm.run/9")
    (tmp_path / "record.json").write_text(text)
    ended = kdlvfm("evaluate", tmp_path)
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert str(tmp_path) in ended.err
