# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm predict`: what the student of a finished run sees in images."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlvfm.cli import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from kdlvfm.core import FeatureModel, Task
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

    import torch
    from rich.console import Console
    from rich.progress import track

    from kdlvfm.cli.config import check_targets, instantiate
    from kdlvfm.cli.runs import find_device, load_student, read_run
    from kdlvfm.data.images import decode, pixels, read_bytes
    from kdlvfm.reporting.overlays import box_overlay, mask_overlay

    record = read_run(options.run)
    config = {part: record["config"][part] for part in ("data", "task")}
    check_targets(config, options.run / "record.json")
    classes = record["data"]["classes"]
    task: Task = instantiate(config["task"], num_classes=len(classes), class_names=classes)
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
    _check_readable([*images.values()])
    data: SampleData = instantiate(config["data"])  # which reads no file before it is asked for samples
    palette = _palette(data, len(classes))
    student = load_student(options.run, record).to(device)

    found: dict[str, tuple[tuple[int, ...], Objects]] = {}
    console = Console(stderr=True)
    with torch.no_grad():
        for name, path in track(images.items(), "predicting", console=console, disable=not console.is_terminal):
            raw = pixels(decode(path, read_bytes(path)))
            image = raw.float() / 255
            if boxes:
                objects = _detect(student, task, data, raw, device, least)
                box_overlay(image, objects, classes, palette, pictures[name])
                found[name] = tuple(raw.shape[-2:]), objects
                continue
            mask = _label(student, task, image.to(device))
            mask_overlay(image, mask, classes, palette, pictures[name])
            if maps:
                _write_map(mask, palette, maps[name])
    if boxes:
        write_detections(found, classes, record["name"], out / _DETECTIONS)
    if others:
        print(f"note   passed over in folders, since their names are not those of images: {others} files")
    print(
        f"wrote  {out}/: {len(pictures)} pictures"
        + (f", {len(maps)} label maps in masks/" if maps else "")
        + (f", {_DETECTIONS} with {sum(len(x['labels']) for _, x in found.values())} boxes" if boxes else "")
    )
    print(f"next   open {next(iter(pictures.values()))}    or    kdlvfm evaluate {options.run}")
    return 0


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
                raise CommandError(f"{other} and {file} would have one picture: predict them into two folders (--out).")
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


def _check_readable(files: Sequence[Path]) -> None:
    """Raise `CommandError`, naming them, if there are files that are no images, or broken ones."""
    from kdlvfm.data.base import DataError
    from kdlvfm.data.images import decode, read_bytes

    def problem(file: Path) -> str | None:
        try:
            decode(file, read_bytes(file))
        except DataError as error:
            return str(error)
        return None

    # Decoding releases the interpreter lock, so threads do share the work.
    with ThreadPoolExecutor(8) as pool:
        broken = [found for found in pool.map(problem, files) if found is not None]
    if broken:
        first = f"{len(broken)} of {len(files)} images cannot be read; nothing was written"
        raise CommandError("\n  ".join([first, *broken]))


def _palette(data: SampleData, count: int) -> Sequence[Colour]:
    """The colours of the classes; of data that keeps its list of classes in a file, those it would have here."""
    from kdlvfm.data.base import DataError
    from kdlvfm.data.palette import distinct_colours

    try:
        return data.palette
    except DataError:
        return distinct_colours(count)


def _label(student: FeatureModel, task: Task, image: Tensor) -> Tensor:
    """The class of each pixel, (H, W), of an image (3, H, W) in [0, 1]."""
    from kdlvfm.training.fit import predict

    mask: Tensor = predict(student, task, image[None], None)[0].cpu()
    return mask


def _detect(student: FeatureModel, task: Task, data: Any, raw: Tensor, device: Any, least: float) -> Objects:
    """Objects with a score of `least` or more, in pixels of an image, uint8 (3, H, W), that is resized as the data."""
    import torch

    from kdlvfm.data.boxes import fitting_factor, make_boxes, resize
    from kdlvfm.reporting.figures import above
    from kdlvfm.training.fit import predict

    before = torch.tensor(raw.shape[-2:])
    fitted, _ = resize((raw, make_boxes([], [])), fitting_factor(raw.shape[-2:], data.resize))
    size = torch.tensor(fitted.shape[-2:])
    batch = data.collate([{"image": fitted.float() / 255, "target": {"size": size}, "index": 0}])
    objects = predict(student, task, batch["image"].to(device), batch["target"])[0]
    scale = (size / before).flip(0).repeat(2)
    moved = {name: value.cpu() for name, value in objects.items()}
    return above(moved | {"boxes": moved["boxes"] / scale}, least)


def _write_map(mask: Tensor, palette: Sequence[Colour], path: Path) -> None:
    """Write the classes (H, W) as a PNG of one channel that shows them in their colours."""
    import torch
    from PIL import Image

    file = Image.fromarray(mask.to(torch.uint8).numpy())
    file.putpalette([value for colour in palette for value in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save(path)


def write_detections(
    found: Mapping[str, tuple[tuple[int, ...], Objects]], classes: Sequence[str], title: str, path: Path
) -> None:
    """Write boxes as COCO has them: a list of images, of categories numbered from 1, and of annotations with scores.

    `pycocotools.coco.COCO` reads the file, and `loadRes` its list `annotations`.

    Args:
        found: name of an image -> height and width, and its objects, the surest last.
        classes: names of the classes.
        title: of the run.
        path: of the file.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, ((height, width), objects)) in enumerate(found.items(), start=1):
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        columns = (objects[key].flip(0).tolist() for key in ("boxes", "labels", "scores"))
        for (x1, y1, x2, y2), label, score in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2)],
                    "area": round((x2 - x1) * (y2 - y1), 2),
                    "iscrowd": 0,
                    "score": round(score, 4),
                }
            )
    content = {
        "info": {"description": f"predictions of {title}, made by kdlvfm"},
        "images": images,
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, start=1)],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
