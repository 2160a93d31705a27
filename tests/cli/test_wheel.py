# SPDX-License-Identifier: Apache-2.0
"""The package as it is installed: configurations inside, no checkout around."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(CHECKOUT)]
    if find_spec("hatchling") is not None:
        build.insert(4, "--no-build-isolation")
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode and "hatchling" in built.stderr and find_spec("hatchling") is None:
        pytest.skip(f"hatchling is neither installed nor to be had: {built.stderr.strip().splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("kdlvfm-*.whl")
    target = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True)
    return target


@pytest.fixture
def outside(installed, tmp_path):
    def call(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "kdlvfm", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return call


def test_the_wheel_has_configurations_types_and_licence(installed):
    package = installed / "kdlvfm"
    for file in (CHECKOUT / "configs").rglob("*.yaml"):
        assert (package / "configs" / file.relative_to(CHECKOUT / "configs")).read_bytes() == file.read_bytes()
    assert (package / "py.typed").exists()
    assert (package / "reporting/run_schema.json").exists()
    assert (package / "reporting/page/page.js").exists()
    assert list(installed.glob("kdlvfm-*.dist-info/licenses/LICENSE"))
    assert not (installed / "tests").exists()


def test_the_command_works_outside_the_checkout(outside, installed, small, tmp_path):
    where = subprocess.run(
        [sys.executable, "-c", "import kdlvfm; print(kdlvfm.__file__)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(installed))
    listed = outside("list")
    assert listed.returncode == 0, listed.stderr
    assert "dinov3_vits16" in listed.stdout
    shown = outside("train", "--print-config", "data=digit_scenes")
    assert shown.returncode == 0, shown.stderr
    assert "kdlvfm.data.digit_scenes.DigitScenes" in shown.stdout
    trained = outside("train", *small, "recipe.steps=1", "distiller=none", "out=run")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run/student.safetensors").exists()
