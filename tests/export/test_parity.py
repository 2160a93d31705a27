# SPDX-License-Identifier: Apache-2.0
"""Differences between a file and its student are found and measured."""

import copy

import pytest
import torch

from kdlvfm.export.graph import ExportError, graph_of
from kdlvfm.export.parity import TOLERANCE, check_parity, difference
from kdlvfm.export.session import open_graph


def test_a_faithful_file_passes_with_its_difference(segmenter):
    model = open_graph(segmenter.path, segmenter.graph)
    checks = check_parity(segmenter.graph, model, [(1, 64, 64), (2, 33, 50)])
    assert [(c.batch, c.height, c.width, c.detections) for c in checks] == [(1, 64, 64, None), (2, 33, 50, None)]
    assert all(0 < c.error <= TOLERANCE / 2 for c in checks)


def test_a_file_of_other_weights_is_refused(segmenter):
    other = copy.deepcopy(segmenter.graph.student)
    with torch.no_grad():
        other.net.segmentation_head[0].bias[0] += 0.01
    model = open_graph(segmenter.path, segmenter.graph)
    with pytest.raises(ExportError, match=r"on 1 images of 64x64 pixels it differs by .*e-03, more than 1e-04"):
        check_parity(graph_of(other), model, [(1, 64, 64)])


@pytest.mark.parametrize(
    ("found", "expected", "value"),
    [
        ([0.1, 0.2], [0.1, 0.3], 0.1),
        ([100.0, 5.0], [104.0, 5.0], 4 / 104),
        ([float("nan")], [1.0], torch.inf),
        ([1.0], [float("nan")], torch.inf),
        ([1.0, 2.0], [1.0], torch.inf),
        ([], [], 0.0),
    ],
)
def test_the_difference_is_a_share_of_the_largest_value_above_one(found, expected, value):
    assert difference(torch.tensor(found), torch.tensor(expected)) == pytest.approx(value)
