# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm predict`: what the student of a finished run sees in images."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlvfm.cli import CommandError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdlvfm.core import FeatureModel, Task, Teacher
    from kdlvfm.data.base import SampleData
    from kdlvfm.reporting.canvas import Colour
    from kdlvfm.reporting.figures import Objects

_DETECTIONS = "detections.json"
_SCORE = 0.3
_EXAMPLES = """\
examples:
  kdlvfm predict runs/demo/cwd-seed0 photo.jpg holiday/ --out seen --masks
  kdlvfm predict runs/demo_detection/pkd-seed0 holiday/ --out seen --score 0.5
"""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm predict",
        description="Draw what the student of a finished run sees in images: the class of each pixel as a colour, with "
        "a legend, or boxes with class and score in percent, which detections.json lists in COCO's format. The data "
        "set of the run need not be at hand.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGES",
        help="files that Pillow can read, and folders: their images, .jpg, .png and the like, at any depth",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a picture for each image goes here")
    parser.add_argument(
        "--masks", action="store_true", help="also the class of each pixel as PNG with a palette, below FOLDER/masks"
    )
    parser.add_argument("--score", type=float, metavar="S", help=f"of a box at least, from 0 to 1 (default: {_SCORE})")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    options = parser.parse_args(arguments)

    from rich.console import Console
    from rich.progress import track

    from kdlvfm.cli.runs import find_device, load_student, read_run
    from kdlvfm.cli.targets import check_targets, instantiate

    record = read_run(options.run)
    config = {part: record["config"][part] for part in ("data", "task")}
    check_targets(config, options.run / "record.json")
    classes = record["data"]["classes"]
    task: Task = instantiate(config["task"], num_classes=len(classes), class_names=classes)
    if task.truth not in ("masks", "boxes"):
        raise CommandError(f"the student of this run learned {task.truth}; kdlvfm predict draws masks and boxes.")
    boxes = task.truth == "boxes"
    if boxes and options.masks:
        raise CommandError("--masks is for segmentation; the student of this run detects boxes.")
    if not boxes and options.score is not None:
        raise CommandError("--score is for detection; the student of this run labels pixels.")
    least = _SCORE if options.score is None else options.score
    if not 0 <= least <= 1:
        raise CommandError(f"--score must be from 0 to 1, not {least}.")
    device, out = find_device(options.device), options.out
    images, others = find_images(options.images, out)
    pictures = {name: out / Path(name).with_suffix(".png") for name in images}
    maps = {name: out / "masks" / Path(name).with_suffix(".png") for name in images} if options.masks else {}
    _check_outputs([*pictures.values(), *maps.values(), *([out / _DETECTIONS] if boxes else [])], out, options.force)
    check_readable([*images.values()])
    data: SampleData = instantiate(config["data"])  # which reads no file before it is asked for samples
    model = _Model(load_student(options.run, record).to(device), task, data, device, classes, _palette(data, classes))

    console = Console(stderr=True)
    shown = track(images.items(), "predicting", console=console, disable=not console.is_terminal)
    if boxes:
        from kdlvfm.reporting.detections import write_detections

        found = _draw_boxes(model, shown, pictures, least)
        write_detections(found, classes, record["name"], out / _DETECTIONS)
        more = f", {_DETECTIONS} with {sum(len(objects['labels']) for _, objects in found.values())} boxes"
    else:
        _draw_masks(model, shown, pictures, maps)
        more = f", {len(maps)} label maps in masks/" if maps else ""
    if others:
        print(f"note   passed over in folders, since their names are not those of images: {others} files")
    print(f"wrote  {out}/: {len(pictures)} pictures{more}")
    print(f"next   open {next(iter(pictures.values()))}    or    kdlvfm evaluate {options.run}")
    return 0


@dataclass(frozen=True)
class _Model:
    """A student, and what is known of the data that it learned from."""

    student: FeatureModel
    task: Task
    data: Any
    device: torch.device
    classes: Sequence[str]
    palette: Sequence[Colour]


def find_images(given: Iterable[Path], out: Path) -> tuple[dict[str, Path], int]:
    """The images in files and folders given, each with the name that what is made of it has.

    A file goes by its own name, a file in a folder by its path below that. Hidden files and what lies in the folder
    `out` are passed over.

    Returns:
        Name -> file, in the order given, and how many files in the folders do not have the name of an image.

    Raises:
        CommandError: a file or folder that is not there, no image at all, or two that would have one picture.
    """
    from kdlvfm.data.images import IMAGE_SUFFIXES

    images: dict[str, Path] = {}
    taken: dict[str, Path] = {}
    others = 0
    for place in given:
        if place.is_dir():
            within = [file.relative_to(place) for file in sorted(place.rglob("*")) if file.is_file()]
            seen = [file for file in within if not any(part.startswith(".") for part in file.parts)]
            seen = [file for file in seen if out.resolve() not in (place / file).resolve().parents]
            names = [file for file in seen if file.suffix.lower() in IMAGE_SUFFIXES]
            others += len(seen) - len(names)
            files = {name.as_posix(): place / name for name in names}
        elif place.is_file():
            files = {place.name: place}
        else:
            raise CommandError(f"{place} is no file and no folder.")
        for name, file in files.items():
            other = taken.setdefault(Path(name).with_suffix("").as_posix(), file)
            if other != file:
                raise CommandError(f"{other} and {file} would have one name in --out: give each a folder of its own.")
            images[name] = file
    if not images:
        raise CommandError(f"there is no image in {', '.join(map(str, given))} ({', '.join(IMAGE_SUFFIXES)}).")
    return images, others


def _check_outputs(files: Sequence[Path], out: Path, force: bool) -> None:
    """Raise `CommandError` if files cannot be written beside each other, or would take the place of others."""
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out {out} is a file; name a folder.")
    if twice := [file for file, count in Counter(files).items() if count > 1]:
        raise CommandError(f"a picture and a label map would both be {twice[0]}: rename the folder masks.")
    there = [file for file in files if file.exists()]
    if there and not force:
        raise CommandError(
            f"{out} holds {len(there)} of the {len(files)} files to write, such as {there[0]}: choose another folder, "
            "or replace them with --force."
        )


def check_readable(files: Sequence[Path]) -> list[str]:
    """Read all images; SHA-256, in hexadecimal, of each file.

    Raises:
        CommandError: some are no images, or broken ones; it names them.
    """
    from kdlvfm.data.base import DataError
    from kdlvfm.data.images import decode, read_bytes, sha256

    broken: list[str] = []

    def digest(file: Path) -> str:
        try:
            content = read_bytes(file)
            decode(file, content)
        except DataError as error:
            broken.append(str(error))
            return ""
        return sha256(content)

    # Decoding and hashing release the interpreter lock, so threads do share the work.
    with ThreadPoolExecutor(8) as pool:
        digests = [*pool.map(digest, files)]
    if broken:
        first = f"{len(broken)} of {len(files)} images cannot be read; nothing was written"
        raise CommandError("\n  ".join([first, *sorted(broken)]))
    return digests


def _palette(data: SampleData, classes: Sequence[str]) -> Sequence[Colour]:
    """The colours of the classes; of data that keeps its list of classes in a file, those it would have here."""
    from kdlvfm.data.base import DataError
    from kdlvfm.data.palette import distinct_colours

    try:
        return data.palette
    except DataError:
        return distinct_colours(len(classes))


def _draw_masks(
    model: _Model, images: Iterable[tuple[str, Path]], pictures: Mapping[str, Path], maps: Mapping[str, Path]
) -> None:
    """Write a picture for each image, and a map of its classes where one is asked for."""
    import torch

    from kdlvfm.reporting.overlays import mask_overlay
    from kdlvfm.training.fit import predict

    for name, path in images:
        image = read(path).float() / 255
        with torch.no_grad():
            mask = predict(model.student, model.task, image[None].to(model.device), None)[0].cpu()
        mask_overlay(image, mask, model.classes, model.palette, pictures[name])
        if name in maps:
            write_map(mask, model.palette, maps[name])


def _draw_boxes(
    model: _Model, images: Iterable[tuple[str, Path]], pictures: Mapping[str, Path], least: float
) -> dict[str, tuple[tuple[int, int], Objects]]:
    """Write a picture for each image; its height and width, and its objects with a score of `least` or more."""
    from kdlvfm.reporting.figures import above
    from kdlvfm.reporting.overlays import box_overlay

    found: dict[str, tuple[tuple[int, int], Objects]] = {}
    for name, path in images:
        image = read(path)
        objects = detect(model.student, model.task, image, model.data.resize, model.device)
        found[name] = (image.shape[-2], image.shape[-1]), above(objects, least)
        box_overlay(image.float() / 255, found[name][1], model.classes, model.palette, pictures[name])
    return found


def detect(
    model: FeatureModel | Teacher, task: Task, image: Tensor, limits: Sequence[int] | None, device: torch.device
) -> Objects:
    """The objects in an image, in its pixels, as a detector sees it that learned from images resized to `limits`.

    Args:
        model: a detector.
        task: detection.
        image: uint8 (3, H, W).
        limits: short and long side in pixels, as `DetectionData` has them; `None` for the image's own size.
        device: that of the model.
    """
    import torch

    from kdlvfm.data.boxes import fitting_factor, make_boxes, resize
    from kdlvfm.data.detection import DetectionData
    from kdlvfm.training.fit import predict

    before = (image.shape[-2], image.shape[-1])
    fitted, _ = resize((image, make_boxes([], [])), fitting_factor(before, limits))
    size = torch.tensor(fitted.shape[-2:])
    # Padded as batches of data are.
    batch = DetectionData.collate([{"image": fitted.float() / 255, "target": {"size": size}, "index": 0}])
    with torch.no_grad():
        (found,) = predict(model, task, batch["image"].to(device), batch["target"])
    objects = {key: value.cpu() for key, value in found.items()}
    scale = (size / torch.tensor(before)).flip(0).repeat(2)
    return objects | {"boxes": objects["boxes"] / scale}


def read(path: Path) -> Tensor:
    """An image as one sees it, uint8 (3, H, W)."""
    from kdlvfm.data.images import decode, pixels, read_bytes

    return pixels(decode(path, read_bytes(path)))


def write_map(mask: Tensor, palette: Sequence[Colour], path: Path) -> None:
    """Write the classes (H, W) as a PNG of one channel that shows them in their colours."""
    import torch
    from PIL import Image

    file = Image.fromarray(mask.to(torch.uint8).numpy())
    file.putpalette([value for colour in palette for value in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save(path)
