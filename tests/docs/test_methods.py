# SPDX-License-Identifier: Apache-2.0
"""The table of methods is what its generator makes of the YAML files and the committed measurement."""

import importlib.util
import json
from pathlib import Path

import pytest

from kdlvfm.cli.config import options
from kdlvfm.cli.list import read_about

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("methods", ROOT / "docs" / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(generator):
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run: python docs/methods.py"


def test_every_method_has_a_row(generator):
    text = generator.PAGE.read_text(encoding="utf-8")
    for name in options("distiller"):
        assert text.count(f"| [`{name}`](") == (name != "none")


def test_what_segments_was_measured(generator):
    measured = json.loads(generator.RECORD.read_text(encoding="utf-8"))["methods"]
    names = {name for name in options("distiller") if "segmentation" in read_about("distiller", name)["tasks"]}
    assert names - set(measured) == {"none", "deit"}  # DeiT's students are ViTs, the measurement's is a ResNet18
    assert all(facts["ratio"] > 0 for facts in measured.values())
