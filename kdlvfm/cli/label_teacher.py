# SPDX-License-Identifier: Apache-2.0
"""The teacher of `kdlvfm label`: what its head finds, what its classes are called, and how images are shown to it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class

from kdlvfm import __version__
from kdlvfm.cli import CommandError
from kdlvfm.cli.build import build_teacher
from kdlvfm.cli.config import compose
from kdlvfm.cli.label import CONFIDENCE
from kdlvfm.cli.label_kinds import Boxes, Labeller, Masks
from kdlvfm.cli.list import read_about
from kdlvfm.cli.runs import read_run
from kdlvfm.core import Detector, Task, Teacher
from kdlvfm.data.segmentation import VOID
from kdlvfm.reporting.record import now
from kdlvfm.training.cache.source import weights_hash

_TASKS = {"masks": "segmentation", "boxes": "detection"}
# Where weights come from, and names of classes: which ones they are is said elsewhere.
_APART = ("run", "checkpoint", "pretrained", "class_names")


def build_labeller(
    options: argparse.Namespace, overrides: Sequence[str], device: torch.device
) -> tuple[Labeller, dict[str, Any]]:
    """The teacher and how it labels, and what `labels.json` says about them.

    Args:
        options: of the command.
        overrides: `teacher=NAME`, `teacher.KEY=VALUE` and, to make sure, `task=NAME`.
        device: where the teacher computes.

    Raises:
        CommandError: a teacher without a head, or one that does not fit the options.
    """
    config = compose(["distiller=kd", *(word for word in overrides if not word.startswith("task="))])
    node, choice = config["teacher"], config["choices"]["teacher"]
    if node is None:
        raise CommandError("teacher=none labels nothing; name another, for example teacher=from_run teacher.run=RUN.")
    classes = _known_classes(node, choice, options.classes)
    torch.manual_seed(0)  # random weights, where they are asked for, are the same when the call goes on
    teacher = build_teacher(node, tuple(classes))
    assert teacher is not None
    truth, count = _head(teacher)
    asked = [word.partition("=")[2] for word in overrides if word.startswith("task=")]
    if asked and asked[-1] != _TASKS[truth]:
        raise CommandError(f"task={asked[-1]} does not fit {teacher.card.name}, which gives {truth}: leave task= out.")
    if truth == "masks" and options.resize is not None:
        raise CommandError("--resize is for detectors; of a teacher that labels pixels set teacher.input_size=[H,W].")
    if len(classes) != count:
        given = f"there are {len(classes)} names" if classes else "their names are not known"
        raise CommandError(f"teacher={choice} has {count} classes, and {given}: --classes names them in their order.")
    confidence = CONFIDENCE[truth] if options.confidence is None else options.confidence
    resize = (options.resize or _size_in_run(node, choice)) if truth == "boxes" else None
    about = {
        "truth": truth,
        "teacher": {
            **asdict(teacher.card),
            "weights_hash": weights_hash(teacher),
            "settings": {key: value for key, value in node.items() if key not in _APART},
        },
        "classes": classes,
        "confidence": confidence,
        "ignore_value": VOID if truth == "masks" else None,
        "resize": resize,
        "val": options.val,
        "kept": None,
        "started": now(),
        "ended": None,
        "kdlvfm": __version__,
    }
    kind = Masks if truth == "masks" else Boxes
    task = _task(truth, classes)
    return kind(teacher.to(device), task, classes, confidence, resize, options.out, device), about


def _known_classes(node: Mapping[str, Any], choice: str, asked: str | None) -> list[str]:
    """Names of the classes as far as they are known before the teacher is built; those asked for go first."""
    given = [name.strip() for name in (asked or "").split(",") if name.strip()]
    if len(set(given)) < len(given):
        raise CommandError(f"--classes names a class twice: {asked}.")
    if "class_names" in node:
        if given and node["class_names"]:
            raise CommandError("--classes and teacher.class_names name the same thing: leave one out.")
        names = given or list(node["class_names"] or ())
        if len(names) < 2:
            raise CommandError(f"teacher={choice} finds classes by their names: --classes A,B,... names two or more.")
        return names
    if given:
        return given
    if choice == "from_run":
        return list(read_run(Path(node["run"]))["data"]["classes"])
    data = read_about("teacher", choice).get("data")
    if data is None:
        return []
    described: Any = get_class(compose([f"data={data}"])["data"]["_target_"])
    return list(described.class_names)


def _size_in_run(node: Mapping[str, Any], choice: str) -> list[int] | None:
    """Sides that images had where a detector learned."""
    if choice != "from_run":
        return None
    seen = read_run(Path(node["run"]))["config"]["data"].get("resize")
    return None if seen is None else list(seen)


def _head(teacher: Teacher) -> tuple[str, int]:
    """What a teacher labels, masks or boxes, and into how many classes."""
    model = teacher.model
    logits = model.taps().get("logits")
    if isinstance(model, Detector):
        return "boxes", model.num_classes
    if logits is not None and logits.stride is not None:
        return "masks", logits.dim
    raise CommandError(
        f"{model.card.name} has no head that labels pixels or finds boxes: train one on it (kdlvfm train "
        "distiller=none student=head) and name its run, teacher=from_run teacher.run=RUN, or take "
        "teacher=clip_zeroshot_vitb16."
    )


def _task(truth: str, classes: Sequence[str]) -> Task:
    # Each of the two needs packages that the other does without.
    if truth == "boxes":
        from kdlvfm.tasks.detection import Detection

        return Detection(len(classes), class_names=classes)
    from kdlvfm.tasks.segmentation import Segmentation

    return Segmentation(len(classes), class_names=classes)
