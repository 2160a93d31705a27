# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of experiments into pages, each between its two marks, and the figures of some of them.

From committed records and nothing else:

python docs/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from kdlvfm.reporting.collect import collect
from kdlvfm.reporting.plot import draw_differences
from kdlvfm.reporting.record import Record
from kdlvfm.reporting.render import to_markdown
from kdlvfm.reporting.tables import summarise

ROOT = Path(__file__).parents[1]
# Page, experiment or one of its settings, the split that its table compares.
TABLES = [
    ("README.md", "demo", "test"),
    ("README.md", "camvid/scratch", "test"),
    ("docs/benchmarks.md", "camvid", "test"),
    ("docs/benchmarks.md", "bccd", "test"),
    ("docs/benchmarks.md", "data_free", "test"),
    ("docs/benchmarks.md", "digit_scenes", "test"),
    ("docs/benchmarks.md", "dkdm", "test"),
    ("docs/benchmarks.md", "two_stages/camvid", "test"),
    ("docs/detection.md", "demo_detection", "test"),
    ("experiments/alignment/README.md", "alignment", "val"),
    ("experiments/bccd/README.md", "bccd", "test"),
    ("experiments/camvid/README.md", "camvid", "test"),
    ("experiments/data_free/README.md", "data_free", "test"),
    ("experiments/digit_scenes/README.md", "digit_scenes", "test"),
    ("experiments/dkdm/README.md", "dkdm", "test"),
    ("experiments/teacher_cache/README.md", "teacher_cache", "test"),
    ("experiments/two_stages/README.md", "two_stages/camvid", "test"),
    ("experiments/two_stages/README.md", "two_stages/features", "val"),
    ("experiments/zoo_smoke/README.md", "zoo_smoke", "test"),
]
# Page and experiment of which a student was exported.
EXPORTS = [("experiments/camvid/README.md", "camvid"), ("docs/benchmarks.md", "camvid")]
# Experiments whose figure is docs/images/NAME.svg.
FIGURES = ["bccd", "camvid", "digit_scenes"]


def records_of(experiment: str) -> list[Record]:
    """The committed records of an experiment, or of one setting of it: `camvid/scratch`.

    Raises:
        ValueError: one of them cannot be read.
    """
    name, _, setting = experiment.partition("/")
    collection = collect([ROOT / "experiments" / name / "records" / setting])
    if collection.problems:
        raise ValueError("; ".join(map(str, collection.problems)))
    return list(collection.records.values())


def filled(page: str, experiment: str, split: str) -> str:
    """The text of a page with the table of an experiment made anew.

    Raises:
        ValueError: the page has not exactly one place for it.
    """
    return _between(page, f"{experiment}-table", to_markdown(summarise(records_of(experiment), split)).strip())


def exported(page: str, experiment: str) -> str:
    """The text of a page with what an exported student of an experiment scores and takes.

    Raises:
        ValueError: the page has not exactly one place for it.
    """
    path = ROOT / "experiments" / experiment / "export.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["measured"]["rows"]
    lines = ["| | mIoU, % | one image, ms | MB |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        score, seconds = row["metrics"]["miou"], row["latency"]["latency_p50"]
        lines.append(f"| {row['title']} | {100 * score:.2f} | {1000 * seconds:.0f} | {row['bytes'] / 1e6:.1f} |")
    return _between(page, f"{experiment}-export", "\n".join(lines))


def _between(page: str, mark: str, table: str) -> str:
    text, places = re.subn(
        rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
        lambda marks: f"{marks[1]}\n{table}\n\n{marks[2]}",
        (ROOT / page).read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if places != 1:
        raise ValueError(f"{page} has {places} places for {mark}, not one.")
    return text


if __name__ == "__main__":
    for place in TABLES:
        (ROOT / place[0]).write_text(filled(*place), encoding="utf-8")
        print(f"wrote {place[0]}")
    for page, name in EXPORTS:
        (ROOT / page).write_text(exported(page, name), encoding="utf-8")
        print(f"wrote {page}")
    for name in FIGURES:
        picture = ROOT / "docs" / "images" / f"{name}.svg"
        draw_differences(summarise(records_of(name)), [picture])
        print(f"wrote {picture.relative_to(ROOT)}")
