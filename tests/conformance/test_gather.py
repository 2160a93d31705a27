# SPDX-License-Identifier: Apache-2.0
"""With `gather=True` two processes with half a batch each equal one with the whole batch, in loss and gradients."""

import inspect
import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

import kdlvfm.distillers
from kdlvfm.core import Distiller

WORLD = 2
CLASSES = 3
SIZES = {"student_dim": 4, "teacher_dim": 6, "num_classes": CLASSES}
# Its mini-batch term alone, which needs no sizes: what its memories hold is drawn at random.
WITHOUT_SIZES = {"CIRKD"}
OPTIONS = {"Gram": {"scope": "batch"}}
# What is standardised must be so over the whole batch too.
STANDARDIZED = {"target": "standardize", "standardize": True, "standardise": True}


def gathering():
    """Names of the classes that take `gather`."""
    found = vars(kdlvfm.distillers).items()
    classes = {name: cls for name, cls in found if isinstance(cls, type) and issubclass(cls, Distiller)}
    return sorted(name for name, cls in classes.items() if "gather" in inspect.signature(cls).parameters)


def build(name):
    cls = vars(kdlvfm.distillers)[name]
    known = inspect.signature(cls).parameters
    arguments = {key: value for key, value in SIZES.items() if key in known and name not in WITHOUT_SIZES}
    arguments |= {key: value for key, value in STANDARDIZED.items() if key in known}
    torch.manual_seed(0)
    return cls(**arguments, **OPTIONS.get(name, {}), gather=True).double()


def features(distiller):
    """A batch of 8 on its taps, the labels, and nothing random in between."""
    generator = torch.Generator().manual_seed(1)

    def tensors(taps, dim):
        shapes = {"logits": (8, CLASSES, 6, 8), "pooled": (8, dim)}
        return {
            tap: torch.randn(shapes.get(tap, (8, dim, 6, 8)), generator=generator, dtype=torch.float64) for tap in taps
        }

    student, teacher = tensors(distiller.student_taps, 4), tensors(distiller.teacher_taps, 6)
    return student, teacher, torch.randint(0, CLASSES, (8, 6, 8), generator=generator)


def outcome(name, rank=0, world=1):
    """Loss, and gradients of the student's features and of what the distiller trains."""
    distiller = build(name)
    student, teacher, target = features(distiller)

    def own(x):
        return x.chunk(world)[rank].clone()

    student = {tap: own(x).requires_grad_() for tap, x in student.items()}
    torch.manual_seed(2)
    terms = distiller(student, {tap: own(x) for tap, x in teacher.items()}, own(target))
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    gradients = {tap: x.grad for tap, x in student.items() if x.grad is not None}
    parameters = {key: p.grad for key, p in distiller.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "student": gradients, "parameters": parameters}


def worker(rank, folder, names):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        torch.save({name: outcome(name, rank, WORLD) for name in names}, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    mp.spawn(worker, args=(str(folder), gathering()), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_there_are_methods_that_gather():
    assert {"PKD", "SP", "RKD", "RSD", "CSKD"} <= set(gathering())


@pytest.mark.ddp
@pytest.mark.parametrize("name", gathering())
def test_two_processes_equal_one(name, of_two_processes):
    whole = outcome(name)
    # Of a term that does not couple the batch, each process has its own half's mean.
    mean = torch.stack([results[name]["loss"] for results in of_two_processes]).mean()
    torch.testing.assert_close(mean, whole["loss"])
    for rank, results in enumerate(of_two_processes):
        # DDP's mean over processes is still to come.
        for tap, gradient in whole["student"].items():
            torch.testing.assert_close(results[name]["student"][tap] / WORLD, gradient.chunk(WORLD)[rank])
    for key, gradient in whole["parameters"].items():
        mean = torch.stack([results[name]["parameters"][key] for results in of_two_processes]).mean(0)
        torch.testing.assert_close(mean, gradient)


@pytest.mark.ddp
@pytest.mark.parametrize("name", gathering())
def test_the_batch_is_coupled_so_that_gathering_matters(name, of_two_processes):
    halves = []
    for rank in range(WORLD):
        distiller = build(name)
        student, teacher, target = (
            {tap: x.chunk(WORLD)[rank] for tap, x in part.items()}
            if isinstance(part, dict)
            else part.chunk(WORLD)[rank]
            for part in features(distiller)
        )
        torch.manual_seed(2)
        halves.append(torch.stack(list(distiller(student, teacher, target).values())).sum().detach())
    assert not torch.isclose(torch.stack(halves).mean(), of_two_processes[0][name]["loss"], rtol=1e-6)
