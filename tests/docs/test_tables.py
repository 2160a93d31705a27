# SPDX-License-Identifier: Apache-2.0
"""Tables on the pages are what committed records say, and nothing else."""

import re
from pathlib import Path

import pytest

from kdlvfm.reporting.collect import collect
from kdlvfm.reporting.render import to_markdown
from kdlvfm.reporting.tables import summarise

CHECKOUT = Path(__file__).parents[2]
# Page, experiment, the split that its table compares.
TABLES = [
    ("README.md", "demo", "test"),
    ("experiments/alignment/README.md", "alignment", "val"),
    ("experiments/zoo_smoke/README.md", "zoo_smoke", "test"),
]


def records_of(experiment):
    collection = collect([CHECKOUT / "experiments" / experiment / "records"])
    assert not collection.problems
    return list(collection.records.values())


@pytest.mark.parametrize(("page", "experiment", "split"), TABLES)
def test_the_table_is_rendered_from_the_records(page, experiment, split):
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    (shown,) = re.findall(rf"<!-- {experiment}-table -->\n(.*?)<!-- /{experiment}-table -->", text, re.DOTALL)
    assert shown.strip() == to_markdown(summarise(records_of(experiment), split)).strip()


@pytest.mark.parametrize("experiment", [experiment for _, experiment, _ in TABLES])
def test_records_are_of_finished_runs_of_a_clean_revision(experiment):
    for record in records_of(experiment):
        assert record["status"] == "finished"
        assert record["git"]["dirty"] is False


def test_the_demo_has_three_seeds_of_every_method_at_one_revision():
    records = records_of("demo")
    assert len({record["git"]["revision"] for record in records}) == 1
    assert sorted({record["seed"] for record in records}) == [0, 1, 2]
    assert len(records) == 3 * len({record["distiller"]["name"] for record in records})
