# SPDX-License-Identifier: Apache-2.0
"""What the adapters of all libraries share: normalisation, tap dispatch and the hooks behind `module:<path>`."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdlvfm.core.features import FeatureModel, TapError, TapInfo, resolve_tap

MODULE_TAP = "module:"


class Normalise(nn.Module):
    """(images - mean) / std for images in [0, 1]. The statistics are not saved: they belong to the architecture."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, same shape (B, 3, H, W)."""
        return (images - self.mean) / self.std


class Adapter(FeatureModel):
    """A `FeatureModel` whose subclass computes portable taps in `features`; hooks and names are handled here."""

    def tap_info(self, tap: str) -> TapInfo:
        """Facts about `tap`, without a forward pass.

        Raises:
            TapError: there is no such tap, or it is a `module:<path>`, whose shape no library states.
        """
        if tap.startswith(MODULE_TAP):
            find_module(self.net, tap.removeprefix(MODULE_TAP))
            raise TapError(
                f"{tap!r} is read with a hook, so its channels and stride are unknown before a forward pass: give the "
                "dimensions to the distiller explicitly, or use a named tap."
            )
        return super().tap_info(tap)

    def check_tap(self, tap: str) -> None:
        """Raise `TapError` if there is no such tap or sub-module."""
        if tap.startswith(MODULE_TAP):
            find_module(self.net, tap.removeprefix(MODULE_TAP))
        else:
            self.tap_info(tap)

    @abstractmethod
    def features(self, images: Tensor, taps: frozenset[str], *, complete: bool) -> dict[str, Tensor]:
        """Features of images in [0, 1] for canonical tap names.

        Args:
            images: (B, 3, H, W).
            taps: names among `taps()`; no more than these need to be computed.
            complete: run the network to its end, because a hook may wait anywhere.
        """

    def forward(self, images: Tensor, taps: Collection[str]) -> dict[str, Tensor]:
        """Features of `images` (B, 3, H, W) in [0, 1], one entry for each name in `taps`, keyed as asked.

        Outputs of `module:<path>` are handed over as they are, in the geometry the network saw.

        Raises:
            TapError: no such tap or sub-module.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), not {tuple(images.shape)}.")
        available = self.taps()
        hooks = {tap: tap.removeprefix(MODULE_TAP) for tap in taps if tap.startswith(MODULE_TAP)}
        names = {tap: resolve_tap(tap, available, self.card.name)[0] for tap in taps if tap not in hooks}
        if not names and not hooks:
            return {}
        with captured(self.net, hooks.values()) as outputs:
            features = self.features(images, frozenset(names.values()), complete=bool(hooks))
        idle = [path for path in hooks.values() if path not in outputs]
        if idle:
            raise TapError(f"{self.card.name}: no tensor came out of {', '.join(idle)} in this forward pass.")
        return {tap: outputs[hooks[tap]] if tap in hooks else features[names[tap]] for tap in taps}


def find_module(net: nn.Module, path: str) -> nn.Module:
    """The sub-module of `net` at a dotted `path`.

    Raises:
        TapError: there is none; the message names the nearest paths.
    """
    modules: dict[str, nn.Module] = dict(net.named_modules())
    if path and path in modules:
        return modules[path]
    near = difflib.get_close_matches(path, modules, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise TapError(f"{type(net).__name__} has no sub-module {path!r}.{hint}")


@contextmanager
def captured(net: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, the latest output tensor of the sub-modules of `net` at `paths`, by path."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            if isinstance(output, Tensor):
                outputs[path] = output

        return hook

    modules = {path: find_module(net, path) for path in paths}
    handles = [module.register_forward_hook(keep(path)) for path, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
