# SPDX-License-Identifier: Apache-2.0
"""A run that reads a cache is the run that does not, and whatever a cache does not have is refused."""

import pytest
import torch

from kdlvfm.core import Teacher
from kdlvfm.data.transforms import Augmentation
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.cache.compute import compute, measure
from kdlvfm.training.cache.formats import CacheError
from kdlvfm.training.cache.served import CachedTeacher, StoredFeatures
from kdlvfm.training.cache.source import FeatureSource
from kdlvfm.training.cache.store import CacheStore

STEPS = 8


@pytest.fixture
def data_of(make_data):
    def make(**changes):
        data = make_data(STEPS, augmentation=Augmentation(scale=(0.5, 2.0), crop=(8, 8), flip=0.5), **changes)
        data.views = 2
        return data

    return make


@pytest.fixture
def teacher(small_net):
    return Teacher(small_net(width=9, seed=7))


@pytest.fixture
def cached(tmp_path, data_of, teacher):
    """Data with stored features, and what takes the teacher's place."""

    def make(dtype="fp32", data=None):
        data = data or data_of()
        source = FeatureSource(data, Segmentation(3), teacher, torch.device("cpu"), "32-true", 4)
        keys = sorted({key for batch in data.sampler() for key in batch})
        store = CacheStore(tmp_path / "cache", data.num_samples, 100, {}, {}, {})
        store.write_index()
        (format,) = measure(source, ["logits"], dtype, keys).formats
        rows = {store.row(*key): key for key in keys}
        list(compute(store, source, {format: [*rows]}, rows))
        data.companion = StoredFeatures(store, [format])
        return data, CachedTeacher(teacher, [format])

    return make


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_whole_run_with_fp32_ends_with_the_bits_of_one_without(
    workers, cached, data_of, teacher, make_module, run_fit, weights_of, small_net
):
    live = make_module(STEPS, student=small_net(dropout=0.3), teacher=teacher)
    run_fit(live, data_of(), "live")
    data, stand_in = cached(data=data_of(num_workers=workers))
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    read = make_module(STEPS, student=small_net(dropout=0.3), teacher=stand_in)
    result = run_fit(read, data, "read", diagnose_every=2)
    assert not calls
    ours, theirs = weights_of(read), weights_of(live)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(point["cka"] for point in result.diagnostics)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_half_precision_changes_a_run_little(dtype, cached, data_of, teacher, make_module, run_fit, weights_of):
    live = make_module(STEPS, teacher=teacher)
    run_fit(live, data_of(), "live")
    data, stand_in = cached(dtype)
    read = make_module(STEPS, teacher=stand_in)
    run_fit(read, data, "read")
    ours, theirs = weights_of(read), weights_of(live)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol={"fp16": 1e-4, "int8": 1e-2}[dtype])
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)


def test_views_repeat_and_only_then(data_of):
    def images(views):
        data = data_of()
        data.views = views
        seen = {}
        for batch in data.train_dataloader():
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                seen.setdefault(index, []).append(image)
        return seen

    endless, two = images(None), images(2)
    assert {len(shown) for shown in two.values()} == {2, 3}
    for index, shown in two.items():
        assert torch.equal(shown[0], endless[index][0])
        assert torch.equal(shown[1], endless[index][1])
        if len(shown) == 3:
            assert torch.equal(shown[2], shown[0])
            assert not torch.equal(endless[index][2], endless[index][0])


def test_without_augmentation_all_views_are_one(make_data):
    data = make_data()
    assert {key.view for batch in data.sampler() for key in batch} == {0}


def test_other_images_taps_and_gradients_are_refused(cached, data_of):
    data, teacher = cached()
    batch = next(iter(data.train_dataloader()))
    images = batch["image"]
    teacher.hold(images, batch["companion"])
    assert teacher(images, []) == {}
    features = teacher(images, ["logits"])["logits"]
    assert torch.equal(features, Teacher(teacher.model)(images, ["logits"])["logits"])
    for arguments, keywords, asked in (
        ((images.clone(), ["logits"]), {}, "features of images of its own"),
        ((images, ["logits", "pooled"]), {}, "pooled"),
        ((images, ["logits"]), {"input_grad": True}, "a gradient"),
    ):
        with pytest.raises(CacheError, match=f"asks the teacher for {asked}.*teacher_cache=none"):
            teacher(*arguments, **keywords)


def test_the_network_stays_where_it_is(cached):
    _, stand_in = cached()
    stand_in.to(torch.float64)
    assert next(stand_in.model.parameters()).dtype == torch.float32
    assert not list(stand_in.parameters())


def test_changed_data_ends_a_run(cached, make_module, run_fit):
    data, stand_in = cached()
    data.augmentation = Augmentation(scale=(0.6, 2.0), crop=(8, 8), flip=0.5)
    with pytest.raises(CacheError, match="is of another image"):
        run_fit(make_module(STEPS, teacher=stand_in), data)
