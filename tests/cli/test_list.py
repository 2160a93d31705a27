# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
import sys

import pytest

from kdlvfm.cli.config import options
from kdlvfm.cli.list import read_about

GROUPS = ("teacher", "student", "distiller", "data", "recipe", "experiment")


def test_everything_in_the_configuration_is_listed(kdlvfm):
    ended = kdlvfm("list")
    assert ended.code == 0
    words = set(ended.out.split())
    for group in GROUPS:
        assert set(options(group)) <= words


@pytest.mark.parametrize("group", GROUPS)
def test_one_group(group, kdlvfm):
    ended = kdlvfm("list", group)
    assert f"{group}=" in ended.out
    titles = {line.strip() for line in ended.out.splitlines()} & {f"{name}=" for name in GROUPS}
    assert titles == {f"{group}="}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in options(group)])
def test_every_option_says_what_it_is(group, name):
    about = read_about(group, name)
    assert about.get("title")
    if group in ("teacher", "data") and name not in ("none", "folder", "yolo"):
        assert about.get("licence")


def test_a_distiller_says_what_tasks_it_is_for(kdlvfm):
    words = re.findall(r"\w+", kdlvfm("list", "distiller").out)
    assert {"tasks", "segmentation", "detection"} <= set(words)


def test_listing_loads_no_heavy_library():
    code = (
        "import sys\nfrom kdlvfm.cli import main\ntry: main(['list'])\nexcept SystemExit: pass\n"
        "print({'torch', 'lightning', 'timm', 'hydra'} & set(sys.modules), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr.strip() == "set()"
