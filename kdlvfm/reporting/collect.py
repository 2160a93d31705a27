# SPDX-License-Identifier: Apache-2.0
"""Finding run records on disk. Nothing is left out silently: whatever is not used is named with its cause."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kdlvfm.reporting.record import Record, RecordError, read_record


class Collection(NamedTuple):
    """Run records by file, in order of path, and one line for each file or folder that gave none."""

    records: dict[Path, Record]
    problems: list[str]

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each run by the hash of its configuration."""
        return {record["config_hash"]: file.parent for file, record in self.records.items()}


def collect(paths: Iterable[Path]) -> Collection:
    """All records in or below `paths`, which may be run folders, folders of runs, or record files.

    Of several records of one configuration the best one stays (see `preference`) and the others become problems.
    """
    problems: list[str] = []
    files: set[Path] = set()
    for path in paths:
        found = [path] if path.is_file() else list(path.rglob("record.json"))
        if not found:
            problems.append(f"{path}: {'no record.json below this folder' if path.is_dir() else 'does not exist'}.")
        files.update(file.resolve() for file in found)

    best: dict[str, tuple[Path, Record]] = {}
    for file in sorted(files):
        try:
            record = read_record(file)
        except RecordError as error:
            problems.append(str(error))
            continue
        rival = best.setdefault(record["config_hash"], (file, record))
        if rival[0] != file:
            kept, left = sorted((rival, (file, record)), key=lambda item: preference(item[1]), reverse=True)
            best[record["config_hash"]] = kept
            problems.append(f"{left[0]}: repeats the configuration of {kept[0]} and is left out.")
    return Collection(dict(sorted(best.values(), key=lambda item: item[0])), problems)


def preference(record: Record) -> tuple[bool, str]:
    """Sorting key among records of one run: a finished one before any other, then the one started last."""
    return record["status"] == "finished", record["started"]
