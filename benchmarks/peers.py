# SPDX-License-Identifier: Apache-2.0
"""Losses beside the public implementations of other libraries: time, memory, and how far values and gradients agree.

    python benchmarks/peers.py ../peers                       all, the record and the table in docs/performance.md
    python benchmarks/peers.py ../peers --only cwd --size 64 --seconds 2
    python benchmarks/peers.py --table                        writes the table alone, from the record

The folder, made if there is none, is an environment of the peers' own: torchdistill (MIT) and mmrazor (Apache-2.0) are
installed there, the repositories of some papers are cloned beside them, each at one commit, and mmdet is the one that
is here. All is measured in one process, with one torch, as `losses.py` does it: passes in pairs, the ratio the median
of the pairs', smaller batches where theirs would need more than `--memory`. Nothing of the peers is imported by the
library.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from losses import fitting, measured
from losses_cases import TEACHER, Inputs, Shape
from losses_page import PAGE, ROOT, between, time_text
from peers_compared import Compared, Peer, case
from peers_environment import build, clone

from kdlvfm.reporting.record import environment

RECORD = ROOT / "benchmarks" / "records" / "peers.json"
PACKAGES = ["torchdistill==1.1.5", "mmrazor==1.0.0", "ordered-set==4.1.0"]
LIBRARIES = ("torchdistill", "mmrazor", "mmdet")
REPOSITORIES = {
    "winycg/CIRKD": "dab64dbb5e4172141166cf8434a80ce55d9d3aa7",
    "ayoubkarine/CSKD": "1adf94fee9a830e1b68d7e6f958cfb3db2cfe6f4",
    "OSVAI/Af-DCD": "5b086a7b4d92e5d14208d95347f05c014e5ca84a",
    "Hao840/OFAKD": "f7bb896cac9879040800bde08a8cc2057a904c52",
    "naver/unic": "02269dbfa2935d53ba7cef76c29d5453333d9ba7",
    "hunto/MasKD": "b5af34fe343f1b82689291871f85b97a6aea4278",
    "yzd-v/FGD": "c03a6cf3b3cb3cbfd5554dbf4766e7135747d22d",
}
"""What of each repository is measured. None of it is part of this project."""


def agreement(ours: Any, theirs: Any, factor: float, inputs: Inputs) -> dict[str, float]:
    """Relative difference of the values, and of the gradients in norm, once theirs is multiplied by the factor."""
    student, *rest = inputs
    found = []
    for loss, scale in ((ours, 1.0), (theirs, factor)):
        own = student.clone().requires_grad_()
        value = scale * loss(own, *rest)
        found.append((value.detach().double(), torch.autograd.grad(value, own)[0].double()))
    (value, gradient), (other, slope) = found
    return {
        "value": float(f"{((value - other).abs() / value.abs()).item():.1e}"),
        "gradient": float(f"{((gradient - slope).norm() / gradient.norm()).item():.1e}"),
    }


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["loss"], entry["peer"], entry["size"], entry["channels"]


def measure_all(chosen: argparse.Namespace, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The record; entries of an earlier one that are not measured again stay. Runs in the peers' environment."""
    # Theirs warn of arguments that torch no longer recommends, at every call.
    warnings.simplefilter("ignore")
    import peers_cases
    import peers_papers

    known = (*peers_cases.COMPARED, *peers_papers.COMPARED)
    wanted = set(chosen.only.split(",")) if chosen.only else {compared.name for compared in known}
    unknown = wanted - {compared.name for compared in known}
    if unknown:
        raise SystemExit(f"no loss {', '.join(sorted(unknown))}; there are {', '.join(x.name for x in known)}.")
    torch.set_num_threads(1)
    here = environment()
    peers = {name: version(name) for name in LIBRARIES} | {name: commit[:7] for name, commit in REPOSITORIES.items()}
    if earlier and chosen.only is None:
        earlier = None
    if earlier and (earlier["peers"], *(earlier["environment"][part] for part in ("hardware", "versions"))) != (
        peers,
        here["hardware"],
        here["versions"],
    ):
        raise SystemExit("the record is of another machine or other versions: measure all losses again.")
    entries = {key(entry): entry for entry in (earlier or {"cases": []})["cases"]}
    for compared in known:
        sizes = chosen.size if compared.of_maps else chosen.size[:1]
        for peer, size in product(compared.peers, sizes if compared.name in wanted else ()):
            entry = _measured(compared, peer, Shape(chosen.batch, size, chosen.channels, chosen.device), chosen)
            entries[key(entry)] = entry
            print(*key(entry), f"{entry['faster']:.2f} faster, differs by {entry['difference']}", flush=True)
    order = [compared.name for compared in known]
    return {
        "benchmark": "peers",
        "setting": {"device": chosen.device, "threads": torch.get_num_threads(), "teacher_channels": TEACHER},
        "environment": here,
        "peers": peers,
        "cases": sorted(entries.values(), key=lambda x: (order.index(x["loss"]), x["peer"], x["size"] or 0)),
    }


def _measured(compared: Compared, peer: Peer, shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """The entry of one implementation at one size."""
    pair = case(compared, peer)
    shape = replace(shape, batch=fitting(pair, shape, chosen.memory * 2**30))
    torch.manual_seed(0)
    inputs = compared.inputs(shape)
    factor = None if peer.factor is None else peer.factor(inputs[0].shape)
    found = measured(pair, shape, chosen.seconds)
    return {
        "loss": compared.name,
        "peer": peer.package,
        "size": shape.size if compared.of_maps else None,
        "channels": shape.channels if compared.own_channels else None,
        "batch": shape.batch,
        "pairs": found["pairs"],
        "faster": found["faster"],
        "smaller": found["smaller"],
        "ours": found["ours"],
        "theirs": found["plain"],
        "factor": factor,
        "apart": peer.apart,
        "difference": None if factor is None else agreement(compared.ours, peer.loss, factor, inputs),
    }


def table(record: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    lines = [
        "| loss | beside | maps | batch | ours | theirs | times faster | times smaller | gradients apart by |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for entry in record["cases"]:
        size = f"{entry['size']}x{entry['size']}" if entry["size"] else "–"
        lines.append(
            f"| `{entry['loss']}` | {entry['peer']} | {size} | {entry['batch']} | {time_text(entry['ours'])} | "
            f"{time_text(entry['theirs'])} | **{entry['faster']:.2f}** | **{entry['smaller']:.1f}** | "
            f"{_apart(entry)} |"
        )
    libraries = ", ".join(f"{name} {found}" for name, found in record["peers"].items())
    where, setting = record["environment"], record["setting"]
    hardware = where["hardware"]["gpu"] if setting["device"] == "cuda" else where["hardware"]["cpu"]
    return [
        *lines,
        "",
        f"{hardware}, {setting['threads']} thread, torch {where['versions']['torch']}, float32, {libraries}.",
    ]


def _apart(entry: dict[str, Any]) -> str:
    """How far the gradients are from each other, and what was put right before."""
    if entry["difference"] is None:
        return f"not comparable: {entry['apart']}"
    return f"{entry['difference']['gradient']:.0e}" + (f", but for: {entry['apart']}" if entry["apart"] else "")


def page(record: dict[str, Any]) -> str:
    """docs/performance.md with the record's table."""
    return between(PAGE.read_text(encoding="utf-8"), "peers", table(record))


def main() -> None:
    """Build the environment, measure inside it, and write the record and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of the peers' environment")
    parser.add_argument("--only", help="losses, separated by commas (default: all)")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128], help="sides of the maps")
    parser.add_argument("--channels", type=int, default=512, help="of the student's maps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB that an implementation of theirs may take")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed pairs for each case")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    if not chosen.table and chosen.folder is None:
        parser.error("say which folder the peers' environment is in, or is to be made in.")
    if not chosen.table and Path(sys.prefix) != chosen.folder.resolve():
        python = build(chosen.folder.resolve(), PACKAGES, dependencies=False)
        for repository, commit in REPOSITORIES.items():
            clone(repository, commit, chosen.folder.resolve() / "repositories")
        inside = {**os.environ, "PYTHONPATH": str(ROOT)}
        raise SystemExit(subprocess.run([str(python), *sys.argv], env=inside, check=False).returncode)
    if not chosen.table:
        earlier = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else None
        chosen.out.write_text(json.dumps(measure_all(chosen, earlier), indent=2) + "\n", encoding="utf-8")
    if chosen.out == RECORD:
        PAGE.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
