# SPDX-License-Identifier: Apache-2.0
"""Put a finished pre-training run into the package: its weights in half precision, its record beside them.

Call it as `python experiments/digit_scenes_teacher/ship.py runs/digit_scenes_teacher`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from kdlvfm.cli.runs import WEIGHTS, read_run
from kdlvfm.models import digit_scenes_detector, digit_scenes_vit

LIMIT = 3 * 2**20
TEACHERS = (digit_scenes_vit, digit_scenes_detector)


def main(folder: Path) -> None:
    """Convert and copy."""
    trained = read_run(folder)["config"]["student"]["_target_"]
    (target,) = (module.WEIGHTS for module in TEACHERS if trained.startswith(f"{module.__name__}."))
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in load_file(folder / WEIGHTS).items()
    }
    save_file(state, target)
    shutil.copyfile(folder / "record.json", target.with_suffix(".json"))
    size = target.stat().st_size
    if size > LIMIT:
        raise SystemExit(f"{target} has {size} bytes, more than the {LIMIT} that a package should carry.")
    print(f"wrote  {target} ({size} bytes) and {target.with_suffix('.json').name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
