# SPDX-License-Identifier: Apache-2.0
"""Principal components are those of numpy, and what is stored with them is the nearest that so few numbers hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdlvfm.core import Teacher
from kdlvfm.data.sampler import SampleKey
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.cache.compute import compare, compute, measure, storing_error
from kdlvfm.training.cache.formats import CacheError, TapFormat
from kdlvfm.training.cache.projection import Moments, Projection, check_fit, fit
from kdlvfm.training.cache.served import CachedTeacher
from kdlvfm.training.cache.source import FeatureSource
from kdlvfm.training.cache.store import CacheStore

C, K = 12, 5


def vectors(count=400, seed=0):
    """Vectors (N, C) far from 0 in directions of very different variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(C, C, generator=generator))[0]
    return torch.randn(count, C, generator=generator) * torch.logspace(1, -3, C) @ mixing + 30


def projection_of(x, components=K):
    moments = Moments(C)
    for part in x.split([1, 150, len(x) - 151]):
        moments.add(part)
    return moments.project(components)


def nearest(x, reference, components=K):
    """`x` in the principal subspace of `reference`, by numpy's singular values."""
    reference, x = reference.double().numpy(), x.double().numpy()
    mean = reference.mean(0)
    _, values, basis = np.linalg.svd(reference - mean, full_matrices=False)
    basis = basis[:components]
    share = np.square(values[:components]).sum() / np.square(values).sum()
    return torch.from_numpy((x - mean) @ basis.T @ basis + mean).float(), share


def features(shape, channel, seed=0):
    x = vectors(int(np.prod(shape)) // C, seed)
    order = [d for d in range(len(shape)) if d != channel]
    return x.view(*(shape[d] for d in order), C).movedim(-1, channel).contiguous()


def fitted(x, dtype="fp32", pca=K):
    found = TapFormat.of("map.-1", x, dtype, pca)
    return found.with_projection(projection_of(x.movedim(found.channel + 1, -1).flatten(0, -2), pca))


def test_moments_of_parts_are_those_of_numpy():
    x = vectors()
    found = projection_of(x)
    expected, share = nearest(x, x)
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.components @ found.components.T, torch.eye(K), rtol=0, atol=1e-6)
    assert found.variance == pytest.approx(share, abs=1e-7)
    torch.testing.assert_close(found.restore(found.reduce(x, 0), 0), expected, rtol=0, atol=1e-4)


def test_the_sign_of_a_component_does_not_depend_on_chance():
    found = projection_of(vectors()).components
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()


def test_constant_features_have_components_too():
    x = torch.full((300, C), 2.0)
    found = projection_of(x)
    assert found.variance == 1.0
    torch.testing.assert_close(found.restore(found.reduce(x, 0), 0), x)


def test_features_that_are_not_finite_are_refused():
    x = vectors()
    x[3, 4] = float("nan")
    with pytest.raises(CacheError, match="not finite: no principal components fit them"):
        projection_of(x)


@pytest.mark.parametrize(("shape", "channel"), [((6, C, 7, 9), 1), ((6, 63, C), 2), ((3, C, 2, 7, 9), 1)])
@pytest.mark.parametrize("live", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_comes_back_is_the_nearest_point_of_the_subspace(shape, channel, live):
    x = features(shape, channel)
    format = fitted(x)
    format = replace(format, live=str(live).removeprefix("torch."))
    flat = x.movedim(channel, -1).flatten(0, -2)
    expected = nearest(flat, flat)[0].view(x.movedim(channel, -1).shape).movedim(-1, channel)
    stored = format.encode(x)
    assert stored.shape == (shape[0], format.row_bytes) == (shape[0], 4 * K * x[0].numel() // C)
    back = format.decode(stored)
    assert back.dtype == live
    torch.testing.assert_close(back.float(), expected, rtol=2**-8 if live != torch.float32 else 0, atol=1e-4)
    torch.testing.assert_close(format.kept(x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 2, 1)])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_strides_come_back(order, dtype):
    x = features((4, C, 6, 7), 1).permute(order).contiguous().permute([order.index(d) for d in range(4)])
    format = fitted(x, dtype)
    assert format.decode(format.encode(x)).stride() == x.stride()


def test_autocast_does_not_round_what_is_restored():
    x = features((6, C, 7, 9), 1)
    format = fitted(x)
    stored = format.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(format.decode(stored), format.decode(format.encode(x)))
        inside = format.decode(stored)
    assert torch.equal(inside, format.decode(stored))


def test_int8_stays_within_a_254th_of_the_largest_coefficient():
    x = features((6, C, 7, 9), 1)
    exact, rough = fitted(x), fitted(x, "int8")
    assert rough.row_bytes == K * 63 + 4 * K
    coefficients = exact.projection.reduce(x, channel=0)
    error = rough.projection.reduce(rough.decode(rough.encode(x)), channel=0) - coefficients
    assert (error.abs() <= coefficients.abs().amax((2, 3), keepdim=True) / 254 * 1.001 + 1e-4).all()


@pytest.mark.parametrize(("shape", "pca"), [((5, C), K), ((5, C, 3, 3), C), ((5, 9, C), C + 1)])
def test_few_channels_and_features_without_positions_are_stored_as_they_are(shape, pca):
    x = torch.randn(*shape)
    format, plain = TapFormat.of("t", x, "fp32", pca), TapFormat.of("t", x, "fp32")
    assert not format.projected
    assert format.row_bytes == plain.row_bytes
    assert torch.equal(format.decode(format.encode(x)), x)
    assert format.key != plain.key


def test_nothing_is_stored_before_there_are_components():
    x = features((5, C, 3, 3), 1)
    format = TapFormat.of("t", x, "fp32", K)
    with pytest.raises(ValueError, match="not fitted yet"):
        format.encode(x)
    with pytest.raises(ValueError, match="not fitted yet"):
        format.kept(x)


def test_too_few_positions_are_refused():
    format = TapFormat.of("map.-1", torch.zeros(2, 64, 3, 3), "fp16", 40)
    check_fit(format, 5)
    with pytest.raises(CacheError, match=r"4 images with 9 positions each at map.-1 do not determine 40 principal"):
        check_fit(format, 4)
    check_fit(TapFormat.of("map.-1", torch.zeros(2, 40, 3, 3), "fp16", 40), 1)


@pytest.fixture
def source(make_data, small_net):
    teacher = Teacher(small_net(width=9, seed=7))
    return FeatureSource(make_data(), Segmentation(3), teacher, torch.device("cpu"), "32-true", 4)


@pytest.fixture
def keys(source):
    return sorted({key for batch in source.data.sampler() for key in batch})


@pytest.fixture
def store(tmp_path, source):
    made = CacheStore(tmp_path / "cache", source.data.num_samples, 8, {}, {}, {})
    made.write_index()
    return made


TAP = "logits"


@pytest.fixture
def format(source, keys, store):
    """Fitted, and known to the store."""
    (found,) = measure(source, [TAP], "fp16", keys, pca=2).formats
    (projection,) = fit(source, [found], keys).values()
    store.add_components(found, projection)
    found = store.fitted(found)
    store.add_format(found, {"cosine": 1.0, "relative_rms": 0.0}, 2)
    return found


def test_components_are_fitted_to_the_teachers_features_of_training_images(source, keys, format):
    taught = torch.cat([source.features(drawn.images[: len(drawn.keys)], [TAP])[TAP] for drawn in source.draw(keys)])
    flat = taught.movedim(1, -1).flatten(0, -2)
    expected, share = nearest(flat, flat, 2)
    torch.testing.assert_close(format.kept(taught).movedim(1, -1).flatten(0, -2), expected, rtol=0, atol=1e-5)
    assert format.projection.variance == pytest.approx(share, abs=1e-6)
    assert share < 1


def test_components_survive_the_disk_and_are_those_of_all_dtypes(store, format):
    again = CacheStore.open(store.folder)
    for found in (again.format(*format.key), again.fitted(replace(format, dtype="int8", projection=None))):
        assert torch.equal(found.projection.components, format.projection.components)
        assert torch.equal(found.projection.mean, format.projection.mean)
        assert found.projection.variance == pytest.approx(format.projection.variance)
    assert again.format(TAP, "fp16") is None
    assert again.format(TAP, "fp16", 4) is None


@pytest.mark.parametrize("content", [b"", b"no components", None], ids=["empty", "damaged", "other"])
def test_components_that_cannot_be_read_are_told(store, format, content):
    path = store.folder / "logits.pca2.safetensors"
    if content is None:
        other = Projection(torch.zeros(4), torch.zeros(2, 4), 1.0)
        store.add_components(format, other)
    else:
        path.write_bytes(content)
    with pytest.raises(CacheError, match=r"logits.pca2.safetensors cannot be read .*: remove the cache"):
        store.format(*format.key)


def test_components_that_are_gone_are_told(store, format):
    (store.folder / "logits.pca2.safetensors").unlink()
    with pytest.raises(CacheError, match=r"logits.pca2.safetensors is gone\): remove the cache"):
        store.format(*format.key)


def test_measuring_gives_no_error_before_there_are_components(source, keys):
    ((format, error),) = measure(source, [TAP], "fp16", keys, pca=2).formats.items()
    assert format.projected
    assert error == {}
    assert format.row_bytes == 2 * 64 * 2


def test_the_error_of_storing_is_beside_the_teachers_own_features(source, keys, format):
    errors, images = storing_error(source, [format], keys)
    assert images == 12
    lost = 1 - format.projection.variance
    assert 0 < errors[format]["relative_rms"] < 3 * lost**0.5
    assert errors[format]["cosine"] < 1


def test_a_run_is_taught_the_projection_of_what_the_teacher_gives(source, keys, store, format):
    rows = {store.row(*key): key for key in keys[:8]}
    list(compute(store, source, {format: [*rows]}, rows))
    assert all(finding.problem is None for finding in compare(store, source, format, rows))
    (drawn,) = source.draw([SampleKey(0, 1), SampleKey(0, 0), SampleKey(0, 3)], batch_size=3)
    stored = torch.stack(
        [store.read(format, store.row(*key), digest) for key, digest in zip(drawn.keys, drawn.digests, strict=True)]
    )
    cached = CachedTeacher(source.teacher, [format])
    cached.hold(drawn.images, {TAP: stored})
    own = source.features(drawn.images, [TAP])[TAP]
    torch.testing.assert_close(cached(drawn.images, [TAP])[TAP], format.kept(own), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(own, format.kept(own), rtol=2e-3, atol=2e-3)
