# SPDX-License-Identifier: Apache-2.0
import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdlvfm.reporting.html import Picture, to_html
from kdlvfm.reporting.record import write_record
from kdlvfm.reporting.tables import summarise

HOSTILE = "</script><script>alert(1)</script><!-- & \" ' \u2028"


class Elements(HTMLParser):
    """Every element's attributes, and the text of styles and scripts, as a browser would split the page."""

    def __init__(self, page):
        super().__init__()
        self.found, self.texts, self.within = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.within = tag in ("script", "style")
        if self.within:
            self.texts.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag):
        self.within = False

    def handle_data(self, data):
        if self.within:
            tag, attributes, text = self.texts[-1]
            self.texts[-1] = (tag, attributes, text + data)


@pytest.fixture
def render(tmp_path):
    """The page of records, which lie in folders below `tmp_path/runs`, and the data embedded in it."""

    def make(records, **options):
        files = {}
        for record in records:
            files[tmp_path / "runs" / record["config_hash"] / "record.json"] = record
        page = to_html(summarise(records), files, tmp_path, **options)
        (data,) = [text for _, attributes, text in Elements(page).texts if attributes.get("id") == "data"]
        return page, json.loads(data)

    return make


@pytest.fixture
def study(make_record):
    records = [make_record("none", seed, 0.40 + 0.01 * seed, teacher=None) for seed in range(3)]
    return records + [make_record("kd", seed, 0.50 + 0.011 * seed) for seed in range(3)]


def test_every_record_is_in_the_page_as_it_is(render, study):
    _, data = render(study)
    assert {key: run["record"] for key, run in data["runs"].items()} == {r["config_hash"]: r for r in study}
    rows = {row["method"]: row for row in data["blocks"][0]["rows"]}
    assert list(rows) == ["teacher", "baseline", "kd"]
    for role in ("baseline", "kd"):
        assert [data["runs"][key]["record"]["seed"] for key in rows[role]["runs"]] == [0, 1, 2]
    assert rows["kd"]["verdict"] == "better"
    assert rows["kd"]["gap_interval"][0] < rows["kd"]["gap"] < rows["kd"]["gap_interval"][1]


def test_classes_compare_with_the_baseline_over_the_seeds_of_both(render, make_record):
    def record(distiller, seed, cat, dog):
        metrics = {"test": {"mAP": 0.3, "AP": {"cat": cat, "dog": dog}}}
        made = make_record(distiller, seed, teacher=teacher if distiller == "fgd" else None, metrics=metrics)
        made["data"] = {**made["data"], "classes": ["cat", "dog"]}
        return made | {"task": {"name": "detection", "primary_metric": "mAP"}}

    teacher = make_record()["teacher"] | {"metrics": {"test": {"mAP": 0.5, "AP": {"cat": 0.7, "dog": None}}}}
    runs = [
        ("none", 0, 0.2, 0.3),
        ("none", 1, 0.4, None),
        ("fgd", 0, 0.3, 0.5),
        ("fgd", 1, 0.6, 0.9),
        ("fgd", 2, 0.9, 0.1),
    ]
    _, data = render([record(*run) for run in runs])
    block = data["blocks"][0]
    assert (block["metric"], block["class_metric"], block["classes"]) == ("mAP", "AP", ["cat", "dog"])
    cells = {row["method"]: row["by_class"] for row in block["rows"]}
    assert cells["baseline"]["cat"] == {"value": pytest.approx(0.3), "difference": None}
    assert cells["fgd"]["cat"] == {"value": pytest.approx(0.6), "difference": pytest.approx(0.15)}
    assert cells["fgd"]["dog"] == {"value": pytest.approx(0.5), "difference": pytest.approx(0.2)}
    assert cells["teacher"]["cat"] == {"value": pytest.approx(0.7), "difference": pytest.approx(0.4)}
    assert cells["teacher"]["dog"] == {"value": None, "difference": None}


def test_rows_have_what_the_further_columns_show(rich_table, tmp_path):
    page = to_html(rich_table, {}, tmp_path)
    (block,) = json.loads(re.search(r'application/json">(.*?)</script>', page)[1])["blocks"]
    rows = {row["method"]: row for row in block["rows"]}
    assert (rows["kd"]["over"], rows["kd"]["interval"]) == ("images", [0.1, 0.14])
    assert rows["kd"]["longer"]["mean"] == pytest.approx(0.07)
    assert rows["kd"]["published"] == {"value": 0.6821, "source": 1}
    assert (rows["kd"]["latency_p50"], rows["kd"]["inference_images_per_second"]) == (0.0123, 321.0)
    assert (rows["cwd"]["longer"], rows["cwd"]["published"], rows["cwd"]["latency_p50"]) == (None, None, None)
    assert rows["baseline, equal time to kd"]["role"] == "equal_time"
    assert [row["index"] for row in block["rows"]] == [0, 0, 0, 1, 2]
    assert any(note.startswith("Inference: the student alone on cpu") for note in block["notes"])


def test_records_without_results_by_class_say_so_by_null(render, make_record):
    records = [make_record(name, metrics={"test": {"miou": 0.5}}) for name in ("none", "kd")]
    _, data = render(records)
    assert [row["by_class"] for row in data["blocks"][0]["rows"]] == [None, None, None]
    assert data["blocks"][0]["class_metric"] is None


def test_nothing_in_a_record_ends_its_element(render, make_record):
    records = [make_record("none", teacher=None), make_record("kd", command=["kdlvfm", HOSTILE], error=None)]
    for record in records:
        record["data"] = {**record["data"], "name": HOSTILE, "classes": ["background", "0"]}
    records.append(make_record(HOSTILE, status="failed", error=HOSTILE))
    page, data = render(records, title=HOSTILE, problems=[HOSTILE])
    elements = Elements(page)
    assert [attributes for tag, attributes in elements.found if tag == "script"] == [
        {"id": "data", "type": "application/json"},
        {},
    ]
    assert page.count("<!--") == 0
    assert records[1]["command"] == data["runs"][records[1]["config_hash"]]["record"]["command"]


def test_the_page_allows_its_own_script_and_style_and_nothing_else(render, study):
    page, _ = render(study)
    elements = Elements(page)
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not [a for _, a in elements.found if "src" in a or "href" in a or any(name.startswith("on") for name in a)]
    assert not re.search(r"@import|url\(|innerHTML|insertAdjacentHTML|eval\(|fetch\(|document\.write", page)


def test_links_lead_to_the_record_and_its_logs(make_record, tmp_path):
    record = make_record("kd")
    run = tmp_path / "runs" / "a b:c#d" / "kd"
    (run / "log/version_0").mkdir(parents=True)
    write_record(run / "record.json", record)
    sweep = tmp_path / "runs/sweeps/0123"
    sweep.mkdir(parents=True)
    files = [run / "log/version_0/metrics.csv", run.with_name("kd.log"), sweep / f"{record['config_hash']}.log"]
    for file in files:
        file.write_text("x")
    page = to_html(summarise([record]), {run / "record.json": record}, tmp_path / "paper")
    found = json.loads(re.search(r'application/json">(.*?)</script>', page)[1])["runs"][record["config_hash"]]
    assert found["file"]["href"] == "./../runs/a%20b%3Ac%23d/kd/record.json"
    assert [(tmp_path / "paper" / link["name"]).resolve() for link in found["logs"]] == files


def test_pictures_are_embedded_and_one_for_each_block(render, study):
    _, data = render(study, pictures=[Picture(b"\x89PNG", "scenes")])
    block = data["blocks"][0]
    assert (block["picture"], block["picture_note"]) == ("data:image/png;base64,iVBORw==", "scenes")
    with pytest.raises(ValueError, match="2 pictures do not fit 1 block"):
        render(study, pictures=[Picture(None, "")] * 2)


def test_scripts_and_styles_are_of_reasonable_length():
    import kdlvfm.reporting

    parts = [*(Path(kdlvfm.reporting.__file__).parent / "page").iterdir()]
    assert {part.suffix for part in parts} == {".js", ".css"}
    for part in parts:
        lines = part.read_text(encoding="utf-8").splitlines()
        assert "SPDX-License-Identifier: Apache-2.0" in lines[0]
        assert len(lines) < 300
        assert max(map(len, lines)) <= 120
