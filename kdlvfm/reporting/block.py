# SPDX-License-Identifier: Apache-2.0
"""What a table is made of, before anybody has drawn it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdlvfm.reporting.published import Published
from kdlvfm.reporting.reading import FRACTION, Reading
from kdlvfm.reporting.record import Record
from kdlvfm.reporting.statistics import Difference, Summary

OVER_IMAGES = "†"
"""Marks an interval over images of one seed, wherever it is shown."""


@dataclass(frozen=True)
class Row:
    """One line of a table. Scores are as in records; `None` stands for what is unknown or does not apply.

    Attributes:
        role: what the line is for; `equal_time` is the baseline that trained as long as a method.
        method: the distiller, with the settings that tell it from its variants in the same block.
        score: the metric over the finished seeds.
        difference: to the baseline, paired by seed; its p-value is corrected for the number of methods of the block.
        to_equal_time: difference to the baseline that trained as long as this method; it has no p-value.
        published: what a paper reports for this method in this setting.
        gap_closed: share of the gap between baseline and teacher.
        gap_interval: its 95 % interval, with two paired seeds or more.
        parameters: of the network whose score it is (student, or the teacher in its own line).
        macs: of that network, for one image.
        images_per_second: training throughput, mean of the finished runs.
        train_seconds: duration of the training, mean of the finished runs.
        peak_memory_mib: mean of the finished runs.
        teacher_share: fraction of the training time spent in the teacher, mean of the finished runs.
        teacher_images: that the teacher was shown, each as often as it was, mean of the finished runs.
        latency_p50: seconds for one image, mean of the medians of the finished runs; and so the following two.
        latency_p95: the same of the 95 % quantiles; `None` if a run was timed without one.
        inference_images_per_second: of batches of images.
        runs: number of runs by status.
        records: the runs themselves, by seed.
    """

    role: Literal["teacher", "baseline", "equal_time", "method"]
    method: str
    score: Summary | None = None
    difference: Difference | None = None
    to_equal_time: Difference | None = None
    published: Published | None = None
    gap_closed: float | None = None
    gap_interval: tuple[float, float] | None = None
    parameters: int | None = None
    macs: int | None = None
    images_per_second: float | None = None
    train_seconds: float | None = None
    peak_memory_mib: float | None = None
    teacher_share: float | None = None
    teacher_images: float | None = None
    latency_p50: float | None = None
    latency_p95: float | None = None
    inference_images_per_second: float | None = None
    runs: Mapping[str, int] | None = None
    records: tuple[Record, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Block:
    """The lines that compare with each other: same data, student, recipe and teacher.

    Attributes:
        data: name of the data set.
        counts: its images by split, and of the training images those with labels and those without.
        split: the split that the score was measured on.
        metric: name of the score.
        student: name of the student and where its weights came from.
        recipe: hash of the recipe.
        teacher: the teacher's card as in the record; `None` if no run had a teacher.
        rows: teacher, baseline, baselines that trained as long as a method, then methods by name.
        warnings: what forbids or weakens a conclusion.
        notes: what a reader should know.
        reading: how the score is read.
    """

    data: str
    counts: Mapping[str, int]
    split: str
    metric: str
    student: str
    recipe: str
    teacher: Mapping[str, Any] | None
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    reading: Reading = FRACTION

    @property
    def source(self) -> str:
        """The data set, and how many of its training images have labels where some have none."""
        if not self.counts.get("unlabelled"):
            return self.data
        return f"{self.data}, {self.counts['labelled']} labelled and {self.counts['unlabelled']} unlabelled images"


@dataclass(frozen=True)
class Table:
    """Blocks in order of data, student, recipe and teacher."""

    blocks: tuple[Block, ...]
