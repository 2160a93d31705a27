# SPDX-License-Identifier: Apache-2.0
"""What a teacher cache saves: seconds of an epoch with the teacher and from the cache, alternating in one process.

    python benchmarks/teacher_cache.py            measures, and writes the record and the table in docs/cache.md
    python benchmarks/teacher_cache.py --table    writes the table alone, from the record

Student: ResNet18 with a linear head; teacher: DINOv3's ViT-B/16; both with random weights, which cost what trained ones
do; distiller: FitNet on the last maps. An epoch is the loader's work, the teacher's or the reading of its features,
forward and backward passes and the optimizer's step. The images are scenes made beforehand, so that neither side pays
for them. Each case is a size of the images and one at which the teacher sees them, for it may see them larger than the
student does.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kdlvfm.cli.build import build_student
from kdlvfm.cli.config import compose
from kdlvfm.core import Context, Step, Teacher
from kdlvfm.data.digit_scenes import DigitScenes
from kdlvfm.distillers import FitNet
from kdlvfm.models.timm import TimmEncoder
from kdlvfm.reporting.record import environment
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.cache.compute import compute, measure
from kdlvfm.training.cache.served import CachedTeacher, StoredFeatures
from kdlvfm.training.cache.source import FeatureSource
from kdlvfm.training.cache.store import CacheStore

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "teacher_cache.json"
PAGE = ROOT / "docs" / "cache.md"
CASES = ((128, 128), (128, 224), (224, 224))


class Scenes(DigitScenes):
    """Scenes that are made once and kept."""

    def samples(self, split: str) -> Any:
        """All of a split."""
        if split not in self.__dict__:
            scenes = super().samples(split)
            self.__dict__[split] = [scenes[i] for i in range(len(scenes))]
        return self.__dict__[split]


class Case:
    """Student, teacher and data of one size."""

    def __init__(self, size: int, seen: int, images: int, batch: int, dtype: str, folder: Path) -> None:
        self.data = Scenes(size=size, labelled=images, unlabelled=0, batch_size=batch, steps=images // batch)
        self.task = Segmentation(num_classes=self.data.num_classes)
        torch.manual_seed(0)
        node = compose(["student=resnet18_linear", "student.encoder.pretrained=false"])["student"]
        self.student = build_student(node, self.data.num_classes).train()
        encoder = TimmEncoder("vit_base_patch16_dinov3.lvd1689m", pretrained=False, norm=True)
        self.teacher = Teacher(encoder, input_size=None if seen == size else seen)
        context = Context(self.student, self.teacher, self.task, self.data.num_classes, images)
        self.distiller = FitNet.from_context(context)
        parameters = self.distiller.parameter_groups(self.student)["student"]
        self.optimizer = partial(torch.optim.SGD, lr=1e-3)(parameters)
        self.stand_in, self.companion = self._build(dtype, folder)

    def _build(self, dtype: str, folder: Path) -> tuple[CachedTeacher, StoredFeatures]:
        source = FeatureSource(self.data, self.task, self.teacher, torch.device("cpu"), "32-true", self.data.batch_size)
        keys = sorted({key for batch in self.data.sampler() for key in batch})
        store = CacheStore(folder, self.data.num_samples, 1024, {}, {}, {})
        store.write_index()
        (format,) = measure(source, self.distiller.teacher_taps, dtype, keys).formats
        rows = {store.row(*key): key for key in keys}
        for _ in compute(store, source, {format: [*rows]}, rows):
            pass
        return CachedTeacher(self.teacher, [format]), StoredFeatures(store, [format])

    def epoch(self, cached: bool) -> dict[str, float]:
        """Seconds of an epoch, and those of them that the loader and the teacher took."""
        self.data.companion = self.companion if cached else None
        teacher = self.stand_in if cached else self.teacher
        spent = dict.fromkeys(("loader", "teacher", "all"), 0.0)
        hooks = [
            teacher.register_forward_pre_hook(lambda *_: _add(spent, "teacher", -1)),
            teacher.register_forward_hook(lambda *_: _add(spent, "teacher", 1)),
        ]
        began = time.perf_counter()
        loader = iter(self.data.train_dataloader())
        for _ in range(self.data.steps):
            _add(spent, "loader", -1)
            batch = next(loader)
            _add(spent, "loader", 1)
            images, target, index = self.task.unpack(batch)
            if cached:
                self.stand_in.hold(images, batch["companion"])
            step = Step(images, target, index, 0, 0, self.student, teacher, self.task)
            for update in self.distiller.updates(step):
                self.optimizer.zero_grad()
                torch.stack(list(update.terms.values())).sum().backward()
                self.optimizer.step()
        spent["all"] = time.perf_counter() - began
        for hook in hooks:
            hook.remove()
        return spent


def _add(spent: dict[str, float], part: str, sign: int) -> None:
    spent[part] += sign * time.perf_counter()


def measured(case: Case, repeats: int) -> dict[str, Any]:
    """Medians over pairs of epochs, first with the teacher, then from the cache, after one pair that does not count."""
    pairs = [(case.epoch(cached=False), case.epoch(cached=True)) for _ in range(repeats + 1)][1:]
    ratios = [live["all"] / read["all"] for live, read in pairs]
    found: dict[str, Any] = {"ratio": round(median(ratios), 2), "ratios": [round(ratio, 2) for ratio in ratios]}
    for name, epochs in (("teacher", [pair[0] for pair in pairs]), ("cache", [pair[1] for pair in pairs])):
        total = median(epoch["all"] for epoch in epochs)
        parts = {part: median(epoch[part] / epoch["all"] for epoch in epochs) for part in ("loader", "teacher")}
        found[name] = {
            "epoch_seconds": round(total, 3),
            "share_of_loader": round(parts["loader"], 4),
            "share_of_teacher": round(parts["teacher"], 4),
            "share_of_student": round(1 - sum(parts.values()), 4),
        }
    return {**found, "bytes_per_image": case.companion.formats[0].row_bytes}


def page(record: dict[str, Any]) -> str:
    """docs/cache.md with the table of a record."""
    setting, hardware = record["setting"], record["environment"]["hardware"]
    lines = [
        "| images | the teacher sees | epoch with teacher | epoch from cache | times shorter | the student's share of "
        "both | an image |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in record["cases"]:
        live, read = case["teacher"], case["cache"]
        shares = ", ".join(f"{100 * epoch['share_of_student']:.0f} %" for epoch in (live, read))
        lines.append(
            f"| {case['images']}x{case['images']} | {case['seen']}x{case['seen']} | {live['epoch_seconds']:.2f} s | "
            f"{read['epoch_seconds']:.2f} s | **{case['ratio']:.1f}** | {shares} | "
            f"{case['bytes_per_image'] / 1024:.0f} KiB |"
        )
    notes = (
        f"{setting['teacher']} and {setting['student']} (random weights), `{setting['distiller']}`, "
        f"{setting['images_per_epoch']} images an epoch in batches of {setting['batch']}, {setting['dtype']}, one "
        f"thread of {hardware['cpu']}, torch {record['environment']['versions']['torch']}, {setting['repeats']} pairs."
    )
    mark = "teacher-cache-table"
    text, places = re.subn(
        rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
        lambda marks: "\n".join([marks[1], *lines, "", notes, "", marks[2]]),
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if places != 1:
        raise ValueError(f"{PAGE} has {places} places for the table, not one.")
    return text


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs of epochs for each case")
    parser.add_argument("--images", type=int, default=16, help="in an epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="fp16", help="in which features are stored")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    if not chosen.table:
        RECORD.write_text(json.dumps(measure_all(chosen), indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


def measure_all(chosen: argparse.Namespace) -> dict[str, Any]:
    """The record of all cases."""
    torch.set_num_threads(1)
    cases = []
    for size, seen in CASES:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(size, seen, chosen.images, chosen.batch, chosen.dtype, Path(folder))
            cases.append({"images": size, "seen": seen, **measured(case, chosen.repeats)})
        print(f"images {size}, teacher sees {seen}: {cases[-1]['ratio']:.2f}", flush=True)
    return {
        "benchmark": "teacher_cache",
        "setting": {
            "student": case.student.card.name,
            "teacher": case.teacher.card.name,
            "distiller": "fitnet",
            "images_per_epoch": chosen.images,
            "batch": chosen.batch,
            "dtype": chosen.dtype,
            "threads": 1,
            "repeats": chosen.repeats,
        },
        "environment": environment(),
        "cases": cases,
    }


if __name__ == "__main__":
    main()
