# SPDX-License-Identifier: Apache-2.0
"""Every distiller for segmentation trains from the command line, with the package's own ViT as teacher."""

import json

import pytest

from kdlvfm.cli.config import options
from kdlvfm.cli.list import read_about

SEGMENTERS = [name for name in options("distiller") if "segmentation" in read_about("distiller", name).get("tasks", ())]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTERS)
def test_trains(kdlvfm, tmp_path, two_steps, student_of, name):
    ended = kdlvfm("train", *two_steps, *student_of(name), f"distiller={name}", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert (record["teacher"] is None) == (name == "none")
    assert bool(record["distiller"]["teacher_taps"]) == (name != "none")
