# SPDX-License-Identifier: Apache-2.0
"""Two stages: a run that starts with the encoder of another one, and its line in a table beside the baseline."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdlvfm.cli import main
from kdlvfm.cli.build import build
from kdlvfm.cli.config import compose
from kdlvfm.cli.run_folder import run_folder
from kdlvfm.cli.sweep import plan
from kdlvfm.data.digit_scenes import SceneGenerator
from kdlvfm.reporting.record import config_hash, read_record, recipe_hash, write_record

FEATURES = (
    "task=representation",
    "data=images",
    "data.size=32",
    "recipe=representation",
    "recipe.steps=2",
    "recipe.batch_size=4",
    "recipe.warmup_steps=0",
    "recipe.val_every=null",
    "run.num_workers=0",
    "run.progress=none",
    "run.inference_seconds=null",
    "logger=none",
    "teacher=digit_scenes_vit",
    "student=timm",
    "student.name=test_resnet",
    "student.pretrained=false",
)


def edit(run, **parts):
    record = read_record(run / "record.json")
    for part, values in parts.items():
        record[part] = {**record[part], **values} if isinstance(values, dict) else values
    write_record(run / "record.json", record)
    return record


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """First stages: FitNet with two seeds."""
    root = tmp_path_factory.mktemp("first")
    photos = root / "photos"
    photos.mkdir()
    generator = SceneGenerator("train", size=48)
    for i in range(12):
        Image.fromarray(generator.scene(i).image).save(photos / f"{i:02d}.png")
    for seed in (0, 1):
        out = root / "features" / f"fitnet-seed{seed}"
        with pytest.raises(SystemExit) as ended:
            main(["train", *FEATURES, "distiller=fitnet", f"data.root={photos}", f"seed={seed}", f"out={out}"])
        assert not ended.value.code
        edit(out, cost={"train_seconds": 4.0})
    return root / "features"


@pytest.fixture
def features(learned, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(learned, tmp_path / "features")


def test_a_run_starts_with_the_encoder_of_the_run_before_in_the_recipe_of_the_baseline(small, learned):
    run = learned / "fitnet-seed1"
    alone, second = compose(small), compose([*small, f"after={run}"])
    frozen = compose([*small, f"after={run}", "student.freeze=true"])
    assert len({recipe_hash(config) for config in (alone, second, frozen)}) == 1
    assert len({config_hash(config) for config in (alone, second, frozen)}) == 3
    state = build(second).student.encoder.net.state_dict()
    expected = load_file(run / "student.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in expected.items())
    assert run_folder(second).name.startswith("none-after-fitnet-none-seed0-")


def test_where_the_first_run_lies_does_not_matter_and_which_one_it_was_does(small, learned, features):
    runs = learned / "fitnet-seed0", features / "fitnet-seed0", learned / "fitnet-seed1"
    here, moved, other = (config_hash(compose([*small, f"after={run}"])) for run in runs)
    assert here == moved
    assert here != other


def test_a_folder_of_first_runs_gives_each_seed_its_own(kdlvfm, small, features):
    found = [compose([*small, f"after={features}", f"seed={seed}"])["after"]["run"] for seed in (0, 1)]
    assert found == [str(features / "fitnet-seed0"), str(features / "fitnet-seed1")]
    sweep, _ = plan([*small, f"after={features}", "seed=0,1"])
    assert [cell.name for cell in sweep.cells] == ["after fitnet seed 0", "after fitnet seed 1"]
    shutil.copytree(features / "fitnet-seed0", features / "again")
    for seed, message in ((0, "several finished runs of seed 0: again, fitnet-seed0"), (2, "no finished run of task=")):
        ended = kdlvfm("train", *small, f"after={features}", f"seed={seed}")
        assert ended.code == 1
        assert message in ended.err


def test_the_table_shows_both_stages_as_a_method_beside_the_baseline(train, kdlvfm, learned, head, tmp_path):
    teacher = ("teacher=from_run", f"teacher.run={head}", "distiller=kd")
    runs = tmp_path / "runs"
    for seed in (0, 1):
        after = f"after={learned}"
        cells = {"none": (), "after": (after,), "frozen": (after, "student.freeze=true"), "kd": (after, *teacher)}
        for name, overrides in cells.items():
            ended = train("distiller=none", *overrides, f"seed={seed}", f"out={runs / f'{name}{seed}'}")
            assert ended.code == 0, ended.err
    assert (
        "after      fitnet of digit_scenes_vit, 2 steps"
        in train("distiller=none", f"after={learned}", f"out={tmp_path / 'one'}").out
    )
    record = json.loads((runs / "after0" / "record.json").read_text())
    assert record["distiller"]["name"] == "after fitnet"
    assert record["name"] == "none-after-fitnet-seed0"

    table = kdlvfm("table", runs, "--format", "markdown").out
    blocks = table.split("\n### ")
    assert len(blocks) == 2  # one of the teacher of the first stage, one of kd's
    ours = next(block for block in blocks if "| after fitnet frozen=false |" in block)
    assert "| after fitnet frozen=true |" in ours
    assert "| baseline |" in ours
    assert "resnet_test" not in ours
    assert "(random weights)" in ours
    assert "its first stage, 2 steps of 4 images of photos, 4 s of training, is in no figure of its cost" in ours
    theirs = next(block for block in blocks if "| kd after fitnet" in block)
    assert "| baseline |" in theirs

    ended = kdlvfm("export", runs / "after0", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    card = (next((tmp_path / "out").rglob("MODEL_CARD.md"))).read_text()
    assert "distilled from digit_scenes_vit with after fitnet" in card
    assert "weights of the first stage's teacher" in card
    assert "data of the first stage" in card


def test_a_baseline_of_equal_time_has_the_time_of_both_stages(train, kdlvfm, learned, tmp_path):
    for name, overrides in {"none": (), "after": (f"after={learned}",)}.items():
        assert train("distiller=none", *overrides, f"out={tmp_path / name}").code == 0
        edit(tmp_path / name, cost={"images_per_second": 4.0})  # a second for each of 6 steps
    ended = train("distiller=none", f"equal_time={tmp_path / 'after'}", f"out={tmp_path / 'longer'}")
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "longer" / "record.json").read_text())["steps"] == 10
    assert "baseline, equal time to after fitnet" in kdlvfm("table", tmp_path).out


@pytest.mark.parametrize(
    ("spoil", "overrides", "message"),
    [
        (lambda run: edit(run, status="interrupted"), (), "is interrupted, not finished"),
        (lambda run: (run / "student.safetensors").unlink(), (), "has no student.safetensors"),
        (
            lambda run: None,
            ("student.encoder.pretrained=true",),
            "add student.encoder.pretrained=false student.encoder.name=test",
        ),
        (lambda run: None, ("student.encoder.checkpoint=nowhere",), "nowhere: there is no such file"),
        (lambda run: None, ("student.encoder.name=test_vit",), "expected (bn1."),
        (lambda run: None, ("equal_time=runs/kd",), "leave after= out"),
        (
            lambda run: edit(run, task={"name": "segmentation"}),
            (),
            "is a run of task=segmentation: a first stage is one of task=representation",
        ),
    ],
)
def test_what_cannot_be_a_first_stage_is_said_in_one_line(spoil, overrides, message, features, refused):
    run = features / "fitnet-seed0"
    spoil(run)
    assert message in refused("distiller=none", f"after={run}", *overrides)
