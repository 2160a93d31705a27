# SPDX-License-Identifier: Apache-2.0
"""What makes a step cheaper: how the student runs while it is trained, and what of it, or of a teacher's, cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kdlvfm.core import Distiller, FeatureModel, Teacher

STUDENT_OPTIONS = ("compile", "channels_last")
"""Settings of the trainer that are not Lightning's."""


def check_options(distiller: Distiller, teacher: Teacher | None, trainer: Mapping[str, Any]) -> None:
    """Everything about these options that can be wrong before any work is done.

    Raises:
        ValueError: the cause, and what to change.
    """
    for name in STUDENT_OPTIONS:
        if not isinstance(trainer[name], bool):
            raise ValueError(f"trainer.{name} must be true or false, not {trainer[name]!r}.")
    on_cpu = trainer["accelerator"] == "cpu" or (trainer["accelerator"] == "auto" and not torch.cuda.is_available())
    place = torch.device("cpu" if on_cpu else "cuda")
    compiled = {place} if trainer["compile"] else set()
    if teacher is not None and distiller.teacher_taps:
        _check_teacher(teacher, distiller, trainer, teacher.device or place)
        if teacher.compiled:
            compiled.add(teacher.device or place)
    for device in compiled:
        _check_compiler(device)


def _check_teacher(teacher: Teacher, distiller: Distiller, trainer: Mapping[str, Any], device: torch.device) -> None:
    options = {
        "teacher.compile": teacher.compiled,
        "teacher.batch": teacher.batch is not None,
        "run.teacher_device": teacher.device is not None,
    }
    chosen = [name for name, on in options.items() if on]
    if distiller.calls_teacher and chosen:
        raise ValueError(
            f"{type(distiller).__name__} reaches into the teacher's network, which must run as it is for that: leave "
            f"{' and '.join(chosen)} out."
        )
    if teacher.device is not None and (trainer["devices"] != 1 or trainer["num_nodes"] != 1):
        raise ValueError("run.teacher_device is for a run of one process: set trainer.devices=1, or leave it null.")
    if teacher.precision is not None and str(trainer["precision"]) in ("bf16-true", "16-true", "64-true", "64"):
        raise ValueError(
            f"teacher.precision={teacher.precision} does not go with trainer.precision={trainer['precision']}, which "
            "also changes the weights of the teacher: train in 32-true, bf16-mixed or 16-mixed."
        )
    if teacher.precision == "fp16" and device.type == "cpu":
        raise ValueError("teacher.precision=fp16 needs a GPU: use bf16 or fp32 on a CPU.")


def _check_compiler(device: torch.device) -> None:
    """Compile something small: without a compiler the first step would fail, in many lines."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # of torch, of Triton or of a compiler
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch.compile does not work here on {device.type} ({reason}): it needs a C++ compiler such as g++, and "
            "Triton on a GPU. Install it, or leave trainer.compile and teacher.compile false."
        ) from error


@contextmanager
def running(student: FeatureModel, *, compile: bool = False, channels_last: bool = False) -> Iterator[None]:
    """Within the context the student runs as these options say; its parameters and state dict are the same objects.

    Args:
        student: the network to train; afterwards it runs as before.
        compile: its forward pass goes through `torch.compile`, and so does the backward pass.
        channels_last: memory format of the weights of convolutions, and so of what they compute.
    """
    with ExitStack() as stack:
        if channels_last:
            _set_format(student, torch.channels_last)
            stack.callback(_set_format, student, torch.contiguous_format)
        if compile:
            # Diagnostics, and methods that weigh gradients, walk a graph several times.
            stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
            # Not `student.compile()`, which would also compile the hooks by which a step is measured.
            vars(student)["forward"] = torch.compile(student.forward)
            stack.callback(vars(student).pop, "forward")
        yield


def _set_format(network: nn.Module, memory_format: torch.memory_format) -> None:
    network.to(memory_format=memory_format)
