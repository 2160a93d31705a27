# SPDX-License-Identifier: Apache-2.0
"""Figures of the literature for the settings that records may have, from `published.json`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any, NamedTuple

from kdlvfm.reporting.record import Record


class Published(NamedTuple):
    """A figure and where it was published.

    Attributes:
        value: the score, a fraction.
        source: number of the footnote.
    """

    value: float
    source: int


def published(record: Record, split: str, metric: str) -> tuple[dict[str, Published], list[str]]:
    """What papers report for the data, the student and the recipe of a run.

    Returns:
        Figures by method, the name of a distiller or `baseline`; and the footnotes, from number 1 on.
    """
    figures: dict[str, Published] = {}
    numbers: dict[str, int] = {}
    content = _content()
    for setting in content["settings"]:
        if (setting["split"], setting["metric"]) != (split, metric):
            continue
        for student in setting["students"]:
            if not _fits(record, setting["record"] | student["record"]):
                continue
            for source, values in student["figures"].items():
                number = numbers.setdefault(source, len(numbers) + 1)
                figures |= {method: Published(value, number) for method, value in values.items()}
    footnotes = [f"[{number}] {_footnote(content['sources'][source])}" for source, number in numbers.items()]
    return figures, footnotes


def _fits(record: Record, wanted: Mapping[str, Any]) -> bool:
    """Whether the record has these values, dotted key -> value; in text, `*` stands for anything."""
    for key, value in wanted.items():
        found: Any = record
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(value, str) and isinstance(found, str):
            if not fnmatchcase(found, value):
                return False
        elif found != value:
            return False
    return True


def _footnote(source: Mapping[str, str]) -> str:
    return f"Published: {source['title']}. {source['setting']} {source['url']}"


@functools.cache
def _content() -> dict[str, Any]:
    text = resources.files("kdlvfm.reporting").joinpath("published.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
