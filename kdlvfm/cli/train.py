# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm train`: one run, or with -m a run for every combination of the values given."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from kdlvfm.cli import CommandError
from kdlvfm.cli.config import GROUPS, Launcher, compose, options

_HELP = """\
usage: kdlvfm train [-m] [--print-config] [GROUP=NAME ...] [KEY=VALUE ...]

Train a student. A finished run is not repeated, an interrupted one goes on where it stopped.

  -m, --multirun   a sweep: every combination of comma-separated values, distiller=none,kd seed=0,1,2. What is finished
                   is left alone, what was interrupted goes on, and a cell that fails stops no other
  --print-config   show the resolved configuration and stop

groups:
{groups}

task=detection and task=representation bring data, student and recipe of their own, unless others are named.

often set:
  seed=0                      order of the data, initial weights, augmentation
  out=FOLDER                  instead of runs/<data>/<student>/<distiller>-<teacher>-seed<seed>-<hash>
  teacher.pretrained=false    random weights (said in the record); teacher.checkpoint=PATH reads a local file
  trainer.precision=bf16-mixed  trainer=ddp  recipe.steps=1000  recipe.optimizer.lr=0.01
  teacher.precision=bf16      the teacher alone in half precision; teacher.compile=true  trainer.compile=true
                              teacher.batch=4 and others that make a step cheaper: docs/performance.md
  equal_time=RUN              with distiller=none: so many steps that it takes as long as that run of a distiller
  after=RUN                   start with the encoder of a run of task=representation: the second of two stages
  distiller.loss_weight=5     any argument of the distiller's class; the same for teacher, student and data
  distiller=kd+cwd            several distillers in one run: distiller.parts.cwd.loss_weight=5
                              distiller.weights.cwd.share=0.1  distiller.weights.kd.warmup=0.2
  distiller=data_free:kd      without the training data, on synthetic images: synthesizer=pool, generator or noise
  teacher_cache=build         the teacher's features are computed once and read in every step; teacher_cache.views=8
                              teacher_cache.dtype=int8; see docs/cache.md and kdlvfm cache --help

of a sweep:
  out=FOLDER                  for all its runs, each in a folder of its own
  launcher.jobs=4             four at a time on this machine, each on a GPU of its own if there are several
  launcher=slurm              jobs of a cluster: launcher.partition=gpu launcher.time=240
  launcher.retry=true         what failed is tried again

examples:
  kdlvfm train data=digit_scenes teacher=digit_scenes_vit distiller=kd student=resnet18_fpn recipe=digit_scenes
  kdlvfm train -m distiller=none,fitnet,cwd,fitnet+cwd seed=0,1,2 data=camvid teacher=dinov3_vits16

`kdlvfm list` shows all names with licences and papers, `kdlvfm inspect` taps, `kdlvfm status` how far a sweep is.
"""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    if {"-h", "--help"} & set(flags):
        groups = "\n".join(f"  {group:<11} {_wrap(options(group), 14)}" for group in GROUPS if options(group))
        print(_HELP.format(groups=groups))
        return 0
    unknown = set(flags) - {"-m", "--multirun", "--print-config"}
    if unknown:
        raise CommandError(f"unknown option {' '.join(sorted(unknown))}; see kdlvfm train --help.")
    if {"-m", "--multirun"} & set(flags):
        if "--print-config" in flags:
            raise CommandError("--print-config shows one run: leave -m out.")
        return _multirun(overrides)
    if any(override.startswith("launcher") for override in overrides):
        raise CommandError("launcher= is about sweeps: add -m.")
    config = compose(overrides)
    if "--print-config" in flags:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return 0
    from kdlvfm.cli.lifecycle import train

    return train(config, overrides)


def check_launcher(launcher: Launcher) -> None:
    """Raise `CommandError` for settings that no cell can be started with."""
    settings = launcher.settings
    if launcher.kind not in ("local", "slurm"):
        raise CommandError(f"launcher.kind must be local or slurm, not {launcher.kind!r}.")
    for key, kind in (("retry", bool), ("wait", bool), ("jobs", int)):
        if key in settings and (type(settings[key]) is not kind or (kind is int and settings[key] < 1)):
            wanted = "true or false" if kind is bool else "a number from 1"
            raise CommandError(f"launcher.{key} must be {wanted}, not {settings[key]!r}.")
    if launcher.kind == "slurm":
        from kdlvfm.cli.slurm import check_settings

        check_settings(settings)


def _wrap(names: Sequence[str], indent: int) -> str:
    return textwrap.fill(", ".join(names), 118 - indent, break_on_hyphens=False).replace("\n", "\n" + " " * indent)


def _multirun(overrides: Sequence[str]) -> int:
    """Every combination: what is finished is left alone, and a cell that fails stops no other."""
    from kdlvfm.cli import slurm
    from kdlvfm.cli.launch import INTERRUPTED, side_by_side, summarise
    from kdlvfm.cli.sweep import Cell, plan

    sweep, launchers = plan(overrides)
    alike: dict[str, list[Cell]] = {}
    for cell, launcher in launchers.items():
        alike.setdefault(repr(launcher), []).append(cell)
        check_launcher(launcher)
    sweep.write()
    print(f"{len(sweep.cells)} cells, {sweep.folder}", flush=True)
    for cells in alike.values():
        launcher = launchers[cells[0]]
        due = [cell for cell in sweep.due(launcher.settings["retry"]) if cell in cells]
        if launcher.kind == "slurm":
            slurm.submit(sweep, due, launcher.settings)
        elif not side_by_side(sweep, due, launcher.settings["jobs"]):
            print("\nInterrupted. The same command goes on where it stopped.")
            return INTERRUPTED
    submitted = [cell for cell, launcher in launchers.items() if launcher.kind == "slurm"]
    awaited = [cell for cell in submitted if launchers[cell].settings["wait"]]
    try:
        if awaited:
            slurm.wait(sweep, awaited)
    except KeyboardInterrupt:
        print(f"\nThe jobs go on. kdlvfm status {sweep.folder} shows them, scancel ends them.")
        return INTERRUPTED
    if len(awaited) < len(submitted):
        print(f"next   kdlvfm status {sweep.folder}")
        return 0
    return summarise(sweep)
