# SPDX-License-Identifier: Apache-2.0
"""What each distiller adds to a training step: its seconds beside the baseline's, alternating in one process.

    python benchmarks/step_cost.py --size 128 160 --repeats 4 --out benchmarks/records/step_cost.json

Student: ResNet18 with FPN; teacher: a ViT-S/16 with a linear head; both with random weights, which cost what trained
ones do. One step is forward passes of both, all updates of the method with their backward passes, and the optimizer's.
Methods that alternate between phases are averaged over two epochs. The docs' table of methods reads the record.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from kdlvfm.cli.build import build_student
from kdlvfm.cli.config import compose, options
from kdlvfm.cli.list import read_about
from kdlvfm.cli.targets import instantiate
from kdlvfm.core import Context, Distiller, FeatureModel, Step, Task, Teacher
from kdlvfm.models.head import EncoderHead
from kdlvfm.models.timm import TimmEncoder
from kdlvfm.reporting.record import environment
from kdlvfm.tasks.segmentation import Segmentation

CLASSES = 11


def batch(size: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Random images, and labels in blocks of 32 pixels, as objects are larger than a pixel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, *size, generator=generator)
    coarse = torch.randint(0, CLASSES, (count, 1, -(-size[0] // 32), -(-size[1] // 32)), generator=generator)
    return images, nn.functional.interpolate(coarse.float(), size, mode="nearest").squeeze(1).long()


class Cell:
    """A method with a student and optimizers of its own."""

    def __init__(
        self, name: str, student: FeatureModel, teacher: Teacher, task: Task, shape: tuple[int, int, int]
    ) -> None:
        self.student, self.teacher, self.task = copy.deepcopy(student), teacher, task
        context = Context(self.student, teacher, task, CLASSES, num_samples=64, batch_shape=shape)
        torch.manual_seed(0)
        self.distiller: Distiller = instantiate(compose([f"distiller={name}"])["distiller"])(context)
        self.groups = self.distiller.parameter_groups(self.student)
        self.optimizers = {group: torch.optim.SGD(found, lr=1e-4) for group, found in self.groups.items()}

    def seconds(self, images: Tensor, target: Tensor, epoch: int) -> float:
        """Time of one training step."""
        index = torch.arange(len(images))
        teacher = self.teacher if self.distiller.teacher_taps else None
        began = time.perf_counter()
        step = Step(images, target, index, epoch, 0, self.student, teacher, self.task)
        for update in self.distiller.updates(step):
            self.optimizers[update.group].zero_grad()
            torch.stack(list(update.terms.values())).sum().backward()
            self.optimizers[update.group].step()
        return time.perf_counter() - began


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=None, help="distillers (default: all for segmentation)")
    parser.add_argument("--repeats", type=int, default=6, help="timed pairs of steps for each method")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 224), help="height and width of the images")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, help="the record; printed only if not given")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task = Segmentation(num_classes=CLASSES)
    torch.manual_seed(0)
    student = build_student(compose(["student=resnet18_fpn", "student.pretrained=false"])["student"], CLASSES)
    teacher = Teacher(EncoderHead(TimmEncoder("vit_small_patch16_224", pretrained=False), CLASSES))
    images, target = batch(tuple(chosen.size), chosen.batch)
    names = chosen.methods or [
        name
        for name in options("distiller")
        if name != "none" and "segmentation" in read_about("distiller", name)["tasks"]
    ]
    shape = (chosen.batch, *images.shape[2:])
    baseline = Cell("none", student, teacher, task, shape)
    baseline.seconds(images, target, 0)
    methods = {}
    for name in names:
        try:
            cell = Cell(name, student, teacher, task, shape)
        except ValueError as error:
            print(f"{name:<24} not measured: {error}", flush=True)
            continue
        for epoch in (0, 1):
            cell.seconds(images, target, epoch)
        pairs = [
            (cell.seconds(images, target, repeat % 2), baseline.seconds(images, target, repeat % 2))
            for repeat in range(chosen.repeats)
        ]
        ours = [median(pair[0] for pair in pairs[phase::2]) for phase in (0, 1)]
        methods[name] = {
            "ratio": round(sum(ours) / 2 / median(pair[1] for pair in pairs), 2),
            "parameters": sum(p.numel() for p in cell.distiller.parameters() if p.requires_grad),
            "groups": list(cell.groups),
            "student_taps": list(cell.distiller.student_taps),
            "teacher_taps": list(cell.distiller.teacher_taps),
        }
        print(f"{name:<24} {methods[name]['ratio']:.2f}", flush=True)
    record = {
        "benchmark": "step_cost",
        "setting": {
            "student": student.card.name,
            "teacher": teacher.card.name,
            "images": [chosen.batch, 3, *chosen.size],
            "threads": 1,
            "repeats": chosen.repeats,
            "baseline_seconds": round(median(baseline.seconds(images, target, 0) for _ in range(5)), 3),
        },
        "environment": environment(),
        "methods": methods,
    }
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
