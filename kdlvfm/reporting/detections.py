# SPDX-License-Identifier: Apache-2.0
"""Boxes that were found, as a file in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlvfm.reporting.figures import Objects


def write_detections(
    found: Mapping[str, tuple[tuple[int, int], Objects]], classes: Sequence[str], title: str, path: Path
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
