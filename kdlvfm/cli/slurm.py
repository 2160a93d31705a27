# SPDX-License-Identifier: Apache-2.0
"""Cells as jobs of a Slurm cluster, through submitit; what a job computes is the same process as on one machine."""

from __future__ import annotations

import getpass
import io
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlvfm.cli import CommandError
from kdlvfm.cli.launch import INTERRUPTED, CellProcess
from kdlvfm.cli.sweep import FAILED, WAITING, Cell, State, Sweep

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

_OWN = ("retry", "wait", "max_num_timeout")  # settings that are no arguments of a job
_LONGEST_PAUSE = 30.0
_SECOND_LOOK = 3.0  # seconds; a job that is being requeued may be out of the queue for a moment
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
}


class CellJob:
    """What a job does: one cell, in each of its tasks.

    Before the job's time is over, and before a preemption, Slurm signals all its processes. The run saves and stops;
    submitit then calls `checkpoint` and puts the job back into the queue, where it goes on.
    """

    def __init__(self, folder: str, cell: str) -> None:
        self._folder = folder
        self._cell = cell
        self._process: CellProcess | None = None

    def __call__(self) -> None:
        """Compute the cell.

        Raises:
            RuntimeError: it failed, or another process computes it; so Slurm ends the other tasks of the job too.
        """
        sweep = Sweep.read(Path(self._folder))
        cell = next(cell for cell in sweep.cells if cell.hash == self._cell)
        self._process = CellProcess(sweep, cell)
        code = self._process.wait()
        if code not in (0, INTERRUPTED):
            raise RuntimeError(f"{cell.name} ended with code {code}; see {sweep.log(cell)}")

    def checkpoint(self) -> DelayedSubmission:
        """Wait until the run has saved; the same again is what to requeue."""
        from submitit.core.utils import DelayedSubmission

        if self._process is not None:
            self._process.wait_for_end()
        return DelayedSubmission(CellJob(self._folder, self._cell))


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise for settings with which no job can start.

    Raises:
        CommandError: naming the setting.
    """
    for key in ("nodes", "ntasks_per_node"):
        if not isinstance(settings[key], int) or settings[key] < 1:
            setting = "trainer.num_nodes" if key == "nodes" else "trainer.devices"
            raise CommandError(f"launcher=slurm needs a number for {setting}, not {settings[key]!r}.")


def submit(sweep: Sweep, cells: Sequence[Cell], settings: Mapping[str, Any]) -> None:
    """Put cells into the queue as one job array; those that are in it already are left there.

    Raises:
        CommandError: Slurm is not there or does not take the jobs.
    """
    queue = _queue()
    cells = [cell for cell in cells if job_of(sweep, cell) not in queue]
    if not cells:
        return
    for cell in cells:
        sweep.error(cell).unlink(missing_ok=True)
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    given = {key: value for key, value in settings.items() if value is not None and key not in _OWN}
    if not given["gpus_per_node"]:
        del given["gpus_per_node"]
    given["additional_parameters"] = {"requeue": True, **given.get("additional_parameters", {})}
    try:
        executor = submitit.SlurmExecutor(folder=_folder(sweep), max_num_timeout=settings["max_num_timeout"])
        executor.update_parameters(**{"job_name": "kdlvfm", "stderr_to_stdout": True, **given})
        with redirect_stderr(io.StringIO()), executor.batch():  # the error that is raised has Slurm's words too
            jobs = [executor.submit(CellJob(str(sweep.folder), cell.hash)) for cell in cells]
    except ValueError as error:
        raise CommandError(f"launcher: {str(error).splitlines()[0]}") from error
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        raise CommandError(f"Slurm did not take the jobs: {_reason(error)}") from error
    for cell, job in zip(cells, jobs, strict=True):
        _job_file(sweep, cell).write_text(job.job_id, encoding="utf-8")
    count = "1 cell" if len(jobs) == 1 else f"{len(jobs)} cells"
    print(f"submitted {count}, job {jobs[0].job_id.partition('_')[0]}", flush=True)


def wait(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Return when none of these cells is in the queue or runs as a job; on the way say how far they are."""
    told: dict[Cell, State] = {}
    pause, left = 1.0, False
    while True:
        queue = _queue()
        changed = False
        for cell in cells:
            state = sweep.state(cell)
            if cell in told and state.name != told[cell].name:
                changed = True
                print(f"{cell.name}: {state.name}", flush=True)
            told[cell] = state
        if not any(job_of(sweep, cell) in queue for cell in cells):
            if left:
                break
            left, pause = True, _SECOND_LOOK
        else:
            left, pause = False, 1.0 if changed else min(2 * pause, _LONGEST_PAUSE)
        time.sleep(pause)
    for cell in cells:
        log = _folder(sweep) / f"{job_of(sweep, cell)}_0_log.out"
        if sweep.state(cell).name == WAITING and log.exists():
            sweep.error(cell).write_text(f"its job ended before the run began; see {log}\n", encoding="utf-8")
            print(f"{cell.name}: {FAILED}", flush=True)


def job_of(sweep: Sweep, cell: Cell) -> str | None:
    """The Slurm job that was last made for a cell."""
    path = _job_file(sweep, cell)
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _job_file(sweep: Sweep, cell: Cell) -> Path:
    return sweep.folder / f"{cell.hash}.job"


def _folder(sweep: Sweep) -> Path:
    return sweep.folder / "slurm"


def _queue() -> set[str]:
    """The user's jobs that have not ended; of arrays each."""
    # Without `--states` those that are being requeued are left out.
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--user={getpass.getuser()}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise CommandError("there is no Slurm here: squeue is not found. launcher=local needs none.") from error
    except subprocess.CalledProcessError as error:
        raise CommandError(f"Slurm does not answer: {_reason(error)}") from error
    jobs = (line.split(maxsplit=1) for line in found.stdout.splitlines())
    return {job for job, state in jobs if state.strip() not in _ENDED}


def _reason(error: Exception) -> str:
    """Slurm's own words, in one line."""
    text = str(error.stderr) if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return "; ".join(told) or (lines or [type(error).__name__])[-1]
