# SPDX-License-Identifier: Apache-2.0
"""From run records to a table: teacher, baseline and methods under one recipe, with what may be concluded from them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from kdlvfm.reporting.block import OVER_IMAGES, Block, Row, Table
from kdlvfm.reporting.cells import (
    Cell,
    about_baselines,
    costs_of,
    label_methods,
    longer_baselines,
    make_cell,
    remarks_on,
    score_of,
    strangers,
    teacher_key,
    teacher_level,
    teacher_of,
    variant_of,
)
from kdlvfm.reporting.pairing import Pairing
from kdlvfm.reporting.published import published
from kdlvfm.reporting.reading import reading_of
from kdlvfm.reporting.record import BASELINE, Record
from kdlvfm.reporting.statistics import (
    RESAMPLES,
    SEEDS_FOR_A_VERDICT,
    Difference,
    about_verdicts,
    correct_for_many,
    gap_closed,
    gap_interval,
    summarise_values,
)


def summarise(
    records: Iterable[Record],
    split: str = "test",
    metric: str | None = None,
    folders: Mapping[str, Path] | None = None,
) -> Table:
    """The table of `records`, in an order that does not depend on theirs.

    Args:
        records: run records, of any status.
        split: the split whose metrics are compared.
        metric: the metric compared; default: the primary metric of each record's task.
        folders: hash of a configuration -> folder of its run, for what lies beside the records: runs of one seed are
            compared over images with it.

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
            shown = metric or group[0]["task"]["primary_metric"]
            blocks.append(_block(group, teacher, split, shown, folders or {}, strangers(group, finished)))
    return Table(tuple(blocks))


def _block(
    group: Sequence[Record],
    key_of_teacher: tuple[str, ...],
    split: str,
    metric: str,
    folders: Mapping[str, Path],
    others: str,
) -> Block:
    runs: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in group:
        distiller = record["distiller"]
        if record["config"].get("equal_time"):
            continue
        if distiller["name"] == BASELINE:
            runs[BASELINE, ""].append(record)
        elif teacher_key(record) == key_of_teacher:
            runs[distiller["name"], variant_of(record)].append(record)
    labels = label_methods(runs)
    longer = {label: make_cell(found, split, metric) for label, found in longer_baselines(group, labels, runs).items()}
    names = {labels[key]: key[0] for key in runs}
    methods = {labels[key]: make_cell(runs[key], split, metric) for key in sorted(runs, key=lambda key: labels[key])}
    baseline = methods.pop("baseline", Cell({}, {}, []))
    cards = [card for record in group if teacher_key(record) == key_of_teacher and (card := teacher_of(record))]
    reading = reading_of(group[0], metric)
    level, warnings = teacher_level(cards, split, metric, reading)
    figures, footnotes = published(group[0], split, metric)
    pairing = Pairing(split, metric, folders, less_is_better=reading.less_is_better)

    rows = []
    if cards:
        gap = level.mean - fmean(baseline.scores.values()) if level and baseline.scores else None
        difference = None if gap is None else Difference(len(baseline.scores), gap, None)
        rows.append(Row("teacher", "teacher", level, difference, parameters=cards[0]["parameters"]))
        if cards[0]["weights"] == "random":
            warnings.insert(
                0, "The teacher's weights are RANDOM: it knows nothing, and these figures only show that the code runs."
            )
        if gap is not None and reading.gain(gap) <= 0:
            warnings.append("The teacher is no better than the baseline: there is no gap to close.")
    if baseline.runs:
        rows.append(replace(_row("baseline", "baseline", baseline), published=figures.get("baseline")))
    # Without a loss of the task there is neither a baseline nor a teacher's score to miss.
    compares = group[0]["task"].get("has_loss", True)
    if methods and not baseline.scores and compares:
        warnings.append(
            f"No finished baseline (distiller {BASELINE!r}) of this recipe: {', '.join(methods)} stand alone.{others}"
        )
    longer_labels = {label: f"baseline, equal time to {label}" for label in longer}
    cells = {"baseline": baseline, **{longer_labels[label]: cell for label, cell in longer.items()}, **methods}
    notes = remarks_on(cells, warnings, split)
    if cards and level is None and compares:
        notes.append(f"The teacher's own score on {split} is unknown: no upper bound, and no share of the gap.")
    for label, cell in longer.items():
        difference = _without_test(pairing.difference(cell, baseline))
        rows.append(replace(_row("equal_time", longer_labels[label], cell), difference=difference))
    for label, cell in methods.items():
        partners = pairing.partners(cell, baseline)
        gains = reading.gains(cell.scores), reading.gains(partners), reading.gain(level.mean) if level else None
        if len(partners) < len(baseline.scores):
            warnings.append(f"{label}: some seeds saw other data than the baseline's and are not paired.")
        if partners and len(shared := cell.scores.keys() & partners.keys()) < len(cell.scores):
            notes.append(
                f"{label}: the baseline shares {len(shared)} of {len(cell.scores)} seeds; differences are over those."
            )
        rows.append(
            replace(
                _row("method", label, cell),
                difference=pairing.difference(cell, baseline),
                to_equal_time=_without_test(pairing.difference(cell, longer[label])) if label in longer else None,
                gap_closed=gap_closed(*gains),
                gap_interval=gap_interval(*gains),
                published=figures.get(names[label]),
            )
        )
    differences = correct_for_many(
        {row.method: row.difference for row in rows if row.role == "method" and row.difference}
    )
    rows = [replace(row, difference=differences.get(row.method, row.difference)) for row in rows]
    tested = sum(difference.verdict is not None for difference in differences.values())
    if differences and not tested:
        notes.append(f"Fewer than {SEEDS_FOR_A_VERDICT} paired seeds: no verdict.")
    if tested > 1:
        notes.append(about_verdicts(tested))
    if longer:
        notes.append(about_baselines(longer))
    if any(found and found.over == "images" for row in rows for found in (row.difference, row.to_equal_time)):
        notes.append(
            f"{OVER_IMAGES} One seed: 95 % interval over the images of the {split} split (bootstrap, {RESAMPLES} "
            "resamples). It says nothing about seeds."
        )
    elif any(difference.count == 1 for difference in differences.values()) and group[0]["task"]["name"] == "detection":
        notes.append("One seed: no interval over images, for average precision is no sum over them.")
    # A second stage starts from the weights of the first; the block is named by those that the baseline starts from.
    student = min(group, key=lambda record: bool(record["config"].get("after")))["student"]
    return Block(
        data=group[0]["data"]["name"],
        counts=group[0]["data"]["counts"],
        split=split,
        metric=metric,
        student=f"{student['name']} ({student['weights']} weights)",
        recipe=group[0]["recipe_hash"],
        teacher=cards[0] if cards else None,
        rows=tuple(rows),
        warnings=tuple(warnings),
        notes=(*notes, *pairing.problems, *(footnotes if any(row.published for row in rows) else ())),
        reading=reading,
    )


def _without_test(difference: Difference | None) -> Difference | None:
    """The difference without its p-value: verdicts are against the baseline of the same steps alone."""
    return difference and replace(difference, p_value=None)


def _row(role: Literal["baseline", "equal_time", "method"], label: str, cell: Cell) -> Row:
    return Row(
        role,
        label,
        score=summarise_values([cell.scores[seed] for seed in sorted(cell.scores)]),
        runs=dict(sorted(Counter(record["status"] for record in cell.runs.values()).items())),
        records=tuple(cell.runs.values()),
        **costs_of(cell),
    )
