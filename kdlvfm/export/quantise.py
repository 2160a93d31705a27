# SPDX-License-Identifier: Apache-2.0
"""Static INT8 quantisation by onnxruntime, calibrated on images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from kdlvfm.export.graph import IMAGES


def quantise(source: Path, target: Path, batches: Iterable[Tensor]) -> None:
    """Write a graph with 8-bit weights and activations.

    Weights have a scale for each channel and activations the range seen on the images. Norms stay in float, and so does
    what follows the last convolutions: boxes in pixels, NMS, and the resizing of logits.

    Args:
        source: file of the graph in float.
        target: file to write.
        batches: images (B, 3, H, W) to calibrate with.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {IMAGES: batch.numpy()}

    with TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_kept_in_float(onnx.load(prepared).graph),
        )


def _kept_in_float(graph: Any) -> list[str]:
    """Names of the norms, and of the nodes from which no convolution is reached."""
    leads_to_convolution: set[str] = set()
    kept = []
    for node in reversed(graph.node):
        reached = node.op_type == "Conv" or not leads_to_convolution.isdisjoint(node.output)
        if reached:
            leads_to_convolution.update(node.input)
        if not reached or node.op_type.endswith("Normalization"):
            kept.append(node.name)
    return kept
