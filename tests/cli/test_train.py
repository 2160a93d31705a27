# SPDX-License-Identifier: Apache-2.0
import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from kdlvfm.cli.config import options
from kdlvfm.reporting.per_image import read_pixel_counts


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


@pytest.mark.parametrize("distiller", ["kd", "cwd"])
def test_logits_of_a_trained_head_are_distilled(distiller, train, head, tmp_path):
    ended = train(f"distiller={distiller}", "teacher=from_run", f"teacher.run={head}", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    record = record_of(tmp_path / "run")
    assert record["status"] == "finished"
    assert record["teacher"]["metrics"] == record_of(head)["metrics"]
    assert record["teacher"]["weights"] == "file"
    assert 0 < record["cost"]["teacher_share"] < 1
    assert record["cost"]["seconds"] >= record["cost"]["train_seconds"]
    assert f"kdlvfm table {tmp_path}" in ended.out


def test_the_record_has_the_time_of_an_inference_and_names_what_each_image_adds(train, tmp_path):
    out = tmp_path / "run"
    ended = train("distiller=none", "run.inference_seconds=1", f"out={out}")
    assert ended.code == 0, ended.err
    record = record_of(out)
    assert record["inference"]["input_size"] == record["student"]["input_size"] == [64, 64]
    assert record["inference"]["threads"] == record["hardware"]["threads"]
    assert record["inference"]["latency_p50"] > 0
    for split, images in (("val", 4), ("test", 4)):
        counts = read_pixel_counts(out, record, split)
        assert counts.index.tolist() == list(range(images))
        for metric in ("miou", "pixel_accuracy"):
            assert counts.scorer(metric)(np.ones((1, images)))[0] == pytest.approx(record["metrics"][split][metric])
    assert f"{out}/record.json, student.safetensors, checkpoints/last.ckpt, per_image.npz" in ended.out


def test_nothing_is_timed_where_it_was_not_asked_for(head):
    assert record_of(head)["inference"] is None


def test_where_images_are_augmented_changes_nothing_on_one_device(train, tmp_path):
    found = {}
    for choice in ("false", "true"):
        out = tmp_path / choice
        ended = train("distiller=none", f"data.augment_on_device={choice}", "run.num_workers=1", f"out={out}")
        assert ended.code == 0, ended.err
        found[choice] = load_file(out / "student.safetensors")
    assert all(torch.equal(found["true"][name], value) for name, value in found["false"].items())


def test_features_of_a_random_teacher_are_distilled_and_said_to_be_random(train, vit, tmp_path):
    ended = train("distiller=fitnet", *vit, f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    assert "RANDOM weights" in ended.out
    record = record_of(tmp_path / "run")
    assert record["teacher"]["weights"] == "random"
    assert record["teacher"]["metrics"] is None
    assert record["distiller"]["name"] == "fitnet"
    assert record["selected_step"] == 6


def test_a_teacher_that_saw_other_data_is_measured_anew(train, head, tmp_path):
    out = tmp_path / "run"
    assert train("distiller=kd", "teacher=from_run", f"teacher.run={head}", "data.test=3", f"out={out}").code == 0
    theirs, ours = record_of(head)["metrics"], record_of(out)["teacher"]["metrics"]
    assert ours["val"] == theirs["val"]
    assert ours["test"] != theirs["test"]


def test_a_frozen_encoder_is_left_as_it_was(head):
    weights = load_file(head / "student.safetensors")
    torch.manual_seed(0)
    fresh = timm.create_model("test_vit", num_classes=0).state_dict()
    prefix = "encoder.net."
    encoder = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    assert encoder.keys() == fresh.keys()
    assert all(torch.equal(value, fresh[key]) for key, value in encoder.items())


@pytest.mark.slow
def test_the_students_weights_load_into_plain_smp(kdlvfm, small, tmp_path):
    import segmentation_models_pytorch as smp

    arguments = [*small[:-3], "student=resnet18_fpn", "student.pretrained=false", f"out={tmp_path / 'run'}"]
    assert kdlvfm("train", *arguments, "recipe.steps=2", "distiller=none").code == 0
    net = smp.FPN("tu-resnet18.a1_in1k", encoder_weights=None, classes=11)
    net.load_state_dict(load_file(tmp_path / "run/student.safetensors"))


def test_a_linear_students_encoder_loads_into_plain_timm(train, tmp_path):
    assert train("distiller=none", f"out={tmp_path / 'run'}").code == 0
    weights = load_file(tmp_path / "run/student.safetensors")
    encoder = {key.removeprefix("encoder.net."): value for key, value in weights.items() if "encoder.net." in key}
    timm.create_model("test_resnet", num_classes=0).load_state_dict(encoder)


def test_a_finished_run_is_not_repeated(train, tmp_path):
    out = tmp_path / "run"
    assert train("distiller=none", f"out={out}").code == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    again = train("distiller=none", f"out={out}", "run.num_workers=1")
    assert again.code == 0
    assert "is finished; nothing to do" in again.out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()} == before


@pytest.fixture
def folders(tmp_path):
    """Two folders of images and masks in one layout, of different pixels."""
    for number, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(number)
        for split in ("train", "val"):
            for kind, shape in (("images", (32, 32, 3)), ("masks", (32, 32))):
                folder = tmp_path / name / split / kind
                folder.mkdir(parents=True)
                for i in range(2):
                    most = 256 if kind == "images" else 2
                    pixels = torch.randint(0, most, shape, generator=generator, dtype=torch.uint8)
                    Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return [tmp_path / "a", tmp_path / "b"]


def test_data_that_moved_are_the_same_run_and_other_data_are_named(folders, tmp_path, kdlvfm, student_of):
    first, second = folders
    recipe = ("recipe=digit_scenes", "recipe.steps=2", "recipe.batch_size=2", "run.num_workers=0")
    student = student_of("none")
    common = ("data=folder", "data.classes=[x,y]", "distiller=none", *recipe, *student, f"out={tmp_path / 'run'}")
    assert kdlvfm("train", *common, f"data.root={first}").code == 0
    again = kdlvfm("train", *common, f"data.root={second}")
    assert f"note       its data lay in {first}; if {second} holds other data" in again.out
    record = json.loads((tmp_path / "run/record.json").read_text())
    (tmp_path / "run/record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    refused = kdlvfm("train", *common, f"data.root={second}")
    assert refused.code == 1
    assert "holds a run that began on other images or labels than these" in refused.err
    assert kdlvfm("train", *common, f"data.root={first}").code == 0
    assert "note" not in kdlvfm("train", *common, f"data.root={first}").out


def test_seeds_are_different_runs_and_one_seed_is_one_run(train, tmp_path):
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train("distiller=none", f"seed={seed}", f"out={tmp_path / name}").code == 0
        weights[name] = load_file(tmp_path / name / "student.safetensors")
    assert all(torch.equal(value, weights["b"][key]) for key, value in weights["a"].items())
    assert not all(torch.equal(value, weights["c"][key]) for key, value in weights["a"].items())


def test_the_baseline_is_the_same_run_whichever_teacher_is_named(train, vit, tmp_path):
    assert train("distiller=none", f"out={tmp_path / 'a'}").code == 0
    ended = train("distiller=none", *vit, f"out={tmp_path / 'a'}")
    assert "nothing to do" in ended.out


def test_a_run_that_failed_before_its_first_checkpoint_leaves_its_place_to_a_corrected_one(train, tmp_path):
    out = tmp_path / "run"
    failed = train("distiller=none", "trainer.precision=foo", f"out={out}")
    assert failed.code == 1
    assert "Precision 'foo' is invalid" in failed.err
    assert record_of(out)["status"] == "failed"
    assert "Precision" in record_of(out)["error"]
    assert train("distiller=none", f"out={out}").code == 0
    assert record_of(out)["status"] == "finished"


def test_a_loss_that_explodes_is_a_failed_run(train, tmp_path):
    out = tmp_path / "run"
    failed = train("distiller=none", "recipe.optimizer.lr=1e30", "recipe.warmup_steps=0", f"out={out}")
    assert failed.code == 1
    assert "loss is not finite" in failed.err
    record = record_of(out)
    assert record["status"] == "failed"
    assert record["error"].startswith("NonFiniteLossError")
    assert not (out / "student.safetensors").exists()


def test_best_val_tests_the_best_weights(train, tmp_path):
    out = tmp_path / "run"
    assert train("distiller=none", "recipe.selection=best_val", "recipe.val_every=2", f"out={out}").code == 0
    record = record_of(out)
    best = max(record["curve"], key=lambda point: point["metrics"]["miou"])
    assert record["selected_step"] == best["step"]
    assert record["metrics"]["val"]["miou"] == pytest.approx(best["metrics"]["miou"], abs=1e-6)


def test_print_config_resolves_and_trains_nothing(kdlvfm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = kdlvfm("train", "--print-config", "data=digit_scenes", "recipe.steps=7", "distiller.loss_weight=3")
    assert ended.code == 0
    assert "steps: 7" in ended.out
    assert "loss_weight: 3" in ended.out
    assert "${" not in ended.out
    assert not list(tmp_path.iterdir())


def test_help_names_every_choice(kdlvfm):
    ended = kdlvfm("train", "--help")
    assert ended.code == 0
    words = set(ended.out.replace(",", " ").split())
    for group in ("teacher", "student", "distiller", "data", "recipe"):
        assert set(options(group)) <= words


def test_the_default_folder_is_made_of_the_choices(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("distiller=none", "recipe.steps=1").code == 0
    (folder,) = (tmp_path / "runs/digit_scenes/timm_linear").iterdir()
    assert folder.name.startswith("none-none-seed0-")
    assert (folder / "record.json").is_file()


def test_the_csv_log_has_the_terms(train, vit, tmp_path):
    ended = train("distiller=fitnet", *vit, "logger=csv", "recipe.val_every=3", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    (file,) = (tmp_path / "run").rglob("metrics.csv")
    with file.open() as lines:
        columns = set().union(*csv.DictReader(lines))
    assert {"train/student/cross_entropy", "train/student/fitnet", "val/miou"} <= columns


@pytest.mark.slow
def test_the_tensorboard_log_is_written(train, tmp_path):
    pytest.importorskip("tensorboard")
    ended = train("distiller=none", "logger=tensorboard", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_wandb_works_offline(shell, small, tmp_path):
    pytest.importorskip("wandb")
    process = shell(
        "train", *small[:-4], *small[-3:], "distiller=none", "logger=wandb", "logger.wandb.offline=true",
        f"out={tmp_path / 'run'}",
    )  # fmt: skip
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert list((tmp_path / "run").rglob("offline-run-*"))
