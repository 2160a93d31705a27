# SPDX-License-Identifier: Apache-2.0
"""Necks fitted to encoders, and the pyramid from a ViT's one map."""

import pytest
import torch

from kdlvfm.models.feature_pyramid import SimpleFeaturePyramid, fit_neck
from kdlvfm.models.freezing import freeze_encoder
from kdlvfm.models.timm import TimmEncoder

FPN = {"type": "FPN", "in_channels": [256, 512, 1024, 2048], "out_channels": 8, "start_level": 1, "num_outs": 5}
MAPPER = {"type": "ChannelMapper", "in_channels": [512, 1024, 2048], "out_channels": 8, "num_outs": 4}


def encoder(name):
    return TimmEncoder(name, pretrained=False, model_kwargs={"num_classes": 0})


@pytest.mark.parametrize(("stride", "grid"), [(16, (4, 6)), (8, (8, 12)), (14, (5, 7)), (32, (2, 3))])
def test_levels_are_those_of_a_cnn_for_any_stride_of_the_vit(stride, grid):
    pyramid = SimpleFeaturePyramid(dim=8, channels=4, stride=stride, strides=(8, 16, 32, 64, 128))
    levels = pyramid([torch.rand(2, 8, *grid)])
    assert [tuple(level.shape) for level in levels] == [
        (2, 4, 8, 12),
        (2, 4, 4, 6),
        (2, 4, 2, 3),
        (2, 4, 1, 2),
        (2, 4, 1, 1),
    ]


def test_levels_of_one_stride_stand_over_the_same_pixels():
    pyramid = SimpleFeaturePyramid(dim=4, channels=4, stride=16, strides=(4, 8, 16, 32))
    x = torch.rand(1, 4, 8, 8)
    changed = x.clone()
    changed[..., :2, :2] += 1
    for before, after in zip(pyramid([x]), pyramid([changed]), strict=True):
        moved = (before != after).any(dim=1)[0]
        size = len(moved)
        # Two of eight columns, and one position further for the 3x3 convolution.
        assert moved[: size // 4, : size // 4].all()
        assert not moved[size // 4 + 1 :].any()
        assert not moved[:, size // 4 + 1 :].any()


def test_every_weight_of_the_pyramid_learns():
    pyramid = SimpleFeaturePyramid(dim=8, channels=4, stride=16, strides=(4, 8, 16, 32, 64))
    sum((level * torch.rand_like(level)).sum() for level in pyramid([torch.rand(1, 8, 4, 4)])).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


def test_a_cnn_feeds_the_neck_with_its_last_maps():
    cnn = encoder("test_resnet")
    settings, taps = fit_neck(FPN, cnn)
    assert [cnn.tap_info(tap).stride for tap in taps] == [4, 8, 16, 32]
    assert settings == {**FPN, "in_channels": [cnn.tap_info(tap).dim for tap in taps]}
    settings, taps = fit_neck([MAPPER, {"type": "Other"}], cnn)
    assert [cnn.tap_info(tap).stride for tap in taps] == [8, 16, 32]
    assert settings[1] == {"type": "Other"}
    settings, taps = fit_neck({"type": "DilatedEncoder", "in_channels": 2048}, cnn)
    assert taps == ("map.4",)
    assert settings["in_channels"] == cnn.tap_info("map.4").dim


@pytest.mark.parametrize(
    ("neck", "strides"),
    [(FPN, [8, 16, 32, 64, 128]), ({**FPN, "start_level": 0}, [4, 8, 16, 32, 64]), (MAPPER, [8, 16, 32, 64])],
)
def test_a_vit_gets_a_simple_pyramid_with_the_levels_of_the_neck(neck, strides):
    vit = encoder("test_vit")
    settings, taps = fit_neck(neck, vit)
    assert settings.pop("type") is SimpleFeaturePyramid
    assert settings == {"dim": 64, "channels": 8, "stride": 16, "strides": strides}
    assert taps == (list(vit.taps())[len([tap for tap in vit.taps() if tap.startswith("map.")]) - 1],)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no neck"):
        fit_neck(None, encoder("test_resnet"))
    with pytest.raises(ValueError, match=r"reads 6 maps of different stride, and test_resnet.* has 5"):
        fit_neck({**FPN, "in_channels": [1] * 6}, encoder("test_resnet"))
    with pytest.raises(ValueError, match="cannot stand in for the neck SSDNeck"):
        fit_neck({"type": "SSDNeck", "in_channels": [1, 2]}, encoder("test_vit"))


def test_freezing_the_first_entries_of_a_pyramid():
    cnn = encoder("test_resnet")
    still = freeze_encoder(cnn, 2, norm_eval=False)
    trained = {name for name, parameter in cnn.net.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in trained)
    assert {name.partition(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}
    inside = [*cnn.net.get_submodule("layer1").modules(), cnn.net.get_submodule("bn1")]
    assert {id(module) for module in still} <= {id(module) for module in (*inside, *cnn.net.conv1.modules())}
    assert len(still) == sum(isinstance(module, torch.nn.BatchNorm2d) for module in {*inside, *cnn.net.conv1.modules()})


def test_frozen_entries_are_what_a_gradient_of_the_next_does_not_need():
    vit = encoder("test_vit")
    freeze_encoder(vit, 3, norm_eval=True)
    vit(torch.rand(1, 3, 64, 64), ["map.2"])["map.2"].requires_grad_().sum().backward()
    assert all(parameter.grad is None for parameter in vit.parameters())
    vit(torch.rand(1, 3, 64, 64), ["map.-1"])["map.-1"].sum().backward()
    assert any(parameter.grad is not None for parameter in vit.parameters())


def test_norm_eval_keeps_all_statistics_and_trains_the_rest():
    cnn = encoder("test_resnet")
    still = freeze_encoder(cnn, False, norm_eval=True)
    assert all(parameter.requires_grad for parameter in cnn.parameters())
    assert len(still) == sum(isinstance(module, torch.nn.BatchNorm2d) for module in cnn.modules())


def test_freezing_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"freeze=9 .* has 5"):
        freeze_encoder(encoder("test_resnet"), 9, norm_eval=True)
