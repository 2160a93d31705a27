# SPDX-License-Identifier: Apache-2.0
"""Where a run lies, and what lies there already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdlvfm.cli import CommandError
from kdlvfm.cli.lock import LOCK, leads
from kdlvfm.reporting import record as records


def run_folder(config: Mapping[str, Any]) -> Path:
    """The folder of a run: `out`, or a name made of its choices, its seed and its hash."""
    if config["out"] is not None:
        return Path(str(config["out"]))
    choices = config["choices"]
    name = f"{method_name(config)}-{choices['teacher']}-seed{config['seed']}-{records.config_hash(config)[:6]}"
    name = name.replace(":", "-")  # a colon is no part of a file's name on every system
    return Path("runs", str(choices["data"]), str(choices["student"]), name)


def method_name(config: Mapping[str, Any]) -> str:
    """The distiller, with that of the first stage; of a baseline that trains as long as a method that one too."""
    longer = f"-as-long-as-{config['equal_time']['method']}" if config["equal_time"] else ""
    earlier = f"-after-{config['after']['method']}" if config["after"] else ""
    return f"{config['choices']['distiller']}{earlier}{longer}"


def earlier_record(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier start of the same run, at `path`; `None` without one.

    Raises:
        CommandError: the folder holds another run, or something else.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise CommandError(f"{path.parent} is a file; choose a folder with out=FOLDER.")
    if not path.exists():
        # On a cluster the processes of a run start at once, and the first one may have begun to write.
        if leads() and path.parent.exists() and any(file.name != LOCK for file in path.parent.iterdir()):
            raise CommandError(f"{path.parent} holds other files and no run; choose another folder with out=FOLDER.")
        return None
    try:
        record = records.read_record(path)
    except records.RecordError as error:
        raise CommandError(f"{error} Choose another folder with out=FOLDER, or remove this one.") from error
    if record["config_hash"] != records.config_hash(config):
        if record["status"] == "failed" and not checkpoint_of(path.parent).exists():
            return None  # it never got anywhere: the corrected command may have its place
        changed = records.differences(record["config"], config)
        shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
        raise CommandError(
            f"{path.parent} holds a run of a different configuration ({shown}); choose another folder with out=FOLDER."
        )
    return record


def checkpoint_of(folder: Path) -> Path:
    """Where a run keeps what it goes on from."""
    return folder / "checkpoints" / "last.ckpt"
