# SPDX-License-Identifier: Apache-2.0
"""Who imports whom, seen from fresh interpreters, and the rules that every file keeps."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = (
    "diffusers",
    "hydra",
    "lightning",
    "mmdet",
    "omegaconf",
    "open_clip",
    "pytorch_lightning",
    "segmentation_models_pytorch",
    "sklearn",
    "timm",
    "torchmetrics",
    "torchvision",
    "wandb",
)
SOURCE_FOLDERS = ("kdlvfm", "tests", "benchmarks", "experiments", "docs", "examples", "tools")
PYTHON_FILES = sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def fresh(code):
    """Run `code` in an interpreter of its own; the names of all modules it imported."""
    ending = "\nimport sys as _sys\nprint('\\n' + ' '.join(_sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code + ending], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def called(*arguments):
    """The modules imported by a call of the command."""
    return fresh(
        "from kdlvfm.cli import main\n"
        "try:\n"
        f"    main({list(arguments)!r})\n"
        "except SystemExit as done:\n"
        "    assert not done.code, done.code"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import kdlvfm",
        "import kdlvfm.core",
        "import kdlvfm.distillers",
        "from kdlvfm.distillers import CWD, cwd_loss\n"
        "import torch\n"
        "x = torch.rand(2, 3, 4, 4)\n"
        "assert CWD()({'logits': x}, {'logits': x})['cwd'] == 3 * cwd_loss(x, x) == 0",
    ],
)
def test_distillers_need_torch_and_nothing_else(code):
    assert not fresh(code) & set(FRAMEWORKS)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["list", "distiller"], ["train", "--help"]])
def test_looking_around_imports_no_torch(arguments):
    assert not called(*arguments) & {"torch", *FRAMEWORKS}


def test_layers_and_libraries_stay_apart():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_files_are_found():
    assert Path(__file__) in PYTHON_FILES
    assert ROOT / "kdlvfm" / "core" / "distiller.py" in PYTHON_FILES


def test_every_file_states_its_licence_first():
    expected = "# SPDX-License-Identifier: Apache-2.0"
    assert [str(p) for p in PYTHON_FILES if p.read_text(encoding="utf-8").partition("\n")[0] != expected] == []


def test_no_file_is_a_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "misc", "common", "helpers"}
    assert [str(p) for p in PYTHON_FILES if drawers & {p.stem, p.parent.name}] == []


def test_no_file_is_long():
    assert [str(p) for p in PYTHON_FILES if len(p.read_text(encoding="utf-8").splitlines()) > 300] == []
