# SPDX-License-Identifier: Apache-2.0
"""Surrogate images: which are read, what is cut out of them, and which of them are used."""

import pytest
import torch

from kdlvfm.core import Context, TapError, Teacher
from kdlvfm.core.align import resize_map
from kdlvfm.distillers.synthesizers import Surrogate, joint_confidence


class Photographs:
    """Images of one colour each, of odd sizes; `read` notes which were asked for."""

    def __init__(self, count=7):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return torch.full((3, 20 + index, 45 - index), 30 * index, dtype=torch.uint8)


@pytest.fixture
def blank(make_step):
    return make_step(images=torch.zeros(()).expand(4, 3, 24, 32), target=None)


def made_by(synthesizer, blank, taps=()):
    with pytest.raises(StopIteration) as end:
        next(synthesizer.synthesize(blank, taps))
    return end.value.value


def test_confidence_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 4, 3, 2, generator=generator) for _ in range(2))
    joint = (student.softmax(1) + teacher.softmax(1)) / 2
    classes = joint.argmax(1)
    expected = [
        sum(float(joint[i, :, h, w].max() / (classes == classes[i, h, w]).sum()) for h in range(3) for w in range(2))
        for i in range(5)
    ]
    torch.testing.assert_close(joint_confidence(student, teacher), torch.tensor(expected))
    pooled = joint_confidence(student[:, :, 0, 0], teacher[:, :, 0, 0])
    torch.testing.assert_close(pooled, joint_confidence(student[:, :, :1, :1], teacher[:, :, :1, :1]))


def test_a_rare_class_counts_as_much_as_a_background_that_is_everywhere():
    logits = torch.zeros(3, 2, 4, 4)
    logits[:, 0] = 9.0
    logits[1, :, 0, 0] = torch.tensor([0.0, 9.0])
    assert joint_confidence(logits, logits).argmax() == 1


def test_who_is_unsure_is_left_out():
    logits = torch.zeros(3, 2, 1, 1)
    logits[:, 0] = torch.tensor([0.1, 5.0, 1.0]).view(3, 1, 1)
    assert joint_confidence(logits, logits).argsort().tolist() == [0, 2, 1]


def test_images_are_read_when_they_are_needed():
    photographs = Photographs()
    surrogate = Surrogate(photographs, candidates=1)
    assert photographs.read == []
    torch.manual_seed(0)
    images = surrogate.read(5, (8, 12))
    assert len(photographs.read) == 5
    assert images.shape == (5, 3, 8, 12)
    for image, index in zip(images, photographs.read, strict=True):
        torch.testing.assert_close(image, torch.full_like(image, 30 * index / 255))


def test_a_part_has_the_shape_of_the_image_and_lies_within():
    column = torch.arange(200, dtype=torch.uint8).expand(3, 100, 200)
    surrogate = Surrogate([column], candidates=1, smallest=0.25)
    spans = []
    torch.manual_seed(0)
    for image in surrogate.read(50, (20, 20)) * 255:
        left, right = sorted((image[0, 0, 0].item(), image[0, 0, -1].item()))
        assert 0 <= left < right < 200
        spans.append(right - left)
    assert 20 < min(spans) < 45
    assert 75 < max(spans) < 100
    whole = Surrogate([column[:, :, :100]], candidates=1, smallest=1.0).read(1, (20, 20))[0]
    expected = resize_map(column[None, :, :, :100].float() / 255, (20, 20))[0]
    assert torch.allclose(whole, expected) or torch.allclose(whole, expected.flip(2))


def test_the_best_candidates_are_used_and_the_teacher_looks_once(blank, teacher, student):
    surrogate = Surrogate(Photographs(), candidates=3)
    teacher.model.calls.clear()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    torch.manual_seed(0)
    made = made_by(surrogate, blank, ("map.-1", "logits"))
    assert len(teacher.model.calls) == 1
    torch.manual_seed(0)
    candidates = surrogate.read(12, (24, 32))
    own = student.eval()(candidates, ("logits",))["logits"]
    seen = teacher(candidates, ("map.-1", "logits"))
    best = joint_confidence(own, seen["logits"]).topk(4).indices
    torch.testing.assert_close(made.images, candidates[best])
    for tap, value in made.seen.teacher.items():
        torch.testing.assert_close(value, seen[tap][best])
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_a_single_candidate_is_used_unseen(blank, teacher):
    teacher.model.calls.clear()
    made = made_by(Surrogate(Photographs(), candidates=1), blank)
    assert made.images.shape == (4, 3, 24, 32)
    assert teacher.model.calls == []
    assert not made.seen.teacher


def test_without_classes_nothing_is_selected(context, toy_model):
    blind = Context(context.student, Teacher(toy_model(num_classes=0)), context.task, 5, 12)
    other = Context(context.student, Teacher(toy_model(num_classes=7)), context.task, 5, 12)
    assert Surrogate.from_context(context, images=Photographs()).candidates > 1
    for found in (blind, other):
        assert Surrogate.from_context(found, images=Photographs()).candidates == 1
    with pytest.raises(TapError, match="has no classes"):
        Surrogate.from_context(blind, images=Photographs(), candidates=2)
    with pytest.raises(ValueError, match="not of the same classes"):
        Surrogate.from_context(other, images=Photographs(), candidates=2)


@pytest.mark.parametrize("options", [{"candidates": 0}, {"smallest": 0}, {"smallest": 1.5}])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match="candidates must be"):
        Surrogate(Photographs(), **options)
    with pytest.raises(ValueError, match="no surrogate images"):
        Surrogate([], **options)
