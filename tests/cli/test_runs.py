# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from kdlvfm.cli.build import build_data, build_task
from kdlvfm.cli.runs import load_student, read_run, without_weights
from kdlvfm.training.fit import evaluate


def test_a_student_comes_back_as_it_was_measured(head):
    record = read_run(head)
    student, data = load_student(head, record), build_data(record["config"])
    assert not student.training
    assert student.card.weights == "file"
    task = build_task(record["config"], data)
    assert evaluate(student, data.test_dataloader(), task) == record["metrics"]["test"]
    assert evaluate(student, data.val_dataloader(), task) == record["metrics"]["val"]


def test_a_student_whose_encoder_came_from_a_file_with_other_classes_comes_back(train, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), weights)
    encoder = ("student.encoder.name=test_vit", f"student.encoder.checkpoint={weights}")
    ended = train("distiller=none", "recipe.steps=1", *encoder, f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    student = load_student(tmp_path / "run", read_run(tmp_path / "run"))
    saved = load_file(tmp_path / "run" / "student.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in student.net.state_dict().items())


def test_without_weights_reaches_every_level_and_changes_nothing_else():
    node = {"pretrained": True, "name": "a", "encoder": {"checkpoint": "x.pt", "pretrained": True, "dims": [1, 2]}}
    expected = {"pretrained": False, "name": "a", "encoder": {"checkpoint": None, "pretrained": False, "dims": [1, 2]}}
    assert without_weights(node) == expected
    assert node["pretrained"] is True


@pytest.fixture
def forged(head, tmp_path):
    """A run folder from a stranger: `change` edits the configuration in its record."""

    def make(change):
        run = tmp_path / "forged"
        run.mkdir()
        (run / "student.safetensors").write_bytes((head / "student.safetensors").read_bytes())
        record = json.loads((head / "record.json").read_text())
        change(record["config"])
        (run / "record.json").write_text(json.dumps(record))
        return run

    return make


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.open",
        "kdlvfm.cli.train.subprocess.run",
        "kdlvfm.models.weights.Path.write_text",
        "kdlvfm.models.weights.urlopen",
        "kdlvfm.models.timm.inspect.os.system",
        "kdlvfm.data.download.subprocess.run",
        "torch.optim.sgd.torch.load",
        "kdlvfm.data.nothing.Here",
    ],
)
@pytest.mark.parametrize("part", ["student", "data", "task"])
def test_a_run_that_asks_to_call_something_else_is_not_loaded(part, target, kdlvfm, refused, forged, tmp_path):
    trace = tmp_path / "trace"

    def change(config):
        config[part] = {**config[part], "name": {"_target_": target, "_args_": [["touch", str(trace)]]}}

    run = forged(change)
    ended = kdlvfm("evaluate", run)
    assert ended.code == 1
    assert f"asks to call '{target}'" in ended.err
    if part == "student":
        assert f"asks to call '{target}'" in refused("distiller=kd", "teacher=from_run", f"teacher.run={run}")
    assert not trace.exists()


def test_weights_of_another_network_in_a_run(kdlvfm, forged):
    run = forged(lambda config: config["student"]["encoder"].update(name="test_resnet"))
    ended = kdlvfm("evaluate", run)
    assert ended.code == 1
    assert "does not fit the student that the record describes" in ended.err
