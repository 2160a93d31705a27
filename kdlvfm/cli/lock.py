# SPDX-License-Identifier: Apache-2.0
"""One process computes a run: the lock file in a run's folder, with the name of its owner."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from kdlvfm.cli import CommandError

LOCK = "lock"
TAKEN = 75
"""Exit code of a run that another process computes: the EX_TEMPFAIL of sysexits.h."""

_TRIES, _PAUSE = 5, 0.2
# Where the starters of several processes say which of them one is; none of them set means one process.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


class RunTakenError(CommandError):
    """Another process computes this run."""

    code = TAKEN


class RunLock:
    """Holds the folder of a run for this process.

    It is a POSIX record lock, which the kernel, or the server of a network file system, gives back when the process
    ends in whatever way: what a killed run leaves behind is a file, and no lock. Processes that are forked do not have
    it. Where the file system knows no locks, the run goes on without, with a warning.

    Raises:
        RunTakenError: another process has it; the message names its owner.
        CommandError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        # `owner` holds the lock for an instant to see whether it is free, so one refusal is none.
        for _ in range(_TRIES):
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise CommandError(f"{self._folder} cannot be written to ({error.strerror}).") from error
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                time.sleep(_PAUSE)
                continue
            except OSError as error:
                os.close(descriptor)
                print(f"WARNING    {self._folder} cannot be locked ({error.strerror}).", file=sys.stderr)
                return self
            if self._is_current(descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_own_name()).encode())
                self._descriptor = descriptor
                return self
            os.close(descriptor)  # its last owner removed the file between our opening and locking it
        raise RunTakenError(f"{self._folder} is being computed by {_named(self._path)}; nothing was started.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return self._path.stat().st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            return False


def leads() -> bool:
    """Whether this process is the first, or the only one, of its run: the one that writes."""
    return all(os.environ.get(rank, "0") == "0" for rank in _RANKS)


def owner(folder: Path) -> str | None:
    """Which process computes the run in this folder now, for people to read; `None` if none does.

    Not for the process that holds the lock: to look at the file would give it back.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return _named(path)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _own_name() -> dict[str, str | int | None]:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "process": os.getpid(), "slurm_job": job}


def _named(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        job = f", Slurm job {found['slurm_job']}" if found["slurm_job"] else ""
        return f"process {found['process']} on {found['host']}{job}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
