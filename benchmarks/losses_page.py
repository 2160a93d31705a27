# SPDX-License-Identifier: Apache-2.0
"""The tables of losses in docs/performance.md, from the records of `losses.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"


def record_path(device: str) -> Path:
    """Each device has a record."""
    return ROOT / "benchmarks" / "records" / ("losses.json" if device == "cpu" else f"losses_{device}.json")


def table(record: dict[str, Any]) -> list[str]:
    """The lines of one record's table: a row for each loss and number of channels, in it each size of maps."""
    setting, environment = record["setting"], record["environment"]
    sizes = sorted({entry["size"] for entry in record["cases"] if entry["size"]}) or [0]
    titles = ["loss", "channels"]
    for size in sizes:
        titles += [f"{size}x{size}: batch", "ours", "MiB", "times faster", "times smaller"]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    rows: dict[tuple[str, int | None], dict[int, dict[str, Any]]] = {}
    for entry in record["cases"]:
        # What has no maps stands in the columns of the smallest.
        rows.setdefault((entry["loss"], entry["channels"]), {})[entry["size"] or sizes[0]] = entry
    for (loss, channels), row in rows.items():
        cells = [f"`{loss}`", str(channels or "–")]
        for size in sizes:
            cells += _cells(row[size]) if size in row else [""] * 5
        lines.append(f"| {' | '.join(cells)} |")
    where = environment["hardware"]["gpu"] if setting["device"] == "cuda" else environment["hardware"]["cpu"]
    threads = "" if setting["device"] == "cuda" else f", {setting['threads']} thread"
    vectors = dict.fromkeys(f"`{entry['loss']}`" for entry in record["cases"] if not entry["size"])
    notes = (
        f"{where}{threads}, torch {environment['versions']['torch']}, float32, a teacher of "
        f"{setting['teacher_channels']} channels."
        + (f" Of vectors, not of maps: {', '.join(vectors)}." if vectors else "")
    )
    return [*lines, "", notes]


def _cells(entry: dict[str, Any]) -> list[str]:
    ours = entry["ours"]
    ratios = [f"**{entry['faster']:.2f}**", f"**{entry['smaller']:.1f}**"]
    return [str(entry["batch"]), time_text(ours), f"{ours['mib']:.{0 if ours['mib'] >= 10 else 1}f}", *ratios]


def time_text(side: dict[str, float]) -> str:
    return f"{side['milliseconds']:.{0 if side['milliseconds'] >= 100 else 1 if side['milliseconds'] >= 10 else 2}f} ms"


def page() -> str:
    """docs/performance.md with the tables of the records that there are."""
    text = PAGE.read_text(encoding="utf-8")
    for device in ("cpu", "cuda"):
        path = record_path(device)
        if path.exists():
            lines = table(json.loads(path.read_text(encoding="utf-8")))
            text = between(text, f"losses-{device}", lines)
    return text


def between(text: str, mark: str, lines: list[str]) -> str:
    """The text with these lines between the two marks of that name."""
    found, places = re.subn(
        rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
        lambda marks: "\n".join([marks[1], *lines, "", marks[2]]),
        text,
        flags=re.DOTALL,
    )
    if places != 1:
        raise ValueError(f"{PAGE} has {places} places for {mark}, not one.")
    return found
