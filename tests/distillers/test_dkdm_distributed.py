# SPDX-License-Identifier: Apache-2.0
"""DKDM on two processes: one pool, and each process works on its half of a batch."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from kdlvfm.core import Denoiser, ModelCard, Step, TapInfo, Teacher
from kdlvfm.core.diffusion import Schedule
from kdlvfm.distillers import DKDM, SyntheticSet

WORLD, BATCH, T, STEPS = 2, 4, 6, 12


class Toy(Denoiser):
    def __init__(self):
        super().__init__()
        self.card, self.state_shape, self.schedule = ModelCard("toy", "random"), (1, 2, 2), Schedule.named("cosine", T)
        self.net = torch.nn.Conv2d(1, 1, 1)

    def taps(self):
        return {"noise": TapInfo(1, 1)}

    def forward(self, images, taps, timesteps=None):
        self.shown = images.detach()
        return {"noise": self.net(images)}


class Task:
    def loss(self, student, features, target):
        self.images = target["image"]
        return {"noise": student.net.weight.sum()}


def worker(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        torch.manual_seed(0)
        student, teacher, task = Toy(), Teacher(Toy()), Task()
        dkdm = DKDM(student.schedule, (1, 2, 2), BATCH)
        fixed = SyntheticSet(5, (1, 2, 2))
        shown, drawn = [], []
        for number in range(STEPS):
            torch.manual_seed(10 * number + rank)
            images = torch.zeros(BATCH // WORLD, 3, 2, 2)
            step = Step(images, {}, torch.zeros(1), 0, 0, student, teacher, task, number=number)
            next(dkdm.updates(step))
            shown.append(student.shown)
            next(fixed.updates(step))
            drawn.append(task.images)
        kept = {"states": dkdm.pool.states, "remaining": dkdm.pool.remaining, "set": fixed.images}
        torch.save({**kept, "shown": torch.stack(shown), "drawn": torch.stack(drawn)}, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_processes_share_one_pool_and_one_set(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    for name in ("states", "remaining", "set"):
        assert torch.equal(one[name], other[name]), name
    assert len(one["states"]) == round(0.4 * T) * BATCH
    assert ((one["remaining"] >= 0) & (one["remaining"] <= T)).all()
    assert one["shown"].shape == (STEPS, BATCH // WORLD, 1, 2, 2)
    for mine, theirs in zip(one["shown"], other["shown"], strict=True):
        assert not any(torch.equal(a, b) for a in mine for b in theirs)
    assert one["set"].shape == (5, 3, 2, 2)
    made = {tuple(image.flatten().tolist()) for image in one["set"]}
    assert len(made) == 5
    for result in (one, other):
        assert {tuple(image.flatten().tolist()) for image in result["drawn"].flatten(0, 1)} <= made
    assert not torch.equal(one["drawn"], other["drawn"])
