# SPDX-License-Identifier: Apache-2.0
"""Boxes in COCO's format: one json file a split."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlvfm.data.base import DataError
from kdlvfm.data.box_files import BoxFileData, Entry, check_files, listed
from kdlvfm.data.boxes import make_boxes
from kdlvfm.data.images import read_bytes
from kdlvfm.data.labels import read_labels

_JSON = "annotations/{}.json"


class Coco(BoxFileData):
    """Images and a json for each split, as COCO (Lin et al., "Microsoft COCO", 2014) has them.

        root/annotations/train.json    root/images/NAME.jpg
        root/annotations/val.json
        root/annotations/test.json     (optional)

    Categories become classes in the order of their ids. Images without boxes are kept.

    Args:
        root: folder of the data set.
        train: json of the training split, relative to `root`.
        val: json of the validation split.
        test: json of the test split; `None` if there is none with boxes.
        images: folder of the images, relative to `root`; or one for each split, by name of the split.
        classes: names of the categories to keep, in this order; `None` keeps all.
        **files: see `BoxFileData`.

    Raises:
        DataError: arguments out of their range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: str = _JSON.format("train"),
        val: str = _JSON.format("val"),
        test: str | None = _JSON.format("test"),
        images: str | Mapping[str, str] = "images",
        classes: Sequence[str] | None = None,
        **files: Any,
    ) -> None:
        super().__init__(root, **files)
        self._files = {"train": train, "val": val} | ({} if test is None else {"test": test})
        self.splits = tuple(self._files)
        self._images = dict.fromkeys(self.splits, images) if isinstance(images, str) else dict(images)
        if absent := [split for split in self.splits if split not in self._images]:
            raise DataError(f"data.images names no folder for {', '.join(absent)}.")
        folders = ", ".join(dict.fromkeys(self._images.values()))
        self.layout = (
            f"expected are {', '.join(self._files.values())} and images in {folders} below {self.root}; data.train, "
            "data.val, data.test and data.images name others"
        )
        self._classes = None if classes is None else tuple(map(str, classes))
        self._contents: dict[str, tuple[tuple[str, ...], list[Entry]]] = {}

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The categories of the training split, or those chosen."""
        return self._read("train")[0]

    def labels(self) -> dict[str, Any] | None:
        """Which teacher made the boxes, where `kdlvfm label` wrote the folder and its files are the ones that are read.

        Raises:
            DataError: it has not come to its end.
        """
        return read_labels(self.root, [split for split, name in self._files.items() if name == _JSON.format(split)])

    def check(self) -> None:
        """Read all annotations and all images.

        Raises:
            DataError: labels that are not finished, or what `BoxFileData.check` finds.
        """
        self.labels()
        super().check()

    def find(self, split: str) -> list[Entry]:
        """Images in the order of the json.

        Raises:
            DataError: a file is missing or not what it should be, or a category is not listed.
        """
        names, entries = self._read(split)
        if names != self.class_names:
            raise DataError(
                f"{self._files[split]} has the categories {list(names)} and {self._files['train']} has "
                f"{list(self.class_names)}: all splits must have the same."
            )
        return entries

    def _read(self, split: str) -> tuple[tuple[str, ...], list[Entry]]:
        if split not in self._contents:
            path = self.root / self._files[split]
            check_files([path], f"{self.name} needs", self.layout)
            try:
                content = json.loads(read_bytes(path))
            except ValueError as error:
                raise DataError(f"{path} is not a json file ({error}): write it anew.") from error
            try:
                self._contents[split] = self._parse(content, path, self.root / self._images[split])
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path} is not in COCO's format ({type(error).__name__}: {error}): it needs images (id, "
                    "file_name, height, width), annotations (image_id, category_id, bbox) and categories (id, name)."
                ) from error
        return self._contents[split]

    def _parse(self, content: Any, path: Path, folder: Path) -> tuple[tuple[str, ...], list[Entry]]:
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        known = tuple(categories[i] for i in sorted(categories))
        if not known or len(set(known)) < len(content["categories"]):
            given = [(category["id"], category["name"]) for category in content["categories"]]
            raise DataError(f"{path}: categories must be at least one, of different ids and names, not {given}.")
        names = known if self._classes is None else self._classes
        if absent := [name for name in names if name not in known]:
            raise DataError(f"{path} has no category {', '.join(absent)}; it has {list(known)}.")
        labels = {i: names.index(name) for i, name in categories.items() if name in names}

        images = content["images"]
        if twice := [str(i) for i, count in Counter(image["id"] for image in images).items() if count > 1]:
            raise DataError(f"{path} gives {len(twice)} image ids more than once: {listed(twice)}.")
        annotations: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        if strange := [str(i) for i in annotations.keys() - {image["id"] for image in images}]:
            raise DataError(f"{path} has boxes for {len(strange)} image ids that it does not list: {listed(strange)}.")
        if strange := [
            f"{image['file_name']} ({annotation['category_id']!r})"
            for image in images
            for annotation in annotations[image["id"]]
            if annotation["category_id"] not in categories
        ]:
            raise DataError(
                f"{path} has {len(strange)} boxes of category ids outside its list {sorted(categories)}: "
                f"{listed(strange)}. Correct them, or list their categories."
            )
        entries = [
            _entry(folder, image, [box for box in annotations[image["id"]] if box["category_id"] in labels], labels)
            for image in images
        ]
        check_files([entry.image for entry in entries], f"{path} names", self.layout)
        return names, entries


def _entry(
    folder: Path, image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], labels: Mapping[Any, int]
) -> Entry:
    corners = []
    for annotation in annotations:
        try:
            x, y, width, height = map(float, annotation["bbox"])
        except ValueError as error:
            raise TypeError(f"bbox {annotation['bbox']} is no four numbers") from error
        corners.append((x, y, x + width, y + height))
    boxes = make_boxes(
        corners,
        [labels[annotation["category_id"]] for annotation in annotations],
        iscrowd=[bool(annotation.get("iscrowd", 0)) for annotation in annotations],
        area=[
            float(annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])) for annotation in annotations
        ],
    )
    return Entry(folder / image["file_name"], boxes, (int(image["height"]), int(image["width"])))
