# SPDX-License-Identifier: Apache-2.0
"""From overrides to one resolved configuration, with Hydra's compose."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdlvfm.cli import CommandError
from kdlvfm.cli.composites import (
    PART,
    SYNTHESIZER,
    check_composite,
    expanded,
    in_order,
    name_of,
    names_in,
    synthesizer_in,
)
from kdlvfm.cli.experiment import without_leftovers
from kdlvfm.cli.targets import one_line

GROUPS = (
    "teacher",
    "student",
    "distiller",
    "synthesizer",
    "task",
    "data",
    "recipe",
    "trainer",
    "logger",
    "launcher",
    "experiment",
    "debug",
)

# An argument of a constructor may be set although its YAML does not name it: defaults live in the signature, and a
# constructor refuses what it does not know.
_OPEN = (
    "distiller.",
    "student.",
    "teacher.",
    "data.",
    "recipe.optimizer.",
    "recipe.schedule.",
    "recipe.augmentation.",
    "launcher.",
)


def config_dir() -> Path:
    """The folder of YAML files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def options(group: str) -> list[str]:
    """Names of the YAML files of a group."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def check_names(overrides: Sequence[str]) -> None:
    """Raise if an override chooses something that there is not, before anything is composed.

    Raises:
        CommandError: naming the nearest options.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        group = key.lstrip("+~").partition("@")[0]
        if not equals:
            if not override.startswith("~"):
                raise CommandError(f"{override!r} is not an override; write key=value, for example distiller=kd.")
            continue
        if group not in GROUPS:
            continue
        for choice in filter(None, (choice.strip() for choice in value.split(","))):
            names = names_in(choice) if key == "distiller" else [choice]
            for name in names:
                _check_name(group, name)
            if key == "distiller":
                if (synthesizer := synthesizer_in(choice)) is not None:
                    _check_name("synthesizer", synthesizer)
                check_composite(choice, default_parts)


def _check_name(group: str, name: str) -> None:
    known = options(group)
    if name not in known and name != "null":
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else f" There are: {', '.join(known)}."
        raise CommandError(f"there is no {group} called {name!r}.{hint} (kdlvfm list shows all.)")


def default_parts(distiller: str) -> dict[str, str]:
    """The parts that a distiller's YAML file names, part -> method; empty for one that takes no parts."""
    import yaml

    if distiller not in options("distiller"):
        return {}
    node = yaml.safe_load((config_dir() / "distiller" / f"{distiller}.yaml").read_text(encoding="utf-8"))
    chosen = [entry for entry in node.get("defaults", []) if isinstance(entry, dict)]
    prefix = "/distiller@parts."
    parts = [item for entry in chosen for item in entry.items() if item[0].startswith(prefix)]
    return {key.removeprefix(prefix): method for key, method in parts}


# Further choices of a group: the members of an ensemble of teachers, under names of the user's own.
_ADDED = "teacher@teacher.members."


# What `teacher_cache=build` is short for.
_CACHE = re.compile(r"^teacher_cache=(?!\{)")


def opened(overrides: Sequence[str]) -> list[str]:
    """The overrides in Hydra's grammar: `distiller.temperature=2` sets the value or, with `++`, adds it."""
    written = [_CACHE.sub("teacher_cache.mode=", override) for override in overrides]
    added = [f"+{override}" if override.startswith(_ADDED) else override for override in written]
    return [f"++{override}" if override.startswith(_OPEN) else override for override in added]


@dataclass(frozen=True)
class Launcher:
    """How the cells of a sweep are started, which is no part of a run.

    Attributes:
        kind: `local` or `slurm`.
        settings: what else the YAML file of the group `launcher` holds.
        swept: values that an experiment's `hydra.sweeper.params` gives, key -> values in Hydra's grammar of sweeps.
    """

    kind: str
    settings: dict[str, Any]
    swept: dict[str, str]


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration as plain dicts and lists; `choices` says which YAML each group came from.

    Raises:
        CommandError: an override that does not fit, or a value that is missing.
    """
    return compose_cell(overrides)[0]


def compose_cell(overrides: Sequence[str]) -> tuple[dict[str, Any], Launcher]:
    """The same, and apart from it how it is started as a cell of a sweep.

    Raises:
        CommandError: an override that does not fit, or a value that is missing.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_names(overrides)
    written = expanded(overrides, default_parts)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
            composed = without_leftovers(partial(hydra_compose, "train", return_hydra_config=True), opened(written))
            chosen = composed.hydra.runtime.choices
            choices = {group: chosen[group] for group in GROUPS if chosen.get(group)}
            params = composed.hydra.sweeper.params
            swept = {} if params is None else {str(key): str(value) for key, value in params.items()}
            composed = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            missing = sorted(OmegaConf.missing_keys(composed))
            if missing:
                raise CommandError(f"these need a value: {', '.join(f'{key}=...' for key in missing)}")
            config: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise CommandError(one_line(error)) from error
    if isinstance(config["distiller"].get("parts"), dict) and default_parts(choices["distiller"]):
        parts = config["distiller"]["parts"] = in_order(config["distiller"]["parts"], written)
        # A part that is a node of the user's own, not the choice of a name, goes by the name of the part.
        methods = [chosen.get(f"{PART}{part}", part) for part in parts]
        choices["distiller"] = name_of(choices["distiller"], methods, chosen.get(SYNTHESIZER))
    settings = config.pop("launcher")
    launcher = Launcher(settings.pop("kind"), settings, swept)
    del choices["launcher"]
    config["choices"] = choices
    _drop_about(config)
    if choices["distiller"] == "none" or choices["teacher"] == "none":
        # The baseline never sees a teacher: one run serves the comparison with every teacher.
        config["teacher"], choices["teacher"] = None, "none"
        config["teacher_cache"]["mode"] = "none"
    if config["after"] is not None:
        from kdlvfm.cli.after import second_stage

        return second_stage(config, overrides)
    if config["equal_time"] is not None:
        from kdlvfm.cli.equal_time import match

        matched = match(config)
        config, launcher = compose_cell([*overrides, "equal_time=null", f"recipe.steps={matched['steps']}"])
        config["equal_time"] = matched
    return config, launcher


def _drop_about(node: dict[str, Any]) -> None:
    """Take out what YAML files say to people, for `kdlvfm list`: it is no part of a run."""
    node.pop("about", None)
    for value in node.values():
        if isinstance(value, dict):
            _drop_about(value)
