# SPDX-License-Identifier: Apache-2.0
"""Distillers made of others: `distiller=kd+cwd`, `distiller=data_free:kd@pool`, and what these are short for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdlvfm.cli import CommandError

PART = "distiller@distiller.parts."
SYNTHESIZER = "synthesizer@distiller.synthesizer"
_PLAIN = "compose"
_DATA_FREE = "data_free"

Defaults = Callable[[str], Mapping[str, str]]
"""Name of a distiller's YAML file -> the parts that it names itself, part -> method; none if it takes none."""


def names_in(choice: str) -> list[str]:
    """The distillers in a choice: `kd` of kd, `kd+cwd` of compose, kd and cwd, `sckd:kd+cwd` of sckd, kd and cwd.

    What a record calls a method in two stages has those of both: `kd after fitnet`, `after fitnet`.
    """
    second, stages, first = choice.rpartition("after ")
    if stages:
        return [*(names_in(second.strip()) if second else []), *names_in(first)]
    wrapper, colon, parts = choice.partition("@")[0].rpartition(":")
    if colon:
        return [wrapper, *parts.split("+")]
    return [_PLAIN, *parts.split("+")] if "+" in parts else [parts]


def synthesizer_in(choice: str) -> str | None:
    """The synthesiser in a choice: `pool` of `data_free:kd@pool`."""
    return choice.partition("@")[2] if "@" in choice else None


def check_composite(choice: str, defaults: Defaults) -> None:
    """Raise for a choice whose names exist and do not fit together.

    Raises:
        CommandError: the wrapper takes no parts, or no synthesiser, or two parts have one name.
    """
    wrapper, *parts = names_in(choice)
    if synthesizer_in(choice) is not None:
        _check_synthesizer(choice, wrapper)
    if parts and not defaults(wrapper):
        raise CommandError(f"{choice}: {wrapper} takes no parts; write sckd:kd+cwd, or kd+cwd for a weighted sum.")
    twice = sorted({part for part in parts if parts.count(part) > 1})
    if twice:
        raise CommandError(
            f"{choice} has {twice[0]} twice: give the parts names, distiller={wrapper} {PART}a={twice[0]} "
            f"{PART}b={twice[0]}, and set distiller.parts.a.student_tap=... and so on."
        )


def _check_synthesizer(what: str, wrapper: str) -> None:
    if wrapper != _DATA_FREE:
        raise CommandError(
            f"{what}: {wrapper} learns from the images of the data; write distiller={_DATA_FREE}:kd synthesizer=pool."
        )


def expanded(overrides: Sequence[str], defaults: Defaults) -> list[str]:
    """The overrides with `distiller=kd+cwd` written out, and with parts that are named in the place of the YAML file's.

    `synthesizer=pool` is written out too.

    Raises:
        CommandError: parts, or a synthesiser, are named for a distiller that takes none.
    """
    wrapper = None
    written = []
    for override in overrides:
        choice = override.removeprefix("distiller=")
        if choice == override or "," in choice:  # a list is for a sweep; elsewhere Hydra refuses it
            written.append(override)
        else:
            wrapper, *parts = names_in(choice)
            written += [f"distiller={wrapper}", *(f"{PART}{part}={part}" for part in parts)]
            if (synthesizer := synthesizer_in(choice)) is not None:
                written.append(f"{SYNTHESIZER}={synthesizer}")
    for place, override in enumerate(written):
        if override.startswith("synthesizer="):
            if wrapper is not None:
                _check_synthesizer(override, wrapper)
            written[place] = override.replace("synthesizer", SYNTHESIZER, 1)
    own = {} if wrapper is None else defaults(wrapper)
    named = [_part(override) for override in written if override.startswith(PART)]
    if named and wrapper is not None and not own:
        raise CommandError(f"{wrapper} takes no parts, and {PART}{named[0]} is one: choose distiller=compose or sckd.")
    added = [f"+{o}" if o.startswith(PART) and _part(o) not in own else o for o in written]
    return [*added, *(f"~{PART}{part}" for part in own if named and part not in named)]


def _part(override: str) -> str:
    return override.removeprefix("+").partition("=")[0].removeprefix(PART)


def in_order(parts: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Parts as the expanded overrides name them: Hydra puts those of the YAML file first."""
    named = [_part(override) for override in overrides if override.removeprefix("+").startswith(PART)]
    return {part: parts[part] for part in sorted(parts, key=lambda part: named.index(part) if part in named else -1)}


def name_of(wrapper: str, methods: Sequence[str], synthesizer: str | None = None) -> str:
    """The name of a method in run folders and tables: the shortest choice that makes it of these parts."""
    joined = "+".join(methods)
    if wrapper == _PLAIN and len(methods) > 1:
        return joined
    return f"{wrapper}:{joined}" + ("" if synthesizer is None else f"@{synthesizer}")
