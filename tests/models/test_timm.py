# SPDX-License-Identifier: Apache-2.0
"""timm encoders: declared facts, normalisation, geometry, prefix tokens, weights."""

import math
import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from timm.data.config import resolve_model_data_config
from torchvision.transforms.functional import to_tensor

from kdlvfm.core import TapError, Teacher
from kdlvfm.core.align import resize_map
from kdlvfm.models import timm as adapter
from kdlvfm.models.timm import TimmEncoder
from kdlvfm.models.weights import UnknownModelError, WeightsError

VITS = [
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_large_patch14_clip_quickgelu_224.openai",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_large_patch16_dinov3.lvd1689m",
    "vit_7b_patch16_dinov3.lvd1689m",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "samvit_base_patch16.sa1b",
    "vit_base_patch16_siglip_224.v2_webli",
    "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
]
HIERARCHIES = [
    "sam2_hiera_tiny.fb_r896_2pt1",
    "sam2_hiera_small.fb_r896_2pt1",
    "sam2_hiera_base_plus.fb_r896_2pt1",
    "sam2_hiera_large.fb_r1024_2pt1",
    "convnext_tiny.dinov3_lvd1689m",
    "convnext_large.dinov3_lvd1689m",
    "swin_tiny_patch4_window7_224",
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "convnext_atto",
]
RUN = {
    "vit_base_patch16_clip_quickgelu_224.openai": {"depth": 2},
    "vit_small_patch16_dinov3.lvd1689m": {"depth": 2},
    "vit_small_patch14_reg4_dinov2.lvd142m": {"depth": 2},
    "samvit_base_patch16.sa1b": {"depth": 3},
    "vit_base_patch16_siglip_224.v2_webli": {"depth": 2},
    "sam2_hiera_tiny.fb_r896_2pt1": {},
    "convnext_atto": {},
    "resnet18": {},
    "mobilenetv2_100": {},
}
SIZES = [(64, 96), (75, 101), (224, 224)]


def build(name, **options):
    return TimmEncoder(name, pretrained=False, **options).eval()


def expected_shape(encoder, tap, size, fit):
    info = encoder.tap_info(tap)
    if info.stride is None:
        return (2, info.dim)
    multiple = max(i.stride for i in encoder.taps().values() if i.stride)
    if fit == "pad":
        grid = [math.ceil(side / info.stride) for side in size]
    else:
        grid = [max(1, math.floor(side / multiple + 0.5)) * multiple // info.stride for side in size]
    return (2, grid[0] * grid[1], info.dim) if tap == "tokens" else (2, info.dim, *grid)


@pytest.mark.parametrize(
    ("name", "fit"), [*((name, "resize") for name in VITS + HIERARCHIES), *((name, "pad") for name in RUN)]
)
def test_declared_facts_are_the_actual_ones_at_full_size(name, fit):
    with torch.device("meta"):
        encoder = build(name, fit=fit)
        for size in SIZES:
            features = encoder(torch.empty(2, 3, *size), list(encoder.taps()))
            assert {tap: tuple(x.shape) for tap, x in features.items()} == {
                tap: expected_shape(encoder, tap, size, fit) for tap in encoder.taps()
            }


@pytest.mark.parametrize("name", RUN)
def test_real_forward_agrees_with_timm(name):
    torch.manual_seed(0)
    encoder = build(name, model_kwargs=RUN[name])
    stride = encoder.tap_info("map.-1").stride
    images = torch.rand(2, 3, 2 * stride, 3 * stride)
    with torch.no_grad():
        features = encoder(images, list(encoder.taps()))
        normalised = encoder.normalise(images)
        end = encoder.net.forward_features(normalised)
        maps = encoder.net.forward_intermediates(normalised, intermediates_only=True)
        assert torch.allclose(features["pooled"], encoder.net.forward_head(end, pre_logits=True), atol=1e-5)
        for i, value in enumerate(maps):
            assert torch.allclose(features[f"map.{i}"], value, atol=1e-5)
        if "logits" in features:
            assert torch.allclose(features["logits"], encoder.net(normalised), atol=1e-5)
        for odd in [(75, 101), (33, 70)]:
            assert all(x.isfinite().all() for x in encoder(torch.rand(1, 3, *odd), ["map.-1", "pooled"]).values())


@pytest.mark.parametrize("name", [*RUN, "eva02_base_patch16_clip_224"])
def test_normalisation_is_that_of_timms_transform(name):
    encoder = build(name, model_kwargs=RUN.get(name, {"depth": 1}))
    config = resolve_model_data_config(encoder.net)
    picture = Image.effect_noise((48, 48), 80).convert("RGB")
    transform = create_transform((3, 48, 48), mean=config["mean"], std=config["std"], crop_pct=1.0)
    assert torch.allclose(encoder.normalise(to_tensor(picture)), transform(picture), atol=1e-6)
    assert config["mean"] == timm.models.get_pretrained_cfg(name).mean


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_prefix_tokens_do_not_leak(name):
    encoder = build(name, model_kwargs={"depth": 1}, norm=True)
    patch = encoder.tap_info("tokens").stride
    images = torch.rand(2, 3, 3 * patch, 5 * patch)
    with torch.no_grad():
        features = encoder(images, ["tokens", "map.-1"])
        whole = encoder.net.forward_features(encoder.normalise(images))
    prefix = encoder.net.num_prefix_tokens
    assert prefix == 5
    assert whole.shape[1] == prefix + 15
    assert torch.equal(features["tokens"], whole[:, prefix:])
    assert torch.allclose(features["map.-1"].flatten(2).transpose(1, 2), features["tokens"], atol=1e-6)


def test_norm_passes_sams_maps_through_its_neck_and_is_refused_elsewhere():
    encoder = build("samvit_base_patch16", model_kwargs={"depth": 3}, norm=True)
    with torch.no_grad():
        features = encoder(torch.rand(1, 3, 64, 64), ["map.-1", "tokens"])
    assert encoder.tap_info("map.-1").dim == 256
    assert features["map.-1"].shape == (1, 256, 4, 4)
    assert features["tokens"].shape == (1, 16, 256)
    with pytest.raises(ValueError, match="plain ViTs"):
        build("resnet18", norm=True)


def test_only_the_blocks_that_are_needed_run():
    encoder = build("vit_small_patch16_dinov3", model_kwargs={"depth": 4})
    ran = []
    for i, block in enumerate(encoder.net.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        encoder(torch.rand(1, 3, 32, 32), ["map.1", "map.0"])
    assert ran == [0, 1]
    assert encoder(torch.rand(1, 3, 32, 32), []) == {}


def test_a_map_covers_the_image_it_was_given():
    # A bright quadrant must light the same quadrant of the map, whatever the size and the fit.
    encoder = build("resnet18")
    for size in [(130, 170), (128, 192)]:
        images = torch.zeros(1, 3, *size)
        images[..., : size[0] // 2, : size[1] // 2] = 1
        with torch.no_grad():
            bright, dark = encoder(images, ["map.0"])["map.0"], encoder(images * 0, ["map.0"])["map.0"]
        lit = (bright - dark).abs().sum(1)[0] > 1e-4
        rows, columns = lit.any(1).nonzero().max().item() + 1, lit.any(0).nonzero().max().item() + 1
        assert abs(rows / lit.shape[0] - 0.5) < 0.06
        assert abs(columns / lit.shape[1] - 0.5) < 0.06


def test_gradients_reach_images_and_parameters():
    encoder = build("resnet18")
    images = torch.rand(1, 3, 40, 40, requires_grad=True)
    Teacher(encoder)(images, ["map.2"], input_grad=True)["map.2"].sum().backward()
    assert images.grad.abs().sum() > 0
    assert encoder.net.conv1.weight.grad is None


def test_random_weights_say_so():
    card = build("resnet18").card
    assert (card.name, card.weights, card.licence, card.sha256) == ("resnet18.a1_in1k", "random", None, None)


def test_the_licence_of_a_file_is_not_claimed_to_be_known(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "w.safetensors")
    card = TimmEncoder("resnet18.tv_in1k", checkpoint=tmp_path / "w.safetensors").card
    assert (card.weights, card.licence) == ("file", "bsd-3-clause (of timm's resnet18.tv_in1k; not known of this file)")


def test_hub_weights_are_fetched_as_timm_states_them(monkeypatch, tmp_path):
    source = timm.create_model("resnet18")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    asked = []
    monkeypatch.setattr(adapter, "fetch", lambda *args: asked.append(args) or tmp_path / "w.safetensors")
    encoder = TimmEncoder("resnet18.tv_in1k")
    assert asked == [("timm/resnet18.tv_in1k", "model.safetensors")]
    assert encoder.card.weights == "pretrained"
    assert encoder.card.licence == "bsd-3-clause"
    assert encoder.card.source == "hf-hub:timm/resnet18.tv_in1k/model.safetensors"
    assert all(torch.equal(a, b) for a, b in zip(encoder.net.parameters(), source.parameters(), strict=True))
    assert "state_dict" not in encoder.net.pretrained_cfg


def test_checkpoint_in_half_precision_and_without_classifier(tmp_path):
    source = timm.create_model("resnet18")
    state = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items() if "fc." not in k}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    encoder = TimmEncoder("resnet18", checkpoint=tmp_path / "w.pth")
    assert "logits" not in encoder.taps()
    assert encoder.net.conv1.weight.dtype == torch.float32
    assert torch.equal(encoder.net.conv1.weight, source.conv1.weight.half().float())
    again = TimmEncoder("resnet18", checkpoint=tmp_path / "w.pth", model_kwargs={"num_classes": 7})
    assert again.tap_info("logits").dim == 7


def test_a_classifier_of_the_size_asked_for_is_loaded(tmp_path):
    source = timm.create_model("resnet18", num_classes=9)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    options = {"num_classes": 9, "pretrained_cfg_overlay": {"mean": (0.5,) * 3}}
    encoder = TimmEncoder("resnet18", checkpoint=tmp_path / "w.safetensors", model_kwargs=options)
    assert torch.equal(encoder.net.fc.weight, source.fc.weight)
    assert encoder.normalise.mean.flatten().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.data
@pytest.mark.skipif("KDLVFM_DATA" not in os.environ, reason="needs KDLVFM_DATA")
@pytest.mark.parametrize(
    ("name", "classes", "options"),
    [
        ("resnet18", 1000, {}),
        ("vit_tiny_patch16_224", 200, {"num_classes": 200}),
        (
            "mobilenetv2_100",
            1000,
            {"pad_type": "same", "pretrained_cfg_overlay": {"mean": (0.5,) * 3, "std": (0.5,) * 3}},
        ),
    ],
)
def test_real_weights_give_confident_predictions(name, classes, options):
    path = Path(os.environ["KDLVFM_DATA"]) / "weights" / f"{name}.safetensors"
    encoder = TimmEncoder(name, checkpoint=path, model_kwargs=options).eval()
    images = torch.stack([to_tensor(Image.fromarray(load_sample_image(f"{x}.jpg"))) for x in ("china", "flower")])
    with torch.no_grad():
        probabilities = encoder(resize_map(images, (224, 224)), ["logits"])["logits"].softmax(-1)
    assert probabilities.shape == (2, classes)
    assert probabilities.amax(-1).min() > 20 / classes
    assert probabilities[0].argmax() != probabilities[1].argmax()


def test_checkpoint_in_the_authors_format_is_converted_by_timm(tmp_path):
    options = {"depth": 1}
    source = timm.create_model("samvit_base_patch16", **options)
    official = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in source.state_dict().items()}
    official["mask_decoder.iou_token.weight"] = torch.zeros(1, 256)
    torch.save(official, tmp_path / "sam.pth")
    encoder = TimmEncoder("samvit_base_patch16", checkpoint=tmp_path / "sam.pth", model_kwargs=options)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in encoder.net.state_dict().items())


def test_checkpoint_of_another_architecture_is_refused_with_counts(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"does not fit resnet34: .*96 missing \(layer1.2.conv1.weight") as error:
        TimmEncoder("resnet34", checkpoint=tmp_path / "w.safetensors")
    assert "\n" not in str(error.value)
    # The classifier may be missing, but nothing else may be: no silent half-random network.
    with pytest.raises(WeightsError, match="missing"):
        TimmEncoder("resnet34", checkpoint=tmp_path / "w.safetensors", model_kwargs={"num_classes": 0})


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet81", "resnet18"), ("vit_small_patch16_dinov3.lvd", "dinov3.lvd1689m"), ("qqqq", "others")],
)
def test_unknown_names_are_refused_with_near_ones(name, near):
    with pytest.raises(UnknownModelError, match=near):
        TimmEncoder(name)


def test_wrong_arguments_and_taps():
    with pytest.raises(ValueError, match="fit must be"):
        TimmEncoder("resnet18", pretrained=False, fit="crop")
    encoder = build("resnet18")
    with pytest.raises(TapError, match=r"map\.4"):
        encoder.tap_info("map.5")
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        encoder(torch.rand(3, 32, 32), ["map.0"])
