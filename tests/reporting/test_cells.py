# SPDX-License-Identifier: Apache-2.0
"""The second baseline in a table: a row of its own, and a difference for the method that it is matched to."""

import pytest

from kdlvfm.reporting.tables import summarise

BASELINE = [0.40, 0.44, 0.42]
GAINS = {"kd": [0.10, 0.11, 0.09], "at": [0.01, -0.01, 0.0]}


@pytest.fixture
def study(make_record):
    records = [make_record("none", seed, score, teacher=None) for seed, score in enumerate(BASELINE)]
    for name, gains in GAINS.items():
        records += [make_record(name, seed, BASELINE[seed] + gain) for seed, gain in enumerate(gains)]
    return records


@pytest.fixture
def longer(make_record):
    """The baseline that trains as long as a run, in its recipe."""

    def make(method, seed, score, steps=130):
        matched = {
            "run": "runs/x",
            "method": method["distiller"]["name"],
            "method_hash": method["config_hash"],
            "recipe_hash": method["recipe_hash"],
            "recipe_steps": 100,
            "steps": steps,
        }
        config = {"equal_time": matched, "trainer": {"devices": 1, "max_steps": steps}}
        return make_record("none", seed, score, teacher=None, config=config, steps=steps)

    return make


def test_the_baseline_of_equal_time_has_a_row_and_methods_a_difference_to_it(study, longer, rows_of):
    kd = next(record for record in study if record["distiller"]["name"] == "kd")
    gains = [0.06, 0.07, 0.065]
    block, rows = rows_of([*study, *(longer(kd, seed, BASELINE[seed] + gain) for seed, gain in enumerate(gains))])
    _, plain = rows_of(study)
    assert [row.role for row in block.rows] == ["teacher", "baseline", "equal_time", "method", "method"]
    row = rows["baseline, equal time to kd"]
    assert row.score.mean == pytest.approx(0.42 + 0.065)
    assert row.difference.mean == pytest.approx(0.065)
    assert (row.difference.verdict, row.difference.p_value) == (None, None)
    assert rows["kd"].to_equal_time.mean == pytest.approx(0.10 - 0.065)
    assert rows["kd"].to_equal_time.verdict is None
    assert rows["at"].to_equal_time is None
    for name in ("baseline", "at"):
        assert rows[name] == plain[name]
    assert rows["kd"].difference == plain["kd"].difference
    assert rows["kd"].gap_closed == plain["kd"].gap_closed
    assert block.notes == (
        "Verdicts: paired t-tests at 5 %, corrected for 2 methods (Holm); intervals are not corrected.",
        "vs baseline, gap and verdict: against the baseline of the same 100 steps. vs equal time: against the baseline "
        "that trained as long as the method (kd 130 steps); no verdict.",
    )


def test_the_baseline_of_equal_time_is_in_the_block_of_its_methods_teacher(study, make_record, longer):
    other = {**make_record()["teacher"], "name": "clip", "sha256": "1" * 64}
    study += [make_record("kd", seed, 0.5, teacher=other) for seed in range(3)]
    study.append(longer(study[-1], 2, 0.44, steps=120))
    roles = {block.teacher["name"]: [row.role for row in block.rows] for block in summarise(study).blocks}
    assert roles.pop("clip") == ["teacher", "baseline", "equal_time", "method"]
    assert "equal_time" not in next(iter(roles.values()))


def test_the_baseline_of_equal_time_to_a_run_elsewhere_goes_by_its_methods_name(study, make_record, longer, rows_of):
    elsewhere = make_record("dist", settings={"beta": 2})
    _, rows = rows_of([*study, longer(elsewhere, 0, 0.5)])
    assert rows["baseline, equal time to dist"].score.mean == 0.5


def test_each_variant_has_a_baseline_of_equal_time_of_its_own(make_record, longer, rows_of):
    variants = [make_record("kd", settings={"temperature": value}) for value in (2.0, 4.0)]
    records = [make_record("none", teacher=None), *variants, longer(variants[1], 0, 0.55)]
    _, rows = rows_of(records)
    assert rows["kd temperature=4.0"].to_equal_time.mean == pytest.approx(-0.05)
    assert rows["kd temperature=2.0"].to_equal_time is None
    assert "baseline, equal time to kd temperature=4.0" in rows
