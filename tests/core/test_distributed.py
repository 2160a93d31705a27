# SPDX-License-Identifier: Apache-2.0
"""Statistics over two processes equal those of one process on the whole batch."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdlvfm.core.distributed import gather_batch, world_size

WORLD = 2


def test_one_process_gathers_itself():
    x = torch.rand(3, 2)
    assert world_size() == 1
    assert gather_batch(x) is x


def gram_loss(embedded):
    """Coupled over the whole batch: no mean of the parts' losses equals it."""
    gram = embedded @ embedded.T
    return (gram - torch.eye(len(gram))).square().mean()


def weights():
    return torch.arange(30.0).view(5, 6)


def make_projector():
    torch.manual_seed(0)
    return nn.Linear(5, 4)


def worker(rank, folder):
    # The file system is the meeting point, the loopback interface the wire: no port is chosen, no network needed.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        whole = torch.load(f"{folder}/whole.pt", weights_only=True)
        model = DistributedDataParallel(make_projector())
        own = whole.chunk(WORLD)[rank].clone().requires_grad_()
        gathered = gather_batch(model(own))
        loss = gram_loss(gathered)
        loss.backward()
        # A gradient that is a transpose in memory.
        turned = own.detach().clone().requires_grad_()
        (gather_batch(turned).mT.contiguous() * weights()).sum().backward()
        result = {
            "turned": turned.grad,
            "world_size": world_size(),
            "gathered": gathered.detach(),
            "loss": loss.detach(),
            "weight": model.module.weight.grad,
            "bias": model.module.bias.grad,
            "own": own.grad,
        }
        torch.save(result, f"{folder}/{rank}.pt")
        # What DDP holds of the group must go before the group does, and the other process must not wait for this one.
        del model
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_see_the_whole_batch_and_get_its_gradient(tmp_path):
    torch.manual_seed(1)
    whole = torch.randn(6, 5)
    torch.save(whole, tmp_path / "whole.pt")
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)

    model, images = make_projector(), whole.clone().requires_grad_()
    embedded = model(images)
    loss = gram_loss(embedded)
    loss.backward()
    for rank in range(WORLD):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result["world_size"] == WORLD
        torch.testing.assert_close(result["gathered"], embedded.detach())
        torch.testing.assert_close(result["loss"], loss.detach())
        # After DDP's mean over processes, parameters have the gradient of the one loss.
        torch.testing.assert_close(result["weight"], model.weight.grad)
        torch.testing.assert_close(result["bias"], model.bias.grad)
        # Each process adds its copy of the loss, so before that mean the gradient is world_size times as large.
        torch.testing.assert_close(result["own"], WORLD * images.grad.chunk(WORLD)[rank])
        torch.testing.assert_close(result["turned"], WORLD * weights().mT.chunk(WORLD)[rank])
