# SPDX-License-Identifier: Apache-2.0
"""AfDCD against loops over the pieces of each patch, worked examples, and what its generator sees."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.distillers import AfDCD, afdcd, afdcd_loss


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(student, teacher, temperature, patch, groups, negatives):
    """One piece at a time."""
    batch, channels, height, width = student.shape
    height, width, size = height // patch * patch, width // patch * patch, channels // groups

    def piece(x, b, i, j, m):
        return x[b, m * size : (m + 1) * size, i, j].tolist()

    def score(b, first, second):
        pairs = zip(piece(student, b, *first), piece(teacher, b, *second), strict=True)
        return math.exp(-sum(abs(x - y) for x, y in pairs) / temperature)

    total = 0.0
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                rows, columns = (range(k // patch * patch, k // patch * patch + patch) for k in (i, j))
                places = [(k, n, other) for k in rows for n in columns for other in range(groups)]
                for m in range(groups):
                    own = (i, j, m)
                    contrasted = [p for p in places if p != own and (negatives == "all" or p[2] != m)]
                    positive = score(b, own, own)
                    total -= math.log(positive / (positive + sum(score(b, own, p) for p in contrasted)))
    return total / (batch * height * width)


@pytest.mark.parametrize("negatives", ["channels", "all"])
@pytest.mark.parametrize(
    ("channels", "size", "patch", "groups"),
    [(6, (2, 4), 2, 3), (4, (3, 3), 3, 2), (4, (2, 3), 1, 4), (6, (5, 4), 2, 2)],
)
def test_function_against_loops(channels, size, patch, groups, negatives):
    """The last map has a row that fills no patch."""
    student, teacher = maps(2, channels, *size, seed=1), maps(2, channels, *size, seed=2)
    loss = afdcd_loss(student, teacher, 0.7, patch, groups, negatives=negatives)
    assert loss.item() == pytest.approx(reference(student, teacher, 0.7, patch, groups, negatives), rel=1e-9)


@pytest.mark.parametrize(("patch", "groups"), [(2, 1), (1, 3)])
def test_positions_alone_and_groups_alone(patch, groups):
    student, teacher = maps(2, 3, 2, 2, seed=1), maps(2, 3, 2, 2, seed=2)
    loss = afdcd_loss(student, teacher, 0.7, patch, groups, negatives="all")
    assert loss.item() == pytest.approx(reference(student, teacher, 0.7, patch, groups, "all"), rel=1e-9)


def test_a_small_map_has_small_patches():
    student, teacher = maps(2, 4, 2, 4, seed=1), maps(2, 4, 2, 4, seed=2)
    tall = [torch.cat([x[..., :2], x[..., 2:]], dim=0) for x in (student, teacher)]  # two maps of 2x2
    torch.testing.assert_close(afdcd_loss(student, teacher, 0.5, 2, 2), afdcd_loss(*tall, 0.5, 3, 2))


def test_worked_examples():
    """Two groups of one channel at one position, apart by 1 in the teacher."""
    teacher = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1)

    def loss(*student):
        student = torch.tensor(student, dtype=torch.float64).view(1, 2, 1, 1)
        return afdcd_loss(student, teacher, temperature=1.0, patch=1, groups=2).item()

    assert loss(0, 1) == pytest.approx(2 * math.log(1 + math.exp(-1)))  # each in its place
    assert loss(1, 0) == pytest.approx(2 * math.log(1 + math.exp(1)))  # exchanged
    assert loss(0.5, 0.5) == pytest.approx(2 * math.log(2))  # undecided


def test_equal_pieces_cannot_be_told_apart():
    """Of constant maps the loss is the logarithm of how many pieces are compared, for each group."""
    x = torch.ones(1, 8, 4, 4)
    assert afdcd_loss(x, x, patch=2, groups=4).item() == pytest.approx(4 * math.log(1 + 4 * 3), rel=1e-6)
    assert afdcd_loss(x, x, patch=2, groups=4, negatives="all").item() == pytest.approx(4 * math.log(16), rel=1e-6)


def test_what_changes_nothing():
    student, teacher = maps(2, 6, 4, 4, seed=1), maps(2, 6, 4, 4, seed=2)
    expected = afdcd_loss(student, teacher, 0.5, 2, 3)

    def other(change):
        return afdcd_loss(change(student), change(teacher), 0.5, 2, 3)

    torch.testing.assert_close(other(lambda x: x + 3), expected)
    torch.testing.assert_close(other(lambda x: -x), expected)
    torch.testing.assert_close(other(lambda x: x.view(2, 3, 2, 4, 4).flip(1).flatten(1, 2)), expected)  # groups
    torch.testing.assert_close(other(lambda x: x.view(2, 3, 2, 4, 4).flip(2).flatten(1, 2)), expected)  # in a group
    torch.testing.assert_close(other(lambda x: x.roll(2, dims=3)), expected)  # whole patches
    torch.testing.assert_close(afdcd_loss(2 * student, 2 * teacher, 1.0, 2, 3), expected)
    assert abs(other(lambda x: x.roll(1, dims=3)) - expected) > 1e-4
    assert abs(other(lambda x: x.roll(1, dims=1)) - expected) > 1e-4


def test_blocks_change_nothing(monkeypatch):
    student, teacher = maps(3, 4, 4, 4, seed=1), maps(3, 4, 4, 4, seed=2)
    results = []
    for block in (2**24, 200, 1):
        monkeypatch.setattr(afdcd, "_BLOCK", block)
        x = student.clone().requires_grad_()
        loss = afdcd_loss(x, teacher, 0.5, 2, 2)
        loss.backward()
        results.append((loss, x.grad))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


@pytest.mark.parametrize("negatives", ["channels", "all"])
def test_gradcheck(negatives):
    student, teacher = maps(2, 4, 2, 2, seed=1).requires_grad_(), maps(2, 4, 2, 2, seed=2)

    def loss(x):
        return afdcd_loss(x, teacher, 0.5, 2, 2, negatives=negatives)

    assert torch.autograd.gradcheck(loss, (student,), raise_exception=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("batch", [1, 2])
def test_half_precision_at_extreme_values(batch, value, dtype):
    student = torch.full((batch, 32, 4, 4), value, dtype=dtype, requires_grad=True)
    teacher = torch.full((batch, 32, 4, 4), -1e4, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = afdcd_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(16 * math.log(1 + 16 * 15), rel=1e-4)
    assert student.grad.isfinite().all()


def test_exchanged_groups_of_large_values_have_a_finite_loss():
    teacher = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1)
    student = teacher.flip(1).requires_grad_()
    loss = afdcd_loss(student, teacher, patch=1, groups=2)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 2e4 / 0.07, rel=1e-5)
    assert student.grad.isfinite().all()


def test_bad_arguments_are_refused():
    x = maps(1, 6, 4, 4)
    with pytest.raises(ValueError, match=r"\(1, 6, 4, 4\) \(student\) and \(1, 6, 4, 2\) \(teacher\)"):
        afdcd_loss(x, x[..., :2])
    with pytest.raises(ValueError, match="groups=4 must divide the 6 channels"):
        afdcd_loss(x, x, groups=4)
    with pytest.raises(ValueError, match="patch must be at least 1, not 0"):
        afdcd_loss(x, x, patch=0, groups=2)
    for size, options in ((4, {"patch": 2}), (4, {"patch": 1, "negatives": "all"}), (1, {"negatives": "all"})):
        with pytest.raises(ValueError, match="leaves no negatives"):
            afdcd_loss(x[..., :size, :size], x[..., :size, :size], groups=1, **options)
    with pytest.raises(ValueError, match="'channels' or 'all', not 'positions'"):
        afdcd_loss(x, x, negatives="positions")
    with pytest.raises(ValueError, match="drop_ratio"):
        AfDCD(6, 6, drop_ratio=1.0)


@pytest.mark.parametrize(("teacher_dim", "groups"), [(768, 16), (112, 16), (12, 12), (36, 12)])
def test_groups_divide_the_teachers_channels(teacher_dim, groups):
    assert AfDCD(2, teacher_dim).groups == groups


@pytest.mark.parametrize("pool", [None, 2])
def test_class_without_a_mask_and_with_an_identity_for_a_generator(pool):
    """Both terms compare the projected map with the teacher's, each weighted; only the contrast is pooled."""
    distiller = AfDCD(
        6, 6, drop_ratio=0.0, pool=pool, patch=2, groups=3, target="raw", feature_weight=2.0, contrast_weight=3.0
    ).double()
    distiller.generator = nn.Identity()
    student, teacher = maps(2, 6, 4, 8, seed=1), maps(2, 6, 4, 8, seed=2)
    terms = distiller({"map.-1": student}, {"map.-1": teacher})
    first, second = (x if pool is None else F.max_pool2d(x, pool) for x in (student, teacher))
    assert terms["afdcd_feature"].item() == pytest.approx(2 * ((student - teacher) ** 2).sum().item() / 2)
    expected = 3 * reference(first, second, 0.07, 2, 3, "channels")
    assert terms["afdcd_contrast"].item() == pytest.approx(expected, rel=1e-9)


def test_masked_positions_are_not_seen_by_the_generator():
    torch.manual_seed(0)
    distiller = AfDCD(3, 4, drop_ratio=0.75, groups=2)
    seen = []
    distiller.generator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    student, teacher = {"map.-1": maps(8, 3, 16, 16).float()}, {"map.-1": maps(8, 4, 16, 16).float()}
    for _ in range(2):
        distiller(student, teacher)
    dropped = [(x == 0).all(dim=1) for x in seen]
    assert torch.equal(dropped[0], (seen[0] == 0).any(dim=1))  # all channels of a position or none
    assert dropped[0].float().mean().item() == pytest.approx(0.75, abs=0.05)
    assert not torch.equal(*dropped)


def test_student_projector_and_generator_learn_and_the_teacher_gets_nothing():
    torch.manual_seed(0)
    distiller = AfDCD(3, 8)
    student, teacher = maps(2, 3, 4, 4, seed=1).float().requires_grad_(), maps(2, 8, 8, 8, seed=2).float()
    terms = distiller({"map.-1": student}, {"map.-1": teacher.requires_grad_()})
    for term in terms.values():
        grads = torch.autograd.grad(term, [student, *distiller.parameters()], retain_graph=True)
        assert all((grad != 0).any() for grad in grads)
    torch.stack(list(terms.values())).sum().backward()
    assert teacher.grad is None
