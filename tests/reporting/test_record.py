# SPDX-License-Identifier: Apache-2.0
import copy
import hashlib
import json
import subprocess
from importlib import resources

import pytest
from jsonschema import Draft202012Validator

from kdlvfm.reporting import record as module
from kdlvfm.reporting.record import (
    RecordError,
    config_hash,
    differences,
    environment,
    identity,
    now,
    read_record,
    recipe,
    recipe_hash,
    write_record,
)

CONFIG = {
    "seed": 0,
    "out": "runs/a",
    "logger": {"name": "csv"},
    "run": {"name": "a"},
    "distiller": {"temperature": 4.0},
    "teacher": {"name": "vit"},
    "data": {"root": "/a", "num_workers": 0, "seed": 0, "size": [64, 64]},
    "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "max_steps": 10},
}


def changed(*path, value):
    config = copy.deepcopy(CONFIG)
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return config


def test_schema_is_a_valid_schema():
    schema = json.loads(resources.files("kdlvfm.reporting").joinpath("run_schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    # Records from before there were these are valid too.
    later = {"diagnostics", "inference", "per_image", "teacher_cache"}
    assert set(schema["properties"]) == {*schema["required"], *later}


LONGER = {"run": "runs/kd-0", "method": "kd", "method_hash": "a" * 12, "recipe_hash": "b" * 12, "steps": 20}


def test_no_second_baseline_is_what_there_was_before_there_could_be_one():
    config = changed("equal_time", value=None)
    assert (config_hash(config), recipe_hash(config)) == (config_hash(CONFIG), recipe_hash(CONFIG))
    assert differences(CONFIG, config) == []


def test_a_baseline_of_equal_time_is_a_run_of_its_own_in_the_recipe_of_the_method():
    config = changed("equal_time", value=LONGER)
    config["trainer"]["max_steps"] = 20
    assert config_hash(config) != config_hash(CONFIG)
    assert recipe_hash(config) == LONGER["recipe_hash"]
    moved = changed("equal_time", value={**LONGER, "run": "elsewhere"})
    assert config_hash(moved) == config_hash(changed("equal_time", value=LONGER))


def test_differences_of_the_recipe_leave_out_method_and_seed():
    other = changed("distiller", "temperature", value=1.0)
    other["seed"], other["trainer"]["max_steps"] = 1, 20
    assert differences(CONFIG, other, recipe) == ["trainer.max_steps: 10 != 20"]


def test_config_hash_is_that_of_canonical_json():
    config = {"b": 1, "a": {"y": [1, 2], "x": None}}
    expected = hashlib.sha256(b'{"a":{"x":null,"y":[1,2]},"b":1}').hexdigest()[:12]
    assert config_hash(config) == expected
    assert config_hash({"a": {"x": None, "y": [1, 2]}, "b": 1}) == expected


@pytest.mark.parametrize(
    "path",
    [
        ("choices",),
        ("out",),
        ("run",),
        ("logger",),
        ("data", "root"),
        ("data", "num_workers"),
        ("trainer", "accelerator"),
        ("trainer", "devices"),
        ("trainer", "num_nodes"),
        ("trainer", "strategy"),
    ],
)
def test_identity_ignores_what_cannot_change_a_result(path):
    before = copy.deepcopy(CONFIG)
    other = changed(*path, value="something else")
    assert config_hash(other) == config_hash(CONFIG)
    assert differences(CONFIG, other) == []
    assert before == CONFIG


@pytest.mark.parametrize("path", [("seed",), ("distiller", "temperature"), ("data", "size"), ("trainer", "max_steps")])
def test_identity_keeps_what_can_change_a_result(path):
    other = changed(*path, value=7)
    assert config_hash(other) != config_hash(CONFIG)
    assert [line.partition(":")[0] for line in differences(CONFIG, other)] == [".".join(path)]


def test_identity_of_groups_that_are_no_mappings():
    assert identity({"data": None, "trainer": "cpu", "out": 1}) == {"data": None, "trainer": "cpu"}


def test_recipe_hash_is_shared_by_methods_teachers_and_seeds_only():
    same = changed("distiller", value={"name": "none"})
    same["teacher"] = None
    same["seed"] = same["data"]["seed"] = 3
    assert recipe_hash(same) == recipe_hash(CONFIG)
    assert recipe_hash(changed("trainer", "max_steps", value=11)) != recipe_hash(CONFIG)
    assert recipe_hash(changed("data", "size", value=[32, 32])) != recipe_hash(CONFIG)


def test_differences_name_key_and_both_values():
    a = {"lr": 0.1, "data": {"size": [64, 64]}, "head": {}}
    b = {"lr": 0.2, "data": {"size": [64, 64], "stream": True}, "head": {}}
    assert differences(a, b) == ["data.stream: (absent) != true", "lr: 0.1 != 0.2"]


def test_config_that_is_not_plain_data_is_refused():
    with pytest.raises(RecordError, match="not plain data"):
        config_hash({"a": object()})


def test_write_then_read(tmp_path, make_record):
    path = tmp_path / "record.json"
    for record in (make_record("kd"), make_record("none", status="running", teacher=None)):
        write_record(path, record)
        assert read_record(path) == record
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": "0"}, "seed"),
        ({"status": "done"}, "status"),
        ({"colour": "red"}, "'colour' was unexpected"),
        ({"started": "yesterday"}, "started"),
        ({"ended": None}, "ended"),
        ({"cost": None}, "cost"),
        ({"status": "failed"}, "error"),
        ({"status": "failed", "error": " "}, "error"),
        ({"metrics": {"test": {"miou": "high"}}}, "metrics.test.miou"),
        ({"metrics": {"test": {"iou": {"car": 45.0}}}}, "metrics.test.iou.car"),
        ({"curve": [{"step": 1}]}, r"curve\[0\]"),
        ({"git": {"revision": "main", "dirty": False}}, "git.revision"),
        ({"config_hash": "xyz"}, "config_hash"),
        ({"metrics": {"test": {"miou": float("nan")}}}, "not plain JSON"),
    ],
)
def test_wrong_record_is_refused_by_the_name_of_its_field(tmp_path, make_record, change, field):
    path = tmp_path / "record.json"
    good = make_record()
    write_record(path, good)
    with pytest.raises(RecordError, match=f"record.json.*{field}"):
        write_record(path, {**good, **change})
    assert read_record(path) == good


@pytest.mark.parametrize("field", ["schema", "seed", "status", "student", "task", "versions"])
def test_missing_field_is_named(tmp_path, make_record, field):
    path = tmp_path / "record.json"
    record = make_record()
    del record[field]
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match=f"'{field}' is a required property"):
        read_record(path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"{", "not a JSON file"), (b"\xff\xfe\x00", "not a JSON file"), (b"[NaN]", "NaN is not"), (b"[]", "record: ")],
)
def test_unreadable_record_is_named_with_its_cause(tmp_path, content, cause):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=f"record.json: .*{cause}"):
        read_record(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"record\.json: No such file"):
        read_record(tmp_path / "record.json")


def test_environment_and_time_make_a_valid_record(tmp_path, make_record):
    record = {**make_record(), **environment(), "started": now(), "ended": now()}
    write_record(tmp_path / "record.json", record)
    assert record["versions"]["kdlvfm"]


def test_git_reads_the_working_directory_and_never_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages" / "kdlvfm" / "reporting" / "record.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert environment()["git"] is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert environment()["git"] == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "new.py").touch()
    assert environment()["git"]["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] is None


@pytest.mark.parametrize("group", ["trainer", "teacher"])
def test_a_setting_that_is_off_is_as_one_that_older_runs_lack(group):
    def hash_with(**settings):
        config = copy.deepcopy(CONFIG)
        config[group] = {**(config[group] or {}), **settings}
        return config_hash(config)

    assert hash_with(compile=False, channels_last=False) == hash_with()
    assert len({hash_with(), hash_with(compile=True), hash_with(channels_last=True)}) == 3
    if group == "teacher":
        assert hash_with(precision=None, batch=None) == hash_with()
        assert len({hash_with(), hash_with(precision="bf16"), hash_with(batch=1)}) == 3


def test_where_a_teacher_computes_changes_nothing():
    assert config_hash({**CONFIG, "run": {"teacher_device": "cuda:1"}}) == config_hash(CONFIG)
