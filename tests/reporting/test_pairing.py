# SPDX-License-Identifier: Apache-2.0
"""What a single seed is compared by: the images of the split, where both runs left what each of them adds."""

import numpy as np
import pytest

from kdlvfm.reporting.per_image import write_per_image


@pytest.fixture
def with_images(make_record, tmp_path):
    """A record whose folder holds what each of 30 images adds; and the folders, by hash of the configuration."""
    folders = {}

    def make(distiller, share, seed=0, pixels=50, **changes):
        truth = np.full((30, 2), pixels)
        hits = np.round(truth * np.clip(np.random.default_rng(7).normal(share, 0.05, truth.shape), 0, 1))
        found = {"index": np.arange(30), "truth": truth, "predicted": truth, "hits": hits}
        teacher = {"teacher": None} if distiller == "none" else {}
        record = make_record(distiller, seed, (hits.sum(0) / (2 * truth - hits).sum(0)).mean(), **teacher, **changes)
        folders[record["config_hash"]] = folder = tmp_path / record["config_hash"]
        folder.mkdir()
        named = write_per_image(folder, {"test": {name: value.astype(np.uint32) for name, value in found.items()}})
        return {**record, "per_image": named}

    return make, folders


def test_one_seed_has_an_interval_over_images_and_no_verdict(with_images, rows_of):
    make, folders = with_images
    records = [make("none", 0.5), make("kd", 0.7)]
    block, rows = rows_of(records, folders=folders)
    difference = rows["kd"].difference
    low, high = difference.interval
    assert low < difference.mean < high
    assert (difference.over, difference.count, difference.p_value, difference.verdict) == ("images", 1, None, None)
    assert block.notes == (
        "Fewer than 3 paired seeds: no verdict.",
        "† One seed: 95 % interval over the images of the test split (bootstrap, 2000 resamples). "
        "It says nothing about seeds.",
    )
    assert rows_of(records)[1]["kd"].difference.interval is None


def test_two_seeds_are_compared_over_seeds(with_images, rows_of):
    make, folders = with_images
    records = [make(name, share + seed / 50, seed) for name, share in (("none", 0.5), ("kd", 0.7)) for seed in range(2)]
    block, rows = rows_of(records, folders=folders)
    assert (rows["kd"].difference.over, rows["kd"].difference.count) == ("seeds", 2)
    assert not any("†" in note for note in block.notes)


def test_images_that_are_not_the_same_give_no_interval(with_images, rows_of):
    make, folders = with_images
    records = [make("none", 0.5), make("kd", 0.7, pixels=60)]
    assert rows_of(records, folders=folders)[1]["kd"].difference.interval is None


def test_a_metric_that_is_no_function_of_counts_has_no_interval(with_images, rows_of):
    make, folders = with_images
    records = [make("none", 0.5), make("kd", 0.7)]
    for record in records:
        record["metrics"] = {"test": {"boundary_f": 0.3}}
    _, rows = rows_of(records, folders=folders, metric="boundary_f")
    assert rows["kd"].difference.interval is None


def test_a_file_that_is_not_the_records_is_named_once(with_images, rows_of):
    make, folders = with_images
    records = [make("none", 0.5), make("kd", 0.7), make("cwd", 0.6)]
    (folders[records[0]["config_hash"]] / "per_image.npz").write_bytes(b"other")
    block, rows = rows_of(records, folders=folders)
    assert [rows[name].difference.interval for name in ("cwd", "kd")] == [None, None]
    (remark,) = [note for note in block.notes if "no interval over images" in note]
    assert remark.startswith("none-0: ")
    assert remark.endswith("is not the file that the record names (another checksum).")


def test_boxes_of_one_seed_say_that_they_have_no_interval(make_record, rows_of):
    records = [make_record(name, teacher=None) for name in ("none", "fgd")]
    for record in records:
        record["task"] = {"name": "detection", "primary_metric": "mAP"}
        record["metrics"] = {"test": {"mAP": 0.2}}
    notes = rows_of(records)[0].notes
    assert "One seed: no interval over images, for average precision is no sum over them." in notes
