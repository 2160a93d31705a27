# SPDX-License-Identifier: Apache-2.0
"""Cells of a table: the runs of one method, its name among its variants, the scores of its seeds, remarks on them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kdlvfm.reporting.collect import preference
from kdlvfm.reporting.reading import Reading
from kdlvfm.reporting.record import BASELINE, Record, differences, effect_of_cache, flatten, recipe
from kdlvfm.reporting.statistics import Summary

_TOLD = 3  # of the settings in which recipes differ


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


def variant_of(record: Record) -> str:
    """The settings that tell a run from others of its method, as JSON: the distiller's, and how its features were kept.

    A teacher cache of fewer digits or components is another teacher, so such runs are not seeds of one cell.
    """
    stored = {key: value for key, value in effect_of_cache(record["config"]).items() if key != "views"}
    cache = {"teacher_cache": stored} if stored else {}
    return json.dumps({**record["distiller"]["settings"], **cache}, sort_keys=True)


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


def strangers(group: Sequence[Record], records: Iterable[Record]) -> str:
    """A sentence on what tells a finished baseline of the same data and student from the recipe of `group`, if any."""
    own = group[0]
    for record in records:
        same = all(record[part]["name"] == own[part]["name"] for part in ("data", "student"))
        other = same and record["recipe_hash"] != own["recipe_hash"] and record["status"] == "finished"
        if other and record["distiller"]["name"] == BASELINE:
            changed = differences(own["config"], record["config"], recipe)
            more = f"; and {len(changed) - _TOLD} more" if len(changed) > _TOLD else ""
            return f" There is one of another recipe ({'; '.join(changed[:_TOLD])}{more})."
    return ""


def longer_baselines(
    records: Sequence[Record],
    labels: Mapping[tuple[str, str], str],
    methods: Mapping[tuple[str, str], Sequence[Record]],
) -> dict[str, list[Record]]:
    """Baselines that trained as long as a method, by the label of that method.

    A method whose runs are elsewhere goes by its name; one with another teacher is none of these `methods`, and its
    baseline is left out.

    Args:
        records: runs of one recipe, of any kind.
        labels: of all methods to be shown together.
        methods: their runs.
    """
    shown = {record["config_hash"]: labels[key] for key, runs in methods.items() for record in runs}
    elsewhere = {record["config_hash"] for record in records} - shown.keys()
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        matched = record["config"].get("equal_time")
        if matched and matched["method_hash"] not in elsewhere:
            found[shown.get(matched["method_hash"], matched["method"])].append(record)
    return dict(sorted(found.items()))


def costs_of(cell: Cell) -> dict[str, Any]:
    """What the networks and the trainings of a cell cost, by attribute of `Row`: means over the finished runs."""
    runs = sorted(cell.runs.values(), key=preference, reverse=True)
    finished = [record for record in runs if record["status"] == "finished"]

    def mean(field: str, part: str = "cost") -> float | None:
        values = [record[part].get(field) for record in finished if record.get(part)]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    # Short measurements have a median and no tail: the two must be of the same runs.
    tails = all(record["inference"]["latency_p95"] for record in finished if record.get("inference"))
    return {
        "parameters": runs[0]["student"]["parameters"],
        "macs": runs[0]["student"]["macs"],
        "latency_p50": mean("latency_p50", "inference"),
        "latency_p95": mean("latency_p95", "inference") if tails else None,
        "inference_images_per_second": mean("images_per_second", "inference"),
        "images_per_second": mean("images_per_second"),
        "train_seconds": mean("train_seconds"),
        "peak_memory_mib": mean("peak_memory_mib"),
        "teacher_images": mean("teacher_images"),
        "teacher_share": mean("teacher_share"),
    }


def about_baselines(longer: Mapping[str, Cell]) -> str:
    """Which differences of a table are against which baseline, from the cells of `longer_baselines`."""
    runs = {label: [record["config"]["equal_time"] for record in cell.runs.values()] for label, cell in longer.items()}
    steps = " or ".join(sorted({str(matched["recipe_steps"]) for each in runs.values() for matched in each}))
    spans = []
    for label, each in runs.items():
        taken = sorted({matched["steps"] for matched in each})
        spans.append(f"{label} {taken[0]}" + (f" to {taken[-1]}" if len(taken) > 1 else ""))
    return (
        f"vs baseline, gap and verdict: against the baseline of the same {steps} steps. vs equal time: against the "
        f"baseline that trained as long as the method ({', '.join(spans)} steps); no verdict."
    )


def score_of(record: Record, split: str, metric: str | None) -> float | None:
    """The metric on the split, by default the task's primary one; `None` if the record has none."""
    value = record["metrics"].get(split, {}).get(metric or record["task"]["primary_metric"])
    return float(value) if isinstance(value, int | float) else None


def teacher_of(record: Record) -> dict[str, Any] | None:
    """The card of the teacher that a run learned from, or that its first stage did."""
    before = record["config"].get("after")
    card: dict[str, Any] | None = record["teacher"] or (before and before["teacher"])
    return card


def teacher_key(record: Record) -> tuple[str, ...]:
    """What makes two teachers the same: name and weights; all random weights of one network count as one teacher."""
    card = teacher_of(record)
    if card is None:
        return ()
    random = card["weights"] == "random"
    return card["name"], card["weights"], "" if random else card["sha256"] or card["source"] or ""


def split_hash(record: Record) -> str:
    """Which splits of the data the run saw."""
    return str(record["data"]["split_hash"])


def remarks_on(cells: Mapping[str, Cell], warnings: list[str], split: str) -> list[str]:
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
    notes += [*remarks_on_machines(finished), *_about_first_stages(cells)]
    for made in filter(None, (record["data"].get("labels") for record in finished)):
        name = made["teacher"]["name"]
        agreement = f"The labels of {split} were made by {name}: scores say how far a student agrees with it."
        if split in made["images"] and agreement not in warnings:
            warnings.append(agreement)
        training = f"Training labels were made by {name}, those of {made['confidence']:g} or surer kept."
        if "train" in made["images"] and training not in notes:
            notes.append(training)
    if {record["selection"] for record in finished} == {"best_val"}:
        notes.append("Each run was tested with the weights that were best on its validation split.")
    return notes


def _about_first_stages(cells: Mapping[str, Cell]) -> list[str]:
    """What methods in two stages took before, which is in none of their figures."""
    notes = []
    for label, cell in cells.items():
        stages = [before for record in cell.runs.values() if (before := record["config"].get("after"))]
        if stages:
            times = [before["train_seconds"] for before in stages if before["train_seconds"] is not None]
            took = f", {fmean(times):.0f} s of training" if times else ""
            notes.append(
                f"{label}: its first stage, {stages[0]['steps']} steps of {stages[0]['batch_size']} images of "
                f"{stages[0]['data']}{took}, is in no figure of its cost."
            )
    return notes


def remarks_on_machines(records: Iterable[Record]) -> list[str]:
    """What forbids to compare the times of these runs, if anything does."""
    if len({json.dumps(record["hardware"], sort_keys=True) for record in records}) > 1:
        return ["The runs come from different machines: their images/s do not compare."]
    return []


def teacher_level(
    cards: Sequence[Mapping[str, Any]], split: str, metric: str, reading: Reading
) -> tuple[Summary | None, list[str]]:
    """The teacher's own score from the cards of the runs that used it, and what is wrong with it."""
    known = [card["metrics"][split][metric] for card in cards if metric in (card["metrics"] or {}).get(split, {})]
    if not known:
        return None, []
    spread = max(known) - min(known)
    shown = f"{reading.factor * spread:.2f} {reading.points}".strip()
    warnings = [f"The teacher's score differs between runs by {shown}."] if spread > 1e-4 else []
    return Summary(1, fmean(known), None), warnings
