# SPDX-License-Identifier: Apache-2.0
"""The objects that a configuration names, and which of them one read from a run folder may name."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdlvfm.cli import CommandError

# Where a configuration that was read from a run folder may name classes: what a student and its data are made of.
_TRUSTED = re.compile(r"(?P<module>kdlvfm\.(models|data|tasks)\.\w+)\.(?P<name>\w+)")

_GETTER = "hydra.utils.get_class"
_UNKNOWN = re.compile(r"(?P<name>\w+)(\.\w+)?\(\) got an unexpected keyword argument '(?P<argument>\w+)'")


def instantiate(node: Mapping[str, Any], **keywords: Any) -> Any:
    """Build the object that a node names.

    Raises:
        CommandError: with the message of the error inside.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate
    from omegaconf import OmegaConf

    try:
        return hydra_instantiate(OmegaConf.create(dict(node)), _convert_="all", **keywords)
    except InstantiationException as error:
        cause: BaseException = error
        # Hydra says what it could not import, and keeps what was missing in there for the cause.
        while type(cause) in (InstantiationException, ImportError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ModuleNotFoundError):
            raise cause from error
        if isinstance(cause, ValueError | TypeError | OSError | InstantiationException):
            raise CommandError(explained(cause, node)) from error
        raise cause from error


def instantiate_with(node: Mapping[str, Any], *given: Any, **keywords: Any) -> Any:
    """Build the object that a node names, of things that no configuration holds.

    Raises:
        CommandError: with the message of the error inside.
    """
    try:
        return instantiate({**node, "_partial_": True})(*given, **keywords)
    except (ValueError, TypeError) as error:
        raise CommandError(explained(error, node)) from error


def explained(error: BaseException, node: Mapping[str, Any]) -> str:
    """What an error in building `node` says; of an argument that its class does not take, what it does take."""
    found = _UNKNOWN.match(str(error))
    for target in _targets(node, through=_GETTER) if found else ():
        built = target_of({"_target_": target.removesuffix(".from_context")})
        # For boxes a class may give one of its module that is meant for them.
        other = vars(importlib.import_module(built.__module__)).get(found["name"]) if found else None
        built = other if isinstance(other, type) else built
        classes = inspect.getmro(built) if isinstance(built, type) else (built,)
        if found and found["name"] in {one.__name__ for one in classes}:
            taken = {name: None for one in classes if one is not object for name in _arguments(one)}
            near = difflib.get_close_matches(found["argument"], taken, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"It takes {', '.join(taken)}."
            return f"{built.__name__} takes no {found['argument']!r}. {hint}"
    return one_line(error)


def _arguments(built: Callable[..., Any]) -> list[str]:
    """Names that can be given to a class or a function."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, one in inspect.signature(built).parameters.items() if one.kind not in variadic]


def target_of(node: Mapping[str, Any]) -> Any:
    """The class or function that a node names, which is not called.

    Raises:
        CommandError: there is none of that name.
        ModuleNotFoundError: it needs a package that is not installed.
    """
    module, _, name = str(node["_target_"]).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise CommandError(f"_target_={node['_target_']} cannot be found ({error}).") from error


def check_targets(config: Any, origin: Path, trusted: Collection[str] = ()) -> None:
    """Raise if a configuration read from a run folder names anything but classes of this library to call.

    What our modules import is not meant: `kdlvfm.data.files.io.open` would be a way to any function there is.

    Args:
        config: the configuration, or a part of it.
        origin: the file that it was read from.
        trusted: functions that may be called besides.

    Raises:
        CommandError: naming the target.
    """
    for target in _targets(config):
        if target not in trusted and not _is_own_class(target):
            raise CommandError(f"{origin} asks to call {target!r}, which is no class of kdlvfm; it was not loaded.")


def _is_own_class(target: str) -> bool:
    found = _TRUSTED.fullmatch(target)
    if found is None or importlib.util.find_spec(found["module"]) is None:
        return False
    named = vars(importlib.import_module(found["module"])).get(found["name"])
    return isinstance(named, type) and named.__module__ == found["module"]


def _targets(node: Any, through: str | None = None) -> Iterator[str]:
    """What a configuration asks to call, and instead of the target `through` what it gets from its `path`."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                yield str(node["path"] if value == through else value)
            else:
                yield from _targets(value, through)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value, through)


def one_line(error: BaseException) -> str:
    """The message without Hydra's and OmegaConf's further lines, which repeat the key in other words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type", "See https"))]
    return " ".join(kept) or type(error).__name__
