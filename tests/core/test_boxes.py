# SPDX-License-Identifier: Apache-2.0
"""Reading the boxes of a detection target, and what is said of other targets."""

import pytest
import torch

from kdlvfm.core.boxes import giou_of_distances, labelled_images, read_boxes


def image(boxes, dtype=torch.float32):
    return {"boxes": torch.tensor(boxes, dtype=dtype).reshape(-1, 4), "size": torch.tensor([8, 16])}


def test_boxes_and_sizes_in_order():
    target = [image([[1, 2, 3, 4]]), image([])]
    (first, size), (second, _) = read_boxes(target, 2)
    assert first is target[0]["boxes"]
    assert size.tolist() == [8, 16]
    assert second.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_what_is_not_precise_enough_is_promoted(dtype):
    ((boxes, _),) = read_boxes([image([[1, 2, 3, 4]], dtype)], 1)
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[1, 2, 3, 4]]


def test_double_precision_stays():
    assert read_boxes([image([[1, 2, 3, 4]], torch.float64)], 1)[0][0].dtype == torch.float64


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (None, "NoneType"),
        (torch.zeros(2, 8, 8), r"a tensor \(2, 8, 8\)"),
        ([image([])], "1 entries"),
        ([image([]), {"labels": torch.zeros(0)}], "2 entries"),
    ],
)
def test_another_target_is_refused(target, found):
    with pytest.raises(ValueError, match=rf"reads boxes: .* each of the 2 images, not {found}\. Use it with the det"):
        read_boxes(target, 2)


def test_boxes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"boxes of an image must be \(n, 4\), not \(3,\)"):
        read_boxes([{"boxes": torch.zeros(3), "size": torch.tensor([8, 16])}], 1)


def corners(distances):
    left, top, right, bottom = distances
    return -left, -top, right, bottom


def area(box):
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def giou_reference(first, second):
    first, second = corners(first), corners(second)
    shared = area((*(max(a, b) for a, b in zip(first[:2], second[:2], strict=True)), *map(min, first[2:], second[2:])))
    hull = area((*(min(a, b) for a, b in zip(first[:2], second[:2], strict=True)), *map(max, first[2:], second[2:])))
    union = area(first) + area(second) - shared
    return shared / union - (hull - union) / hull


def test_giou_against_boxes_with_corners():
    generator = torch.Generator().manual_seed(0)
    first, second = 4 * torch.rand(2, 1, 4, 500, generator=generator, dtype=torch.float64) - 0.5
    got = giou_of_distances(first, second)[0].tolist()
    rows = [x[0].T.tolist() for x in (first, second)]
    valid = [k for k in range(500) if area(corners(rows[0][k])) > 0 and area(corners(rows[1][k])) > 0]
    assert len(valid) > 400
    for k in valid:
        assert got[k] == pytest.approx(giou_reference(rows[0][k], rows[1][k]), rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), 1.0),
        ((1, 1, 1, 1), (2, 2, 2, 2), 0.25),
        ((0, 1, 1, 1), (1, 1, 0, 1), 0.0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),
        ((-2, 1, 3, 1), (1, 1, 0, 1), -1 / 2),
    ],
)
def test_giou_worked_examples(first, second, expected):
    pair = (torch.tensor(x, dtype=torch.float64).view(1, 4) for x in (first, second))
    assert giou_of_distances(*pair).item() == pytest.approx(expected, abs=1e-9)


def test_images_are_labelled_unless_they_say_otherwise():
    target = [image([]), {**image([]), "labelled": torch.tensor(False)}, {**image([]), "labelled": torch.tensor(True)}]
    assert labelled_images(target) == [0, 2]
