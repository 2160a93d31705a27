# SPDX-License-Identifier: Apache-2.0
"""Callbacks of the trainer: checkpoints and interruption, selection, the curve, plain progress lines."""

from __future__ import annotations

import math
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kdlvfm.training.module import DistillationModule

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class NonFiniteLossError(RuntimeError):
    """The training loss became infinite or NaN."""


class Checkpointer(Callback):
    """Writes `last.ckpt` every so many steps, and once more when a signal asks the run to stop.

    The first SIGINT or SIGTERM, or SIGUSR1 or SIGUSR2 by which clusters announce the end of a job's time, lets the
    current step finish, saves and stops; a second SIGINT stops at once. Where a validation follows the step, saving
    waits for it: a resumed run would not make up for it. So this callback comes after those that keep what validations
    find.

    Args:
        path: the checkpoint file; it is replaced atomically, so a kill at any moment leaves a whole one.
        every: steps between checkpoints.
    """

    def __init__(self, path: Path, every: int) -> None:
        self._path = path
        self._every = every
        self._previous: dict[int, Any] = {}
        self._due = False
        self.interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch the signals from now on."""
        del pl_module

        def stop(number: int, frame: FrameType | None) -> None:
            del frame
            self.interrupted = True
            signal.signal(number, self._previous[number])
            if trainer.is_global_zero:
                print("\nStopping after this step; the checkpoint is saved. Again to stop at once.", file=sys.stderr)

        for number in _STOPPING:
            self._previous[number] = signal.signal(number, stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where the step count or a signal says so."""
        del pl_module, outputs, batch
        step = batch_idx + 1
        self._due = step % self._every == 0 or step == trainer.num_training_batches
        if trainer.enable_validation and step % int(trainer.val_check_batch or 1) == 0:
            return
        self._stop_if_asked(trainer)
        if self.interrupted:
            trainer.limit_val_batches = 0  # Lightning would validate before it stops
        self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the last step left to be saved."""
        del pl_module
        self._stop_if_asked(trainer)
        self._save_if_due(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self.interrupted, all=False):
            self.interrupted = trainer.should_stop = True

    def _save_if_due(self, trainer: Trainer) -> None:
        if self._due or self.interrupted:
            partial = self._path.with_suffix(".partial")
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                partial.replace(self._path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        del trainer, pl_module
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        del trainer, pl_module, exception
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


class BestStudent(Callback):
    """Keeps the student's weights of the best validation so far, for selection by validation.

    They are kept in memory and in the run's checkpoint, so that the two cannot disagree after a kill.

    Args:
        metric: name of the logged metric to maximise.
        distance: minimise it instead.
    """

    def __init__(self, metric: str, *, distance: bool = False) -> None:
        self._metric = metric
        self._sign = -1 if distance else 1
        self.best: float | None = None
        self.step: int | None = None
        self.weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a copy if this validation is the best."""
        if trainer.sanity_checking or not isinstance(pl_module, DistillationModule):
            return
        value = float(trainer.callback_metrics[self._metric])
        if math.isfinite(value) and (self.best is None or self._sign * (value - self.best) > 0):
            self.best, self.step = value, pl_module.completed
            self.weights = {name: x.detach().cpu().clone() for name, x in pl_module.student.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"best": self.best, "step": self.step, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.best, self.step, self.weights = state_dict["best"], state_dict["step"], state_dict["weights"]


class CurveRecorder(Callback):
    """Collects the validation metric over the run."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self.points: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point; a validation repeated after a resume replaces its first run."""
        if trainer.sanity_checking or not isinstance(pl_module, DistillationModule):
            return
        step = pl_module.completed
        self.points = [point for point in self.points if point["step"] != step]
        value = float(trainer.callback_metrics[self._metric])
        self.points.append(
            {"step": step, "metrics": {self._metric.split("/")[-1]: value if math.isfinite(value) else None}}
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.points = list(state_dict["points"])


class FiniteLoss(Callback):
    """Stops a run whose loss is no longer a number, instead of training on."""

    def __init__(self, every: int = 20) -> None:
        self._every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss now and then: each look waits for the GPU."""
        del outputs, batch
        step = batch_idx + 1
        due = step % self._every == 0 or step == trainer.num_training_batches
        if due and isinstance(pl_module, DistillationModule) and not torch.isfinite(pl_module.loss):
            bad = [name for name, x in pl_module.terms.items() if not torch.isfinite(x)]
            raise NonFiniteLossError(
                f"the loss is not finite at step {step} (terms: {', '.join(bad) or 'all finite by now'}); "
                "lower the learning rate or the loss weights, clip gradients, or train in float32."
            )


class LineProgress(Callback):
    """Progress as plain lines, for logs and for programs that watch them.

    Args:
        every: steps between lines.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a line now and then."""
        del outputs, batch
        step, steps = batch_idx + 1, int(trainer.num_training_batches)
        due = step % self._every == 0 or step == steps
        if due and trainer.is_global_zero and isinstance(pl_module, DistillationModule):
            print(f"step {step}/{steps}  loss {float(pl_module.loss):.4g}", flush=True)
