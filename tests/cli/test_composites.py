# SPDX-License-Identifier: Apache-2.0
"""Several distillers in one run, from the command line to the table."""

import json
from pathlib import Path

import pytest

import kdlvfm
from kdlvfm.cli.composites import expanded, name_of, names_in
from kdlvfm.cli.config import compose, default_parts
from kdlvfm.cli.run_folder import run_folder

PART = "distiller@distiller.parts."


@pytest.fixture
def few(two_steps, student_of):
    """The options of a run of two steps."""
    return (*two_steps, *student_of("kd"))


def parts_of(*overrides):
    """Part -> class of the distiller."""
    parts = compose(overrides)["distiller"]["parts"]
    return {name: part["_target_"].split(".")[-2] for name, part in parts.items()}


def test_a_choice_is_taken_apart():
    assert names_in("kd") == ["kd"]
    assert names_in("kd+cwd") == ["compose", "kd", "cwd"]
    assert names_in("sckd:kd") == ["sckd", "kd"]
    assert names_in("sckd:kd+cwd+gram") == ["sckd", "kd", "cwd", "gram"]


def test_a_choice_is_put_together():
    assert name_of("compose", ["kd", "cwd"]) == "kd+cwd"
    assert name_of("compose", ["kd"]) == "compose:kd"  # not what `kd` is
    assert name_of("sckd", ["kd"]) == "sckd:kd"
    assert name_of("sckd", ["kd", "cwd"]) == "sckd:kd+cwd"
    for name in ("kd+cwd", "compose:kd", "sckd:kd", "sckd:kd+cwd"):
        wrapper, *parts = names_in(name)
        assert name_of(wrapper, parts) == name


def test_a_choice_is_written_out():
    files = {"compose": {"fitnet": "fitnet", "cwd": "cwd"}}

    def written(*overrides):
        return expanded(overrides, lambda name: files.get(name, {}))

    assert written("seed=1", "distiller=kd", "distiller.temperature=2") == [
        "seed=1", "distiller=kd", "distiller.temperature=2"
    ]  # fmt: skip
    assert written("distiller=kd+cwd") == [
        "distiller=compose", f"+{PART}kd=kd", f"{PART}cwd=cwd", f"~{PART}fitnet"
    ]  # fmt: skip
    assert written("distiller=compose") == ["distiller=compose"]
    assert written("distiller=compose", f"+{PART}kd=kd") == ["distiller=compose", f"+{PART}kd=kd"]
    assert written("distiller=a,b+c") == ["distiller=a,b+c"]


def test_files_of_composites_have_parts_and_others_none():
    assert list(default_parts("compose")) == ["fitnet", "cwd"]
    assert default_parts("sckd")
    assert default_parts("kd") == default_parts("nothing") == {}


def test_the_short_form_is_the_long_one():
    short = compose(["distiller=kd+cwd", "distiller.parts.cwd.loss_weight=5"])
    long = compose(["distiller=compose", f"{PART}kd=kd", f"{PART}cwd=cwd", "distiller.parts.cwd.loss_weight=5"])
    assert short == long
    assert short["distiller"]["parts"]["cwd"]["loss_weight"] == 5
    assert short["choices"]["distiller"] == "kd+cwd"
    assert list(compose(["distiller=cwd+kd"])["distiller"]["parts"]) == ["cwd", "kd"]


def test_parts_have_names_of_their_own_and_settings():
    overrides = (
        "distiller=compose", f"{PART}a=fitnet", f"{PART}b=fitnet", "distiller.parts.a.student_tap=map.2",
        "distiller.weights.a.share=0.1", "distiller.weights.b=2", "distiller.calibrate_every=10",
    )  # fmt: skip
    assert parts_of(*overrides) == {"a": "FitNet", "b": "FitNet"}
    config = compose(overrides)
    assert config["distiller"]["parts"]["a"]["student_tap"] == "map.2"
    assert config["distiller"]["weights"] == {"a": {"share": 0.1}, "b": 2}
    assert config["choices"]["distiller"] == "fitnet+fitnet"


def test_parts_named_replace_those_of_the_file_and_parts_added_join_them():
    assert parts_of("distiller=compose") == {"fitnet": "FitNet", "cwd": "CWD"}
    assert parts_of("distiller=compose", f"{PART}cwd=kd") == {"cwd": "KD"}
    assert parts_of("distiller=compose", f"+{PART}kd=kd") == {"fitnet": "FitNet", "cwd": "CWD", "kd": "KD"}
    assert parts_of("distiller=sckd", f"{PART}kd=kd") == {"kd": "KD"}
    assert parts_of("distiller=sckd:kd+ifvd", "distiller.threshold=0.1") == {"kd": "KD", "ifvd": "IFVD"}


def test_composites_nest():
    config = compose(["distiller=kd+sckd", "distiller.weights.sckd=2"])
    assert list(config["distiller"]["parts"]["sckd"]["parts"]) == list(default_parts("sckd"))
    assert config["choices"]["distiller"] == "kd+sckd"


@pytest.mark.parametrize(
    ("choice", "begins"),
    [("kd+cwd", "kd+cwd-digit_scenes_vit-seed3-"), ("sckd:kd+cwd", "sckd-kd+cwd-digit_scenes_vit-seed3-")],
)
def test_a_folder_bears_the_name(choice, begins):
    config = compose([f"distiller={choice}", "teacher=digit_scenes_vit", "seed=3"])
    assert run_folder(config).name.startswith(begins)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distiller=kdd+cwd"], ["no distiller called 'kdd'", "kd"]),
        (["distiller=kd+cdw"], ["no distiller called 'cdw'", "cwd"]),
        (["distiller=kd+"], ["no distiller called ''"]),
        (["distiller=:kd"], ["no distiller called ''"]),
        (["distiller=skcd:kd"], ["no distiller called 'skcd'", "sckd"]),
        (["distiller=kd:cwd"], ["kd takes no parts", "sckd:kd+cwd"]),
        (["distiller=kd+kd"], ["kd twice", f"{PART}a=kd"]),
        (["distiller=kd", f"{PART}a=cwd"], ["kd takes no parts", "distiller=compose"]),
        (["distiller=compose", f"{PART}a=kdd"], ["no distiller called 'kdd'"]),
        (["distiller=kd+fitnet", "distiller.parts.fitent.loss_weight=2"], ["'fitent' is no method", "kd, fitnet"]),
        (["distiller=kd+fitnet", "distiller.weights.fitent=2"], ["a weight for fitent", "kd, fitnet"]),
        (["distiller=kd+fitnet", "distiller.weights.kd.warmpu=0.1"], ["'kd'", "warmpu", "warmup"]),
        (["distiller=kd+fitnet", "distiller.weights.kd.stop=3"], ["'kd'", "stop <= 1"]),
        (["distiller=kd+fitnet", "distiller.parts.kd.temprature=2"], ["temprature"]),
        (["distiller=sckd:kd+fitnet", "distiller.threshold=3"], ["threshold is a cosine"]),
        (["distiller=sckd:kd+fitnet", "distiller.at=map.9"], ["no tap 'map.9'"]),
        (["distiller=compose", "distiller.parts=3"], ["parts must be distillers by name"]),
        (["distiller=kd,kd+cwd"], ["--multirun"]),
    ],
)
def test_mistakes_end_with_one_line(few, overrides, words, kdlvfm, tmp_path):
    out = tmp_path / "refused"
    ended = kdlvfm("train", *few, f"out={out}", *overrides)
    assert ended.code == 1
    assert ended.err.startswith("kdlvfm train: error: ")
    assert ended.err.count("\n") == 1
    assert all(word in ended.err for word in words), ended.err
    assert not out.exists()


@pytest.mark.slow
def test_a_tap_that_a_term_does_not_depend_on_fails_the_run_with_advice(few, kdlvfm, tmp_path):
    out = tmp_path / "run"
    early = ("distiller=sckd:kd+fitnet", "distiller.parts.fitnet.student_tap=map.1", "distiller.at=map.-1")
    ended = kdlvfm("train", *few, f"out={out}", *early)
    assert ended.code == 1
    assert "fitnet/fitnet cannot be judged at=map.-1" in ended.err
    assert "set at to null" in ended.err
    assert kdlvfm("train", *few, f"out={tmp_path / 'better'}", *early, "distiller.at=map.1").code == 0


@pytest.mark.slow
def test_a_whole_run_is_recorded_and_tabulated(few, kdlvfm, tmp_path):
    settings = ("distiller.parts.fitnet.loss_weight=5", "distiller.weights.kd.share=0.2")
    for name, distiller in (("one", ("distiller=fitnet",)), ("both", ("distiller=kd+fitnet", *settings))):
        ended = kdlvfm("train", *few, *distiller, f"out={tmp_path / name}")
        assert ended.code == 0, ended.err
    assert "distiller  kd+fitnet, student logits, map.-1" in ended.out
    alone, record = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("one", "both"))
    assert record["status"] == "finished"
    assert record["name"] == "kd+fitnet-seed0"
    assert record["distiller"] == {
        "name": "kd+fitnet",
        "settings": {
            "parts": {"kd": {"method": "KD"}, "fitnet": {"method": "FitNet", "loss_weight": 5}},
            "weights": {"kd": {"share": 0.2}},
        },
        "parameters": alone["distiller"]["parameters"],
        "student_taps": ["logits", "map.-1"],
        "teacher_taps": ["logits", "map.-1"],
    }
    assert record["recipe_hash"] == alone["recipe_hash"]
    shown = kdlvfm("table", tmp_path, "--format", "csv")
    assert "kd+fitnet" in shown.out


@pytest.mark.slow
def test_a_sweep_over_composites(few, shell, tmp_path):
    environment = {"PYTHONPATH": str(Path(kdlvfm.__file__).parents[1])}
    choices = ("distiller=none,kd+cwd,sckd:gram", "recipe.steps=1")
    sweep = shell("train", "-m", *few, *choices, cwd=tmp_path, env=environment)
    out, err = sweep.communicate(timeout=500)
    assert sweep.returncode == 0, err
    found = [json.loads(path.read_text()) for path in tmp_path.rglob("record.json")]
    assert sorted(record["distiller"]["name"] for record in found) == ["kd+cwd", "none", "sckd:gram"]
    assert "3 done of 3 cells" in out
    assert "kd+cwd seed 0: done" in out
