# SPDX-License-Identifier: Apache-2.0
"""The two kinds of labels that `kdlvfm label` writes, masks and boxes, each as one of our data sets reads it."""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdlvfm.cli.label_folder import Entry, Item
from kdlvfm.cli.predict import detect, read, write_map
from kdlvfm.core import Task, Teacher
from kdlvfm.data.palette import distinct_colours
from kdlvfm.data.segmentation import VOID
from kdlvfm.reporting.detections import write_detections
from kdlvfm.reporting.figures import above
from kdlvfm.reporting.label_sheet import UNSURE, box_sheet, mask_sheet

_LEAST_SIDE = 1.0  # pixels of a box; data sets drop what is smaller


@dataclass(frozen=True)
class Labeller(ABC):
    """A teacher that labels images into a folder.

    Attributes:
        teacher: the teacher, with a head.
        task: what its head solves.
        classes: names of its classes.
        confidence: least probability or score of what is kept.
        resize: short and long side of what a detector sees.
        folder: where labels go.
        device: that of the teacher.
    """

    teacher: Teacher
    task: Task
    classes: Sequence[str]
    confidence: float
    resize: Sequence[int] | None
    folder: Path
    device: torch.device

    unit: ClassVar[str]

    @abstractmethod
    def images_of(self, split: str) -> str:
        """Where the images of a split go, below the folder."""

    @abstractmethod
    def label(self, item: Item, image: Tensor) -> Entry:
        """Label an image, uint8 (3, H, W): write its files, if it has any, and say what was found."""

    @abstractmethod
    def finish(self, items: Sequence[Item], entries: Sequence[Entry]) -> dict[str, Any]:
        """Write what is about all images; how many units there were, how many have a label, and of which class."""

    @abstractmethod
    def summary(self, kept: Mapping[str, Any], images: int) -> str:
        """How much of what was found has a label."""

    @abstractmethod
    def draw(self, items: Sequence[Item], entries: Sequence[Entry], path: Path) -> None:
        """Write the sheet of a few images."""

    @abstractmethod
    def training(self) -> str:
        """The command that trains on the folder."""

    def _by_class(self, counts: Sequence[int]) -> dict[str, int]:
        return dict(zip(self.classes, counts, strict=True))


class Masks(Labeller):
    """A class for each pixel: `SPLIT/images`, `SPLIT/masks` and, as 8-bit PNG, `SPLIT/confidence`."""

    unit = "pixels"

    def images_of(self, split: str) -> str:
        """`SPLIT/images`."""
        return f"{split}/images"

    def label(self, item: Item, image: Tensor) -> Entry:
        """Write mask and confidence; the likeliest class where it is sure, else void."""
        with torch.no_grad():
            pixels = (image.float() / 255)[None].to(self.device)
            logits = self.teacher(pixels, ("logits",))["logits"].float()
            sure, classes = (found[0].cpu() for found in logits.softmax(dim=1).max(dim=1))
        mask = classes.where(sure >= self.confidence, VOID)
        confidence = self._path(item, "confidence")
        confidence.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((sure * 255).round().to(torch.uint8).numpy()).save(confidence)
        write_map(mask, self._palette, self._path(item, "masks"))
        counts = torch.bincount(mask[mask != VOID], minlength=len(self.classes)).tolist()
        return {"name": item.name, "pixels": mask.numel(), "kept": counts}

    def finish(self, items: Sequence[Item], entries: Sequence[Entry]) -> dict[str, Any]:
        """Pixels of all images."""
        del items
        kept = np.array([entry["kept"] for entry in entries]).sum(axis=0).tolist()
        found = sum(entry["pixels"] for entry in entries)
        return {"of": found, "pixels": sum(kept), "by_class": self._by_class(kept)}

    def summary(self, kept: Mapping[str, Any], images: int) -> str:
        """The share of the pixels."""
        del images
        return f"{100 * kept['pixels'] / kept['of']:.1f} % of the pixels have a label"

    def draw(self, items: Sequence[Item], entries: Sequence[Entry], path: Path) -> None:
        """Images and masks as they were written."""
        del entries
        masks = []
        for item in items:
            with Image.open(self._path(item, "masks")) as file:
                masks.append(torch.from_numpy(np.array(file)).long())
        images = [read(item.source).float() / 255 for item in items]
        palette = distinct_colours(len(self.classes))
        mask_sheet(images, masks, self.classes, palette, self.teacher.card.name, path)

    def training(self) -> str:
        """`data=folder`."""
        names = ",".join(json.dumps(name, ensure_ascii=False) for name in self.classes)
        words = ["data=folder", f"data.root={self.folder}", f"data.classes=[{names}]", "distiller=none"]
        return shlex.join(["kdlvfm", "train", *words])

    @property
    def _palette(self) -> list[tuple[int, int, int]]:
        """Of all values that a byte can have; a shorter one would make PNG files that cannot hold 255."""
        own = distinct_colours(len(self.classes))
        return [*own, *[(0, 0, 0)] * (VOID - len(own)), UNSURE]

    def _path(self, item: Item, kind: str) -> Path:
        return self.folder / item.split / kind / f"{Path(item.name).stem}.png"


class Boxes(Labeller):
    """Boxes with scores: `images`, and for each split a json in COCO's format in `annotations`."""

    unit = "boxes"

    def images_of(self, split: str) -> str:
        """`images`, of all splits."""
        del split
        return "images"

    def label(self, item: Item, image: Tensor) -> Entry:
        """The boxes, which are written when those of all images are known."""
        objects = detect(self.teacher, self.task, image, self.resize, self.device)
        sides = objects["boxes"][:, 2:] - objects["boxes"][:, :2]
        whole = {key: value[(sides >= _LEAST_SIDE).all(dim=1)] for key, value in objects.items()}
        kept = above(whole, self.confidence)
        return {
            "name": item.name,
            "size": list(image.shape[-2:]),
            "found": len(whole["labels"]),
            **{key: kept[key].tolist() for key in ("boxes", "labels", "scores")},
        }

    def finish(self, items: Sequence[Item], entries: Sequence[Entry]) -> dict[str, Any]:
        """Write the json files."""
        counts = [0] * len(self.classes)
        for entry in entries:
            for label in entry["labels"]:
                counts[label] += 1
        (self.folder / "annotations").mkdir(exist_ok=True)
        for split in dict.fromkeys(item.split for item in items):
            found = {
                item.name: ((entry["size"][0], entry["size"][1]), _objects(entry))
                for item, entry in zip(items, entries, strict=True)
                if item.split == split
            }
            path = self.folder / "annotations" / f"{split}.json"
            write_detections(found, self.classes, self.teacher.card.name, path)
        found_in_all = sum(entry["found"] for entry in entries)
        return {"of": found_in_all, "boxes": sum(counts), "by_class": self._by_class(counts)}

    def summary(self, kept: Mapping[str, Any], images: int) -> str:
        """How many boxes; of the others, which a detector finds by the hundred, nobody wants to know."""
        return f"{kept['boxes']} boxes, {kept['boxes'] / images:.1f} an image"

    def draw(self, items: Sequence[Item], entries: Sequence[Entry], path: Path) -> None:
        """Images with the boxes that were kept."""
        images = [read(item.source).float() / 255 for item in items]
        palette = distinct_colours(len(self.classes))
        found = [_objects(entry) for entry in entries]
        box_sheet(images, found, self.classes, palette, self.teacher.card.name, path)

    def training(self) -> str:
        """`data=coco_json`, of a size that the teacher saw."""
        words = ["task=detection", "data=coco_json", f"data.root={self.folder}", "data.test=null"]
        if self.resize is not None:
            words.append(f"data.resize=[{self.resize[0]},{self.resize[1]}]")
        return shlex.join(["kdlvfm", "train", *words, "student=resnet18_gfl", "recipe=1x", "distiller=none"])


def _objects(entry: Entry) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(entry["boxes"], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(entry["labels"], dtype=torch.int64),
        "scores": torch.tensor(entry["scores"], dtype=torch.float32),
    }
