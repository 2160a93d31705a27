# SPDX-License-Identifier: Apache-2.0
import base64
import csv
import hashlib
import io
import json
import re
import struct
import subprocess
import sys

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


@pytest.mark.parametrize(
    ("project", "message"),
    [("a:b", "Invalid project name 'a:b'"), ("team/a?", "Invalid project name 'a?'"), ("team/", "names no project")],
)
def test_a_project_that_there_cannot_be(project, message, kdlvfm, study, tmp_path):
    pytest.importorskip("wandb")
    ended = kdlvfm("report", study, "--out", tmp_path / "report.html", "--wandb", project)
    assert ended.code == 1
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_without_wandb_the_extra_is_named(kdlvfm, study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    ended = kdlvfm("report", study, "--out", tmp_path / "report.html", "--wandb", "mine")
    assert (ended.code, ended.err) == (
        1,
        "kdlvfm report: error: wandb is not installed: pip install 'kdlvfm[wandb]'\n",
    )


@pytest.fixture
def wandb_home(tmp_path):
    """An environment in which wandb knows no account and leaves nothing elsewhere."""
    pytest.importorskip("wandb")
    places = ("HOME", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
    return {**dict.fromkeys(places, str(tmp_path)), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": ""}


def transaction_log(path):
    """The messages in a `.wandb` file: LevelDB's log format, blocks of 32 KiB with parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, begun = path.read_bytes(), 7, b""
    while position < len(content):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
        _, length, kind = struct.unpack_from("<IHB", content, position)
        begun += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(begun)
            begun = b""


@pytest.mark.slow
def test_offline_the_table_and_the_page_lie_in_a_folder(shell, wandb_home, study, tmp_path, kdlvfm):
    page = tmp_path / "report.html"
    process = shell(
        "report", study, "--out", page, "--scenes", "0", "--wandb", "team/kd",
        env={**wandb_home, "WANDB_MODE": "offline"},
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert f"wandb sync {folder}" in out

    (file,) = folder.rglob("*.table.json")
    table = json.loads(file.read_text())
    lines = kdlvfm("table", study, "--format", "csv").out
    expected = [*csv.reader(io.StringIO(lines))]
    assert table["columns"] == expected[0]
    assert [["" if value is None else str(value) for value in row] for row in table["data"]] == expected[1:]

    (log,) = folder.glob("*.wandb")
    records = [*transaction_log(log)]
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.entity, run.project, run.job_type) == ("team", "kd", "report")
    (artifact,) = [record.artifact for record in records if record.artifact.type == "report"]
    (entry,) = artifact.manifest.contents
    assert entry.path == "report.html"
    assert entry.digest == base64.b64encode(hashlib.md5(page.read_bytes()).digest()).decode()


@pytest.mark.slow
def test_without_an_account_it_is_one_line_and_the_page_is_there(shell, wandb_home, study, tmp_path):
    page = tmp_path / "report.html"
    process = shell(
        "report",
        study / "none",
        "--out",
        page,
        "--scenes",
        "0",
        "--wandb",
        "kd",
        env=wandb_home,
        stdin=subprocess.DEVNULL,
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("kdlvfm report: error: Weights & Biases: ")
    assert "Traceback" not in err
    assert page.exists()
