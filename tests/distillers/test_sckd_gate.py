# SPDX-License-Identifier: Apache-2.0
"""The gate of SCKD by hand, in one process and in two."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch import nn

from kdlvfm.distillers import gradient_gate

WORLD = 2


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_gate_by_hand():
    task = vector(1.0, 0.0)
    assert gradient_gate(vector(1.0, 5.0), task) == 1
    assert gradient_gate(vector(-1.0, 5.0), task) == 0
    assert gradient_gate(vector(0.0, 5.0), task) == 1  # a cosine of 0 is enough
    assert gradient_gate(vector(3.0, 4.0), task, threshold=0.59) == 1
    assert gradient_gate(vector(3.0, 4.0), task, threshold=0.61) == 0
    assert gradient_gate(vector(-3.0, 4.0), task, threshold=-0.61) == 1
    assert gradient_gate(vector(-3.0, 4.0), task, threshold=-0.59) == 0


@pytest.mark.parametrize("factor", [1e-20, 1e-6, 3.0, 1e12])
def test_a_multiple_of_the_tasks_gradient_is_open_or_closed_by_its_sign_whatever_its_size(factor):
    task = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert gradient_gate(factor * task, task, threshold=0.999) == 1
    assert gradient_gate(-factor * task, task, threshold=-0.999) == 0
    assert gradient_gate(task, factor * task) == 1


def test_the_gate_is_a_number_without_a_gradient():
    gradient = torch.ones(3, requires_grad=True)
    gate = gradient_gate(gradient, gradient * 2)
    assert gate.shape == ()
    assert gate.dtype == torch.float32
    assert not gate.requires_grad


@pytest.mark.parametrize("broken", [0.0, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("order", [1, -1])
def test_without_a_direction_the_cosine_counts_as_zero(broken, order):
    pair = (vector(broken, broken), vector(1.0, 2.0))[::order]
    assert gradient_gate(*pair) == 1
    assert gradient_gate(*pair, threshold=-0.5) == 1
    assert gradient_gate(*pair, threshold=0.1) == 0


def test_gradients_of_several_inputs_are_one():
    distillation = [vector(1.0, 0.0), None, vector(2.0)]
    assert gradient_gate(distillation, [vector(1.0, 1.0), vector(7.0), vector(-0.4)]) == 1  # 1 - 0.8 > 0
    assert gradient_gate(distillation, [vector(1.0, 1.0), vector(7.0), vector(-0.6)]) == 0  # 1 - 1.2 < 0
    assert gradient_gate([None, None], distillation[:2]) == 1


def test_gradients_of_different_inputs_are_refused():
    with pytest.raises(ValueError, match="same inputs"):
        gradient_gate(torch.ones(2), torch.ones(3))


def worker(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        parts = torch.load(f"{folder}/gradients.pt", weights_only=True)
        gates = [gradient_gate(a.chunk(WORLD)[rank], b.chunk(WORLD)[rank]).item() for a, b in parts]
        # What each process would decide on its own share.
        own = [((a.chunk(WORLD)[rank] * b.chunk(WORLD)[rank]).sum() >= 0).float().item() for a, b in parts]
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3), find_unused_parameters=True)
        x = torch.full((2, 3), float(rank))
        y = model(x)
        gradient = torch.autograd.grad(y.sum(), list(model.parameters()), retain_graph=True)
        gate = gradient_gate(gradient, gradient)
        (gate * y.sum()).backward()
        torch.save([gates, own, model.module.weight.grad], f"{folder}/{rank}.pt")
        # What DDP holds of the group must go before the group does, and the other process must not wait for this one.
        del model
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_decide_as_one_would_on_the_whole_batch(tmp_path):
    generator = torch.Generator().manual_seed(5)
    pairs = [(torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)) for _ in range(12)]
    torch.save([list(pair) for pair in pairs], tmp_path / "gradients.pt")
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    expected = [gradient_gate(a, b).item() for a, b in pairs]
    assert results[0][0] == results[1][0] == expected
    assert results[0][1] != results[1][1], "each process alone decided the same, so nothing was tested"
    # Looking at gradients beside does not disturb DDP: inputs of 0 and of 1, two of each, averaged.
    for _, _, gradient in results:
        torch.testing.assert_close(gradient, torch.ones(3, 3))
