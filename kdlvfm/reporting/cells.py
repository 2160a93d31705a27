# SPDX-License-Identifier: Apache-2.0
"""Cells of a table: the runs of one method, its name among its variants, and the scores of its seeds."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdlvfm.reporting.collect import preference
from kdlvfm.reporting.record import BASELINE, Record, flatten


@dataclass(frozen=True)
class Cell:
    """The runs of one method, seed -> record, and their scores, seed -> fraction; `repeated` seeds had several runs."""

    runs: dict[int, Record]
    scores: dict[int, float]
    repeated: list[int]


def make_cell(records: Sequence[Record], split: str, metric: str | None) -> Cell:
    """One run for each seed: of several the finished one, and of those the one started last."""
    runs: dict[int, Record] = {}
    for record in sorted(records, key=preference):
        runs[record["seed"]] = record
    scores = {seed: score_of(record, split, metric) for seed, record in runs.items() if record["status"] == "finished"}
    count = Counter(record["seed"] for record in records)
    return Cell(
        runs=dict(sorted(runs.items())),
        scores={seed: score for seed, score in sorted(scores.items()) if score is not None},
        repeated=sorted(seed for seed in count if count[seed] > 1),
    )


def label_methods(cells: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """A name for each (distiller, settings as JSON): the distiller's, with what tells it from its variants."""
    variants: dict[str, list[dict[str, str]]] = defaultdict(list)
    for name, settings in cells:
        variants[name].append(flatten(json.loads(settings or "{}")))
    labels = {}
    for name, settings in cells:
        own = flatten(json.loads(settings or "{}"))
        differing = [
            f"{key}={own[key]}"
            for key in sorted(own)
            if any(key not in variant or variant[key] != own[key] for variant in variants[name])
        ]
        labels[name, settings] = "baseline" if name == BASELINE else " ".join([name, *differing])
    return labels


def score_of(record: Record, split: str, metric: str | None) -> float | None:
    """The metric on the split, by default the task's primary one; `None` if the record has none."""
    value = record["metrics"].get(split, {}).get(metric or record["task"]["primary_metric"])
    return float(value) if isinstance(value, int | float) else None


def teacher_key(record: Record) -> tuple[str, ...]:
    """What makes two teachers the same: name and weights; all random weights of one network count as one teacher."""
    card = record["teacher"]
    if card is None:
        return ()
    random = card["weights"] == "random"
    return card["name"], card["weights"], "" if random else card["sha256"] or card["source"] or ""


def split_hash(record: Record) -> str:
    """Which splits of the data the run saw."""
    return str(record["data"]["split_hash"])
