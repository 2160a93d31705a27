# SPDX-License-Identifier: Apache-2.0
"""CLIP through open_clip: equal to open_clip at the native size, any size, dense zero-shot logits."""

import pytest
import torch
from torch.nn import functional as F

open_clip = pytest.importorskip("open_clip")

from kdlvfm.models import open_clip as adapter  # noqa: E402
from kdlvfm.models.open_clip import OpenClipEncoder  # noqa: E402
from kdlvfm.models.weights import UnknownModelError, WeightsError  # noqa: E402

NAME, TAG, LABELS = "ViT-B-16-quickgelu", "openai", ["cat", "road", "sky"]


@pytest.fixture(scope="module")
def small():
    """open_clip's own CLIP, cut to two blocks a tower so that the tests are fast."""
    torch.manual_seed(0)
    clip = open_clip.create_model(NAME, load_weights=False)
    clip.visual.transformer.resblocks = clip.visual.transformer.resblocks[:2]
    clip.transformer.resblocks = clip.transformer.resblocks[:2]
    return clip.eval()


@pytest.fixture
def encoder(small, monkeypatch):
    monkeypatch.setattr(adapter.open_clip, "create_model", lambda *args, **kwargs: small)

    def build(**options):
        return OpenClipEncoder(NAME, TAG, pretrained=False, **options).eval()

    return build


def test_native_size_equals_open_clip(encoder, small):
    model = encoder()
    images = torch.rand(2, 3, 224, 224)
    config = open_clip.get_pretrained_cfg(NAME, TAG)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        features = model(images, ["pooled", "map.0", "map.-1", "tokens"])
        theirs = small.visual.forward_intermediates((images - mean) / std)
        assert torch.allclose(features["pooled"], small.encode_image((images - mean) / std), atol=1e-5)
        assert torch.allclose(features["map.0"], theirs["image_intermediates"][0], atol=1e-5)
        assert torch.allclose(features["map.-1"], theirs["image_intermediates"][1], atol=1e-5)
        tokens = small.visual.ln_post(features["map.-1"].flatten(2).transpose(1, 2))
        assert torch.allclose(features["tokens"], tokens, atol=1e-5)


@pytest.mark.parametrize("fit", ["resize", "pad"])
@pytest.mark.parametrize("size", [(64, 96), (75, 101), (224, 240)])
def test_declared_facts_are_the_actual_ones(encoder, fit, size):
    model = encoder(class_names=LABELS, fit=fit)
    assert list(model.taps()) == ["map.0", "map.1", "tokens", "pooled", "logits"]
    with torch.no_grad():
        features = model(torch.rand(1, 3, *size), list(model.taps()))
    grid = [-(-side // 16) if fit == "pad" else (side + 8) // 16 for side in size]
    assert features["map.1"].shape == (1, 768, *grid)
    assert features["tokens"].shape == (1, grid[0] * grid[1], 768)
    assert features["pooled"].shape == (1, 512)
    assert features["logits"].shape == (1, 3, *size)


def test_logits_are_cosines_with_the_class_names_over_temperature(encoder, small):
    model = encoder(class_names=LABELS, templates=["a {}.", "the {}."], temperature=0.1, dense="tokens")
    tokenizer = open_clip.get_tokenizer(NAME)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        rows = []
        for label in LABELS:
            prompts = F.normalize(small.encode_text(tokenizer([f"a {label}.", f"the {label}."])), dim=-1)
            rows.append(F.normalize(prompts.mean(0), dim=0))
        features = model(images, ["tokens", "logits"])
        patches = F.normalize(features["tokens"] @ small.visual.proj, dim=-1)
        expected = (patches @ torch.stack(rows).T / 0.1).transpose(1, 2).reshape(1, 3, 4, 6)
        expected = F.interpolate(expected, size=(64, 96), mode="bilinear")
    assert torch.allclose(features["logits"], expected, atol=1e-4)
    assert features["logits"].abs().max() <= 10


def test_values_equal_the_last_block_under_an_identity_attention_mask(encoder, small):
    model = encoder(class_names=LABELS, dense="values")
    x = torch.randn(1, 13, 768)
    block = small.visual.transformer.resblocks[-1]
    alone = torch.full((13, 13), float("-inf")).fill_diagonal_(0)
    with torch.no_grad():
        assert torch.allclose(adapter._attend_to_self(block, x), block(x, attn_mask=alone), atol=1e-5)
        images = torch.rand(1, 3, 64, 64)
        other = encoder(class_names=LABELS, dense="tokens")
        assert not torch.allclose(model(images, ["logits"])["logits"], other(images, ["logits"])["logits"])


def test_temperature_is_the_learned_one_by_default(encoder, small):
    assert encoder(class_names=LABELS)._temperature == pytest.approx(1 / small.logit_scale.exp().item())


def test_only_the_visual_tower_is_kept(encoder):
    model = encoder(class_names=LABELS)
    assert not any("token_embedding" in name for name, _ in model.named_parameters())
    assert "text" not in model.state_dict()


def test_checkpoints(small, encoder, tmp_path):
    torch.save(small.state_dict(), tmp_path / "clip.pt")
    model = OpenClipEncoder(NAME, TAG, checkpoint=tmp_path / "clip.pt")
    assert (model.card.weights, model.card.name) == ("file", f"{NAME}.{TAG}")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=f"does not fit {NAME}"):
        OpenClipEncoder(NAME, TAG, checkpoint=tmp_path / "other.pt")


def test_bad_arguments(encoder):
    with pytest.raises(UnknownModelError, match="ViT-B-16"):
        OpenClipEncoder("ViT-B-61")
    with pytest.raises(UnknownModelError, match="openai"):
        OpenClipEncoder(NAME, "openia")
    with pytest.raises(ValueError, match="templates"):
        encoder(class_names=LABELS, templates=["a photo"])
    with pytest.raises(ValueError, match="dense must be"):
        encoder(dense="keys")
