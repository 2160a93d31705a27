# SPDX-License-Identifier: Apache-2.0
"""A search: what varies, trials as runs, and a study that goes on after whatever ended it."""

import json
import math
import re
import shutil
import signal
import time

import pytest

import kdlvfm.cli.config
from kdlvfm.cli import launch, slurm, sweep
from kdlvfm.cli.config import compose
from kdlvfm.cli.sweep import find
from kdlvfm.reporting.record import config_hash, read_record, write_record

optuna = pytest.importorskip("optuna")

RATE = "recipe.optimizer.lr"
RANGE = f"{RATE}=1e-4..1e-2:log"


def rate(cell):
    return float(next(one for one in cell.overrides if one.startswith(RATE)).partition("=")[2])


def goodness(learning_rate):
    """Best at 1e-3."""
    return 0.9 - abs(math.log10(learning_rate) + 3) / 10


@pytest.fixture
def computed(monkeypatch, head):
    """Trials cost nothing: a record says how good the learning rate is. The batches so far, and what becomes of each.

    `fail` and `interrupt` are sets of numbers, counting computed cells from 0.
    """

    class Computed(list):
        fail, interrupt, metric = set(), set(), "miou"

        def cells(self):
            return [cell for batch in self for cell in batch]

    batches = Computed()
    finished = json.loads((head / "record.json").read_text())

    def side_by_side(sweep, cells, jobs):
        assert find([sweep.folder])[0].cells == sweep.cells
        assert len(cells) <= jobs
        first = len(batches.cells())
        batches.append([*cells])
        for number, cell in enumerate(cells, first):
            if number in batches.interrupt:
                return False
            if number in batches.fail:
                sweep.error(cell).write_text("out of memory\n")
                continue
            cell.folder.mkdir(parents=True)
            metrics = {"val": {batches.metric: goodness(rate(cell))}, "test": {"miou": 0.1}}
            write_record(cell.folder / "record.json", {**finished, "config_hash": cell.hash, "metrics": metrics})
        return True

    monkeypatch.setattr("kdlvfm.cli.launch.side_by_side", side_by_side)
    return batches


@pytest.fixture
def tune(kdlvfm, small, tmp_path):
    """A search for a learning rate, in a file of its own."""

    def call(*arguments, study="tune.db", ranges=(RANGE,)):
        return kdlvfm("tune", *small, "distiller=none", *ranges, "--study", tmp_path / study, *arguments)

    return call


def numbers(ended):
    """Numbers of the trials in the table at the end."""
    return [int(line.split()[0]) for line in ended.out.splitlines() if re.match(r" +\d+ +0?\d+\.\d+ ", line)]


def test_a_search_ends_with_the_best_trials_and_a_command(tune, computed, tmp_path, kdlvfm):
    ended = tune("--trials", 8, "--jobs", 3)
    assert ended.code == 0, ended.err
    assert [len(batch) for batch in computed] == [3, 3, 2]
    cells = computed.cells()
    rates = [rate(cell) for cell in cells]
    assert len(set(rates)) == 8
    assert all(1e-4 <= found <= 1e-2 for found in rates)
    ranked = sorted(range(8), key=lambda i: -goodness(rates[i]))
    assert numbers(ended) == ranked[:5]
    best = cells[ranked[0]]
    assert f"{100 * goodness(rate(best)):.2f} %" in ended.out
    (line,) = [line for line in ended.out.splitlines() if line.startswith("next ")]
    assert line.endswith(f"distiller=none {RATE}={rate(best)} seed=1,2,3")
    assert "out=" not in line
    assert {path.parent for path in tmp_path.rglob("record.json")} == {cell.folder for cell in cells}
    assert all(cell.folder.parent == tmp_path / "tune" for cell in cells)
    assert best.hash == config_hash(compose(best.overrides)) == config_hash(compose([*best.overrides, "out=null"]))
    assert f"trial 7 {RATE}={rates[7]}" in kdlvfm("status", tmp_path / "tune").out

    again = tune("--trials", 8, "--jobs", 3)
    assert again.code == 0
    assert len(computed) == 3
    assert again.out.splitlines()[-6:] == ended.out.splitlines()[-6:]


def test_a_trial_that_fails_is_named_and_stops_no_other(tune, computed, tmp_path):
    computed.fail = {1, 2}
    ended = tune("--trials", 6, "--jobs", 2)
    assert ended.code == 0
    failed = computed.cells()[1]
    assert f"failed: trial 1 {RATE}={rate(failed)} seed 0: out of memory" in ended.err
    assert "4 done, 2 failed of 6 runs" in ended.out
    assert sorted(numbers(ended)) == [0, 3, 4, 5]
    study = optuna.load_study(study_name="miou", storage=f"sqlite:///{tmp_path}/tune.db")
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    for cell, trial in zip(computed.cells(), study.trials, strict=True):
        assert trial.params[RATE] == pytest.approx(rate(cell), rel=1e-3)
        if trial.value is not None:
            assert trial.value == read_record(cell.folder / "record.json")["metrics"]["val"]["miou"]


def test_no_trial_with_a_score(tune, computed):
    computed.fail = {0, 1}
    ended = tune("--trials", 2)
    assert ended.code == 1
    assert "No trial has a score." in ended.err
    assert "next " not in ended.out


def test_an_interrupted_search_goes_on_with_the_trial_that_was_cut_off(tune, computed):
    computed.interrupt = {3}
    ended = tune("--trials", 6, "--jobs", 2)
    assert ended.code == launch.INTERRUPTED
    assert "Interrupted. The same command goes on" in ended.out
    computed.interrupt = set()
    assert tune("--trials", 6, "--jobs", 2).code == 0
    cut = computed[1][1]
    assert computed[2][0] == cut
    assert [len(batch) for batch in computed] == [2, 2, 2, 1]
    assert len({cell.hash for cell in computed.cells()}) == 6


def test_of_a_distance_less_is_better(tune, computed, monkeypatch):
    monkeypatch.setattr("kdlvfm.tasks.segmentation.Segmentation.distances", ("miou",))
    ended = tune("--trials", 4)
    assert ended.code == 0
    rates = [rate(cell) for cell in computed.cells()]
    assert numbers(ended) == sorted(range(4), key=lambda i: goodness(rates[i]))


def test_what_another_process_computes_is_left_to_it(tune, computed, monkeypatch, tmp_path):
    """Two searches on one file: a trial that is locked elsewhere is neither computed nor told, until it has ended."""
    computed.interrupt = {1}
    assert tune("--trials", 4, "--jobs", 2, study="shared.journal").code == launch.INTERRUPTED
    computed.interrupt = set()
    theirs = computed[0][1]
    monkeypatch.setattr(sweep, "owner", lambda folder: "process 7 on other" if folder == theirs.folder else None)
    ended = tune("--trials", 4, "--jobs", 2, study="shared.journal")
    assert ended.code == 0
    assert theirs not in computed[1]
    assert f"running: {theirs.name}: process 7 on other" in ended.err
    assert len(numbers(ended)) == 3


def test_values_that_come_again_are_not_computed_again(tune, computed):
    ended = tune("--trials", 8, "--jobs", 2, ranges=(f"{RATE}=0.01,0.001,0.0001",))
    assert ended.code == 0
    cells = computed.cells()
    assert len(cells) == len({cell.hash for cell in cells}) == len(numbers(ended)) <= 3


def test_a_file_holds_one_search(tune, computed, tmp_path):
    assert tune("--trials", 1).code == 0
    before = (tmp_path / "tune.db").read_bytes()
    ended = tune("--trials", 2, ranges=(f"{RATE}=1e-4..1:log",))
    assert ended.code == 1
    assert f'tune.db holds another search (search.{RATE}: "0.0001..0.01:log" != "0.0001..1:log")' in ended.err
    assert "recipe.steps: 6 != 7" in tune("--trials", 2, "recipe.steps=7").err
    assert (tmp_path / "tune.db").read_bytes() == before
    assert tune("--trials", 1, "run.threads=1").code == 0
    assert len(computed) == 1


def test_a_metric_that_there_is_not_costs_nothing(tune, computed):
    ended = tune("--trials", 3, "--metric", "mIoU")
    assert ended.code == 1
    assert "has no mIoU on val; there is miou" in ended.err
    assert tune("--trials", 3, "--metric", "val/miou").code == 0
    assert len(computed.cells()) == 3


def test_an_experiment_may_hold_the_ranges(tune, computed, small, tmp_path, monkeypatch):
    configs = tmp_path / "configs"
    shutil.copytree(kdlvfm.cli.config.config_dir(), configs)
    text = f"# @package _global_\nhydra:\n  sweeper:\n    params:\n      {RATE}: 1e-4..1e-2:log\n"
    (configs / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(kdlvfm.cli.config, "config_dir", lambda: configs)
    assert tune("--trials", 2, "experiment=mine", ranges=()).code == 0
    assert len({rate(cell) for cell in computed.cells()}) == 2


def test_on_a_cluster_a_batch_is_an_array_and_is_waited_for(tune, computed, monkeypatch):
    calls = []

    def submit(sweep, cells, settings):
        calls.append(("submit", len(cells), settings["partition"]))
        launch.side_by_side(sweep, cells, len(cells))

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "wait", lambda sweep, cells: calls.append(("wait", len(cells))))
    ended = tune("--trials", 5, "--jobs", 3, "launcher=slurm", "launcher.partition=gpu")
    assert ended.code == 0, ended.err
    assert calls == [("submit", 3, "gpu"), ("wait", 3), ("submit", 2, "gpu"), ("wait", 2)]
    assert ended.out.splitlines()[-3].endswith("seed=1,2,3 launcher=slurm launcher.partition=gpu")

    def interrupted(sweep, cells):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "submit", lambda sweep, cells, settings: None)
    monkeypatch.setattr(slurm, "wait", interrupted)
    ended = tune("--trials", 7, "--jobs", 3, "launcher=slurm", "launcher.partition=gpu")
    assert ended.code == launch.INTERRUPTED
    assert "The jobs go on." in ended.out
    waited = []
    monkeypatch.setattr(slurm, "wait", lambda sweep, cells: waited.extend(cells))
    ended = tune("--trials", 7, "--jobs", 3, "launcher=slurm", "launcher.partition=gpu")
    assert len(waited) == 2
    assert "5 done, 2 waiting of 7 runs" in ended.out


@pytest.mark.slow
def test_real_trials_side_by_side_one_of_which_fails_and_an_interruption(shell, small, tmp_path):
    command = (
        "tune", *small, "distiller=none", "--trials", "4", "--jobs", "2", "--study", tmp_path / "tune.journal",
        f"student.encoder.checkpoint=null,{tmp_path / 'nowhere.pt'}", RANGE,
    )  # fmt: skip
    with shell(*command) as process:
        deadline = time.monotonic() + 500
        while not any("step 2/6" in log.read_text() for log in tmp_path.rglob("*.log")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode in (0, launch.INTERRUPTED), err
    process = shell(*command)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    (sweep,) = find([tmp_path])
    states = [state.name for state in sweep.states().values()]
    assert len(states) == 4
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == states.count("failed") > 0
    assert all("nowhere.pt does not exist" in line for line in failed)
    assert states.count("done") == 4 - len(failed) > 0
    assert "seed=1,2,3" in out
