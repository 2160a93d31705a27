# SPDX-License-Identifier: Apache-2.0
"""Time and memory of every loss beside a plain transcription of its formula, alternating in one process.

    python benchmarks/losses.py                                  all, the record and the table in docs/performance.md
    python benchmarks/losses.py --only pairwise,gram --size 64   these alone; the record keeps the others
    python benchmarks/losses.py --size 128 --memory 8            all on maps of 128 x 128
    python benchmarks/losses.py --device cuda                    a record of its own
    python benchmarks/losses.py --table                          writes the tables alone, from the records

A measurement is a forward and a backward pass on random maps. Times are taken in pairs, ours and the plain form's one
after the other, and the ratio is the median of the pairs'. Memory is what a pass holds at its worst beyond its inputs,
the gradient included: on a CPU every allocation that torch's allocator reports to the profiler, in a pass of its own
that is not timed; on a GPU `max_memory_allocated`. Libraries that allocate by themselves are not seen on a CPU.
Where the plain form would need more than `--memory`, both are measured with a smaller batch, which the record states.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from losses_cases import CASES, QUEUE, TEACHER, Case, Inputs, Shape
from losses_page import PAGE, page, record_path
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kdlvfm.reporting.record import environment

MATRICES = 6
"""Matrices of similarities that a plain form holds at once, those of its backward pass included."""


def fitting(case: Case, shape: Shape, limit: float) -> int:
    """The largest power of two below the batch at which the plain form should not need more bytes than `limit`."""
    batch, positions = shape.batch, shape.size**2
    while batch > 1:
        entries = {"none": 0, "image": batch * positions**2, "batch": (batch * positions) ** 2}
        matrix = entries.get(case.pairs, batch * positions * QUEUE)
        if 4 * (MATRICES * matrix + case.copies * batch * positions * TEACHER * case.of_maps) <= limit:
            break
        batch //= 2
    return batch


def passes(loss: Callable[..., Tensor], inputs: Inputs) -> Callable[[], None]:
    """A forward and a backward pass."""
    student, *rest = inputs

    def run() -> None:
        torch.autograd.grad(loss(student, *rest), student)

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    """Of a pass: of the processor on a CPU, where one thread computes and others may wait for it; else of the clock."""
    if device == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """Most memory that a pass holds beyond what was held before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measured(case: Case, shape: Shape, budget: float) -> dict[str, Any]:
    """The entry of a case in the record.

    Pairs are timed until their seconds reach the budget, three of them unless one takes more than that. The passes that
    measure memory come first and warm up.
    """
    torch.manual_seed(0)
    inputs = case.inputs(shape)
    inputs[0].requires_grad_()
    runs = {"ours": passes(case.ours, inputs), "plain": passes(case.plain, inputs)}
    memory = {name: peak_bytes(run, shape.device) for name, run in runs.items()}
    pairs: list[dict[str, float]] = []
    spent = 0.0
    while (spent < budget and len(pairs) < 30) or (len(pairs) < 3 and spent < 3 * budget):
        order = list(runs)[:: -1 if len(pairs) % 2 else 1]  # who comes first finds less of the inputs in the cache
        pairs.append({name: seconds(runs[name], shape.device) for name in order})
        spent += sum(pairs[-1].values())
    return {
        "loss": case.name,
        "size": shape.size if case.of_maps else None,
        "channels": shape.channels if case.own_channels else None,
        "batch": shape.batch,
        "pairs": len(pairs),
        "faster": round(median(pair["plain"] / pair["ours"] for pair in pairs), 2),
        "smaller": round(memory["plain"] / memory["ours"], 2),
        **{
            name: {
                "milliseconds": round(1000 * median(pair[name] for pair in pairs), 3),
                "mib": round(memory[name] / 2**20, 2),
            }
            for name in runs
        },
    }


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["loss"], entry["size"], entry["channels"]


def measure_all(chosen: argparse.Namespace, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The record; entries of an earlier one that are not measured again stay."""
    wanted = set(chosen.only.split(",")) if chosen.only else {case.name for case in CASES}
    unknown = wanted - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"no loss {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in CASES)}.")
    here = environment()
    if earlier and any(earlier["environment"][part] != here[part] for part in ("hardware", "versions")):
        if chosen.only:
            raise SystemExit("the record is of another machine or other versions: measure all losses again.")
        earlier = None
    entries = {key(entry): entry for entry in (earlier or {"cases": []})["cases"]}
    for case in CASES:
        shapes = {
            (size if case.of_maps else None, channels if case.own_channels else None): (size, channels)
            for size in chosen.size
            for channels in chosen.channels
        }
        for size, channels in shapes.values() if case.name in wanted else ():
            shape = Shape(chosen.batch, size, channels, chosen.device)
            batch = fitting(case, shape, chosen.memory * 2**30)
            entry = measured(case, Shape(batch, size, channels, chosen.device), chosen.seconds)
            entries[key(entry)] = entry
            print(
                *key(entry), f"batch {batch}: {entry['faster']:.2f} faster, {entry['smaller']:.2f} smaller", flush=True
            )
    order = [case.name for case in CASES]
    return {
        "benchmark": "losses",
        "setting": {
            "device": chosen.device,
            "threads": torch.get_num_threads(),
            "teacher_channels": TEACHER,
        },
        "environment": here,
        "cases": sorted(entries.values(), key=lambda x: (order.index(x["loss"]), x["size"] or 0, x["channels"] or 0)),
    }


def main() -> None:
    """Measure, and write the record and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="losses, separated by commas (default: all)")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128], help="sides of the maps")
    parser.add_argument("--channels", type=int, nargs="+", default=[256, 512], help="of the student's maps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB that a plain form may take")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed pairs for each case")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    path = record_path(chosen.device)
    if not chosen.table:
        torch.set_num_threads(1)
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        path.write_text(json.dumps(measure_all(chosen, earlier), indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
