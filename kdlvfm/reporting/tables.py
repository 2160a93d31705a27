# SPDX-License-Identifier: Apache-2.0
"""From run records to a table: teacher, baseline and methods under one recipe, with what may be concluded from them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from kdlvfm.reporting.cells import Cell, label_methods, make_cell, score_of, split_hash, teacher_key
from kdlvfm.reporting.collect import preference
from kdlvfm.reporting.record import BASELINE, Record
from kdlvfm.reporting.statistics import (
    SEEDS_FOR_A_VERDICT,
    Difference,
    Summary,
    correct_for_many,
    gap_closed,
    gap_interval,
    paired_difference,
    summarise_values,
)


@dataclass(frozen=True)
class Row:
    """One line of a table. Scores are fractions; `None` stands for what is unknown or does not apply.

    Attributes:
        role: what the line is for.
        method: the distiller, with the settings that tell it from its variants in the same block.
        score: the metric over the finished seeds.
        difference: to the baseline, paired by seed; its p-value is corrected for the number of methods of the block.
        gap_closed: share of the gap between baseline and teacher.
        gap_interval: its 95 % interval, with two paired seeds or more.
        parameters: of the network whose score it is (student, or the teacher in its own line).
        macs: of that network, for one image.
        images_per_second: training throughput, mean of the finished runs.
        train_seconds: duration of the training, mean of the finished runs.
        peak_memory_mib: mean of the finished runs.
        teacher_share: fraction of the training time spent in the teacher, mean of the finished runs.
        runs: number of runs by status.
        records: the runs themselves, by seed.
    """

    role: Literal["teacher", "baseline", "method"]
    method: str
    score: Summary | None = None
    difference: Difference | None = None
    gap_closed: float | None = None
    gap_interval: tuple[float, float] | None = None
    parameters: int | None = None
    macs: int | None = None
    images_per_second: float | None = None
    train_seconds: float | None = None
    peak_memory_mib: float | None = None
    teacher_share: float | None = None
    runs: Mapping[str, int] | None = None
    records: tuple[Record, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Block:
    """The lines that compare with each other: same data, student, recipe and teacher.

    Attributes:
        data: name of the data set.
        split: the split that the score was measured on.
        metric: name of the score.
        student: name of the student and where its weights came from.
        recipe: hash of the recipe.
        teacher: the teacher's card as in the record; `None` if no run had a teacher.
        rows: teacher, baseline, then methods by name.
        warnings: what forbids or weakens a conclusion.
        notes: what a reader should know.
    """

    data: str
    split: str
    metric: str
    student: str
    recipe: str
    teacher: Mapping[str, Any] | None
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Blocks in order of data, student, recipe and teacher."""

    blocks: tuple[Block, ...]


def summarise(records: Iterable[Record], split: str = "test", metric: str | None = None) -> Table:
    """The table of `records`, in an order that does not depend on theirs.

    Args:
        records: run records, of any status.
        split: the split whose metrics are compared.
        metric: the metric compared; default: the primary metric of each record's task.

    Raises:
        ValueError: no finished run has this metric on this split; the message says what there is.
    """
    recipes: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record["name"], record["seed"], record["config_hash"])):
        recipes[record["data"]["name"], record["student"]["name"], record["recipe_hash"]].append(record)
    finished = [record for group in recipes.values() for record in group if record["status"] == "finished"]
    if finished and all(score_of(record, split, metric) is None for record in finished):
        known = sorted(
            {
                f"{part}/{name}"
                for r in finished
                for part, metrics in r["metrics"].items()
                for name, value in metrics.items()
                if not isinstance(value, dict)
            }
        )
        wanted = f"{split}/{metric or finished[0]['task']['primary_metric']}"
        raise ValueError(f"No finished run has {wanted}; there is {', '.join(known) or 'no metric at all'}.")
    blocks = []
    for _, group in sorted(recipes.items()):
        # A baseline never looks at its teacher, so it stands in the block of each teacher of its recipe.
        methods = [record for record in group if record["distiller"]["name"] != BASELINE]
        for teacher in sorted({teacher_key(record) for record in methods or group}):
            blocks.append(_block(group, teacher, split, metric))
    return Table(tuple(blocks))


def _block(group: Sequence[Record], key_of_teacher: tuple[str, ...], split: str, metric: str | None) -> Block:
    cells: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in group:
        distiller = record["distiller"]
        if distiller["name"] == BASELINE:
            cells[BASELINE, ""].append(record)
        elif teacher_key(record) == key_of_teacher:
            cells[distiller["name"], json.dumps(distiller["settings"], sort_keys=True)].append(record)
    labels = label_methods(cells)
    methods = {labels[key]: make_cell(cells[key], split, metric) for key in sorted(cells, key=lambda key: labels[key])}
    baseline = methods.pop("baseline", Cell({}, {}, []))
    cards = [record["teacher"] for record in group if teacher_key(record) == key_of_teacher and record["teacher"]]
    level, warnings = _teacher_level(cards, split, metric or group[0]["task"]["primary_metric"])

    rows = []
    if cards:
        gap = level.mean - fmean(baseline.scores.values()) if level and baseline.scores else None
        difference = None if gap is None else Difference(len(baseline.scores), gap, None)
        rows.append(Row("teacher", "teacher", level, difference, parameters=cards[0]["parameters"]))
        if cards[0]["weights"] == "random":
            warnings.insert(
                0, "The teacher's weights are RANDOM: it knows nothing, and these figures only show that the code runs."
            )
        if gap is not None and gap <= 0:
            warnings.append("The teacher is no better than the baseline: there is no gap to close.")
    if baseline.runs:
        rows.append(_row("baseline", "baseline", baseline, {}, None))
    if methods and not baseline.scores:
        warnings.append(
            f"No finished baseline (distiller {BASELINE!r}) of this recipe: {', '.join(methods)} stand alone."
        )
    notes = _notes({"baseline": baseline, **methods}, warnings, split)
    if cards and level is None:
        notes.append(f"The teacher's own score on {split} is unknown: no upper bound, and no share of the gap.")
    for label, cell in methods.items():
        pairs = {
            seed: score
            for seed, score in baseline.scores.items()
            if seed not in cell.runs or split_hash(cell.runs[seed]) == split_hash(baseline.runs[seed])
        }
        if len(pairs) < len(baseline.scores):
            warnings.append(f"{label}: some seeds saw other data than the baseline's and are not paired.")
        if pairs and len(shared := cell.scores.keys() & pairs.keys()) < len(cell.scores):
            notes.append(
                f"{label}: the baseline shares {len(shared)} of {len(cell.scores)} seeds; differences are over those."
            )
        rows.append(_row("method", label, cell, pairs, level.mean if level else None))
    differences = correct_for_many(
        {row.method: row.difference for row in rows if row.role == "method" and row.difference}
    )
    rows = [replace(row, difference=differences.get(row.method, row.difference)) for row in rows]
    tested = sum(difference.verdict is not None for difference in differences.values())
    if differences and not tested:
        notes.append(f"Fewer than {SEEDS_FOR_A_VERDICT} paired seeds: no verdict.")
    if tested > 1:
        notes.append(
            f"Verdicts: paired t-tests at 5 %, corrected for {tested} methods (Holm); intervals are not corrected."
        )
    student = group[0]["student"]
    return Block(
        data=group[0]["data"]["name"],
        split=split,
        metric=metric or group[0]["task"]["primary_metric"],
        student=f"{student['name']} ({student['weights']} weights)",
        recipe=group[0]["recipe_hash"],
        teacher=cards[0] if cards else None,
        rows=tuple(rows),
        warnings=tuple(warnings),
        notes=tuple(notes),
    )


def _row(
    role: Literal["baseline", "method"], label: str, cell: Cell, baseline: Mapping[int, float], teacher: float | None
) -> Row:
    runs = sorted(cell.runs.values(), key=preference, reverse=True)
    costs = [record["cost"] for record in runs if record["status"] == "finished"]

    def mean(field: str) -> float | None:
        known = [cost[field] for cost in costs if cost[field] is not None]
        return fmean(known) if known else None

    return Row(
        role,
        label,
        score=summarise_values([cell.scores[seed] for seed in sorted(cell.scores)]),
        difference=paired_difference(cell.scores, baseline),
        gap_closed=gap_closed(cell.scores, baseline, teacher),
        gap_interval=gap_interval(cell.scores, baseline, teacher),
        parameters=runs[0]["student"]["parameters"],
        macs=runs[0]["student"]["macs"],
        images_per_second=mean("images_per_second"),
        train_seconds=mean("train_seconds"),
        peak_memory_mib=mean("peak_memory_mib"),
        teacher_share=mean("teacher_share"),
        runs=dict(sorted(Counter(record["status"] for record in runs).items())),
        records=tuple(cell.runs.values()),
    )


def _notes(cells: Mapping[str, Cell], warnings: list[str], split: str) -> list[str]:
    """Notes on the runs of `cells`; what weakens a conclusion is added to `warnings`."""
    notes = []
    for label, cell in cells.items():
        for seed, record in cell.runs.items():
            if record["status"] == "finished" and seed not in cell.scores:
                warnings.append(f"{label}, seed {seed}: finished without this metric on {split}.")
            if record["status"] == "failed":
                notes.append(f"{label}, seed {seed} failed: {record['error'].strip().splitlines()[0]}")
        if cell.repeated:
            seeds = ", ".join(map(str, cell.repeated))
            notes.append(f"{label}: several runs of seed {seeds}; the finished one started last is shown.")
    finished = [record for cell in cells.values() for record in cell.runs.values() if record["status"] == "finished"]
    if len({json.dumps(record["hardware"], sort_keys=True) for record in finished}) > 1:
        notes.append("The runs come from different machines: their images/s do not compare.")
    if {record["selection"] for record in finished} == {"best_val"}:
        notes.append("Each run was tested with the weights that were best on its validation split.")
    return notes


def _teacher_level(cards: Sequence[Mapping[str, Any]], split: str, metric: str) -> tuple[Summary | None, list[str]]:
    """The teacher's own score from the cards of the runs that used it, and what is wrong with it."""
    known = [card["metrics"][split][metric] for card in cards if metric in (card["metrics"] or {}).get(split, {})]
    if not known:
        return None, []
    spread = max(known) - min(known)
    warnings = [f"The teacher's score differs between runs by {100 * spread:.2f} points."] if spread > 1e-4 else []
    return Summary(1, fmean(known), None), warnings
