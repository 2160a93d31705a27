# SPDX-License-Identifier: Apache-2.0
"""CLIP's image encoder from open_clip, with dense zero-shot class logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlvfm.core.align import resize_map, tokens_to_map
from kdlvfm.core.features import ModelCard, TapInfo
from kdlvfm.models.adapter import Adapter, Normalise
from kdlvfm.models.geometry import Fit, crop_to_image, fit_to_multiple
from kdlvfm.models.weights import (
    UnknownModelError,
    WeightsError,
    errors_only,
    fetch,
    read_weights,
    sha256_of,
    wrong_architecture,
)

try:
    import open_clip
    from open_clip.transformer import VisionTransformer
except ImportError as error:
    raise ImportError("CLIP through open_clip needs another package: pip install 'kdlvfm[clip]'.") from error

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a photo of many {}.", "there is a {} in the scene.")
"""Default prompts. A class is the normalised mean of its normalised prompt embeddings (Radford et al., 2021)."""


class OpenClipEncoder(Adapter):
    """The vision transformer of a CLIP model, for images of any size; `net` is open_clip's visual tower.

    Taps: `map.<i>` (one for each block), `tokens` (patch tokens after the final norm), `pooled` (the image embedding,
    equal to `encode_image`) and, with `class_names`, dense `logits`: the cosine of each patch with each class name in
    the joint space, divided by `temperature`, in the size of the image.

    Args:
        name: open_clip's architecture, for example `ViT-B-16-quickgelu`.
        tag: open_clip's name of the weights.
        pretrained: weights of the hub; otherwise random weights.
        checkpoint: a weights file of the whole CLIP model to use instead of the hub.
        class_names: classes of `logits`, in the order of their indices.
        templates: prompts with one `{}` each, averaged over.
        temperature: divides the cosines; the learned temperature of the weights by default.
        dense: how patches enter the joint space. `"values"`: in the last block each patch attends to itself alone, so
            that its value stays its own (MaskCLIP: Zhou et al., Extract Free Dense Labels from CLIP, 2022).
            `"tokens"`: the ordinary output of the last block.
        fit: how images meet the patch size, see `fit_to_multiple`.

    Raises:
        UnknownModelError: open_clip has no such architecture or weights.
        WeightsError: the weights cannot be fetched, read, or are another architecture's.
        ValueError: the image encoder is not a plain CLIP vision transformer.
    """

    text: Tensor

    def __init__(
        self,
        name: str,
        tag: str = "openai",
        pretrained: bool = True,
        checkpoint: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = TEMPLATES,
        temperature: float | None = None,
        dense: Literal["values", "tokens"] = "values",
        fit: Fit = "resize",
    ) -> None:
        super().__init__()
        if dense not in ("values", "tokens"):
            raise ValueError(f"dense must be 'values' or 'tokens', not {dense!r}.")
        clip, self.card, config = _load(name, tag, pretrained, checkpoint)
        net = clip.visual
        if not isinstance(net, VisionTransformer) or net.attn_pool is not None or net.pool_type != "tok":
            raise ValueError(f"{name} has no class token to share a projection with its patches: use TimmEncoder.")
        self.net = net
        self.normalise = Normalise(config["mean"], config["std"])
        self._temperature = temperature if temperature is not None else float(clip.logit_scale.detach().exp()) ** -1
        self._dense = dense
        self._fit: Fit = fit
        self._stride = int(net.patch_size[0])
        width, depth = net.conv1.out_channels, len(net.transformer.resblocks)
        self._taps = {f"map.{i}": TapInfo(width, self._stride) for i in range(depth)}
        self._taps["tokens"] = TapInfo(width, self._stride)
        self._taps["pooled"] = TapInfo(net.output_dim, None)
        if class_names is not None:
            text = _embed_classes(clip, name, class_names, templates)
            self.register_buffer("text", text, persistent=False)
            self._taps["logits"] = TapInfo(len(class_names), 1)

    def taps(self) -> dict[str, TapInfo]:
        """Every portable tap with its facts."""
        return dict(self._taps)

    def features(self, images: Tensor, taps: frozenset[str], *, complete: bool) -> dict[str, Tensor]:
        """See `Adapter.features`; stops after the last block that is needed."""
        net: Any = self.net
        size = (images.shape[-2], images.shape[-1])
        x = fit_to_multiple(self.normalise(images), self._stride, self._fit)
        fitted = (x.shape[-2], x.shape[-1])
        grid = (fitted[0] // self._stride, fitted[1] // self._stride)
        x = self._embed(x, grid)

        blocks = net.transformer.resblocks
        last = len(blocks) - 1
        wanted = {int(tap.removeprefix("map.")) for tap in taps if tap.startswith("map.")}
        ends = complete or not taps.isdisjoint({"pooled", "tokens", "logits"})
        found: dict[str, Tensor] = {}
        for i, block in enumerate(blocks[: last + 1 if ends else max(wanted) + 1]):
            if i == last and "logits" in taps and self._dense == "values":
                found["logits"] = self._zero_shot(_attend_to_self(block, x), grid, fitted, size)
            x = block(x)
            if i in wanted:
                found[f"map.{i}"] = self._over_image(tokens_to_map(x[:, 1:], grid), size)
        if not ends:
            return found
        if "logits" in taps and self._dense == "tokens":
            found["logits"] = self._zero_shot(x, grid, fitted, size)
        x = net.ln_post(x)
        found["pooled"] = x[:, 0] @ net.proj
        found["tokens"] = self._over_image(tokens_to_map(x[:, 1:], grid), size).flatten(2).transpose(1, 2)
        return found

    def _embed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Class and patch tokens (B, 1 + N, D) with the positional embedding at this grid."""
        net: Any = self.net
        x = net.conv1(x).flatten(2).transpose(1, 2)
        positions = net.positional_embedding
        if grid != tuple(net.grid_size):
            native = tokens_to_map(positions[None, 1:], tuple(net.grid_size)).float()
            resized = F.interpolate(native, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
            positions = torch.cat([positions[:1], resized[0].to(positions.dtype)])
        x = torch.cat([net.class_embedding.expand(x.shape[0], 1, -1).to(x.dtype), x], dim=1)
        embedded: Tensor = net.ln_pre(net.patch_dropout(x + positions.to(x.dtype)))
        return embedded

    def _zero_shot(self, x: Tensor, grid: tuple[int, int], fitted: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Logits (B, K, H, W) of tokens (B, 1 + N, D): cosines with the class names over temperature."""
        net: Any = self.net
        patches = F.normalize(net.ln_post(x[:, 1:]) @ net.proj, dim=-1)
        logits = tokens_to_map(patches @ self.text.to(patches.dtype).T / self._temperature, grid)
        return crop_to_image(resize_map(logits, fitted if self._fit == "pad" else size), size, 1)

    def _over_image(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return crop_to_image(x, size, self._stride) if self._fit == "pad" else x


def _attend_to_self(block: Any, x: Tensor) -> Tensor:
    """The output of a residual attention block in which each token attends to itself alone."""
    attention: nn.MultiheadAttention = block.attn
    normed = block.ln_1(x)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    values = F.linear(normed, weight.chunk(3)[2], None if bias is None else bias.chunk(3)[2])
    x = x + block.ls_1(attention.out_proj(values))
    output: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return output


def _load(
    name: str, tag: str, pretrained: bool, checkpoint: str | Path | None
) -> tuple[Any, ModelCard, dict[str, Any]]:
    """The whole CLIP model with its weights, its card, and open_clip's configuration of the weights."""
    if name not in open_clip.list_models():
        raise UnknownModelError("open_clip", name, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise UnknownModelError("open_clip", f"{name} with the weights {tag}", tags)
    config = open_clip.get_pretrained_cfg(name, tag)
    with errors_only(""):
        clip = open_clip.create_model(name, load_weights=False, force_quick_gelu=config.get("quick_gelu", False))
    title = f"{name}.{tag}"
    if checkpoint is None and not pretrained:
        return clip, ModelCard(title, weights="random"), config
    if checkpoint is not None:
        path, weights, source = Path(checkpoint), "file", str(checkpoint)
    else:
        repo, filename = config["hf_hub"].rpartition("/")[::2]
        if not repo:
            raise WeightsError(
                f"open_clip has no weights {title} on the hub: pass checkpoint=PATH or pretrained=false."
            )
        filename = filename or "open_clip_model.safetensors"
        path, weights, source = fetch(repo, filename), "pretrained", f"hf-hub:{repo}/{filename}"
    state = read_weights(path)
    try:
        open_clip.load_checkpoint(clip, str(path))
    except (RuntimeError, KeyError):
        raise wrong_architecture(path, name, clip.state_dict(), state) from None
    return clip, ModelCard(title, weights, sha256=sha256_of(path), source=source), config


@torch.no_grad()
def _embed_classes(clip: Any, name: str, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit embeddings (K, D) of the class names."""
    if not class_names or not templates or any("{}" not in template for template in templates):
        raise ValueError("zero-shot logits need class names, and templates with {} where the name goes.")
    tokenizer = open_clip.get_tokenizer(name)
    clip.eval()
    rows = [
        clip.encode_text(tokenizer([template.format(label) for template in templates]), normalize=True).mean(dim=0)
        for label in class_names
    ]
    return F.normalize(torch.stack(rows), dim=-1)
