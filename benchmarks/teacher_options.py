# SPDX-License-Identifier: Apache-2.0
"""What the options of teacher and student save: a step with them beside the same step without.

    python benchmarks/teacher_options.py                 measures, and writes the record and the table on the page
    python benchmarks/teacher_options.py --device cuda   the same on a GPU, with a record and a table of its own
    python benchmarks/teacher_options.py --table         writes the tables alone, from the records

All variants train in one process, a step of one after a step of the other, each on the same batches with a student of
its own that starts from the same weights. Ratios are medians of those of steps taken in the same turn. On a CPU a time
is one thread's processor time, for others may wait for the machine. The first turns, in which networks are compiled, do
not count.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from losses_page import PAGE, ROOT, between
from step import Loop

from kdlvfm.cli.build import build_student
from kdlvfm.cli.config import compose
from kdlvfm.core import Context, Teacher
from kdlvfm.data.digit_scenes import DigitScenes
from kdlvfm.distillers import FitNet
from kdlvfm.models.timm import TimmEncoder
from kdlvfm.reporting.record import environment
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.module import DistillationModule
from kdlvfm.training.optimizers import Plan, Plans, poly
from kdlvfm.training.options import running

Options = dict[str, Any]

# What a variant is called, and what it sets of the teacher and of the student. All are compared with the first.
VARIANTS: tuple[tuple[str, Options, Options], ...] = (
    ("none", {}, {}),
    ("teacher.precision=bf16", {"precision": "bf16"}, {}),
    ("teacher.channels_last=true", {"channels_last": True}, {}),
    ("trainer.channels_last=true", {}, {"channels_last": True}),
    ("teacher.compile=true", {"compile": True}, {}),
    ("trainer.compile=true", {}, {"compile": True}),
    (
        "all of these",
        {"precision": "bf16", "channels_last": True, "compile": True},
        {"channels_last": True, "compile": True},
    ),
)


def record_path(device: str) -> Path:
    """Each device has a record."""
    return ROOT / "benchmarks" / "records" / f"teacher_options{'' if device == 'cpu' else f'_{device}'}.json"


class Variant:
    """A loop with options, and the seconds of its steps."""

    def __init__(self, module: DistillationModule, plan: Plan, teacher: Options, now: Callable[[], float]) -> None:
        self.loop = Loop(module, plan)
        assert module.teacher is not None
        self.loop.teacher = Teacher(copy.deepcopy(module.teacher.model), **teacher)
        self.steps: list[float] = []
        self.teachers: list[float] = []
        self._now = now

    def step(self, number: int, images: torch.Tensor, target: torch.Tensor) -> None:
        """A step of training, and its times."""
        teacher, began = self.loop.teacher, self._now()
        assert teacher is not None
        spent: list[float] = []
        hooks = (
            teacher.register_forward_pre_hook(lambda *_: spent.append(-self._now())),
            teacher.register_forward_hook(lambda *_: spent.append(self._now())),
        )
        self.loop.step(number, images, target)
        self.steps.append(self._now() - began)
        self.teachers.append(sum(spent))
        for hook in hooks:
            hook.remove()


def clock(device: str) -> Callable[[], float]:
    """Processor time; on a GPU time by the clock once all work is done."""
    if device == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def measured(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of all variants in the record."""
    batch, size, device, turns = (setting[name] for name in ("batch", "size", "device", "turns"))
    steps = setting["warmup"] + turns
    data = DigitScenes(size=size, labelled=2 * batch, unlabelled=0, batch_size=batch, steps=steps)
    task = Segmentation(num_classes=data.num_classes)
    torch.manual_seed(0)
    overrides = ["student=timm_linear", f"student.encoder.name={setting['student']}"]
    student = build_student(compose([*overrides, "student.encoder.pretrained=false"])["student"], data.num_classes)
    teacher = Teacher(TimmEncoder(setting["teacher"], pretrained=False))
    distiller = FitNet.from_context(Context(student, teacher, task, data.num_classes, data.num_samples))
    plan = Plan(partial(torch.optim.SGD, lr=0.01, momentum=0.9), poly)
    module = DistillationModule(
        student=student.train(),
        distiller=distiller,
        task=task,
        plans=Plans(plan, {}),
        steps=steps,
        batches_per_epoch=data.batches_per_epoch,
        teacher=teacher,
    ).to(device)
    variants = [Variant(module, plan, options, clock(device)) for _, options, _ in VARIANTS]
    with ExitStack() as stack:
        for variant, (_, _, options) in zip(variants, VARIANTS, strict=True):
            stack.enter_context(running(variant.loop.student, **options))
        for number, loaded in enumerate(data.train_dataloader()):
            images, target, _ = task.unpack(loaded)
            for variant in variants:
                variant.step(number, images.to(device), target.to(device))
        # Of the last batch, whose shape is compiled by now.
        features = [value.loop.teacher(images.to(device), distiller.teacher_taps) for value in variants]
    errors = [max(relative_error(each[tap], features[0][tap]) for tap in each) for each in features]
    return [
        entry(name, variant, variants[0], error, turns)
        for (name, _, _), variant, error in zip(VARIANTS, variants, errors, strict=True)
    ]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm())


def entry(name: str, variant: Variant, plain: Variant, error: float, turns: int) -> dict[str, Any]:
    """A variant in the record: medians, and how many times faster it is than the plain one."""
    found: dict[str, Any] = {"options": name, "error": float(f"{error:.2e}")}
    for part in ("teachers", "steps"):
        own, other = vars(variant)[part][-turns:], vars(plain)[part][-turns:]
        ratio = median(b / a for a, b in zip(own, other, strict=True))
        found[part.removesuffix("s")] = {"ms": round(1000 * median(own), 3), "faster": round(ratio, 4)}
    return found


def table(record: dict[str, Any]) -> list[str]:
    """The lines of a record's table."""
    setting, versions = record["setting"], record["environment"]["versions"]
    lines = [
        "| options | teacher | times faster | step | times faster | features off by |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in record["cases"]:
        teacher, step = case["teacher"], case["step"]
        name = case["options"] if " " in case["options"] or case["options"] == "none" else f"`{case['options']}`"
        lines.append(
            f"| {name} | {teacher['ms']:.1f} ms | **{teacher['faster']:.2f}** | {step['ms']:.1f} ms | "
            f"**{step['faster']:.2f}** | {100 * case['error']:.2g} % |"
        )
    hardware = record["environment"]["hardware"]
    where = f"{hardware['cpu']}, 1 thread" if setting["device"] == "cpu" else hardware["gpu"]
    notes = (
        f"{setting['student']} learns from {setting['teacher']}, {setting['batch']} images of "
        f"{setting['size']}x{setting['size']}; {where}, torch {versions['torch']}, {setting['turns']} turns."
    )
    return [*lines, "", notes]


def page() -> str:
    """docs/performance.md with the tables of the records that there are."""
    text = PAGE.read_text(encoding="utf-8")
    for device in ("cpu", "cuda"):
        path = record_path(device)
        if path.exists():
            lines = table(json.loads(path.read_text(encoding="utf-8")))
            text = between(text, f"teacher-options-{device}", lines)
    return text


def main() -> None:
    """Measure, and write the record and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", default="resnet18", help="timm's name (default: %(default)s)")
    parser.add_argument("--teacher", default="vit_small_patch16_224", help="timm's name (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=20, help="that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="turns before them (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    setting = vars(parser.parse_args())
    if not setting.pop("table"):
        torch.set_num_threads(1)
        cases = measured(setting)
        for case in cases:
            print(f"{case['options']}: teacher {case['teacher']['faster']:.2f}, step {case['step']['faster']:.2f}")
        record = {
            "benchmark": "teacher_options",
            "setting": setting,
            "environment": environment(),
            "cases": cases,
        }
        record_path(setting["device"]).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
