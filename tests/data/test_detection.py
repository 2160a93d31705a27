# SPDX-License-Identifier: Apache-2.0
"""The loaders that all detection data sets share."""

from __future__ import annotations

import pytest
import torch

from kdlvfm.data import base as module
from kdlvfm.data.base import DataError
from kdlvfm.data.box_transforms import BoxAugmentation
from kdlvfm.data.boxes import make_boxes
from kdlvfm.data.detection import DetectionData
from kdlvfm.data.transforms import Augmentation

GREY = torch.tensor([124, 116, 104]) / 255


class Rectangles:
    """Noise of several sizes; image i has i % 3 boxes, and a crowd in every fourth."""

    def __init__(self, count, first):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.first + index)
        height, width = 40 + 8 * (index % 2), 60 + 10 * (index % 3)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        corners, crowds = [(4, 5, 34, 25), (10, 10, 40, 38)][: index % 3], [False, False][: index % 3]
        if index % 4 == 0:
            corners, crowds = [*corners, (0, 0, 50, 40)], [*crowds, True]
        return image, make_boxes(corners, [i % 3 for i in range(len(corners))], iscrowd=crowds)


class Toy(DetectionData):
    name = "Toy"
    class_names = ("a", "b", "c")
    palette = ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    licence = None
    count = 5

    def samples(self, split):
        return Rectangles(
            {"train": self.count, "val": 7, "test": 3}[split], {"train": 0, "val": 1000, "test": 2000}[split]
        )

    def split_hash(self):
        return "0"


def toy(**changes):
    augmentation = BoxAugmentation(scale=(0.7, 1.3), crop=(48, 48), mosaic=0.3, brightness=0.3)
    return Toy(**{"batch_size": 4, "steps": 12, "seed": 1, "augmentation": augmentation, **changes})


def batches(data):
    return list(data.train_dataloader())


def flat(batch):
    return [batch["image"], batch["index"], *(value for target in batch["target"] for value in target.values())]


def same(first, second):
    return len(first) == len(second) and all(
        len(flat(a)) == len(flat(b)) and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))
        for a, b in zip(first, second, strict=True)
    )


def test_a_batch_is_what_the_contract_says():
    data = toy()
    for batch in batches(data):
        assert batch.keys() == {"image", "target", "index"}
        count, channels, height, width = batch["image"].shape
        assert (count, channels, height % 32, width % 32) == (4, 3, 0, 0)
        assert batch["image"].dtype == torch.float32
        assert 0 <= batch["image"].min() <= batch["image"].max() <= 1
        assert batch["index"].dtype == torch.int64
        assert batch["index"].max() < data.num_samples == 5
        for image, target in zip(batch["image"], batch["target"], strict=True):
            assert target.keys() == {"boxes", "labels", "size"}
            assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
            assert target["boxes"].shape == (len(target["labels"]), 4)
            rows, columns = target["size"].tolist()
            assert (target["boxes"] >= 0).all()
            assert (target["boxes"] <= torch.tensor([columns, rows, columns, rows])).all()
            assert (image[:, rows:] == GREY[:, None, None]).all()
            assert (image[:, :, columns:] == GREY[:, None, None]).all()


def test_without_augmentation_the_sample_is_the_one_of_its_index_less_its_crowds():
    data = toy(augmentation=None)
    for batch in batches(data):
        for image, target, index in zip(batch["image"], batch["target"], batch["index"].tolist(), strict=True):
            source, boxes = data.samples("train")[index]
            rows, columns = target["size"].tolist()
            assert torch.equal((image[:, :rows, :columns] * 255).round().to(torch.uint8), source)
            assert torch.equal(target["boxes"], boxes.corners[~boxes.iscrowd])
            assert len(target["labels"]) == index % 3


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


def test_sizes_and_counts():
    data = toy()
    assert data.num_classes == 3
    assert data.counts() == {"train": 5, "val": 7, "test": 3}
    assert data.batches_per_epoch == 2
    assert data.input_size() == (64, 64)


def test_evaluation_is_in_order_with_what_the_metrics_need():
    data = toy(resize=(20, 30), eval_batch_size=3)
    found = list(data.val_dataloader())
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(7))
    targets = [target for batch in found for target in batch["target"]]
    for index, target in enumerate(targets):
        image, boxes = data.samples("val")[index]
        assert target["original_size"].tolist() == list(image.shape[1:])
        assert max(target["size"]) <= 30
        assert min(target["size"]) <= 20
        assert torch.equal(target["scale"], target["size"] / target["original_size"])
        torch.testing.assert_close(target["boxes"] / target["scale"].flip(0).repeat(2), boxes.corners)
        assert torch.equal(target["area"], boxes.area)
        assert torch.equal(target["iscrowd"], boxes.iscrowd)
        assert not target["repeated"]
    assert sum(len(target["labels"]) == 0 for target in targets) > 0


def test_processes_share_the_evaluation_and_count_nothing_twice(monkeypatch):
    monkeypatch.setattr(module, "world_size", lambda: 3)
    seen, lengths = [], set()
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        found = list(toy().val_dataloader())
        lengths.add(len(found))
        seen += [int(batch["index"]) for batch in found if not batch["target"][0]["repeated"]]
    assert lengths == {3}
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"resize": (30, 20)}, r"data.resize must be \[short, long\]"),
        ({"resize": (0, 20)}, r"data.resize must be \[short, long\]"),
        ({"augmentation": Augmentation()}, "not made for boxes: choose a recipe for detection"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        toy(**arguments)


def test_check_names_what_is_wrong(monkeypatch):
    toy().check()
    monkeypatch.setattr(
        Rectangles,
        "__getitem__",
        lambda self, i: (torch.zeros(3, 4, 4, dtype=torch.uint8), make_boxes([(0, 0, 1, 1)], [7])),
    )
    with pytest.raises(DataError, match="sample 0 of 'train' in Toy: there are boxes of class 7"):
        toy().check()
    monkeypatch.setattr(Toy, "count", 0)
    with pytest.raises(DataError, match="Toy has no image in 'train'"):
        toy().check()


class Mixed(Toy):
    """The last three images of eight are unlabelled."""

    def unlabelled_samples(self):
        return [
            (image, boxes[torch.zeros(len(boxes), dtype=torch.bool)])
            for image, boxes in map(Rectangles(8, 0).__getitem__, (5, 6, 7))
        ]


def mixed(**changes):
    augmentation = BoxAugmentation(scale=(0.7, 1.3), crop=(48, 48), mosaic=0.3, brightness=0.3)
    return Mixed(**{"batch_size": 4, "steps": 12, "seed": 1, "augmentation": augmentation, **changes})


@pytest.mark.parametrize(("chosen", "labelled"), [(None, 2), (3, 3), (4, 4)])
def test_a_batch_has_a_labelled_and_an_unlabelled_part(chosen, labelled):
    data = mixed(labelled_per_batch=chosen)
    data.check()
    assert data.counts() == {"train": 8, "labelled": 5, "unlabelled": 3, "val": 7, "test": 3}
    assert data.num_samples == 8
    assert data.batches_per_epoch == {2: 3, 3: 3, 4: 2}[labelled]
    for batch in batches(data):
        known = [bool(target["labelled"]) for target in batch["target"]]
        assert known == [True] * labelled + [False] * (4 - labelled)
        assert [index < 5 for index in batch["index"].tolist()] == known
        for target in batch["target"]:
            assert bool(target["labelled"]) or (target["boxes"].shape, target["labels"].shape) == ((0, 4), (0,))
    assert all("labelled" not in target for batch in data.val_dataloader() for target in batch["target"])


def test_a_mosaic_of_an_unlabelled_image_is_of_unlabelled_images():
    everything = BoxAugmentation(mosaic=1.0)
    shown = [target for batch in batches(mixed(augmentation=everything)) for target in batch["target"]]
    assert not any(len(target["boxes"]) for target in shown if not target["labelled"])
    assert any(len(target["boxes"]) for target in shown if target["labelled"])


def test_mixed_batches_resume_exactly_and_cannot_be_had_without_unlabelled_images():
    whole, data = batches(mixed()), mixed()
    data.start_step = 7
    assert same(list(data.train_dataloader()), whole[7:])
    with pytest.raises(DataError, match="Toy has no unlabelled samples"):
        toy(labelled_per_batch=2).check()
