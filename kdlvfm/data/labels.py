# SPDX-License-Identifier: Apache-2.0
"""Labels that a teacher made: what the file beside them says, so that the record of a run can say it too."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kdlvfm.data.base import DataError
from kdlvfm.data.images import read_bytes

LABELS = "labels.json"
SCHEMA = "kdlvfm.labels/1"
_TEACHER = ("name", "weights", "licence", "sha256", "source", "weights_hash")


def read_labels(root: Path, splits: Collection[str]) -> dict[str, Any] | None:
    """Which teacher made labels in a folder, as `kdlvfm label` has written it there.

    Args:
        root: the folder of a data set.
        splits: those that are read in the layout of `kdlvfm label`.

    Returns:
        `"teacher"`, its card and the hash of its weights; `"confidence"`, the least of a label that was kept; and
        `"images"`, how many it labelled in each of the splits. `None` where no teacher made any.

    Raises:
        DataError: labelling has not come to its end, or the file is not what it should be.
    """
    path = root / LABELS
    if not path.is_file():
        return None
    try:
        content = json.loads(read_bytes(path))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}")
        made = {
            "teacher": {key: content["teacher"][key] for key in _TEACHER},
            "confidence": float(content["confidence"]),
            "images": {split: int(count) for split, count in content["images"].items() if split in splits},
        }
        finished = content["kept"] is not None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is not as kdlvfm label writes it ({type(error).__name__}: {error}): restore it, or label anew."
        ) from error
    if not finished:
        raise DataError(f"{root} is not labelled to its end: give its command again, {path} has it.")
    return made if made["images"] else None
