# SPDX-License-Identifier: Apache-2.0
"""What is computed is what training would have computed, only once, and only where there is room."""

import collections
import random
import shutil
from dataclasses import replace

import pytest
import torch

from kdlvfm.core import Teacher
from kdlvfm.data.sampler import SampleKey
from kdlvfm.data.transforms import Augmentation
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.cache import compute as module
from kdlvfm.training.cache.compute import MARGIN, check_space, compare, compute, measure, shown_bytes
from kdlvfm.training.cache.formats import CacheError
from kdlvfm.training.cache.source import FeatureSource, check_precision, check_replay, weights_hash
from kdlvfm.training.cache.store import CacheStore

CLASSES = 3
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def augmentation():
    return Augmentation(scale=(0.5, 2.0), crop=(8, 8), flip=0.5)


@pytest.fixture
def data(make_data, augmentation):
    made = make_data(augmentation=augmentation)
    made.views = 2
    return made


@pytest.fixture
def teacher(small_net):
    return Teacher(small_net(width=9, seed=7))


@pytest.fixture
def source(data, teacher):
    return FeatureSource(data, Segmentation(CLASSES), teacher, torch.device("cpu"), "32-true", 4)


@pytest.fixture
def keys(data):
    return sorted({key for batch in data.sampler() for key in batch})


@pytest.fixture
def store(tmp_path, data):
    made = CacheStore(tmp_path / "cache", data.num_samples, 8, {}, {}, {})
    made.write_index()
    return made


@pytest.fixture
def formats(source, keys):
    return list(measure(source, ["logits"], "fp32", keys).formats)


def rows_of(store, keys):
    return {store.row(*key): key for key in keys}


def fill(store, source, format, keys):
    return [
        count
        for rows in store.by_shard(store.missing(format, rows_of(store, keys))).values()
        for count in compute(store, source, {format: rows}, rows_of(store, keys))
    ]


def test_what_is_stored_are_the_teachers_features_of_the_augmented_images(store, source, formats, keys, data, teacher):
    (format,) = formats
    assert sum(fill(store, source, format, keys)) == len(keys) == 24
    random.Random(0).shuffle(keys)  # in training other images share the batch
    for drawn in source.draw(keys):
        images = torch.stack([data.training_set()[key]["image"] for key in drawn.keys])
        assert torch.equal(drawn.images, images)
        rows = [
            store.read(format, store.row(*key), digest) for key, digest in zip(drawn.keys, drawn.digests, strict=True)
        ]
        assert torch.equal(format.decode(torch.stack(rows)), teacher(images, ["logits"])["logits"])


def test_a_mirrored_image_is_another_image(store, source, formats, keys, data):
    """Views that only a flip tells apart have other digests and other features."""
    data.augmentation = Augmentation(scale=(1, 1), flip=1.0)
    (flipped,) = source.draw([SampleKey(0, 0)], batch_size=1)
    data.augmentation = None
    (plain,) = source.draw([SampleKey(0, 0)], batch_size=1)
    assert torch.equal(flipped.images.flip(-1), plain.images)
    assert flipped.digests != plain.digests


def test_batches_are_filled_up_to_the_size_of_training(source, keys):
    drawn = list(source.draw(keys[:6]))
    assert [len(one.keys) for one in drawn] == [4, 2]
    assert [len(one.images) for one in drawn] == [4, 4]
    assert torch.equal(drawn[1].images[1], drawn[1].images[3])


def test_what_is_there_is_not_computed_again(store, source, formats, keys, teacher):
    (format,) = formats
    first = rows_of(store, keys)
    began = compute(store, source, {format: store.by_shard(first)[0]}, first)
    next(began)
    began.close()  # as a killed process does
    assert len(store.stored(format)) == 4
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    assert sum(fill(store, source, format, keys)) == len(keys) - 4
    assert len(calls) == 5
    assert fill(store, source, format, keys) == []
    assert len(calls) == 5


def test_measuring_says_how_large_how_long_and_how_wrong(source, keys):
    measured = measure(source, ["logits"], "int8", keys)
    ((format, error),) = measured.formats.items()
    assert format.shape == (CLASSES, 8, 8)
    assert format.row_bytes == CLASSES * 64 + 4 * CLASSES
    assert measured.images == 12
    assert measured.seconds > 0
    assert 0.99 < error["cosine"] < 1
    assert 0 < error["relative_rms"] < 0.02


def test_one_batch_is_enough_to_measure(source, keys):
    measured = measure(source, ["logits"], "fp16", keys[:3])
    assert measured.images == 3
    assert measured.seconds > 0


def test_features_that_depend_on_the_batch_are_refused(source, keys, teacher):
    teacher.register_forward_hook(lambda *call: {"logits": call[2]["logits"] - call[2]["logits"].mean(0)})
    with pytest.raises(CacheError, match="at logits depend on the other images of the batch"):
        measure(source, ["logits"], "fp16", keys)


class Unseeded:
    """Draws from a generator that nobody seeds for each sample."""

    def __call__(self, image, mask):
        return image.roll(random.randrange(8), -1), mask


def test_an_augmentation_that_cannot_be_replayed_is_refused(source, keys, data):
    assert check_replay(source, keys) == (8, 8)
    data.augmentation = Unseeded()
    with pytest.raises(CacheError, match="does not give the same image twice"):
        check_replay(source, keys)


class Growing:
    """Images of many sizes."""

    def __call__(self, image, mask):
        side = int(torch.randint(4, 9, ()))
        return image[:, :side, :side], mask[:side, :side]


def test_images_of_different_sizes_are_refused(source, keys, data, store, formats):
    data.augmentation = Growing()
    with pytest.raises(CacheError, match="differ in size"):
        check_replay(source, keys)
    (format,) = formats
    with pytest.raises(CacheError, match=r"has the shape .* for one image and"):
        fill(store, replace(source, batch_size=1), format, keys)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_precision_is_that_of_training(precision, data, teacher, keys):
    source = FeatureSource(data, Segmentation(CLASSES), teacher, torch.device("cpu"), precision, 4)
    (format,) = measure(source, ["logits"], "fp32", keys).formats
    assert format.live == {"bf16-mixed": "bfloat16", "32-true": "float32"}[precision]


def test_other_precisions_are_refused():
    check_precision("16-mixed")
    with pytest.raises(CacheError, match="not bf16-true"):
        check_precision("bf16-true")


def test_a_disk_without_room_is_noticed_before_anything_is_computed(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return Usage(0, 0, MARGIN + 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert check_space(tmp_path / "not" / "yet", 1000) == MARGIN + 1000
    assert asked == [tmp_path]
    with pytest.raises(
        CacheError, match=r"needs 1001 B more, and 1\.0 GiB must stay free.*teacher_cache.folder=FOLDER"
    ):
        check_space(tmp_path, 1001)


def test_a_disk_that_fills_up_is_noticed_before_it_is_full(store, source, formats, keys, monkeypatch):
    (format,) = formats
    free = iter([MARGIN * 2, MARGIN * 2, MARGIN + 4 * format.row_bytes - 1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, next(free)))
    with pytest.raises(CacheError, match=r"stopped before it is full. What is stored is kept"):
        fill(store, source, format, keys)
    assert len(store.stored(format)) == 8
    monkeypatch.undo()
    assert sum(fill(store, source, format, keys)) == len(keys) - 8


def test_several_taps_are_computed_in_one_pass(store, source, formats, keys, teacher):
    (first,) = formats
    rows = rows_of(store, keys[:8])
    second = type(first)(**{**vars(first), "dtype": "fp16"})
    list(compute(store, source, {first: [0, 1, 2]}, rows))
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    list(compute(store, source, {first: [3], second: [*rows]}, rows))
    assert len(calls) == 2
    assert store.stored(first) == [0, 1, 2, 3]
    assert store.stored(second) == [*rows]


def test_comparing_finds_what_another_teacher_gave(store, source, formats, keys, small_net, data):
    (format,) = formats
    fill(store, source, format, keys)
    rows = rows_of(store, keys[:6])
    findings = compare(store, source, format, rows)
    assert [finding.row for finding in findings] == [*rows]
    assert all(finding.problem is None and finding.cosine > 1 - 1e-6 for finding in findings)
    other = FeatureSource(data, source.task, Teacher(small_net(width=9, seed=8)), source.device, source.precision, 4)
    assert all("has cosine" in finding.problem for finding in compare(store, other, format, rows))
    data.seed += 1
    assert {finding.problem for finding in compare(store, source, format, rows)} == {
        "is of another image: the data or its augmentation changed since"
    }


def test_the_hash_of_a_teacher_is_that_of_all_its_numbers(small_net):
    one, same, other = (Teacher(small_net(seed=seed)) for seed in (1, 1, 2))
    assert weights_hash(one) == weights_hash(same) != weights_hash(other)
    before = weights_hash(one)
    with torch.no_grad():
        next(one.model.parameters())[0, 0, 0, 0] += 1e-6
    assert weights_hash(one) != before
    one = Teacher(small_net(seed=1))
    one.model.register_buffer("scale", torch.ones(()), persistent=False)
    assert weights_hash(one) != before


def test_bytes_for_people():
    assert [shown_bytes(n) for n in (0, 1023, 1536, 200 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "200 MiB",
        "3.0 TiB",
    ]
    assert module.MARGIN == 2**30
