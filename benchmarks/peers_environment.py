# SPDX-License-Identifier: Apache-2.0
"""An environment of a peer's own: packages and repositories in a folder, torch and all else that is here shared."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


def build(folder: Path, packages: list[str], *, dependencies: bool = True) -> Path:
    """The interpreter of a virtual environment in `folder`, with exactly these versions of packages.

    What the running interpreter has is found there too, so that both sides compute with one torch; what is installed
    there is not found here. An environment that is there already is taken as it is.

    Args:
        folder: where the environment is or will be; outside the repository, best.
        packages: requirements, with their versions.
        dependencies: install what they need as well.

    Raises:
        SystemExit: the packages could not be installed.
    """
    python = folder / "bin" / "python"
    done = folder / "installed.txt"
    wanted = "\n".join(packages)
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {', '.join(packages)} in {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(site, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-warn-script-location", *packages]
    if subprocess.run(install if dependencies else [*install, "--no-deps"], check=False).returncode:
        raise SystemExit(f"pip could not install {', '.join(packages)}; its lines above say why.")
    done.write_text(wanted, encoding="utf-8")
    return python


def clone(repository: str, commit: str, folder: Path) -> None:
    """A public repository of GitHub at one commit, in `folder/OWNER/NAME`, unless it is there already.

    Raises:
        SystemExit: git could not fetch it, or what is there is at another commit.
    """
    place = folder / repository
    if place.exists():
        head = ["git", "-C", str(place), "rev-parse", "HEAD"]
        found = subprocess.run(head, check=False, capture_output=True, text=True).stdout.strip()
        if found != commit:
            raise SystemExit(f"{place} is at {found or 'no commit'}, not at {commit}: remove it, to be cloned again.")
        return
    print(f"cloning {repository} into {place}", flush=True)
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    url = f"https://github.com/{repository}"
    for command in (
        ["clone", "--quiet", "--no-checkout", url, str(partial)],
        ["-C", str(partial), "checkout", "-q", commit],
    ):
        if subprocess.run(["git", *command], check=False).returncode:
            raise SystemExit(f"git could not fetch {url} at {commit}; its lines above say why.")
    partial.rename(place)
