# SPDX-License-Identifier: Apache-2.0
"""Features become bytes and come back, exactly or within the bound that is stated."""

import json

import pytest
import torch

from kdlvfm.training.cache.formats import BOUNDS, DTYPES, CacheError, TapFormat, likeness, measured_error

SHAPES = {"map": (3, 8, 4, 5), "tokens": (3, 6, 8), "pooled": (3, 8), "logits": (2, 5, 7, 9), "five": (2, 3, 2, 2, 2)}
LIVE = (torch.float32, torch.float16, torch.bfloat16)


def features(shape, dtype=torch.float32, seed=0):
    """Values of very different size in the channels, one of which is 0."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    channel = -1 if len(shape) == 3 else 1
    x = x * torch.logspace(-3, 2, shape[channel]).view([-1 if d == channel % len(shape) else 1 for d in range(x.dim())])
    x.select(channel, 0).zero_()
    return x.to(dtype)


def channelwise(x):
    """The largest absolute value of each channel of each image, in a shape that broadcasts."""
    dims = [1] if x.dim() == 3 else list(range(2, x.dim()))
    return x.abs().amax(dims, keepdim=True)


@pytest.mark.parametrize("dtype", LIVE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fp32_gives_back_every_bit(shape, dtype):
    x = features(shape, dtype)
    format = TapFormat.of("t", x, "fp32")
    stored = format.encode(x)
    assert stored.dtype == torch.uint8
    assert stored.shape == (len(x), format.row_bytes)
    back = format.decode(stored)
    assert back.dtype == dtype
    assert torch.equal(back, x)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fp16_stays_within_its_bound(shape):
    x = features(shape)
    format = TapFormat.of("t", x, "fp16")
    error = (format.decode(format.encode(x)) - x).abs()
    assert "2^-11" in BOUNDS["fp16"]
    assert (error <= torch.maximum(x.abs() * 2**-11, torch.tensor(2.0**-25))).all()
    assert error.max() > 0


@pytest.mark.parametrize("shape", [SHAPES[name] for name in SHAPES if name != "pooled"])
def test_int8_stays_within_a_254th_of_the_largest_value_of_a_channel(shape):
    x = features(shape)
    format = TapFormat.of("t", x, "int8")
    stored = format.encode(x)
    assert stored.shape == (len(x), format.row_bytes)
    error = (format.decode(stored) - x).abs()
    assert "1/254" in BOUNDS["int8"]
    assert (error <= channelwise(x) / 254 * (1 + 1e-5)).all()
    assert format.decode(stored).select(-1 if x.dim() == 3 else 1, 0).eq(0).all()


def test_int8_of_features_without_positions_is_fp16():
    x = features(SHAPES["pooled"])
    whole, half = (TapFormat.of("t", x, dtype) for dtype in ("int8", "fp16"))
    assert whole.stored == "fp16"
    assert torch.equal(whole.encode(x), half.encode(x))


def test_each_image_has_its_own_scales():
    x = features(SHAPES["map"])
    format = TapFormat.of("t", x, "int8")
    together = format.decode(format.encode(torch.cat([x, 1000 * x])))[: len(x)]
    assert torch.equal(together, format.decode(format.encode(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 2, 1)])
def test_strides_come_back(dtype, order):
    x = torch.randn(2, 3, 4, 5).permute(order).contiguous().permute([order.index(d) for d in range(4)])
    format = TapFormat.of("t", x, dtype)
    back = format.decode(format.encode(x))
    assert back.stride() == x.stride()
    torch.testing.assert_close(back, x, rtol=0.02, atol=0.02)


def test_rows_do_not_depend_on_the_batch_they_are_in():
    x = features(SHAPES["map"])
    for dtype in DTYPES:
        format = TapFormat.of("t", x, dtype)
        assert torch.equal(format.encode(x)[1:2], format.encode(x[1:2].clone()))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, "fp16", "1e\\+05, which fp16 does not hold: store fp32"),
        (float("nan"), "fp32", "nan, which fp32 does not hold: the teacher itself gives it"),
        (float("inf"), "int8", "inf, which int8 does not hold: the teacher itself"),
    ],
)
def test_what_cannot_be_held_is_refused(value, dtype, message):
    x = features(SHAPES["map"])
    x[1, 2, 3, 4] = value
    with pytest.raises(CacheError, match=message):
        TapFormat.of("t", x, dtype).encode(x)


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3).double()])
def test_what_are_no_features_of_images_is_refused(x):
    with pytest.raises(CacheError, match="cannot be cached"):
        TapFormat.of("t", x, "fp16")


def test_a_format_survives_json():
    format = TapFormat.of("dino/map.-1", torch.zeros(2, 3, 4, 5).permute(0, 1, 3, 2), "int8")
    assert TapFormat.read(json.loads(json.dumps(format.plain()))) == format
    for change in ({"dtype": "fp8"}, {"live": "int64"}, {"order": [0, 1]}):
        with pytest.raises(ValueError, match="no format"):
            TapFormat.read({**format.plain(), **change})


def test_likeness_and_error_are_those_of_their_definitions():
    x, y = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    x[2] = y[2] = 0
    expected = torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1))
    torch.testing.assert_close(likeness(x, y).float()[:2], expected[:2])
    assert likeness(x, y)[2] == 1
    assert likeness(x, torch.zeros_like(x))[0] == 0
    error = measured_error(x[:2], y[:2])
    assert error["cosine"] == pytest.approx(expected[:2].min().item(), rel=1e-5)
    assert error["relative_rms"] == pytest.approx(((y - x)[:2].norm() / x[:2].norm()).item(), rel=1e-5)
