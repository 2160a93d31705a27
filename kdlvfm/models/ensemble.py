# SPDX-License-Identifier: Apache-2.0
"""Several teachers as one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from kdlvfm.core.features import FeatureModel, ModelCard, TapError, TapInfo
from kdlvfm.core.teacher import Teacher


class TeacherEnsemble(FeatureModel):
    """Several frozen networks side by side. Taps are `<member>/<tap>`, for example `dino/map.-1` and `sam/map.3`.

    Every member sees the images with its own normalisation and in its own `input_size`; only those run whose taps are
    asked for. The card names all members; its checksum is that of theirs together.

    Args:
        members: the teachers by name.

    Raises:
        ValueError: there is no member, or a name is empty or has a slash.
    """

    def __init__(self, members: Mapping[str, Teacher]) -> None:
        super().__init__()
        if not members:
            raise ValueError(
                "an ensemble needs members: add each with teacher@teacher.members.NAME=TEACHER, for example "
                "teacher@teacher.members.dino=dinov3_vits16."
            )
        for name in members:
            if not name or "/" in name:
                raise ValueError(
                    f"a member of an ensemble cannot be called {name!r}: its name is the part before the /."
                )
        # The networks are known as sub-modules, so that they move and are counted; the teachers wrap them.
        self.net = nn.ModuleList(member.model for member in members.values())
        self._members = dict(members)
        self.card = _joint_card({name: member.card for name, member in members.items()})

    def taps(self) -> dict[str, TapInfo]:
        """Every portable tap of every member."""
        return {f"{name}/{tap}": info for name, member in self._members.items() for tap, info in member.taps().items()}

    def tap_info(self, tap: str) -> TapInfo:
        """Facts about `tap`, without a forward pass.

        Raises:
            TapError: there is no such member, or it has no such tap.
        """
        member, own = self._find(tap)
        return self._members[member].tap_info(own)

    def check_tap(self, tap: str) -> None:
        """Raise `TapError` if there is no such member, or it has no such tap."""
        member, own = self._find(tap)
        self._members[member].check_tap(own)

    def forward(self, images: Tensor, taps: Collection[str]) -> dict[str, Tensor]:
        """Features of `images` (B, 3, H, W) in [0, 1], one entry for each name in `taps`, keyed as asked.

        Raises:
            TapError: there is no such member, or it has no such tap.
        """
        asked: dict[str, dict[str, str]] = {}
        for tap in taps:
            member, own = self._find(tap)
            asked.setdefault(member, {})[tap] = own
        found: dict[str, Tensor] = {}
        for member, names in asked.items():
            wanted = tuple(dict.fromkeys(names.values()))
            features = self._members[member](images, wanted, input_grad=torch.is_grad_enabled())
            found.update({tap: features[own] for tap, own in names.items()})
        return {tap: found[tap] for tap in taps}

    def _find(self, tap: str) -> tuple[str, str]:
        """The member that `tap` names, and its own name of the tap."""
        member, slash, own = tap.partition("/")
        if not slash or member not in self._members:
            raise TapError(
                f"{tap!r} names none of several teachers: write <teacher>/<tap>, for example "
                f"{next(iter(self._members))}/map.-1. The teachers are {', '.join(self._members)}."
            )
        return member, own


def _joint_card(cards: Mapping[str, ModelCard]) -> ModelCard:
    """What the cards of all members say together; one that has random weights makes the whole random."""
    kinds = {card.weights for card in cards.values()}
    sums = [f"{name}:{card.sha256}" for name, card in cards.items() if card.sha256 is not None]
    return ModelCard(
        name=" + ".join(card.name for card in cards.values()),
        weights=next(kind for kind in ("random", "file", "pretrained") if kind in kinds),
        licence="; ".join(f"{name}: {card.licence or 'unknown'}" for name, card in cards.items()),
        sha256=hashlib.sha256("\n".join(sums).encode()).hexdigest() if len(sums) == len(cards) else None,
        source="; ".join(f"{name}: {card.source}" for name, card in cards.items() if card.source) or None,
    )
