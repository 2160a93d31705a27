# SPDX-License-Identifier: Apache-2.0
"""The teacher is a constant: not trained, not saved, not switched, but moved along."""

import pytest
import torch
from torch import nn

from kdlvfm.core import Teacher


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 24)


def test_nothing_of_it_reaches_an_optimizer_or_a_checkpoint(teacher):
    run = nn.ModuleDict({"teacher": teacher, "student": nn.Linear(2, 2)})
    assert list(teacher.parameters()) == []
    assert list(teacher.buffers()) == []
    assert teacher.state_dict() == {}
    assert list(run.state_dict()) == ["student.weight", "student.bias"]
    assert len(list(teacher.model.parameters())) > 0


def test_modes_and_gradients_switched_outside_do_not_reach_it(teacher):
    run = nn.ModuleDict({"teacher": teacher}).train().requires_grad_(True)
    assert run["teacher"].training
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_wrapping_freezes_a_network_in_training_mode(toy_model, images):
    model = toy_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = Teacher(model)(images, ["logits"]), Teacher(model)(images, ["logits"])
    assert torch.equal(first["logits"], second["logits"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_it_moves_with_its_owner(teacher, images):
    owner = nn.ModuleList([teacher])
    assert owner.to(torch.float64) is owner
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float64}
    assert teacher(images.double(), ["pooled"])["pooled"].dtype == torch.float64
    assert {p.dtype for p in teacher.float().model.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.double().model.parameters()} == {torch.float64}
    owner.to("meta")
    assert {p.device.type for p in teacher.model.parameters()} == {"meta"}


def test_no_taps_no_work(teacher, images):
    assert teacher(images, ()) == {}
    assert teacher.model.calls == []


def test_features_carry_no_graph(teacher, images):
    images.requires_grad_()
    features = teacher(images, ["map.0", "logits"])
    assert list(features) == ["map.0", "logits"]
    assert not any(value.requires_grad for value in features.values())


def test_input_grad_reaches_the_images_and_stops_there(teacher, images):
    images.requires_grad_()
    teacher(images, ["logits"], input_grad=True)["logits"].square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    with torch.no_grad():
        assert not teacher(images, ["logits"], input_grad=True)["logits"].requires_grad


def test_facts_are_those_of_the_network(teacher):
    assert teacher.taps() == teacher.model.taps()
    assert teacher.tap_info("map.-1") == teacher.model.taps()["map.2"]
    assert teacher.card is teacher.model.card


@pytest.mark.parametrize(("given", "seen"), [(32, (32, 32)), ((8, 16), (8, 16)), ((16, 24), (16, 24))])
def test_input_size_resizes_the_images_and_brings_dense_logits_back(toy_model, images, given, seen):
    model = toy_model()
    features = Teacher(model, input_size=given)(images, ["logits", "map.1", "pooled", "tokens"])
    direct = Teacher(model)(
        torch.nn.functional.interpolate(
            images, size=seen, mode="bilinear", align_corners=False, antialias=seen < images.shape[-2:]
        ),
        ["logits", "map.1", "pooled", "tokens"],
    )
    assert features["logits"].shape == (2, 5, 16, 24)
    assert features["map.1"].shape == (2, 6, seen[0] // 4, seen[1] // 4)
    for tap in ("map.1", "pooled", "tokens"):
        torch.testing.assert_close(features[tap], direct[tap])


def test_only_maps_are_brought_back(toy_model):
    """Tokens (B, N, D) whose N and D happen to be the sides of the image are no map."""
    model = toy_model(dims=(4, 6, 16), strides=(2, 2, 1))
    tokens = Teacher(model, input_size=16)(torch.rand(2, 3, 8, 8), ["tokens"])["tokens"]
    assert tokens.shape == (2, 16, 16)


def test_a_detector_sees_images_as_they_are(toy_detector, toy_model):
    class Detecting(toy_detector):
        num_classes, task_taps = 5, ("cls.0",)

        def loss(self, features, target):
            return {}

        def predict(self, features, sizes):
            return []

    class Both(toy_model):
        def __init__(self):
            super().__init__()
            self.member = Detecting()

    for model in (Detecting(), Both()):
        assert Teacher(model).model is model
        with pytest.raises(ValueError, match="input_size is not for a detector such as toy"):
            Teacher(model, input_size=32)
    assert Teacher(toy_detector(), input_size=32)
