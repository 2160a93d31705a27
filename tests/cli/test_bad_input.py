# SPDX-License-Identifier: Apache-2.0
"""Each mistake ends with one line that names cause and fix, before any training, with nothing overwritten."""

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image

FOLDER = ("data=folder", "data.classes=[background,crack]")


@pytest.fixture
def folder(tmp_path, small):
    """A small data set of files, and the options that name it."""
    root = tmp_path / "cracks"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(np.full((16, 16), i, np.uint8)).save(root / split / "masks" / f"{i}.png")
    kept = [option for option in small if not option.startswith("data")]
    return root, (*kept, *FOLDER, f"data.root={root}", "distiller=none", "recipe.batch_size=2")


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("teacher=dinov3_vit16", "dinov3_vits16"),
        ("student=resnet18_deeplab", "resnet18_deeplabv3plus"),
        ("distiller=fitnett", "fitnet"),
        ("data=camvit", "camvid"),
        ("recipe=cirkd", "cirkd_40k"),
        ("trainer=dpp", "ddp"),
    ],
)
def test_an_unknown_name_has_near_ones(override, near, refused):
    said = refused(override)
    group, name = override.split("=")
    assert f"there is no {group} called '{name}'" in said
    assert near in said


def test_a_wrong_tap_of_the_student(refused, vit):
    said = refused("distiller=fitnet", *vit, "distiller.student_tap=map.9")
    assert "no tap 'map.9'" in said
    assert "map.4" in said


def test_a_wrong_tap_of_the_teacher(refused, vit):
    assert "no tap 'tokns'. Did you mean tokens" in refused("distiller=fitnet", *vit, "distiller.teacher_tap=tokns")


def test_a_teacher_without_a_head_for_a_logit_method(refused, vit):
    said = refused("distiller=kd", *vit, "teacher.model_kwargs={num_classes: 0}")
    assert "has no classes" in said
    assert "teacher=from_run" in said


def test_a_head_for_other_classes(refused, folder, head):
    said = refused("distiller=kd", "teacher=from_run", f"teacher.run={head}", base=folder[1])
    assert "head has 11 classes, the data has 2" in said


def test_no_teacher_where_one_is_needed(refused):
    assert "KD needs a teacher: pass one" in refused("distiller=kd")


def test_a_mask_value_outside_the_classes(refused, folder):
    root, base = folder
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(root / "train/masks/1.png")
    said = refused(base=base)
    assert "train/masks/1.png holds 7" in said
    assert "0 to 1" in said


def test_an_image_and_a_mask_of_different_size(refused, folder):
    root, base = folder
    Image.fromarray(np.zeros((16, 17), np.uint8)).save(root / "val/masks/0.png")
    assert "val/masks/0.png" in refused(base=base)


def test_an_image_that_cannot_be_read(refused, folder):
    root, base = folder
    (root / "train/images/0.png").write_bytes(b"not an image")
    assert "train/images/0.png is not a readable image" in refused(base=base)


def test_a_data_folder_that_is_not_there(refused, folder):
    assert "nowhere" in refused("data.root=nowhere", base=folder[1])


def test_an_empty_data_folder(refused, folder):
    root, base = folder
    for path in (root / "train").rglob("*.png"):
        path.unlink()
    assert str(root / "train") in refused(base=base)


def test_values_that_are_missing(refused):
    said = refused("data=folder")
    assert "data.root=..." in said
    assert "data.classes=..." in said


def test_a_checkpoint_of_another_architecture(refused, tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pt")
    said = refused(f"student.encoder.checkpoint={tmp_path / 'vit.pt'}")
    assert "vit.pt does not fit test_resnet" in said


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_that_would_run_code(refused, tmp_path):
    trace = tmp_path / "trace"
    torch.save({"state_dict": Malicious(str(trace))}, tmp_path / "evil.pt")
    said = refused(f"student.encoder.checkpoint={tmp_path / 'evil.pt'}")
    assert "not a file of weights only" in said
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Malicious(str(trace)), protocol=2))
    assert "evil.ckpt" in refused(f"student.encoder.checkpoint={tmp_path / 'evil.ckpt'}")
    assert not trace.exists()


def test_a_run_checkpoint_that_would_run_code_is_not_resumed(train, tmp_path):
    out, trace = tmp_path / "run", tmp_path / "trace"
    assert train("distiller=none", f"out={out}").code == 0
    record = json.loads((out / "record.json").read_text())
    (out / "record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    torch.save({"state_dict": Malicious(str(trace))}, out / "checkpoints/last.ckpt")
    ended = train("distiller=none", f"out={out}")
    assert ended.code == 1
    assert not trace.exists()


def test_a_folder_of_a_different_configuration(train, tmp_path):
    out = tmp_path / "run"
    assert train("distiller=none", f"out={out}", "recipe.optimizer.lr=0.002").code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ended = train("distiller=none", f"out={out}", "recipe.optimizer.lr=0.5")
    assert ended.code == 1
    assert "recipe.optimizer.lr: 0.002 != 0.5" in ended.err
    assert "out=FOLDER" in ended.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["other files", "file", "broken record"])
def test_a_place_that_is_taken(kind, train, tmp_path):
    out = tmp_path / "taken"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("record.json" if kind == "broken record" else "thesis.tex")).write_text("{mine")
    ended = train("distiller=none", f"out={out}")
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert "out=FOLDER" in ended.err
    assert [path.read_text() for path in (out, *out.rglob("*")) if path.is_file()] in (["mine"], ["{mine"])


def test_fp16_on_a_cpu(refused):
    assert "trainer.precision=bf16-mixed" in refused("trainer.precision=16-mixed", "trainer.accelerator=cpu")


def test_a_misspelt_argument_of_the_method(refused, head):
    said = refused("distiller=kd", "teacher=from_run", f"teacher.run={head}", "distiller.temprature=2")
    assert "KD" in said
    assert "'temprature'" in said


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("student.hed=linear", "hed"),
        ("data.labeled=3", "labeled"),
        ("recipe.optimizer.momentun=0.9", "momentun"),
        ("recipe.schedule.flor=0.9", "flor"),
        ("recipe.optimizr.lr=0.9", "optimizr"),
        ("trainer.precison=64", "precison"),
        ("recipe.stpes=5", "stpes"),
        ("recipe.steps=ten", "recipe.steps must be a whole number from 1 on, not 'ten'"),
        ("recipe.steps=0", "recipe.steps must be"),
        ("recipe.accumulate=0", "recipe.accumulate must be"),
        ("recipe.val_every=7", "recipe.val_every must be from 1 to recipe.steps=6"),
        ("recipe.selection=best", "recipe.selection must be last or best_val"),
        ("run.threads=all", "run.threads must be"),
        ("run.num_workers=-1", "run.num_workers must be"),
        ("run.progress=dots", "run.progress must be"),
        ("run.inference_seconds=0", "run.inference_seconds must be a whole number from 1"),
        ("seed=abc", "seed must be"),
        ("distiller", "write key=value"),
        ("distiller=none,kd", "--multirun"),
        ("student.encoder.name=resnet81", "resnet18"),
        ("student.head=pyramids", "'linear' or 'pyramid'"),
        ("student.encoder.checkpoint=nowhere.pt", "nowhere.pt does not exist"),
        ("++recipe.groups.critic.clip_norm=1", "groups are student"),
    ],
)
def test_other_mistakes(override, word, refused):
    assert word in refused(override)


def test_a_hub_that_cannot_be_reached(refused, monkeypatch, tmp_path):
    from kdlvfm.models import weights

    def unreachable(url):
        raise OSError("Name or service not known")

    monkeypatch.setattr(weights, "_probe", unreachable)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *names: None)
    said = refused("distiller=fitnet", "teacher=dinov3_vits16")
    assert "model.safetensors of timm/vit_small_patch16_dinov3" in said
    assert "checkpoint=PATH" in said


@pytest.mark.parametrize("kind", ["nothing", "folder", "unfinished"])
def test_a_teacher_run_that_is_none(kind, refused, tmp_path, head):
    run = tmp_path / "teacher"
    if kind != "nothing":
        run.mkdir()
    if kind == "unfinished":
        record = json.loads((head / "record.json").read_text())
        (run / "record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    said = refused("distiller=kd", "teacher=from_run", f"teacher.run={run}")
    assert str(run) in said
    assert ("interrupted, not finished" if kind == "unfinished" else "no record.json") in said


@pytest.mark.parametrize(
    ("part", "target", "missing"),
    [
        ("student", "plane.Plain", "No module named 'plane'"),
        ("student", "kdlvfm.models.smp.SMP", "has no attribute 'SMP'"),
        ("task", "kdlvfm.tasks.segmentations.Segmentation", "No module named 'kdlvfm.tasks.segmentations'"),
        ("student", "Plain", "Empty module name"),
    ],
)
def test_a_class_that_does_not_exist(part, target, missing, refused):
    said = refused("distiller=none", f"{part}._target_={target}")
    assert f"_target_={target} cannot be found" in said
    assert missing in said
