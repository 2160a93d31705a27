# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of experiments into pages, each between its two marks, and the figures of some of them.

From committed records and nothing else:

python docs/tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from kdlvfm.reporting.collect import collect
from kdlvfm.reporting.plot import draw_differences
from kdlvfm.reporting.record import Record
from kdlvfm.reporting.render import to_markdown
from kdlvfm.reporting.tables import summarise

ROOT = Path(__file__).parents[1]
# Page, experiment, the split that its table compares.
TABLES = [
    ("README.md", "demo", "test"),
    ("docs/benchmarks.md", "bccd", "test"),
    ("docs/benchmarks.md", "digit_scenes", "test"),
    ("docs/detection.md", "demo_detection", "test"),
    ("experiments/alignment/README.md", "alignment", "val"),
    ("experiments/bccd/README.md", "bccd", "test"),
    ("experiments/digit_scenes/README.md", "digit_scenes", "test"),
    ("experiments/zoo_smoke/README.md", "zoo_smoke", "test"),
]
# Experiments whose figure is docs/images/NAME.svg.
FIGURES = ["bccd", "digit_scenes"]


def records_of(experiment: str) -> list[Record]:
    """The committed records of an experiment.

    Raises:
        ValueError: one of them cannot be read.
    """
    collection = collect([ROOT / "experiments" / experiment / "records"])
    if collection.problems:
        raise ValueError("; ".join(map(str, collection.problems)))
    return list(collection.records.values())


def filled(page: str, experiment: str, split: str) -> str:
    """The text of a page with the table of an experiment made anew.

    Raises:
        ValueError: the page has not exactly one place for it.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    table = to_markdown(summarise(records_of(experiment), split)).strip()
    text, places = re.subn(
        rf"(<!-- {experiment}-table -->\n).*?(<!-- /{experiment}-table -->)",
        lambda marks: f"{marks[1]}\n{table}\n\n{marks[2]}",
        text,
        flags=re.DOTALL,
    )
    if places != 1:
        raise ValueError(f"{page} has {places} places for the table of {experiment}, not one.")
    return text


if __name__ == "__main__":
    for place in TABLES:
        (ROOT / place[0]).write_text(filled(*place), encoding="utf-8")
        print(f"wrote {place[0]}")
    for name in FIGURES:
        picture = ROOT / "docs" / "images" / f"{name}.svg"
        draw_differences(summarise(records_of(name)), [picture])
        print(f"wrote {picture.relative_to(ROOT)}")
