# SPDX-License-Identifier: Apache-2.0
"""A model-index, read back by the Hub's own library."""

import statistics

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from kdlvfm.reporting.model_index import to_model_index
from kdlvfm.reporting.tables import summarise

SCORES = {"none": [0.41, 0.43, 0.40], "kd": [0.52, 0.55, 0.5049], "cwd": [0.6]}


@pytest.fixture
def table(make_record):
    records = [
        make_record(
            method,
            seed,
            metrics={
                "val": {"miou": 0.99, "pixel_accuracy": 0.99},
                "test": {"miou": score, "pixel_accuracy": score / 2, "iou": {"background": 0.9, "0": None}},
            },
        )
        for method, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]
    return summarise([*records, make_record("fitnet", 0, status="failed", error="too bad")])


def entries(text):
    """Model -> results, by the classes that the Hub checks cards with."""
    found = {}
    for entry in yaml.safe_load(text)["model-index"]:
        card = ModelCardData(**{"model-index": [entry]})
        assert card.model_name == entry["name"]
        found[card.model_name] = card.eval_results
    return found


def test_each_method_that_finished_is_an_entry_with_its_results(table):
    found = entries(to_model_index(table, {}, source="https://example.org/records"))
    assert [name.split(",")[1].partition(" (")[0].strip() for name in found] == ["baseline", "cwd", "kd"]
    for results, method in zip(found.values(), ("none", "cwd", "kd"), strict=True):
        miou, accuracy = results
        scores = SCORES[method]
        assert miou.task_type == "image-segmentation"
        assert (miou.dataset_name, miou.dataset_type, miou.dataset_split) == ("digit_scenes", "digit_scenes", "test")
        assert miou.dataset_args == {"split_hash": "abc", "images": 50}
        assert (miou.metric_type, accuracy.metric_type) == ("mean_iou", "pixel_accuracy")
        assert miou.metric_value == pytest.approx(statistics.fmean(scores), abs=1e-6)
        assert accuracy.metric_value == pytest.approx(statistics.fmean(scores) / 2, abs=1e-6)
        assert miou.metric_args["seeds"] == list(range(len(scores)))
        assert miou.source_url == "https://example.org/records"
        if len(scores) == 1:
            assert miou.metric_name == "mIoU (one run, seed 0)"
            assert "std" not in miou.metric_args
        else:
            assert miou.metric_args["std"] == pytest.approx(statistics.stdev(scores), abs=1e-6)
            assert miou.metric_name == f"mIoU (mean of 3 seeds, std {statistics.stdev(scores):.4f})"


def test_a_card_with_it_is_a_card(table):
    text = to_model_index(table, {"kd": "Hinton et al., 2015"})
    card = ModelCard(f"---\nlicense: apache-2.0\n{text}---\n\n# A student\n")
    assert {result.metric_value for result in card.data.eval_results} > {0.6}
    assert "# kd: Hinton et al., 2015\n- name: resnet18_fpn, kd, vit_small_patch16_dinov3.lvd1689m (" in text
    assert "source" not in text


def test_warnings_stand_above_the_entry_whatever_is_in_them(make_record):
    teacher = {**make_record()["teacher"], "weights": "random", "name": "vit: {a}\n- b"}
    text = to_model_index(summarise([make_record("kd", 0, teacher=teacher)]), {"kd": "one\nline"})
    (name,) = entries(text)
    assert "vit: {a}" in name
    assert "# ! The teacher's weights are RANDOM" in text
    assert "# kd: one line\n" in text


def test_a_baseline_beside_two_teachers_is_one_model(make_record):
    other = {**make_record()["teacher"], "name": "other"}
    records = [make_record("none", teacher=None), make_record("kd"), make_record("kd", teacher=other)]
    assert len(entries(to_model_index(summarise(records), {}))) == 3


def test_detection(make_record):
    record = make_record(
        "none", task={"name": "detection", "primary_metric": "mAP"}, metrics={"test": {"mAP": 0.25, "AP": {"0": 0.25}}}
    )
    ((result,),) = entries(to_model_index(summarise([record]), {})).values()
    assert (result.task_type, result.metric_type, result.metric_value) == ("object-detection", "mAP", 0.25)


def test_without_results_there_is_none(make_record):
    with pytest.raises(ValueError, match="No run has finished"):
        to_model_index(summarise([make_record(status="failed", error="too bad")]), {})
