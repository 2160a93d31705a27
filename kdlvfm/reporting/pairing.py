# SPDX-License-Identifier: Apache-2.0
"""Differences between the runs of two cells: paired by seed and data, and with a single seed over the test images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kdlvfm.reporting.cells import Cell, split_hash
from kdlvfm.reporting.per_image import PixelCounts, read_pixel_counts
from kdlvfm.reporting.record import Record
from kdlvfm.reporting.statistics import Difference, bootstrap_interval, paired_difference


class Pairing:
    """Paired differences in one metric on one split.

    Args:
        split: the split that scores were measured on.
        metric: their name.
        folders: hash of a configuration -> folder of its run, as far as there are folders.
        less_is_better: of the metric.

    Attributes:
        problems: why runs of one seed have no interval over images although their records name the files for it.
    """

    def __init__(self, split: str, metric: str, folders: Mapping[str, Path], *, less_is_better: bool = False) -> None:
        self._split = split
        self._less_is_better = less_is_better
        self._metric = metric
        self._folders = folders
        self._counts: dict[str, PixelCounts | None] = {}
        self.problems: list[str] = []

    def partners(self, method: Cell, baseline: Cell) -> dict[int, float]:
        """The baseline's scores, seed -> fraction, without seeds of which the two saw other data."""
        return {
            seed: score
            for seed, score in baseline.scores.items()
            if seed not in method.runs or split_hash(method.runs[seed]) == split_hash(baseline.runs[seed])
        }

    def difference(self, method: Cell, baseline: Cell) -> Difference | None:
        """Method minus baseline over the seeds of both; of one seed, its interval is over images if they allow it."""
        partners = self.partners(method, baseline)
        found = paired_difference(method.scores, partners)
        found = found and replace(found, less_is_better=self._less_is_better)
        if found is None or found.count > 1:
            return found
        (seed,) = method.scores.keys() & partners.keys()
        interval = self._over_images(method.runs[seed], baseline.runs[seed])
        return found if interval is None else replace(found, interval=interval, over="images")

    def _over_images(self, method: Record, baseline: Record) -> tuple[float, float] | None:
        counts = self._counts_of(method), self._counts_of(baseline)
        if counts[0] is None or counts[1] is None or not counts[0].same_images(counts[1]):
            return None
        scorers = counts[0].scorer(self._metric), counts[1].scorer(self._metric)
        if scorers[0] is None or scorers[1] is None:
            return None
        return bootstrap_interval(scorers[0], scorers[1], len(counts[0].index))

    def _counts_of(self, record: Record) -> PixelCounts | None:
        key = record["config_hash"]
        if key not in self._counts:
            self._counts[key] = None
            if key in self._folders:
                try:
                    self._counts[key] = read_pixel_counts(self._folders[key], record, self._split)
                except ValueError as error:
                    self.problems.append(f"{record['name']}: no interval over images, for {error}.")
        return self._counts[key]
