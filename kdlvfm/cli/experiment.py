# SPDX-License-Identifier: Apache-2.0
"""What an experiment says of a choice, when the user has made another one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

_CHOICES = ("teacher", "student", "distiller", "data")


def without_leftovers(compose: Callable[[Sequence[str]], Any], overrides: Sequence[str]) -> Any:
    """The configuration without those values of its experiment that belong to choices which the user replaced.

    `experiment=camvid teacher=dinov3_vits16` is DINOv3 as its own file has it: the run or the name that the experiment
    gives to its teacher would make it another one. Of other groups a new choice keeps what its file names too, such as
    `student.pretrained`, and loses the rest, such as arguments of another decoder.

    Args:
        compose: from overrides to a configuration that is not resolved, with `hydra` in it.
        overrides: in Hydra's grammar.
    """
    from omegaconf import OmegaConf, open_dict

    composed = compose(overrides)
    chosen = composed.hydra.runtime.choices
    if not chosen.get("experiment"):
        return composed
    meant = compose([f"experiment={chosen['experiment']}"]).hydra.runtime.choices
    usual = compose([]).hydra.runtime.choices
    # What an experiment says of a group without choosing in it is for every choice, such as those that it sweeps.
    replaced = [group for group in _CHOICES if meant[group] not in (chosen[group], usual[group])]
    if not replaced:
        return composed
    alone = compose([one for one in overrides if _group(one) in replaced])
    files = compose([f"{group}={chosen[group]}" for group in replaced])
    with open_dict(composed):
        for group in replaced:
            there = set(composed[group].keys())
            named = [] if group == "teacher" else [key for key in files[group] if key in there]
            kept: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed[group], named))
            own: Any = OmegaConf.to_container(alone[group])
            composed[group] = {key: value for key, value in {**own, **kept}.items() if key in there}
    return composed


def _group(override: str) -> str:
    """The group that an override chooses for or sets a value in; none of one that takes a value out."""
    key = override.lstrip("+").partition("=")[0]
    return re.split(r"[./]", key.partition("@")[2] or key)[0]
