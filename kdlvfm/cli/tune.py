# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm tune`: a search for hyper-parameters, on the validation split; every trial is an ordinary run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlvfm.cli import CommandError

if TYPE_CHECKING:
    from kdlvfm.cli.config import Launcher
    from kdlvfm.cli.search_space import Space
    from kdlvfm.cli.study import Study, Trial
    from kdlvfm.cli.sweep import Cell, Sweep
    from kdlvfm.reporting.reading import Reading

_SHOWN = 5
_SPLIT = "val"
_SEEDS = 3
_ABOUT = """\
Search for the values of some settings with which the student is best on the validation split (Optuna, tree-structured
Parzen estimator). A trial is a run as of kdlvfm train, in a folder of its own; one that fails is named and stops no
other. Ends with the best trials and the command that repeats the best one with new seeds.
"""
_EXAMPLES = """\
what varies:
  KEY=LOW..HIGH        numbers, whole ones if both ends are: 1..8 are eight values, 1.0..8.0 are all between
  KEY=LOW..HIGH:log    the same on a logarithmic scale
  KEY=a,b,c            one of these

examples:
  kdlvfm tune experiment=demo distiller=kd distiller.loss_weight=0.1..10:log distiller.temperature=1.0..8.0 --jobs 2
  kdlvfm tune experiment=demo distiller=none recipe.optimizer.lr=1e-4..1e-2:log --study runs/tune_baseline.db

The same command, typed again, goes on where it stopped, and does nothing when all trials are done. Other overrides are
those of kdlvfm train; launcher=slurm computes the trials as jobs.
"""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm tune",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="a run, with ranges")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="of the whole study (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time (default: %(default)s)")
    parser.add_argument(
        "--study",
        type=Path,
        default=Path("runs/tune.db"),
        metavar="FILE",
        help="what the search remembers: FILE.db (SQLite) or FILE.journal, which several machines may share; the runs "
        "lie in the folder FILE, or in out=FOLDER (default: %(default)s)",
    )
    parser.add_argument("--metric", help="by which trials are judged (default: the task's, mIoU or mAP)")
    parser.add_argument("--split", default=_SPLIT, help="val, and no other: what is chosen on test is no test any more")
    options = parser.parse_intermixed_args(arguments)
    if options.trials < 1 or options.jobs < 1:
        raise CommandError("--trials and --jobs must be at least 1.")
    if options.split != _SPLIT or (options.metric or "").startswith(("test/", "train/")):
        raise CommandError("a search looks at the validation split. What is chosen on the test split has no test left.")
    if any(one.startswith("launcher.jobs=") for one in options.overrides):
        raise CommandError("--jobs says how many trials there are at a time: leave launcher.jobs out.")
    search = _prepare(options)
    code = search.compute(options.trials)
    return search.conclude() if code == 0 else code


def _prepare(options: argparse.Namespace) -> _Search:
    """The search that a command asks for, with all that can be wrong about it told now."""
    from hydra.utils import get_class

    from kdlvfm.cli.search_space import Space
    from kdlvfm.cli.study import Study, check_path
    from kdlvfm.cli.sweep import key_of
    from kdlvfm.cli.train import check_launcher
    from kdlvfm.reporting.reading import DISTANCE, FRACTION

    check_path(options.study)
    space = Space(options.overrides)
    _, launcher = space.compose_known()
    given = {key_of(override) for override in options.overrides}
    swept = [f"{key}={values}" for key, values in launcher.swept.items() if key not in given]
    space = Space([*options.overrides, *swept]) if swept else space
    if not space.dimensions:
        raise CommandError("nothing varies: give a range, such as distiller.loss_weight=0.1..10:log.")
    check_launcher(launcher)
    if launcher.settings["retry"]:
        raise CommandError("a trial that failed is not tried again: leave launcher.retry out, and raise --trials.")
    if not launcher.settings.get("wait", True):
        raise CommandError("a search waits for its trials: leave launcher.wait out.")
    # A login node is no place to build: what fits there need not fit on the cluster, and the other way round. A study
    # that exists has begun with a run that could be built.
    config = space.check(build=launcher.kind == "local" and not options.study.exists())
    task: Any = get_class(config["task"]["_target_"])
    metric = task.primary_metric if options.metric is None else options.metric.removeprefix(f"{_SPLIT}/")
    reading = DISTANCE if metric in task.distances else FRACTION
    ranges = {key: str(dimension) for key, dimension in space.dimensions.items()}
    described = {**config, "search": ranges}
    study = Study(options.study, metric, described, config["seed"], less_is_better=reading.less_is_better)
    root = options.study.with_suffix("") if config["out"] is None else Path(str(config["out"]))
    launched = tuple(one for one in options.overrides if key_of(one).startswith("launcher"))
    return _Search(study, space, launcher, launched, root, options.jobs, metric, reading)


@dataclass(frozen=True)
class _Search:
    """Trials in a study, computed as the cells of a sweep, `jobs` at a time, in folders below `root`."""

    study: Study
    space: Space
    launcher: Launcher
    launched: tuple[str, ...]
    root: Path
    jobs: int
    metric: str
    reading: Reading

    def compute(self, trials: int) -> int:
        """Ask for trials and compute them until there are so many; 0, or the code of an interruption."""
        from kdlvfm.cli.launch import INTERRUPTED

        self._settle()
        waiting = self._left()
        ended = sum(not trial.open for trial in self.study.trials())
        print(f"study  {self.study.path}: {ended} of {trials} trials have ended; runs in {self.root}", flush=True)
        while True:
            batch, waiting = waiting[: self.jobs], waiting[self.jobs :]
            while len(batch) < self.jobs and len(self.study.trials()) < trials:
                batch.append(self.study.ask(self.space, self._cell))
            if not batch:
                return 0
            completed = self._compute([trial.cell for trial in batch])
            self._settle()
            if not completed:
                return INTERRUPTED

    def _cell(self, number: int, values: Mapping[str, str]) -> Cell:
        from kdlvfm.cli.sweep import cell_of

        title = " ".join([f"trial {number}", *(f"{key}={value}" for key, value in values.items())])
        return cell_of(self.space.overrides(values), self.root, title)[0]

    def _sweep(self) -> Sweep:
        """The trials of all processes that share the study, as `kdlvfm status` shows them."""
        from kdlvfm.cli.sweep import Sweep

        cells = {trial.cell.hash: trial.cell for trial in self.study.trials()}
        return Sweep(self.root / "sweeps" / self.study.path.stem, tuple(cells.values()))

    def _left(self) -> list[Trial]:
        """What an earlier command, interrupted, has left to be computed, or as jobs to be waited for."""
        from kdlvfm.cli.sweep import RUNNING

        sweep = self._sweep()
        return [
            trial
            for trial in self.study.trials()
            if trial.open and (self.launcher.kind == "slurm" or sweep.state(trial.cell).name != RUNNING)
        ]

    def _compute(self, cells: Sequence[Cell]) -> bool:
        """Compute those of a few cells that are neither done nor computed elsewhere; `False` if interrupted."""
        from kdlvfm.cli import slurm
        from kdlvfm.cli.launch import side_by_side
        from kdlvfm.cli.sweep import INTERRUPTED, WAITING

        sweep = self._sweep()
        sweep.write()
        unique = {cell.hash: cell for cell in cells}.values()
        due = [cell for cell in unique if sweep.state(cell).name in (WAITING, INTERRUPTED)]
        if self.launcher.kind == "local":
            if side_by_side(sweep, due, self.jobs):
                return True
            print("\nInterrupted. The same command goes on where it stopped.")
            return False
        slurm.submit(sweep, due, self.launcher.settings)
        try:
            slurm.wait(sweep, cells)
        except KeyboardInterrupt:
            print(f"\nThe jobs go on. The same command waits for them again, kdlvfm status {self.root} shows them.")
            return False
        return True

    def _settle(self) -> None:
        """Tell the study of every trial that has ended."""
        from kdlvfm.cli.sweep import DONE, FAILED

        sweep = self._sweep()
        for trial in self.study.trials():
            if trial.open and (state := sweep.state(trial.cell).name) in (DONE, FAILED):
                self.study.tell(trial, self._score(trial.cell) if state == DONE else None)

    def _score(self, cell: Cell) -> float:
        from kdlvfm.cli.runs import read_run
        from kdlvfm.reporting.cells import score_of

        record = read_run(cell.folder)
        score = score_of(record, _SPLIT, self.metric)
        if score is None:
            names = [name for name, value in record["metrics"].get(_SPLIT, {}).items() if isinstance(value, float)]
            raise CommandError(
                f"{cell.folder} has no {self.metric} on {_SPLIT}; there is {', '.join(names) or 'nothing'}. Choose one "
                "with --metric: what was computed is used again."
            )
        return score

    def conclude(self) -> int:
        """Say what came out and what comes next; 1 if no trial has a score."""
        from kdlvfm.cli.launch import name_missing
        from kdlvfm.cli.sweep import counts

        sweep, trials = self._sweep(), self.study.trials()
        states = sweep.states()
        print(f"\n{counts(states.values())} of {len(states)} runs; {sweep.folder}", flush=True)
        name_missing(sweep, states)
        scored = [(trial.score, trial) for trial in trials if trial.score is not None]
        ranked = [trial for _, trial in sorted(scored, key=lambda pair: -self.reading.gain(pair[0]))]
        best = [*{trial.cell.hash: trial for trial in reversed(ranked)}.values()][::-1]  # values may come twice
        if not best:
            print("No trial has a score.", file=sys.stderr)
            return 1
        self._print(best[:_SHOWN])
        print(f"wrote  {self.study.path}, and in {self.root} the runs")
        print(f"next   {self._repeat(best[0].cell)}")
        print(
            "       Seeds that the search has not seen: its own score is the best of many, and so too good. The "
            "baseline\n       needs the same seeds, and a search with as many trials."
        )
        return 0

    def _print(self, best: Sequence[Trial]) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        from kdlvfm.reporting.columns import METRIC_NAMES

        table = Table(
            title="best trials", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for column in ("trial", f"{METRIC_NAMES.get(self.metric, self.metric)} on {_SPLIT}", *self.space.dimensions):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("run", overflow="fold")
        for trial in best:
            score = "" if trial.score is None else self.reading.text(trial.score)
            table.add_row(
                str(trial.number), score, *(trial.values[key] for key in self.space.dimensions), str(trial.cell.folder)
            )
        console = Console()
        (console if console.is_terminal else Console(width=120)).print(table)

    def _repeat(self, cell: Cell) -> str:
        """The command that computes a trial again with other seeds."""
        from kdlvfm.cli.sweep import key_of

        kept = [override for override in cell.overrides if key_of(override) not in ("seed", "out")]
        seeds = ",".join(str(cell.seed + 1 + i) for i in range(_SEEDS))
        return shlex.join(["kdlvfm", "train", "-m", *kept, f"seed={seeds}", *self.launched])
