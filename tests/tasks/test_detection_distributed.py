# SPDX-License-Identifier: Apache-2.0
"""Average precision over two processes equals that of one, however the images are shared."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from kdlvfm.tasks.detection import Detection

WORLD, COUNT = 2, 5


def scenes():
    """Five images; the fourth has no object."""
    generator = torch.Generator().manual_seed(0)
    predictions, target = [], []
    for i in range(COUNT):
        corner = torch.rand(0 if i == 3 else i + 2, 2, generator=generator) * 80
        truth = torch.cat([corner, corner + 20 + 60 * torch.rand(corner.shape, generator=generator)], 1)
        labels = torch.arange(len(truth)) % 3
        found = truth + 4 * torch.randn(truth.shape, generator=generator)
        scores = torch.rand(len(truth), generator=generator)
        predictions.append({"boxes": found, "labels": labels, "scores": scores})
        target.append(
            {
                "boxes": truth,
                "labels": labels,
                "scale": torch.tensor([0.5, 0.5]),
                "iscrowd": torch.zeros(len(truth), dtype=torch.bool),
                "area": (truth[:, 2:] - truth[:, :2]).prod(1) * 4,
                "repeated": torch.tensor(False),
            }
        )
    return predictions, target


def measure(images):
    metrics = Detection(3).metrics()
    predictions, target = scenes()
    for i in images:
        # As the loaders of several processes do: what is missing from the last round is filled up.
        truth = {**target[min(i, COUNT - 1)], "repeated": torch.tensor(i >= COUNT)}
        metrics.update([predictions[min(i, COUNT - 1)]], [truth])
    return {name: value.clone() for name, value in metrics.compute().items()}


def worker(rank, folder):
    # The file system is the meeting point, the loopback interface the wire: no port is chosen, no network needed.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        torch.save(measure(range(rank, COUNT + 1, WORLD)), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_measure_what_one_does(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    expected = measure(range(COUNT))
    assert 0 < expected["mAP"] < 1
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, equal_nan=True)
