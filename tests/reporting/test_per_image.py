# SPDX-License-Identifier: Apache-2.0
"""What each image adds: collected as the task counts it, written, read, and scored as the task scores."""

import hashlib
import io
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from kdlvfm.reporting.per_image import FILE, PerImage, read_pixel_counts, write_per_image
from kdlvfm.reporting.statistics import bootstrap_interval
from kdlvfm.tasks.segmentation import Segmentation

CLASSES, COUNT, WORLD = 4, 7, 2
TASK = Segmentation(CLASSES)


def scenes(seed=0):
    """Masks with void and unlabelled pixels, without class 3, and predictions that know half of them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, CLASSES - 1, (COUNT, 6, 5), generator=generator)
    generator.manual_seed(seed + 1)
    guessed = torch.randint(0, CLASSES, truth.shape, generator=generator)
    predicted = truth.where(torch.rand(truth.shape, generator=generator) < 0.5, guessed)
    generator.manual_seed(99)
    for hidden in (255, -1):
        truth[torch.rand(truth.shape, generator=generator) < 0.1] = hidden
    return predicted, truth


def collect(images, seed=0, batch=3):
    predicted, truth = scenes(seed)
    found = PerImage()
    for start in range(0, len(images), batch):
        index = torch.tensor(images[start : start + batch])
        found.add(index, TASK.per_image(predicted[index], truth[index]))
    return found.arrays()


def scores_of(images, seed=0):
    predicted, truth = scenes(seed)
    metrics = TASK.metrics()
    for i in images:
        metrics.update(predicted[i : i + 1], truth[i : i + 1])
    return {name: value.item() for name, value in metrics.compute().items()}


@pytest.fixture
def counts(make_record, tmp_path):
    """Counts of a run as they come back from its folder."""

    def make(seed=0, split="test"):
        folder = tmp_path / f"{split}{seed}"
        folder.mkdir()
        named = write_per_image(folder, {split: collect(range(COUNT), seed)})
        return read_pixel_counts(folder, make_record(per_image=named), split)

    return make


@pytest.mark.parametrize("metric", ["miou", "pixel_accuracy"])
def test_weighted_images_score_as_the_task_scores_them_repeated(metric, counts):
    weights = np.random.default_rng(0).multinomial(COUNT, [1 / COUNT] * COUNT, size=20).astype(float)
    scores = counts().scorer(metric)(weights)
    expected = [scores_of(np.repeat(np.arange(COUNT), line.astype(int)))[metric] for line in weights]
    assert scores == pytest.approx(expected, rel=1e-12)


def test_another_metric_has_no_scorer(counts):
    assert counts().scorer("iou") is None


def test_the_interval_is_that_of_a_slow_bootstrap(counts):
    rng, differences = np.random.default_rng(5), []
    for _ in range(300):
        drawn = rng.integers(COUNT, size=COUNT)
        differences.append(scores_of(drawn, 1)["miou"] - scores_of(drawn, 0)["miou"])
    scorers = counts(1).scorer("miou"), counts(0).scorer("miou")
    found = bootstrap_interval(*scorers, COUNT, resamples=300, seed=5)
    assert found == pytest.approx(np.percentile(differences, [2.5, 97.5]))


def test_images_are_the_same_only_with_their_truth(counts):
    first, second = counts(0), counts(1)
    assert first.same_images(second)
    changed = first.truth.copy()
    changed[0, 0] += 1
    assert not first.same_images(type(first)(first.index, changed, first.predicted, first.hits))


def test_images_without_labels_have_no_score(counts):
    found = counts()
    nothing = type(found)(found.index, found.truth * 0, found.predicted * 0, found.hits * 0)
    for metric in ("miou", "pixel_accuracy"):
        assert np.isnan(nothing.scorer(metric)(np.ones((1, COUNT)))).all()


def test_tasks_that_do_not_say_write_nothing(tmp_path):
    found = PerImage()
    found.add(torch.arange(3), None)
    assert found.arrays() == {}
    assert write_per_image(tmp_path, {"test": {}}) is None
    assert list(tmp_path.iterdir()) == []


def test_the_record_names_the_file_and_nothing_else_is_read(make_record, tmp_path):
    named = write_per_image(tmp_path, {"test": collect(range(COUNT))})
    record = make_record(per_image=named)
    assert named["sha256"] == hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()
    assert read_pixel_counts(tmp_path, make_record(), "test") is None
    assert read_pixel_counts(tmp_path, record, "val") is None
    with pytest.raises(ValueError, match=r"nowhere.*per_image\.npz cannot be read \(No such file"):
        read_pixel_counts(tmp_path / "nowhere", record, "test")
    (tmp_path / FILE).write_bytes(b"other")
    with pytest.raises(ValueError, match="is not the file that the record names"):
        read_pixel_counts(tmp_path, record, "test")


@pytest.mark.parametrize("content", ["text", "objects"])
def test_what_is_no_file_of_counts_is_not_loaded(content, make_record, tmp_path):
    stream = io.BytesIO(b"text")
    if content == "objects":
        stream = io.BytesIO()
        np.savez(stream, **{f"test.{part}": np.array([print]) for part in ("index", "truth", "predicted", "hits")})
    (tmp_path / FILE).write_bytes(stream.getvalue())
    named = {"file": FILE, "sha256": hashlib.sha256(stream.getvalue()).hexdigest()}
    with pytest.raises(ValueError, match="is no file of counts"):
        read_pixel_counts(tmp_path, make_record(per_image=named), "test")


def worker(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        predicted, truth = scenes()
        found = PerImage()
        for i in range(rank, COUNT + 1, WORLD):
            # As the loaders of several processes do: what is missing from the last round is filled up with void.
            index = torch.tensor([min(i, COUNT - 1)])
            mask = truth[index] if i < COUNT else torch.full_like(truth[index], 255)
            found.add(index, TASK.per_image(predicted[index], mask))
        np.savez(f"{folder}/{rank}.npz", **found.arrays())
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_find_what_one_does(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    expected = collect(range(COUNT))
    for rank in range(WORLD):
        with np.load(tmp_path / f"{rank}.npz", allow_pickle=False) as found:
            assert set(found) == set(expected)
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
