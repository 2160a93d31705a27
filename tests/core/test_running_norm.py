# SPDX-License-Identifier: Apache-2.0
"""Running statistics against those of all features at once, and against the recursion written out."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from kdlvfm.core.aligner import Targets
from kdlvfm.core.running_norm import RunningNorm


def batches(count, shape=(2, 3, 4, 5), drift=0.5):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 30.0, 0.1]).view(-1, *(1 for _ in shape[2:]))
    return [scale * torch.randn(shape, generator=generator) + drift * i for i in range(count)]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 3)])
def test_statistics_are_those_of_all_that_was_seen(shape):
    norm, seen = RunningNorm(3), batches(7, shape)
    for batch in seen:
        norm.observe(batch)
    rows = np.concatenate([batch.movedim(1, -1).reshape(-1, 3).double().numpy() for batch in seen])
    np.testing.assert_allclose(norm.mean.numpy(), rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var.numpy(), rows.var(0), rtol=1e-4)


def test_they_forget_once_the_momentum_is_reached():
    norm, seen = RunningNorm(3, momentum=0.25), batches(12, drift=3.0)
    weights = np.zeros(len(seen))
    for i, batch in enumerate(seen):
        norm.observe(batch)
        momentum = max(1 / (i + 1), 0.25)
        weights *= 1 - momentum
        weights[i] = momentum
    assert weights.sum() == pytest.approx(1)
    rows = np.stack([batch.movedim(1, -1).reshape(-1, 3).double().numpy() for batch in seen])
    mean = np.einsum("n,nrc->c", weights, rows) / rows.shape[1]
    var = np.einsum("n,nrc->c", weights, (rows - mean) ** 2) / rows.shape[1]
    np.testing.assert_allclose(norm.mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var.numpy(), var, rtol=1e-4)


def test_forward_subtracts_and_divides():
    norm, (batch,) = RunningNorm(3), batches(1)
    norm.observe(batch)
    x = batch.movedim(1, -1).double().numpy()
    expected = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    np.testing.assert_allclose(norm(batch).movedim(1, -1).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert norm(batch.double()).dtype == torch.float64


def test_a_constant_channel_becomes_zero():
    norm = RunningNorm(2)
    norm.observe(torch.full((2, 2, 3, 3), 1e4))
    assert torch.equal(norm(torch.full((1, 2, 3, 3), 1e4)), torch.zeros(1, 2, 3, 3))
    assert norm(torch.full((1, 2, 3, 3), 1e4 + 1)).isfinite().all()


def test_as_a_target_it_learns_in_training_only_and_goes_on_after_a_checkpoint():
    first, seen = Targets(3, "ema"), batches(5)
    for batch in seen[:3]:
        first(batch)
    second = Targets(3, "ema")
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(seen[4]), second.eval()(seen[4]))
    assert int(first.ema.seen) == 3
    assert torch.equal(first.train()(seen[4]), second.train()(seen[4]))
    assert int(first.ema.seen) == 4


def test_the_first_target_is_the_batch_standardised():
    (batch,) = batches(1)
    torch.testing.assert_close(Targets(3, "ema")(batch), Targets(3, "standardize")(batch), rtol=1e-4, atol=1e-5)


def worker(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        norm = RunningNorm(3)
        for batch in batches(3):
            norm.observe(batch[rank : rank + 1])
        torch.save(norm.state_dict(), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_see_what_one_would(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    expected = RunningNorm(3)
    for batch in batches(3):
        expected.observe(batch)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found[name], value)
