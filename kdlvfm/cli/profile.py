# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm profile`: where the time of a training step goes, and what to do about it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kdlvfm.cli import CommandError

if TYPE_CHECKING:
    from kdlvfm.cli.build import Cell

_DESCRIPTION = """\
Take some training steps of a configuration and say where their time goes: data,
teacher, student, loss, backward pass, optimizer, and the trainer around them.
Nothing is kept of the steps. With teacher_cache=build what is still missing in
the cache is computed first, and kept.
"""
_EXAMPLES = """\
examples:
  kdlvfm profile experiment=demo distiller=cwd
  kdlvfm profile experiment=demo distiller=cwd teacher.precision=bf16 trainer.channels_last=true
  kdlvfm profile data=camvid teacher=dinov3_vitb16 distiller=fitnet recipe=cirkd_40k --steps 50 --json step.json
"""
_LEAST_WAIT = 0.1
"""Share of a step from which waiting for data is the bottleneck: little work is as easily avoided."""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm profile",
        usage="kdlvfm profile GROUP=NAME KEY=VALUE ... [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as kdlvfm train takes them")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="that are timed (default: %(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=3, metavar="N", help="steps before, which are not (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, and where they were measured")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 1 or options.warmup < 0:
        raise CommandError("--steps must be at least 1, and --warmup at least 0.")
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise CommandError(f"--json {options.json} cannot be written: name a file in a folder that exists.")
    from kdlvfm.cli.config import compose

    config = compose(options.overrides)
    needed = options.warmup + options.steps + 1  # the last step ends where no other begins
    if config["out"] is not None:
        raise CommandError("out= is for runs: kdlvfm profile keeps nothing of its steps. Leave it out.")
    from kdlvfm.cli.build import build, check_numbers

    config["run"]["progress"] = "none"
    check_numbers(config)
    if config["recipe"]["steps"] < needed:
        raise CommandError(
            f"recipe.steps={config['recipe']['steps']} is too few: {options.warmup} steps of warm-up and "
            f"{options.steps} timed ones need {needed}. Lower --steps, or raise recipe.steps."
        )
    import torch

    if config["run"]["threads"]:
        torch.set_num_threads(config["run"]["threads"])
    cell = build(config)
    found = _measure(cell, config, options.warmup, needed)
    _show(found, options.steps)
    if options.json is not None:
        from kdlvfm.reporting.record import environment

        whole = {"command": ["kdlvfm", "profile", *arguments], "config": config, **environment(), **found}
        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        print(f"wrote  {options.json}")
    print(f"next   {found['advice']}")
    return 0


def _measure(cell: Cell, config: Mapping[str, Any], warmup: int, steps: int) -> dict[str, Any]:
    """Seconds of the parts of a step, images a second, and what is to be made of them."""
    from kdlvfm.training.fit import fit
    from kdlvfm.training.step_profile import PARTS, StepProfile

    cell.fill_cache()
    print(f"{steps} steps of {cell.data.batch_size} images ...", flush=True)
    with TemporaryDirectory() as folder, StepProfile(cell.module) as profile:
        try:
            result = fit(
                module=cell.module,
                data=cell.data,
                folder=Path(folder),
                trainer={**config["trainer"], "profiler": profile, "limit_train_batches": steps},
                checkpoint_every=steps,
                progress="none",
                diagnose_every=None,
                dead_term_steps=None,
            )
        except RuntimeError as error:
            raise CommandError(str(error)) from error
    if not result.finished:
        raise KeyboardInterrupt
    timed = profile.steps[warmup:]
    seconds = {part: sum(step[part] for step in timed) / len(timed) for part in PARTS}
    whole = sum(seconds.values())
    images = {"step": cell.data.batch_size / (whole - seconds["data"]), "loader": _loader_speed(cell, len(timed))}
    found: dict[str, Any] = {
        "steps": len(timed),
        "batch_size": cell.data.batch_size,
        "device": str(result.device),
        "step_seconds": whole,
        "seconds": seconds,
        "images_per_second": images,
        "peak_memory_mib": result.cost["peak_memory_mib"],
    }
    return {**found, **verdict(seconds, images, cell.cache is not None, cell.data.num_workers)}


def _loader_speed(cell: Cell, batches: int) -> float:
    """Images a second of the loader alone; the first batch, for which workers start, does not count."""
    loader = iter(cell.data.train_dataloader())
    next(loader)
    began = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return batches * cell.data.batch_size / (time.perf_counter() - began)


def verdict(
    seconds: Mapping[str, float], images: Mapping[str, float], cached: bool, num_workers: int
) -> dict[str, str]:
    """What the bottleneck of a step is, and what could be done.

    Args:
        seconds: of each part of a step.
        images: images a second of the `step` without its wait for data, and of the `loader` alone.
        cached: the teacher's features come from a cache.
        num_workers: processes that prepare samples.

    Returns:
        `bottleneck`, a sentence, and `advice`.
    """
    whole = sum(seconds.values())
    if seconds["data"] >= _LEAST_WAIT * whole:
        more = "4" if num_workers == 0 else str(2 * num_workers)
        return {
            "bottleneck": f"the loader: {_percent(seconds['data'], whole)} of a step waits for data; the loader gives "
            f"{images['loader']:.3g} images/s, the rest of a step takes {images['step']:.3g}",
            "advice": f"run.num_workers={more}: that many processes prepare samples beside the training",
        }
    part = max((name for name in seconds if name != "data"), key=lambda name: seconds[name])
    advice = {
        "teacher": "teacher_cache=build: the teacher's features are computed once, and read in every step; or "
        "teacher.precision, teacher.compile and others, see docs/performance.md",
        "trainer": "a larger recipe.batch_size: a step of it costs the trainer no more",
        "loss": "kdlvfm list distiller, and docs/performance.md for what each loss costs",
        "optimizer": "another recipe.optimizer, or a larger recipe.batch_size",
    }.get(part, "trainer.precision=bf16-mixed on a GPU, or a smaller student: the networks themselves take the time")
    if part == "teacher" and cached:
        advice = "teacher_cache.dtype=int8: less is read for every image"
    names = {"student": "the student's forward pass", "backward": "the backward pass"}
    return {
        "bottleneck": f"{names.get(part, f'the {part}')}: {_percent(seconds[part], whole)} of a step; the loader gives "
        f"{images['loader']:.3g} images/s, a step takes {images['step']:.3g}",
        "advice": advice,
    }


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def _show(found: Mapping[str, Any], steps: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    whole = found["step_seconds"]
    table.add_column("part of a step", "all", style="cyan")
    table.add_column("ms", f"{1000 * whole:.2f}", justify="right")
    table.add_column("share", "100 %", justify="right")
    for part, seconds in found["seconds"].items():
        table.add_row(part, f"{1000 * seconds:.2f}", f"{100 * seconds / whole:.1f} %")
    Console().print(table)
    print(f"mean of {steps} steps of {found['batch_size']} images on {found['device']}")
    print(f"bottleneck  {found['bottleneck']}")
