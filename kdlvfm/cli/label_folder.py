# SPDX-License-Identifier: Apache-2.0
"""The folder that `kdlvfm label` fills: what it says about itself, its images, and what was done before a stop."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlvfm.cli import CommandError
from kdlvfm.cli.lock import LOCK
from kdlvfm.data.labels import LABELS, SCHEMA

Entry = dict[str, Any]
"""What is known of one labelled image, as plain JSON; `"name"` is the image's."""

_PROGRESS = "progress.jsonl"
# What of a folder cannot change from start to start, and what it is called if it does.
_FIXED = {
    "truth": "another kind of labels",
    "teacher.name": "another teacher",
    "teacher.weights_hash": "other weights of the teacher",
    "teacher.settings": "other settings of the teacher",
    "classes": "other classes",
    "confidence": "another confidence",
    "val": "another share of val",
    "resize": "another size of what the teacher sees",
    "images.sha256": "other images",
}


@dataclass(frozen=True)
class Item:
    """An image to label.

    Attributes:
        name: of its file in the folder that is written.
        source: its file.
        split: `train` or `val`.
    """

    name: str
    source: Path
    split: str


def assign(images: Mapping[str, Path], share: float) -> list[Item]:
    """Names and splits of images. Which ones are for validation is drawn by the hash of their names.

    Args:
        images: name, with the folders above it, -> file.
        share: of the images that are for validation, from 0 to below 1; of two and more at least one, unless it is 0.

    Raises:
        CommandError: two images would have one name, or there is one image for two splits.
    """
    names: dict[str, str] = {}
    for given in images:
        name = given.replace("/", "__")
        other = names.setdefault(Path(name).stem, given)
        if other != given:
            raise CommandError(f"{other} and {given} would both be {name} in --out: rename one of them.")
    if share and len(images) < 2:
        raise CommandError("one image is too few for train and val: give more, or --val 0.")
    count = min(max(1, round(share * len(images))), len(images) - 1) if share else 0
    val = set(sorted(images, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
    return [Item(name.replace("/", "__"), source, "val" if name in val else "train") for name, source in images.items()]


def images_hash(items: Sequence[Item], digests: Sequence[str]) -> str:
    """SHA-256 over names and contents of images."""
    rows = (f"{item.name} {digest}\n" for item, digest in zip(items, digests, strict=True))
    return hashlib.sha256("".join(rows).encode()).hexdigest()


class LabelFolder:
    """A folder of labels, written image by image, so that after a stop it goes on where it was.

    Args:
        path: the folder; it may be there already.
        about: what `labels.json` says, with the fields that must not change from start to start.
        copy: copy images; otherwise they are linked to.

    Raises:
        CommandError: the folder holds something else, or was begun with something else.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], copy: bool) -> None:
        self.path = path
        self._about = {"schema": SCHEMA, **about}
        self._copy = copy
        self.finished = False
        self.entries: dict[str, Entry] = {}
        earlier = self._read()
        if earlier is not None:
            for key, change in _FIXED.items():
                before, now = _at(earlier, key), _at(self._about, key)
                if before != now:
                    shown = "" if len(f"{before}{now}") > 100 else f" ({before}, now {now})"
                    raise CommandError(f"{path} was labelled with {change}{shown}: choose another folder with --out.")
            self._about["started"] = earlier["started"]
            self.finished = earlier["kept"] is not None
            if self.finished:
                self._about = earlier
            else:
                self._recall()

    @property
    def kept(self) -> Any:
        """What was kept of all images, once the folder is finished."""
        return self._about["kept"]

    def begin(self) -> None:
        """Say in the folder what it will hold."""
        self._write_about()

    def add(self, item: Item, entry: Entry, folder: str) -> None:
        """Take the image, whose labels are written, into `folder`, and remember that it is done."""
        place = self.path / folder / item.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        source = item.source.resolve()
        if self._copy:
            shutil.copyfile(source, place)
        else:
            try:
                place.symlink_to(os.path.relpath(source, place.parent.resolve()))
            except (OSError, ValueError) as error:  # a file system without links, or another drive
                raise CommandError(f"{place} cannot be a link ({error}): copy the images with --copy.") from error
        self.entries[item.name] = entry
        with (self.path / _PROGRESS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def finish(self, kept: Mapping[str, Any], ended: str) -> None:
        """Write what was kept of all images; from here on the folder is data to train on."""
        self._about |= {"kept": dict(kept), "ended": ended}
        self._write_about()
        (self.path / _PROGRESS).unlink(missing_ok=True)
        self.finished = True

    def _read(self) -> dict[str, Any] | None:
        """What the folder says it holds; `None` for a new or empty one."""
        if self.path.exists() and not self.path.is_dir():
            raise CommandError(f"--out {self.path} is a file; name a folder.")
        file = self.path / LABELS
        if not file.is_file():
            if self.path.is_dir() and any(other.name != LOCK for other in self.path.iterdir()):
                raise CommandError(f"{self.path} holds other files and no labels; choose another folder with --out.")
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}")
            for key in (*_FIXED, "started", "kept"):
                _at(content, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"{file} is not as kdlvfm label writes it ({error}): choose another folder.") from error
        return dict(content)

    def _recall(self) -> None:
        """Read what is done. A process that was killed may have left half a line, which no later one joins."""
        file = self.path / _PROGRESS
        if not file.is_file():
            return
        whole, _, rest = file.read_text(encoding="utf-8").rpartition("\n")
        if rest:
            file.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        for line in whole.splitlines():
            entry = json.loads(line)
            self.entries[entry["name"]] = entry

    def _write_about(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".{LABELS}.tmp"
        temporary.write_text(json.dumps(self._about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.path / LABELS)


def _at(content: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    value: Any = content
    for part in key.split("."):
        value = value[part]
    return value
