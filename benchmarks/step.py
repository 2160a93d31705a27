# SPDX-License-Identifier: Apache-2.0
"""What the trainer adds to a step: its seconds beside a hand-written loop's that does the same arithmetic.

    python benchmarks/step.py            measures, and writes the record and the table in docs/performance.md
    python benchmarks/step.py --table    writes the table alone, from the record

Both train in one process, a step of one after a step of the other, each from a loader of its own that gives the same
batches. The trainer is `kdlvfm.training.fit.fit` as a run has it, with all its callbacks; the loop is what one would
write for this method and no other. In the end both students must have the same weights to the last bit, or nothing is
written. On a CPU it is one thread's processor time, for others may wait for the machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import LightningDataModule
from losses_page import PAGE, ROOT, between

from kdlvfm.cli.build import build_student
from kdlvfm.cli.config import compose
from kdlvfm.core import Context, Teacher
from kdlvfm.data.digit_scenes import DigitScenes
from kdlvfm.distillers import FitNet
from kdlvfm.models.timm import TimmEncoder
from kdlvfm.reporting.record import environment
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.fit import fit
from kdlvfm.training.module import DistillationModule
from kdlvfm.training.optimizers import Plan, Plans, poly

RECORD = ROOT / "benchmarks" / "records" / "step.json"
CASES = (("resnet18", "vit_small_patch16_224", 128), ("test_resnet", "test_vit", 64))
"""Encoder of the student, teacher, side of the images: one as in a study, and one so small that what is added shows."""


class Loop:
    """Student, distiller and optimizer, and a step of theirs as one writes it by hand."""

    def __init__(self, module: DistillationModule, plan: Plan) -> None:
        self.student, self.distiller = copy.deepcopy(module.student), copy.deepcopy(module.distiller)
        self.teacher, self.task, self.plan, self.steps = module.teacher, module.task, plan, module.steps
        self.optimizer = plan.optimizer([*self.student.parameters(), *self.distiller.parameters()])
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.taps = (*self.task.student_taps(self.student), *self.distiller.student_taps)

    def step(self, number: int, images: torch.Tensor, target: torch.Tensor) -> None:
        """One step of training."""
        student = self.student(images, self.taps)
        with torch.no_grad():
            teacher = self.teacher(images, self.distiller.teacher_taps)
        terms = {**self.task.loss(self.student, student, target), **self.distiller(student, teacher)}
        torch.stack(list(terms.values())).sum().backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.plan.factor(number, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Alternating(LightningDataModule):
    """The trainer's data: whenever it asks for a batch, the loop takes a step first.

    The time of the trainer's step is that from its asking for a batch to its asking for the next, without the loop's.
    """

    def __init__(self, data: DigitScenes, loop: Loop) -> None:
        super().__init__()
        self.data, self.loop = data, loop
        self.pairs: list[tuple[float, float]] = []

    def train_dataloader(self) -> Alternating:
        """Itself."""
        return self

    def val_dataloader(self) -> Any:
        """As a run has it; the trainer is not asked to validate."""
        return self.data.val_dataloader()

    def __len__(self) -> int:
        return self.data.steps

    def __iter__(self) -> Iterator[Any]:
        own, theirs = iter(self.data.train_dataloader()), iter(self.data.train_dataloader())
        for number in range(self.data.steps):
            began = time.process_time()
            images, target, _ = self.loop.task.unpack(next(own))
            self.loop.step(number, images, target)
            asked = time.process_time()
            yield next(theirs)
            self.pairs.append((time.process_time() - asked, asked - began))


def measured(student: str, teacher: str, size: int, batch: int, steps: int) -> dict[str, Any]:
    """The entry of a case in the record."""
    data = DigitScenes(size=size, labelled=2 * batch, unlabelled=0, batch_size=batch, steps=steps)
    task = Segmentation(num_classes=data.num_classes)
    torch.manual_seed(0)
    overrides = ["student=timm_linear", f"student.encoder.name={student}", "student.encoder.pretrained=false"]
    network = build_student(compose(overrides)["student"], data.num_classes).train()
    frozen = Teacher(TimmEncoder(teacher, pretrained=False))
    distiller = FitNet.from_context(Context(network, frozen, task, data.num_classes, data.num_samples))
    plan = Plan(partial(torch.optim.SGD, lr=0.01, momentum=0.9), poly)
    module = DistillationModule(
        student=network,
        distiller=distiller,
        task=task,
        plans=Plans(plan, {}),
        steps=steps,
        batches_per_epoch=data.batches_per_epoch,
        teacher=frozen,
    )
    alternating = Alternating(data, Loop(module, plan))
    with tempfile.TemporaryDirectory() as folder:
        fit(
            module=module,
            data=alternating,
            folder=Path(folder),
            trainer={"accelerator": "cpu", "devices": 1},
            checkpoint_every=steps,
            progress="none",
        )
    for one, other in zip(network.state_dict().values(), alternating.loop.student.state_dict().values(), strict=True):
        if not torch.equal(one, other):
            raise RuntimeError("trainer and loop did not do the same arithmetic: their students differ.")
    # The first ones warm up; the last one, which writes a checkpoint, has no end, since no other batch is asked for.
    pairs = alternating.pairs[steps // 5 :]
    return {
        "student": network.card.name,
        "teacher": frozen.card.name,
        "images": [batch, 3, size, size],
        "pairs": len(pairs),
        "trainer_ms": round(1000 * median(pair[0] for pair in pairs), 3),
        "loop_ms": round(1000 * median(pair[1] for pair in pairs), 3),
        "added_ms": round(1000 * median(pair[0] - pair[1] for pair in pairs), 3),
        "ratio": round(median(pair[0] / pair[1] for pair in pairs), 4),
    }


def page(record: dict[str, Any]) -> str:
    """docs/performance.md with the table of the record."""
    lines = [
        "| student | teacher | images | loop | trainer | added | trainer / loop |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in record["cases"]:
        batch, _, height, width = case["images"]
        lines.append(
            f"| {case['student']} | {case['teacher']} | {batch} of {height}x{width} | {case['loop_ms']:.1f} ms | "
            f"{case['trainer_ms']:.1f} ms | {case['added_ms']:.1f} ms | **{case['ratio']:.3f}** |"
        )
    where = record["environment"]["hardware"]["cpu"]
    pairs = " and ".join(str(case["pairs"]) for case in record["cases"])
    versions = record["environment"]["versions"]
    notes = f"{where}, 1 thread, torch {versions['torch']}, lightning {versions['lightning']}, {pairs} pairs of steps."
    return between(PAGE.read_text(encoding="utf-8"), "step", [*lines, "", notes])


def main() -> None:
    """Measure, and write the record and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of each case")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(1)
        cases = []
        for case in CASES:
            cases.append(measured(*case, chosen.batch, chosen.steps))
            print(f"{cases[-1]['student']}: {cases[-1]['ratio']:.3f}, {cases[-1]['added_ms']:.2f} ms", flush=True)
        record = {"benchmark": "step", "environment": environment(), "cases": cases}
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
