# SPDX-License-Identifier: Apache-2.0
"""The discriminator's pieces against loops, and the gradient penalty against slopes known in closed form."""

import copy
import math

import pytest
import torch

from kdlvfm.core.discriminator import Discriminator, SelfAttention, gradient_penalty


def maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    return Discriminator(dim=5, width=8)


def test_self_attention_against_loops():
    torch.manual_seed(0)
    layer = SelfAttention(8).double()
    torch.nn.init.constant_(layer.gamma, 0.5)
    x = maps(2, 8, 2, 3)
    query, key, value = (part(x).detach().flatten(2) for part in (layer.query, layer.key, layer.value))
    expected = x.flatten(2).clone()
    for b in range(2):
        for i in range(6):
            weights = [math.exp(float(query[b, :, i] @ key[b, :, j])) for j in range(6)]
            for j in range(6):
                expected[b, :, i] += 0.5 * weights[j] / sum(weights) * value[b, :, j]
    torch.testing.assert_close(layer(x).detach(), expected.view_as(x))


def test_self_attention_starts_as_the_identity():
    x = maps(1, 8, 3, 3).float()
    assert torch.equal(SelfAttention(8)(x), x)


def test_convolutions_have_a_spectral_norm_of_one(discriminator):
    for _ in range(200):  # each training step is one power iteration
        discriminator(torch.zeros(1, 5, 64, 64))
    normed = [layer for layer in discriminator.layers if hasattr(layer, "parametrizations")]
    assert len(normed) == 4
    for layer in normed:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-3)


def test_scores_do_not_depend_on_the_scale_and_offset_of_a_channel(discriminator):
    x = maps(2, 5, 64, 64).float()
    scale = torch.tensor([100.0, 1.0, 3.0, 0.5, 7.0]).view(1, 5, 1, 1)
    discriminator.eval()
    torch.testing.assert_close(discriminator(scale * x - 3), discriminator(x), rtol=1e-3, atol=1e-4)


def test_the_image_is_judged_along(discriminator):
    x, images = maps(2, 2, 64, 64).float(), torch.rand(2, 3, 64, 64)
    discriminator.eval()
    assert torch.equal(discriminator(x, images), discriminator(torch.cat([x, images], dim=1)))
    assert discriminator(x, images).shape == (2,)
    assert not torch.allclose(discriminator(x, images), discriminator(x, images.flip(3)), atol=1e-6)


def test_scores_are_of_single_precision_under_autocast(discriminator):
    discriminator.eval()
    x = maps(1, 5, 64, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = discriminator(x)
    assert torch.equal(scores, discriminator(x.float()))


def test_penalty_of_a_linear_score_is_known():
    """The slope of w . x is w everywhere."""
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64).view(1, 2, 1, 1)
    penalty = gradient_penalty(
        lambda x: (weight * x).sum((1, 2, 3)), maps(3, 2, 1, 1), maps(3, 2, 1, 1, seed=1), torch.rand(3, 1, 1, 1)
    )
    assert penalty.item() == pytest.approx((5 - 1) ** 2)


def test_penalty_looks_between_the_two_maps():
    """The slope of |x|² / 2 is x, at the place drawn: a share of the way from the student to the teacher."""
    student, teacher = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    share = torch.tensor([0.25, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    lengths = [math.hypot(*(0.75 * student[0] + 0.25 * teacher[0]).flatten().tolist())]
    lengths.append(math.hypot(*teacher[1].flatten().tolist()))
    penalty = gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, student, teacher, share)
    assert penalty.item() == pytest.approx(sum((length - 1) ** 2 for length in lengths) / 2)


def test_penalty_reaches_the_discriminator_only():
    student, teacher = maps(2, 3, 2, 2).requires_grad_(), maps(2, 3, 2, 2, seed=1).requires_grad_()
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    share = torch.rand(2, 1, 1, 1, dtype=torch.float64)

    def penalty(weight):
        return gradient_penalty(lambda x: weight * x.square().sum((1, 2, 3)), student, teacher, share)

    assert torch.autograd.gradcheck(penalty, (weight,))
    penalty(weight).backward()
    assert weight.grad != 0
    assert student.grad is None
    assert teacher.grad is None


@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("batch", [1, 2])
def test_constant_maps_give_finite_gradients_of_gradients(discriminator, batch, value):
    x = torch.full((batch, 5, 64, 64), value)
    penalty = gradient_penalty(discriminator, x, x, torch.rand(batch, 1, 1, 1))
    (penalty + discriminator(x).mean()).backward()
    assert penalty.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in discriminator.parameters())


def test_state_survives_a_checkpoint(discriminator):
    x = maps(2, 5, 64, 64).float()
    discriminator(x)
    other = Discriminator(dim=5, width=8)
    other.load_state_dict(copy.deepcopy(discriminator.state_dict()))
    assert torch.equal(other(x), discriminator(x))
