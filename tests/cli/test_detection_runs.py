# SPDX-License-Identifier: Apache-2.0
"""Detectors and their distillers in half precision, in accumulated batches, and resumed after a crash."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("mmdet")

from kdlvfm.cli.build import build
from kdlvfm.cli.config import compose
from kdlvfm.training.fit import fit

pytestmark = pytest.mark.slow

STEPS = 7
METHODS = ("none", "pkd", "ld", "crosskd", "fgd", "mgd", "customkd", "sckd:pkd+cwd")
FEW = (
    "task=detection",
    "data=digit_scenes_boxes",
    "data.size=64",
    "data.train=8",
    "data.val=2",
    "data.test=1",
    "recipe=short_detection",
    f"recipe.steps={STEPS}",
    "recipe.batch_size=4",
    "recipe.warmup_steps=0",
    "run.num_workers=0",
    "run.progress=none",
    "logger=none",
)
DROPPING = "student.encoder.model_kwargs={num_classes: 0, drop_path_rate: 0.3}"
SGD = (
    "recipe.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 0.01}",
    "recipe.schedule._target_=kdlvfm.training.optimizers.constant",
    "recipe.clip_norm=null",
)


class CrashError(Exception):
    """Stands for a kill: nothing in the library catches it."""


@pytest.fixture
def run(gfl_pair, tmp_path):
    """One start of a run; with `crash_at`, one that ends before the step of this number."""

    def start(folder, *overrides, precision="32-true", crash_at=math.inf, val_every=None, batches=None, observe=None):
        cell = build(compose([*FEW, *gfl_pair, DROPPING, *overrides]))
        loss, calls = cell.task.loss, []

        def counted(*arguments):
            calls.append(arguments)
            if len(calls) == crash_at:
                raise CrashError
            return loss(*arguments)

        cell.task.loss = counted
        if batches is not None:
            cell.data.train_dataloader = lambda: DataLoader(batches, batch_size=None)
        if observe is not None:
            cell.module.observers.append(observe)
        result = fit(
            module=cell.module,
            data=cell.data,
            folder=Path(tmp_path, folder),
            trainer={"accelerator": "cpu", "devices": 1, "precision": precision},
            checkpoint_every=2,
            val_every=val_every,
            progress="none",
        )
        return cell.module, result

    return start


@pytest.mark.parametrize(("precision", "accumulate"), [("32-true", 1), ("bf16-mixed", 2)])
@pytest.mark.parametrize("method", METHODS)
def test_a_crashed_run_resumes_to_the_same_bits(method, precision, accumulate, run):
    options = (f"distiller={method}", f"recipe.accumulate={accumulate}")
    settings = {"precision": precision, "val_every": 3}
    whole, expected = run("whole", *options, **settings)
    with pytest.raises(CrashError):
        run("crashed", *options, **settings, crash_at=6)
    resumed, result = run("crashed", *options, **settings)
    assert result.finished
    assert [point["step"] for point in result.curve] == [3, 6]
    assert result.curve == expected.curve
    states = whole.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert value.dtype not in (torch.bfloat16, torch.float16), name
        assert value.isfinite().all(), name


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_gives_nearly_the_same_terms(method, run):
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        seen = []
        run(precision, f"distiller={method}", "recipe.steps=3", precision=precision, observe=seen.append)
        found[precision] = {name: term.detach() for name, term in seen[0].terms.items()}
        assert all(term.dtype == torch.float32 for term in found[precision].values())
    exact, half = found.values()
    for name in {*exact} & {*half}:  # a gate may be open in one of them only
        torch.testing.assert_close(half[name], exact[name], rtol=0.05, atol=1e-3, msg=name)
    assert {*exact} & {*half} >= {"loss_cls", "loss_bbox", "loss_dfl"}


def parts(data):
    """The samples of one training batch as a batch of twice two, and in two batches of two."""
    half = data.collate([data.training_set()[key] for key in next(iter(data.sampler()))[:2]])
    twice = {
        "image": torch.cat([half["image"]] * 2),
        "target": half["target"] * 2,
        "index": torch.cat([half["index"]] * 2),
    }
    return [twice], [half, half]


# MGD masks other positions in every batch. PKD standardises each level, and the last has one position an image: of two
# values nothing is left but their signs.
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("none", ()),
        ("pkd", ("distiller.student_tap=fpn.1", "distiller.teacher_tap=fpn.1")),
        ("ld", ()),
        ("crosskd", ()),
        ("fgd", ()),
        ("customkd", ("distiller.phase_steps=2",)),
        ("sckd:pkd+cwd", ()),
    ],
)
def test_accumulating_equal_batches_equals_one_of_double_size(method, settings, run, gfl_pair):
    still = "student.encoder.model_kwargs.drop_path_rate=0"
    full, half = parts(build(compose([*FEW, *gfl_pair])).data)
    options = (still, f"distiller={method}", *settings, *SGD)
    whole, _ = run("whole", *options, "recipe.steps=1", batches=full)
    halves, _ = run("halves", *options, "recipe.steps=2", "recipe.accumulate=2", batches=half)
    start = build(compose([*FEW, *gfl_pair, *options])).module.state_dict()
    once, twice = (
        torch.cat(
            [
                (module.state_dict()[name] - value).flatten()
                for name, value in start.items()
                if value.is_floating_point()
            ]
        )
        for module in (whole, halves)
    )
    assert once.norm() > 1e-4
    assert (once - twice).norm() < 3e-3 * once.norm()
