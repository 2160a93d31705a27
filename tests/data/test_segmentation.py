# SPDX-License-Identifier: Apache-2.0
"""The loaders that all segmentation data sets share."""

from __future__ import annotations

import pytest
import torch

from kdlvfm.data import base as module
from kdlvfm.data.base import DataError
from kdlvfm.data.segmentation import SegmentationData
from kdlvfm.data.transforms import Augmentation


class Squares:
    def __init__(self, count, first, fill=None):
        self.count, self.first, self.fill = count, first, fill

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.first + index)
        image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8, generator=generator)
        mask = torch.randint(0, 3, (24, 32), generator=generator)
        return image, mask if self.fill is None else torch.full_like(mask, self.fill)


class Toy(SegmentationData):
    name = "Toy"
    class_names = ("a", "b", "c")
    palette = ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    licence = None
    bad = None

    def __init__(self, *, unlabelled=6, **loader):
        super().__init__(**loader)
        self.more = unlabelled

    def samples(self, split):
        first = {"train": 0, "val": 1000, "test": 2000}[split]
        return Squares({"train": 5, "val": 7, "test": 3}[split], first, self.bad if split == "val" else None)

    def unlabelled_samples(self):
        return Squares(self.more, 500, -1) if self.more else None

    def split_hash(self):
        return "0"


def toy(**changes):
    return Toy(**{"batch_size": 4, "steps": 12, "seed": 1, "augmentation": Augmentation(brightness=0.3), **changes})


def batches(data):
    return list(data.train_dataloader())


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def test_a_batch_is_what_the_contract_says():
    data = toy()
    for batch in batches(data):
        assert batch.keys() == {"image", "mask", "index"}
        assert batch["image"].shape == (4, 3, 24, 32)
        assert batch["image"].dtype == torch.float32
        assert 0 <= batch["image"].min() <= batch["image"].max() <= 1
        assert batch["mask"].shape == (4, 24, 32)
        assert batch["mask"].dtype == batch["index"].dtype == torch.int64
        assert set(batch["mask"][:2].unique().tolist()) <= {0, 1, 2, 255}
        assert set(batch["mask"][2:].unique().tolist()) <= {-1, 255}
        assert (batch["index"] < 5).tolist() == [True, True, False, False]
        assert batch["index"].max() < data.num_samples == 11


def test_without_augmentation_the_sample_is_the_one_of_its_index():
    data = toy(augmentation=None)
    for batch in batches(data):
        for image, mask, index in zip(batch["image"], batch["mask"], batch["index"].tolist(), strict=True):
            source = data.samples("train")[index] if index < 5 else data.unlabelled_samples()[index - 5]
            assert torch.equal((image * 255).round().to(torch.uint8), source[0])
            assert torch.equal(mask, source[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_exactly(workers):
    whole = batches(toy())
    data = toy(num_workers=workers)
    data.start_step = 7
    loader = data.train_dataloader()
    assert len(loader) == 12
    assert same(list(loader), whole[7:])


def test_batches_do_not_depend_on_the_global_generator_and_leave_it_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = batches(toy())
    list(toy().val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(first, batches(toy()))
    assert not same(first, batches(toy(seed=2)))


def test_a_sample_is_augmented_anew_on_each_pass():
    seen = [
        image
        for batch in batches(toy(steps=20))
        for image, index in zip(batch["image"], batch["index"].tolist(), strict=True)
        if index == 0
    ]
    assert len(seen) == 8
    assert len({image.numpy().tobytes() for image in seen}) == 8


def test_sizes_and_counts():
    data = toy()
    assert data.num_classes == 3
    assert data.counts() == {"train": 11, "labelled": 5, "unlabelled": 6, "val": 7, "test": 3}
    assert data.batch_parts() == (2, 2)
    assert data.batches_per_epoch == 3
    assert toy(labelled_per_batch=1).batch_parts() == (1, 3)
    assert toy(labelled_per_batch=1).batches_per_epoch == 5
    assert toy(labelled_per_batch=4).batches_per_epoch == 2
    assert toy(unlabelled=0).batch_parts() == (4, 0)
    assert toy(unlabelled=0).num_samples == 5


def test_an_epoch_draws_every_sample():
    data = toy(labelled_per_batch=1)
    drawn = {index for batch in batches(data)[: data.batches_per_epoch] for index in batch["index"].tolist()}
    assert drawn == set(range(11))


def test_evaluation_is_in_order_and_not_augmented():
    found = list(toy(eval_batch_size=3).val_dataloader())
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(7))
    masks = torch.cat([batch["mask"] for batch in found])
    assert all(torch.equal(masks[i], toy().samples("val")[i][1]) for i in range(7))
    assert len(toy().test_dataloader()) == 3


def test_processes_share_the_evaluation_and_count_nothing_twice(monkeypatch):
    monkeypatch.setattr(module, "world_size", lambda: 3)
    seen = []
    lengths = set()
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        found = list(toy().val_dataloader())
        lengths.add(len(found))
        seen += [int(batch["index"]) for batch in found if (batch["mask"] != 255).any()]
    assert lengths == {3}
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
        ({"labelled_per_batch": 5}, "from 1 to batch_size = 4, not 5"),
        ({"labelled_per_batch": 0}, "from 1 to batch_size = 4, not 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        toy(**arguments)


def test_unlabelled_part_without_unlabelled_samples_is_refused():
    with pytest.raises(DataError, match="no unlabelled samples"):
        toy(unlabelled=0, labelled_per_batch=2).check()


def test_check_names_the_sample_that_is_wrong():
    toy().check()
    data = toy()
    data.bad = 7
    with pytest.raises(DataError, match=r"sample 0 of 'val' in Toy: the mask holds 7; classes are 0 to 2"):
        data.check()
