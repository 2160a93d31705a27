# SPDX-License-Identifier: Apache-2.0
"""Networks of diffusers that make images: its U-Net, its diffusion transformer, and weights that it saved."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from kdlvfm.core.denoiser import Denoiser
from kdlvfm.core.diffusion import Betas, Schedule
from kdlvfm.core.features import ModelCard, TapInfo, resolve_tap
from kdlvfm.models.adapter import MODULE_TAP, captured, find_module
from kdlvfm.models.weights import WeightsError, read_weights, sha256_of, wrong_architecture

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CLASSES = {"UNet2DModel": UNet2DModel, "DiTTransformer2DModel": DiTTransformer2DModel}


class DiffusersModel(Denoiser):
    """A network of diffusers as a `Denoiser`.

    Taps: `noise`; `variance`, if the network has twice as many channels at its end as at its beginning; and the output
    of any sub-module as `module:<path>`.

    Args:
        net: a `UNet2DModel` or a `DiTTransformer2DModel` that was made for images without classes or text.
        name: for records.
        steps: T, of the noise it is for.
        betas: how strong that noise is at each step, see `Schedule.named`.

    Raises:
        ValueError: a schedule that is none, or channels that are no image's.
    """

    def __init__(self, net: nn.Module, name: str, *, steps: int, betas: Betas) -> None:
        super().__init__()
        config: Any = net.config
        channels, found = config.in_channels, config.out_channels or config.in_channels
        if channels not in (1, 3) or found not in (channels, 2 * channels):
            raise ValueError(
                f"{name} has {channels} channels and finds {found}: it must take 1 or 3 and find as many, or twice."
            )
        self.net = net
        self.card = ModelCard(name, "random")
        self.schedule = Schedule.named(betas, steps)
        self.state_shape = (channels, config.sample_size, config.sample_size)
        self._learns_variance = found == 2 * channels

    def taps(self) -> dict[str, TapInfo]:
        """`noise` and, where it is learned, `variance`."""
        names = ("noise", "variance") if self._learns_variance else ("noise",)
        return dict.fromkeys(names, TapInfo(self.state_shape[0], 1))

    def check_tap(self, tap: str) -> None:
        """Raise `TapError` if there is no such tap or sub-module."""
        if tap.startswith(MODULE_TAP):
            find_module(self.net, tap.removeprefix(MODULE_TAP))
        else:
            self.tap_info(tap)

    def forward(self, images: Tensor, taps: Collection[str], timesteps: Tensor | None = None) -> dict[str, Tensor]:
        """See `Denoiser.forward`.

        Raises:
            TapError: no such tap or sub-module.
            ValueError: images or states of another size.
        """
        paths = {tap: tap.removeprefix(MODULE_TAP) for tap in taps if tap.startswith(MODULE_TAP)}
        for tap in taps:
            if tap not in paths:
                resolve_tap(tap, self.taps(), self.card.name)
        if not taps:
            return {}
        if timesteps is None:
            images, timesteps = self.encode(images), images.new_zeros(len(images), dtype=torch.int64)
        if images.shape[1:] != self.state_shape:
            raise ValueError(f"{self.card.name} takes states {self.state_shape}, not {tuple(images.shape[1:])}.")
        with captured(self.net, paths.values()) as outputs:
            found = torch.split(self._run(images, timesteps), self.state_shape[0], dim=1)
        named = dict(zip(self.taps(), found, strict=True))
        return {tap: outputs[paths[tap]] if tap in paths else named[tap] for tap in taps}

    def _run(self, states: Tensor, timesteps: Tensor) -> Tensor:
        output: Tensor
        if isinstance(self.net, DiTTransformer2DModel):
            # Made for classes; without any, all images are of the first.
            (output,) = self.net(states, timesteps, torch.zeros_like(timesteps), return_dict=False)
        else:
            (output,) = self.net(states, timesteps, return_dict=False)
        return output


class UNet(DiffusersModel):
    """A convolutional network with skip connections, `UNet2DModel`, with random weights.

    Args:
        num_classes: of the data, which the network does not see.
        size: side of the images in pixels; divisible by 2 for each width but the first.
        channels: 1 for grey images, 3 for colours.
        widths: channels at each resolution, each half the one before; divisible by `norm_groups`.
        blocks: residual blocks at each resolution.
        attention: at which resolutions there is self-attention, by their place in `widths`.
        norm_groups: groups of each normalisation.
        steps: of the noise, T.
        betas: `"linear"` or `"cosine"`.
        learn_variance: find the variance of a step back too.
        dropout: of residual blocks.

    Raises:
        ValueError: a size that does not fit the widths, or widths that do not fit the groups.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        size: int,
        channels: int = 3,
        widths: Sequence[int] = (16, 32),
        blocks: int = 1,
        attention: Sequence[int] = (),
        norm_groups: int = 8,
        steps: int = 1000,
        betas: Betas = "cosine",
        learn_variance: bool = False,
        dropout: float = 0.0,
    ) -> None:
        del num_classes
        if size % 2 ** (len(widths) - 1):
            raise ValueError(f"images of {size} pixels cannot be halved {len(widths) - 1} times: choose fewer widths.")
        if any(width % norm_groups for width in widths):
            raise ValueError(f"widths {[*widths]} must be divisible by norm_groups={norm_groups}.")
        if strange := sorted(set(attention) - set(range(len(widths)))):
            raise ValueError(f"attention at {strange}: resolutions are 0 to {len(widths) - 1}.")
        there = ["Attn" if level in attention else "" for level in range(len(widths))]
        net = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=2 * channels if learn_variance else channels,
            block_out_channels=tuple(widths),
            layers_per_block=blocks,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in there),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(there)),
            add_attention=bool(attention),
            norm_num_groups=norm_groups,
            dropout=dropout,
        )
        super().__init__(net, f"unet-{'-'.join(map(str, widths))}", steps=steps, betas=betas)


class DiT(DiffusersModel):
    """A diffusion transformer, `DiTTransformer2DModel`, with random weights and without classes.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, ICCV 2023.

    Args:
        num_classes: of the data, which the network does not see.
        size: side of the images in pixels; divisible by `patch`.
        channels: 1 for grey images, 3 for colours.
        heads: of attention.
        head_dim: channels of each.
        depth: blocks.
        patch: side of a patch in pixels.
        steps: of the noise, T.
        betas: `"linear"` or `"cosine"`.
        learn_variance: find the variance of a step back too.

    Raises:
        ValueError: a size that does not fit the patch.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        size: int,
        channels: int = 3,
        heads: int = 2,
        head_dim: int = 24,
        depth: int = 3,
        patch: int = 2,
        steps: int = 1000,
        betas: Betas = "cosine",
        learn_variance: bool = False,
    ) -> None:
        del num_classes
        if size % patch:
            raise ValueError(
                f"images of {size} pixels are no whole number of patches of {patch}: choose another patch."
            )
        net = DiTTransformer2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=2 * channels if learn_variance else channels,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=depth,
            patch_size=patch,
            num_embeds_ada_norm=1,
        )
        for module in net.modules():
            # diffusers drops classes at random to train a network without them too; here there is only that one.
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0
        super().__init__(net, f"dit-{heads * head_dim}x{depth}", steps=steps, betas=betas)


class SavedModel(DiffusersModel):
    """A network from a folder that diffusers' `save_pretrained` wrote: `config.json` and weights as safetensors.

    Args:
        folder: where they are, for example the `unet` of a pipeline.
        steps: of the noise that it was trained for.
        betas: how strong that was.
        licence: of the weights, as you know it.

    Raises:
        WeightsError: the folder does not hold such a network.
    """

    def __init__(self, folder: str, *, steps: int = 1000, betas: Betas = "linear", licence: str | None = None) -> None:
        path, weights = Path(folder) / "config.json", Path(folder) / _WEIGHTS
        try:
            config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} is no description of a network of diffusers ({error}).") from None
        kind = config.get("_class_name")
        if kind not in _CLASSES:
            raise WeightsError(f"{path} describes {kind!r}; {' and '.join(_CLASSES)} are known.")
        net = _CLASSES[kind].from_config(dict(config))
        state, expected = read_weights(weights), net.state_dict()
        if {name: x.shape for name, x in state.items()} != {name: x.shape for name, x in expected.items()}:
            raise wrong_architecture(weights, kind, expected, state)
        net.load_state_dict(state)
        super().__init__(net, Path(folder).name, steps=steps, betas=betas)
        self.card = ModelCard(Path(folder).name, "file", licence, sha256_of(weights), str(weights))
