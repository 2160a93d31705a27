# SPDX-License-Identifier: Apache-2.0
import pytest

from kdlvfm.reporting.collect import collect
from kdlvfm.reporting.record import write_record


@pytest.fixture
def save(tmp_path):
    def write(folder, record):
        path = tmp_path / folder / "record.json"
        path.parent.mkdir(parents=True)
        write_record(path, record)
        return path

    return write


def test_records_below_folders_and_files_are_found_once(tmp_path, save, make_record):
    first, second = save("b/kd", make_record("kd")), save("a/none", make_record("none"))
    records, problems = collect([tmp_path, first, tmp_path / "b"])
    assert list(records) == [second, first]
    assert records[first]["name"] == "kd-0"
    assert problems == []
    hashes = {key: record["config_hash"] for key, record in records.items()}
    assert collect([tmp_path]).folders == {hashes[first]: first.parent, hashes[second]: second.parent}


def test_whatever_gives_no_record_is_named(tmp_path, save, make_record):
    good = save("good", make_record())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "record.json").write_text("{")
    (tmp_path / "empty").mkdir()
    records, problems = collect([tmp_path, tmp_path / "empty", tmp_path / "nowhere"])
    assert list(records) == [good]
    assert [problem.removeprefix(str(tmp_path)) for problem in problems[:2]] == [
        "/empty: no record.json below this folder.",
        "/nowhere: does not exist.",
    ]
    assert "broken/record.json: not a JSON file" in problems[2]
    assert len(problems) == 3


def test_of_repeated_configurations_the_finished_one_started_last_stays(tmp_path, save, make_record):
    save("a", make_record(started="2026-01-02T00:00:00+00:00"))
    kept = save("b", make_record(started="2026-01-03T00:00:00+00:00"))
    save("c", make_record(started="2026-01-04T00:00:00+00:00", status="running"))
    records, problems = collect([tmp_path])
    assert list(records) == [kept]
    assert len(problems) == 2
    assert all(problem.endswith(f"repeats the configuration of {kept} and is left out.") for problem in problems)
    assert {problem.split("/record.json")[0][-1] for problem in problems} == {"a", "c"}
