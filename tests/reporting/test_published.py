# SPDX-License-Identifier: Apache-2.0
"""Published figures stand beside runs of their setting, and beside no others."""

import json
from importlib import resources

import pytest

from kdlvfm.cli.config import compose
from kdlvfm.reporting.published import published
from kdlvfm.reporting.tables import summarise

CIRKD = ["data=camvid", "recipe=cirkd_40k"]


@pytest.fixture
def camvid(make_record):
    """A record of a run that these overrides ask for."""

    def make(*overrides, distiller="none", student="resnet18_pspnet", score=0.66):
        config = compose([*CIRKD, f"student={student}", *overrides])
        made = make_record(distiller, 0, score, teacher=None)
        made["config"] = {**made["config"], **{key: config[key] for key in ("recipe", "student")}}
        counts = {"train": 367, "labelled": 367, "unlabelled": 0, "val": 101, "test": 233}
        made["data"] = {**made["data"], "name": "CamVid", "counts": counts}
        name = f"resnet18.a1_in1k-{student.partition('_')[2]}"
        made["student"] = {**made["student"], "name": name, "weights": "pretrained"}
        return made

    return make


def test_the_recipe_and_the_student_of_the_benchmark_have_its_figures(camvid):
    figures, footnotes = published(camvid(), "test", "miou")
    values = {name: found.value for name, found in figures.items()}
    assert values == {"baseline": 0.6673, "cirkd": 0.6865, "afdcd": 0.6948}
    assert [figures[name].source for name in values] == [1, 1, 2]
    assert [note[:3] for note in footnotes] == ["[1]", "[2]"]
    assert "CIRKD, CVPR 2022" in footnotes[0]
    figures, _ = published(camvid(student="resnet18_deeplabv3"), "test", "miou")
    assert figures["baseline"].value == 0.6692


@pytest.mark.parametrize(
    "override",
    [
        "recipe.steps=20000",
        "recipe.batch_size=8",
        "recipe.optimizer.lr=0.01",
        "recipe.augmentation.crop=[256,256]",
        "student.decoder_kwargs.output_stride=16",
    ],
)
def test_another_recipe_has_none(override, camvid):
    assert published(camvid(override), "test", "miou") == ({}, [])


def test_another_student_split_metric_or_amount_of_labels_has_none(camvid, make_record):
    record = camvid()
    assert published(record, "val", "miou") == published(record, "test", "pixel_accuracy") == ({}, [])
    assert published(camvid(student="resnet18_deeplabv3plus"), "test", "miou") == ({}, [])
    assert published(make_record(), "test", "miou") == ({}, [])
    for part, key, value in (("student", "weights", "random"), ("data", "name", "Cityscapes")):
        assert published({**record, part: {**record[part], key: value}}, "test", "miou") == ({}, [])
    counts = {**record["data"]["counts"], "labelled": 46, "unlabelled": 321}
    assert published({**record, "data": {**record["data"], "counts": counts}}, "test", "miou") == ({}, [])


def test_rows_have_the_figure_of_their_method_and_notes_name_the_paper(camvid):
    (block,) = summarise([camvid(distiller=name) for name in ("none", "afdcd", "kd")]).blocks
    rows = {row.method: row.published and row.published.value for row in block.rows}
    assert rows == {"baseline": 0.6673, "afdcd": 0.6948, "kd": None}
    assert any("Af-DCD, NeurIPS 2023" in note for note in block.notes)
    (block,) = summarise([camvid(distiller="kd")]).blocks
    assert not any("Published" in note for note in block.notes)


def test_every_figure_is_a_fraction_from_a_source_that_can_be_looked_up():
    content = json.loads(resources.files("kdlvfm.reporting").joinpath("published.json").read_text(encoding="utf-8"))
    for setting in content["settings"]:
        for student in setting["students"]:
            for source, values in student["figures"].items():
                assert content["sources"][source]["url"].startswith("https://")
                assert all(0 < value < 1 for value in values.values())
