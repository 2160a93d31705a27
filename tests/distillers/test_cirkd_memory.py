# SPDX-License-Identifier: Apache-2.0
"""CIRKD's memories: their terms against loops, and what enters and leaves them."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlvfm.distillers import CIRKD, cirkd, cirkd_memory_loss

CLASSES, VOID, UNLABELLED = 4, 255, -1


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(*shape, seed=0):
    """Every class but the last, some void and some unlabelled pixels."""
    choice = torch.tensor([0, 1, 2, VOID, UNLABELLED])
    return choice[torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed))]


def distribution(anchor, memory, temperature):
    """Softmax of the cosines of one vector to each row."""
    powers = []
    for entry in memory:
        dot = sum(a * b for a, b in zip(anchor.tolist(), entry.tolist(), strict=True))
        powers.append(math.exp(dot / (math.hypot(*anchor) * math.hypot(*entry)) / temperature))
    return [power / sum(powers) for power in powers]


def reference(student, teacher, memory, temperature):
    divergences = []
    for s, t in zip(student.detach(), teacher, strict=True):
        p, q = distribution(t, memory, temperature), distribution(s, memory, temperature)
        divergences.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    return np.mean(divergences)


@pytest.fixture(params=[2**24, 13], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(cirkd, "_BLOCK", request.param)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_function_against_loops(temperature, block):
    student, teacher, memory = maps(6, 3, seed=1), maps(6, 3, seed=2), maps(5, 3, seed=3)
    loss = cirkd_memory_loss(student, teacher, memory, temperature)
    assert loss.item() == pytest.approx(reference(student, teacher, memory, temperature), rel=1e-9)
    assert cirkd_memory_loss(teacher, 3 * teacher, 2 * memory).item() == pytest.approx(0, abs=1e-12)


def test_gradcheck(block):
    student, teacher, memory = maps(6, 3, seed=1).requires_grad_(), maps(6, 3, seed=2), maps(5, 3, seed=3)
    assert torch.autograd.gradcheck(lambda x: cirkd_memory_loss(x, teacher, memory, 0.5), (student,))


def test_no_pixels_give_zero_and_keep_the_graph():
    student = maps(0, 3).requires_grad_()
    loss = cirkd_memory_loss(student, maps(0, 3), maps(5, 3))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_half_precision_at_extreme_values(value, dtype):
    """Constant maps of one class."""
    distiller = CIRKD(3, 5, CLASSES)
    student = torch.full((1, 3, 3, 3), value, dtype=dtype, requires_grad=True)
    teacher = torch.full((1, 5, 3, 3), -1e4, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        terms = distiller({"map.-1": student}, {"map.-1": teacher}, torch.zeros(1, 3, 3, dtype=torch.long))
        sum(terms.values()).backward()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert all(x.grad.isfinite().all() for x in (student, *distiller.parameters()))
    assert distiller.pixels.entries.dtype == torch.float32


def test_a_ring_of_each_class_overwrites_the_oldest():
    ring = cirkd.ClassMemory(2, 3, 1)
    assert ring.entries.abs().flatten().tolist() == [1] * 6
    ring.entries.zero_()
    for first, second in ((1, 10), (2, 20), (3, 30)):
        vectors = torch.tensor([[first, first + 0.5], [second, second + 0.5]]).unsqueeze(2)
        ring.push(vectors, torch.tensor([[True, True], [first == 2, False]]))
    assert ring.entries[0].flatten().tolist() == [2.5, 3, 3.5]
    assert ring.entries[1].flatten().tolist() == [20, 0, 0]
    assert ring.position.tolist() == [0, 1]


def test_a_draw_takes_equally_many_of_each_class():
    ring = cirkd.ClassMemory(3, 8, 1)
    ring.entries.copy_(torch.arange(24.0).view(3, 8, 1))
    torch.manual_seed(0)
    drawn = ring.draw(10).flatten().tolist()
    assert len(set(drawn)) == 12
    assert [sum(value // 8 == k for value in drawn) for k in range(3)] == [4, 4, 4]
    assert sorted(ring.draw(1000).flatten().tolist()) == list(range(24))


def make(**hparams):
    torch.manual_seed(0)
    return CIRKD(3, 5, CLASSES, **hparams).double()


def test_regions_and_pixels_of_present_classes_enter_the_memories():
    distiller = make(pixel_memory=20, region_memory=4, new_pixels=3)
    before = distiller.pixels.entries.clone(), distiller.regions.entries.clone()
    teacher, target = maps(1, 5, 4, 5, seed=2), labels(1, 4, 5)
    distiller({"map.-1": maps(1, 3, 4, 5)}, {"map.-1": teacher}, target)
    units = F.normalize(teacher, dim=1)[0].movedim(0, -1)
    for k in range(CLASSES):
        own = units[target[0] == k]
        count = min(len(own), 3)
        assert distiller.pixels.position[k] == count
        assert distiller.regions.position[k] == (count > 0)
        if count:
            torch.testing.assert_close(distiller.regions.entries[k, 0], F.normalize(own.mean(0), dim=0))
        entered = distiller.pixels.entries[k, :count]
        assert all(torch.isclose(own, vector).all(1).sum() == 1 for vector in entered)
        assert len(entered.unique(dim=0)) == count
        assert torch.equal(distiller.pixels.entries[k, count:], before[0][k, count:])
    assert torch.equal(distiller.regions.entries[3], before[1][3])
    kept = distiller.pixels.entries.clone()
    distiller.eval()({"map.-1": maps(1, 3, 4, 5)}, {"map.-1": teacher}, target)
    assert torch.equal(distiller.pixels.entries, kept)


def test_memory_terms_compare_labelled_pixels_with_the_whole_memory():
    distiller = make(pixel_memory=20, region_memory=4, memory_pixel_weight=2.0, memory_region_weight=3.0)
    student, teacher, target = maps(2, 3, 4, 5, seed=1), maps(2, 5, 4, 5, seed=2), labels(2, 4, 5)
    full = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    terms = distiller({"map.-1": student}, {"map.-1": teacher}, full)
    assert list(terms) == ["cirkd_pixel", "cirkd_memory_pixel", "cirkd_memory_region"]
    labelled = (target >= 0) & (target != VOID)
    rows = [x.movedim(1, -1)[labelled] for x in (distiller.projector(student), teacher)]
    for name, weight, ring in (("pixel", 2, distiller.pixels), ("region", 3, distiller.regions)):
        expected = weight * reference(*rows, ring.entries.flatten(0, 1), 0.1)
        assert terms[f"cirkd_memory_{name}"].item() == pytest.approx(expected, rel=1e-7)


def test_without_labels_only_the_mini_batch_term_teaches():
    distiller = make()
    student, teacher = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 5, 4, 5, seed=2).requires_grad_()
    terms = distiller({"map.-1": student}, {"map.-1": teacher}, torch.full((2, 4, 5), UNLABELLED))
    assert terms["cirkd_memory_pixel"].item() == terms["cirkd_memory_region"].item() == 0
    sum(terms.values()).backward()
    assert (student.grad != 0).any()
    assert teacher.grad is None


def test_student_and_projector_get_a_gradient_from_the_memory_terms():
    distiller = make(pixel_weight=0.0)
    student, teacher = maps(2, 3, 4, 5, seed=1).requires_grad_(), maps(2, 5, 4, 5, seed=2).requires_grad_()
    sum(distiller({"map.-1": student}, {"map.-1": teacher}, labels(2, 4, 5)).values()).backward()
    assert all((x.grad != 0).any() for x in (student, *distiller.parameters()))
    assert teacher.grad is None


def test_bad_memory_arguments_are_refused():
    with pytest.raises(ValueError, match="pass all three, or none"):
        CIRKD(3, 5)
    with pytest.raises(ValueError, match="do not fit"):
        CIRKD(3, 5, CLASSES, pixel_memory=8)
    with pytest.raises(ValueError, match=r"\(9, 5\) \(memory\)"):
        cirkd_memory_loss(maps(2, 3), maps(2, 3), maps(9, 5))
    with pytest.raises(ValueError, match="need labels"):
        make()({"map.-1": maps(2, 3, 4, 4)}, {"map.-1": maps(2, 5, 4, 4)})


def test_from_context_reads_dimensions_and_classes(context):
    distiller = CIRKD.from_context(context, region_memory=9)
    assert distiller.projector[0].weight.shape == (12, 8, 1, 1)
    assert distiller.regions.entries.shape == (context.num_classes, 9, 12)
    assert list(CIRKD.from_context(context, memory=False).parameters()) == []
