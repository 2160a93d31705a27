# SPDX-License-Identifier: Apache-2.0
"""What a model card says of licences and of what was measured."""

import pytest
import yaml
from torch import nn

from kdlvfm import __version__
from kdlvfm.export.card import Measured, Statistics, as_cells, licences, model_card
from kdlvfm.export.weights import Network

NETWORK = Network("student.safetensors", nn.Identity(), "timm.create_model", {}, about="for timm")
INDEX = {"model-index": [{"name": "a", "results": [{"metrics": [{"type": "mAP", "value": 0.5}]}]}]}
LATENCY = {"latency_p50": 0.0123, "latency_p95": None}


def part(licence, weights="pretrained"):
    return {"name": f"a network under {licence}", "weights": weights, "licence": licence}


def make(student=None, teacher=None):
    student = {"parameters": 2_500_000, "macs": None, "input_size": [64, 96], **(student or part("apache-2.0"))}
    return {
        "name": "kd-seed0",
        "config": {},
        "student": student,
        "teacher": teacher,
        "distiller": {"name": "kd" if teacher else "none", "settings": {"temperature": 4.0, "weight": None}},
        "task": {"name": "detection", "primary_metric": "mAP"},
        "data": {"name": "Cells", "classes": ["red", "white"], "licence": None, "counts": {"train": 7}},
        "metrics": {"test": {"mAP": 0.5, "AP50": None, "AP": {"red": 0.5}}},
        "steps": 20,
        "batch_size": 4,
        "seed": 3,
        "selection": "best_val",
        "command": ["kdlvfm", "train", "data=cells", "distiller=a b", "out=/home/me/run", "run.num_workers=3"],
        "config_hash": "0123456789ab",
        "versions": {"kdlvfm": "0.1", "torch": "2.15"},
    }


def card(record, measured=()):
    statistics = Statistics((0.5, 0.25, 0.125), (1.0, 1.0, 1.0))
    _, head, text = model_card(record, [NETWORK], {}, statistics, measured, INDEX, "A paper, 2015").split("---\n", 2)
    return yaml.safe_load(head), text


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (part("apache-2.0"), None, "apache-2.0"),
        (part("apache-2.0"), part("apache-2.0"), "apache-2.0"),
        (part(None, "random"), part("mit"), "mit"),
        (part("apache-2.0"), part("cc-by-nc-4.0"), "other"),
        (part("apache-2.0"), part(None, "file"), "other"),
        (part("apache-2.0 (of timm's resnet18; not known of this file)", "file"), None, "other"),
        (part(None, "file"), None, "unknown"),
        (part(None, "random"), part(None, "random"), "unknown"),
    ],
)
def test_the_head_has_a_licence_only_where_there_is_one(student, teacher, expected):
    head, text = card(make(student, teacher))
    assert head["license"] == expected
    assert ("license_name" in head) == (expected == "other")
    for what, stated in licences(make(student, teacher)).items():
        assert f"| {what} | {stated['name']} | {stated['licence']} |" in text


def test_licences_name_every_part():
    found = licences(make(part(None, "random"), part("mit")))
    assert found["student weights"]["licence"] == "none: random weights"
    assert found["teacher weights"] == {"name": "a network under mit", "licence": "mit"}
    assert found["data"] == {"name": "Cells", "licence": "unknown"}
    assert licences(make()).keys() == {"student weights", "data"}
    record = make()
    record["data"]["labels"] = {"teacher": part("dinov3-license"), "confidence": 0.9, "images": {"train": 7}}
    assert licences(record)["weights of the labels' teacher"]["licence"] == "dinov3-license"


def test_the_text_introduces_the_student():
    _, text = card(make(teacher=part("mit")))
    assert "detects objects of 2 classes: red, white. It was distilled from a network under mit with kd (A" in text
    assert f"on Cells, by kdlvfm {__version__}. It has 2.50 M parameters.\n" in text
    assert "subtract the mean (0.5, 0.25, 0.125)" in text
    assert "20 steps of 4 images, seed 3; weights of the best validation" in text
    assert '- distiller kd {"temperature": 4.0}' in text
    assert "kdlvfm train data=cells 'distiller=a b'\n" in text
    assert "/home/me" not in text
    assert "trained without a teacher" in card(make())[1]


def test_measured_rows():
    rows = [Measured("torch", {"mAP": 0.25}, LATENCY, 12_345_678), Measured("int8", None, None, 1000)]
    titles, cells = as_cells(rows, "mAP")
    assert titles == ["", "mAP, %", "p50, ms", "p95, ms", "MB"]
    assert cells == [["torch", "25.00", "12.3", "–", "12.3"], ["int8", "–", "–", "–", "0.0"]]
    assert "| torch | 25.00 | 12.3 | – | 12.3 |" in card(make(), rows)[1]


def test_a_student_of_two_stages_is_under_the_terms_of_both():
    first = {"teacher": part("dinov3-license"), "data": "photos", "data_licence": None}
    record = {**make(), "config": {"after": first}, "distiller": {"name": "after fitnet", "settings": {}}}
    found = licences(record)
    assert found["weights of the first stage's teacher"]["licence"] == "dinov3-license"
    assert found["data of the first stage"]["name"] == "photos"
    head, text = card(record)
    assert head["license"] == "other"
    assert "distilled from a network under dinov3-license with after fitnet" in text
