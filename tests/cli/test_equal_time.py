# SPDX-License-Identifier: Apache-2.0
"""The second baseline: as many more steps as the time of a method's distillation pays for."""

import json
import shutil

import pytest

from kdlvfm.cli import main
from kdlvfm.cli.config import compose


def edit(run, **parts):
    """Change fields of a run's record."""
    path = run / "record.json"
    record = json.loads(path.read_text())
    for part, values in parts.items():
        record[part] = {**record.get(part, {}), **values} if isinstance(values, dict) else values
    path.write_text(json.dumps(record))
    return record


@pytest.fixture(scope="module")
def trained(tmp_path_factory, head, small):
    """A baseline, and kd from the head, each of six steps; kd takes one and a half times as long."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = ("teacher=from_run", f"teacher.run={head}")
    for name, speed in (("none", 30.0), ("kd", 20.0)):
        with pytest.raises(SystemExit) as ended:
            main(["train", *small, *teacher, f"distiller={name}", f"out={folder / f'{name}-seed0'}"])
        assert not ended.value.code
        edit(folder / f"{name}-seed0", cost={"images_per_second": speed})
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture
def record_of():
    return lambda run: json.loads((run / "record.json").read_text())


def test_it_trains_as_much_longer_as_a_step_of_the_method_takes(train, kdlvfm, runs, record_of):
    out = runs / "longer"
    ended = train("distiller=none", f"equal_time={runs / 'kd-seed0'}", f"out={out}")
    assert ended.code == 0, ended.err
    assert "steps      9 instead of 6: a step of kd took 1.50 times as long as one of the baseline" in ended.out
    record, method, baseline = (record_of(run) for run in (out, runs / "kd-seed0", runs / "none-seed0"))
    assert (record["steps"], record["selected_step"], record["status"]) == (9, 9, "finished")
    assert record["recipe_hash"] == baseline["recipe_hash"] == method["recipe_hash"]
    assert record["config_hash"] != baseline["config_hash"]
    assert record["config"]["equal_time"] == {
        "run": str(runs / "kd-seed0"),
        "method": "kd",
        "method_hash": method["config_hash"],
        "baseline_hash": baseline["config_hash"],
        "recipe_hash": method["recipe_hash"],
        "recipe_steps": 6,
        "factor": 1.5,
        "steps": 9,
    }
    assert "nothing to do" in train("distiller=none", f"equal_time={runs / 'kd-seed0'}", f"out={out}").out
    table = kdlvfm("table", runs).out
    assert "baseline, equal time to kd" in table
    assert "(kd 9 steps); no verdict" in table
    assert kdlvfm("evaluate", out).code == 0


def cached(seconds, computed, images=12, digest="a" * 12):
    facts = {"hash": digest, "folder": "caches/one", "dtype": "fp16", "views": 1, "bytes_per_image": 100}
    return {**facts, "images": images, "computed": computed, "seconds": seconds}


def test_computing_the_teachers_features_counts_whichever_run_did_it(runs, small):
    """The baseline's step takes 4 images / 30 a second; kd's 4 / 20 and a sixth of twelve images of 0.1 seconds."""
    batch = edit(runs / "kd-seed0", teacher_cache=cached(0.0, 0))["batch_size"]
    shutil.copytree(runs / "kd-seed0", runs / "other")
    edit(runs / "other", teacher_cache=cached(3.0, 30))
    shutil.copytree(runs / "kd-seed0", runs / "another-cache")
    edit(runs / "another-cache", teacher_cache=cached(500.0, 1, digest="b" * 12))
    found = compose([*small, f"equal_time={runs / 'kd-seed0'}"])["equal_time"]
    assert found["factor"] == pytest.approx((batch / 20 + 12 * 0.1 / 6) / (batch / 30))


def test_features_of_which_nobody_knows_how_long_they_took(runs, refused):
    edit(runs / "kd-seed0", teacher_cache=cached(0.0, 0))
    message = refused("distiller=none", f"equal_time={runs / 'kd-seed0'}")
    assert "features were stored by no run that lies beside" in message
    assert "or name one with teacher_cache=none" in message


def test_its_folder_says_what_it_is(runs, small):
    from kdlvfm.cli.run_folder import run_folder

    config = compose([*small, f"equal_time={runs / 'kd-seed0'}", "seed=4"])
    assert run_folder(config).name.startswith("none-as-long-as-kd-none-seed4-")
    assert config["recipe"]["steps"] == config["data"]["steps"] == 9


def test_other_seeds_take_as_many_steps(runs, small):
    assert compose([*small, f"equal_time={runs / 'kd-seed0'}", "seed=1"])["recipe"]["steps"] == 9


def test_the_baseline_of_the_methods_seed_is_preferred(runs, small):
    shutil.copytree(runs / "none-seed0", runs / "none-seed1")
    edit(runs / "none-seed1", seed=1, cost={"images_per_second": 60.0})
    assert compose([*small, f"equal_time={runs / 'kd-seed0'}"])["recipe"]["steps"] == 9
    edit(runs / "none-seed0", seed=2)
    assert compose([*small, f"equal_time={runs / 'kd-seed0'}"])["recipe"]["steps"] == 18


def test_it_is_a_cell_of_a_sweep_for_each_seed(kdlvfm, runs, small, monkeypatch):
    from kdlvfm.cli.sweep import plan

    monkeypatch.chdir(runs)
    sweep, _ = plan([*small, "distiller=none", f"equal_time={runs / 'kd-seed0'}", "seed=0,1"])
    assert len({cell.hash for cell in sweep.cells}) == 2
    assert [compose(cell.overrides)["recipe"]["steps"] for cell in sweep.cells] == [9, 9]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda runs: edit(runs / "kd-seed0", status="running", ended=None), "is running, not finished"),
        (lambda runs: shutil.rmtree(runs / "kd-seed0"), "is not a run: it has no record.json"),
        (lambda runs: shutil.rmtree(runs / "none-seed0"), "has no finished baseline beside it to compare times with"),
        (lambda runs: edit(runs / "none-seed0", hardware={"cpu": "another"}), "has no finished baseline beside it"),
        (lambda runs: edit(runs / "none-seed0", cost={"images_per_second": None}), "has no time for a step"),
        (
            lambda runs: edit(runs / "kd-seed0", cost={"images_per_second": 31.0}),
            "took 0.97 times as long as one of",
        ),
    ],
)
def test_runs_that_say_nothing_about_time(spoil, message, runs, refused):
    spoil(runs)
    assert message in refused("distiller=none", f"equal_time={runs / 'kd-seed0'}")


def test_what_it_is_not_for(runs, refused, vit):
    run = runs / "kd-seed0"
    assert "equal_time= is for the baseline, distiller=none, not for kd" in refused(
        "distiller=kd", *vit, f"equal_time={run}"
    )
    assert "is a baseline itself" in refused("distiller=none", f"equal_time={runs / 'none-seed0'}")
    message = refused("distiller=none", f"equal_time={run}", "recipe.optimizer.lr=0.5")
    assert "has another recipe (recipe.optimizer.lr: 0.5 != " in message
