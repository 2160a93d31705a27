# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes: data, teacher, student, loss, backward pass, optimizer, and the trainer."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from kdlvfm.training.module import DistillationModule

PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer", "trainer")
"""`loss` is all of a step that is in no other part: distiller, task, schedule, logging. `trainer` is all between steps
but the wait for data: the loop, its callbacks, and the transfer of a batch."""


class StepProfile(Profiler):
    """Divides the time of every step among `PARTS`, so that they add up; given to Lightning as its profiler.

    A step begins where the loop asks for a batch and ends where it asks for the next, so the last one, after which it
    asks no more, is not written down. On a GPU every boundary waits for the work that was given out: parts are true,
    and their sum is somewhat longer than a step that may run ahead.

    Args:
        module: whose student and teacher are watched.

    Attributes:
        steps: seconds of each part, a dict for each step.
    """

    def __init__(self, module: DistillationModule) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []
        self._module = module
        self._spent: dict[str, float] = {}
        self._parts = ["trainer"]
        self._since = time.perf_counter()
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> StepProfile:
        watched: dict[str, nn.Module | None] = {"student": self._module.student, "teacher": self._module.teacher}
        for part, network in watched.items():
            if network is not None:
                self._hooks.append(network.register_forward_pre_hook(lambda *_, part=part: self._begin(part)))
                self._hooks.append(network.register_forward_hook(lambda *_, part=part: self._end(part)))
        self._hooks.append(register_optimizer_step_post_hook(lambda *_: self._end("optimizer")))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def start(self, action_name: str) -> None:
        """Lightning begins something; a callback's hook marks the moment it is called at."""
        name = action_name.rpartition(".")[2]
        if name == "train_dataloader_next":
            self._switch(["trainer"])
            if self._spent:
                self.steps.append(self._spent)
            self._spent = dict.fromkeys(PARTS, 0.0)
            self._begin("data")
        elif name == "training_step":
            self._begin("loss")
        elif name == "on_before_backward":
            self._begin("backward")
        elif name == "on_after_backward":
            self._end("backward")
        elif name == "on_before_optimizer_step":
            self._begin("optimizer")

    def stop(self, action_name: str) -> None:
        """Lightning has done it."""
        name = action_name.rpartition(".")[2]
        if name == "train_dataloader_next":
            self._end("data")
        elif name == "training_step":
            self._switch(["trainer"])

    def _begin(self, part: str) -> None:
        if self._parts[-1] != part:  # each callback has the same moment
            self._switch([*self._parts, part])

    def _end(self, part: str) -> None:
        if self._parts[-1] == part:
            self._switch(self._parts[:-1])

    def _switch(self, parts: list[str]) -> None:
        """The time until now belongs to the innermost part; what follows to that of `parts`."""
        if self._module.device.type == "cuda":
            torch.cuda.synchronize(self._module.device)
        now = time.perf_counter()
        if self._spent:
            self._spent[self._parts[-1]] += now - self._since
        self._parts, self._since = parts, now
