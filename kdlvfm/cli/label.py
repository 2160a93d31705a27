# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm label`: a teacher labels images, and what comes out is data to train on."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdlvfm.cli import CommandError

if TYPE_CHECKING:
    from kdlvfm.cli.label_folder import Item, LabelFolder
    from kdlvfm.cli.label_kinds import Labeller

_DESCRIPTION = """\
Let a teacher label images. A teacher whose head labels pixels, CLIP's zero-shot
logits among them, gives masks; a detector gives boxes. What it is not sure of
is left out. The folder is one that kdlvfm train reads, and a run on it says in
its record which teacher made the labels.

A stopped call goes on where it was; a finished folder is left alone.
"""
_EXAMPLES = """\
the folder:
  masks   SPLIT/images, SPLIT/masks (255: not sure), SPLIT/confidence (0 to 255)
  boxes   images, annotations/SPLIT.json in COCO's format, each box with its score
  both    labels.json: teacher, classes, what was kept; sheet.png: a few to look at

examples:
  kdlvfm label photos/ teacher=from_run teacher.run=runs/dinov3_head --out labelled
  kdlvfm label photos/ teacher=clip_zeroshot_vitb16 --classes road,car,sky --out labelled
  kdlvfm label photos/ teacher=from_run teacher.run=runs/dinov3_gfl --confidence 0.6 --out boxes
"""
CONFIDENCE = {"masks": 0.9, "boxes": 0.5}
"""What is kept unless one says otherwise."""

_VAL = 0.1
_SHEET, _ON_SHEET = "sheet.png", 12
_OVERRIDE = re.compile(r"[~+]*[A-Za-z_][\w@.]*=")


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm label",
        usage="kdlvfm label IMAGES ... teacher=NAME [teacher.KEY=VALUE ...] --out FOLDER [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="+", metavar="IMAGES", help="images, and folders of images, at any depth; and the teacher"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="images and labels go here")
    parser.add_argument(
        "--classes",
        metavar="A,B,...",
        help="names of the teacher's classes in their order, where it does not know them; for zero-shot what to find",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="P",
        help="least probability of a pixel's class, others are void; least score of a box, others are dropped "
        f"(default: {CONFIDENCE['masks']} for pixels, {CONFIDENCE['boxes']} for boxes)",
    )
    parser.add_argument(
        "--val",
        type=float,
        default=_VAL,
        metavar="SHARE",
        help="of the images that become the validation split (default: %(default)s); 0: all are for training",
    )
    parser.add_argument(
        "--resize",
        type=int,
        nargs=2,
        metavar=("SHORT", "LONG"),
        help="sides in pixels of what a detector sees (default: as in its run, if it is from one; else the image's)",
    )
    parser.add_argument("--copy", action="store_true", help="copy the images; otherwise they are linked to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.what if _OVERRIDE.match(word)]
    places = [Path(word) for word in options.what if not _OVERRIDE.match(word)]
    _check(options, overrides, places)

    from kdlvfm.cli.label_folder import LabelFolder, assign, images_hash
    from kdlvfm.cli.label_teacher import build_labeller
    from kdlvfm.cli.lock import RunLock
    from kdlvfm.cli.predict import check_readable, find_images
    from kdlvfm.cli.runs import find_device

    device = find_device(options.device)
    images, others = find_images(places, options.out)
    items = assign(images, options.val)
    labeller, about = build_labeller(options, overrides, device)
    digests = check_readable([item.source for item in items])
    splits = {split: sum(item.split == split for item in items) for split in ("train", "val")}
    about |= {
        "images": {split: count for split, count in splits.items() if count} | {"sha256": images_hash(items, digests)},
        "command": ["kdlvfm", "label", *arguments],
    }
    folder = LabelFolder(options.out, about, options.copy)
    if folder.finished:
        print(f"{options.out} is finished; nothing to do.")
        _closing(folder, labeller, items)
        return 0
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{options.out} cannot be made ({error.strerror}); choose another --out.") from error
    if others:
        print(f"note   passed over in folders, since their names are not those of images: {others} files")
    with RunLock(options.out):
        # Another process may have gone on, or finished, while this one was being set up.
        folder = LabelFolder(options.out, about, options.copy)
        try:
            _fill(folder, labeller, items)
        except KeyboardInterrupt:
            print(f"Interrupted after {len(folder.entries)} of {len(items)} images. The same command goes on.")
            return 130
        except OSError as error:
            raise CommandError(f"{options.out}: {error}. When that is mended, the same command goes on.") from error
    _closing(folder, labeller, items)
    return 0


def _check(options: argparse.Namespace, overrides: Sequence[str], places: Sequence[Path]) -> None:
    """Raise `CommandError` for a call that cannot be meant."""
    keys = sorted(override.partition("=")[0] for override in overrides)
    if strange := [key for key in keys if re.split("[.@]", key.lstrip("~+"))[0] not in ("teacher", "task")]:
        raise CommandError(
            f"{strange[0]}= is not for kdlvfm label, which takes images, teacher=NAME and teacher.KEY=VALUE; the "
            "folder that is written is --out FOLDER."
        )
    if "teacher" not in keys:
        raise CommandError("name the teacher, for example teacher=from_run teacher.run=RUN; kdlvfm list teacher.")
    if not places:
        raise CommandError("name the images to label, or a folder of them.")
    if options.confidence is not None and not 0 <= options.confidence <= 1:
        raise CommandError(f"--confidence must be from 0 to 1, not {options.confidence:g}.")
    if not 0 <= options.val < 1:
        raise CommandError(f"--val must be from 0 to below 1, not {options.val:g}.")
    if options.resize is not None and not 1 <= options.resize[0] <= options.resize[1]:
        raise CommandError(f"--resize takes the short and the long side in pixels, not {options.resize}.")
    out = options.out.resolve()
    for place in places:
        if place.is_dir() and (out == place.resolve() or place.resolve() in out.parents):
            raise CommandError(
                f"--out {options.out} lies in {place}, where a later call would take it for images: choose a folder "
                "outside."
            )


def _fill(folder: LabelFolder, labeller: Labeller, items: Sequence[Item]) -> None:
    """Label what is not labelled yet, then write what is about all images."""
    from kdlvfm.cli.predict import read
    from kdlvfm.reporting.record import now

    if folder.finished:
        return
    card = labeller.teacher.card
    print(f"teacher  {card.name}, {card.weights} weights, licence {card.licence or 'unknown'}")
    if card.weights == "random":
        print("WARNING  the teacher has RANDOM weights: its labels are noise. labels.json says so.")
    if folder.entries:
        print(f"{len(folder.entries)} of {len(items)} images are labelled already")
    folder.begin()
    for item in _shown([item for item in items if item.name not in folder.entries]):
        folder.add(item, labeller.label(item, read(item.source)), labeller.images_of(item.split))
    entries = [folder.entries[item.name] for item in items]
    kept = labeller.finish(items, entries)
    count = min(_ON_SHEET, len(items))
    chosen = [len(items) * number // count for number in range(count)]
    labeller.draw([items[i] for i in chosen], [entries[i] for i in chosen], folder.path / _SHEET)
    folder.finish(kept, now())


def _shown(items: Sequence[Item]) -> Iterator[Item]:
    """The items, with a bar in a terminal, and a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    for number, item in enumerate(track(items, "labelling", console=console, disable=not console.is_terminal)):
        if not console.is_terminal and number % max(1, len(items) // 5) == 0 and number:
            print(f"{number}/{len(items)} images", flush=True)
        yield item


def _closing(folder: LabelFolder, labeller: Labeller, items: Sequence[Item]) -> None:
    kept, unit = folder.kept, labeller.unit
    val = sum(item.split == "val" for item in items)
    absent = [name for name, number in kept["by_class"].items() if not number]
    if not kept[unit]:
        print(f"WARNING  nothing was sure enough: no label reaches {labeller.confidence:g}. Lower --confidence.")
    elif absent:
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        print(f"note   no {unit} of {', '.join(absent[:8])}{more}")
    summary = f"{labeller.summary(kept, len(items))}, at {labeller.confidence:g} or surer"
    print(f"wrote  {folder.path}/: {len(items) - val} images in train, {val} in val; {summary}")
    if val:
        print("note   val has the teacher's labels too: scores on it say how far a student agrees with the teacher")
    else:
        print("note   there is no val yet: add one with labels of your own, in the same layout")
    print(f"next   open {folder.path / _SHEET}    or    {labeller.training()}")
