# SPDX-License-Identifier: Apache-2.0
"""The detector that comes with the package: what it is made of, and that it does detect."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("mmdet")

from kdlvfm.core import TapInfo
from kdlvfm.data.digit_scenes_boxes import DigitScenesBoxes
from kdlvfm.models.digit_scenes_detector import WEIGHTS, DigitScenesDetector
from kdlvfm.models.digit_scenes_vit import DigitScenesViT
from kdlvfm.models.weights import sha256_of
from kdlvfm.tasks.detection import Detection


@pytest.fixture(scope="module")
def teacher():
    return DigitScenesDetector().eval()


def test_it_detects_digits_that_no_training_scene_had(teacher):
    data = DigitScenesBoxes(size=64, test=24, batch_size=1, steps=1, eval_batch_size=24)
    task = Detection(10)
    metrics = task.metrics()
    with torch.no_grad():
        for batch in data.test_dataloader():
            images, target, _ = task.unpack(batch)
            metrics.update(task.predict(teacher, teacher(images, teacher.task_taps), target), target)
    assert metrics.compute()["mAP"] > 0.7


def test_its_levels_begin_at_stride_4(teacher):
    assert [teacher.tap_info(f"fpn.{i}") for i in range(4)] == [TapInfo(64, 4 << i) for i in range(4)]
    assert teacher.tap_info("map.-1").stride == 8


def test_its_card_and_record_say_where_the_weights_come_from(teacher):
    assert teacher.card.name == "digit_scenes_detector"
    assert teacher.card.weights == "pretrained"
    assert teacher.card.licence == "apache-2.0"
    assert teacher.card.sha256 == sha256_of(WEIGHTS)
    assert teacher.card.source == "package:digit_scenes_detector.safetensors"
    record = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["config"]["data"]["stream"] is True
    assert record["student"]["source"] == "package:digit_scenes_vit.safetensors"  # where its encoder began
    assert WEIGHTS.stat().st_size < 3 * 2**20


def test_without_its_weights_the_encoder_begins_as_that_of_the_segmenter():
    new, segmenter = DigitScenesDetector(4, pretrained=False), DigitScenesViT()
    assert new.num_classes == 4
    assert new.card.source == segmenter.card.source
    expected = segmenter.encoder.net.state_dict()
    found = new.net.backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(parameter.requires_grad for parameter in new.parameters())


def test_the_weights_are_for_ten_classes():
    with pytest.raises(
        ValueError, match="the 10 classes of DigitScenes boxes apart, not 3: use data=digit_scenes_boxes"
    ):
        DigitScenesDetector(3)
