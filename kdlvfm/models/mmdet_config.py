# SPDX-License-Identifier: Apache-2.0
"""Configurations of mmdet, read without running them: the `model` of a file, its base files merged in."""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class ConfigError(ValueError):
    """A configuration that cannot be found, read or used."""


def read_model_config(config: str | Path) -> dict[str, Any]:
    """The settings of a detector.

    Files of mmdet are Python, and mmengine would run them. Here they are read: literals, `dict(...)`, names assigned in
    the file, arithmetic, simple list comprehensions, `_base_` and `_delete_`, which is what the files that come with
    mmdet, and those that it writes into a work folder, consist of. Nothing in them is executed.

    Args:
        config: the name of a file that comes with mmdet, such as `gfl_r50_fpn_1x_coco`, or the path of one.

    Raises:
        ConfigError: there is no such configuration, or it holds something else.
    """
    model = _File(_locate(config)).value("model")
    if not isinstance(model, dict):
        raise ConfigError(f"{config} has no model.")
    return model


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` merged in as mmdet does: dicts one into the other, and `_delete_` replaces a dict.

    Raises:
        ConfigError: the changes are no settings.
    """
    if not isinstance(changes, Mapping):
        raise ConfigError(f"changes must be settings, such as {{neck: {{out_channels: 128}}}}, not {changes!r}.")
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, Mapping):
            replaces = value.get("_delete_", False) or not isinstance(before, Mapping)
            merged[key] = merge({} if replaces or not isinstance(before, Mapping) else before, value)
        elif key != "_delete_":
            merged[key] = value
    return merged


@cache
def bundled_configs() -> dict[str, Path]:
    """Every configuration that comes with mmdet, by name."""
    found = find_spec("mmdet")
    if found is None or found.origin is None:
        raise ConfigError("mmdet is not installed: pip install 'kdlvfm[mmdet]'.")
    folder = Path(found.origin).parent / ".mim" / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*/*.py"))}


def _locate(config: str | Path) -> Path:
    path = Path(config)
    if path.suffix == ".py" and path.is_file():
        return path
    bundled = bundled_configs()
    name = path.name.removesuffix(".py")
    if name in bundled and (path.name == str(config)):
        return bundled[name]
    near = difflib.get_close_matches(name, bundled, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else " mmdet's own are named like gfl_r50_fpn_1x_coco."
    raise ConfigError(f"there is no configuration {str(config)!r}, neither as a file nor in mmdet.{hint}")


class _File:
    """One file: the expressions assigned to names, evaluated when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as Python: {error}") from None
        self._assigned: dict[str, ast.expr] = {}
        self._others: list[ast.stmt] = []
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                self._assigned[statement.targets[0].id] = statement.value
            else:
                self._others.append(statement)
        bases = self._evaluate(self._assigned["_base_"]) if "_base_" in self._assigned else []
        self._bases = [_File(path.parent / base) for base in ([bases] if isinstance(bases, str) else bases)]

    def value(self, name: str) -> Any:
        """The value of a name here, merged into those of the base files; `None` where there is none."""
        inherited = next((found for base in self._bases if (found := base.value(name)) is not None), None)
        if name not in self._assigned:
            return inherited
        try:
            own = self._evaluate(self._assigned[name])
        except (LookupError, TypeError, ArithmeticError, RecursionError, StopIteration) as error:
            raise ConfigError(f"{self._path}: {name!r} has no value: {error!r}") from None
        used = self._used_by(self._assigned[name], {name})
        for statement in self._others:
            if used & _names(statement):
                raise self._refusal(statement)
        return merge(inherited, own) if isinstance(own, dict) and isinstance(inherited, dict) else own

    def _used_by(self, node: ast.expr, known: set[str]) -> set[str]:
        """`known` and every name that the value of an expression rests on."""
        for name in (_names(node) & self._assigned.keys()) - known:
            known = self._used_by(self._assigned[name], known | {name})
        return known

    def _evaluate(self, node: ast.expr, local: Mapping[str, Any] = MappingProxyType({})) -> Any:
        def evaluate(inner: ast.expr) -> Any:
            return self._evaluate(inner, local)

        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=items):
                return [evaluate(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(evaluate(item) for item in items)
            case ast.Dict(keys=keys, values=values):
                return {evaluate(k): evaluate(v) for k, v in zip(keys, values, strict=True) if k is not None}
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
                pairs = [(k.arg, evaluate(k.value)) for k in keywords]
                return {k: v for name, value in pairs for k, v in ([(name, value)] if name else value.items())}
            case ast.Call(func=ast.Name(id="range"), args=[end], keywords=[]):
                return range(evaluate(end))
            case ast.ListComp(elt=item, generators=[ast.comprehension(target=ast.Name(id=name), iter=values, ifs=[])]):
                return [self._evaluate(item, {**local, name: value}) for value in evaluate(values)]
            case ast.Name(id=name) if name in local:
                return local[name]
            case ast.Name(id=name) if name in self._assigned:
                return self._evaluate(self._assigned[name])
            case ast.Attribute(value=ast.Name(id="_base_"), attr=name):
                return next(found for base in self._bases if (found := base.value(name)) is not None)
            case ast.Attribute(value=inner, attr=name):
                return evaluate(inner)[name]
            case ast.Subscript(value=inner, slice=index):
                return evaluate(inner)[evaluate(index)]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -evaluate(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](evaluate(left), evaluate(right))
        raise self._refusal(node)

    def _refusal(self, node: ast.expr | ast.stmt) -> ConfigError:
        return ConfigError(
            f"{self._path}, line {node.lineno}: {ast.unparse(node).splitlines()[0][:60]!r} would have to be run, and "
            "settings are only read here: write the value in its place."
        )


def _names(node: ast.AST) -> set[str]:
    return {found.id for found in ast.walk(node) if isinstance(found, ast.Name)} - {"dict", "range"}
