# SPDX-License-Identifier: Apache-2.0
import json

import pytest

FITNET = ("distiller=fitnet", "run.diagnose_every=2")


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory, small, vit):
    from kdlvfm.cli import main

    out = tmp_path_factory.mktemp("diagnosed") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", *small, *vit, *FITNET, f"out={out}"])
    assert not ended.value.code
    return out


@pytest.fixture(scope="module")
def vit():
    return ("teacher=timm", "teacher.name=test_vit", "teacher.pretrained=false")


def test_a_run_is_inspected(diagnosed, kdlvfm):
    points = json.loads((diagnosed / "record.json").read_text())["diagnostics"]["points"]
    assert [point["step"] for point in points] == [1, 2, 4, 6]
    last = points[-1]
    assert list(last["terms"]) == ["student/task", "student/fitnet"]
    assert list(last["cka"]) == ["map.-1~map.-1"]
    assert 0 < last["cka"]["map.-1~map.-1"] <= 1

    ended = kdlvfm("inspect", diagnosed)
    assert ended.code == 0, ended.err
    assert "step 6 of 6" in ended.out
    lines = {line.split()[0]: line.split()[1:] for line in ended.out.splitlines() if line.split()}
    term, task = last["terms"]["student/fitnet"], last["terms"]["student/task"]
    assert lines["student/task"] == [f"{task['value']:.3g}", f"{task['grad_norm']:.3g}", "–", "–"]
    assert lines["student/fitnet"] == [
        f"{term['value']:.3g}",
        f"{term['grad_norm']:.3g}",
        f"{100 * term['grad_norm'] / task['grad_norm']:.1f}",
        "%",
        f"{term['cosine']:.3g}",
    ]
    assert lines["map.-1~map.-1"] == [f"{point['cka']['map.-1~map.-1']:.3g}" for point in (points[0], last)]


def test_a_record_from_before_diagnostics_is_one_too(diagnosed, kdlvfm, tmp_path):
    record = json.loads((diagnosed / "record.json").read_text())
    del record["diagnostics"]
    (tmp_path / "record.json").write_text(json.dumps(record))
    ended = kdlvfm("inspect", tmp_path)
    assert ended.code == 0, ended.err
    assert "No diagnostics" in ended.out


def test_what_is_no_run(kdlvfm, tmp_path):
    for argument in (tmp_path, "dinov3_vits16"):
        ended = kdlvfm("inspect", argument)
        assert ended.code == 1
        assert f"{argument} is not a run" in ended.err
    (tmp_path / "record.json").write_text("{}")
    ended = kdlvfm("inspect", tmp_path)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "not a valid kdlvfm.run/1 record" in ended.err


@pytest.mark.parametrize("key", ["diagnose_every", "dead_term_steps"])
def test_impossible_numbers(key, refused):
    assert f"run.{key} must be a whole number from 1 on, not 0." in refused(f"run.{key}=0")


def test_a_term_without_weight_ends_the_run(train, vit, tmp_path):
    dead = (*vit, "distiller=fitnet", "distiller.loss_weight=0", "run.diagnose_every=1", "run.dead_term_steps=4")
    ended = train(*dead, f"out={tmp_path / 'dead'}")
    assert ended.code == 1
    assert "the distillation term student/fitnet was zero" in ended.err
    record = json.loads((tmp_path / "dead" / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"].startswith("DeadTermError: ")
    ended = train(*dead[:-1], "run.dead_term_steps=null", f"out={tmp_path / 'dead'}")
    assert ended.code == 0, ended.err


def test_off_is_off_and_changes_nothing(train, vit, diagnosed, tmp_path):
    ended = train(*vit, "distiller=fitnet", "run.diagnose_every=null", f"out={tmp_path / 'off'}")
    assert ended.code == 0, ended.err
    record, other = (json.loads((run / "record.json").read_text()) for run in (tmp_path / "off", diagnosed))
    assert record["diagnostics"] == {"points": []}
    assert record["config_hash"] == other["config_hash"]
    weights = [(run / "student.safetensors").read_bytes() for run in (tmp_path / "off", diagnosed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_look_without_disturbing_each_other(shell, small, vit, tmp_path):
    weights = []
    for every in ("1", "null"):
        out = tmp_path / every
        options = (*vit, "distiller=fitnet", f"run.diagnose_every={every}", "trainer=ddp", "trainer.devices=2")
        process = shell("train", *small, *options, "trainer.accelerator=cpu", f"out={out}")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        weights.append((out / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]
    points = json.loads((tmp_path / "1" / "record.json").read_text())["diagnostics"]["points"]
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert all(point["terms"]["student/fitnet"]["grad_norm"] > 0 for point in points)
