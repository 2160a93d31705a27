# SPDX-License-Identifier: Apache-2.0
"""The README's table is what the demo's committed records say, and nothing else."""

from pathlib import Path

import pytest

from kdlvfm.reporting.collect import collect
from kdlvfm.reporting.render import to_markdown
from kdlvfm.reporting.tables import summarise

CHECKOUT = Path(__file__).parents[2]
RECORDS = CHECKOUT / "experiments" / "demo" / "records"


@pytest.fixture(scope="module")
def collection():
    return collect([RECORDS])


def test_table_in_the_readme(collection):
    assert not collection.problems
    shown = (CHECKOUT / "README.md").read_text(encoding="utf-8").split("demo-table -->")[1]
    assert shown.removesuffix("<!-- /").strip() == to_markdown(summarise(collection.records.values())).strip()


def test_records_are_of_one_clean_revision_and_three_seeds(collection):
    records = list(collection.records.values())
    assert all(record["status"] == "finished" and not record["git"]["dirty"] for record in records)
    assert len({record["git"]["revision"] for record in records}) == 1
    assert sorted({record["seed"] for record in records}) == [0, 1, 2]
    assert len(records) == 3 * len({record["distiller"]["name"] for record in records})
