# SPDX-License-Identifier: Apache-2.0
"""Detectors and their distillers in two processes, which end alike and, where it can be, like one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

pytest.importorskip("mmdet")

from kdlvfm.cli.build import build
from kdlvfm.cli.config import compose
from kdlvfm.training.fit import fit

pytestmark = [pytest.mark.slow, pytest.mark.ddp]

STEPS, WORLD = 3, 2
FEW = (
    "task=detection",
    "data=digit_scenes_boxes",
    "data.size=64",
    "data.train=8",
    "data.val=3",
    "data.test=1",
    "recipe=short_detection",
    "recipe.augmentation.scale=[1.0,1.0]",  # images of one size: what is padded depends on those of the batch
    f"recipe.steps={STEPS}",
    "recipe.batch_size=4",
    "recipe.warmup_steps=0",
    "recipe.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 0.01}",
    "recipe.clip_norm=null",
    "run.num_workers=0",
    "run.progress=none",
    "logger=none",
)
OTHERS = {
    name: (f"student=resnet18_{name}", f"student.changes.bbox_head.init_cfg.override.name={layer}", "distiller=none")
    for name, layer in (("retinanet", "retina_cls"), ("fcos", "conv_cls"), ("atss", "atss_cls"))
}

# Name -> overrides that make the loss a mean over images, so that two processes learn what one does.
WHOLE = {
    "gfl": ("distiller=none",),
    "fcos": OTHERS["fcos"],
    "atss": OTHERS["atss"],
    "pkd": ("distiller=pkd", "distiller.gather=true"),
    "ld": ("distiller=ld",),
    "fgd": ("distiller=fgd", "distiller.target=raw"),
    "customkd": ("distiller=customkd", "distiller.target=raw", "distiller.phase_steps=1"),
}
# These divide by what is in the batch of each process, standardise that, or draw random numbers.
SHARED = {
    "retinanet": OTHERS["retinanet"],
    "crosskd": ("distiller=crosskd",),
    "mgd": ("distiller=mgd",),
    "sckd": ("distiller=sckd:pkd+cwd",),
}


def train(folder, name, overrides, **trainer):
    cell = build(compose([*FEW, *overrides]))
    before = {key: value.clone() for key, value in cell.module.state_dict().items()}
    result = fit(
        module=cell.module,
        data=cell.data,
        folder=Path(folder, name),
        trainer={"accelerator": "cpu", "precision": "32-true", **trainer},
        val_every=STEPS,
        progress="none",
    )
    return before, cell.module.state_dict(), result.curve


def worker(rank, folder, common):
    # The file system is the meeting point, the loopback interface the wire: no port is chosen, no network needed.
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        for name, overrides in {**WHOLE, **SHARED}.items():
            _, after, curve = train(folder, name, (*common, *overrides), devices=WORLD, strategy="ddp")
            torch.save((after, curve), f"{folder}/{name}-{rank}.pt")
            dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, gfl_pair):
    """The folder of what two processes have trained."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, args=(str(folder), gfl_pair), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("name", [*WHOLE, *SHARED])
def test_processes_end_with_the_same_weights(name, trained):
    (one, curve), (other, again) = (torch.load(trained / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert all(value.isfinite().all() for value in one.values())
    assert curve == again
    assert [point["step"] for point in curve] == [STEPS]


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_learn_what_one_does(name, trained, gfl_pair, tmp_path):
    before, expected, curve = train(tmp_path, "one", (*gfl_pair, *WHOLE[name]), devices=1)
    found, shared_curve = torch.load(trained / f"{name}-0.pt", weights_only=True)
    kept = [key for key, value in expected.items() if value.is_floating_point()]
    moved, off = (
        torch.cat([(expected[key] - other[key]).flatten() for key in kept]).norm() for other in (before, found)
    )
    assert moved > 1e-4
    assert off < 1e-4 * moved
    scores = [point["metrics"]["mAP"] for point in (*curve, *shared_curve)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
