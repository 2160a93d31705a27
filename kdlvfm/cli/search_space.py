# SPDX-License-Identifier: Apache-2.0
"""What a search varies: ranges and choices among overrides, and whether the configuration knows their keys."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kdlvfm.cli import CommandError
from kdlvfm.cli.build import build as build_run
from kdlvfm.cli.build import check_numbers
from kdlvfm.cli.config import GROUPS, Launcher, compose, compose_cell, opened
from kdlvfm.cli.sweep import alternatives, key_of
from kdlvfm.reporting.record import config_hash, flatten

_RANGE = re.compile(r"(?=.{3})(?P<low>[^/:]*?)\.\.(?P<high>[^/:]*)(:(?P<scale>[^/]*))?")
_FORMS = "write LOW..HIGH, or LOW..HIGH:log for a range on a logarithmic scale"
_DIGITS = 4


class Suggests(Protocol):
    """The part of an Optuna trial that draws values."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        """A number."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        """A whole number."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of the choices."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones if both are `int`."""

    key: str
    low: float
    high: float
    log: bool

    def __str__(self) -> str:
        """As one types it."""
        return f"{self.low}..{self.high}{':log' if self.log else ''}"

    @property
    def probes(self) -> tuple[str, ...]:
        """Values to try the configuration with."""
        return str(self.low), str(self.high)

    def draw(self, trial: Suggests) -> str:
        """A value, of four significant digits if it is not whole: enough to differ, short enough to type."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return str(trial.suggest_int(self.key, self.low, self.high, log=self.log))
        value = float(f"{trial.suggest_float(self.key, self.low, self.high, log=self.log):.{_DIGITS}g}")
        return str(min(max(value, self.low), self.high))


@dataclass(frozen=True)
class Choice:
    """Some values."""

    key: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        """As one types it."""
        return ",".join(self.values)

    @property
    def probes(self) -> tuple[str, ...]:
        """Values to try the configuration with."""
        return self.values

    def draw(self, trial: Suggests) -> str:
        """One of the values."""
        return trial.suggest_categorical(self.key, self.values)


class Space:
    """Overrides, some of which stand for many values.

    Args:
        overrides: `key=LOW..HIGH`, `key=LOW..HIGH:log`, `key=a,b,c`, and others, which stay as they are.

    Attributes:
        dimensions: what varies, by key.

    Raises:
        CommandError: a range that is none, or of a key that is not to be searched.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        self._parts = [_parsed(override) for override in overrides]
        self.dimensions: dict[str, Range | Choice] = {}
        for part in self._parts:
            if isinstance(part, str):
                continue
            if part.key == "seed":
                raise CommandError("a search has one seed; in the end the best trial is repeated with others.")
            if part.key == "out" or part.key.startswith("launcher"):
                raise CommandError(f"{part.key} says how runs are carried out: give one value.")
            if part.key in self.dimensions:
                raise CommandError(f"{part.key} has two ranges: give one.")
            self.dimensions[part.key] = part

    @property
    def start(self) -> dict[str, str]:
        """The first value of everything that varies."""
        return {key: dimension.probes[0] for key, dimension in self.dimensions.items()}

    def overrides(self, values: Mapping[str, str]) -> list[str]:
        """The overrides with one value each."""
        return [part if isinstance(part, str) else f"{part.key}={values[part.key]}" for part in self._parts]

    def compose_known(self) -> tuple[dict[str, Any], Launcher]:
        """The configuration at `start` without those keys that it must know already, and how its runs are started."""
        closed = self._closed()
        return compose_cell([one for one in self.overrides(self.start) if key_of(one) not in closed])

    def _closed(self) -> list[str]:
        return [key for key in self.dimensions if not _is_open(key)]

    def check(self, build: bool) -> dict[str, Any]:
        """Compose every end of every range and every choice; the configuration at `start`.

        Args:
            build: also build the run at `start`, with its data and networks, as the first trial will.

        Raises:
            CommandError: a key that there is not, with near ones, or that changes no result; a value that does not
                fit; or data without a validation split.
        """
        known, _ = self.compose_known()
        for key in self._closed():
            _check_key(key, known)
        first = self._compose(self.start)
        for key, dimension in self.dimensions.items():
            for probe in dimension.probes[1:]:
                if config_hash(self._compose({**self.start, key: probe})) == config_hash(first):
                    raise CommandError(f"{key} changes no result: there is nothing to search.")
        if build:
            self._build(first)
        return first

    def _compose(self, values: Mapping[str, str]) -> dict[str, Any]:
        config = compose(self.overrides(values))
        check_numbers(config)
        return config

    def _build(self, config: Mapping[str, Any]) -> None:
        splits = build_run(config).data.splits
        if "val" not in splits:
            raise CommandError(f"{config['choices']['data']} has no validation split, and a search needs one.")


def _parsed(override: str) -> str | Range | Choice:
    key, _, value = override.partition("=")
    if value.startswith(("interval(", "tag(")):
        raise CommandError(f"{override}: {_FORMS}.")
    if found := _RANGE.fullmatch(value):
        return _range(override, key, found)
    values, varies = alternatives(override)
    return Choice(key, tuple(one.partition("=")[2] for one in values)) if varies else override


def _range(override: str, key: str, found: re.Match[str]) -> Range:
    try:
        low, high = (_number(found[end]) for end in ("low", "high"))
    except ValueError as error:
        raise CommandError(f"{override} is no range ({error}): {_FORMS}.") from None
    if found["scale"] not in (None, "log"):
        raise CommandError(f"{override} has no scale {found['scale']!r}: {_FORMS}.")
    if low >= high:
        raise CommandError(f"{override} is an empty range: its lower end comes first and is below the upper one.")
    if found["scale"] == "log" and low <= 0:
        raise CommandError(f"{override}: a logarithmic scale begins above 0, not at {found['low']}.")
    return Range(key, low, high, found["scale"] == "log")


def _number(text: str) -> float:
    """A whole number where one is written: 1..8 are eight values, 1.0..8.0 are all between."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{text} is no end") from None
        return number


def _is_open(key: str) -> bool:
    """Whether the configuration takes this key without having it already: a choice, or an argument of a class."""
    return key.startswith("+") or key.partition("@")[0] in GROUPS or opened([f"{key}=0"]) != [f"{key}=0"]


def _check_key(key: str, config: Mapping[str, Any]) -> None:
    known = flatten(config)
    if key not in known:
        group, dot, rest = key.partition(".")
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
        near = near or [f"{other}{dot}{rest}" for other in difflib.get_close_matches(group, GROUPS, n=1)]
        raise CommandError(f"the configuration has no {key}.{_hint(near)}")


def _hint(near: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(near)}?" if near else ""
