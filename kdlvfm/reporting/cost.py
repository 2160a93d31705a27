# SPDX-License-Identifier: Apache-2.0
"""What a network costs: its parameters, the multiply-accumulates of one image, and the time of an inference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCH = 32
_WARM_UP = 3
_SINGLES = 100
_BATCHES = 20
_SINGLES_FOR_A_TAIL = 20


def count_parameters(model: nn.Module) -> int:
    """Number of scalars in the parameters of `model`, trainable or not; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: tuple[int, int], *, forward: Callable[[Tensor], Any] | None = None) -> int:
    """Multiply-accumulates of one image in the convolutions, linear layers and attention of `model`.

    Normalisation, activations and resizing are not counted, as usual in the field. The model runs once, in evaluation
    mode and without gradient, on a black image; its modes and the random state are left as they were.

    Args:
        model: the network; it gives the device and is the default `forward`.
        size: (height, width) of the image in pixels.
        forward: what to count, from images (1, 3, H, W), if it is not `model` itself: for instance
            `lambda images: student(images, ["logits"])`.
    """
    images = torch.zeros(1, 3, *size, device=_device_of(model))
    with _evaluating(model), _countable_attention(), FlopCounterMode(display=False) as counter:
        (forward or model)(images)
    return int(counter.get_total_flops()) // 2


def measure_inference(
    model: nn.Module,
    size: tuple[int, int],
    *,
    forward: Callable[[Tensor], Any] | None = None,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Latency of one image and throughput of a batch of 32, on the device where `model` is, in float32.

    The network runs in evaluation mode and without gradient on noise; its modes and the random state are left as they
    were. Time is bounded: single images take up to 100 repetitions and half of `seconds`, batches up to 20 and what is
    left. On a slow machine, or where memory does not suffice, the batch is a smaller power of two. At least one image
    is timed however long it takes.

    Args:
        model: the network; it gives the device and is the default `forward`.
        size: (height, width) of the images in pixels.
        forward: what to time, from images (B, 3, H, W), if it is not `model` itself.
        seconds: time to spend.

    Returns:
        The field `inference` of a run record; times in seconds. `latency_p95` is `None` with fewer than 20 repetitions.
    """
    run, device = forward or model, _device_of(model)
    noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    began = time.perf_counter()

    def timed(images: Tensor, least: int, most: int, end: float) -> list[float]:
        """Seconds of each repetition, `least` at least and then until `end`, a time since `began`, at `most`."""
        found: list[float] = []
        while len(found) < least or (len(found) < most and time.perf_counter() - began < end):
            _wait(device)
            start = time.perf_counter()
            run(images)
            _wait(device)
            found.append(time.perf_counter() - start)
        return found

    with _evaluating(model):
        timed(noise, 1, _WARM_UP, seconds / 4)
        singles = timed(noise, 1, _SINGLES, seconds / 2)
        latency = statistics.median(singles)
        batch, batches = BATCH, list[float]()
        while batch > 1 and not batches:
            if 2 * batch * latency > seconds - (time.perf_counter() - began):
                batch //= 2
                continue
            try:
                images = noise.expand(batch, -1, -1, -1).contiguous()
                timed(images, 1, 1, seconds)
                batches = timed(images, 1, _BATCHES, seconds)
            except torch.OutOfMemoryError:
                batch //= 2
    tail = statistics.quantiles(singles, n=20, method="inclusive")[-1] if len(singles) >= _SINGLES_FOR_A_TAIL else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": "float32",
        "input_size": list(size),
        "latency_p50": latency,
        "latency_p95": tail,
        "repetitions": len(singles),
        "images_per_second": batch / statistics.median(batches or singles),
        "batch_size": batch,
        "batches": len(batches or singles),
    }


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Attention as matrix products: the fused kernels of the CPU are opaque to the counter and count as nothing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
