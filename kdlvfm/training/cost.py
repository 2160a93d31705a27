# SPDX-License-Identifier: Apache-2.0
"""What a run costs: time, throughput, memory, and how much of the teacher."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from kdlvfm.core.distributed import world_size
from kdlvfm.training.cache.served import CachedTeacher
from kdlvfm.training.module import DistillationModule


class CostMeter(Callback):
    """Measures seconds, throughput, peak memory and the teacher's share of a step; counts what the teacher is shown.

    On a GPU, where work is asynchronous, only every `every`-th step is timed, between synchronisations. The first three
    steps after a start are left out: they pay for allocation and algorithm choice.

    Args:
        every: steps between timed steps on a GPU; on a CPU each step is timed.
        untimed: whether a step, counted from 1, is left out because it does more than train; `None` leaves out none.
    """

    _warmup = 3

    def __init__(self, every: int = 20, untimed: Callable[[int], bool] | None = None) -> None:
        self._every = every
        self._untimed = untimed
        self._began = self._step_began = self._teacher_began = 0.0
        self._seen = self._waited = 0
        self._timing = False
        self.seconds = 0.0
        self.images = 0
        self.step_seconds = 0.0
        self.teacher_seconds = 0.0
        self.teacher_images = 0
        self._earlier = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and watch the teacher."""
        self._earlier, self._began = self.seconds, time.perf_counter()
        self._cuda = pl_module.device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if isinstance(pl_module, DistillationModule) and pl_module.teacher is not None:
            pl_module.teacher.register_forward_pre_hook(self._before_teacher)
            pl_module.teacher.register_forward_hook(self._after_teacher)
        del trainer

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _before_teacher(self, module: nn.Module, inputs: Any) -> None:
        del module, inputs
        if self._timing:
            self._teacher_began = self._now()

    def _after_teacher(self, module: nn.Module, inputs: Any, output: Any) -> None:
        del output
        if not isinstance(module, CachedTeacher):
            self.teacher_images += len(inputs[0]) * world_size()
        if self._timing:
            self.teacher_seconds += self._now() - self._teacher_began

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start timing the step."""
        del trainer, pl_module, batch
        self._seen += 1
        self._waited += 1
        due = self._seen > self._warmup and (not self._cuda or self._waited >= self._every)
        self._timing = due and not (self._untimed is not None and self._untimed(batch_idx + 1))
        if self._timing:
            self._waited = 0
            self._step_began = self._now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop timing the step."""
        del outputs, batch_idx
        if self._timing and isinstance(pl_module, DistillationModule):
            self.step_seconds += self._now() - self._step_began
            self.images += len(pl_module.task.unpack(batch)[0]) * trainer.world_size
        self._timing = False
        self.seconds = self._earlier + time.perf_counter() - self._began

    def state_dict(self) -> dict[str, Any]:
        """Totals so far, which a resumed run adds to."""
        names = ("seconds", "images", "step_seconds", "teacher_seconds", "teacher_images")
        return {name: self.__dict__[name] for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.__dict__.update(state_dict)

    def summary(self) -> dict[str, float | None]:
        """The cost part of a run record; times in seconds, memory in MiB."""
        timed = self.step_seconds > 0
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
            memory = torch.cuda.max_memory_allocated() / 2**20
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {
            "train_seconds": self.seconds,
            "images_per_second": self.images / self.step_seconds if timed else None,
            "peak_memory_mib": memory,
            "teacher_share": self.teacher_seconds / self.step_seconds if timed else None,
            "teacher_images": self.teacher_images,
        }
