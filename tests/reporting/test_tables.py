# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from kdlvfm.reporting.statistics import about_verdicts
from kdlvfm.reporting.tables import summarise

BASELINE = [0.40, 0.44, 0.42]
GAINS = {"kd": [0.10, 0.11, 0.09], "at": [0.01, -0.01, 0.0], "fitnet": [-0.05, -0.06, -0.05]}


@pytest.fixture
def study(make_record):
    records = [make_record("none", seed, score, teacher=None) for seed, score in enumerate(BASELINE)]
    for name, gains in GAINS.items():
        records += [make_record(name, seed, BASELINE[seed] + gain) for seed, gain in enumerate(gains)]
    return records


def only_block(records, **options):
    (block,) = summarise(records, **options).blocks
    return block


def by_method(block):
    return {row.method: row for row in block.rows}


def test_teacher_baseline_and_methods_with_what_may_be_concluded(study):
    block = only_block(study)
    assert [(row.role, row.method) for row in block.rows] == [
        ("teacher", "teacher"),
        ("baseline", "baseline"),
        ("method", "at"),
        ("method", "fitnet"),
        ("method", "kd"),
    ]
    rows = by_method(block)
    assert rows["teacher"].score.mean == 0.80
    assert rows["teacher"].parameters == 21_600_000
    assert rows["teacher"].difference.mean == pytest.approx(0.38)
    assert rows["baseline"].score.mean == pytest.approx(0.42)
    assert rows["baseline"].score.std == pytest.approx(0.02)
    assert rows["baseline"].difference is None
    assert rows["kd"].difference.mean == pytest.approx(0.10)
    assert rows["kd"].gap_closed == pytest.approx(0.10 / 0.38)
    assert {name: rows[name].difference.verdict for name in GAINS} == {
        "kd": "better",
        "at": "not shown",
        "fitnet": "worse",
    }
    assert (rows["kd"].macs, rows["kd"].images_per_second, rows["kd"].teacher_share) == (345_600_000, 12.0, 0.25)
    assert rows["kd"].runs == {"finished": 3}
    assert (block.warnings, block.notes) == ((), (about_verdicts(3),))
    low, high = rows["kd"].gap_interval
    assert low < rows["kd"].gap_closed < high
    assert [record["seed"] for record in rows["kd"].records] == [0, 1, 2]


def test_verdicts_are_corrected_for_the_number_of_methods(make_record):
    """One method is better at 5 %; among ten without effect the same figures show nothing."""
    gains = [0.020, 0.030, 0.025]
    records = [make_record("none", seed, score, teacher=None) for seed, score in enumerate(BASELINE)]
    records += [make_record("kd", seed, BASELINE[seed] + gain) for seed, gain in enumerate(gains)]
    alone = by_method(only_block(records))["kd"].difference
    assert (alone.verdict, alone.p_value < 0.05) == ("better", True)
    for index in range(10):
        records += [make_record(f"m{index}", seed, BASELINE[seed] + 0.03 * (seed - 1)) for seed in range(3)]
    block = only_block(records)
    among = by_method(block)["kd"].difference
    assert (among.mean, among.interval, among.verdict) == (alone.mean, alone.interval, "not shown")
    assert among.p_value > 0.05 > alone.p_value
    assert block.notes == (about_verdicts(11),)


def test_order_of_records_does_not_matter(study, make_record):
    study += [make_record("kd", seed, 0.3, config={"trainer": {"max_steps": 9}}) for seed in range(2)]
    expected = summarise(study)
    assert len(expected.blocks) == 2
    for seed in range(5):
        random.Random(seed).shuffle(study)
        assert summarise(study) == expected


def test_fewer_than_three_seeds_have_no_verdict(study):
    block = only_block([record for record in study if record["seed"] < 2])
    assert by_method(block)["kd"].difference.interval is not None
    assert by_method(block)["kd"].difference.verdict is None
    assert block.notes == ("Fewer than 3 paired seeds: no verdict.",)


def test_runs_that_did_not_finish_are_shown(study, make_record):
    study = [record for record in study if (record["distiller"]["name"], record["seed"]) != ("kd", 2)]
    study += [
        make_record("kd", 2, status="failed", error="OutOfMemoryError: too big\nTraceback"),
        make_record("cwd", 0, status="running"),
        make_record("cwd", 1, status="interrupted"),
    ]
    block = only_block(study)
    rows = by_method(block)
    assert rows["kd"].runs == {"failed": 1, "finished": 2}
    assert rows["kd"].score.count == 2
    assert rows["cwd"].runs == {"interrupted": 1, "running": 1}
    assert (rows["cwd"].score, rows["cwd"].difference, rows["cwd"].images_per_second) == (None, None, None)
    assert block.notes == ("kd, seed 2 failed: OutOfMemoryError: too big", about_verdicts(2))


def test_methods_without_a_baseline_are_named(study, make_record):
    study = [record for record in study if record["distiller"]["name"] != "none"]
    block = only_block(study)
    assert block.warnings == ("No finished baseline (distiller 'none') of this recipe: at, fitnet, kd stand alone.",)
    assert by_method(block)["kd"].difference is None
    failed = make_record("none", 0, teacher=None, status="failed", error="stopped")
    block = only_block([*study, failed])
    assert "No finished baseline" in block.warnings[0]
    assert by_method(block)["baseline"].runs == {"failed": 1}


def test_learning_without_labels_has_no_baseline_to_miss(make_record):
    task = {"name": "representation", "primary_metric": "teacher_r2", "has_loss": False}
    metrics = {"val": {"teacher_r2": 0.4}}
    record = make_record("fitnet", task=task, metrics=metrics)
    record = {**record, "teacher": {**record["teacher"], "metrics": None}}
    (block,) = summarise([record], "val").blocks
    assert block.warnings == ()
    assert not any("upper bound" in note for note in block.notes)


def test_baseline_of_another_recipe_is_no_baseline(make_record):
    records = [make_record("none", teacher=None), make_record("kd", config={"trainer": {"max_steps": 9}})]
    blocks = summarise(records).blocks
    assert [[row.method for row in block.rows] for block in blocks if block.teacher] == [["teacher", "kd"]]
    assert len(blocks) == 2


def test_each_teacher_has_a_block_with_the_shared_baseline(study, make_record):
    (card,) = {id(record["teacher"]): record["teacher"] for record in study if record["teacher"]}.values()
    other = {**card, "name": "clip", "sha256": "1" * 64, "metrics": {"test": {"miou": 0.6}}}
    study += [make_record("kd", seed, 0.5, teacher=other) for seed in range(3)]
    blocks = summarise(study).blocks
    assert [block.teacher["name"] for block in blocks] == ["clip", card["name"]]
    assert [row.method for row in blocks[0].rows] == ["teacher", "baseline", "kd"]
    assert by_method(blocks[0])["baseline"] == by_method(blocks[1])["baseline"]
    assert by_method(blocks[0])["kd"].gap_closed == pytest.approx(0.08 / 0.18)


def test_random_teacher_of_any_seed_is_one_teacher_and_said_loudly(make_record):
    card = make_record()["teacher"] | {"weights": "random", "metrics": None}
    records = [make_record("none", seed, 0.4, teacher=None) for seed in range(2)]
    records += [make_record("kd", seed, 0.4, teacher=card | {"sha256": f"{seed}" * 64}) for seed in range(2)]
    block = only_block(records)
    assert "RANDOM" in block.warnings[0]
    assert by_method(block)["kd"].score.count == 2
    assert by_method(block)["teacher"].score is None
    assert "The teacher's own score on test is unknown: no upper bound, and no share of the gap." in block.notes


def test_teacher_no_better_than_the_baseline_has_no_gap(make_record):
    records = [make_record("none", 0, 0.85, teacher=None), make_record("kd", 0, 0.9)]
    block = only_block(records)
    assert by_method(block)["kd"].gap_closed is None
    assert block.warnings == ("The teacher is no better than the baseline: there is no gap to close.",)


def test_variants_of_a_distiller_are_told_apart_by_what_differs(make_record):
    records = [
        make_record("kd", seed, settings={"temperature": temperature, "loss_weight": 1.0})
        for seed in range(2)
        for temperature in (4.0, 2.0)
    ]
    assert [row.method for row in only_block(records).rows] == ["teacher", "kd temperature=2.0", "kd temperature=4.0"]
    assert [row.runs for row in only_block(records).rows[1:]] == [{"finished": 2}, {"finished": 2}]


def test_features_that_were_stored_otherwise_are_another_variant(make_record):
    """Less exact features are another teacher; exact ones, whether stored or not, are the teacher."""
    records = [
        make_record("kd", seed, config={"teacher_cache": {"mode": mode, "dtype": dtype, "pca": pca, "views": None}})
        for seed in range(2)
        for mode, dtype, pca in (
            ("none", "fp16", None),
            ("build", "fp32", None),
            ("build", "fp16", None),
            ("read", "int8", 64),
        )
    ]
    block = only_block(records)
    assert [row.method for row in block.rows[1:]] == [
        "kd",
        'kd teacher_cache.dtype="fp16"',
        'kd teacher_cache.dtype="int8" teacher_cache.pca=64',
    ]
    assert block.notes[0] == "kd: several runs of seed 0, 1; the finished one started last is shown."
    alike = [record for record in records if record["config"]["teacher_cache"]["dtype"] == "int8"]
    assert [row.method for row in only_block(alike).rows[1:]] == ["kd"]


def test_variants_of_a_composite_are_told_apart_as_one_sets_them(make_record):
    records = [
        make_record("kd+cwd", settings={"parts": {"kd": {"method": "KD"}, "cwd": {"method": "CWD", **own}}, **weights})
        for own, weights in (({}, {}), ({"loss_weight": 5}, {}), ({}, {"weights": {"kd": {"share": 0.1}}}))
    ]
    assert [row.method for row in only_block(records).rows[1:]] == [
        "kd+cwd",
        "kd+cwd parts.cwd.loss_weight=5",
        "kd+cwd weights.kd.share=0.1",
    ]


def test_seeds_on_other_data_are_not_paired(study):
    (kd,) = [record for record in study if (record["distiller"]["name"], record["seed"]) == ("kd", 1)]
    kd["data"] = {**kd["data"], "split_hash": "other"}
    block = only_block(study)
    assert by_method(block)["kd"].difference.count == 2
    assert by_method(block)["kd"].score.count == 3
    assert block.warnings == ("kd: some seeds saw other data than the baseline's and are not paired.",)
    assert block.notes == ("kd: the baseline shares 2 of 3 seeds; differences are over those.", about_verdicts(2))


def test_repeated_seed_is_noted_and_the_finished_run_started_last_counts(make_record):
    records = [
        make_record("none", 0, 0.1, teacher=None, started="2026-01-01T00:00:00+00:00"),
        make_record("none", 0, 0.2, teacher=None, started="2026-01-02T00:00:00+00:00"),
        make_record("none", 0, teacher=None, started="2026-01-03T00:00:00+00:00", status="running"),
    ]
    block = only_block(records)
    assert by_method(block)["baseline"].score.mean == 0.2
    assert block.teacher is None
    assert block.notes == ("baseline: several runs of seed 0; the finished one started last is shown.",)


def test_different_machines_are_noted(study):
    study[0]["hardware"] = {**study[0]["hardware"], "threads": 8}
    notes = only_block(study).notes
    assert notes == ("The runs come from different machines: their images/s do not compare.", about_verdicts(3))


def test_split_and_metric_can_be_chosen_and_unknown_ones_are_refused(make_record):
    record = make_record(metrics={"val": {"miou": 0.3, "pixel_accuracy": 0.9, "iou": {"0": 0.3}}})
    block = only_block([record], split="val", metric="pixel_accuracy")
    assert (block.metric, block.split, block.rows[1].score.mean) == ("pixel_accuracy", "val", 0.9)
    for options in ({"split": "test"}, {"split": "val", "metric": "iou"}, {"split": "val", "metric": "mIoU"}):
        with pytest.raises(ValueError, match="there is val/miou, val/pixel_accuracy"):
            summarise([record], **options)


def test_finished_run_without_the_metric_is_named(make_record):
    records = [make_record("none", teacher=None), make_record("kd", metrics={"val": {"miou": 0.4}})]
    assert "kd, seed 0: finished without this metric on test." in only_block(records).warnings


def test_nothing_makes_an_empty_table():
    assert summarise([]).blocks == ()


def test_times_of_inference_are_means_over_the_runs_that_have_them(study):
    measured = {"latency_p50": 0.01, "latency_p95": None, "images_per_second": 200.0}
    kd = [record for record in study if record["distiller"]["name"] == "kd"]
    kd[0]["inference"], kd[1]["inference"] = measured, {**measured, "latency_p50": 0.02}
    kd[2]["inference"] = None
    row = by_method(only_block(study))["kd"]
    found = (row.latency_p50, row.latency_p95, row.inference_images_per_second)
    assert found == (pytest.approx(0.015), None, 200.0)
    assert by_method(only_block(study))["at"].latency_p50 is None
    kd[0]["inference"] = {
        **measured,
        "latency_p95": 0.012,
    }  # the other has no tail: a mean of one would stand beside two
    assert by_method(only_block(study))["kd"].latency_p95 is None
    kd[1]["inference"] = {**measured, "latency_p95": 0.014}
    assert by_method(only_block(study))["kd"].latency_p95 == pytest.approx(0.013)


def test_a_baseline_of_another_recipe_is_named_with_what_differs(make_record):
    other = {"trainer": {"devices": 1, "max_steps": 60, "precision": 16}}
    records = [make_record("kd", seed) for seed in range(3)]
    records += [make_record("none", seed, config=other) for seed in range(3)]
    _, block = sorted(summarise(records).blocks, key=lambda block: len(block.warnings))
    (warning,) = block.warnings
    assert warning.endswith(
        "kd stand alone. There is one of another recipe (trainer.max_steps: 100 != 60; trainer.precision: (absent) "
        "!= 16)."
    )


def test_the_heading_counts_labels_where_some_images_have_none(study):
    assert only_block(study).source == "digit_scenes"
    for record in study:
        record["data"]["counts"] |= {"train": 367, "labelled": 46, "unlabelled": 321}
    assert only_block(study).source == "digit_scenes, 46 labelled and 321 unlabelled images"
