# SPDX-License-Identifier: Apache-2.0
"""Sweeps: their cells, what is on disk about them, and cells side by side on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import kdlvfm.cli.config
from kdlvfm.cli import CommandError
from kdlvfm.cli.config import compose
from kdlvfm.cli.launch import _environment
from kdlvfm.cli.lock import LOCK, RunLock, RunTakenError, owner
from kdlvfm.cli.run_folder import run_folder
from kdlvfm.cli.sweep import State, Sweep, cell_of, find, plan
from kdlvfm.reporting.record import config_hash, write_record


def names(sweep):
    return [cell.name for cell in sweep.cells]


def test_cells_are_the_combinations_named_by_their_configurations(small):
    sweep, launchers = plan([*small, "distiller=none,kd+gram,sckd:kd", "seed=0,1", "teacher=timm", "teacher.name=a"])
    assert names(sweep) == [f"{method} seed {seed}" for method in ("none", "kd+gram", "sckd:kd") for seed in (0, 1)]
    for cell in sweep.cells:
        config = compose(cell.overrides)
        assert cell.hash == config_hash(config)
        assert cell.folder == run_folder(config)
        assert launchers[cell].kind == "local"
    assert sweep.cells[4].overrides[-4:] == ("distiller=sckd:kd", "seed=0", "teacher=timm", "teacher.name=a")


def test_the_same_run_is_one_cell(small):
    sweep, _ = plan([*small, "teacher=timm", "distiller=none,kd", "teacher.name=a,b", "seed=0"])
    assert names(sweep) == ["none teacher.name=a seed 0", "kd teacher.name=a seed 0", "kd teacher.name=b seed 0"]


def test_out_is_the_folder_of_the_sweep_and_neither_it_nor_the_launcher_changes_a_cell(small):
    without, _ = plan([*small, "seed=0,1"])
    sweep, launchers = plan([*small, "seed=0,1", "out=here", "launcher=slurm", "launcher.partition=gpu,cpu"])
    assert [cell.hash for cell in sweep.cells] == [cell.hash for cell in without.cells]
    assert sweep.folder.parts[:2] == ("here", "sweeps")
    assert sweep.folder.name == without.folder.name
    assert all(cell.folder.parent == Path("here") and cell.hash[:6] in cell.folder.name for cell in sweep.cells)
    assert not any("launcher" in override for cell in sweep.cells for override in cell.overrides)
    assert {launcher.kind for launcher in launchers.values()} == {"slurm"}


def test_an_experiment_may_hold_the_sweep_and_the_command_wins(small, tmp_path, monkeypatch):
    configs = tmp_path / "configs"
    shutil.copytree(kdlvfm.cli.config.config_dir(), configs)
    text = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      distiller: none,kd+gram\n      seed: 0,1\n"
    (configs / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(kdlvfm.cli.config, "config_dir", lambda: configs)
    overrides = [*small, "experiment=mine", "teacher=timm", "teacher.name=a"]
    assert names(plan(overrides)[0]) == ["none seed 0", "none seed 1", "kd+gram seed 0", "kd+gram seed 1"]
    assert names(plan([*overrides, "seed=5"])[0]) == ["none seed 5", "kd+gram seed 5"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("out=a,b",), "one"),
        (("distiller=none,cdw",), "Did you mean"),
        (("seed=interval(0,1)",), "INTERVAL"),
        (("recipe.nothing=1,2",), "nothing"),
        (("launcher=slrum",), "Did you mean"),
        (("launcher.jobs=0",), "launcher.jobs must be a number from 1"),
        (("launcher.jobs=true",), "launcher.jobs must be a number from 1"),
        (("launcher.retry=maybe",), "launcher.retry must be true or false"),
        (("launcher=slurm", "trainer=ddp"), "needs a number for trainer.devices, not 'auto'"),
        (("--print-config",), "leave -m out"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_starts(overrides, said, kdlvfm, small, tmp_path):
    ended = kdlvfm("train", "-m", *small, f"out={tmp_path / 'sweep'}", *overrides)
    assert ended.code == 1
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_a_launcher_is_for_sweeps(kdlvfm, small):
    ended = kdlvfm("train", *small, "launcher.jobs=2")
    assert (ended.code, ended.err) == (1, "kdlvfm train: error: launcher= is about sweeps: add -m.\n")


def test_two_configurations_in_one_folder_are_refused(small):
    cells = [cell_of([*small, f"seed={seed}", "out=same"])[0] for seed in (0, 1)]
    with pytest.raises(CommandError, match="one folder, same"):
        Sweep.of(Path(), cells)


@pytest.fixture
def sweep(small, tmp_path):
    sweep, _ = plan([*small, "seed=0,1,2,3,4,5", f"out={tmp_path}"])
    sweep.write()
    return sweep


def test_the_list_of_cells_comes_back(sweep, tmp_path):
    assert find([tmp_path]) == [sweep]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "x/1"}', '{"schema": "kdlvfm.sweep/1", "cells": [{}]}'])
def test_a_broken_list_of_cells_is_one_line(text, sweep, kdlvfm):
    (sweep.folder / "sweep.json").write_text(text)
    ended = kdlvfm("status", sweep.folder)
    assert ended.code == 1
    assert str(sweep.folder / "sweep.json") in ended.err
    assert ended.err.count("\n") == 1


def test_no_sweep(kdlvfm, tmp_path):
    ended = kdlvfm("status", tmp_path)
    assert ended.code == 1
    assert "there is no sweep in" in ended.err


HOLD = """
import sys, time
from pathlib import Path
from kdlvfm.cli.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold():
    """Processes that have the lock of a folder."""
    started = []

    def start(folder):
        folder.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_one_process_has_the_lock_and_is_named(hold, tmp_path):
    process = hold(tmp_path)
    assert f"process {process.pid} on " in owner(tmp_path)
    with pytest.raises(RunTakenError, match=f"process {process.pid} on .*; nothing was started"), RunLock(tmp_path):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / LOCK).exists()
    assert owner(tmp_path) is None
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_run_that_another_process_computes_is_left_alone(hold, train, tmp_path):
    hold(tmp_path / "run")
    ended = train("distiller=none", f"out={tmp_path / 'run'}")
    assert ended.code == 75
    assert "is being computed by process" in ended.err
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]


def test_states_and_what_is_due(sweep, hold, head, kdlvfm):
    done, running, killed, failed, refused, waiting = sweep.cells
    finished = json.loads((head / "record.json").read_text())

    def put(cell, **fields):
        cell.folder.mkdir()
        write_record(cell.folder / "record.json", {**finished, "config_hash": cell.hash, **fields})

    put(done)
    put(running, status="running", ended=None)
    hold(running.folder)
    put(killed, status="running", ended=None)
    put(failed, status="failed", error="ValueError: too bad")
    sweep.error(refused).write_text("no such tap\n")
    sweep.log(refused).write_text("no such tap\n")
    found = sweep.states()
    assert [found[cell].name for cell in sweep.cells] == [
        "done", "running", "interrupted", "failed", "failed", "waiting"
    ]  # fmt: skip
    assert found[failed] == State("failed", "ValueError: too bad")
    assert found[refused] == State("failed", "no such tap")
    assert sweep.due(retry=False) == [killed, waiting]
    assert sweep.due(retry=True) == [killed, failed, refused, waiting]
    shown = kdlvfm("status", sweep.folder)
    assert shown.code == 0
    assert "1 done, 1 running, 2 failed, 1 interrupted, 1 waiting" in shown.out
    assert "failed: none seed 4: no such tap" in shown.out
    assert f"log  {sweep.log(refused)}" in shown.out
    (listed,) = json.loads(kdlvfm("status", sweep.folder, "--json").out).values()
    assert [cell["state"] for cell in listed] == [found[cell].name for cell in sweep.cells]
    # A record of another configuration says nothing about the cell.
    assert sweep.state(replace(done, hash="0" * 12)).name == "waiting"


@pytest.mark.parametrize(
    ("visible", "expected"), [("4,7,9", ["4", "7", "9", "4"]), ("3", [None] * 4), ("", [None] * 4)]
)
def test_each_of_several_jobs_has_a_device(visible, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = [_environment(slot, 4) for slot in range(4)]
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in found] == expected
    assert all(environment["OMP_NUM_THREADS"] == "3" for environment in found)
    assert _environment(0, 1) == {}


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failure_and_a_rerun_does_what_is_missing(shell, small, tmp_path):
    weights = tmp_path / "weights.pt"
    command = (
        "train", "-m", *small, "recipe.steps=2", "launcher.jobs=2", f"out={tmp_path / 'sweep'}",
        f"student.encoder.checkpoint=null,{weights}", "seed=0,1",
    )  # fmt: skip

    def run(*more):
        process = shell(*command, *more)
        out, err = process.communicate(timeout=500)
        return process.returncode, out, err

    def written():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}

    code, out, err = run()
    assert code == 1
    assert "2 done, 2 failed of 4 cells" in out
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert all("weights.pt" in line for line in failed)
    logs = [Path(line.split()[1]) for line in err.splitlines() if line.startswith("  log  ")]
    assert all("weights.pt" in log.read_text() for log in logs)
    first = written()
    assert len(first) == 2

    code, out, err = run()
    assert code == 1
    assert "seed" not in out
    assert [line for line in err.splitlines() if line.startswith("failed: ")] == failed
    assert written() == first

    made = "import timm, torch; torch.save(timm.create_model('test_resnet').state_dict(), r'%s')"
    subprocess.run([sys.executable, "-c", made % weights], check=True)
    code, out, err = run("launcher.retry=true")
    assert code == 0, err
    assert "4 done of 4 cells" in out
    assert {path: time for path, time in written().items() if path in first} == first


@pytest.mark.slow
def test_an_interrupted_sweep_stops_its_cells_and_goes_on(shell, small, tmp_path):
    command = (
        "train", "-m", *small, "recipe.steps=400", "run.checkpoint_every=1000", "launcher.jobs=2", "seed=0,1,2",
        f"out={tmp_path}",
    )  # fmt: skip
    with shell(*command) as process:
        deadline = time.monotonic() + 300
        while sum("step 20/400" in log.read_text() for log in tmp_path.rglob("*.log")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Interrupted. The same command goes on" in out
    (sweep,) = find([tmp_path])
    assert [state.name for state in sweep.states().values()] == ["interrupted", "interrupted", "waiting"]
    assert all((cell.folder / "checkpoints" / "last.ckpt").exists() for cell in sweep.cells[:2])
