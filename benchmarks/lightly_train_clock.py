# SPDX-License-Identifier: Apache-2.0
"""Runs a command's script and notes when its student begins each step: what `lightly_train.py` starts for both sides.

    python benchmarks/lightly_train_clock.py report.json 16 /path/of/the/script argument ...

A step is a forward pass of the student's stem, in training and on a whole batch: the only 7 x 7 convolution of a
ResNet, of which a ViT has none. Nothing is known here of the program that runs.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def main() -> None:
    """Run the script as its interpreter would, and write the report even if it fails."""
    report, batch, script, *arguments = sys.argv[1:]
    began: list[float] = []
    peak = 0

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal peak
        stem = isinstance(module, nn.Conv2d) and module.kernel_size == (7, 7)
        if stem and module.training and len(inputs[0]) == int(batch):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began.append(time.time())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    nn.modules.module.register_module_forward_pre_hook(note)
    sys.argv = [script, *arguments]
    sys.path.pop(0)  # this folder, whose lightly_train.py is not the package of that name
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        Path(report).write_text(json.dumps({"began": began, "rss_kib": peak, "gpu_bytes": gpu}), encoding="utf-8")


if __name__ == "__main__":
    main()
