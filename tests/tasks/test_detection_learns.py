# SPDX-License-Identifier: Apache-2.0
"""Each detector of ours learns four images by heart: its loss falls, and its average precision rises."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")

from kdlvfm.cli.build import build_student
from kdlvfm.cli.config import compose
from kdlvfm.tasks.detection import Detection

pytestmark = pytest.mark.slow

CLASSES, STEPS, SIDE = 3, 36, 128
HEAD = "bbox_head:{in_channels:64,feat_channels:64}"
NARROW = f"{{neck:{{out_channels:64}},{HEAD}}}"
PROPOSALS = (
    "{neck:{out_channels:64},rpn_head:{in_channels:64,feat_channels:64},roi_head:{bbox_roi_extractor:{out_channels:64},"
    "bbox_head:{in_channels:64,fc_out_channels:64}}}"
)
QUERIES = "{num_queries:20,encoder:{num_layers:1},decoder:{num_layers:2},test_cfg:{max_per_img:20}}"
CHANGES = {
    "gfl": NARROW,
    "retinanet": NARROW,
    "fcos": NARROW,
    "atss": NARROW,
    "faster_rcnn": PROPOSALS,
    "dino": QUERIES,
}


@pytest.fixture
def scene():
    """A square of the colour of its class in each of four dark images, and what metrics ask besides."""
    images = 0.2 * torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    corners = torch.tensor([[16, 16, 80, 80], [40, 24, 104, 88], [24, 48, 88, 112], [48, 48, 112, 112]])
    target = []
    for i, (x1, y1, x2, y2) in enumerate(corners.tolist()):
        images[i, i % CLASSES, y1:y2, x1:x2] = 1
        target.append(
            {
                "boxes": corners[i : i + 1].float(),
                "labels": torch.tensor([i % CLASSES]),
                "size": torch.tensor([SIDE, SIDE]),
                "scale": torch.ones(2),
                "iscrowd": torch.zeros(1, dtype=torch.bool),
                "area": torch.tensor([64.0 * 64.0]),
                "repeated": torch.tensor(False),
            }
        )
    return images, target


@torch.no_grad()
def precision(task, student, images, target):
    metrics = task.metrics()
    student.eval()
    metrics.update(task.predict(student, student(images, task.student_taps(student)), target), target)
    student.train()
    return metrics.compute()["mAP"].item()


@pytest.mark.parametrize("name", CHANGES)
def test_the_loss_falls_and_average_precision_rises(name, scene):
    images, target = scene
    encoder = ("student.encoder.name=test_resnet", "student.encoder.pretrained=false")
    overrides = (f"student=resnet18_{name}", *encoder, f"student.changes={CHANGES[name]}")
    torch.manual_seed(0)
    student = build_student(compose(["task=detection", "data=digit_scenes_boxes", *overrides])["student"], CLASSES)
    task = Detection(CLASSES)
    assert precision(task, student, images, target) < 0.1
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    losses = []
    for _ in range(STEPS):
        loss = sum(task.loss(student, student(images, task.student_taps(student)), target).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 10)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert precision(task, student, images, target) > 0.2
