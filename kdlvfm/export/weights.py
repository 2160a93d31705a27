# SPDX-License-Identifier: Apache-2.0
"""Weights that load into the library whose network they are of, and the three lines of Python that do it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

TARGET = "_target_"
"""Key of a dotted name to call, in arguments that are calls themselves."""


@dataclass(frozen=True)
class Network:
    """A network whose weights are written, and what builds it anew.

    Attributes:
        file: name of the file of weights.
        net: the network.
        target: dotted name of the function or class that builds it.
        arguments: what to call it with, plain values; a mapping with the key `_target_` is a call.
        holder: path from what `target` gives to the network; empty where that is it.
        about: what it is, for people.
    """

    file: str
    net: nn.Module = field(repr=False)
    target: str
    arguments: Mapping[str, Any]
    holder: str = ""
    about: str = ""

    def lines(self) -> tuple[str, str, str]:
        """Three lines of Python: imports, the network, its weights; the working folder is that of the file."""
        whole = {TARGET: self.target, **self.arguments}
        modules = sorted({target.rpartition(".")[0] for target in _targets(whole)})
        name = "model" if self.holder else "net"
        return (
            f"import safetensors.torch, {', '.join(modules)}",
            f"{name} = {_source(whole)}.eval()",
            f'{name}{self.holder}.load_state_dict(safetensors.torch.load_file("{self.file}"))',
        )


def write_weights(network: Network, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write the state of a network under its own names, as safetensors.

    Args:
        network: what to write.
        folder: where.
        metadata: stands in the file, as text or JSON, beside what builds the network.
    """
    from safetensors.torch import save_model

    stated = {"target": network.target, "arguments": network.arguments, "load": "\n".join(network.lines()), **metadata}
    save_model(network.net, str(folder / network.file), {"format": "pt", **as_text(stated)})


def as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as files hold them: text as it is, everything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def _source(value: Any) -> str:
    """A value, or a call, as Python."""
    if isinstance(value, Mapping):
        if TARGET in value:
            arguments = (f"{key}={_source(item)}" for key, item in value.items() if key != TARGET)
            return f"{value[TARGET]}({', '.join(arguments)})"
        return "{" + ", ".join(f"{key!r}: {_source(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_source, value)) + "]"
    return repr(value)


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if TARGET in value:
            yield value[TARGET]
        for item in value.values():
            yield from _targets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _targets(item)
