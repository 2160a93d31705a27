# SPDX-License-Identifier: Apache-2.0
"""One training run: from constructed objects to a trained student and the facts about it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from kdlvfm.core import Detector, Distiller, FeatureModel, Task, Teacher
from kdlvfm.training.callbacks import (
    BestStudent,
    Checkpointer,
    CurveRecorder,
    FiniteLoss,
    LineProgress,
)
from kdlvfm.training.cost import CostMeter
from kdlvfm.training.diagnostics import Diagnostics
from kdlvfm.training.module import DistillationModule
from kdlvfm.training.options import STUDENT_OPTIONS, running

PROGRESS = ("bar", "line", "none")


@dataclass(frozen=True)
class FitResult:
    """What a fit leaves behind besides the student's weights.

    Attributes:
        finished: all steps were taken; `False` after an interruption.
        selected_step: the step whose weights the student now has.
        curve: validation metrics over the run.
        cost: seconds, throughput, memory and the teacher's share.
        diagnostics: what the terms and features were like now and then, see `Diagnostics.points`.
        device: where training ran, for the evaluation that follows.
    """

    finished: bool
    selected_step: int
    curve: list[dict[str, Any]]
    cost: dict[str, float | None]
    diagnostics: list[dict[str, Any]]
    device: torch.device


def check_fit(
    student: FeatureModel,
    distiller: Distiller,
    teacher: Teacher | None,
    num_classes: int,
    precision: str | int,
    accelerator: str,
) -> None:
    """Everything about a run that can be wrong before any work is done.

    Raises:
        ValueError: the cause, and what to change.
    """
    for tap in distiller.student_taps:
        student.check_tap(tap)
    if teacher is None:
        if distiller.teacher_taps:
            raise ValueError(
                f"{type(distiller).__name__} needs a teacher: pass one, for example teacher=dinov3_vits16."
            )
    else:
        for tap in distiller.teacher_taps:
            teacher.check_tap(tap)
        if "logits" in distiller.teacher_taps and teacher.tap_info("logits").dim != num_classes:
            raise ValueError(
                f"the teacher's head has {teacher.tap_info('logits').dim} classes, the data has {num_classes}: "
                "use a teacher trained on these classes."
            )
        scores = any(tap.startswith("cls.") for tap in distiller.teacher_taps)
        if scores and isinstance(teacher.model, Detector) and teacher.model.num_classes != num_classes:
            raise ValueError(
                f"the teacher detects {teacher.model.num_classes} classes, the data has {num_classes}: use a teacher "
                "trained on these classes, or a distiller that does not compare class scores."
            )
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if str(precision).startswith("16") and on_cpu:
        raise ValueError("float16 training needs a GPU: use trainer.precision=bf16-mixed or 32-true on a CPU.")


def check_schedule(*, steps: int, selection: str, val_every: int | None, checkpoint_every: int, progress: str) -> None:
    """The arguments of `fit` that say when and how, and the steps of the run.

    Raises:
        ValueError: the cause, and what to change.
    """
    if selection not in ("last", "best_val"):
        raise ValueError(f"recipe.selection must be last or best_val, not {selection!r}.")
    if selection == "best_val" and val_every is None:
        raise ValueError("recipe.selection=best_val needs recipe.val_every, the steps between validations.")
    if val_every is not None and not 1 <= val_every <= steps:
        raise ValueError(
            f"recipe.val_every must be from 1 to recipe.steps={steps}, not {val_every}; null validates at the end only."
        )
    if checkpoint_every < 1:
        raise ValueError(f"run.checkpoint_every must be at least 1, not {checkpoint_every}.")
    if progress not in PROGRESS:
        raise ValueError(f"run.progress must be auto, {', '.join(PROGRESS)}, not {progress!r}.")


def fit(
    *,
    module: DistillationModule,
    data: LightningDataModule,
    folder: Path,
    trainer: Mapping[str, Any],
    loggers: Iterable[Logger] = (),
    selection: str = "last",
    val_every: int | None = None,
    checkpoint_every: int = 200,
    progress: str = "bar",
    diagnose_every: int | None = 100,
    dead_term_steps: int | None = 500,
) -> FitResult:
    """Train `module` on `data`, or go on where `folder/checkpoints/last.ckpt` stopped.

    Args:
        module: student, distiller, task and optimizers.
        data: its `train_dataloader` holds the whole run; `start_step` is set on resuming.
        folder: the run's folder.
        trainer: further arguments of `lightning.pytorch.Trainer`, such as precision and devices; and those of
            `kdlvfm.training.options.running`, how the student runs.
        loggers: where metrics go.
        selection: `"last"` or `"best_val"`.
        val_every: steps between validations; `None` validates only at the end, outside this function.
        checkpoint_every: steps between checkpoints.
        progress: `"bar"`, `"line"` (plain lines) or `"none"`.
        diagnose_every: steps between diagnostics of terms and features; `None` for none.
        dead_term_steps: steps after which a distillation term that does nothing ends the run; `None` for never.

    Raises:
        ValueError: an argument is none of the above.
        NonFiniteLossError: the loss is no longer a number.
        DeadTermError: a distillation term does nothing.
    """
    check_schedule(
        steps=module.steps,
        selection=selection,
        val_every=val_every,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    diagnostics = Diagnostics(diagnose_every, dead_term_steps)
    last = folder / "checkpoints" / "last.ckpt"
    metric = f"val/{module.task.primary_metric}"
    curve, cost = CurveRecorder(metric), CostMeter(untimed=diagnostics.due)
    checkpointer = Checkpointer(last, checkpoint_every)
    distance = module.task.primary_metric in module.task.distances
    keeper = BestStudent(metric, distance=distance) if selection == "best_val" else None
    callbacks: list[Callback] = [curve, cost, FiniteLoss(), diagnostics, *_progress(progress, module.steps)]
    callbacks += [checkpointer] if keeper is None else [keeper, checkpointer]
    # Lightning's advice and its notes on devices would bury what the run itself has to say.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    student_options = {name: value for name, value in trainer.items() if name in STUDENT_OPTIONS}
    with warnings.catch_warnings(), running(module.student, **student_options):
        # Frozen encoders stay in eval mode on purpose; the loader's worker count is the user's decision.
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
        warnings.filterwarnings("ignore", r"The '\w+' does not have many workers")
        # A run outside a job on a machine of a cluster is the user's decision too.
        warnings.filterwarnings("ignore", "The `srun` command is available")
        # Ours are resumable: `start_step` is set in `DistillationModule.on_load_checkpoint`.
        # Lightning 2.6 under newer releases of torch.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        runner = Trainer(
            **_strategy(trainer, module),
            max_epochs=1,
            callbacks=callbacks,
            logger=list(loggers),
            limit_val_batches=0 if val_every is None else 1.0,
            val_check_interval=val_every,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress == "bar",
            log_every_n_steps=min(10, module.steps),
            default_root_dir=folder,
        )
        runner.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    selected = module.completed
    if keeper is not None and keeper.step is not None and not checkpointer.interrupted:
        module.student.load_state_dict(keeper.weights)
        selected = keeper.step
    return FitResult(
        not checkpointer.interrupted,
        selected,
        curve.points,
        cost.summary(),
        diagnostics.points,
        runner.strategy.root_device,
    )


def _progress(kind: str, steps: int) -> list[Callback]:
    if kind == "bar":
        return [RichProgressBar(leave=True)]
    return [LineProgress(max(1, min(50, steps // 20)))] if kind == "line" else []


def _strategy(trainer: Mapping[str, Any], module: DistillationModule) -> dict[str, Any]:
    """The trainer's arguments with what they do not know.

    A distiller with several groups moves a part of the parameters at a time, which DDP must be told; and who saves and
    requeues a job of a cluster.
    """
    chosen = {name: value for name, value in trainer.items() if name not in STUDENT_OPTIONS}
    if chosen.get("strategy") == "ddp":
        chosen["strategy"] = DDPStrategy(find_unused_parameters=module.moves_subsets)
    if SLURMEnvironment.detect():
        # Lightning would answer the cluster's signal with a checkpoint of its own, and requeue the job by itself.
        chosen["plugins"] = [SLURMEnvironment(auto_requeue=False)]
    return chosen


@torch.no_grad()
def evaluate(
    model: FeatureModel | Teacher,
    loader: Iterable[Any],
    task: Task,
    device: torch.device | str = "cpu",
    each: Callable[[Tensor, dict[str, Tensor] | None], None] | None = None,
) -> dict[str, Any]:
    """The task's metrics of a model over a loader.

    Args:
        model: the student, or a teacher that solves the task.
        loader: batches, not augmented.
        task: unpacks them and measures.
        device: where to compute.
        each: is given the index of the samples of each batch and what they add to the metrics, see `Task.per_image`.

    Returns:
        Metrics by name; those called `<group>/<class>` are gathered in a dict called `<group>`, where `None` stands for
        one that is not defined. Others that are not defined, since no label was seen, are left out.
    """
    training = model.training
    model.eval().to(device)
    metrics = task.metrics()
    metrics.to(device)
    for batch in loader:
        images, target, index = task.unpack(move_data_to_device(batch, torch.device(device)))
        predictions = predict(model, task, images, target)
        metrics.update(predictions, target)
        if each is not None:
            each(index, task.per_image(predictions, target))
    model.train(training)
    result: dict[str, Any] = {}
    for name, value in metrics.compute().items():
        number = float(value)
        group, _, member = name.partition("/")
        if member:
            result.setdefault(group, {})[member] = None if math.isnan(number) else number
        elif not math.isnan(number):
            result[name] = number
    return result


def predict(model: FeatureModel | Teacher, task: Task, images: Tensor, target: Any) -> Any:
    """What a student, or a teacher that solves the task, predicts for a batch."""
    network = model.model if isinstance(model, Teacher) else model
    return task.predict(network, model(images, task.student_taps(network)), target)
