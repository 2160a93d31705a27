# SPDX-License-Identifier: Apache-2.0
"""The digits as images: what scikit-learn ships, in three parts that have nothing in common."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from kdlvfm.data.base import DataError
from kdlvfm.data.digits import Digits, digits_of

LOADING = {"batch_size": 4, "steps": 3}
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def data():
    return Digits(**LOADING, eval_batch_size=50)


def test_the_parts_are_all_digits_once():
    parts = [digits_of(split) for split in SPLITS]
    assert [len(labels) for _, labels in parts] == [1197, 200, 400]
    bundle = load_digits()
    whole = sorted(
        (image.tobytes(), int(label)) for images, labels in parts for image, label in zip(images, labels, strict=True)
    )
    expected = sorted(
        ((image / 16).astype(np.float32).tobytes(), int(label))
        for image, label in zip(bundle.images, bundle.target, strict=True)
    )
    assert whole == expected


def test_images_are_grey_and_of_the_size_asked_for(data):
    large = Digits(size=20, **LOADING)
    for source, size in ((data, 8), (large, 20)):
        images = source.images("val")
        assert images.shape == (200, 3, size, size)
        assert images.dtype == torch.uint8
        assert (images == images[:, :1]).all()
        assert source.batch_shape() == (4, size, size)
        assert source.input_size() == (size, size)
    ink = torch.from_numpy(digits_of("val")[0])
    torch.testing.assert_close(data.images("val")[:, 0].float() / 255, ink, atol=0.51 / 255, rtol=0)
    # Enlarging moves no ink from one side to the other.
    torch.testing.assert_close(large.images("val").float().mean((1, 2, 3)), 255 * ink.mean((1, 2)), atol=4, rtol=0)


def test_batches_hold_images_and_where_they_are_from(data):
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    for batch in batches:
        assert set(batch) == {"image", "index"}
        torch.testing.assert_close(batch["image"], data.images("train")[batch["index"]].float() / 255)
    evaluated = list(data.evaluation_loader("test"))
    assert torch.equal(torch.cat([batch["index"] for batch in evaluated]), torch.arange(400))
    assert not any(batch["repeated"].any() for batch in evaluated)


def test_processes_share_a_split_and_mark_what_is_counted_twice(data):
    shares = [data.evaluation_set("val", rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [67] * 3
    found = [sample for share in shares for sample in (share[i] for i in range(67)) if not sample["repeated"]]
    assert sorted(sample["index"] for sample in found) == [*range(200)]


def test_facts_for_the_record(data):
    assert data.counts() == {"train": 1197, "val": 200, "test": 400}
    assert data.num_samples == 1197
    assert data.num_classes == len(data.palette) == 10
    assert data.truth == "images"
    assert len(data.split_hash()) == 64
    assert data.split_hash() == Digits(batch_size=2, steps=1).split_hash() != Digits(size=16, **LOADING).split_hash()
    data.check()


def test_bad_arguments_are_refused(data, monkeypatch):
    with pytest.raises(DataError, match="choose size >= 8, not 7"):
        Digits(size=7, **LOADING)
    with pytest.raises(DataError, match="are not augmented"):
        Digits(augmentation=object(), **LOADING)
    monkeypatch.setattr(data, "images", lambda split: torch.zeros(5, 3, 9, 9))
    with pytest.raises(DataError, match=r"uint8 \(n, 3, 8, 8\) in 'train', not torch.float32 \(5, 3, 9, 9\)"):
        data.check()
