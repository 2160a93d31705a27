# SPDX-License-Identifier: Apache-2.0
"""CSKD: attention against loops, CKA against doubly centred Gram matrices in numpy, and how the class joins them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from kdlvfm.core import TapError, Teacher
from kdlvfm.core.align import match_size
from kdlvfm.distillers import CSKD, cka_loss
from kdlvfm.distillers.cskd import PositionAttention, channel_attention, cka, position_attention
from kdlvfm.distillers.cwd import cwd_loss


def features(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def orthogonal(dim, seed=0):
    return torch.linalg.qr(features(dim, dim, seed=seed))[0]


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def attended_channels(x, gamma, temperature):
    result = x.clone()
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            energy = [(x[b, i] * x[b, j]).sum().item() for j in range(x.shape[1])]
            weights = softmax([(max(energy) - value) / temperature for value in energy])
            result[b, i] += gamma * sum(weight * x[b, j] for j, weight in enumerate(weights))
    return result


def attended_positions(x, query, key, value, gamma, temperature):
    flat, q, k, v = (y.flatten(2) for y in (x, query, key, value))
    result = flat.clone()
    for b in range(x.shape[0]):
        for i in range(flat.shape[2]):
            energy = [(q[b, :, i] @ k[b, :, j]).item() / temperature for j in range(flat.shape[2])]
            result[b, :, i] += gamma * sum(weight * v[b, :, j] for j, weight in enumerate(softmax(energy)))
    return result.view(x.shape)


def alignment(student, teacher):
    """CKA by centring the N x N Gram matrices on both sides."""
    count = len(student)
    centring = np.eye(count) - 1 / count
    first, second = (
        centring @ (x @ x.T) @ centring for x in (y.reshape(count, -1).numpy() for y in (student, teacher))
    )
    return np.sum(first * second) / np.sqrt(np.sum(first * first) * np.sum(second * second))


def divergence(student, teacher):
    return max(-math.log(abs(alignment(student, teacher)) + 1e-8), 0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_channel_attention_against_loops(temperature):
    x = features(2, 4, 3, 2)
    expected = attended_channels(x, 0.7, temperature)
    torch.testing.assert_close(channel_attention(x, 0.7, temperature), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_position_attention_against_loops(temperature):
    x, query, key = features(2, 4, 3, 2), features(2, 2, 3, 2, seed=1), features(2, 2, 3, 2, seed=2)
    value = features(2, 4, 3, 2, seed=3)
    expected = attended_positions(x, query, key, value, 0.7, temperature)
    torch.testing.assert_close(position_attention(x, query, key, value, 0.7, temperature), expected)


def test_attention_is_the_identity_at_gamma_zero_and_otherwise_follows_permutations():
    x, query = features(2, 4, 1, 6), features(2, 2, 1, 6, seed=1)
    assert torch.equal(channel_attention(x, 0.0), x)
    assert torch.equal(position_attention(x, query, query, -x, 0.0), x)
    order = [3, 1, 0, 2]
    torch.testing.assert_close(channel_attention(x[:, order], 1.0), channel_attention(x, 1.0)[:, order])
    moved = position_attention(x.flip(3), query.flip(3), query.flip(3), x.flip(3), 1.0)
    torch.testing.assert_close(moved, position_attention(x, query, query, x, 1.0).flip(3))


def test_the_module_projects_and_attends():
    torch.manual_seed(0)
    attention, x = PositionAttention(16).double(), features(2, 16, 3, 2)
    assert attention.query.weight.shape == attention.key.weight.shape == (2, 16, 1, 1)
    projected = [
        torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias.view(-1, 1, 1)
        for conv in (attention.query, attention.key, attention.value)
    ]
    torch.testing.assert_close(
        attention(x, 0.5, 2.0), attended_positions(x, *(y.detach() for y in projected), 0.5, 2.0)
    )
    assert PositionAttention(3).query.out_channels == 1


@pytest.mark.parametrize(("count", "dims"), [(3, (2, 5)), (4, (6, 3)), (20, (3, 7)), (20, (1, 1)), (6, (40, 30))])
def test_cka_against_gram_matrices(count, dims):
    """Both forms: more samples than dimensions, and fewer."""
    student, teacher = features(count, 1, dims[0], seed=1) + 2, features(count, dims[1], seed=2, scale=9.0)
    expected = alignment(student, teacher)
    assert cka(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert cka_loss(student, teacher).item() == pytest.approx(divergence(student, teacher), rel=1e-9)
    assert 0 <= expected <= 1


def test_cka_of_one_dimension_is_the_squared_correlation():
    """Correlation 1/2: -ln(1/4)."""
    first, second = torch.tensor([-1.0, 0.0, 1.0]).double()[:, None], torch.tensor([-1.0, 1.0, 0.0]).double()[:, None]
    assert np.corrcoef(first[:, 0], second[:, 0])[0, 1] == pytest.approx(0.5)
    assert cka(first, second).item() == pytest.approx(0.25, rel=1e-12)
    assert cka_loss(first, second).item() == pytest.approx(1.386294, abs=1e-6)


@pytest.mark.parametrize("count", [3, 20])
def test_scale_offset_and_rotation_of_either_side_change_nothing(count):
    student, teacher = features(count, 6, seed=1), features(count, 9, seed=2)
    expected = cka(student, teacher)
    torch.testing.assert_close(cka(-3e3 * student + 5, teacher), expected)
    torch.testing.assert_close(cka(student, teacher / 7 - 4), expected)
    torch.testing.assert_close(cka(student @ orthogonal(6), teacher @ orthogonal(9)), expected)
    torch.testing.assert_close(cka(student @ orthogonal(6), student), torch.ones((), dtype=torch.float64))


def test_two_samples_always_agree_and_equal_features_cost_nothing():
    assert cka_loss(features(2, 5, seed=1), features(2, 3, seed=2)).item() == pytest.approx(0, abs=1e-12)
    for dtype in (torch.float32, torch.float64):
        x = features(5, 7).to(dtype)
        assert 0 <= cka_loss(x, x).item() < 1e-6


@pytest.mark.parametrize(("count", "dims"), [(4, (3, 5)), (8, (2, 3))])
def test_gradcheck_of_cka(count, dims):
    student, teacher = features(count, dims[0], seed=1).requires_grad_(), features(count, dims[1], seed=2)
    assert torch.autograd.gradcheck(lambda x: cka_loss(x, teacher), (student,), raise_exception=True)


def test_gradcheck_of_the_attentions():
    x, gamma = features(2, 3, 2, 2).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    query, key = (features(2, 2, 2, 2, seed=seed).requires_grad_() for seed in (1, 2))
    value = features(2, 3, 2, 2, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(channel_attention, (x, gamma), raise_exception=True)
    assert torch.autograd.gradcheck(position_attention, (x, query, key, value, gamma), raise_exception=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("value", [0.0, 1e4, 777.7])
def test_cka_of_constant_features_says_nothing(value, count, dtype):
    student = torch.full((count, 7), value, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = cka_loss(student, features(count, 3).to(dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-6)
    assert (student.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_before_any_arithmetic(dtype):
    x, y = features(4, 8, 3, 3, scale=100.0).to(dtype), features(4, 8, 3, 3, seed=1, scale=100.0).to(dtype)
    for part in (cka_loss, lambda x, y: channel_attention(x, 1.0), lambda x, y: position_attention(x, y, y, x, 1.0)):
        with torch.autocast("cpu", dtype=dtype):
            got = part(x, y)
        torch.testing.assert_close(got, part(x.double(), y.double()).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("spike", [0.0, 1e4])
def test_class_at_extreme_values(spike, target, dtype, batch):
    """A constant student, and a teacher that is constant or has one position of large values."""
    cskd = CSKD(8, 6, logit_weight=0, target=target)
    student, teacher = torch.full((batch, 8, 6, 6), 1e3, dtype=dtype), torch.full((batch, 6, 3, 3), 1e4, dtype=dtype)
    teacher[:, :, 0, 0] -= 2 * spike
    student.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        terms = cskd({"map.-1": student}, {"map.-1": teacher})
    sum(terms.values()).backward()
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    trained = [parameter for parameter in cskd.parameters() if parameter.requires_grad]
    assert all(x.grad.isfinite().all() for x in (student, *trained))


def by_hand(cskd, student, teacher, compare):
    """The two terms without their weights, from the parts tested above."""
    attention, fixed, temperature = cskd.student_attention, cskd.teacher_attention, cskd.temperature
    channel = compare(channel_attention(student, 1.0, temperature), channel_attention(teacher, 1.0, temperature))
    rows, columns = student.shape[2:]
    tall, wide = math.ceil(rows / cskd.grid), math.ceil(columns / cskd.grid)
    patches = []
    for top in range(0, rows, tall):
        for left in range(0, columns, wide):
            cut = (slice(None), slice(None), slice(top, top + tall), slice(left, left + wide))
            patches.append(compare(attention(student[cut], 1.0, temperature), fixed(teacher[cut], 1.0, temperature)))
    return channel, sum(patches) / len(patches), len(patches)


def test_class_on_images():
    torch.manual_seed(0)
    cskd = CSKD(8, 6, target="raw", logit_temperature=3.0).double()
    student, teacher = features(4, 8, 5, 6, seed=1), features(4, 6, 5, 6, seed=2)
    logits = features(4, 3, 10, 12, seed=3), features(4, 3, 5, 6, seed=4)
    terms = cskd({"map.-1": student, "logits": logits[0]}, {"map.-1": teacher, "logits": logits[1]})
    channel, position, count = by_hand(cskd, student, teacher, lambda x, y: divergence(x.detach(), y.detach()))
    assert count == 15
    assert list(terms) == ["cskd_channel", "cskd_position", "cskd_logits"]
    assert terms["cskd_channel"].item() == pytest.approx(0.3 * channel, rel=1e-8)
    assert terms["cskd_position"].item() == pytest.approx(0.8 * position, rel=1e-8)
    torch.testing.assert_close(terms["cskd_logits"], 3 * cwd_loss(*match_size(*logits), 3.0))


@pytest.mark.parametrize(("samples", "batch"), [("positions", 4), ("images", 2), ("images", 1)])
def test_class_on_positions_and_for_few_images(samples, batch):
    torch.manual_seed(0)
    cskd = CSKD(8, 6, target="raw", samples=samples, grid=2, logit_weight=0).double()
    student, teacher = features(batch, 8, 4, 6, seed=1), features(batch, 6, 4, 6, seed=2)

    def compare(*pair):
        rows = [torch.stack([x[b, :, i, j] for b in range(batch) for i, j in np.ndindex(*x.shape[2:])]) for x in pair]
        return divergence(*(x.detach() for x in rows))

    channel, position, count = by_hand(cskd, student, teacher, compare)
    assert count == 4
    terms = cskd({"map.-1": student}, {"map.-1": teacher})
    assert terms["cskd_channel"].item() == pytest.approx(0.3 * channel, rel=1e-8)
    assert terms["cskd_position"].item() == pytest.approx(0.8 * position, rel=1e-8)


@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
def test_maps_of_two_sizes_meet_and_the_teacher_is_standardised(resize):
    torch.manual_seed(0)
    cskd = CSKD(8, 6, resize=resize, logit_weight=0).double()
    student, teacher = features(4, 8, 6, 6, seed=1), features(4, 6, 3, 3, seed=2)
    var, mean = torch.var_mean(teacher, (0, 2, 3), keepdim=True, unbiased=False)
    pair = match_size(student, (teacher - mean) / var.sqrt(), resize)
    channel, position, _ = by_hand(cskd, *pair, lambda x, y: divergence(x.detach(), y.detach()))
    outlier = teacher * torch.tensor([1.0, 500.0, 1.0, 1.0, 1.0, 3.0]).view(6, 1, 1) + 40
    terms = cskd({"map.-1": student}, {"map.-1": outlier})
    assert terms["cskd_channel"].item() == pytest.approx(0.3 * channel, rel=1e-6)
    assert terms["cskd_position"].item() == pytest.approx(0.8 * position, rel=1e-6)


def test_gathered_batches_are_compared_as_one(monkeypatch):
    """One process with half the batch, which is handed the other half."""
    torch.manual_seed(0)
    cskd = CSKD(8, 6, target="raw", logit_weight=0, gather=True).double()
    student, teacher = features(6, 8, 5, 5, seed=1), features(6, 6, 5, 5, seed=2)
    rest = {student[:3].sum().item(): student[3:], teacher[:3].sum().item(): teacher[3:]}
    monkeypatch.setattr("kdlvfm.distillers.cskd.gather_batch", lambda x: torch.cat([x, rest[x.sum().item()]]))
    terms = cskd({"map.-1": student[:3]}, {"map.-1": teacher[:3]})
    cskd.gather = False
    torch.testing.assert_close(terms, cskd({"map.-1": student}, {"map.-1": teacher}))


def test_what_is_trained_and_what_is_not():
    torch.manual_seed(0)
    cskd = CSKD(8, 6, logit_weight=0).double()
    student, teacher = features(4, 8, 6, 6, seed=1).requires_grad_(), features(4, 6, 3, 3, seed=2).requires_grad_()
    sum(cskd({"map.-1": student}, {"map.-1": teacher}).values()).backward()
    assert (student.grad != 0).any()
    assert teacher.grad is None
    for name, parameter in cskd.named_parameters():
        if name.startswith("teacher_attention"):
            assert parameter.grad is None
            assert not parameter.requires_grad
        elif name != "student_attention.key.bias":  # the same for all keys of a query, which a softmax ignores
            assert (parameter.grad != 0).any()


def test_wrong_choices_are_refused():
    with pytest.raises(ValueError, match="samples must be 'images' or 'positions', not 'pixels'"):
        CSKD(3, 5, samples="pixels")
    with pytest.raises(ValueError, match="grid must be at least 1, not 0"):
        CSKD(3, 5, grid=0)
    with pytest.raises(ValueError, match=r"the same samples, not 3 \(student\) and 4 \(teacher\)"):
        cka_loss(features(3, 5), features(4, 5))


def test_from_context_reads_dimensions_and_whether_there_are_logits(context, toy_model):
    cskd = CSKD.from_context(context)
    assert (cskd.student_attention.value.in_channels, cskd.teacher_attention.value.in_channels) == (8, 12)
    assert (cskd.student_taps, cskd.teacher_taps) == (("map.-1", "logits"),) * 2
    cskd = CSKD.from_context(context, student_tap="decoder", logit_weight=0)
    assert cskd.student_attention.value.in_channels == 16
    assert (cskd.student_taps, cskd.teacher_taps) == (("decoder",), ("map.-1",))
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        CSKD.from_context(context, student_tap="map.3")
    without = dataclasses.replace(context, teacher=Teacher(toy_model(num_classes=0)))
    assert CSKD.from_context(without).student_taps == ("map.-1",)
