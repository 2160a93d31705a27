# SPDX-License-Identifier: Apache-2.0
"""A folder of images without labels: which are held out, what squares are taken, and what is refused."""

import pytest
import torch
from PIL import Image

from kdlvfm.data.base import DataError
from kdlvfm.data.box_transforms import BoxAugmentation
from kdlvfm.data.transforms import Augmentation
from kdlvfm.data.unlabelled import UnlabelledImages

GROW = Augmentation(scale=(1.0, 2.0), flip=0.5, brightness=0.2)


def write(folder, count, size=(24, 16), first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        Image.new("RGB", size, (5 * i, 3 * i, 250 - 5 * i)).save(folder / f"{i:03d}.png")


@pytest.fixture
def photos(tmp_path):
    """Twenty images, each of one colour; a third of them in a folder inside."""
    write(tmp_path / "photos", 14)
    write(tmp_path / "photos" / "z", 6, (16, 30), first=14)
    return tmp_path / "photos"


def data_of(root, **changes):
    return UnlabelledImages(root, **{"batch_size": 4, "steps": 6, "size": 12, "seed": 1, **changes})


def test_a_tenth_is_held_out_spread_over_the_names_and_never_trained_on(photos):
    data = data_of(photos)
    data.check()
    assert data.counts() == {"train": 18, "val": 2, "test": 0}
    assert (data.num_samples, data.num_classes, data.name, data.splits) == (18, 0, "photos", ("train", "val"))
    seen = {tuple(image[:, 0, 0].tolist()) for batch in data.train_dataloader() for image in batch["image"]}
    kept = [tuple(image[:, 0, 0].tolist()) for batch in data.val_dataloader() for image in batch["image"]]
    assert [[round(255 * value) for value in colour] for colour in kept] == [[0, 0, 250], [50, 30, 200]]
    assert len(seen) == 18
    assert not seen & set(kept)
    assert data_of(photos, held_out=5).counts()["val"] == 5


def test_a_folder_of_held_out_images_may_lie_inside(photos):
    data = data_of(photos, val=photos / "z")
    assert data.counts() == {"train": 14, "val": 6, "test": 0}


@pytest.mark.parametrize("augmentation", [None, GROW])
def test_batches_are_squares_that_depend_on_seed_and_step_alone(photos, augmentation):
    whole = list(data_of(photos, augmentation=augmentation).train_dataloader())
    for batch in whole:
        assert batch.keys() == {"image", "index"}
        assert batch["image"].shape == (4, 3, 12, 12)
        assert batch["image"].dtype == torch.float32
        assert 0 <= batch["image"].min() <= batch["image"].max() <= 1
    data = data_of(photos, augmentation=augmentation)
    data.start_step = 4
    resumed = list(data.train_dataloader())
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(whole[4:], resumed, strict=True))


def test_the_square_is_from_the_middle_in_validation_and_from_anywhere_in_training(tmp_path):
    columns = Image.new("L", (48, 12))
    columns.putdata([5 * x for _ in range(12) for x in range(48)])
    for i in range(4):
        columns.convert("RGB").save(tmp_path / f"{i}.png")
    data = data_of(tmp_path, augmentation=Augmentation(scale=(1.0, 1.0), flip=0.0), steps=20)
    (held_out,) = data_of(tmp_path, eval_batch_size=2).val_dataloader()
    assert (held_out["image"][0, 0, 0] * 255).round().tolist() == [5 * x for x in range(18, 30)]
    starts = {round(float(image[0, 0, 0] * 51)) for batch in data.train_dataloader() for image in batch["image"]}
    assert min(starts) < 6
    assert max(starts) > 30


def test_in_several_processes_the_last_round_is_filled_with_marked_images(photos):
    data = data_of(photos, held_out=3)
    shares = [data.evaluation_set("val", rank, 2) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    assert [[bool(share[i]["repeated"]) for i in range(2)] for share in shares] == [[False, False], [False, True]]


def test_the_hash_is_that_of_files_and_size(photos):
    found = data_of(photos).split_hash()
    assert found == data_of(photos, seed=3).split_hash()
    assert found != data_of(photos, size=16).split_hash()
    write(photos, 1, first=40)
    assert found != data_of(photos).split_hash()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out": 20}, "20 of the 20 images"),
        ({"held_out": 1}, "1 of the 20 images"),
        ({"held_out": 2, "val": "there"}, "set one of both"),
        ({"val": "there"}, "there is missing"),
        ({"size": 0}, "at least 1 pixel"),
        ({"augmentation": BoxAugmentation()}, "made for boxes"),
        ({"augmentation": Augmentation(crop=(8, 8))}, r"augmentation\.crop=null"),
    ],
)
def test_what_cannot_be_is_refused(photos, arguments, message):
    with pytest.raises(DataError, match=message):
        data_of(photos, **arguments)


@pytest.mark.parametrize("check_images", [True, False])
def test_a_file_that_is_no_image_is_found_before_the_run(photos, check_images):
    (photos / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg is not a readable image"):
        data_of(photos, check_images=check_images).check()
