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
    """The lines of one record's table."""
    setting, environment = record["setting"], record["environment"]
    lines = [
        "| loss | maps | channels | batch | ours | plain | times faster | ours | plain | times smaller |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in record["cases"]:
        ours, plain = entry["ours"], entry["plain"]
        size = f"{entry['size']}x{entry['size']}" if entry["size"] else "–"
        lines.append(
            f"| `{entry['loss']}` | {size} | {entry['channels'] or '–'} | {entry['batch']} | "
            f"{time_text(ours)} | {time_text(plain)} | **{entry['faster']:.2f}** | "
            f"{_memory(ours)} | {_memory(plain)} | **{entry['smaller']:.1f}** |"
        )
    where = environment["hardware"]["gpu"] if setting["device"] == "cuda" else environment["hardware"]["cpu"]
    threads = "" if setting["device"] == "cuda" else f", {setting['threads']} thread"
    notes = (
        f"{where}{threads}, torch {environment['versions']['torch']}, float32, a teacher of "
        f"{setting['teacher_channels']} channels."
    )
    return [*lines, "", notes]


def time_text(side: dict[str, float]) -> str:
    return f"{side['milliseconds']:.{0 if side['milliseconds'] >= 100 else 1 if side['milliseconds'] >= 10 else 2}f} ms"


def _memory(side: dict[str, float]) -> str:
    return f"{side['mib']:.{0 if side['mib'] >= 10 else 1}f} MiB"


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
