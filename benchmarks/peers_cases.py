# SPDX-License-Identifier: Apache-2.0
"""The losses of `peers.py`: the peers' public implementations beside ours, with what sets their definitions apart.

Imported in the peers' environment only. Their modules are given tensors as their own pipelines give them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import losses_cases as cases
import mmrazor
import torch
from peers_compared import Compared, Peer
from torch import Tensor
from torchdistill.losses import mid_level

from kdlvfm import distillers as zoo
from kdlvfm.models.mmcv_ops import provide_operators


def _losses_of_mmrazor() -> ModuleType:
    """`mmrazor.models.losses` alone: the package around it wants mmpretrain and a compiled mmcv, its losses do not."""
    package = ModuleType("mmrazor.models")
    package.__path__ = [str(Path(mmrazor.__file__).parent / "models")]
    sys.modules[package.__name__] = package
    return importlib.import_module("mmrazor.models.losses")


def _losses_of_mmdet() -> ModuleType:
    provide_operators()
    return importlib.import_module("mmdet.models.losses")


razor, mmdet = _losses_of_mmrazor(), _losses_of_mmdet()


def _taken(loss: torch.nn.Module) -> Callable[..., Tensor]:
    """A loss of torchdistill, which takes its tensors from the dictionaries of its pipelines."""
    return lambda student, teacher: loss({"student": {"output": student}}, {"teacher": {"output": teacher}})


_PATHS = {
    "student_module_path": "student",
    "student_module_io": "output",
    "teacher_module_path": "teacher",
    "teacher_module_io": "output",
}
_OUTPUTS = {"student_output_path": "student", "teacher_output_path": "teacher"}
_PAIR = {
    "student": {"path": "student", "io": "output"},
    "teacher": {"path": "teacher", "io": "output"},
}


def _positions(shape: torch.Size) -> float:
    """Positions of a map."""
    return float(shape[2:].numel())


def _hcl() -> Callable[..., Tensor]:
    loss = mid_level.HierarchicalContextLoss(**_PATHS)
    return lambda student, teacher: loss({"student": {"output": (student, None)}}, {"teacher": {"output": teacher}})


def _rows(shape: cases.Shape) -> cases.Inputs:
    """Logits of every position, as samples."""
    return tuple(x.movedim(1, -1).flatten(0, 2) for x in cases.logits(shape))


def _classified(shape: cases.Shape) -> cases.Inputs:
    """Logits of every position, and their classes, none of them void."""
    student, teacher = _rows(shape)
    return student, teacher, torch.randint(0, student.shape[1], (len(student),), device=student.device)


def _sides(shape: cases.Shape) -> cases.Inputs:
    """Distributions of all sides of boxes, in rows."""
    return tuple(x.flatten(0, 2) for x in cases.edges(shape)[:2])


def _localization(student: Tensor, teacher: Tensor) -> Tensor:
    """Ours on rows, each a position of one side with weight 1."""
    return zoo.localization_loss(student.unsqueeze(1), teacher.unsqueeze(1), torch.ones_like(student[:, :1]))


def _dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return zoo.dkd_loss(student, teacher, target)


COMPARED: tuple[Compared, ...] = (
    Compared(
        "kd",
        zoo.kd_loss,
        cases.logits,
        (
            Peer("mmrazor", razor.KLDivergence(tau=4.0), lambda x: 1 / _positions(x), "sum over positions, not mean"),
            Peer(
                "torchdistill",
                _taken(mid_level.KDLoss(**_PATHS, temperature=4.0, alpha=0.0)),
                lambda x: 16 / _positions(x),
                "sum over positions, not mean; no T² without labels",
            ),
        ),
    ),
    Compared(
        "kd, standardised",
        lambda student, teacher: zoo.kd_loss(student, teacher, 2.0, standardize=True),
        cases.class_logits,
        (
            Peer(
                "torchdistill",
                _taken(mid_level.LogitStdKDLoss(**_PATHS, temperature=2.0, alpha=0.0)),
                lambda _: 4.0,
                "no T² without labels",
            ),
        ),
        of_maps=False,
    ),
    Compared(
        "dkd",
        _dkd,
        _classified,
        (Peer("mmrazor", razor.DKDLoss(tau=4.0, beta=8.0)),),
    ),
    Compared(
        "dist",
        zoo.dist_loss,
        _rows,
        (Peer("mmrazor", razor.DISTLoss()), Peer("torchdistill", _taken(mid_level.DISTLoss(**_PATHS)))),
    ),
    Compared("localization", _localization, _sides, (Peer("mmdet", mmdet.KnowledgeDistillationKLDivLoss()),)),
    Compared(
        "fitnet",
        zoo.fitnet_loss,
        cases.projected,
        (Peer("mmrazor", razor.L2Loss(normalize=False, div_element=True)),),
    ),
    Compared("mgd", zoo.mgd_loss, cases.projected, (Peer("mmrazor", razor.MGDLoss(alpha_mgd=1.0)),)),
    Compared(
        "attention_transfer",
        zoo.attention_transfer_loss,
        cases.maps,
        (Peer("mmrazor", razor.ATLoss()), Peer("torchdistill", _taken(mid_level.ATLoss({"pair": _PAIR})))),
        own_channels=True,
    ),
    Compared("hcl", zoo.hcl_loss, cases.projected, (Peer("torchdistill", _hcl()),)),
    Compared("cwd", zoo.cwd_loss, cases.projected, (Peer("mmrazor", razor.ChannelWiseDivergence(tau=4.0)),)),
    Compared("pkd", zoo.pkd_loss, cases.projected, (Peer("mmrazor", razor.PKDLoss()),)),
    Compared(
        "rkd_distance",
        zoo.rkd_distance_loss,
        cases.embeddings,
        (
            Peer("mmrazor", razor.DistanceWiseRKD(loss_weight=1.0, with_l2_norm=False)),
            Peer(
                "torchdistill",
                _taken(mid_level.RKDLoss(**_OUTPUTS, dist_factor=1.0, angle_factor=0.0, reduction="mean")),
            ),
        ),
        own_channels=True,
        of_maps=False,
    ),
    Compared(
        "rkd_angle",
        zoo.rkd_angle_loss,
        cases.embeddings,
        (
            Peer("mmrazor", razor.AngleWiseRKD(loss_weight=1.0, with_l2_norm=False)),
            Peer(
                "torchdistill",
                _taken(mid_level.RKDLoss(**_OUTPUTS, dist_factor=0.0, angle_factor=1.0, reduction="mean")),
            ),
        ),
        own_channels=True,
        of_maps=False,
    ),
    Compared(
        "similarity_preserving",
        zoo.sp_loss,
        cases.maps,
        (
            Peer(
                "torchdistill",
                _taken(mid_level.SPKDLoss(**_OUTPUTS, reduction="batchmean")),
                None,
                "rows of unit L1 norm, not L2",
            ),
        ),
        own_channels=True,
    ),
)
