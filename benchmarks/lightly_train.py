# SPDX-License-Identifier: Apache-2.0
"""A distillation of DINOv3 ViT-S/16 into ResNet18 from images without labels, by LightlyTrain's command and by ours.

    python benchmarks/lightly_train.py ../lightly photographs                      runs of both, the record and the page
    python benchmarks/lightly_train.py ../lightly photographs --steps 8 --repeats 1 --out short.json
    python benchmarks/lightly_train.py --table                                     writes the table, from the record

The first folder, made if there is none, is an environment of LightlyTrain's own (AGPL-3.0), which is run there as the
command that it is and never imported. Both commands are given the same teacher file of random weights, method (its
distillation v3, which is our `token_relation`), images, batch, steps, size, crops, mirroring and AdamW, and load images
in their own process; what else they do by default they do. They take turns in float32 and then in mixed bfloat16, where
ours is also given what LightlyTrain has no setting for; the ratios are medians of the pairs'. The last case is a
further run of ours, of the same seed, that reads the teacher's features which a run before it has stored: the second
cell of a sweep. That first run's time is in the record. `lightly_train_clock.py` looks at both with the same clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from losses_page import PAGE, ROOT, between
from peers_environment import build

from kdlvfm.reporting.record import environment

RECORD = ROOT / "benchmarks" / "records" / "lightly_train.json"
VERSION = "0.18.0"
TEACHER = "vit_small_patch16_dinov3"
QUEUE = 128
WARM_UP = 2
SIDES = ("ours", "theirs")
STORED = "bfloat16, features stored by an earlier run"
# Case -> what each command is given besides.
CASES = {
    "float32": {"ours": [], "theirs": ["precision=32-true"]},
    "bfloat16": {
        "ours": ["trainer.precision=bf16-mixed", "trainer.channels_last=true"],
        "theirs": ["precision=bf16-mixed"],
    },
    STORED: {
        "ours": ["trainer.precision=bf16-mixed", "trainer.channels_last=true", "teacher_cache=build"],
        "theirs": ["precision=bf16-mixed"],
    },
}


def ours(chosen: argparse.Namespace, weights: Path, out: Path) -> list[str]:
    """Our script and its arguments."""
    return [
        str(Path(sys.executable).parent / "kdlvfm"),
        "train",
        "task=representation",
        "data=images",
        "recipe=representation",
        f"data.root={chosen.images}",
        f"data.size={chosen.size}",
        "teacher=dinov3_vits16",
        f"teacher.name={TEACHER}",
        "teacher.pretrained=false",
        f"teacher.checkpoint={weights}",
        "student=resnet18",
        "student.pretrained=false",
        "distiller=token_relation",
        f"+distiller.queue_size={QUEUE}",
        f"recipe.steps={chosen.steps}",
        f"recipe.batch_size={chosen.batch}",
        f"recipe.val_every={chosen.steps}",
        "recipe.warmup_steps=0",
        "recipe.optimizer.lr=0.0005",
        "recipe.clip_norm=1.0",
        *(f"recipe.augmentation.{colour}=0" for colour in ("brightness", "contrast", "saturation")),
        "run.num_workers=0",
        "run.inference_seconds=null",
        f"trainer.accelerator={chosen.device}",
        f"out={out}",
    ]


def theirs(chosen: argparse.Namespace, weights: Path, out: Path) -> list[str]:
    """Their script and its arguments; an image's area is cut to between a quarter and all, as in ours."""
    epochs = -(-chosen.steps // max(chosen.count // chosen.batch, 1))
    return [
        str(chosen.folder / "bin" / "lightly-train"),
        "pretrain",
        f"out={out}",
        f"data={chosen.images}",
        "model=timm/resnet18",
        "model_args.pretrained=false",
        "method=distillationv3",
        f"method_args.teacher=timm/{TEACHER}",
        "method_args.teacher_args.pretrained=false",
        f"method_args.teacher_weights={weights}",
        f"method_args.queue_size={QUEUE}",
        f"epochs={epochs}",
        f"trainer_args.max_steps={chosen.steps}",
        f"batch_size={chosen.batch}",
        f"transform_args.image_size=[{chosen.size},{chosen.size}]",
        "transform_args.random_resize.min_scale=0.25",
        "transform_args.color_jitter=null",
        "transform_args.random_gray_scale=null",
        "transform_args.gaussian_blur=null",
        "optim=adamw",
        "optim_args.lr=0.0005",
        "num_workers=0",
        "devices=1",
        f"accelerator={chosen.device}",
    ]


def run(side: str, case: str, chosen: argparse.Namespace, weights: Path, folder: Path) -> dict[str, float]:
    """One run: seconds to the end of the first step, images a second after the first steps, and peak memory."""
    report = folder / f"{side}.json"
    python = sys.executable if side == "ours" else str(chosen.folder / "bin" / "python")
    command = (ours if side == "ours" else theirs)(chosen, weights, folder / side) + CASES[case][side]
    if case == STORED and side == "ours":
        command.append(f"teacher_cache.folder={folder.parent / 'features'}")
    clock = Path(__file__).with_name("lightly_train_clock.py")
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(chosen.threads),
        "LIGHTLY_TRAIN_EVENTS_DISABLED": "1",
    }
    started = time.time()
    finished = subprocess.run(
        [python, str(clock), str(report), str(chosen.batch), *command],
        env=variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.time() - started
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
    found = json.loads(report.read_text(encoding="utf-8"))
    began = found["began"]
    if len(began) != chosen.steps:
        raise SystemExit(f"{side} took {len(began)} steps instead of {chosen.steps}.")
    steps = [after - before for before, after in zip(began[WARM_UP:], began[WARM_UP + 1 :], strict=False)]
    bytes_held = found["rss_kib"] * 1024 if found["gpu_bytes"] is None else found["gpu_bytes"]
    return {
        "images_per_second": round(chosen.batch / median(steps), 3),
        "seconds_to_first_step": round(began[1] - started, 2),
        "seconds": round(seconds, 2),
        "mib": round(bytes_held / 2**20, 1),
    }


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """The record."""
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "teacher.pt"
        torch.manual_seed(0)
        torch.save(timm.create_model(TEACHER, num_classes=0).state_dict(), weights)
        cases = [compared(case, chosen, weights, Path(scratch)) for case in CASES]
    return {
        "benchmark": "lightly_train",
        "setting": {
            "device": chosen.device,
            "threads": chosen.threads,
            "images": chosen.count,
            "size": chosen.size,
            "batch": chosen.batch,
            "steps": chosen.steps,
            "teacher": TEACHER,
            "student": "resnet18",
            "lightly_train": VERSION,
        },
        "environment": environment(),
        "cases": cases,
    }


def compared(case: str, chosen: argparse.Namespace, weights: Path, scratch: Path) -> dict[str, Any]:
    """Both commands by turns in one case."""
    pairs: list[dict[str, dict[str, float]]] = []
    first = {}
    if case == STORED:
        folder = scratch / "first"
        folder.mkdir()
        first = {"first_run": run("ours", case, chosen, weights, folder)}
    for repeat in range(chosen.repeats):
        folder = scratch / f"{list(CASES).index(case)}-{repeat}"
        folder.mkdir()
        order = SIDES[:: -1 if repeat % 2 else 1]
        pairs.append({side: run(side, case, chosen, weights, folder) for side in order})
        print(*(f"{case}, {side}: {pairs[-1][side]}" for side in SIDES), sep="\n", flush=True)
    names = pairs[0]["ours"]
    return {
        "case": case,
        "added": CASES[case],
        **first,
        "repeats": pairs,
        **{side: {name: median(pair[side][name] for pair in pairs) for name in names} for side in SIDES},
        "ours_over_theirs": {
            name: round(median(pair["ours"][name] / pair["theirs"][name] for pair in pairs), 3) for name in names
        },
    }


def table(record: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    setting, where = record["setting"], record["environment"]
    parts = {
        "images_per_second": "images a second",
        "seconds_to_first_step": "seconds to the end of the first step",
        "mib": "most memory, MiB",
    }
    lines = ["| | | kdlvfm | LightlyTrain | kdlvfm / LightlyTrain |", "| --- | --- | ---: | ---: | ---: |"]
    lines += [
        f"| {case['case']} | {text} | {case['ours'][name]:.4g} | {case['theirs'][name]:.4g} | "
        f"**{case['ours_over_theirs'][name]:.2f}** |"
        for case in record["cases"]
        for name, text in parts.items()
    ]
    hardware = where["hardware"]["gpu"] if setting["device"] == "gpu" else where["hardware"]["cpu"]
    side, repeats = setting["size"], len(record["cases"][0]["repeats"])
    stored = next(case for case in record["cases"] if case["case"] == STORED)
    return [
        *lines,
        "",
        f"{hardware}, {setting['threads']} thread, {setting['steps']} steps of {setting['batch']} images of "
        f"{side}x{side}, LightlyTrain {setting['lightly_train']}, {repeats} runs of each. The run that stored the "
        f"features took {stored['first_run']['seconds']:.0f} s, one that read them {stored['ours']['seconds']:.0f} s.",
    ]


def page(record: dict[str, Any]) -> str:
    """docs/performance.md with the record's table."""
    return between(PAGE.read_text(encoding="utf-8"), "lightly-train", table(record))


def prepared(chosen: argparse.Namespace) -> dict[str, Any]:
    """Check what is asked for, install the peer, and measure."""
    chosen.folder, chosen.images = chosen.folder.resolve(), chosen.images.resolve()
    chosen.count = sum(path.suffix.lower() in {".jpg", ".jpeg", ".png"} for path in chosen.images.rglob("*"))
    if chosen.count <= QUEUE:
        raise SystemExit(f"{chosen.images} holds {chosen.count} images; the queue alone needs more than {QUEUE}.")
    if chosen.steps < WARM_UP + 3:
        raise SystemExit(f"--steps must be at least {WARM_UP + 3}: the first {WARM_UP} are not timed.")
    build(chosen.folder, [f"lightly-train=={VERSION}"])
    return measure(chosen)


def main() -> None:
    """Run both, and write the record and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of LightlyTrain's environment")
    parser.add_argument("images", type=Path, nargs="?", help="a folder of images")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the squares")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    if not chosen.table:
        if chosen.folder is None or chosen.images is None:
            parser.error("say which folder LightlyTrain's environment is, or is to be made, in, and which the images.")
        chosen.out.write_text(json.dumps(prepared(chosen), indent=2) + "\n", encoding="utf-8")
    if chosen.out == RECORD:
        PAGE.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
