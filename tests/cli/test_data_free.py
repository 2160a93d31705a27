# SPDX-License-Identifier: Apache-2.0
"""Runs without data from the command line to the table, and the mistakes that can be made with them."""

import json

import pytest
import torch
from PIL import Image

from kdlvfm.cli.composites import SYNTHESIZER, expanded, name_of, names_in, synthesizer_in
from kdlvfm.cli.config import compose, default_parts
from kdlvfm.cli.run_folder import run_folder
from kdlvfm.cli.sweep import plan

TAUGHT = ("teacher=digit_scenes_vit", "distiller=data_free:kd")
PART = "distiller@distiller.parts."


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    for number in range(3):
        Image.effect_noise((90, 70 + number), 50.0).convert("RGB").save(folder / f"{number}.png")
    return folder


def test_a_choice_is_taken_apart_and_put_together():
    assert names_in("data_free:kd+cwd@pool") == ["data_free", "kd", "cwd"]
    assert synthesizer_in("data_free:kd@pool") == "pool"
    assert synthesizer_in("data_free:kd") is synthesizer_in("kd") is None
    for name in ("data_free:kd@pool", "data_free:kd+cwd@noise"):
        wrapper, *parts = names_in(name)
        assert name_of(wrapper, parts, synthesizer_in(name)) == name


def test_short_forms_are_written_out():
    files = {"data_free": {"kd": "kd"}}

    def written(*overrides):
        return expanded(overrides, lambda name: files.get(name, {}))

    long = ["distiller=data_free", f"+{PART}cwd=cwd", f"{SYNTHESIZER}=noise", f"~{PART}kd"]
    assert written("distiller=data_free:cwd@noise") == long
    assert written("distiller=data_free:cwd", "synthesizer=noise") == long
    assert written("synthesizer=noise", "distiller=data_free") == [f"{SYNTHESIZER}=noise", "distiller=data_free"]


def test_they_mean_the_same():
    forms = (
        ["distiller=data_free:cwd@generator"],
        ["distiller=data_free:cwd", "synthesizer=generator"],
        ["synthesizer=generator", "distiller=data_free:cwd"],
        ["distiller=data_free", f"{PART}cwd=cwd", f"{SYNTHESIZER}=generator"],
    )
    first, *others = (compose([*form, "distiller.synthesizer.every=3"]) for form in forms)
    assert all(other == first for other in others)
    assert first["distiller"]["synthesizer"]["every"] == 3
    assert first["choices"]["distiller"] == "data_free:cwd@generator"
    assert list(first["distiller"]["parts"]) == ["cwd"]


def test_without_further_words_it_is_kd_on_a_pool():
    assert default_parts("data_free") == {"kd": "kd"}
    config = compose(["distiller=data_free", "teacher=digit_scenes_vit"])
    assert config["choices"]["distiller"] == "data_free:kd@pool"
    assert run_folder(config).name.startswith("data_free-kd@pool-digit_scenes_vit-seed0-")


def test_it_is_swept_with_others_and_by_itself(tmp_path):
    sweep, _ = plan([*TAUGHT[:1], "distiller=none,data_free:kd@pool,data_free:kd@noise", f"out={tmp_path}"])
    assert [cell.title for cell in sweep.cells] == ["none", "data_free:kd@pool", "data_free:kd@noise"]
    sweep, _ = plan([*TAUGHT, "synthesizer=pool,noise", "seed=0,1", f"out={tmp_path}"])
    assert [cell.title for cell in sweep.cells] == ["pool", "pool", "noise", "noise"]


def test_it_is_compared_with_the_baseline_of_the_same_recipe():
    from kdlvfm.reporting.record import recipe_hash

    one, other = compose(["distiller=none"]), compose([*TAUGHT, "synthesizer=noise"])
    assert recipe_hash(one) == recipe_hash(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pool", "generator", "surrogate", "noise"])
def test_a_run_is_recorded_and_listed(name, train, kdlvfm, photographs, tmp_path):
    out = tmp_path / "run"
    settings = [f"distiller.synthesizer.images.root={photographs}"] if name == "surrogate" else []
    ended = train(*TAUGHT, f"synthesizer={name}", *settings, f"out={out}")
    assert ended.code == 0, ended.err
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert record["distiller"]["name"] == f"data_free:kd@{name}"
    assert record["metrics"]["test"]["miou"] > 0
    assert f"data_free:kd@{name}" in kdlvfm("table", out).out
    sheet = kdlvfm("synthesize", out, "--images", 3)
    assert sheet.code == 0, sheet.err
    assert sheet.out.splitlines()[-2:] == [
        f"wrote  {out}/synthetic.png (3 images of 64x64)",
        f"next   kdlvfm table {tmp_path}",
    ]
    with Image.open(out / "synthetic.png") as file:
        assert file.width > file.height


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["synthesizer=pol"], ["no synthesizer called 'pol'", "pool"]),
        (["distiller=data_free:kd@pol"], ["no synthesizer called 'pol'", "pool"]),
        (["distiller=data_free:kdd@pool"], ["no distiller called 'kdd'"]),
        (["distiller=kd@pool"], ["kd learns from the images of the data", "distiller=data_free:kd"]),
        (["distiller=kd", "synthesizer=pool"], ["kd learns from the images of the data"]),
        (["distiller=kd+cwd", "synthesizer=pool"], ["compose learns from the images of the data"]),
        (["distiller=data_free:kd,data_free:cwd"], ["--multirun"]),
        (["synthesizer=pool,noise"], ["--multirun"]),
        (["distiller=data_free:ifvd"], ["IFVD needs ground truth", "distiller.labels=teacher"]),
        (["distiller=data_free:kd+customkd"], ["Compose needs ground truth"]),
        (["distiller=data_free:none"], ["Baseline reads nothing of the teacher"]),
        (["distiller.labels=true"], ["labels must be 'none' or 'teacher'"]),
        (["distiller.lables=teacher"], ["lables"]),
        (["distiller.synthesizer.max_agge=3"], ["max_agge"]),
        (["distiller.synthesizer.size=2"], ["pool of 2 images cannot fill a batch of 4"]),
        (["distiller.synthesizer.size=100000000"], ["GiB of memory", "choose a smaller size"]),
        (["synthesizer=generator", "distiller.synthesizer.tv=-1"], ["must not be negative: tv=-1"]),
        (["synthesizer=surrogate"], ["need a value", "distiller.synthesizer.images.root"]),
        (["synthesizer=surrogate", "distiller.synthesizer.images.root=nowhere"], ["nowhere is missing"]),
        (["teacher=none"], ["needs a teacher"]),
    ],
)
def test_mistakes_end_with_one_line(overrides, words, refused, small):
    chosen = TAUGHT[: 1 if any(override.startswith("distiller=") for override in overrides) else 2]
    line = refused(*overrides, base=(*small, *chosen))
    assert all(word in line for word in words), line


def test_a_folder_without_images_is_refused(refused, small, tmp_path):
    (tmp_path / "empty").mkdir()
    root = f"distiller.synthesizer.images.root={tmp_path / 'empty'}"
    line = refused("synthesizer=surrogate", root, base=(*small, *TAUGHT))
    assert "empty holds no image" in line


def test_logits_are_not_asked_of_a_teacher_without(refused, small, vit):
    without = (*small, *vit, "teacher.model_kwargs.num_classes=0", "distiller=data_free:fitnet")
    for override in ("distiller.synthesizer.one_hot=1", "distiller.labels=teacher", "distiller=data_free:kd"):
        line = refused(override, base=without)
        assert "has no classes" in line


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", ["pool", "generator"])
def test_two_processes_train_and_have_one_pool(name, shell, small, tmp_path):
    out = tmp_path / "run"
    few = ("recipe.steps=4", "run.checkpoint_every=4", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    process = shell("train", *small, *TAUGHT, f"synthesizer={name}", *few, f"out={out}")
    printed, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert printed.count("wrote ") == 1
    state = torch.load(out / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    if name == "pool":
        pool = state["distiller.synthesizer._extra_state"]
        assert pool["ages"].max() >= 1
        assert pool["images"].shape == (80, 3, 64, 64)
