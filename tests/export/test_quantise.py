# SPDX-License-Identifier: Apache-2.0
"""INT8: what is quantised, with which images, and how near the result is."""

import onnx
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.export.quantise import quantise
from kdlvfm.export.session import open_graph


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        coarse = torch.rand(1, 3, 4, 5, generator=generator)
        yield F.interpolate(coarse, (64, 64 + 16 * index), mode="bilinear", align_corners=False)


@pytest.fixture(scope="module")
def quantised(segmenter, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "student.int8.onnx"
    quantise(segmenter.path, path, images(4))
    return path


def test_convolutions_compute_in_8_bits_and_nothing_behind_them(quantised):
    graph = onnx.load(quantised).graph
    made_by = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 10
    for node in convolutions:
        assert all(made_by[name].op_type == "DequantizeLinear" for name in node.input)
    weights = {x.name: x for x in graph.initializer}
    stored = [weights[made_by[node.input[1]].input[0]] for node in convolutions]
    assert {tensor.data_type for tensor in stored} == {onnx.TensorProto.INT8}
    node, behind = made_by["logits"], []
    while node.op_type not in ("Conv", "DequantizeLinear"):
        behind.append(node.op_type)
        node = made_by[node.input[0]]
    assert "Resize" in behind
    assert "QuantizeLinear" not in behind


def test_the_file_is_smaller_and_says_nearly_the_same(segmenter, quantised):
    assert quantised.stat().st_size < 0.6 * segmenter.path.stat().st_size
    model, seen = open_graph(quantised, segmenter.graph), 0.0
    with torch.no_grad():
        for batch in images(3, seed=1):
            ours, theirs = segmenter.graph(batch)[0], model.everything(batch)["logits"]
            assert (ours - theirs).abs().mean() < 0.05 * ours.std()
            seen += float((ours.argmax(1) == theirs.argmax(1)).float().mean()) / 3
    assert seen > 0.9


def test_all_images_given_are_used(segmenter, tmp_path):
    given = iter(images(3))
    quantise(segmenter.path, tmp_path / "a.onnx", given)
    assert next(given, None) is None


def test_metadata_stay(segmenter, quantised):
    before, after = (onnx.load(path).metadata_props for path in (segmenter.path, quantised))
    assert {x.key: x.value for x in before}.items() <= {x.key: x.value for x in after}.items()
