# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest


@pytest.fixture(scope="module")
def study(tmp_path_factory, head, small):
    """A baseline and a method with the head as teacher, and a record that nobody can read."""
    from kdlvfm.cli import main

    folder = tmp_path_factory.mktemp("study")
    for distiller in ("none", "kd"):
        teacher = ("teacher=from_run", f"teacher.run={head}")
        with pytest.raises(SystemExit) as ended:
            main(["train", *small, *teacher, f"distiller={distiller}", f"out={folder / distiller}"])
        assert not ended.value.code
    (folder / "torn").mkdir()
    (folder / "torn/record.json").write_text("{")
    return folder


def embedded(path):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"))[1])


def test_one_page_with_runs_and_predictions(kdlvfm, study, tmp_path):
    page = tmp_path / "paper/report.html"
    ended = kdlvfm("report", study, "--out", page, "--title", "A study", "--scenes", 2)
    assert ended.code == 0
    assert f"wrote  {page}" in ended.out
    assert f"not used: {study}/torn/record.json" in ended.err
    assert "<title>A study</title>" in page.read_text(encoding="utf-8")
    data = embedded(page)
    (block,) = data["blocks"]
    assert [row["method"] for row in block["rows"]] == ["teacher", "baseline", "kd"]
    assert block["picture"].startswith("data:image/png;base64,")
    assert (
        block["picture_note"] == "2 images of the test split, spread over it; one run of each method, the lowest seed."
    )
    for run in data["runs"].values():
        assert run["record"] == json.loads((page.parent / run["file"]["name"]).read_text())


def test_without_students_it_says_why_there_is_no_picture(kdlvfm, study, tmp_path):
    for name in ("none", "kd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_bytes((study / name / "record.json").read_bytes())
    page = tmp_path / "report.html"
    assert kdlvfm("report", tmp_path, "--out", page).code == 0
    assert embedded(page)["blocks"][0]["picture"] is None
    assert "No run folder holds a finished student" in embedded(page)["blocks"][0]["picture_note"]


def test_a_record_that_asks_to_call_something_else_is_not_drawn(kdlvfm, study, tmp_path):
    record = json.loads((study / "none/record.json").read_text())
    record["config"]["data"] = {"_target_": "os.system", "command": f"touch {tmp_path}/owned"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/record.json").write_text(json.dumps(record))
    (tmp_path / "run/student.safetensors").write_bytes((study / "none/student.safetensors").read_bytes())
    page = tmp_path / "report.html"
    assert kdlvfm("report", tmp_path / "run", "--out", page).code == 0
    assert "asks to call 'os.system'" in embedded(page)["blocks"][0]["picture_note"]
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "ap"], "has test/ap; there is"),
        (["--scenes", "-1"], "--scenes must be at least 0"),
        (["--out", "."], "--out . is a folder; name a file in it, such as report.html"),
    ],
)
def test_bad_calls(arguments, message, kdlvfm, study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = kdlvfm("report", study, *arguments)
    assert ended.code == 1
    assert message in ended.err
    assert not [*tmp_path.iterdir()]
