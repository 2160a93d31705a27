# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm download`: public data sets, checksummed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kdlvfm.cli import CommandError


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm download",
        description="Fetch a data set from its public Git repository with `git`, and verify its checksum. CamVid: "
        "CC BY-NC 4.0; cite Brostow et al., ECCV 2008 and PRL 2009.",
    )
    parser.add_argument("data", choices=("camvid",), help="CamVid: 367, 101 and 233 images, 11 classes")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where to (default: data/<name>)")
    options = parser.parse_args(arguments)
    from kdlvfm.data.download import DownloadError, download_camvid

    target = options.to or Path("data") / options.data
    try:
        download_camvid(target)
    except DownloadError as error:
        raise CommandError(str(error)) from error
    root = "" if options.to is None else f" data.root={target}"
    print(f"wrote  {target}\nnext   kdlvfm train data={options.data}{root} distiller=none recipe=cirkd_40k")
    return 0
