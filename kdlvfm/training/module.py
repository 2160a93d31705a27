# SPDX-License-Identifier: Apache-2.0
"""The one training module. It knows no method: it takes the optimizer steps that a distiller asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from kdlvfm.core import Distiller, FeatureModel, Step, Task, Teacher, Update
from kdlvfm.training.cache.served import CachedTeacher
from kdlvfm.training.optimizers import Plans


class DistillationModule(LightningModule):
    """Student, distiller and task in Lightning's loop, under manual optimization.

    The state dict holds the student and the distiller, never the teacher. The random state of a step is a function of
    seed, process and step, so a resumed run draws the same numbers as one that was never stopped.

    Args:
        student: the network to train.
        distiller: the method.
        task: loss on ground truth and metrics.
        plans: optimizer, schedule and clipping of each parameter group.
        steps: batches of the whole run.
        batches_per_epoch: batches in one pass over the training set; `Step.epoch` is counted in these.
        teacher: the frozen network, if the distiller taps one; or a `CachedTeacher`, with data whose batches bring the
            stored features.
        accumulate: updates of a group whose gradients are averaged into one optimizer step; usually one for each batch.
        seed: of dropout and everything else that draws random numbers in a step.

    Attributes:
        completed: batches completed in the run.
        loss: of the last update, detached.
        terms: of the last batch's updates, detached, by `train/<group>/<name>`. Loggers are given both at every
            `log_every_n_steps` of the trainer.
        observers: each is shown every update before its gradients are computed. The terms can still be differentiated
            then; the parameters' `grad` must be left alone.
    """

    def __init__(
        self,
        *,
        student: FeatureModel,
        distiller: Distiller,
        task: Task,
        plans: Plans,
        steps: int,
        batches_per_epoch: int,
        teacher: Teacher | None = None,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if accumulate < 1:
            raise ValueError(f"recipe.accumulate must be at least 1, not {accumulate}.")
        self.automatic_optimization = False
        self.student = student
        self.distiller = distiller
        self.teacher = teacher if distiller.teacher_taps else None
        self.task = task
        self._plans = plans
        self.steps = steps
        self._batches_per_epoch = batches_per_epoch
        self._accumulate = accumulate
        self._seed = seed
        self._groups = distiller.parameter_groups(student)
        self._pending = dict.fromkeys(self._groups, 0)
        self._gradients: dict[str, Tensor] = {}
        self._metrics = task.metrics()
        self.completed = 0
        self.loss = torch.zeros(())
        self.terms: dict[str, Tensor] = {}
        self.observers: list[Callable[[Update], None]] = []
        plans.check(self._groups)

    @property
    def moves_subsets(self) -> bool:
        """An update may leave some trainable parameters without a gradient."""
        return len(self._groups) > 1 or self.distiller.moves_subsets or not self.task.has_loss

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimizer for each parameter group, in the order of `Distiller.parameter_groups`."""
        return [self._plans[name].optimizer(parameters) for name, parameters in self._groups.items()]

    def on_train_start(self) -> None:
        """Take up the gradients of a checkpoint; until now Lightning would have dropped them."""
        parameters = dict(self.named_parameters())
        while self._gradients:
            name, gradient = self._gradients.popitem()
            parameters[name].grad = gradient.to(parameters[name].device)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Every update that the distiller yields for this batch."""
        seed_generators(step_seed(self._seed, self.global_rank, batch_idx), self.device)
        self.terms = {}
        images, target, index = self.task.unpack(batch)
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.hold(images, batch["companion"])
        epoch, position = divmod(batch_idx, self._batches_per_epoch)
        progress = batch_idx / self.steps
        step = Step(images, target, index, epoch, position, self.student, self.teacher, self.task, progress, batch_idx)
        for update in self.distiller.updates(step):
            self._backward(update)
            if self._pending[update.group] == self._accumulate:
                self._move(update.group, batch_idx)
        if batch_idx + 1 == self.steps:
            for group in [group for group, pending in self._pending.items() if pending]:
                self._move(group, batch_idx)
        self.completed = batch_idx + 1
        if self.completed % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set by Lightning
            self.log_dict(self.terms)
            self.log("loss", self.loss, prog_bar=True, logger=False)

    def _backward(self, update: Update) -> None:
        """Add the update's share to the gradients of its group, and to no others."""
        for observe in self.observers:
            observe(update)
        loss = torch.stack([term.float() for term in update.terms.values()]).sum()
        # A gradient accumulated for another group must neither grow by this update nor be lost.
        others = [p for name, group in self._groups.items() if name != update.group for p in group]
        kept = [p.grad for p in others]
        for parameter in others:
            parameter.grad = None
        self.manual_backward(loss / self._accumulate)
        for parameter, grad in zip(others, kept, strict=True):
            parameter.grad = grad
        self._pending[update.group] += 1
        self.loss = loss.detach()
        self.terms |= {f"train/{update.group}/{name}": term.detach() for name, term in update.terms.items()}

    def _move(self, group: str, batch_idx: int) -> None:
        """One optimizer step of a group."""
        if self._pending[group] < self._accumulate:  # the run ends here; what there is must still be a mean
            for parameter in self._groups[group]:
                if parameter.grad is not None:
                    parameter.grad *= self._accumulate / self._pending[group]
        optimizer = self._optimizer(group)
        factor = self._plans[group].factor(batch_idx, self.steps)
        for options in optimizer.param_groups:
            options["lr"] = options.setdefault("initial_lr", options["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad()
        self._pending[group] = 0

    def _optimizer(self, group: str) -> Any:
        optimizers = self.optimizers()
        found = optimizers if isinstance(optimizers, list) else [optimizers]
        return found[list(self._groups).index(group)]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the group's gradients; Lightning calls this after a gradient scaler has unscaled them."""
        first = optimizer.param_groups[0]["params"][0]
        name = next(name for name, group in self._groups.items() if any(p is first for p in group))
        clip_norm = self._plans[name].clip_norm
        if clip_norm is not None:
            parameters: list[Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients: Lightning would drop those that are being accumulated."""

    def on_validation_epoch_start(self) -> None:
        """Fresh metrics."""
        self._metrics.reset()
        self._metrics.to(self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The student alone."""
        del batch_idx
        images, target, _ = self.task.unpack(batch)
        features = self.student(images, self.task.student_taps(self.student))
        self._metrics.update(self.task.predict(self.student, features, target), target)

    def on_validation_epoch_end(self) -> None:
        """Log the task's primary metric."""
        result: Mapping[str, Any] = self._metrics.compute()
        name = self.task.primary_metric
        self.log(f"val/{name}", torch.as_tensor(result[name]), prog_bar=True, rank_zero_only=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how many batches were completed, and the gradients that wait for more."""
        checkpoint["kdlvfm_completed"] = self.completed
        checkpoint["kdlvfm_pending"] = dict(self._pending)
        checkpoint["kdlvfm_gradients"] = {
            name: parameter.grad for name, parameter in self.named_parameters() if parameter.grad is not None
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the data go on where the checkpoint stopped."""
        self.completed = checkpoint["kdlvfm_completed"]
        self._pending = dict(checkpoint["kdlvfm_pending"])
        self._gradients = checkpoint["kdlvfm_gradients"]
        self.trainer.datamodule.start_step = self.completed  # type: ignore[attr-defined]


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's default generators of the CPU and, where a step runs on another device, of that.

    `torch.manual_seed` seeds those of all kinds of devices, and takes down who asked for each that was never used: half
    a millisecond, in every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def step_seed(seed: int, rank: int, step: int) -> int:
    """A well-mixed 63-bit seed for one step of one process."""
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
