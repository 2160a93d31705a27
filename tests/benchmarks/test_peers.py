# SPDX-License-Identifier: Apache-2.0
"""What can be said of the comparisons with other libraries without installing any of them."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from kdlvfm.cli.config import compose
from kdlvfm.distillers import cwd_loss

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import lightly_train
import losses_plain
import peers
import peers_environment


@pytest.fixture
def record():
    return json.loads(peers.RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("benchmark", [peers, lightly_train])
def test_the_tables_are_rendered_from_the_records(benchmark):
    if not benchmark.RECORD.exists():
        pytest.skip("not measured yet")
    found = json.loads(benchmark.RECORD.read_text(encoding="utf-8"))
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(found), "write the table again"


def test_where_definitions_agree_so_do_gradients(record):
    assert record["environment"]["versions"]["torch"]
    assert record["peers"].keys() == {*peers.LIBRARIES, *peers.REPOSITORIES}
    for entry in record["cases"]:
        assert (entry["factor"] is None) == (entry["difference"] is None)
        assert entry["factor"] == 1 or entry["apart"]
        if entry["difference"]:
            # Both in float32, which leaves five digits where nearly equal matrices are compared, and fewer where one
            # subtracts a large maximum before a sharp softmax, as the code of CSKD does.
            assert entry["difference"]["gradient"] < (1e-3 if entry["loss"] == "channel_attention" else 5e-5)


def test_a_factor_is_taken_out_before_the_comparison():
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    found = peers.agreement(cwd_loss, lambda *pair: losses_plain.cwd(*pair) / 4, 4.0, inputs)
    assert found["value"] < 1e-5
    assert found["gradient"] < 1e-5
    found = peers.agreement(cwd_loss, losses_plain.cwd, 0.5, inputs)
    assert found == pytest.approx({"value": 0.5, "gradient": 0.5}, rel=0.05)


def test_an_environment_that_is_there_is_taken_as_it_is(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(peers_environment.subprocess, "run", lambda command, **_: ran.append(command))
    (tmp_path / "installed.txt").write_text("a==1\nb==2", encoding="utf-8")
    assert peers_environment.build(tmp_path, ["a==1", "b==2"]) == tmp_path / "bin" / "python"
    assert not ran


def test_a_repository_is_cloned_once_and_at_its_commit(tmp_path, monkeypatch):
    """From a repository on disk, which git is told to take for the public one."""

    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path / "theirs"), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "theirs").mkdir()
    git("init", "--quiet")
    commits = []
    for content in ("one", "two"):
        (tmp_path / "theirs" / "loss.py").write_text(content)
        git("add", ".")
        git("commit", "--quiet", "-m", content)
        commits.append(git("rev-parse", "HEAD"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{tmp_path / 'theirs'}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/some/where")
    place = tmp_path / "repositories" / "some" / "where"
    with pytest.raises(SystemExit, match=f"could not fetch https://github.com/some/where at {'0' * 40}"):
        peers_environment.clone("some/where", "0" * 40, tmp_path / "repositories")
    assert not place.exists()
    peers_environment.clone("some/where", commits[0], tmp_path / "repositories")
    assert (place / "loss.py").read_text() == "one"
    shutil.rmtree(tmp_path / "theirs")
    peers_environment.clone("some/where", commits[0], tmp_path / "repositories")
    with pytest.raises(SystemExit, match=f"is at {commits[0]}, not at {commits[1]}: remove it"):
        peers_environment.clone("some/where", commits[1], tmp_path / "repositories")


def test_both_commands_of_the_comparison_with_lightly_train_are_given_the_same(tmp_path):
    chosen = Namespace(folder=tmp_path, images=tmp_path, count=300, steps=50, batch=16, size=160, device="cpu")
    script, command, *overrides = lightly_train.ours(chosen, tmp_path / "teacher.pt", tmp_path / "out")
    assert (Path(script).name, command) == ("kdlvfm", "train")
    config = compose(overrides)
    their_script, their_command, *options = lightly_train.theirs(chosen, tmp_path / "teacher.pt", tmp_path / "out")
    assert (Path(their_script).name, their_command) == ("lightly-train", "pretrain")
    theirs = dict(option.split("=", 1) for option in options)
    assert str(config["recipe"]["steps"]) == theirs["trainer_args.max_steps"] == "50"
    assert int(theirs["epochs"]) * (chosen.count // chosen.batch) >= chosen.steps
    assert str(config["recipe"]["batch_size"]) == theirs["batch_size"]
    assert str(config["distiller"]["queue_size"]) == theirs["method_args.queue_size"]
    assert config["teacher"]["checkpoint"] == theirs["method_args.teacher_weights"]
    assert config["recipe"]["optimizer"]["lr"] == float(theirs["optim_args.lr"])
    assert theirs["transform_args.image_size"] == "[160,160]"
    for name, added in lightly_train.CASES.items():
        own = compose([*overrides, *added["ours"]])
        assert own["trainer"]["precision"] == ("32-true" if name == "float32" else "bf16-mixed")
        assert (own["teacher_cache"]["mode"] == "build") == (name == lightly_train.STORED)


def test_the_table_of_lightly_train_shows_medians():
    side = {"images_per_second": 10.0, "seconds_to_first_step": 20.0, "seconds": 30.0, "mib": 1000.0}
    both = {"repeats": [{}, {}, {}], "ours": side, "theirs": side, "ours_over_theirs": dict.fromkeys(side, 1.25)}
    record = {
        "setting": {"device": "cpu", "threads": 1, "size": 64, "batch": 4, "steps": 9, "lightly_train": "1"},
        "environment": {"hardware": {"cpu": "a processor", "gpu": None}},
        "cases": [{"case": "float32", **both}, {"case": lightly_train.STORED, "first_run": {"seconds": 95.2}, **both}],
    }
    lines = lightly_train.table(record)
    assert lines[2] == "| float32 | images a second | 10 | 10 | **1.25** |"
    assert lines[-1] == (
        "a processor, 1 thread, 9 steps of 4 images of 64x64, LightlyTrain 1, 3 runs of each. The run that stored the "
        "features took 95 s, one that read them 30 s."
    )
