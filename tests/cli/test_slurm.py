# SPDX-License-Identifier: Apache-2.0
"""Sweeps on a real Slurm cluster, of one node: this machine. See tests/cluster/slurm.sh."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from kdlvfm.cli.slurm import job_of
from kdlvfm.cli.sweep import find

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

SCRIPT = Path(__file__).parents[1] / "cluster" / "slurm.sh"
SLURM = ("launcher=slurm", "launcher.gpus_per_node=0", "launcher.cpus_per_task=1")
# Dropout, augmentation, a projector, a teacher and validations on the way: everything that must be resumed.
RANDOM = (
    "teacher=timm",
    "teacher.name=test_vit",
    "teacher.pretrained=false",
    "distiller=fitnet",
    "recipe.steps=100",
    "recipe.val_every=40",
    "recipe.selection=best_val",
    "student.encoder.model_kwargs={num_classes: 0, drop_path_rate: 0.3}",
    "recipe.augmentation={_target_: kdlvfm.data.transforms.Augmentation, scale: [0.5, 2.0], crop: [48, 48], flip: 0.5}",
    "run.checkpoint_every=10",
)


@pytest.fixture(scope="module")
def cluster():
    """What a process must have in its environment to find the cluster."""
    pytest.importorskip("submitit")

    def call(*arguments):
        return subprocess.run([SCRIPT, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    # Not pytest's folder: the path of a socket may have about a hundred characters.
    scratch = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder = scratch / "cluster"
    started = call("up", folder)
    if started.returncode == 77 and os.environ.get("KDLVFM_SLURM") == "1":
        installed = call("install")
        shutil.rmtree(folder, ignore_errors=True)
        started = call("up", folder) if installed.returncode == 0 else installed
    if started.returncode == 77:
        pytest.skip(f"no Slurm here: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    call("down", folder)
    shutil.rmtree(scratch)


@pytest.fixture
def slurm(cluster):
    """What a command of Slurm prints."""

    def call(*command):
        return subprocess.run(command, env={**os.environ, **cluster}, capture_output=True, text=True, check=True).stdout

    return call


@pytest.fixture
def start(shell, small, cluster):
    """A sweep on the cluster."""
    return lambda *overrides: shell("train", "-m", *small, *SLURM, *overrides, env=cluster)


@pytest.fixture
def sweep_of(start):
    """A sweep on the cluster, when it has ended: exit code, output, errors."""

    def run(*overrides):
        process = start(*overrides)
        out, err = process.communicate(timeout=1500)
        return process.returncode, out, err

    return run


def written(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.rglob("record.json")}


def test_an_array_in_which_one_cell_fails_and_a_rerun_of_what_is_missing(sweep_of, slurm, tmp_path):
    taps = ",".join(f"map.{level}" for level in (0, 1, 2, 3, 4, 77))
    method = (*RANDOM[:3], "distiller=fitnet", f"distiller.student_tap={taps}", "recipe.steps=2", f"out={tmp_path}")
    code, out, err = sweep_of(*method)
    assert code == 1
    assert "5 done, 1 failed of 6 cells" in out
    (failed,) = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert "distiller.student_tap=map.77 seed 0" in failed
    assert "has no tap 'map.77'" in failed
    (log,) = [Path(line.split()[1]) for line in err.splitlines() if line.startswith("  log  ")]
    assert "has no tap 'map.77'" in log.read_text()
    (sweep,) = find([tmp_path])
    jobs = {cell: job_of(sweep, cell) for cell in sweep.cells}
    assert len({job.partition("_")[0] for job in jobs.values()}) == 1
    assert all(json.loads(path.read_text())["status"] == "finished" for path in tmp_path.rglob("record.json"))

    first = written(tmp_path)
    lost = sweep.cells[2]
    shutil.rmtree(lost.folder)
    code, out, err = sweep_of(*method)
    assert code == 1
    assert "submitted 1 cell" in out
    assert [line for line in err.splitlines() if line.startswith("failed: ")] == [failed]
    second = written(tmp_path)
    assert second.keys() == first.keys()
    assert [name for name, when in second.items() if when != first[name]] == [lost.folder.name]
    assert [cell for cell in sweep.cells if job_of(sweep, cell) != jobs[cell]] == [lost]


def kill_all_processes(job):
    """SIGKILL, without warning, to everything that a job of an array has started."""
    array, task = job.split("_")
    marks = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another's
            if marks <= set(environment.read_bytes().split(b"\0")):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def test_jobs_that_are_requeued_killed_or_out_of_time_end_with_the_bits_of_others(
    start, sweep_of, shell, small, slurm, tmp_path
):
    undisturbed = shell("train", "-m", *small, *RANDOM, "seed=0,1,2", "launcher.jobs=2", f"out={tmp_path / 'whole'}")
    _, err = undisturbed.communicate(timeout=1500)
    assert undisturbed.returncode == 0, err

    actions = {
        0: lambda job: slurm("scontrol", "requeue", job),
        1: kill_all_processes,
        2: lambda job: slurm("scancel", "--signal=USR2", job),  # as Slurm does before the end of a job's time
    }
    out = tmp_path / "disturbed"
    method = (*RANDOM, "seed=0,1,2", f"out={out}")
    with start(*method) as process:
        while process.poll() is None:
            for sweep in find([out]) if list(out.rglob("sweep.json")) else []:
                for cell in sweep.cells:
                    log = sweep.log(cell)
                    if cell.seed in actions and log.exists() and "step 20/100" in log.read_text():
                        actions.pop(cell.seed)(job_of(sweep, cell))
            time.sleep(0.3)
        printed, err = process.communicate()
    assert not actions
    assert process.returncode == 1, err
    assert "2 done, 1 interrupted of 3 cells" in printed
    assert [line for line in err.splitlines() if line.startswith("interrupted: ")] == ["interrupted: fitnet seed 1"]

    (sweep,) = find([out])
    logs = [sweep.log(cell).read_text() for cell in sweep.cells]
    for log in (logs[0], logs[2]):
        assert log.count("\n$ kdlvfm train ") + log.startswith("$ kdlvfm train ") == 2
        assert "the checkpoint is saved" in log
        assert log.count("step 10/100") == 1
    first = written(out)
    code, printed, err = sweep_of(*method)
    assert code == 0, err
    assert "submitted 1 cell" in printed
    assert [name for name, when in written(out).items() if when != first[name]] == [sweep.cells[1].folder.name]
    assert sweep.log(sweep.cells[1]).read_text().count("step 10/100") == 1

    for cell in sweep.cells:
        whole = tmp_path / "whole" / cell.folder.name
        found, expected = ((folder / "student.safetensors").read_bytes() for folder in (cell.folder, whole))
        assert found == expected, cell.name
        found, expected = (json.loads((folder / "record.json").read_text()) for folder in (cell.folder, whole))
        for key in ("status", "metrics", "curve", "selected_step", "config_hash"):
            assert found[key] == expected[key], (cell.name, key)


def test_a_cell_of_two_processes(sweep_of, tmp_path):
    """The cluster starts them, each in a task of the job's."""
    code, out, err = sweep_of(
        "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "distiller=none", f"out={tmp_path}"
    )
    assert code == 0, err
    assert "1 done of 1 cells" in out
    (sweep,) = find([tmp_path])
    log = sweep.log(sweep.cells[0]).read_text()
    assert log.count("$ kdlvfm train ") == 2
    assert log.count("wrote ") == 1
    assert len(list(tmp_path.rglob("*_log.out"))) == 2


def test_a_search_submits_its_trials_as_arrays(shell, small, cluster, tmp_path):
    pytest.importorskip("optuna")
    search = (
        "tune", *small, *SLURM, "distiller=none", "recipe.optimizer.lr=1e-4..1e-2:log",
        "--trials", "3", "--jobs", "2", "--study", tmp_path / "tune.journal",
    )  # fmt: skip
    refused = shell(*search, "launcher.partition=nowhere", env=cluster)
    _, err = refused.communicate(timeout=600)
    assert refused.returncode == 1
    assert err.count("\n") == 1
    process = shell(*search, env=cluster)
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, err
    assert [line.partition(",")[0] for line in out.splitlines() if line.startswith("submitted")] == [
        "submitted 2 cells",
        "submitted 1 cell",
    ]
    assert "3 done of 3 runs" in out
    (sweep,) = find([tmp_path])
    arrays = [job_of(sweep, cell).partition("_")[0] for cell in sweep.cells]
    assert arrays[0] == arrays[1] != arrays[2]
    assert {path.parent for path in tmp_path.rglob("record.json")} == {cell.folder for cell in sweep.cells}


def test_an_unknown_partition_is_one_line(sweep_of, tmp_path):
    code, _, err = sweep_of("distiller=none", "launcher.partition=nowhere", f"out={tmp_path}")
    assert code == 1
    assert "invalid partition specified: nowhere" in err
    assert err.count("\n") == 1


def test_an_unknown_setting_is_one_line(sweep_of, tmp_path):
    code, _, err = sweep_of("distiller=none", "launcher.partitoin=main", f"out={tmp_path}")
    assert code == 1
    assert "partitoin" in err
    assert err.count("\n") == 1
