# SPDX-License-Identifier: Apache-2.0
"""Boxes in PASCAL VOC's format: one XML file an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from kdlvfm.data.base import DataError
from kdlvfm.data.box_files import BoxFileData, Entry, check_files, listed
from kdlvfm.data.boxes import make_boxes
from kdlvfm.data.images import IMAGE_SUFFIXES, read_bytes

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


class Voc(BoxFileData):
    """Images, an XML for each, and a list for each split, as PASCAL VOC (Everingham et al., 2010) has them.

        root/ImageSets/Main/train.txt    root/JPEGImages/ID.jpg    root/Annotations/ID.xml
        root/ImageSets/Main/val.txt
        root/ImageSets/Main/test.txt     (optional)

    VOC's corners are pixels counted from 1, both included. Objects marked as difficult count as crowds do: no training
    target, and neither hit nor miss in the metrics, which are COCO's.

    Args:
        root: folder of the data set, such as VOCdevkit/VOC2007.
        classes: names of the classes, in the order of their numbers.
        train: name of the training split's list, for example `trainval`.
        val: name of the validation split's list.
        test: name of the test split's list; `None` if there is none with boxes.
        **files: see `BoxFileData`.

    Raises:
        DataError: arguments out of their range.
    """

    layout = "expected are ImageSets/Main/SPLIT.txt, JPEGImages/ID.jpg and Annotations/ID.xml below data.root"

    def __init__(
        self,
        root: str | Path,
        *,
        classes: Sequence[str] = VOC_CLASSES,
        train: str = "train",
        val: str = "val",
        test: str | None = "test",
        **files: Any,
    ) -> None:
        super().__init__(root, **files)
        self.class_names = tuple(map(str, classes))
        self._lists = {"train": train, "val": val} | ({} if test is None else {"test": test})
        self.splits = tuple(self._lists)

    def find(self, split: str) -> list[Entry]:
        """Images in the order of the split's list.

        Raises:
            DataError: a file is missing or not what it should be, or an object is of no class of the list.
        """
        names = self.root / "ImageSets" / "Main" / f"{self._lists[split]}.txt"
        check_files([names], f"{self.name} needs", self.layout)
        ids = [line.split()[0] for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
        images = [_image(self.root / "JPEGImages", name) for name in ids]
        annotations = [self.root / "Annotations" / f"{name}.xml" for name in ids]
        check_files([*images, *annotations], f"{names} asks for", self.layout)
        trees = [read_xml(path) for path in annotations]
        if strange := [
            f"{path.name} ({name})"
            for path, tree in zip(annotations, trees, strict=True)
            for name in (_text(path, one, "name") for one in tree.iter("object"))
            if name not in self.class_names
        ]:
            raise DataError(
                f"{self.name} has {len(strange)} objects in {split!r} of a class outside the list "
                f"{list(self.class_names)}: {listed(strange)}. Correct them, or set data.classes=[...]."
            )
        return [self._entry(*found) for found in zip(images, annotations, trees, strict=True)]

    def _entry(self, image: Path, path: Path, tree: Element) -> Entry:
        objects = list(tree.iter("object"))
        try:
            corners = [
                [float(_text(path, one, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
                for one in objects
            ]
            difficult = [bool(int(one.findtext("difficult") or 0)) for one in objects]
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{path} has a box, or a `difficult`, of no numbers ({error}): correct it.") from error
        return Entry(
            image,
            make_boxes(
                [(left - 1, top - 1, right, bottom) for left, top, right, bottom in corners],
                [self.class_names.index(_text(path, one, "name")) for one in objects],
                iscrowd=difficult,
            ),
        )


def read_xml(path: Path) -> Element:
    """The root of an XML file. Files that declare a document type, and so could declare entities, are refused.

    Raises:
        DataError: the file cannot be read, is no XML, or declares a document type.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(*_: Any) -> None:
        raise DataError(f"{path} declares a document type, which annotations have no use for: remove it.")

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(read_bytes(path), True)
    except expat.ExpatError as error:
        raise DataError(f"{path} is not an XML file ({error}): write it anew.") from error
    return builder.close()


def _image(folder: Path, name: str) -> Path:
    found = (folder / f"{name}{suffix}" for suffix in (".jpg", *IMAGE_SUFFIXES))
    return next((path for path in found if path.is_file()), folder / f"{name}.jpg")


def _text(path: Path, element: Element, tag: str) -> str:
    text = element.findtext(tag)
    if text is None:
        raise DataError(f"{path} has an object without {tag}: add it.")
    return text.strip()
