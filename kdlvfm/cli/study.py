# SPDX-License-Identifier: Apache-2.0
"""The memory of a search: an Optuna study in a file that several processes may share, and its trials as cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import OptunaError
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from kdlvfm.cli import CommandError
from kdlvfm.cli.search_space import Space
from kdlvfm.cli.sweep import Cell
from kdlvfm.data.sampler import mix_seed
from kdlvfm.reporting.record import differences

_SUFFIXES = {".db": "SQLite", ".journal": "Optuna's journal"}


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    Attributes:
        number: from 0, in the order of asking.
        values: key -> value, of what is searched.
        cell: the run.
        open: whether its end is yet to be told.
        score: the metric; `None` while it is open, and if it failed.
    """

    number: int
    values: Mapping[str, str]
    cell: Cell
    open: bool
    score: float | None


class Study:
    """A search in a file: asked for values, told of scores.

    The values of a trial are a function of the seed, its number and the trials that were told before it, so that a
    search that was interrupted goes on as it would have.

    Args:
        path: `.db` for SQLite, `.journal` for Optuna's journal file, which suits several machines too.
        metric: what the scores are; for each metric a file holds one study.
        described: configuration and ranges in plain data, which the file remembers.
        seed: of the values.
        less_is_better: whether scores are to be low.

    Raises:
        CommandError: the file cannot be read or written, or holds another search.
    """

    def __init__(
        self, path: Path, metric: str, described: Mapping[str, Any], seed: int, *, less_is_better: bool = False
    ) -> None:
        self.path = path
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            _check_journal(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._study = optuna.create_study(
                storage=_storage(path),
                study_name=metric,
                sampler=_SeededByNumber(seed),
                direction="minimize" if less_is_better else "maximize",
                load_if_exists=True,
            )
            earlier = self._study.user_attrs.get("described")
            if earlier is None:
                self._study.set_user_attr("described", dict(described))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, OptunaError, SQLAlchemyError) as error:
            raise CommandError(f"{path} cannot be used as a study ({str(error).splitlines()[0]}).") from error
        if earlier is not None and (changed := differences(earlier, described)):
            shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
            raise CommandError(f"{path} holds another search ({shown}); choose another file with --study.")

    def trials(self) -> list[Trial]:
        """All trials so far, of every process that shares the file."""
        # A process may be killed between asking and saying what it asked for.
        return [_trial(one) for one in self._study.get_trials(deepcopy=False) if "cell" in one.user_attrs]

    def ask(self, space: Space, make: Callable[[int, Mapping[str, str]], Cell]) -> Trial:
        """A new trial; `make` turns its number and values into a cell."""
        asked = self._study.ask()
        values = {key: dimension.draw(asked) for key, dimension in space.dimensions.items()}
        try:
            cell = make(asked.number, values)
        except CommandError:
            self._study.tell(asked, state=TrialState.FAIL)
            raise
        asked.set_user_attr("values", values)
        asked.set_user_attr("cell", cell.plain())
        return Trial(asked.number, values, cell, open=True, score=None)

    def tell(self, trial: Trial, score: float | None) -> None:
        """End a trial: with its score, or as failed. One that another process has ended stays as it is."""
        state = TrialState.FAIL if score is None else TrialState.COMPLETE
        self._study.tell(trial.number, score, state=state, skip_if_finished=True)


def _trial(trial: FrozenTrial) -> Trial:
    return Trial(
        number=trial.number,
        values=trial.user_attrs["values"],
        cell=Cell.of_plain(trial.user_attrs["cell"]),
        open=trial.state == TrialState.RUNNING,
        score=trial.value if trial.state == TrialState.COMPLETE else None,
    )


def check_path(path: Path) -> None:
    """Raise for a file that cannot hold a study, before anything is computed.

    Raises:
        CommandError: naming those that can.
    """
    if path.suffix not in _SUFFIXES or path.is_dir():
        known = " or ".join(f"FILE{suffix} ({kind})" for suffix, kind in _SUFFIXES.items())
        raise CommandError(f"--study {path} is no file for a study: it is {known}.")


def _check_journal(path: Path) -> None:
    """Raise for a file that is no journal: Optuna would write to it, and then find that it cannot read it."""
    if path.suffix != ".journal" or not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        first = lines.readline()
    if first and "op_code" not in json.loads(first):
        raise ValueError("it is no journal of Optuna's")


def _storage(path: Path) -> BaseStorage:
    if path.suffix == ".journal":
        return JournalStorage(JournalFileBackend(str(path)))
    return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})


class _SeededByNumber(BaseSampler):
    """Optuna's default sampler, the tree-structured Parzen estimator (Bergstra et al., 2011), for each trial anew.

    One sampler with a seed would draw the same values again in every process, and after every interruption.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._samplers: dict[int, TPESampler] = {}

    def _of(self, trial: FrozenTrial) -> TPESampler:
        if trial.number not in self._samplers:
            self._samplers = {trial.number: TPESampler(seed=mix_seed("search", self._seed, trial.number) % 2**32)}
        return self._samplers[trial.number]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)
