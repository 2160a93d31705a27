# SPDX-License-Identifier: Apache-2.0
"""Weights files: fetched from the hub, read without executing anything, compared with what a network expects."""

from __future__ import annotations

import difflib
import hashlib
import logging
import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import Self

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state", "model")


class WeightsError(ValueError):
    """Weights that cannot be fetched, read or used."""


class UnknownModelError(ValueError):
    """A model name that its library does not have."""

    def __init__(self, library: str, name: str, known: Collection[str]) -> None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(known)[:5])} and others."
        super().__init__(f"{library} has no model {name!r}; {hint}")


def fetch(repo: str, filename: str) -> Path:
    """A file of a Hugging Face repository, from the local cache or, failing that, from the hub.

    Raises:
        WeightsError: it is not in the cache and the hub does not hand it out.
    """
    cached = try_to_load_from_cache(repo, filename)
    if isinstance(cached, str):
        return Path(cached)
    remedy = (
        f"Fetch {filename} of {repo} elsewhere and pass checkpoint=PATH, or build random weights with pretrained=false."
    )
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        _probe(hf_hub_url(repo, filename))
        return Path(hf_hub_download(repo, filename))
    except (OSError, HfHubHTTPError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"cannot fetch the weights from the hub ({cause}). {remedy}") from None


def _probe(url: str) -> None:
    """One attempt to reach `url`: the hub's own client retries for half a minute before it says that it cannot."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=10):  # the scheme is the hub's own https
            pass
    except HTTPError:
        pass  # The hub answers: its client knows the token and has the better message.


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, or in a file of `torch.save`, such as a checkpoint of a training.

    The usual wrappings are taken off: a `state_dict` or `model` entry, and the prefix of DistributedDataParallel. What
    else there is beside the weights is passed over, and nothing of it can execute.

    Raises:
        WeightsError: there is no such file, it cannot be read as weights only, or it holds no state dict.
    """
    path = Path(path)
    content: Any
    strange = (
        f"checkpoint {path} is not a file of weights only: what it holds is not opened, since it could run code. Where "
        "you trust it, save its state_dict() alone, with torch.save or as safetensors."
    )
    others: list[str] = []
    if not path.is_file():
        raise WeightsError(f"checkpoint {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            others = _other_classes(path)
            with torch.serialization.safe_globals([(_Inert, name) for name in others]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(strange) from None
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        raise WeightsError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(strange if others else f"checkpoint {path} holds no state dict (names to tensors).")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _other_classes(path: Path) -> list[str]:
    """What a file names that is neither tensor nor plain value, such as the classes of the log of a training."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # it is of a torch before 1.6, or not of torch at all
        return []


class _Inert:
    """Stands in for whatever a file names beside its weights: any object can be made, and it is always an empty one."""

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def sha256_of(path: str | Path) -> str:
    """Checksum of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def wrong_architecture(
    path: str | Path, name: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> WeightsError:
    """The error for a checkpoint that does not fit the network `name`, with what differs and examples."""
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    differences = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": shapes,
    }
    parts = [f"{len(keys)} {kind}{_examples(keys)}" for kind, keys in differences.items()]
    return WeightsError(f"checkpoint {path} does not fit {name}: of its tensors {', '.join(parts)}.")


@contextmanager
def errors_only(logger: str) -> Iterator[None]:
    """Silence a library's warnings about weights while a network is built that is filled, and checked, by us."""
    source = logging.getLogger(logger)
    level = source.level
    source.setLevel(logging.ERROR)
    try:
        yield
    finally:
        source.setLevel(level)


def _examples(keys: Iterable[str]) -> str:
    shown = list(keys)[:3]
    return f" ({', '.join(shown)}, ...)" if shown else ""
