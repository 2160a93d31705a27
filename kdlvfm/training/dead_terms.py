# SPDX-License-Identifier: Apache-2.0
"""The watch for distillation terms that distil nothing, which no loss curve shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LEAST_OBSERVATIONS = 3

_CAUSES = {
    "zero": "its weight is 0, a mask leaves nothing to compare, or a hinge is satisfied; raise its weight or its "
    "margin, or leave it out",
    "without a gradient": "the student's features are detached, the layers that it reads are frozen, or it is clamped; "
    "let it read features that can move",
    "constant": "it does not depend on the student and the batch, or it is clamped; check what it reads",
}


class DeadTermError(RuntimeError):
    """A distillation term was zero, constant or without a gradient for so long that the run cannot mean what it says.

    Attributes:
        term: `<group>/<name>`.
        step: steps completed.
    """

    def __init__(self, term: str, step: int, states: Iterable[str], observations: int, present: int) -> None:
        states = tuple(states)
        causes = "; ".join(f"{state}: {_CAUSES[state]}" for state in states)
        super().__init__(
            f"the distillation term {term} was {' and '.join(states)} at all {observations} observations in the last "
            f"{present} steps that had it (step {step}), so it teaches nothing. Likely causes: {causes}. If that is "
            "meant to be, as of a hinge that the student has satisfied, switch the check off: run.dead_term_steps=null."
        )
        self.term = term
        self.step = step


class DeadTerms:
    """Counts, for each term, how long every observation has shown it in the same dead state.

    Args:
        steps: how many steps that have the term make it dead; `None` never does. Three observations at least do.
    """

    def __init__(self, steps: int | None) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"run.dead_term_steps must be at least 1, not {steps}; null switches the check off.")
        self._steps = steps
        self._values: dict[str, float | None] = {}
        # term -> state -> [observations, steps with the term] since it was last otherwise
        self._streaks: dict[str, dict[str, list[int]]] = {}

    def present(self, terms: Iterable[str]) -> None:
        """Count one step that has these terms; call it before the step's observations."""
        for term in terms:
            for streak in self._streaks.get(term, {}).values():
                streak[1] += 1

    def observe(self, term: str, value: float | None, grad_norm: float | None) -> None:
        """Note what a term is in this step; `None` stands for what is not finite."""
        holds = {
            "zero": value == 0.0,
            "without a gradient": grad_norm == 0.0,
            "constant": value is not None and value == self._values.get(term),
        }
        streaks = self._streaks.setdefault(term, {})
        for state, true in holds.items():
            if true:
                streaks.setdefault(state, [0, 1])[0] += 1
            else:
                streaks.pop(state, None)
        # A value is constant from its first observation on, not from its second.
        streaks.setdefault("constant", [1, 1])
        self._values[term] = value

    def error(self, step: int) -> DeadTermError | None:
        """What is wrong after `step` steps: the first dead term, if there is one."""
        for term, streaks in self._streaks.items():
            long = {state: streak for state, streak in streaks.items() if self._is_long(*streak)}
            if "zero" in long:
                long.pop("constant", None)
            if long:
                observations, present = map(min, zip(*long.values(), strict=True))
                return DeadTermError(term, step, long, observations, present)
        return None

    def _is_long(self, observations: int, present: int) -> bool:
        return self._steps is not None and present >= self._steps and observations >= LEAST_OBSERVATIONS

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"values": self._values, "streaks": self._streaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._values, self._streaks = state["values"], state["streaks"]
