# SPDX-License-Identifier: Apache-2.0
"""Dense heads on encoders."""

import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import TapError, Teacher
from kdlvfm.models.head import EncoderHead
from kdlvfm.models.timm import TimmEncoder


def resnet():
    return TimmEncoder("resnet18", pretrained=False)


def vit():
    return TimmEncoder("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", pretrained=False, model_kwargs={"depth": 2})


@pytest.mark.parametrize("encoder", [resnet, vit])
@pytest.mark.parametrize(("head", "finer"), [("linear", 1), ("pyramid", 4)])
def test_declared_facts_are_the_actual_ones(encoder, head, finer):
    model = EncoderHead(encoder(), 5, head, channels=32).eval()
    assert list(model.taps())[-2:] == ["decoder", "logits"]
    source = model.tap_info("map.-1")
    decoder = model.tap_info("decoder")
    assert (decoder.dim, decoder.stride) == (32 if head == "pyramid" else source.dim, source.stride // finer)
    for size in [(64, 96), (75, 101)]:
        with torch.no_grad():
            features = model(torch.rand(2, 3, *size), [*model.taps(), "map.-1"])
        assert features["logits"].shape == (2, 5, *size)
        assert features["map.-1"].shape[:2] == (2, source.dim)
        assert features["decoder"].shape == (2, decoder.dim, *(finer * side for side in features["map.-1"].shape[2:]))


def test_linear_head_is_batch_norm_and_a_1x1_convolution():
    model = EncoderHead(resnet(), 5, tap="map.2").eval()
    head = model.net["head"]
    torch.nn.init.normal_(head.norm.running_mean)
    torch.nn.init.uniform_(head.norm.running_var, 0.5, 2)
    with torch.no_grad():
        features = model(torch.rand(1, 3, 64, 64), ["map.2", "logits"])
        x = (features["map.2"] - head.norm.running_mean.view(-1, 1, 1)) / (head.norm.running_var + 1e-5).sqrt().view(
            -1, 1, 1
        )
        logits = torch.einsum("bchw,kc->bkhw", x, head.classifier.weight[:, :, 0, 0]) + head.classifier.bias.view(
            -1, 1, 1
        )
        resized = F.interpolate(logits, size=(64, 64), mode="bilinear")
    assert torch.allclose(features["logits"], resized, atol=1e-4)


def test_frozen_encoder_stays_as_it_is_while_the_head_trains():
    model = EncoderHead(resnet(), 3).train()
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(torch.rand(2, 3, 64, 64), ["logits"])["logits"].square().mean().backward()
        optimizer.step()
    assert not model.encoder.training
    assert model.net["head"].training
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())
    assert not model.net["head"].norm.running_mean.eq(0).all()


def test_unfrozen_encoder_trains():
    model = EncoderHead(resnet(), 3, "pyramid", freeze=False, channels=16).train()
    assert model.encoder.training
    model(torch.rand(2, 3, 64, 64), ["logits"])["logits"].square().mean().backward()
    unused = {"net.encoder.net.fc.weight", "net.encoder.net.fc.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is None} == unused


def test_only_what_is_asked_runs_and_the_teacher_can_pass_gradients_to_images():
    model = EncoderHead(vit(), 3)
    hook = model.net["head"].register_forward_hook(lambda *_: pytest.fail("the head ran"))
    assert list(model(torch.rand(1, 3, 32, 32), ["map.0"])) == ["map.0"]
    hook.remove()
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    Teacher(model)(images, ["logits"], input_grad=True)["logits"].square().sum().backward()
    assert images.grad.abs().sum() > 0


def test_state_round_trip_and_module_taps():
    first, second = EncoderHead(resnet(), 3).eval(), EncoderHead(resnet(), 3).eval()
    second.net.load_state_dict(first.net.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        taps = ["logits", "decoder", "module:head.norm"]
        one, two = first(images, taps), second(images, taps)
    assert all(torch.equal(one[tap], two[tap]) for tap in taps)
    assert torch.equal(one["decoder"], one["module:head.norm"])
    assert first.card.name == "resnet18.a1_in1k-linear"


@pytest.mark.parametrize("head", ["linear", "pyramid"])
def test_the_head_on_the_models_own_map_gives_its_logits(head):
    model = EncoderHead(vit(), 5, head, channels=32).eval()
    with torch.no_grad():
        features = model(torch.rand(2, 3, 75, 101), ["decoder", "logits"])
        assert model.head_taps == ("decoder",)
        assert torch.equal(model.apply_head(features, (75, 101))["logits"], features["logits"])
        other = torch.rand(1, model.tap_info("decoder").dim, 3, 7)
        assert model.apply_head({"decoder": other}, (40, 60))["logits"].shape == (1, 5, 40, 60)


def test_bad_arguments():
    with pytest.raises(TapError, match=r"map\.9"):
        EncoderHead(resnet(), 3, tap="map.9")
    with pytest.raises(ValueError, match="reads a map"):
        EncoderHead(resnet(), 3, tap="pooled")
    with pytest.raises(ValueError, match="head must be"):
        EncoderHead(resnet(), 3, "mlp")
    with pytest.raises(ValueError, match="stride 2"):
        EncoderHead(resnet(), 3, "pyramid", tap="map.0")
