# SPDX-License-Identifier: Apache-2.0
"""LD against loops over sides and bins, its regions against loops over anchors, and what its class refuses."""

import math

import pytest
import torch

from kdlvfm.core import Context, TapError, Teacher
from kdlvfm.distillers import LD, kd_loss, localization_loss, localization_regions

SIZES, STRIDES = [(12, 16), (6, 8), (3, 4)], (4, 8, 16)


def tensor(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def weights(*shape, seed=9):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(*boxes, size=(48, 64)):
    return {"boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), "size": torch.tensor(size)}


def softmax(values, temperature):
    powers = [math.exp((value - max(values)) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def reference(student, teacher, weight, temperature):
    """The sum over sides, one at a time."""
    bins = student.shape[-1]
    rows = [x.reshape(-1, bins).tolist() for x in (student, teacher)]
    total = 0.0
    for own, goal, w in zip(*rows, weight.flatten().tolist(), strict=True):
        p_student, p_teacher = softmax(own, temperature), softmax(goal, temperature)
        total += w * sum(p * math.log(p / q) for p, q in zip(p_teacher, p_student, strict=True)) / bins
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 10.0])
@pytest.mark.parametrize("shape", [(1, 4, 2), (5, 4, 17), (7, 9)])
def test_against_loops(shape, temperature):
    student, teacher, weight = tensor(*shape, seed=1), tensor(*shape, seed=2), weights(*shape[:-1])
    expected = reference(student, teacher, weight, temperature)
    sides = math.prod(shape[:-1])
    assert localization_loss(student, teacher, weight, temperature).item() == pytest.approx(expected / sides, rel=1e-9)
    got = localization_loss(student, teacher, weight, temperature, avg_factor=4.0)
    assert got.item() == pytest.approx(expected / 4, rel=1e-9)


def test_a_weight_for_a_box_is_that_of_its_sides():
    student, teacher, weight = tensor(5, 4, 6, seed=1), tensor(5, 4, 6, seed=2), weights(5)
    torch.testing.assert_close(
        localization_loss(student, teacher, weight), localization_loss(student, teacher, weight[:, None].expand(5, 4))
    )


def test_it_is_kd_over_the_bins_divided_by_their_number():
    student, teacher = tensor(5, 4, 17, seed=1), tensor(5, 4, 17, seed=2)
    for temperature in (1.0, 10.0):
        got = localization_loss(student, teacher, torch.ones(5), temperature)
        expected = kd_loss(student.flatten(0, 1), teacher.flatten(0, 1), temperature) / 17
        torch.testing.assert_close(got, expected)


def test_zero_at_equality_up_to_a_shift_and_linear_in_the_weight():
    student, teacher, weight = tensor(5, 4, 6, seed=1), tensor(5, 4, 6, seed=2), weights(5)
    assert localization_loss(teacher, teacher, weight).item() == 0
    assert localization_loss(teacher + tensor(5, 4, 1, seed=3), teacher, weight).item() == pytest.approx(0, abs=1e-12)
    loss = localization_loss(student, teacher, weight)
    torch.testing.assert_close(localization_loss(student, teacher, 3 * weight), 3 * loss)


def test_gradients_reach_the_student_alone():
    student, teacher = tensor(5, 4, 6, seed=1).requires_grad_(), tensor(5, 4, 6, seed=2).requires_grad_()
    weight = weights(5).index_fill(0, torch.tensor(2), 0.0).requires_grad_()
    localization_loss(student, teacher, weight).backward()
    assert teacher.grad is None
    assert weight.grad is None
    assert (student.grad[2] == 0).all()
    assert (student.grad[[0, 1, 3, 4]] != 0).all()


def test_gradcheck():
    student, teacher, weight = tensor(2, 4, 3, seed=1, scale=1.0).requires_grad_(), tensor(2, 4, 3, seed=2), weights(2)
    assert torch.autograd.gradcheck(lambda x: localization_loss(x, teacher, weight), (student,))


@pytest.mark.parametrize("avg_factor", [None, 4.0])
def test_no_boxes_give_zero_with_a_graph(avg_factor):
    student = tensor(0, 4, 6).requires_grad_()
    loss = localization_loss(student, tensor(0, 4, 6), weights(0), avg_factor=avg_factor)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (1e4, -1e4), (0.0, 1e4)])
def test_half_precision_at_extreme_values(first, second, dtype):
    student, teacher = (torch.full((3, 4, 6), value, dtype=dtype) for value in (first, second))
    student[..., 0], teacher[..., 1] = -first, 0
    student.requires_grad_()
    loss = localization_loss(student, teacher, torch.ones(3, dtype=dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 4, 6\) \(student\) and \(5, 4, 9\) \(teacher\); .*same bins"):
        localization_loss(tensor(5, 4, 6), tensor(5, 4, 9), weights(5))
    for shape in ((4,), (5, 3), (5, 4, 6)):
        with pytest.raises(ValueError, match="does not fit distributions"):
            localization_loss(tensor(5, 4, 6), tensor(5, 4, 6), weights(*shape))


def area(box):
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def overlaps(first, second):
    """IoU and DIoU of two boxes."""
    shared = area(
        [max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3])]
    )
    iou = shared / (area(first) + area(second) - shared)
    apart = sum(((first[k] + first[k + 2]) / 2 - (second[k] + second[k + 2]) / 2) ** 2 for k in (0, 1))
    hull = sum((max(first[k + 2], second[k + 2]) - min(first[k], second[k])) ** 2 for k in (0, 1))
    return iou, iou - apart / hull


def regions_reference(target, scale, nearest, gamma):
    """Every anchor, object and level in turn."""
    main = [torch.zeros(len(target), *size, dtype=torch.bool) for size in SIZES]
    valuable = [torch.zeros(len(target), *size, dtype=torch.float64) for size in SIZES]
    for b, label in enumerate(target):
        for box in label["boxes"].tolist():
            anchors, candidates = [], []
            centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            for level, ((height, width), stride) in enumerate(zip(SIZES, STRIDES, strict=True)):
                half, places = scale * stride / 2, []
                for i in range(height):
                    for j in range(width):
                        y, x = i * stride, j * stride
                        if y < label["size"][0] and x < label["size"][1]:
                            anchor = (x - half, y - half, x + half, y + half)
                            distance = math.hypot(x - centre[0], y - centre[1])
                            places.append((distance, level, i, j, (x, y), *overlaps(anchor, box)))
                anchors += places
                candidates += sorted(places)[:nearest]
            ious = [candidate[5] for candidate in candidates]
            mean = sum(ious) / len(ious)
            threshold = mean + math.sqrt(sum((iou - mean) ** 2 for iou in ious) / (len(ious) - 1))
            for _, level, i, j, (x, y), iou, _ in candidates:
                if iou >= threshold and box[0] < x < box[2] and box[1] < y < box[3]:
                    main[level][b, i, j] = True
            for _, level, i, j, _, iou, diou in anchors:
                if gamma * threshold <= diou < threshold:
                    valuable[level][b, i, j] = max(valuable[level][b, i, j], iou)
    return main, valuable


@pytest.mark.parametrize(("scale", "nearest", "gamma"), [(8.0, 9, 0.25), (3.0, 4, 0.6)])
def test_regions_against_loops(scale, nearest, gamma):
    target = [
        image([3.1, 5.2, 20.3, 17.4], [13.7, 8.9, 60.6, 40.5], [1.3, 1.9, 4.4, 6.1]),
        image(),
        image([10.2, 7.7, 37.1, 29.3], size=(32, 40)),
    ]
    got = localization_regions(target, SIZES, STRIDES, scale=scale, nearest=nearest, gamma=gamma)
    expected = regions_reference(target, scale, nearest, gamma)
    for mine, theirs in zip(got, expected, strict=True):
        for level, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=f"level {level}")
    assert sum(int(level.sum()) for level in got[0]) > 3
    assert sum(int((level > 0).sum()) for level in got[1]) > 10
    assert not any(level[1].any() for half in got for level in half)


def test_a_smaller_gamma_widens_the_valuable_region_and_leaves_the_main_one():
    target = [image([10.2, 7.7, 37.1, 29.3])]
    (main, narrow), (same, wide) = (localization_regions(target, SIZES, STRIDES, gamma=g) for g in (0.75, 0.25))
    counts = [sum(int((level > 0).sum()) for level in region) for region in (narrow, wide)]
    assert 0 < counts[0] < counts[1]
    for a, b, c, d in zip(main, same, narrow, wide, strict=True):
        assert torch.equal(a, b)
        assert ((c > 0) <= (d > 0)).all()


def test_main_positions_are_inside_an_object_and_padding_is_in_no_region():
    target = [image([10.2, 7.7, 31.1, 29.3], size=(30, 32))]
    main, valuable = localization_regions(target, SIZES, STRIDES)
    for stride, level, around in zip(STRIDES, main, valuable, strict=True):
        for i, j in level[0].nonzero().tolist():
            assert 7.7 < i * stride < 29.3
            assert 10.2 < j * stride < 31.1
        rows, columns = math.ceil(30 / stride), math.ceil(32 / stride)
        assert not around[0, rows:].any()
        assert not around[0, :, columns:].any()


def features(seed, grad=False, batch=2, bins=6):
    made = {}
    for i, size in enumerate(SIZES):
        made[f"reg.{i}"] = tensor(batch, 4 * bins, *size, seed=seed + i).requires_grad_(grad)
        made[f"cls.{i}"] = tensor(batch, 3, *size, seed=seed + 10 + i).requires_grad_(grad)
    return made


def test_the_class_weighs_both_regions():
    target = [image([3.1, 5.2, 20.3, 17.4], [13.7, 8.9, 60.6, 40.5]), image([10.2, 7.7, 37.1, 29.3])]
    student, teacher = features(1), features(50)
    terms = LD(STRIDES, main_weight=0.5, valuable_weight=2.0, temperature=4.0)(student, teacher, target)
    assert list(terms) == ["ld_main", "ld_valuable"]
    main, valuable = regions_reference(target, 8.0, 9, 0.25)
    expected = [0.0, 0.0]
    for i in range(3):
        own, goal = (half[f"reg.{i}"].unflatten(1, (4, 6)) for half in (student, teacher))
        scores = student[f"cls.{i}"].sigmoid().amax(1) * main[i]
        for k, region in enumerate((scores, valuable[i])):
            for b, y, x in region.nonzero().tolist():
                weight = region[b, y, x].expand(4)
                expected[k] += reference(own[b, :, :, y, x], goal[b, :, :, y, x], weight, 4.0)
    # 3 images count as one batch of the authors'.
    assert terms["ld_main"].item() == pytest.approx(0.5 * expected[0] / 4 * 3 / 2, rel=1e-9)
    assert terms["ld_valuable"].item() == pytest.approx(2.0 * expected[1] / 16 * 3 / 2, rel=1e-9)


def test_the_batch_does_not_change_the_size_of_a_term():
    target = [image([3.1, 5.2, 20.3, 17.4])]
    student, teacher = features(1, batch=1), features(50, batch=1)
    once = LD(STRIDES)(student, teacher, target)
    student, teacher = ({tap: x.repeat(4, 1, 1, 1) for tap, x in half.items()} for half in (student, teacher))
    again = LD(STRIDES)(student, teacher, target * 4)
    torch.testing.assert_close(again, once)


def test_gradients_stay_inside_the_regions_and_leave_the_scores_alone():
    target = [image([3.1, 5.2, 20.3, 17.4]), image()]
    student, teacher = features(1, grad=True), features(50, grad=True)
    sum(LD(STRIDES)(student, teacher, target).values()).backward()
    main, valuable = localization_regions(target, SIZES, STRIDES)
    for i in range(3):
        assert ((student[f"reg.{i}"].grad != 0).any(1) == (main[i] | (valuable[i] > 0))).all()
        assert student[f"cls.{i}"].grad is None
        assert teacher[f"reg.{i}"].grad is None


def test_a_region_can_be_left_out():
    target = [image([3.1, 5.2, 20.3, 17.4]), image()]
    assert list(LD(STRIDES, main_weight=0)(features(1), features(50), target)) == ["ld_valuable"]
    assert list(LD(STRIDES, valuable_weight=0)(features(1), features(50), target)) == ["ld_main"]


def test_images_without_objects_give_zero_with_a_graph():
    student = features(1, grad=True)
    terms = LD(STRIDES)(student, features(50), [image(), image()])
    sum(terms.values()).backward()
    assert [term.item() for term in terms.values()] == [0, 0]


def test_from_context_reads_the_levels(detection_context):
    ld = LD.from_context(detection_context, temperature=2.0)
    assert ld.strides == (4, 8, 16)
    assert ld.temperature == 2
    assert ld.teacher_taps == ("reg.0", "reg.1", "reg.2")
    assert ld.student_taps == ("reg.0", "reg.1", "reg.2", "cls.0", "cls.1", "cls.2")


def test_from_context_refuses_networks_that_do_not_match(detection_context, detection_task, toy_detector, context):
    student = detection_context.student

    def build(student, teacher):
        return LD.from_context(Context(student, Teacher(teacher), detection_task, num_classes=5, num_samples=1))

    with pytest.raises(TapError, match=r"toy has no taps 'reg\.<i>'"):
        build(student, context.student)
    with pytest.raises(ValueError, match=r"head of toy detector does not predict \(it has 4 channels\)"):
        build(toy_detector(bins=1), toy_detector())
    with pytest.raises(ValueError, match="needs distributions of the four sides"):
        LD.from_context(Context(student, detection_context.teacher, detection_task, num_classes=2, num_samples=1))
    with pytest.raises(ValueError, match=r"6 at 4, 6 at 8, 6 at 16 .student. and 9 at 4, 9 at 8, 9 at 16 .teacher."):
        build(student, toy_detector(bins=9))
    with pytest.raises(ValueError, match="same bins and strides"):
        build(student, toy_detector(levels=(8, 16)))
    with pytest.raises(ValueError, match="reads boxes"):
        LD(STRIDES)(features(1), features(50), torch.zeros(2, 8, 8))


def test_unlabelled_images_are_not_counted():
    target = [image([3.1, 5.2, 20.3, 17.4]), {**image(), "labelled": torch.tensor(False)}]
    student, teacher = features(1), features(50)
    alone = ({tap: x[:1] for tap, x in half.items()} for half in (student, teacher))
    torch.testing.assert_close(LD(STRIDES)(student, teacher, target), LD(STRIDES)(*alone, target[:1]))
    assert all(term == 0 for term in LD(STRIDES)(student, teacher, target[1:] * 2).values())
