# SPDX-License-Identifier: Apache-2.0
"""A student that leaves: its files, what is measured of them, the card with lines that run, and what is refused."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import yaml
from safetensors import safe_open

from kdlvfm.cli import export_files, main
from kdlvfm.cli.runs import load_student, read_run
from kdlvfm.core.align import resize_map

SMP = ("student=smp", "student.name=test_resnet", "student.decoder=fpn", "student.pretrained=false")
EXPORTED = ["MODEL_CARD.md", "export.json", "student.int8.onnx", "student.onnx", "student.safetensors"]


def exit_code(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def manifest_of(folder):
    return json.loads((folder / "export.json").read_text())


def card_of(folder):
    """The head of a card, as the Hub reads it, its text, and its blocks of Python."""
    _, head, text = (folder / "MODEL_CARD.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text, re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small):
    """A finished run of a small network of SMP that had a teacher."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("export") / "run"
    teacher = ("distiller=kd", "teacher=digit_scenes_vit")
    assert not exit_code("train", *small[: small.index("student=timm_linear")], *SMP, *teacher, f"out={folder}")
    return folder


@pytest.fixture(scope="module")
def exported(run):
    assert not exit_code("export", run, "--int8", "--calibration", "4", "--time", "0.4")
    return run / "export"


def test_everything_is_written_and_listed(exported):
    assert names(exported) == EXPORTED
    manifest = manifest_of(exported)
    assert sorted([*manifest["files"], "export.json"]) == EXPORTED
    assert manifest["onnx"]["outputs"] == {"logits": ["batch", 11, "height", "width"]}
    assert max(check["error"] for check in manifest["onnx"]["parity"]["checks"]) < 1e-4
    assert len({(check["batch"], check["height"]) for check in manifest["onnx"]["parity"]["checks"]}) == 3


def test_scores_and_latency_of_each_file_are_in_the_list(exported, run):
    measured = manifest_of(exported)["measured"]
    rows = {row["title"]: row for row in measured["rows"]}
    assert (measured["split"], measured["metric"]) == ("test", "miou")
    assert list(rows) == ["torch fp32", "onnxruntime fp32", "onnxruntime int8"]
    assert rows["torch fp32"]["metrics"] == read_run(run)["metrics"]["test"]
    fp32, int8 = rows["onnxruntime fp32"], rows["onnxruntime int8"]
    assert fp32["metrics"]["miou"] == pytest.approx(rows["torch fp32"]["metrics"]["miou"], abs=1e-4)
    assert int8["metrics"]["miou"] == pytest.approx(fp32["metrics"]["miou"], abs=0.1)
    assert int8["bytes"] < fp32["bytes"]
    for row in rows.values():
        assert row["latency"]["latency_p50"] > 0
        assert row["latency"]["input_size"] == [64, 64]
    assert [row["latency"]["precision"] for row in rows.values()] == ["float32", "float32", "int8"]


def test_three_lines_of_the_card_load_the_student_into_plain_smp(exported, run, monkeypatch):
    monkeypatch.chdir(exported)
    head, _, blocks = card_of(exported)
    assert head["library_name"] == "segmentation-models-pytorch"
    assert blocks[0].count("\n") == 3
    assert "kdlvfm" not in blocks[0]
    namespace = {}
    exec(blocks[0], namespace)
    net, stated = namespace["net"], manifest_of(exported)["metadata"]
    assert type(net).__module__.startswith("segmentation_models_pytorch.")
    mean, std = (torch.tensor(stated[name]).view(-1, 1, 1) for name in ("mean", "std"))
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = load_student(run, read_run(run))(images, ("logits",))["logits"]
        torch.testing.assert_close(net((images - mean) / std), expected, atol=1e-5, rtol=1e-5)
    (logits,) = execute(blocks[1], images)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    (int8,) = execute(blocks[2], images)
    assert (int8 - expected).abs().mean() < 0.1 * expected.std()


def execute(block, images):
    """The outputs of a session as a block of a card asks for them."""
    namespace = {"images": images.numpy()}
    exec(block, namespace)
    return [torch.from_numpy(namespace["logits"])]


def test_the_card_says_what_it_is_and_under_which_terms(exported, run):
    record = read_run(run)
    head, text, _ = card_of(exported)
    assert head["license"] == "apache-2.0"  # of the teacher's weights; the student's were random
    assert head["pipeline_tag"] == "image-segmentation"
    assert head["metrics"] == ["mean_iou"]
    (entry,) = head["model-index"]
    values = {metric["type"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert values["mean_iou"] == pytest.approx(record["metrics"]["test"]["miou"], abs=1e-6)
    assert "distilled from digit_scenes_vit with kd (" in text
    assert "| student weights | test_resnet.r160_in1k-fpn | none: random weights |" in text
    assert "| teacher weights | digit_scenes_vit | apache-2.0 |" in text
    assert f"| test | {100 * record['metrics']['test']['miou']:.2f} |" in text
    assert "kdlvfm train data=digit_scenes" in text
    assert "out=" not in text
    assert str(run) not in text


def test_the_files_hold_what_made_them(exported, run):
    with safe_open(exported / "student.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["target"] == "segmentation_models_pytorch.create_model"
    assert json.loads(metadata["arguments"])["encoder_name"] == "tu-test_resnet"
    assert json.loads(metadata["licences"])["teacher weights"] == {"name": "digit_scenes_vit", "licence": "apache-2.0"}
    assert json.loads(metadata["classes"]) == read_run(run)["data"]["classes"]
    import onnxruntime

    for name in ("student.onnx", "student.int8.onnx"):
        session = onnxruntime.InferenceSession(exported / name, providers=["CPUExecutionProvider"])
        stated = session.get_modelmeta().custom_metadata_map
        assert stated["record_sha256"] == metadata["record_sha256"]
        assert stated["licences"] == metadata["licences"]


def test_the_same_again_does_nothing_and_another_needs_force(exported, run, kdlvfm):
    before = {file: file.stat().st_mtime_ns for file in exported.iterdir()}
    again = kdlvfm("export", run, "--int8", "--calibration", "4", "--time", "2")
    assert again.code == 0
    assert "is this export; nothing to do." in again.out
    assert "onnxruntime int8" in again.out
    other = kdlvfm("export", run, "--no-onnx")
    assert other.code == 1
    assert "holds another export (onnx: True != False; calibration_images: 4 != None" in other.err
    assert other.err.count("\n") == 1
    assert {file: file.stat().st_mtime_ns for file in exported.iterdir()} == before


def test_force_replaces_an_export_and_nothing_else(run, kdlvfm, tmp_path):
    out = tmp_path / "out"
    assert kdlvfm("export", run, "--no-onnx", "--out", out).code == 0
    (out / "student.safetensors").write_text("damaged")
    refused = kdlvfm("export", run, "--no-onnx", "--out", out)
    assert refused.code == 1
    assert "its files were changed" in refused.err
    (out / "notes.txt").write_text("mine")
    assert kdlvfm("export", run, "--no-onnx", "--out", out, "--force").code == 0
    assert names(out) == ["MODEL_CARD.md", "export.json", "notes.txt", "student.safetensors"]
    assert (out / "student.safetensors").stat().st_size > 1000
    weights = (run / "student.safetensors").read_bytes()
    for options in ((), ("--force",)):
        ended = kdlvfm("export", run, "--no-onnx", "--out", run, *options)
        assert ended.code == 1
        assert "holds other files and no export" in ended.err
    assert (run / "student.safetensors").read_bytes() == weights


def test_the_encoder_of_a_head_loads_into_plain_timm(head, kdlvfm, tmp_path, monkeypatch):
    ended = kdlvfm("export", head, "--no-onnx", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert names(tmp_path / "out") == ["MODEL_CARD.md", "encoder.safetensors", "export.json", "student.safetensors"]
    monkeypatch.chdir(tmp_path / "out")
    yaml_head, _, blocks = card_of(tmp_path / "out")
    assert yaml_head["license"] == "unknown"
    student = load_student(head, read_run(head))
    images = torch.rand(1, 3, 64, 64)
    whole, alone = {}, {}
    exec(blocks[0], whole)
    exec(blocks[1], alone)
    assert "kdlvfm" not in blocks[1]
    with torch.no_grad():
        expected = student(images, ("logits", "map.-1"))
        assert torch.equal(whole["model"](images, ("logits",))["logits"], expected["logits"])
        normalised = student.get_submodule("net.encoder").normalise(images)
        found = alone["net"].forward_intermediates(normalised, intermediates_only=True, norm=False)[-1]
    torch.testing.assert_close(resize_map(found, expected["map.-1"].shape[-2:]), expected["map.-1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nms", "--no-onnx"], "--nms is about ONNX: leave out --no-onnx"),
        (["--size", "64", "64", "--no-onnx"], "--size is about ONNX"),
        (["--calibration", "5"], "--calibration is for --int8: add it"),
        (["--data-root", "x"], "--data-root is for --int8: add it"),
        (["--int8", "--calibration", "0"], "--calibration must be at least 1 image, not 0"),
        (["--time", "-1"], "--time must be 0 seconds or more, not -1"),
        (["--size", "0", "64"], "--size must be a height and a width in pixels"),
        (["--size", "64", "64", "--time", "0"], "--size must be a height and a width in pixels, of images to time"),
        (["--nms"], "detects no boxes: leave NMS out"),
        (["--int8", "--data-root", "elsewhere"], "'root'"),
    ],
)
def test_what_is_refused_before_anything_is_written(options, message, run, kdlvfm, tmp_path):
    ended = kdlvfm("export", run, "--out", tmp_path / "out", *options)
    assert ended.code == 1
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_folders_that_are_no_finished_run(run, kdlvfm, tmp_path):
    assert "is not a run: it has no record.json" in kdlvfm("export", tmp_path).err
    (tmp_path / "record.json").write_text((run / "record.json").read_text().replace('"finished"', '"interrupted"'))
    assert "is interrupted, not finished; run its command again" in kdlvfm("export", tmp_path).err
    (tmp_path / "record.json").write_text((run / "record.json").read_text())
    assert f"{tmp_path} has no student.safetensors" in kdlvfm("export", tmp_path).err
    (tmp_path / "file").write_text("")
    assert "is a file; choose a folder" in kdlvfm("export", run, "--out", tmp_path / "file").err


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_it_is_named_and_weights_can_be_had(library, run, kdlvfm, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    ended = kdlvfm("export", run, "--out", tmp_path / "out")
    assert ended.code == 1
    assert ended.err == f"kdlvfm export: error: {library} is not installed: pip install 'kdlvfm[export]'\n"
    assert not any(tmp_path.iterdir())
    assert kdlvfm("export", run, "--no-onnx", "--out", tmp_path / "out").code == 0


def test_a_file_that_does_not_compute_the_same_is_not_kept(run, kdlvfm, monkeypatch, tmp_path):
    def copied(graph, path, metadata):
        path.write_bytes((run / "export" / "student.onnx").read_bytes())
        with torch.no_grad():
            graph.student.net.segmentation_head[0].bias += 1

    monkeypatch.setattr(export_files, "write_onnx", copied)
    ended = kdlvfm("export", run, "--out", tmp_path / "out", "--time", "0")
    assert ended.code == 1
    assert "student.onnx does not compute what the student does" in ended.err
    assert ended.err.endswith("Nothing was written.\n")
    assert not any(tmp_path.iterdir())
