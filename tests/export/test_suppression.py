# SPDX-License-Identifier: Apache-2.0
"""From candidates to detections, in torch and as ONNX, against NMS written as a loop."""

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from kdlvfm.core.detector import Candidates, Selection
from kdlvfm.export.suppression import NO_CLASS, select, suppressed, translations

SELECTION = Selection(score_threshold=0.3, per_level=25, iou_threshold=0.5, limit=12)


def make(batch=2, levels=(30, 11), classes=3, seed=0):
    """Boxes of 20 to 50 pixels in 100, which overlap a lot."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(levels)
    corner = 60 * torch.rand(batch, count, 2, generator=generator)
    boxes = torch.cat([corner, corner + 20 + 30 * torch.rand(batch, count, 2, generator=generator)], dim=-1)
    scores = torch.rand(batch, count, classes, generator=generator).split(levels, dim=1)
    return Candidates(boxes, scores, torch.rand(batch, count, generator=generator))


def overlap(a, b):
    shared = (min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))
    area = max(shared[0], 0) * max(shared[1], 0)
    return area / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - area)


def by_hand(candidates, selection):
    """For each image the detections (score, label, box), the best first, one decision after the other."""
    images = []
    for i, boxes in enumerate(candidates.boxes.tolist()):
        chosen, first = [], 0
        for level in candidates.scores:
            found = [(s, first + n, k) for n, row in enumerate(level[i].tolist()) for k, s in enumerate(row)]
            found = sorted(x for x in found if x[0] > selection.score_threshold)[::-1][: selection.per_level]
            chosen += [(s * float(candidates.quality[i, n]), n, k) for s, n, k in found]
            first += level.shape[1]
        kept = []
        for s, n, k in sorted(chosen, reverse=True):
            if all(k != label or overlap(boxes[n], box) <= selection.iou_threshold for _, label, box in kept):
                kept.append((s, k, boxes[n]))
        images.append(kept[: selection.limit])
    return images


def assert_detects(found, expected):
    for boxes, scores, labels, image in zip(*found, expected, strict=True):
        count = len(image)
        assert scores[:count].tolist() == pytest.approx([score for score, _, _ in image])
        assert labels[:count].tolist() == [label for _, label, _ in image]
        torch.testing.assert_close(boxes[:count], torch.tensor([box for *_, box in image]).reshape(-1, 4))
        assert not scores[count:].any()
        assert not boxes[count:].any()
        assert set(labels[count:].tolist()) <= {NO_CLASS}


@pytest.mark.parametrize("seed", range(5))
def test_detections_are_those_of_nms_one_after_the_other(seed):
    candidates = make(seed=seed)
    expected = by_hand(candidates, SELECTION)
    assert all(len(image) > 5 for image in expected)
    assert_detects(select(candidates, SELECTION), expected)


def test_the_threshold_is_one_before_quality_and_the_order_one_after():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]]])
    scores, quality = torch.tensor([[[0.9], [0.4], [0.2]]]), torch.tensor([[0.1, 1.0, 1.0]])
    _, best, _ = select(Candidates(boxes, (scores,), quality), SELECTION)
    assert best[0, :3].tolist() == pytest.approx([0.4, 0.09, 0.0])


def test_boxes_without_area_are_no_detections():
    boxes = torch.tensor([[[0.0, 0, 0, 10], [20, 20, 30, 20], [40, 40, 50, 50]]])
    _, best, _ = select(Candidates(boxes, (torch.full((1, 3, 1), 0.9),), None), SELECTION)
    assert (best > 0).sum() == 1


def test_an_image_with_fewer_candidates_than_places_has_empty_places():
    found = select(make(levels=(1, 2), classes=1), SELECTION)
    assert [x.shape for x in found] == [(2, 12, 4), (2, 12), (2, 12)]
    assert_detects(found, by_hand(make(levels=(1, 2), classes=1), SELECTION))


def test_each_class_is_limited():
    candidates = make(levels=(40,))
    kept = suppressed(candidates.boxes, candidates.scores[0], 0.9, 4)
    assert ((kept > 0).sum(dim=1) == 4).all()
    assert torch.equal(kept[kept > 0], candidates.scores[0][kept > 0])


class Selecting(nn.Module):
    def forward(self, boxes, scores, quality):
        return select(
            Candidates(boxes, scores.split([scores.shape[1] // 2, -(-scores.shape[1] // 2)], 1), quality), SELECTION
        )


def test_as_onnx_it_gives_the_same(tmp_path):
    given = make(levels=(20, 20))
    arguments = (given.boxes, torch.cat(given.scores, dim=1), given.quality)
    batch, count = Dim("batch"), 2 * Dim("half")
    sizes = ({0: batch, 1: count}, {0: batch, 1: count}, {0: batch, 1: count})
    traced = torch.export.export(Selecting(), arguments, dynamic_shapes=sizes, strict=False)
    program = torch.onnx.export(
        traced, (), dynamo=True, verbose=False, opset_version=18, custom_translation_table=translations()
    )
    program.save(tmp_path / "select.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "select.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    for levels, seed in (((20, 20), 1), ((3, 3), 2), ((150, 150), 3)):
        candidates = make(3, levels, seed=seed)
        values = (candidates.boxes, torch.cat(candidates.scores, dim=1), candidates.quality)
        found = session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})
        assert_detects([torch.from_numpy(x) for x in found], by_hand(candidates, SELECTION))
