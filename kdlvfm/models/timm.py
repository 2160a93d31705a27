# SPDX-License-Identifier: Apache-2.0
"""Encoders of timm: CLIP, DINOv2, DINOv3, EUPE, SAM, SAM 2, SigLIP and every convolutional network it has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from kdlvfm.core.features import ModelCard, TapInfo
from kdlvfm.models.adapter import Adapter, Normalise
from kdlvfm.models.geometry import Fit, crop_to_image, fit_to_multiple
from kdlvfm.models.weights import UnknownModelError, WeightsError, fetch, read_weights, sha256_of, wrong_architecture

_OF_IMAGES = frozenset({"pooled", "logits", "logits_distilled"})
"""Taps that need the network to its end."""

_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}
"""The options with which timm's families lift the limit of one image size; each family has one or none."""


class TimmEncoder(Adapter):
    """Any timm model that has `forward_intermediates`, with its own normalisation and for images of any size.

    Taps: `map.<i>` (a ViT has one for each block, a hierarchical network one for each stage), `tokens` (a ViT's patch
    tokens after its final norm; for other networks the last map, flattened), `pooled` (what the classifier reads) and
    `logits` if the weights have a classifier. For CLIP, timm's classifier is the projection into the joint space. A
    DeiT with a distillation token also has that token's `logits_distilled`; its `logits` are the mean of both tokens'.

    Args:
        name: timm's name, with the tag of the weights if it is not the default one, for example
            `vit_small_patch16_dinov3.lvd1689m`.
        pretrained: weights of the hub; otherwise random weights.
        checkpoint: a weights file to use instead of the hub: safetensors, or a `torch.save` file of weights only, in
            timm's format or in any that timm converts. A classifier that is absent or of another size is left out.
        fit: how images meet the stride of the network, see `fit_to_multiple`.
        norm: pass each map through the final norm of a ViT, as DINOv2 and DINOv3 do for dense features (SAM: through
            its neck). `False` gives the output of each block as it is.
        model_kwargs: further arguments for `timm.create_model`; other statistics than the name implies go into
            `pretrained_cfg_overlay: {mean: [...], std: [...]}`.

    Raises:
        UnknownModelError: timm has no such model or weights; the message names the nearest.
        WeightsError: the weights cannot be fetched, read, or are another architecture's.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = True,
        checkpoint: str | Path | None = None,
        fit: Fit = "resize",
        norm: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if fit not in ("resize", "pad"):
            raise ValueError(f"fit must be 'resize' or 'pad', not {fit!r}.")
        self.net, self.card = _load(name, pretrained, checkpoint, dict(model_kwargs or {}))
        if norm and not isinstance(self.net, (VisionTransformer, Eva, VisionTransformerSAM)):
            raise ValueError(
                f"norm=True is for plain ViTs; {name} ({type(self.net).__name__}) has no norm for its maps."
            )
        data = resolve_model_data_config(self.net)  # type: ignore[no-untyped-call]
        self.normalise = Normalise(data["mean"], data["std"])
        self._fit: Fit = fit
        self._norm = norm
        self._taps = self._describe()
        self._stride = max(info.stride for info in self._taps.values() if info.stride is not None)

    def _describe(self) -> dict[str, TapInfo]:
        net: Any = self.net
        width = "num_chs_norm" if self._norm and isinstance(net, VisionTransformerSAM) else "num_chs"
        taps = {f"map.{i}": TapInfo(info[width], int(info["reduction"])) for i, info in enumerate(net.feature_info)}
        last = taps[f"map.{len(taps) - 1}"]
        taps["tokens"] = last
        taps["pooled"] = TapInfo(net.head_hidden_size, None)
        if net.num_classes > 0:
            taps["logits"] = TapInfo(net.num_classes, None)
            if isinstance(net, VisionTransformerDistilled):
                taps["logits_distilled"] = TapInfo(net.num_classes, None)
        return taps

    def taps(self) -> dict[str, TapInfo]:
        """Every portable tap; channels and strides are timm's own statements."""
        return dict(self._taps)

    def features(self, images: Tensor, taps: frozenset[str], *, complete: bool) -> dict[str, Tensor]:
        """See `Adapter.features`; stops after the last block that is needed."""
        net: Any = self.net
        size = (images.shape[-2], images.shape[-1])
        x = fit_to_multiple(self.normalise(images), self._stride, self._fit)
        grid = (x.shape[-2] // self._stride, x.shape[-1] // self._stride)
        last = sum(tap.startswith("map.") for tap in self._taps) - 1
        final_norm = isinstance(net, (VisionTransformer, Eva))
        wanted = {int(tap.removeprefix("map.")) for tap in taps if tap.startswith("map.")}
        if "tokens" in taps and not final_norm:
            wanted.add(last)

        to_the_end = complete or not taps.isdisjoint(_OF_IMAGES) or ("tokens" in taps and final_norm)
        order, options = sorted(wanted), {"norm": self._norm, "output_fmt": "NCHW"}
        end: Any = None
        maps: list[Tensor] = []
        if not order:
            end = net.forward_features(x)
        elif to_the_end:
            end, maps = net.forward_intermediates(x, indices=order, stop_early=False, **options)
        else:
            maps = net.forward_intermediates(x, indices=order, stop_early=True, intermediates_only=True, **options)

        found = {f"map.{i}": self._over_image(f"map.{i}", value, size) for i, value in zip(order, maps, strict=True)}
        if "tokens" in taps:
            if final_norm:
                patches = end[:, net.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
                tokens = self._over_image("tokens", patches, size)
            else:
                tokens = found[f"map.{last}"]
            found["tokens"] = tokens.flatten(2).transpose(1, 2)
        if complete or "pooled" in taps:
            found["pooled"] = net.forward_head(end, pre_logits=True)
        if complete or "logits" in taps:
            found["logits"] = net.forward_head(end)
        if "logits_distilled" in taps:
            found["logits_distilled"] = net.head_dist(net.head_drop(end[:, 1]))
        return found

    def _over_image(self, tap: str, x: Tensor, size: tuple[int, int]) -> Tensor:
        stride = self._taps[tap].stride
        return crop_to_image(x, size, stride) if self._fit == "pad" and stride is not None else x


def _load(
    name: str, pretrained: bool, checkpoint: str | Path | None, model_kwargs: dict[str, Any]
) -> tuple[nn.Module, ModelCard]:
    """The network with its weights, and its card."""
    _check_name(name)
    with torch.device("meta"):
        outline: Any = timm.create_model(name, **model_kwargs)
    config: dict[str, Any] = outline.pretrained_cfg
    if not hasattr(outline, "forward_intermediates"):
        raise ValueError(f"timm's {name} ({type(outline).__name__}) has no forward_intermediates, so no maps.")
    title = ".".join(filter(None, (config["architecture"], config.get("tag"))))
    accepted = _arguments(type(outline))
    model_kwargs = {**{key: value for key, value in _ANY_SIZE.items() if key in accepted}, **model_kwargs}
    if checkpoint is None and not pretrained:
        return timm.create_model(name, **model_kwargs), ModelCard(title, weights="random")

    if checkpoint is not None:
        path, weights, source = Path(checkpoint), "file", str(checkpoint)
    else:
        repo = config.get("hf_hub_id")
        if not repo:
            raise WeightsError(f"timm has no weights of {name} on the hub: pass checkpoint=PATH or pretrained=false.")
        filename = config.get("hf_hub_filename") or "model.safetensors"
        path, weights, source = fetch(repo, filename), "pretrained", f"hf-hub:{repo}/{filename}"
    state = read_weights(path)
    net = _create_with(name, state, config, model_kwargs)
    if net is None:
        raise wrong_architecture(path, name, outline.state_dict(), state)
    licence = config.get("license")
    if licence and weights == "file":
        licence = f"{licence} (of timm's {title}; not known of this file)"
    return net, ModelCard(title, weights, licence=licence, sha256=sha256_of(path), source=source)


def _arguments(network: type) -> set[str]:
    """Names of the arguments that a class takes, itself or by handing them on to its base."""
    names: set[str] = set()
    for base in network.__mro__:
        parameters = inspect.signature(base).parameters
        names |= parameters.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UnknownModelError("timm", name, timm.list_models())
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise UnknownModelError("timm", name, tags)


def _create_with(
    name: str, state: dict[str, Tensor], config: Mapping[str, Any], model_kwargs: dict[str, Any]
) -> nn.Module | None:
    """The network filled with `state` by timm's own conversion, every tensor accounted for; `None` if it does not fit.

    timm checks strictly only where the number of classes is the one in its configuration. So the configuration is given
    the number asked for or else timm's own; failing both, the classifier is left out and, if asked for, started anew.
    """
    kwargs = dict(model_kwargs)
    asked = kwargs.pop("num_classes", None)
    statistics = kwargs.pop("pretrained_cfg_overlay", {})
    classifier = config["classifier"] or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    headless = {key: value for key, value in state.items() if key.rpartition(".")[0] not in heads}
    configured = config["num_classes"]
    for classes, tensors in ((asked or configured, state), (configured, state), (0, headless)):
        overlay = {**statistics, "state_dict": tensors, "num_classes": classes}
        try:
            net: Any = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **kwargs
            )
        except Exception:  # timm's conversions take their own files for granted and fail in any way on others
            continue
        del net.pretrained_cfg["state_dict"]
        if asked is not None and asked != classes:
            net.reset_classifier(asked)
        return net  # type: ignore[no-any-return]
    return None
