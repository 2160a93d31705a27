# SPDX-License-Identifier: Apache-2.0
"""A small segmenter as a file of ONNX, written once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kdlvfm.export.graph import Graph, graph_of, write_onnx

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Written(NamedTuple):
    graph: Graph
    path: Path


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory):
    """The graph of a segmenter of five classes, and its file."""
    from kdlvfm.models.smp import SMPModel

    torch.manual_seed(1)
    graph = graph_of(SMPModel("test_resnet", "fpn", 5, pretrained=False))
    path = tmp_path_factory.mktemp("onnx") / "segmenter.onnx"
    write_onnx(graph, path, {"classes": '["a", "b"]'})
    return Written(graph, path)
