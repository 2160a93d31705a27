# SPDX-License-Identifier: Apache-2.0
"""PHI-S against numpy, and what it promises."""

import numpy as np
import pytest
import torch

from kdlvfm.core.phi_s import PHISTransform, balancing_rotation


def features(*shape, seed=0):
    """Correlated channels of very different size, as a ViT has."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 2, shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scales
    return torch.einsum("oc,bc...->bo...", mixing, x) + 5


# 36, 40, 100 and 7 have no Hadamard matrix by the constructions at hand; 192 to 1280 are the widths of ViTs.
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 12, 36, 40, 64, 100, 192, 384, 768, 1280])
def test_the_rotation_spreads_the_eigenvalues_evenly(dim):
    values = torch.rand(dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64) ** 4 * 100
    rotation = balancing_rotation(values)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-12)
    spread = (rotation * values) @ rotation.T
    torch.testing.assert_close(spread.diagonal(), values.mean().expand(dim), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dim", [2, 4, 12, 24, 192, 384, 768, 1024])
def test_it_is_a_hadamard_matrix_where_one_is_known(dim):
    rotation = balancing_rotation(torch.rand(dim, dtype=torch.float64))
    torch.testing.assert_close(rotation.abs() * dim**0.5, torch.ones(dim, dim, dtype=torch.float64))


@pytest.mark.parametrize("values", [torch.zeros(7), torch.ones(7), torch.tensor([0.0, 0, 0, 0, 0, 0, 3])])
def test_the_rotation_of_degenerate_values_is_still_one(values):
    rotation = balancing_rotation(values.double())
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)
    spread = (rotation * values.double()) @ rotation.T
    torch.testing.assert_close(spread.diagonal(), values.double().mean().expand(7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(200, 6), (3, 12, 9, 8)])
def test_facts_of_the_transform(shape):
    x = features(*shape)
    phi = PHISTransform(shape[1]).double().fit(x)
    rows = x.movedim(1, -1).flatten(0, -2).numpy()
    y = phi(x).movedim(1, -1).flatten(0, -2).numpy()
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(y.var(0), 1, rtol=1e-4)
    singular = np.linalg.svd(phi.weight.numpy(), compute_uv=False)
    expected = 1 / np.sqrt(np.mean(np.linalg.eigvalsh(np.cov(rows.T, bias=True))))
    np.testing.assert_allclose(singular, expected, rtol=1e-4)
    before, after = (np.linalg.norm(z[:50, None] - z[None, :50], axis=-1) for z in (rows, y))
    np.testing.assert_allclose(after, before * expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(phi.inverse(phi(x)).numpy(), x.numpy(), rtol=1e-6, atol=1e-4)


def test_what_is_observed_in_parts_is_what_is_observed_at_once():
    x = features(8, 12, 5, 5)
    parts, whole = PHISTransform(12).double(), PHISTransform(12).double().fit(x)
    for part in x.split([1, 4, 3]):
        parts.observe(part)
    parts.refit()
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.scatter, whole.scatter, rtol=1e-4, atol=1e-2)


def test_fitting_again_forgets():
    phi = PHISTransform(12).fit(features(4, 12, 5, 5).float())
    phi.fit(features(4, 12, 5, 5, seed=3).float())
    fresh = PHISTransform(12).fit(features(4, 12, 5, 5, seed=3).float())
    assert torch.equal(phi.weight, fresh.weight)


def test_features_that_do_not_vary_are_refused():
    with pytest.raises(ValueError, match="features that vary"):
        PHISTransform(4).fit(torch.full((3, 4, 2, 2), 7.0))


def test_the_state_holds_the_fit():
    phi, other = PHISTransform(12).fit(features(2, 12, 4, 4).float()), PHISTransform(12)
    other.load_state_dict(phi.state_dict())
    x = features(2, 12, 3, 3, seed=1).float()
    assert torch.equal(other(x), phi(x))
