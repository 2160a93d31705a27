# SPDX-License-Identifier: Apache-2.0
"""Writes docs/methods.md, the table of methods, from the YAML files and the record of benchmarks/step_cost.py.

python docs/methods.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdlvfm.cli.config import options
from kdlvfm.cli.list import read_about

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "step_cost.json"
RUNS = ROOT / "experiments" / "zoo_smoke" / "records"
PAGE = ROOT / "docs" / "methods.md"

_INTRODUCTION = """\
<!-- Written by docs/methods.py; edit the YAML files in configs/distiller instead. -->

# Methods

Every method is chosen by `distiller=<name>`; its options are the arguments of its class, described in its docstring
(the name links to it). Methods are joined with a plus, `distiller=kd+fitnet`.

- **reads**: taps of the student, then of the teacher, as the defaults have them; every one can be another.
- **groups**: what has an optimizer of its own. More than one means that the method alternates or plays against itself.
- **extra parameters**: what is trained beside the student and never ships, for the networks of the measurement.
- **step**: seconds of a training step over those of the baseline, which sees no teacher. {setting}
- **pull**: norm of the gradient of its strongest term on the student, over that of the task's, at the default weights:
  far below 1 it hardly teaches, far above it drowns the task. After 60 steps from random weights in
  [this experiment](../experiments/zoo_smoke/README.md); another task, teacher or stage of training has other values,
  which [diagnostics](concepts.md#diagnostics) show. `distiller.loss_weight=` changes it.
- *seg*, *det*, *dif*, *rep*: segmentation, detection, diffusion, [representation](unlabelled.md) without labels.

Cells are blank where nothing was measured: both measurements are of segmentation, which methods for detectors or for
diffusion alone do not do, and DeiT needs a student with a distillation token.

| `distiller=` | what it does | paper | reads | trains | groups | extra parameters | step | pull | for |
| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | --- |
"""


def page() -> str:
    """The whole page."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    setting, hardware = record["setting"], record["environment"]["hardware"]
    batch, _, height, width = setting["images"]
    sentence = (
        f"Measured side by side in one process: {setting['student']} and {setting['teacher']}, {batch} images of "
        f"{height}x{width}, one thread of {hardware['cpu']}, torch {record['environment']['versions']['torch']}, "
        f"a baseline step of {setting['baseline_seconds']:.2f} s."
    )
    pulls = _pulls()
    lines = [
        _line(name, record["methods"].get(name), pulls.get(name)) for name in options("distiller") if name != "none"
    ]
    return _INTRODUCTION.format(setting=sentence) + "\n".join(lines) + "\n"


def _pulls() -> dict[str, float]:
    """By method, the largest ratio of a term's gradient to the task's that the last look of its run saw."""
    pulls = {}
    for path in RUNS.glob("*/record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        terms = record["diagnostics"]["points"][-1]["terms"] if record["diagnostics"]["points"] else {}
        task = terms.pop("student/task", {}).get("grad_norm")
        norms = [term["grad_norm"] for name, term in terms.items() if name.startswith("student/")]
        if task and norms:
            pulls[record["config"]["choices"]["distiller"]] = max(norms) / task
    return pulls


def _line(name: str, measured: dict[str, Any] | None, pull: float | None) -> str:
    about = read_about("distiller", name)
    tasks = ", ".join(task[:3] for task in about["tasks"])
    cells = [_link(name), about["title"], about["paper"]]
    if measured is None:
        cells += ["", about["trains"], "", "", ""]
    else:
        reads = f"{_taps(measured['student_taps'])} ← {_taps(measured['teacher_taps'])}"
        groups = ", ".join(measured["groups"])
        cells += [reads, about["trains"], groups, _count(measured["parameters"]), f"{measured['ratio']:.2f}"]
    cells += ["" if pull is None else f"{float(f'{pull:.2g}'):g}", tasks]
    return f"| {' | '.join(cells)} |"


def _link(name: str) -> str:
    """The name, as a link to the file of its class."""
    import yaml

    import kdlvfm.distillers

    node = yaml.safe_load((ROOT / "configs" / "distiller" / f"{name}.yaml").read_text(encoding="utf-8"))
    module = vars(kdlvfm.distillers)[node["_target_"].rsplit(".", 2)[1]].__module__
    return f"[`{name}`](../{module.replace('.', '/')}.py)"


def _taps(taps: list[str]) -> str:
    return ", ".join(f"`{tap}`" for tap in taps) or "–"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 10_000 else str(parameters)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
