# SPDX-License-Identifier: Apache-2.0
"""What of a student loads where: the lines are executed, and the networks compute the same."""

import pytest
import torch

from kdlvfm.cli.build import build_student
from kdlvfm.cli.loading import networks_of, statistics_of
from kdlvfm.export.weights import write_weights

ENCODER = {
    "_target_": "kdlvfm.models.timm.TimmEncoder",
    "name": "test_resnet",
    "pretrained": False,
    "checkpoint": None,
    "model_kwargs": {"num_classes": 0},
}
SMP = {"_target_": "kdlvfm.models.smp.SMPModel", "name": "test_resnet", "decoder": "fpn", "pretrained": False}
HEAD = {"_target_": "kdlvfm.models.head.EncoderHead", "head": "pyramid", "freeze": False}
NARROW = {"neck": {"out_channels": 64}, "bbox_head": {"in_channels": 64, "feat_channels": 64, "stacked_convs": 2}}
DETECTOR = {"_target_": "kdlvfm.models.mmdet.MMDetModel", "config": "gfl_r50_fpn_1x_coco", "changes": NARROW}


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """The student of a configuration, and by file what its lines give, executed in another folder."""

    def load(node, classes=3):
        torch.manual_seed(0)
        student = build_student(node, classes).eval()
        found = {}
        for network in networks_of(student, node, classes):
            write_weights(network, tmp_path, {})
            namespace = {}
            with monkeypatch.context() as patch:
                patch.chdir(tmp_path)
                exec("\n".join(network.lines()), namespace)
            found[network.file] = namespace["model" if network.holder else "net"]
        return student, found

    return load


@pytest.mark.parametrize("changes", [{}, {"decoder_kwargs": {"decoder_segmentation_channels": 32}}])
def test_a_network_of_smp_is_one_of_plain_smp(loaded, changes):
    student, found = loaded({**SMP, **changes})
    (net,) = found.values()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(net(student.normalise(images)), student(images, ("logits",))["logits"])


def test_a_head_on_an_encoder_of_timm(loaded):
    student, found = loaded({**HEAD, "encoder": {**ENCODER, "model_kwargs": {"num_classes": 4}, "input_size": None}})
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = student(images, ("logits", "pooled"))
        assert torch.equal(found["student.safetensors"](images, ("logits",))["logits"], expected["logits"])
        alone = found["encoder.safetensors"]
        assert alone.num_classes == 4
        features = alone.forward_features(student.encoder.normalise(images))
        assert torch.equal(alone.forward_head(features, pre_logits=True), expected["pooled"])


def test_a_detector_and_its_encoder(loaded):
    pytest.importorskip("mmdet")
    student, found = loaded({**DETECTOR, "encoder": ENCODER})
    images = torch.rand(1, 3, 64, 64)
    taps = (*student.task_taps, "map.-1")
    with torch.no_grad():
        expected, others = (model(images, taps) for model in (student, found["student.safetensors"]))
        assert all(torch.equal(expected[tap], others[tap]) for tap in taps)
        alone = found["encoder.safetensors"].forward_features(student.encoder.normalise(images))
        assert torch.equal(alone, expected["map.-1"])


def test_the_statistics_are_those_of_the_encoder():
    student = build_student({**HEAD, "encoder": ENCODER}, 3)
    statistics = statistics_of(student)
    assert statistics.mean == pytest.approx(student.encoder.normalise.mean.flatten().tolist())
    assert statistics.std == pytest.approx(student.encoder.normalise.std.flatten().tolist())
