# SPDX-License-Identifier: Apache-2.0
"""Several teachers as one: every member sees and answers as it does alone."""

import hashlib

import pytest
import torch

from kdlvfm.cli.build import build_teacher
from kdlvfm.cli.config import compose
from kdlvfm.core import ModelCard, TapError, Teacher
from kdlvfm.models.ensemble import TeacherEnsemble
from kdlvfm.models.timm import TimmEncoder


@pytest.fixture
def members(toy_model):
    torch.manual_seed(0)
    return {
        "small": Teacher(toy_model()),
        "large": Teacher(toy_model(dims=(7, 9, 12), strides=(4, 1, 1), num_classes=0), input_size=(40, 48)),
    }


@pytest.fixture
def images():
    return torch.rand(2, 3, 24, 32)


def test_taps_are_the_members_under_their_names(members):
    taps = TeacherEnsemble(members).taps()
    assert taps == {
        **{f"small/{tap}": info for tap, info in members["small"].taps().items()},
        **{f"large/{tap}": info for tap, info in members["large"].taps().items()},
    }


def test_each_answers_as_it_does_alone(members, images):
    ensemble = Teacher(TeacherEnsemble(members))
    taps = ["large/map.-1", "small/logits", "large/pooled", "large/map.2"]
    features = ensemble(images, taps)
    assert list(features) == taps
    for tap in taps:
        name, own = tap.split("/")
        expected = members[name](images, [own])[own]
        assert torch.equal(features[tap], expected)
        assert ensemble.tap_info(tap) == members[name].tap_info(own)
    assert features["large/map.-1"].shape == (2, 12, 10, 12)


def test_only_those_asked_run(members, images):
    assert TeacherEnsemble(members)(images, []) == {}
    TeacherEnsemble(members)(images, ["small/map.0", "small/map.-1"])
    assert members["small"].model.calls == [("map.0", "map.-1")]
    assert members["large"].model.calls == []


def test_it_is_frozen_moves_and_passes_gradients_to_images_on_request(members, images):
    ensemble = TeacherEnsemble(members)
    teacher = Teacher(ensemble)
    count = sum(p.numel() for member in members.values() for p in member.model.parameters())
    assert sum(p.numel() for p in ensemble.parameters()) == count
    assert not any(p.requires_grad for p in ensemble.parameters())
    assert not any(module.training for module in ensemble.net.modules())
    images.requires_grad_()
    assert not teacher(images, ["large/map.0"])["large/map.0"].requires_grad
    teacher(images, ["large/map.0", "small/logits"], input_grad=True)["large/map.0"].sum().backward()
    assert (images.grad != 0).any()
    teacher.double()
    assert teacher(images.detach().double(), ["small/map.0"])["small/map.0"].dtype == torch.float64


@pytest.mark.parametrize("tap", ["map.-1", "tiny/map.-1", "", "/map.-1"])
def test_a_tap_of_no_member(members, images, tap):
    ensemble = TeacherEnsemble(members)
    for call in (ensemble.tap_info, ensemble.check_tap, lambda tap: ensemble(images, [tap])):
        with pytest.raises(TapError, match=r"write <teacher>/<tap>, .*small/map\.-1\. The teachers are small, large\."):
            call(tap)


def test_a_tap_that_a_member_does_not_have(members):
    with pytest.raises(TapError, match="toy has no classes"):
        TeacherEnsemble(members).check_tap("large/logits")
    with pytest.raises(TapError, match=r"Did you mean map"):
        TeacherEnsemble(members).tap_info("small/map.7")


def test_the_card_names_all_members(members):
    random = TeacherEnsemble(members).card
    assert random == ModelCard("toy + toy", "random", licence="small: unknown; large: unknown")
    members["small"].model.card = ModelCard("net", "pretrained", "mit", "1" * 64, "hf-hub:a/b")
    members["large"].model.card = ModelCard("net2", "file", None, "2" * 64, "weights.pt")
    card = TeacherEnsemble(members).card
    assert (card.name, card.weights, card.licence) == ("net + net2", "file", "small: mit; large: unknown")
    assert card.source == "small: hf-hub:a/b; large: weights.pt"
    assert card.sha256 == hashlib.sha256(f"small:{'1' * 64}\nlarge:{'2' * 64}".encode()).hexdigest()


def test_bad_members(members):
    with pytest.raises(ValueError, match=r"teacher@teacher\.members\.NAME=TEACHER"):
        TeacherEnsemble({})
    with pytest.raises(ValueError, match="cannot be called 'a/b'"):
        TeacherEnsemble({"a/b": members["small"]})


def test_module_taps_reach_into_a_member():
    encoder = TimmEncoder("test_vit", pretrained=False)
    ensemble = Teacher(TeacherEnsemble({"vit": Teacher(encoder)}))
    ensemble.check_tap("vit/module:blocks.0")
    with pytest.raises(TapError, match="no sub-module"):
        ensemble.check_tap("vit/module:blocks.99")
    images = torch.rand(1, 3, 64, 64)
    found = ensemble(images, ["vit/module:blocks.0"])["vit/module:blocks.0"]
    assert torch.equal(found, Teacher(encoder)(images, ["module:blocks.0"])["module:blocks.0"])


def test_members_are_chosen_in_the_configuration_each_with_its_size():
    small = ("teacher.members.a.name=test_vit", "teacher.members.a.pretrained=false", "teacher.members.a.input_size=96")
    other = ("teacher.members.b.name=test_resnet", "teacher.members.b.pretrained=false")
    names = ("teacher@teacher.members.a=timm", "teacher@teacher.members.b=timm")
    config = compose(["distiller=kd", "teacher=ensemble", *names, *small, *other])
    assert config["choices"]["teacher"] == "ensemble"
    assert "about" not in config["teacher"]["members"]["a"]
    teacher = build_teacher(config["teacher"], ("x", "y"))
    features = teacher(torch.rand(1, 3, 64, 64), ["a/map.-1", "b/map.-1"])
    assert features["a/map.-1"].shape[2:] == (6, 6)
    assert features["b/map.-1"].shape[2:] == (2, 2)
    assert teacher.card.weights == "random"
