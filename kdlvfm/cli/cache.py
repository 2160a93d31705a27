# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm cache`: the stored features of teachers, seen from outside a run."""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdlvfm.cli import CommandError
from kdlvfm.cli.console import table_console

if TYPE_CHECKING:
    from kdlvfm.training.cache.source import FeatureSource
    from kdlvfm.training.cache.store import CacheStore

_ROOT = Path("caches")
_FROM_RUN = "kdlvfm.cli.runs.teacher_from_run"
_EXAMPLES = """\
examples:
  kdlvfm train data=camvid teacher=dinov3_vitb16 distiller=fitnet teacher_cache=build teacher_cache.views=8
  kdlvfm cache list
  kdlvfm cache verify caches/NAME --images 64
"""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm cache",
        description="Features of teachers that were computed once and stored, by kdlvfm train teacher_cache=build.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "action",
        choices=("list", "verify", "remove"),
        help="list: what is stored, and how large it is. verify: compute a random sample again with the teacher, and "
        "compare. remove: delete it",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="caches; to list them, folders of some (default: caches)",
    )
    parser.add_argument(
        "--images", type=int, default=16, metavar="N", help="verify: so many for each tap (default: 16)"
    )
    parser.add_argument("--all", action="store_true", help="verify: also read everything, and compare the checksums")
    parser.add_argument(
        "--drop", action="store_true", help="verify: take out what is wrong, so that the next build computes it again"
    )
    parser.add_argument("--data-root", metavar="FOLDER", help="verify: where the data lies here, if it was moved")
    parser.add_argument("--device", default="auto", help="verify: auto, cpu, cuda, cuda:1 ...")
    options = parser.parse_args(arguments)
    if options.action == "list":
        return _list(options.folders or [_ROOT])
    if not options.folders:
        raise CommandError(f"{options.action} needs the FOLDER of a cache: kdlvfm cache list shows them.")
    if options.images < 1:
        raise CommandError(f"--images must be at least 1, not {options.images}.")
    if options.action == "remove":
        return _remove(options.folders)
    return max(_verify(folder, options) for folder in options.folders)


def _open(folder: Path) -> CacheStore:
    from kdlvfm.training.cache.formats import CacheError
    from kdlvfm.training.cache.store import CacheStore

    try:
        return CacheStore.open(folder)
    except CacheError as error:
        raise CommandError(str(error)) from error


def _list(folders: Sequence[Path]) -> int:
    from rich import box
    from rich.table import Table

    from kdlvfm.training.cache.compute import shown_bytes
    from kdlvfm.training.cache.store import INDEX

    found = sorted({path.parent for folder in folders for path in folder.rglob(INDEX)})
    if not found:
        raise CommandError(
            f"there is no teacher cache in {', '.join(map(str, folders))}; kdlvfm train with teacher_cache=build makes "
            "one."
        )
    console, total = table_console(), 0
    for folder in found:
        store, size = _open(folder), _size(folder)
        total += size
        teacher, data = store.description["teacher"], store.description["data"]
        console.print(f"[bold]{folder}[/]  {shown_bytes(size)}", highlight=False, soft_wrap=True)
        seed = store.description["seed"]
        augmented = "not augmented" if seed is None else f"augmented from seed {seed}"
        height, width = store.description["image"]
        print(f"  {teacher['name']} on {data['name']}, images of {height}x{width}, {augmented}")
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("tap", "shape", "dtype", "images", "views", "an image", "lowest cosine", "rms error"):
            table.add_column(column, justify="left" if column == "tap" else "right")
        for format, error in store.formats().values():
            rows = store.stored(format)
            views = len({row // store.samples for row in rows})
            table.add_row(
                format.tap,
                "x".join(map(str, format.shape)),
                format.label,
                str(len(rows)),
                str(views),
                shown_bytes(format.row_bytes),
                f"{error['cosine']:.6f}",
                f"{100 * error['relative_rms']:.2g} %",
            )
        console.print(table)
    print(f"{len(found)} caches, {shown_bytes(total)}" if len(found) > 1 else f"next  kdlvfm cache verify {found[0]}")
    return 0


def _remove(folders: Sequence[Path]) -> int:
    from kdlvfm.cli.lock import LOCK, owner
    from kdlvfm.training.cache.compute import shown_bytes
    from kdlvfm.training.cache.store import INDEX, SHARDS

    for folder in folders:
        _open(folder)
        strange = [
            path.name
            for path in folder.iterdir()
            if path.name not in (INDEX, SHARDS, LOCK) and path.suffix not in (".json", ".safetensors")
        ]
        if strange:
            raise CommandError(f"{folder} holds {strange[0]} besides a cache; nothing was removed.")
        for part in (folder, *(folder / SHARDS).glob("*")):
            if process := owner(part):
                raise CommandError(f"{folder} is being computed by {process}; nothing was removed.")
    for folder in folders:
        size = _size(folder)
        shutil.rmtree(folder)
        print(f"removed  {folder}, {shown_bytes(size)}")
    return 0


def _size(folder: Path) -> int:
    """Bytes on the disk: files of rows have holes where rows are missing."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def _verify(folder: Path, options: argparse.Namespace) -> int:
    """Compare a cache with its teacher; 1 if something is wrong."""
    from kdlvfm.data.sampler import SampleKey
    from kdlvfm.training.cache.compute import Finding, compare
    from kdlvfm.training.cache.formats import BOUNDS, LEAST_COSINE, CacheError

    store = _open(folder)
    source = _source(store, options.data_root, options.device)
    wrong = 0
    for format, _ in store.formats().values():
        rows = store.stored(format)
        chosen = random.sample(rows, min(options.images, len(rows)))
        keys = {row: SampleKey(*divmod(row, store.samples)) for row in sorted(chosen)}
        try:
            findings = compare(store, source, format, keys)
        except CacheError as error:
            raise CommandError(str(error)) from error
        cosines = [finding.cosine for finding in findings if finding.cosine is not None]
        name, bound = f"{format.tap} {format.label}", BOUNDS[format.stored]
        if format.projection is not None:
            kept = f"{100 * format.projection.variance:.1f} %"
            bound = f"{bound} among coefficients; the components keep {kept} of the variance"
        if cosines:
            print(
                f"{name}: {len(findings)} of {len(rows)} images computed again, lowest cosine {min(cosines):.6f} (at "
                f"least {LEAST_COSINE[format.stored]}); error by storing at most: {bound}"
            )
        if options.all:
            found = {finding.row for finding in findings}
            damaged = [row for row in rows if row not in found and not store.is_whole(format, row)]
            findings += [Finding(row, None, "is damaged") for row in damaged]
            print(f"{name}: checksums of all {len(rows)} images compared")
        bad = [finding for finding in findings if finding.problem is not None]
        for finding in bad:
            view, sample = divmod(finding.row, store.samples)
            print(f"WRONG  {format.tap}, view {view} of sample {sample} {finding.problem}")
            if options.drop:
                store.drop(format, finding.row)
        wrong += len(bad)
    if wrong:
        done = "and taken out; teacher_cache=build computes them again" if options.drop else "--drop takes them out"
        print(f"{wrong} stored images are wrong: {done}.")
        return 1
    print(f"{folder} is what the teacher gives.")
    return 0


def _source(store: CacheStore, data_root: str | None, device: str) -> FeatureSource:
    """Teacher and data of a cache, built again from what its index says.

    Raises:
        CommandError: they cannot be, or are not what they were.
    """
    import torch

    from kdlvfm.cli.build import build_data, build_task, build_teacher
    from kdlvfm.cli.targets import check_targets
    from kdlvfm.training.cache.source import FeatureSource, weights_hash
    from kdlvfm.training.cache.store import INDEX

    config, expected = dict(store.config), store.description
    check_targets(config, store.folder / INDEX, trusted=(_FROM_RUN,))
    if data_root is not None:
        config["data"] = {**config["data"], "root": data_root}
    data = build_data(config)
    if data.split_hash() != expected["data"]["split_hash"]:
        raise CommandError(f"{store.folder}: the data is not what it was when the features were computed.")
    teacher = build_teacher(config["teacher"], data.class_names)
    if teacher is None or weights_hash(teacher) != expected["teacher"]["weights"]:
        raise CommandError(
            f"{store.folder}: the teacher built from its configuration has other weights than the one whose features "
            "were stored. Random weights cannot be had a second time."
        )
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        place = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise CommandError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    task = build_task(config, data, teacher)
    return FeatureSource(data, task, teacher, place, str(expected["precision"]), data.batch_size)
