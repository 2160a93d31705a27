# SPDX-License-Identifier: Apache-2.0
"""Segmentation networks of segmentation_models_pytorch (SMP): an encoder of timm and a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from kdlvfm.core.align import resize_map
from kdlvfm.core.features import Features, ModelCard, TapInfo
from kdlvfm.models.adapter import Adapter
from kdlvfm.models.geometry import crop_to_image, fit_to_multiple
from kdlvfm.models.timm import TimmEncoder
from kdlvfm.models.weights import errors_only, read_weights, sha256_of, wrong_architecture

try:
    import segmentation_models_pytorch as smp
except ImportError as error:
    raise ImportError("SMP decoders need segmentation_models_pytorch: pip install 'kdlvfm[train]'.") from error

DECODERS: dict[str, type[nn.Module]] = {
    "deeplabv3": smp.DeepLabV3,
    "deeplabv3plus": smp.DeepLabV3Plus,
    "pspnet": smp.PSPNet,
    "fpn": smp.FPN,
    "unet": smp.Unet,
}


class SMPModel(Adapter):
    """A timm encoder with an SMP decoder; `net` is SMP's own class, so its `state_dict()` loads into plain SMP.

    Images of any size are padded with their mean colour at the right and the bottom to a multiple of the encoder's
    stride, and every result is cropped back. Taps: `map.<i>` (the encoder's pyramid in timm's order, with the strides
    that the decoder asked for), `decoder`, `logits` (in the size of the image) and `pooled` (mean of the last map).

    Args:
        name: timm's name of the encoder, for example `resnet18.a1_in1k`.
        decoder: `"deeplabv3"`, `"deeplabv3plus"`, `"pspnet"`, `"fpn"` or `"unet"`.
        num_classes: channels of `logits`.
        pretrained: weights of the hub for the encoder; otherwise random weights. The decoder starts at random.
        checkpoint: a weights file to use instead of the hub: timm's for the encoder, or one of the whole network.
        decoder_kwargs: further arguments for the SMP class.
        freeze: keep the encoder as it is: its parameters take no gradient and it stays in eval mode.

    Raises:
        UnknownModelError: timm has no such encoder.
        WeightsError: the weights cannot be fetched, read, or are another architecture's.
    """

    head_taps = ("decoder",)

    def __init__(
        self,
        name: str,
        decoder: str,
        num_classes: int,
        pretrained: bool = True,
        checkpoint: str | Path | None = None,
        decoder_kwargs: Mapping[str, Any] | None = None,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, not {decoder!r}.")
        build = {"encoder_name": f"tu-{name}", "classes": num_classes, **(decoder_kwargs or {})}
        whole = _whole_network(checkpoint)
        net: Any
        if whole is not None or (checkpoint is None and not pretrained):
            encoder = TimmEncoder(name, pretrained=False)
            net = DECODERS[decoder](encoder_weights=None, **build)
        else:
            encoder = TimmEncoder(name, checkpoint=checkpoint)
            overlay = {"state_dict": encoder.net.state_dict()}
            with errors_only("timm"):  # it would warn of the classifier's tensors, which an encoder has no use for
                net = DECODERS[decoder](encoder_weights=True, pretrained_cfg_overlay=overlay, **build)
            del net.encoder.model.pretrained_cfg["state_dict"]
        self.net = net
        self.card = replace(encoder.card, name=f"{encoder.card.name}-{decoder}")
        if whole is not None and checkpoint is not None:
            self._fill(whole, checkpoint)
        self.normalise = encoder.normalise
        self._taps = self._describe()
        self._stride = max(info.stride for info in self._taps.values() if info.stride is not None)
        self._freeze = freeze
        if freeze:
            net.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Training mode for the decoder, and for the encoder unless it is frozen."""
        super().train(mode)
        if self._freeze:
            self.net.get_submodule("encoder").eval()
        return self

    def _fill(self, state: dict[str, Tensor], path: str | Path) -> None:
        try:
            self.net.load_state_dict(state)
        except RuntimeError:
            raise wrong_architecture(path, self.card.name, self.net.state_dict(), state) from None
        self.card = ModelCard(self.card.name, "file", sha256=sha256_of(path), source=str(path))

    def _describe(self) -> dict[str, TapInfo]:
        net: Any = self.net
        pyramid = net.encoder.model.feature_info
        facts = zip(pyramid.channels(), pyramid.reduction(), strict=True)
        taps = {f"map.{i}": TapInfo(dim, int(stride)) for i, (dim, stride) in enumerate(facts)}
        classifier, upsampling = net.segmentation_head[0], net.segmentation_head[1]
        stride = 1 if isinstance(upsampling, nn.Identity) else int(upsampling.scale_factor)
        taps["pooled"] = TapInfo(taps[f"map.{len(taps) - 1}"].dim, None)
        taps["decoder"] = TapInfo(classifier.in_channels, stride)
        taps["logits"] = TapInfo(classifier.out_channels, 1)
        return taps

    def taps(self) -> dict[str, TapInfo]:
        """Every portable tap; channels and strides are timm's and SMP's own statements."""
        return dict(self._taps)

    def features(self, images: Tensor, taps: frozenset[str], *, complete: bool) -> dict[str, Tensor]:
        """See `Adapter.features`; the decoder runs only where it is needed."""
        net: Any = self.net
        size = (images.shape[-2], images.shape[-1])
        pyramid = net.encoder(fit_to_multiple(self.normalise(images), self._stride, "pad"))
        names = [tap for tap in self._taps if tap.startswith("map.")]
        found = dict(zip(names, pyramid[-len(names) :], strict=True))
        if complete or not taps.isdisjoint({"decoder", "logits"}):
            found["decoder"] = net.decoder(pyramid)
            found["logits"] = net.segmentation_head(found["decoder"])
        for tap, value in found.items():
            stride = self._taps[tap].stride
            found[tap] = value if stride is None else crop_to_image(value, size, stride)
        found["pooled"] = found[names[-1]].mean(dim=(2, 3))
        return found

    def apply_head(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """See `FeatureModel.apply_head`: the last convolution on a map of the tap `decoder`."""
        net: Any = self.net
        stride = self._taps["decoder"].stride
        assert stride is not None
        decoder = resize_map(features["decoder"], [-(-side // stride) for side in size])
        return {"logits": crop_to_image(net.segmentation_head(decoder), size, 1)}


def _whole_network(checkpoint: str | Path | None) -> dict[str, Tensor] | None:
    """The state in `checkpoint` if it is one of encoder and decoder together."""
    if checkpoint is None:
        return None
    state = read_weights(checkpoint)
    return state if any(key.startswith("segmentation_head.") for key in state) else None
