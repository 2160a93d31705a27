# SPDX-License-Identifier: Apache-2.0
"""TokenRelation against loops, worked examples, the properties of the formulas, and its queue."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import TapError
from kdlvfm.distillers import TokenRelation, image_relation_loss, token_relation, token_relation_loss


def values(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def distribution(anchor, others, temperature):
    """Softmax of the cosines of one vector to each row."""
    powers = []
    for other in others:
        dot = sum(a * b for a, b in zip(anchor.tolist(), other.tolist(), strict=True))
        powers.append(math.exp(dot / (math.hypot(*anchor) * math.hypot(*other)) / temperature))
    return [power / sum(powers) for power in powers]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def image_reference(student, teacher, queue, temperature):
    parts = [
        divergence(distribution(t, queue, temperature), distribution(s, queue, temperature))
        for s, t in zip(student.detach(), teacher, strict=True)
    ]
    return np.mean(parts)


def token_reference(student, teacher, temperature):
    own, goal = (x.detach().flatten(2).transpose(1, 2).numpy() for x in (student, teacher))
    parts = [
        divergence(distribution(t[i], t, temperature), distribution(s[i], s, temperature))
        for s, t in zip(own, goal, strict=True)
        for i in range(len(s))
    ]
    return np.mean(parts)


@pytest.fixture(params=[2**24, 30], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(token_relation, "_BLOCK", request.param)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("entries", [1, 7])
def test_image_function_against_loops(entries, temperature):
    student, teacher, queue = values(3, 4, seed=1), values(3, 4, seed=2), values(entries, 4, seed=3)
    loss = image_relation_loss(student, teacher, queue, temperature)
    expected = image_reference(student, teacher, queue, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("dims", [(3, 5), (2, 2)])
def test_token_function_against_loops(dims, temperature, block):
    student, teacher = values(3, dims[0], 2, 3, seed=1), values(3, dims[1], 2, 3, seed=2)
    loss = token_relation_loss(student, teacher, temperature)
    assert loss.item() == pytest.approx(token_reference(student, teacher, temperature), rel=1e-9)


def test_worked_examples():
    """Similarities (1, 0) of the teacher against two equal ones of the student, at temperature 1."""
    p = math.e / (1 + math.e)
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    unit = torch.eye(2, dtype=torch.float64)
    image = image_relation_loss(torch.ones_like(unit[:1]), unit[:1], unit, temperature=1.0)
    tokens = token_relation_loss(torch.ones(1, 3, 1, 2).double(), unit.view(1, 2, 1, 2), temperature=1.0)
    assert image.item() == pytest.approx(expected, rel=1e-12)
    assert tokens.item() == pytest.approx(expected, rel=1e-12)


def test_zero_at_equality_and_positive_otherwise():
    student, teacher, queue = values(3, 4, seed=1), values(3, 4, seed=2), values(7, 4, seed=3)
    assert image_relation_loss(teacher, teacher, queue).item() == 0
    assert image_relation_loss(student, teacher, queue).item() > 0.01
    student, teacher = values(2, 3, 2, 3, seed=1), values(2, 5, 2, 3, seed=2)
    assert token_relation_loss(teacher, teacher).item() == 0
    assert token_relation_loss(student, teacher).item() > 0.01


def test_the_length_of_a_vector_changes_nothing():
    student, teacher, queue = values(3, 4, seed=1), values(3, 4, seed=2), values(7, 4, seed=3)
    length = values(7, 1, seed=4).abs() + 0.1
    expected = image_relation_loss(student, teacher, queue)
    torch.testing.assert_close(image_relation_loss(student * length[:3], teacher * 2, queue * length), expected)
    student, teacher = values(2, 3, 2, 3, seed=1), values(2, 5, 2, 3, seed=2)
    length = values(2, 1, 2, 3, seed=4).abs() + 0.1
    expected = token_relation_loss(student, teacher)
    torch.testing.assert_close(token_relation_loss(student * length, teacher / length), expected)
    rotation = torch.linalg.qr(values(5, 5, seed=5))[0]
    rotated = torch.einsum("oc,bchw->bohw", rotation, teacher)
    torch.testing.assert_close(token_relation_loss(student, rotated), expected)


def test_entries_of_the_queue_and_tokens_have_no_order():
    student, teacher, queue = values(3, 4, seed=1), values(3, 4, seed=2), values(7, 4, seed=3)
    torch.testing.assert_close(
        image_relation_loss(student, teacher, queue.flip(0)), image_relation_loss(student, teacher, queue)
    )
    student, teacher = values(2, 3, 2, 3, seed=1), values(2, 5, 2, 3, seed=2)
    expected = token_relation_loss(student, teacher)
    torch.testing.assert_close(token_relation_loss(student.flip(3), teacher.flip(3)), expected)
    assert abs(token_relation_loss(student.flip(3), teacher) - expected) > 1e-3


def test_gradcheck(block):
    student, teacher, queue = values(3, 4, seed=1).requires_grad_(), values(3, 4, seed=2), values(5, 4, seed=3)
    assert torch.autograd.gradcheck(lambda x: image_relation_loss(x, teacher, queue, 0.5), (student,))
    student, teacher = values(2, 3, 2, 3, seed=1).requires_grad_(), values(2, 4, 2, 3, seed=2)
    assert torch.autograd.gradcheck(lambda x: token_relation_loss(x, teacher, 0.5), (student,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_half_precision_at_extreme_values(value, dtype, block):
    """One sample, constant maps, a queue of zeros or of one direction: all distributions are uniform."""
    maps = torch.full((1, 3, 6, 6), value, dtype=dtype, requires_grad=True)
    embedding = torch.full((1, 3), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = token_relation_loss(maps, torch.full((1, 5, 6, 6), -1e4, dtype=dtype))
        loss = loss + image_relation_loss(embedding, -embedding, torch.zeros(4, 3))
        loss = loss + image_relation_loss(embedding, -embedding, torch.full((4, 3), 1e4))
        loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert maps.grad.isfinite().all()
    assert embedding.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision(block):
    student, teacher, queue = (values(3, 4, seed=seed).float() for seed in (1, 2, 3))
    first, second = values(3, 8, 3, 3, seed=1).float(), values(3, 8, 3, 3, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, tokens = image_relation_loss(student, teacher, queue), token_relation_loss(first, second)
    expected = image_relation_loss(student.double(), teacher.double(), queue.double())
    assert image.item() == pytest.approx(expected.item(), rel=1e-4)
    assert tokens.item() == pytest.approx(token_relation_loss(first.double(), second.double()).item(), rel=1e-4)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) \(student\), \(2, 5\) \(teacher\) and \(9, 5\) \(queue\)"):
        image_relation_loss(values(2, 3), values(2, 5), values(9, 5))
    with pytest.raises(ValueError, match=r"\(9, 5\) \(queue\)"):
        image_relation_loss(values(2, 3), values(2, 3), values(9, 5))
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\) \(teacher\)"):
        token_relation_loss(values(2, 3, 4, 4), values(2, 3, 8, 8))
    with pytest.raises(ValueError, match="queue_size must be at least 2"):
        TokenRelation(3, 5, 5, 1)


def make(**hparams):
    torch.manual_seed(0)
    return TokenRelation(3, 5, 4, 6, temperature=0.5, **hparams).double()


@pytest.mark.parametrize(("resize", "target"), [("student", "raw"), ("teacher", "standardize")])
def test_class_on_maps_of_other_channels_and_size(resize, target):
    distiller = make(image_weight=2.0, token_weight=3.0, resize=resize, target=target)
    distiller.queue.copy_(values(6, 4, seed=5))
    student, teacher, pooled = values(2, 3, 2, 3, seed=1), values(2, 5, 4, 6, seed=2) + 2, values(2, 4, seed=3)
    entries = torch.cat([pooled, distiller.queue])[:6]
    size, goal = (4, 6) if resize == "student" else (2, 3), teacher
    if target == "standardize":
        array = teacher.numpy()
        mean, std = array.mean((0, 2, 3), keepdims=True), np.std(array, (0, 2, 3), keepdims=True)
        goal = torch.from_numpy((array - mean) / std)
    pair = [
        x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", antialias=x.shape[3] > size[1])
        for x in (distiller.token_projector(student), goal)
    ]
    embedding = distiller.image_projector(student.mean((2, 3)))
    terms = distiller({"map.-1": student}, {"map.-1": teacher, "pooled": pooled})
    assert list(terms) == ["image_relation", "token_relation"]
    assert terms["image_relation"].item() == pytest.approx(2 * image_reference(embedding, pooled, entries, 0.5))
    assert terms["token_relation"].item() == pytest.approx(3 * token_reference(*pair, 0.5), rel=1e-6)


def test_the_queue_takes_new_embeddings_first_and_drops_the_oldest():
    distiller, batches = make(), [values(4, 4, seed=seed) for seed in range(3)]
    student, tokens = {"map.-1": values(4, 3, 2, 2)}, values(4, 5, 2, 2)
    for pooled in batches:
        distiller(student, {"map.-1": tokens, "pooled": pooled})
    expected = F.normalize(torch.cat([batches[2], batches[1]])[:6])
    torch.testing.assert_close(distiller.queue, expected)
    distiller.eval()(student, {"map.-1": tokens, "pooled": batches[0]})
    torch.testing.assert_close(distiller.queue, expected)
    assert torch.equal(distiller.state_dict()["queue"], distiller.queue)


def test_a_batch_may_be_larger_than_the_queue():
    distiller, pooled = make(), values(9, 4, seed=1)
    distiller({"map.-1": values(9, 3, 2, 2)}, {"map.-1": values(9, 5, 2, 2), "pooled": pooled})
    torch.testing.assert_close(distiller.queue, F.normalize(pooled[:6]))


def test_the_queue_stays_in_single_precision_under_autocast():
    distiller = TokenRelation(3, 5, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = {"map.-1": torch.rand(2, 5, 2, 2).bfloat16(), "pooled": torch.rand(2, 4).bfloat16()}
        distiller({"map.-1": torch.rand(2, 3, 2, 2).bfloat16()}, features)
    assert distiller.queue.dtype == torch.float32
    torch.testing.assert_close(distiller.queue[:2].norm(dim=1), torch.ones(2))


def test_a_map_as_the_embedding_is_averaged():
    student, tokens = {"map.-1": values(4, 3, 2, 2)}, values(4, 4, 2, 2, seed=1)
    averaged = TokenRelation(3, 4, 4, 6, pooled_tap="map.-1").double()
    given = TokenRelation(3, 4, 4, 6).double()
    given.load_state_dict(averaged.state_dict())
    expected = given(student, {"map.-1": tokens, "pooled": tokens.mean((2, 3))})
    torch.testing.assert_close(averaged(student, {"map.-1": tokens}), expected)


def test_student_and_projectors_get_a_gradient_and_the_teacher_none():
    distiller = make()
    student = values(2, 3, 2, 2, seed=1).requires_grad_()
    teacher = {"map.-1": values(2, 5, 4, 4, seed=2).requires_grad_(), "pooled": values(2, 4, seed=3).requires_grad_()}
    sum(distiller({"map.-1": student}, teacher).values()).backward()
    assert all(x.grad is None for x in teacher.values())
    assert all((x.grad != 0).any() for x in (student, *distiller.parameters()))
    assert not distiller.queue.requires_grad


def test_from_context_reads_dimensions_and_the_size_of_the_data(context):
    distiller = TokenRelation.from_context(context)
    assert distiller.token_projector.weight.shape == (12, 8, 1, 1)
    assert distiller.image_projector.weight.shape == (12, 8)
    assert len(distiller.queue) == context.num_samples // 4
    chosen = TokenRelation.from_context(context, pooled_tap="decoder", queue_size=5)
    assert chosen.image_projector.weight.shape == (24, 8)
    assert len(chosen.queue) == 5
    with pytest.raises(TapError, match="pooled"):
        TokenRelation.from_context(context, pooled_tap="poold")
