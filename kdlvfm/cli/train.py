# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm train`: one run, or with -m a run for every combination of the values given."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Sequence

from kdlvfm.cli import CommandError
from kdlvfm.cli.composites import hidden, shown
from kdlvfm.cli.config import GROUPS, check_names, compose, config_dir, opened, options

_HELP = """\
usage: kdlvfm train [-m] [--print-config] [GROUP=NAME ...] [KEY=VALUE ...]

Train a student. A finished run is not repeated, an interrupted one goes on where it stopped.

  -m, --multirun   every combination of comma-separated values: distiller=none,kd seed=0,1,2
  --print-config   show the resolved configuration and stop

groups:
{groups}

often set:
  seed=0                      order of the data, initial weights, augmentation
  out=FOLDER                  instead of runs/<data>/<student>/<distiller>-<teacher>-seed<seed>-<hash>
  teacher.pretrained=false    random weights (said in the record); teacher.checkpoint=PATH reads a local file
  trainer.precision=bf16-mixed  trainer=ddp  recipe.steps=1000  recipe.optimizer.lr=0.01
  distiller.loss_weight=5     any argument of the distiller's class; the same for teacher, student and data
  distiller=kd+cwd            several distillers in one run: distiller.parts.cwd.loss_weight=5
                              distiller.weights.cwd.share=0.1  distiller.weights.kd.warmup=0.2

examples:
  kdlvfm train data=digit_scenes teacher=digit_scenes_vit distiller=kd student=resnet18_fpn recipe=digit_scenes
  kdlvfm train -m distiller=none,fitnet,cwd,fitnet+cwd seed=0,1,2 data=camvid teacher=dinov3_vits16

`kdlvfm list` shows all names with licences and papers; `kdlvfm inspect` shows taps.
"""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    if {"-h", "--help"} & set(flags):
        groups = "\n".join(f"  {group:<10} {_wrap(options(group), 13)}" for group in GROUPS if options(group))
        print(_HELP.format(groups=groups))
        return 0
    unknown = set(flags) - {"-m", "--multirun", "--print-config"}
    if unknown:
        raise CommandError(f"unknown option {' '.join(sorted(unknown))}; see kdlvfm train --help.")
    if {"-m", "--multirun"} & set(flags):
        return _multirun(overrides)
    config = compose(overrides)
    if "--print-config" in flags:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return 0
    from kdlvfm.cli.lifecycle import train

    return train(config, overrides)


def _wrap(names: Sequence[str], indent: int) -> str:
    return textwrap.fill(", ".join(names), 118 - indent, break_on_hyphens=False).replace("\n", "\n" + " " * indent)


def _multirun(overrides: Sequence[str]) -> int:
    """Hydra expands the combinations; each cell is a process of its own, so one that fails stops no other."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from kdlvfm.cli.lifecycle import command_line

    check_names(overrides)
    failed: list[str] = []

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")
    def cell(_: DictConfig) -> None:
        own = [shown(override.removeprefix("++")) for override in HydraConfig.get().overrides.task]
        print(f"\n{command_line(own)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "kdlvfm", "train", *own], check=False).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code:
            failed.append(command_line(own))

    kept, sys.argv = sys.argv, ["kdlvfm", "-m", *opened([hidden(override) for override in overrides])]
    try:
        cell()
    finally:
        sys.argv = kept
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return 1 if failed else 0
