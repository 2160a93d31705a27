# SPDX-License-Identifier: Apache-2.0
"""Computing cells: one as a process with a log file, several side by side on this machine, and the summary."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from kdlvfm.cli.lock import TAKEN
from kdlvfm.cli.sweep import DONE, FAILED, RUNNING, Cell, State, Sweep, counts
from kdlvfm.reporting.record import RecordError, read_record

INTERRUPTED = 130
_STEP = re.compile(r"step (\d+)/(\d+)")
_PAUSE = 0.2  # seconds


class Display(Protocol):
    """Shows how far each cell is."""

    def step(self, cell: Cell, step: int, steps: int) -> None:
        """A cell took a step."""

    def ended(self, cell: Cell, outcome: str, seconds: float) -> None:
        """A cell ended."""


class CellProcess:
    """`kdlvfm train` for one cell. It writes the cell's log itself, so it needs nobody to go on."""

    def __init__(self, sweep: Sweep, cell: Cell, environment: Mapping[str, str] | None = None) -> None:
        progress = [] if any(o.startswith("run.progress=") for o in cell.overrides) else ["run.progress=line"]
        self._sweep, self._cell = sweep, cell
        with sweep.log(cell).open("a", encoding="utf-8") as log:
            log.write(f"$ {cell.command}\n")
            log.flush()
            self._start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kdlvfm", "train", *cell.overrides, *progress],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            )

    def wait(self, step: Callable[[int, int], None] | None = None) -> int:
        """Follow the log until the process has ended; its exit code, negative for a signal. An error is kept."""
        last = begun = ""
        with self._sweep.log(self._cell).open(encoding="utf-8", errors="replace") as log:
            log.seek(self._start)
            while True:
                ended = self._process.poll() is not None
                *lines, begun = (begun + log.read()).split("\n")
                for line in lines:
                    last = line.strip() or last
                    if step and (found := _STEP.match(line)):
                        step(int(found[1]), int(found[2]))
                if ended:
                    break
                time.sleep(_PAUSE)
        code = self._process.returncode
        if code > 0 and code not in (INTERRUPTED, TAKEN):
            said = (begun.strip() or last).removeprefix("kdlvfm train: error: ")
            error = _recorded_error(self._cell) or said or f"exit code {code}"
            self._sweep.error(self._cell).write_text(error + "\n", encoding="utf-8")
        return code

    def terminate(self) -> None:
        """Ask the process to save and stop."""
        self._process.terminate()

    def wait_for_end(self) -> None:
        """Return when the process has ended; for a signal handler that interrupted `wait`."""
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


def _recorded_error(cell: Cell) -> str | None:
    try:
        record = read_record(cell.folder / "record.json")
    except RecordError:
        return None
    return str(record["error"]) if record["status"] == "failed" and record["config_hash"] == cell.hash else None


def side_by_side(sweep: Sweep, cells: Sequence[Cell], jobs: int) -> bool:
    """Compute cells of a sweep on this machine, some at a time; `False` if the user interrupted."""
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(_environment(slot, jobs))
    stopping = threading.Event()
    running: set[CellProcess] = set()

    def compute(cell: Cell) -> None:
        if stopping.is_set():
            return
        sweep.error(cell).unlink(missing_ok=True)
        environment, began = slots.get(), time.perf_counter()
        process = CellProcess(sweep, cell, environment)
        running.add(process)
        if stopping.is_set():
            process.terminate()
        try:
            code = process.wait(lambda step, steps: display.step(cell, step, steps))
        finally:
            running.discard(process)
            slots.put(environment)
        display.ended(cell, sweep.state(cell).name if code != TAKEN else RUNNING, time.perf_counter() - began)

    def stop(number: int, frame: Any) -> None:
        del number, frame
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with _display(cells) as display, ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(compute, cell) for cell in cells]
            try:
                for future in as_completed(waiting):
                    future.result()
            except KeyboardInterrupt:
                stopping.set()
                for process in [*running]:
                    process.terminate()  # a terminal's Ctrl-C has told them, another signal has not
                pool.shutdown(wait=True, cancel_futures=True)
                return False
    finally:
        signal.signal(signal.SIGTERM, previous)
    return True


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """What a process side by side with others is told: its share of the cores and, of several GPUs, one."""
    if jobs == 1:
        return {}
    # Several threads in each of several processes on few cores get in each other's way, up to tenfold.
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    devices = _devices()
    return {**environment, "CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if len(devices) > 1 else environment


def _devices() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device]
    return [str(device) for device in range(torch.cuda.device_count())]


@contextmanager
def _display(cells: Sequence[Cell]) -> Iterator[Display]:
    """Bars in a terminal, lines elsewhere."""
    if not sys.stdout.isatty():
        yield Lines()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        yield _Bars(progress, cells)


class Lines:
    """A line when a cell ends."""

    def step(self, cell: Cell, step: int, steps: int) -> None:
        """Nothing: the log file has the steps."""

    def ended(self, cell: Cell, outcome: str, seconds: float) -> None:
        """Say how it ended."""
        print(f"{cell.name}: {outcome}, {seconds:.0f} s", flush=True)


class _Bars:
    """A progress bar for each cell."""

    def __init__(self, progress: Any, cells: Sequence[Cell]) -> None:
        self._progress = progress
        self._bars = {cell: progress.add_task(cell.name, total=None, start=False) for cell in cells}

    def step(self, cell: Cell, step: int, steps: int) -> None:
        """Move the bar; it starts with the first step, so that the time left is the training's."""
        if not self._progress.tasks[self._bars[cell]].started:
            self._progress.start_task(self._bars[cell])
        self._progress.update(self._bars[cell], completed=step, total=steps)

    def ended(self, cell: Cell, outcome: str, seconds: float) -> None:
        """Fill the bar, or say that the cell is not done."""
        del seconds
        if outcome == DONE:
            self._progress.update(self._bars[cell], completed=1, total=1)
        else:
            self._progress.update(self._bars[cell], description=f"[red]{cell.name} {outcome}")
        self._progress.stop_task(self._bars[cell])


def summarise(sweep: Sweep) -> int:
    """Say how the sweep ended, and of each cell that failed or is missing why; 0 if all are done, else 1."""
    states = sweep.states()
    print(f"\n{counts(states.values())} of {len(states)} cells; {sweep.folder}", flush=True)
    name_missing(sweep, states)
    if any(state.name == FAILED for state in states.values()):
        print("To try failed cells again, add launcher.retry=true to the command.", file=sys.stderr)
    return 0 if all(state.name == DONE for state in states.values()) else 1


def name_missing(sweep: Sweep, states: Mapping[Cell, State]) -> None:
    """Say of each cell that is not done why, and where its log is."""
    for cell, state in states.items():
        if state.name == DONE:
            continue
        detail = f": {state.detail}" if state.detail else ""
        print(f"{state.name}: {cell.name}{detail}", file=sys.stderr)
        if sweep.log(cell).exists():
            print(f"  log  {sweep.log(cell)}", file=sys.stderr)
