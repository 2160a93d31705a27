# SPDX-License-Identifier: Apache-2.0
"""A sweep: its cells, each named by the hash of its resolved configuration, what is on disk about them, their states.

The folder `<root>/sweeps/<hash of all cells>/` holds `sweep.json`, written before the first cell starts, and for each
cell its log, `<hash>.log`, and after a failure its error, `<hash>.error`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlvfm.cli import CommandError
from kdlvfm.cli.config import GROUPS, Launcher, compose_cell
from kdlvfm.cli.lock import owner
from kdlvfm.cli.run_folder import run_folder
from kdlvfm.reporting.record import RecordError, config_hash, method_of, read_record

SCHEMA = "kdlvfm.sweep/1"
_FILE = "sweep.json"
_ROOT = Path("runs")

DONE, RUNNING, FAILED, INTERRUPTED, WAITING = STATES = ("done", "running", "failed", "interrupted", "waiting")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        hash: of its resolved configuration.
        title: what makes it different from the others, but for the seed.
        seed: the seed of the run.
        folder: of the run.
        overrides: what makes this run, for `kdlvfm train`.
    """

    hash: str
    title: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.title} seed {self.seed}"

    @property
    def command(self) -> str:
        """What computes it, as one would type it."""
        return shlex.join(["kdlvfm", "train", *self.overrides])

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "folder": str(self.folder)}

    @classmethod
    def of_plain(cls, cell: Mapping[str, Any]) -> Cell:
        """What `plain` was made of.

        Raises:
            KeyError, TypeError: it is no cell.
        """
        return cls(**{**cell, "folder": Path(cell["folder"]), "overrides": tuple(cell["overrides"])})


@dataclass(frozen=True)
class State:
    """How far a cell is: one of `STATES`, and the error of a failed one or the process that computes a running one."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Sweep:
    """Cells, and the folder of what is written about them."""

    folder: Path
    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, root: Path, cells: Iterable[Cell]) -> Sweep:
        """The sweep of these cells; of several with one hash it has the first.

        Raises:
            CommandError: cells of different configurations have one folder.
        """
        unique = {cell.hash: cell for cell in reversed([*cells])}
        ordered = tuple(reversed(unique.values()))
        folders: dict[Path, Cell] = {}
        for cell in ordered:
            other = folders.setdefault(cell.folder, cell)
            if other is not cell:
                raise CommandError(f"{other.name} and {cell.name} would have one folder, {cell.folder}.")
        name = hashlib.sha256(" ".join(sorted(unique)).encode()).hexdigest()[:8]
        return cls(root / "sweeps" / name, ordered)

    def write(self) -> None:
        """Write `sweep.json` in one piece.

        Raises:
            CommandError: the folder cannot be written to.
        """
        text = json.dumps({"schema": SCHEMA, "cells": [cell.plain() for cell in self.cells]}, indent=2) + "\n"
        # A name of its own: the same command may start at once on several machines.
        temporary = self.folder / f".{_FILE}.{uuid.uuid4().hex}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.folder / _FILE)
        except OSError as error:
            raise CommandError(f"{self.folder} cannot be written to ({error.strerror}).") from error

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """The sweep whose `sweep.json` is in this folder.

        Raises:
            CommandError: there is none, or it is not one.
        """
        path = folder / _FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise CommandError(f"{path} is of schema {content['schema']}; this version reads {SCHEMA}.")
            cells = tuple(Cell.of_plain(cell) for cell in content["cells"])
        except OSError as error:
            raise CommandError(f"{path} cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CommandError(f"{path} is no list of a sweep's cells ({type(error).__name__}: {error}).") from error
        return cls(folder, cells)

    def log(self, cell: Cell) -> Path:
        """The file with what a cell printed."""
        return self.folder / f"{cell.hash}.log"

    def error(self, cell: Cell) -> Path:
        """The file with the error of a cell that failed; there is none of others."""
        return self.folder / f"{cell.hash}.error"

    def state(self, cell: Cell) -> State:
        """How far a cell is, from what is on disk, whoever computed it."""
        try:
            record = read_record(cell.folder / "record.json")
            status = record["status"] if record["config_hash"] == cell.hash else None
        except RecordError:
            status = None
        if status == "finished":
            return State(DONE)
        if process := owner(cell.folder):
            return State(RUNNING, process)
        if self.error(cell).exists():
            return State(FAILED, self.error(cell).read_text(encoding="utf-8").strip())
        if status == "failed":
            return State(FAILED, str(record["error"]))
        return State(WAITING if status is None else INTERRUPTED)

    def states(self) -> dict[Cell, State]:
        """The states of all cells."""
        return {cell: self.state(cell) for cell in self.cells}

    def due(self, retry: bool) -> list[Cell]:
        """Cells to be computed now: neither done nor computed elsewhere, and failed ones on request."""
        kept = (DONE, RUNNING) if retry else (DONE, RUNNING, FAILED)
        return [cell for cell, state in self.states().items() if state.name not in kept]


def find(folders: Sequence[Path]) -> list[Sweep]:
    """The sweeps in or below these folders.

    Raises:
        CommandError: there is none, or one cannot be read.
    """
    paths = sorted({path.parent for folder in folders for path in folder.rglob(_FILE)})
    if not paths:
        raise CommandError(f"there is no sweep in {', '.join(map(str, folders))}; kdlvfm train -m makes one.")
    return [Sweep.read(path) for path in paths]


def cell_of(overrides: Sequence[str], root: Path | None = None, title: str | None = None) -> tuple[Cell, Launcher]:
    """One cell from its overrides, and how it is to be started.

    Args:
        overrides: what makes the run.
        root: the folder in which the run has one of its own; `None`: where the run says.
        title: what the cell is called; `None`: its method, as in tables.
    """
    config, launcher = compose_cell(overrides)
    folder, digest = run_folder(config), config_hash(config)
    kept = [override for override in overrides if not key_of(override).startswith("launcher")]
    if root is not None:
        folder = root / run_folder({**config, "out": None}).name
        kept = [override for override in kept if key_of(override) != "out"] + [f"out={folder}"]
    title = method_of(config) if title is None else title
    return Cell(digest, title, config["seed"], folder, tuple(kept)), launcher


def plan(overrides: Sequence[str]) -> tuple[Sweep, dict[Cell, Launcher]]:
    """The sweep of every combination of the values given, and how each cell is to be started.

    `out` is the folder of the whole sweep; an experiment's `hydra.sweeper.params` count as overrides.

    Raises:
        CommandError: an override that does not fit, in any of the cells.
    """
    first, _ = next(_combinations(overrides))
    if any(key_of(one) == "out" and one not in overrides for one in first):
        raise CommandError("out= is the folder of the whole sweep: give one.")
    config, launcher = compose_cell(first)
    given = {key_of(override) for override in overrides}
    overrides = [*overrides, *(f"{key}={values}" for key, values in launcher.swept.items() if key not in given)]
    root = None if config["out"] is None else Path(str(config["out"]))
    started = dict(cell_of(own, root, title or None) for own, title in _combinations(overrides))
    sweep = Sweep.of(_ROOT if root is None else root, started)
    return sweep, {cell: started[cell] for cell in sweep.cells}


def _combinations(overrides: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """The overrides of each combination, and those values in it that vary, but for the seed."""
    each = [[(one, varies) for one in ones] for ones, varies in map(alternatives, overrides)]
    for combination in itertools.product(*each):
        varied = [override for override, varies in combination if varies and key_of(override) not in ("seed", "out")]
        shown = [one.partition("=")[2] if key_of(one) in GROUPS else one.lstrip("+") for one in varied]
        yield [override for override, _ in combination], " ".join(shown)


def alternatives(override: str) -> tuple[list[str], bool]:
    """The single overrides that one with several values stands for, and whether it is one, in Hydra's grammar.

    Raises:
        CommandError: it is no override, or of a kind that cannot be counted.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
        if not parsed.is_sweep_override():
            return [override], False
        # Hydra's grammar escapes the colon of sckd:kd+cwd, and needs it not.
        values = [value.replace("\\:", ":") for value in parsed.sweep_string_iterator()]
    except HydraException as error:
        raise CommandError(str(error).splitlines()[0]) from error
    return [f"{key_of(override)}={value}" for value in values], True


def key_of(override: str) -> str:
    """What an override sets."""
    return override.partition("=")[0]


def counts(states: Iterable[State]) -> str:
    """How many there are of each: `4 done, 1 failed`."""
    names = [state.name for state in states]
    return ", ".join(f"{names.count(name)} {name}" for name in STATES if name in names)


def as_json(sweep: Sweep) -> list[dict[str, Any]]:
    """The cells with their states, for other programs."""
    return [
        {"hash": cell.hash, "name": cell.name, "folder": str(cell.folder), "state": state.name, "detail": state.detail}
        for cell, state in sweep.states().items()
    ]
