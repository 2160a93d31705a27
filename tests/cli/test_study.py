# SPDX-License-Identifier: Apache-2.0
"""The memory of a search: two files, several processes, and values that depend on seed and history alone."""

import math
import sqlite3
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

from optuna.storages import JournalStorage  # noqa: E402
from optuna.storages.journal import JournalFileBackend  # noqa: E402

from kdlvfm.cli import CommandError  # noqa: E402
from kdlvfm.cli.search_space import Space  # noqa: E402
from kdlvfm.cli.study import Study  # noqa: E402
from kdlvfm.cli.sweep import Cell  # noqa: E402

SPACE = Space(["rate=1e-4..1e-2:log", "loss_weight=1..8", "target=none,layernorm"])
DESCRIBED = {"recipe": {"steps": 6}}
FILES = pytest.mark.parametrize("name", ["tune.db", "tune.journal"])


def cell_of(number, values):
    return Cell(
        f"{number:012x}", f"trial {number}", 0, Path(f"runs/{number}"), tuple(f"{k}={v}" for k, v in values.items())
    )


def badness(trial):
    """Distance from the best rate, 1e-3, in powers of ten."""
    return abs(math.log10(float(trial.values["rate"])) + 3)


def search(study, count):
    trials = []
    for _ in range(count):
        trial = study.ask(SPACE, cell_of)
        study.tell(trial, 1 - badness(trial))
        trials.append(trial)
    return trials


@FILES
def test_what_was_asked_and_told_is_there_for_every_process(name, tmp_path):
    ours, theirs = (Study(tmp_path / name, "miou", DESCRIBED, seed=0) for _ in range(2))
    first, second, third = ours.ask(SPACE, cell_of), theirs.ask(SPACE, cell_of), ours.ask(SPACE, cell_of)
    assert [trial.number for trial in (first, second, third)] == [0, 1, 2]
    assert len({trial.values["rate"] for trial in (first, second, third)}) == 3
    assert theirs.trials() == ours.trials() == [first, second, third]
    ours.tell(first, 0.5)
    theirs.tell(first, 0.7)  # both may see that a run has ended
    theirs.tell(second, None)
    found = ours.trials()
    assert [trial.open for trial in found] == [False, False, True]
    assert [trial.score for trial in found] == [0.5, None, None]
    assert [trial.cell for trial in found] == [trial.cell for trial in (first, second, third)]


def test_values_depend_on_the_seed_and_on_what_was_told(tmp_path):
    """In one go, in two parts, and from the other kind of file; another seed makes other values."""
    whole = [trial.values for trial in search(Study(tmp_path / "whole.db", "miou", DESCRIBED, seed=0), 14)]
    parts = []
    for count in (5, 9):
        parts += [trial.values for trial in search(Study(tmp_path / "parts.journal", "miou", DESCRIBED, seed=0), count)]
    assert parts == whole
    other = [trial.values for trial in search(Study(tmp_path / "other.journal", "miou", DESCRIBED, seed=1), 3)]
    assert not any(values in whole for values in other)


def test_it_finds_better_values_than_chance(tmp_path):
    """Random rates are half a power of ten from the best one on average."""
    found = []
    for seed in range(3):
        found += search(Study(tmp_path / f"{seed}.journal", "miou", DESCRIBED, seed), 30)[20:]
    assert sum(map(badness, found)) / len(found) < 0.35


@FILES
def test_a_trial_without_a_cell_is_left_out(name, tmp_path):
    """Its process was killed, or its values make no configuration."""

    def fails(number, values):
        raise CommandError("these do not go together")

    study = Study(tmp_path / name, "miou", DESCRIBED, seed=0)
    with pytest.raises(CommandError, match="do not go together"):
        study.ask(SPACE, fails)
    assert study.trials() == []
    assert study.ask(SPACE, cell_of).number == 1


@FILES
def test_a_file_holds_one_search_for_each_metric(name, tmp_path):
    search(Study(tmp_path / name, "miou", DESCRIBED, seed=0), 1)
    with pytest.raises(CommandError, match=r"holds another search \(recipe.steps: 6 != 7\); choose another file"):
        Study(tmp_path / name, "miou", {"recipe": {"steps": 7}}, seed=0)
    assert len(Study(tmp_path / name, "miou", {**DESCRIBED, "run": {"threads": 1}}, seed=0).trials()) == 1
    assert Study(tmp_path / name, "pixel_accuracy", DESCRIBED, seed=0).trials() == []


@FILES
@pytest.mark.parametrize("kind", ["text", "JSON", "a file in the way"])
def test_a_file_that_is_no_study_stays_as_it_is(kind, name, tmp_path):
    path = tmp_path / "way" / name
    taken = path.parent if kind == "a file in the way" else path
    taken.parent.mkdir(exist_ok=True)
    text = '{"title": "my thesis"}\n' if kind == "JSON" else "my thesis\n"
    taken.write_text(text)
    with pytest.raises(CommandError, match="cannot be used as a study") as error:
        Study(path, "miou", DESCRIBED, seed=0)
    assert "\n" not in str(error.value)
    assert taken.read_text() == text


def test_a_database_of_something_else(tmp_path):
    database = sqlite3.connect(tmp_path / "tune.db")
    database.execute("create table studies (title text)")
    database.close()
    with pytest.raises(CommandError, match="cannot be used as a study"):
        Study(tmp_path / "tune.db", "miou", DESCRIBED, seed=0)


def test_scores_may_be_distances(tmp_path):
    study = Study(tmp_path / "tune.journal", "frechet_distance", DESCRIBED, seed=0, less_is_better=True)
    for score in (3.0, 1.0, 2.0):
        study.tell(study.ask(SPACE, cell_of), score)
    storage = JournalStorage(JournalFileBackend(str(study.path)))
    assert optuna.load_study(study_name="frechet_distance", storage=storage).best_value == 1.0
