# SPDX-License-Identifier: Apache-2.0
"""From a resolved configuration to the objects of a run. The only place where the siblings meet."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kdlvfm.cli import CommandError
from kdlvfm.cli.composites import names_in
from kdlvfm.cli.config import options
from kdlvfm.cli.list import read_about
from kdlvfm.cli.run_cache import RunCache
from kdlvfm.cli.targets import explained, instantiate, instantiate_with, target_of
from kdlvfm.cli.teacher_cache import prepare
from kdlvfm.core import Context, Distiller, FeatureModel, Task, Teacher
from kdlvfm.core.levels import build_at_levels
from kdlvfm.data.base import SampleData
from kdlvfm.training.fit import check_fit, check_schedule
from kdlvfm.training.module import DistillationModule
from kdlvfm.training.optimizers import Plan, Plans
from kdlvfm.training.options import check_options


@dataclass(frozen=True)
class Cell:
    """Everything that one run is made of."""

    data: SampleData
    task: Task
    student: FeatureModel
    teacher: Teacher | None
    distiller: Distiller
    module: DistillationModule
    cache: RunCache | None = None

    def fill_cache(self) -> dict[str, Any]:
        """Compute what the teacher cache lacks, and let training read it; what a record says of that."""
        facts = {} if self.cache is None else {"teacher_cache": self.cache.fill()}
        if self.cache is not None:
            self.module.teacher = self.cache.serve(self.data)
        return facts


# What a teacher's node may set of any teacher, whatever its class.
_OF_TEACHERS = ("input_size", "precision", "channels_last", "compile", "batch")

_TASKS = {"masks": "segmentation", "boxes": "detection", "images": "diffusion", "no labels": "representation"}

# Least value of each whole number that a run is carried out by; Hydra takes any word for a value.
_WHOLE = {
    "seed": 0,
    "recipe.steps": 1,
    "recipe.batch_size": 1,
    "recipe.accumulate": 1,
    "recipe.warmup_steps": 0,
    "run.num_workers": 0,
    "run.checkpoint_every": 1,
}
_WHOLE_OR_NULL = {
    "recipe.val_every": 1,
    "run.threads": 1,
    "run.diagnose_every": 1,
    "run.dead_term_steps": 1,
    "run.inference_seconds": 1,
    "teacher_cache.views": 1,
    "teacher_cache.pca": 1,
}


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raise `CommandError` for a whole number that is none, or too small."""
    for key, least in {**_WHOLE, **_WHOLE_OR_NULL}.items():
        group, _, name = key.rpartition(".")
        value = config[group][name] if group else config[name]
        if value is None and key in _WHOLE_OR_NULL:
            continue
        if not isinstance(value, int) or value < least:
            raise CommandError(f"{key} must be a whole number from {least} on, not {value!r}.")


def build_data(config: Mapping[str, Any]) -> SampleData:
    """The data module, its files checked."""
    data: SampleData = instantiate(config["data"])
    try:
        data.check()
    except ValueError as error:
        raise CommandError(str(error)) from error
    return data


def check_truth(config: Mapping[str, Any], data: SampleData) -> None:
    """Raise `CommandError` for a task that learns from another kind of ground truth than the data has."""
    truth = target_of(config["task"]).truth
    if truth != data.truth:
        raise CommandError(
            f"{data.name} has {data.truth} and this task learns from {truth}: set task={_TASKS[data.truth]}, or choose "
            "other data."
        )


def build_task(config: Mapping[str, Any], data: SampleData, teacher: Teacher | None = None) -> Task:
    """The task for the classes of the data.

    Args:
        config: of the run.
        data: of the run.
        teacher: of the run, for a task that measures by it.

    Raises:
        CommandError: it learns from another kind of ground truth than the data has, or a wrong argument.
    """
    check_truth(config, data)
    node, known = dict(config["task"]), {"num_classes": data.num_classes, "class_names": data.class_names}
    if "judge" in node:
        judge = node.pop("judge")
        known["judge"] = teacher if judge is None else build_teacher(judge, data.class_names)
    task: Task = instantiate_with(node, **known)
    return task


def build_student(node: Mapping[str, Any], num_classes: int) -> FeatureModel:
    """The student, with a head for the number of classes, or an encoder without one.

    Its encoder may come from the list of teachers, whose `input_size` only a `Teacher` can follow.

    Raises:
        CommandError: a wrong argument, or a head and no classes.
    """
    encoder = node.get("encoder")
    if isinstance(encoder, Mapping) and "input_size" in encoder:
        if encoder["input_size"] is not None:
            raise CommandError(
                "student.encoder.input_size is for teachers; a student sees images as the data has them."
            )
        node = {**node, "encoder": {key: value for key, value in encoder.items() if key != "input_size"}}
    has_head = "num_classes" in inspect.signature(target_of(node)).parameters
    if has_head and not num_classes:
        raise CommandError(
            "this student has a head, and the data has no classes for it: choose an encoder alone, student=resnet18 or "
            "student=timm student.name=NAME."
        )
    student: FeatureModel = instantiate(node, **({"num_classes": num_classes} if has_head else {}))
    return student


def build_teacher(
    node: Mapping[str, Any] | None, class_names: tuple[str, ...], device: str | None = None
) -> Teacher | None:
    """The frozen teacher; `None` for `teacher=none`. A zero-shot teacher classifies into the classes of the data.

    The members of an ensemble are built like teachers of their own, each with its `input_size` and its options. The
    teacher computes on `device` or, where that is `None`, on the one that it is moved to.

    Raises:
        CommandError: a wrong argument.
    """
    if node is None or node["_target_"] is None:
        return None
    arguments = dict(node)
    if "device" in arguments:
        raise CommandError("where a teacher computes changes no result: set run.teacher_device, not teacher.device.")
    chosen = {name: arguments.pop(name) for name in _OF_TEACHERS if name in arguments}
    if isinstance(chosen.get("input_size"), list):
        chosen["input_size"] = tuple(chosen["input_size"])
    if "class_names" in arguments and arguments["class_names"] is None:
        arguments["class_names"] = list(class_names)
    if "members" in arguments:
        members = {name: build_teacher(member, class_names) for name, member in arguments.pop("members").items()}
        for name, member in members.items():
            if member is None:
                raise CommandError(f"teacher.members.{name} is no teacher; leave it out.")
        model = instantiate_with(arguments, members)
    else:
        model = instantiate(arguments)
    try:
        return Teacher(model, **chosen, device=device)
    except ValueError as error:
        raise CommandError(str(error)) from error


def check_distiller(choices: Mapping[str, str]) -> None:
    """Raise `CommandError` for a distiller, or a part of one, that is not for the task."""
    known, task = options("distiller"), choices["task"]
    for name in names_in(choices["distiller"]):
        tasks = read_about("distiller", name)["tasks"] if name in known else [task]  # a part may be a node of one's own
        if task not in tasks:
            raise CommandError(f"{name} is for {', '.join(tasks)}: kdlvfm list distiller --task {task} shows others.")


def build_distiller(node: Mapping[str, Any], context: Context) -> Distiller:
    """The distiller; for detection its methods are told which maps the networks have, see `kdlvfm.core.levels`.

    Raises:
        CommandError: a wrong argument.
    """
    distiller: Distiller = instantiate_with(_at_levels(node) if context.task.truth == "boxes" else node, context)
    return distiller


def _at_levels(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node of a method as one for `build_at_levels`; of one with parts, its parts."""
    if isinstance(node.get("parts"), Mapping):
        parts = node["parts"].items()
        return {**node, "parts": {name: _at_levels(x) if isinstance(x, Mapping) else x for name, x in parts}}
    target, _, builder = str(node.get("_target_")).rpartition(".")
    if builder != "from_context":
        return dict(node)
    method = {"_target_": "hydra.utils.get_class", "path": target}
    return {**node, "_target_": f"{build_at_levels.__module__}.{build_at_levels.__name__}", "method": method}


def check_teaching(distiller: Distiller, task: Task) -> None:
    """Raise `CommandError` if the task has no loss and the distiller does not stand in for it."""
    if not task.has_loss and (distiller.needs_truth or not distiller.teacher_taps):
        lack = "needs ground truth" if distiller.needs_truth else "reads nothing of the teacher"
        raise CommandError(
            f"{type(distiller).__name__} {lack}, and without labels there is nothing else to learn from: "
            "kdlvfm list distiller --task representation shows methods that do."
        )


def build_plans(recipe: Mapping[str, Any]) -> Plans:
    """Optimizer plans of all groups; a group's plan takes from the recipe what it does not set itself."""
    names = ("optimizer", "schedule", "warmup_steps", "clip_norm")
    shared = {name: recipe[name] for name in names}

    def plan(values: Mapping[str, Any]) -> Plan:
        unknown = values.keys() - set(names)
        if unknown:
            raise CommandError(f"recipe.groups has no setting {', '.join(sorted(unknown))}; it has {', '.join(names)}.")
        return Plan(
            optimizer=instantiate(values["optimizer"]),
            schedule=instantiate(values["schedule"]),
            warmup_steps=values["warmup_steps"],
            clip_norm=values["clip_norm"],
        )

    return Plans(plan(shared), {name: plan({**shared, **group}) for name, group in recipe["groups"].items()})


def build(config: Mapping[str, Any]) -> Cell:
    """All objects of a run, checked against each other before any training.

    Raises:
        CommandError: the cause, and what to change.
    """
    recipe, trainer = config["recipe"], config["trainer"]
    check_distiller(config["choices"])
    data = build_data(config)
    check_truth(config, data)
    data.views = config["teacher_cache"]["views"]
    torch.manual_seed(config["seed"])
    student = build_student(config["student"], data.num_classes)
    teacher = build_teacher(config["teacher"], data.class_names, config["run"]["teacher_device"])
    task = build_task(config, data, teacher)
    try:
        task.student_taps(student)
        context = Context(
            student,
            teacher,
            task,
            data.num_classes,
            data.num_samples,
            recipe["steps"],
            data.batches_per_epoch,
            data.batch_shape(),
        )
        # Seeded anew: a projector's initial weights must not depend on which networks were built before it.
        torch.manual_seed(config["seed"] + 1)
        distiller = build_distiller(config["distiller"], context)
        check_teaching(distiller, task)
        check_fit(student, distiller, teacher, data.num_classes, trainer["precision"], trainer["accelerator"])
        check_options(distiller, teacher, trainer)
        check_schedule(
            steps=recipe["steps"],
            selection=recipe["selection"],
            val_every=recipe["val_every"],
            checkpoint_every=config["run"]["checkpoint_every"],
            progress=config["run"]["progress"],
        )
        module = DistillationModule(
            student=student,
            distiller=distiller,
            task=task,
            plans=build_plans(recipe),
            steps=recipe["steps"],
            batches_per_epoch=data.batches_per_epoch,
            teacher=teacher,
            accumulate=recipe["accumulate"],
            seed=config["seed"],
        )
        cache = prepare(config, data, task, teacher, distiller)
    except (ValueError, TypeError) as error:
        raise CommandError(explained(error, recipe)) from error
    return Cell(data, task, student, teacher, distiller, module, cache)
