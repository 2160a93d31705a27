# SPDX-License-Identifier: Apache-2.0
"""The sheet of synthetic images: of a run, of a configuration, and what is refused."""

import json

import pytest
import torch
from PIL import Image

CONFIGURATION = ("teacher=digit_scenes_vit", "distiller=data_free:kd")


def test_a_configuration_is_practised_against_its_teacher(kdlvfm, small, tmp_path):
    path = tmp_path / "new" / "sheet.png"
    command = (*small, *CONFIGURATION, "synthesizer=generator", "distiller.synthesizer.every=1")
    ended = kdlvfm("synthesize", *command, "--steps", 2, "--images", 5, "--out", path)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == [
        "step 1/2",
        "step 2/2",
        f"wrote  {path} (5 images of 64x64)",
        f"next   kdlvfm train {' '.join(command)}",
    ]
    with Image.open(path) as file:
        assert file.format == "PNG"


def test_a_teacher_without_classes_shows_its_features(kdlvfm, small, vit, tmp_path):
    path = tmp_path / "sheet.png"
    method = ("teacher.model_kwargs.num_classes=0", "distiller=data_free:fitnet@noise")
    ended = kdlvfm("synthesize", *small, *vit, *method, "--steps", 0, "--images", 2, "--out", path)
    assert ended.code == 0, ended.err
    assert path.is_file()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small):
    """A finished run with a pool."""
    from kdlvfm.cli import main

    folder = tmp_path_factory.mktemp("pool") / "run"
    pool = ("distiller.synthesizer.size=8", "distiller.synthesizer.max_age=3")
    with pytest.raises(SystemExit) as ended:
        main(["train", *small, *CONFIGURATION, *pool, "run.progress=none", f"out={folder}"])
    assert not ended.value.code
    return folder


def test_the_images_of_a_run_are_those_of_its_checkpoint(kdlvfm, trained, tmp_path, monkeypatch):
    from kdlvfm.cli import synthesize

    drawn = []
    monkeypatch.setattr(synthesize, "_draw", lambda images, source, path: drawn.append(images))
    assert kdlvfm("synthesize", trained, "--images", 8, "--out", tmp_path / "sheet.png").code == 0
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    pool = state["distiller.synthesizer._extra_state"]
    kept = pool["images"][pool["ages"] < 3].mean((2, 3))  # shifts and mirroring leave means alone
    assert len(kept)
    shown = drawn[0].mean((2, 3))
    assert all((shown - mean).abs().amax(1).min() < 1e-5 for mean in kept)


def test_a_sheet_lies_beside_its_run(kdlvfm, trained):
    ended = kdlvfm("synthesize", trained, "--images", 4)
    assert ended.code == 0, ended.err
    assert (trained / "synthetic.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is not a run"),
        (["teacher=digit_scenes_vit", "distiller=kd"], "distiller=kd learns from the images of the data"),
        (["experiment=demo", "distiller=data_free:kd", "teacher=none"], "needs a teacher"),
        (["distiller=data_free:kd", "--images", "0"], "--images must be at least 1"),
        (["distiller=data_free:kd", "--out", "."], "is a folder"),
        (["distiller=data_free:kd", "--device", "gpu9"], "cannot be used here"),
    ],
)
def test_mistakes_end_with_one_line(kdlvfm, arguments, words):
    ended = kdlvfm("synthesize", *arguments)
    assert ended.code == 1
    assert ended.err.startswith("kdlvfm synthesize: error: ")
    assert ended.err.count("\n") == 1
    assert words in ended.err


def test_more_images_than_a_pool_has(kdlvfm, trained, tmp_path):
    ended = kdlvfm("synthesize", trained, "--images", 9, "--out", tmp_path / "sheet.png")
    assert ended.code == 1
    assert "a pool of 8 images cannot fill a batch of 9" in ended.err


def changed(folder, into, change):
    """A copy of a run with another record."""
    import shutil

    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("synthetic.png"))
    record = json.loads((into / "record.json").read_text(encoding="utf-8"))
    change(record["config"])
    (into / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return into


def test_a_run_on_data_has_nothing_to_show(kdlvfm, trained, tmp_path):
    folder = changed(trained, tmp_path / "run", lambda config: config["distiller"].pop("synthesizer"))
    ended = kdlvfm("synthesize", folder)
    assert ended.code == 1
    assert "it has no synthesizer" in ended.err


@pytest.mark.parametrize(
    "change",
    [
        {"_target_": "os.system"},
        {"_target_": "kdlvfm.distillers.synthesizers.pool.os.system"},
        {"_target_": "kdlvfm.distillers.synthesizers.Objective.split"},
        {"_target_": "kdlvfm.distillers.synthesizers.patch_entropy.from_context"},
        {"images": {"_target_": "os.getcwd"}},
    ],
)
def test_nothing_in_a_folder_executes(kdlvfm, trained, tmp_path, change):
    folder = changed(trained, tmp_path / "run", lambda config: config["distiller"]["synthesizer"].update(change))
    ended = kdlvfm("synthesize", folder)
    assert ended.code == 1
    assert "it was not loaded" in ended.err or "no synthesizer of kdlvfm" in ended.err
    assert not (folder / "synthetic.png").exists()


def test_a_checkpoint_of_something_else_is_named(kdlvfm, trained, tmp_path):
    folder = changed(trained, tmp_path / "run", lambda config: None)
    torch.save({"state_dict": {}}, folder / "checkpoints" / "last.ckpt")
    ended = kdlvfm("synthesize", folder)
    assert ended.code == 1
    assert "last.ckpt does not hold the synthesizer" in ended.err
