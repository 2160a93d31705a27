# SPDX-License-Identifier: Apache-2.0
"""The results part of a model card for the Hugging Face Hub: the block `model-index` of its YAML head."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kdlvfm import __version__
from kdlvfm.reporting.block import Block, Row, Table
from kdlvfm.reporting.columns import METRIC_NAMES
from kdlvfm.reporting.statistics import Summary, summarise_values

# The Hub's own names for tasks, and for metrics where https://hf.co/metrics has one.
_TASKS = {
    "segmentation": ("image-segmentation", "Semantic segmentation"),
    "detection": ("object-detection", "Object detection"),
    "diffusion": ("unconditional-image-generation", "Image generation"),
}
_METRIC_TYPES = {"miou": "mean_iou"}
_DECIMALS = 6
_HEAD = """\
# For the YAML head of a model card: keep the entry of the card's own model.
model-index:
"""


def to_model_index(table: Table, papers: Mapping[str, str], source: str | None = None) -> str:
    """One entry for the baseline and one for each method that has finished runs, in each block of the table.

    A card is about one model and keeps the entry that is its own. Values are fractions, or distances: means over the
    seeds, with the standard deviation and the seeds in `args` and in the metric's name. Papers, and warnings of the
    table, become comments.

    Args:
        table: of run records.
        papers: name of a distiller, as in records -> its paper.
        source: address at which the records are to be found.

    Raises:
        ValueError: no run has finished.
    """
    entries: dict[str, str] = {}
    for block in table.blocks:
        for row in block.rows:
            if row.role != "teacher" and row.score is not None:
                entries.setdefault(_name(block, row), _entry(block, row, papers, source))
    if not entries:
        raise ValueError("No run has finished: a model-index needs results.")
    return "".join([_HEAD, *entries.values()])


def _name(block: Block, row: Row) -> str:
    """What is measured; a baseline that stands in the blocks of several teachers is one model."""
    method = row.method if row.role == "baseline" or block.teacher is None else f"{row.method}, {block.teacher['name']}"
    return f"{row.records[0]['student']['name']}, {method} ({block.data}, recipe {block.recipe})"


def _entry(block: Block, row: Row, papers: Mapping[str, str], source: str | None) -> str:
    import yaml

    record = row.records[0]
    kind, task = _TASKS[record["task"]["name"]]
    dataset = {
        "type": re.sub(r"[^a-z0-9]+", "_", block.data.lower()).strip("_") or "data",
        "name": block.data,
        "split": block.split,
        "args": {"split_hash": record["data"]["split_hash"], "images": record["data"]["counts"].get(block.split)},
    }
    result: dict[str, Any] = {
        "task": {"type": kind, "name": task},
        "dataset": dataset,
        "metrics": [_metric(name, values) for name, values in _scores(block, row)],
    }
    if source is not None:
        result["source"] = {"name": f"run records of kdlvfm {__version__}", "url": source}
    remarks = [f"! {warning}" for warning in block.warnings]
    if row.role == "method" and (paper := papers.get(record["distiller"]["name"])):
        remarks.append(f"{row.method}: {paper}")
    entry = {"name": _name(block, row), "results": [result]}
    text = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, default_flow_style=None, width=10_000)
    # A line break would end the comment.
    return "".join(f"# {' '.join(remark.split())}\n" for remark in remarks) + text


def _scores(block: Block, row: Row) -> Iterator[tuple[str, Mapping[int, float]]]:
    """Each metric that is one number, seed -> value: first the one that the table compares."""
    finished = [record for record in row.records if record["status"] == "finished"]
    found = {record["seed"]: record["metrics"].get(block.split, {}) for record in finished}
    names = dict.fromkeys([block.metric, *(name for values in found.values() for name in values)])
    for name in names:
        values = {seed: value[name] for seed, value in found.items() if isinstance(value.get(name), int | float)}
        if values:
            yield name, values


def _metric(name: str, values: Mapping[int, float]) -> dict[str, Any]:
    summary = summarise_values([values[seed] for seed in sorted(values)])
    assert summary is not None
    arguments: dict[str, Any] = {"seeds": sorted(values)}
    if summary.std is not None:
        arguments["std"] = round(summary.std, _DECIMALS)
    return {
        "type": _METRIC_TYPES.get(name, name),
        "value": round(summary.mean, _DECIMALS),
        "name": f"{METRIC_NAMES.get(name, name)} ({_over(summary, sorted(values))})",
        "args": arguments,
    }


def _over(summary: Summary, seeds: Sequence[int]) -> str:
    if summary.std is None:
        return f"one run, seed {seeds[0]}"
    return f"mean of {summary.count} seeds, std {summary.std:.4f}"
