# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm export`: the student of a finished run as weights, as ONNX and in INT8, with a model card."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlvfm.cli import CommandError

if TYPE_CHECKING:
    from kdlvfm.reporting.record import Record

_CALIBRATION, _SECONDS = 100, 10.0
_EPILOG = """\
writes into RUN/export, or the folder --out:
  student.safetensors   for plain SMP, or kdlvfm; encoder.safetensors for plain timm, where the encoder is timm's
  student.onnx          images (batch, 3, height, width), RGB in [0, 1], of any number and size, to logits or boxes
  student.int8.onnx     with --int8: the same with 8-bit weights and activations
  MODEL_CARD.md         what it is, its scores, every licence, and how each file is loaded
  export.json           checksums, differences between torch and onnxruntime, scores and latency

Detectors of boxes: GFL, RetinaNet, FCOS and ATSS have a graph; of others --no-onnx writes the weights.

examples:
  kdlvfm export runs/demo/cwd-seed0
  kdlvfm export runs/demo/cwd-seed0 --int8 --calibration 200
  kdlvfm export runs/demo_detection/pkd-seed0 --nms --out detector
"""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm export",
        description="Take the student of a finished run out of this library: as weights under the names of its own "
        "library, and as a graph for onnxruntime that is compared with torch before it is kept.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="(default: RUN/export)")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false", help="weights and card alone")
    parser.add_argument("--nms", action="store_true", help="end the graph of a detector with its NMS")
    parser.add_argument(
        "--int8", action="store_true", help="quantise as well, and measure everything on the data of the run"
    )
    parser.add_argument(
        "--calibration", type=int, metavar="N", help=f"training images for --int8 (default: {_CALIBRATION})"
    )
    parser.add_argument("--data-root", metavar="FOLDER", help="where the data lies here, if not where it was trained")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="of the images timed (default: the run's in evaluation)"
    )
    parser.add_argument(
        "--time", type=float, metavar="SECONDS", help=f"to time each of them; 0: no timing (default: {_SECONDS})"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export of another kind")
    options = parser.parse_args(arguments)
    _check(options)

    from kdlvfm.cli.export_files import LIBRARIES, Wanted, write_export
    from kdlvfm.cli.runs import read_run
    from kdlvfm.export.folder import all_or_nothing
    from kdlvfm.export.graph import ExportError

    for library in LIBRARIES if options.onnx else ():
        importlib.import_module(library)
    record = read_run(options.run)
    if record["task"]["name"] == "representation":
        raise CommandError(
            f"{options.run / 'student.safetensors'} needs no export: it is the encoder under timm's own names. Give it "
            f"to timm.create_model({record['student']['name']!r}, num_classes=0, checkpoint_path=...)."
        )
    if record["task"]["name"] not in ("segmentation", "detection"):
        raise CommandError(f"the task of this run is {record['task']['name']}; segmenters and detectors are exported.")
    out = options.run / "export" if options.out is None else options.out
    request = _request(options, record)
    if _is_done(out, request, options.force):
        print(f"{out} is this export; nothing to do.")
        return _closing(out)
    wanted = Wanted(
        onnx=options.onnx,
        nms=options.nms,
        calibration=request["calibration_images"],
        data_root=options.data_root,
        size=request["latency_size"] and tuple(request["latency_size"]),
        seconds=_SECONDS if options.time is None else options.time,
    )
    try:
        with all_or_nothing(out) as folder:
            write_export(options.run, record, request, wanted, folder)
    except ExportError as error:
        raise CommandError(f"{error} Nothing was written.") from error
    except OSError as error:
        raise CommandError(f"{out} cannot be written: {error}. Choose another folder with --out.") from error
    return _closing(out)


def _check(options: argparse.Namespace) -> None:
    """Raise `CommandError` for options that do not go together, or are out of range."""
    given = {name for name, value in vars(options).items() if value is not None and value is not False}
    for name in sorted({"nms", "int8", "size", "time"} & given):
        if not options.onnx:
            raise CommandError(f"--{name} is about ONNX: leave out --no-onnx.")
    for name in sorted({"calibration", "data_root"} & given):
        if not options.int8:
            raise CommandError(f"--{name.replace('_', '-')} is for --int8: add it.")
    if options.calibration is not None and options.calibration < 1:
        raise CommandError(f"--calibration must be at least 1 image, not {options.calibration}.")
    if options.time is not None and options.time < 0:
        raise CommandError(f"--time must be 0 seconds or more, not {options.time:g}.")
    if options.size is not None and (options.time == 0 or min(options.size) < 1):
        raise CommandError("--size must be a height and a width in pixels, of images to time: --size 512 1024.")


def _request(options: argparse.Namespace, record: Record) -> dict[str, Any]:
    """What an export promises: two that share it need not be made twice."""
    from kdlvfm.cli.runs import WEIGHTS
    from kdlvfm.export.folder import describe

    if not (options.run / WEIGHTS).is_file():
        raise CommandError(f"{options.run} has no {WEIGHTS}.")
    timed = options.onnx and options.time != 0
    return {
        "run": record["name"],
        "config_hash": record["config_hash"],
        "record": describe(options.run / "record.json")["sha256"],
        "weights": describe(options.run / WEIGHTS)["sha256"],
        "onnx": options.onnx,
        "nms": options.nms,
        "calibration_images": (options.calibration or _CALIBRATION) if options.int8 else None,
        "latency_size": list(options.size or record["student"]["input_size"]) if timed else None,
    }


def _is_done(out: Path, request: Mapping[str, Any], force: bool) -> bool:
    """Whether this very export is there already.

    Raises:
        CommandError: another one is, or other files.
    """
    from kdlvfm.export.folder import is_complete, read_manifest

    if out.exists() and not out.is_dir():
        raise CommandError(f"{out} is a file; choose a folder with --out.")
    manifest = read_manifest(out)
    if manifest is not None and manifest["request"] == request and is_complete(out, manifest):
        return True
    if not out.exists() or not any(out.iterdir()):
        return False
    if manifest is None:
        raise CommandError(f"{out} holds other files and no export; choose another folder with --out.")
    if force:
        return False
    before = manifest["request"]
    differing = [f"{key}: {before.get(key)} != {value}" for key, value in request.items() if before.get(key) != value]
    cause = "; ".join(differing) or "its files were changed"
    raise CommandError(f"{out} holds another export ({cause}); choose another folder with --out, or add --force.")


def _closing(out: Path) -> int:
    from kdlvfm.cli.export_files import CARD
    from kdlvfm.export.folder import read_manifest

    manifest = read_manifest(out)
    assert manifest is not None
    if manifest["measured"] is not None:
        _print_rows(manifest["measured"])
    print(f"wrote      {out}/: {', '.join(manifest['files'])}, export.json")
    print(f"next       open {out / CARD}")
    return 0


def _print_rows(measured: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kdlvfm.export.card import Measured, as_cells

    titles, rows = as_cells([Measured(**row) for row in measured["rows"]], measured["metric"])
    table = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
