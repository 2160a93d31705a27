# SPDX-License-Identifier: Apache-2.0
"""The losses of `peers.py` of which only the repositories of papers have an implementation.

Imported in the peers' environment only, beside which `peers_environment.clone` put the repositories. A module is loaded
from its file, without the packages around it, and is given tensors as its own training gives them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import losses_cases as cases
import losses_plain as plain
import mmcv.cnn
import mmengine.model
import torch
from peers_compared import Compared, Peer
from torch import Tensor
from torch.nn import functional as F

from kdlvfm import distillers as zoo

GAMMA = 0.3  # CSKD's attention begins with 0, where it does nothing


def _module(repository: str, folder: str, name: str) -> ModuleType:
    """A module of a repository; `folder` becomes a package without its `__init__`, which wants what is not here."""
    package = ModuleType(repository.replace("/", "_").replace("-", "_").lower())
    package.__path__ = [str(Path(sys.prefix, "repositories", repository, folder))]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{name}")


def _bare(kind: type, **attributes: Any) -> Any:
    """An object of a class with these attributes, its constructor never called: they build or load what is not used."""
    found = kind.__new__(kind)
    torch.nn.Module.__init__(found)
    for name, value in attributes.items():
        object.__setattr__(found, name, value)
    return found


if not torch.cuda.is_available():
    # They bring tensors to a GPU by name.
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
for moved in ("constant_init", "kaiming_init"):  # FGD imports them from where mmcv 1 had them
    setattr(mmcv.cnn, moved, getattr(mmengine.model, moved))

mini_batch = _module("winycg/CIRKD", "losses", "cirkd_mini_batch")
memory = _module("winycg/CIRKD", "losses", "cirkd_memory")
structural = _module("winycg/CIRKD", "losses", "skd")
variation = _module("winycg/CIRKD", "losses", "ifvd")
attention = _module("ayoubkarine/CSKD", "losses", "sa")
contrast = _module("OSVAI/Af-DCD", "losses", "ocmgd")
one_for_all = _module("Hao840/OFAKD", "distillers", "ofa")
unic = _module("naver/unic", "modeling", "losses")
masked = _module("hunto/MasKD", "segmentation/losses", "maskd")
sys.modules["yzd_v_fgd.builder"] = ModuleType("yzd_v_fgd.builder")
sys.modules["yzd_v_fgd.builder"].DISTILL_LOSSES = SimpleNamespace(register_module=lambda: lambda kind: kind)
focal = _module("yzd-v/FGD", "mmdet/distillation", "losses.fgd")


def _memory(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float) -> Tensor:
    loss = _bare(memory.StudentSegContrast, contrast_kd_temperature=1.0)
    student, teacher, queue = (F.normalize(x, p=2, dim=1) for x in (student, teacher, queue))
    similarities = (torch.div(torch.mm(x, queue.T), temperature) for x in (student, teacher))
    return loss.contrast_sim_kd(*similarities)


def _channel_attention(x: Tensor, gamma: Tensor) -> Tensor:
    module = _bare(attention.CriterionSA, gammacam=gamma, temperaturesa=2.0, softmax=torch.nn.Softmax(dim=-1))
    return module.CAM(x).square().mean()


def _contrast(student: Tensor, teacher: Tensor) -> Tensor:
    loss = _bare(
        contrast.OmniContrastiveFeatureLoss, tau_ocd=0.07, M_ocd=16, pool_size=0, patch_size=(4, 4), dataset="citys"
    )
    return loss.get_omni_contrastive_loss(student, teacher) / len(student)


def _ofa(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return one_for_all.ofa_loss(student, teacher, F.one_hot(target, student.shape[1]), 1.5)


def _unic(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (x.flatten(2).mT for x in (student, teacher))
    return 0.5 * unic.cosine_loss(student, teacher, avg=True) + 0.5 * unic.smooth_l1_loss(student, teacher, avg=True)


def _masked(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    module = SimpleNamespace(forward_mask=lambda _: masks)
    return _bare(masked.MasKDLoss, mask_module=module)(student, teacher)


def _focal(student: Tensor, teacher: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    loss = _bare(focal.FeatureLoss)
    (spatial_t, channel_t), (spatial_s, channel_s) = (loss.get_attention(x, 0.5) for x in (teacher, student))
    attended = channel_s, channel_t, spatial_s, spatial_t
    parts = loss.get_fea_loss(student, teacher, foreground, background, *attended)
    return 1e-3 * parts[0] + 5e-4 * parts[1] + 1e-3 * loss.get_mask_loss(*attended)


def _classes(shape: cases.Shape) -> cases.Inputs:
    """Maps and labels in blocks of 4 positions, none of them void: IFVD's own code counts void pixels in its mean."""
    return *cases.maps(shape), shape.labels(shape.size).remainder(plain.CLASSES)


def _rows(shape: cases.Shape) -> cases.Inputs:
    """Logits of every position, as samples, and their classes."""
    student, teacher = (x.movedim(1, -1).flatten(0, 2) for x in cases.logits(shape))
    return student, teacher, torch.randint(0, plain.CLASSES, (len(student),), device=student.device)


def _attended(shape: cases.Shape) -> cases.Inputs:
    return cases.maps(shape)[0], torch.tensor([GAMMA], device=shape.device)


def _only(package: str, loss: Callable[..., Tensor], factor: float = 1.0, apart: str = "") -> tuple[Peer, ...]:
    return (Peer(package, loss, lambda _: factor, apart),)


COMPARED: tuple[Compared, ...] = (
    Compared(
        "cirkd_pixel",
        zoo.cirkd_pixel_loss,
        cases.maps,
        _only("winycg/CIRKD", mini_batch.CriterionMiniBatchCrossImagePair(0.1)),
        own_channels=True,
        pairs="batch",
    ),
    Compared("cirkd_memory", zoo.cirkd_memory_loss, cases.remembered, _only("winycg/CIRKD", _memory), pairs="memory"),
    Compared(
        "pairwise",
        lambda student, teacher: zoo.pairwise_loss(student, teacher, pool=2),
        cases.maps,
        _only("winycg/CIRKD", structural.CriterionStructuralKD()),
        own_channels=True,
    ),
    Compared(
        "ifvd",
        lambda student, teacher, target: zoo.ifvd_loss(student, teacher, target, plain.CLASSES),
        _classes,
        _only("winycg/CIRKD", variation.CriterionIFV(plain.CLASSES)),
        own_channels=True,
    ),
    Compared(
        "channel_attention",
        cases.mean_square(zoo.channel_attention),
        _attended,
        _only("ayoubkarine/CSKD", _channel_attention),
        own_channels=True,
    ),
    Compared("afdcd", zoo.afdcd_loss, cases.projected, _only("OSVAI/Af-DCD", _contrast), copies=30),
    Compared("ofa", lambda *inputs: zoo.ofa_loss(*inputs, 1.5), _rows, _only("Hao840/OFAKD", _ofa)),
    Compared(
        "cosine_smooth_l1",
        lambda student, teacher: zoo.cosine_smooth_l1_loss(student, teacher, 0.5),
        cases.projected,
        _only("naver/unic", _unic),
    ),
    Compared("maskd", zoo.maskd_loss, cases.masked, _only("hunto/MasKD", _masked, 2.0, "half of the mean"), copies=24),
    Compared("fgd", zoo.fgd_loss, cases.boxed, _only("yzd-v/FGD", _focal)),
)
