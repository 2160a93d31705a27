# SPDX-License-Identifier: Apache-2.0
"""The folder of an export: all of its files or none, and a list of them with their checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

MANIFEST = "export.json"
SCHEMA = "kdlvfm.export/1"


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """Within the context, an empty folder; at its end its files take the place of an earlier export in `folder`.

    If the context ends with an error, or is interrupted, `folder` stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        yield Path(place)
        folder.mkdir(exist_ok=True)
        manifest = read_manifest(folder)
        # The list of files goes first and comes last: files without one are no export.
        for name in [MANIFEST, *manifest["files"]] if manifest else []:
            (folder / name).unlink(missing_ok=True)
        for file in sorted(Path(place).iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(folder / file.name)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `export.json`: `content`, and size and SHA-256 of every file in the folder."""
    files = {file.name: describe(file) for file in sorted(folder.iterdir())}
    text = json.dumps({"schema": SCHEMA, **content, "files": files}, indent=2, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The `export.json` of a folder; `None` if there is none, or one that is not ours."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return None
    if not all(isinstance(content.get(key), dict) for key in ("request", "files")):
        return None
    # Its files are replaced with it, so they must lie in this folder and nowhere else.
    return content if all(Path(name).name == name for name in content["files"]) else None


def is_complete(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file of an export is there, unchanged."""
    return all(
        (folder / name).is_file() and describe(folder / name) == stated for name, stated in manifest["files"].items()
    )


def describe(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
