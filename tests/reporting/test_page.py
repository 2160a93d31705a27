# SPDX-License-Identifier: Apache-2.0
"""The report as a person uses it, in a headless Chromium: sorting, filtering, opening a row; nothing may complain."""

import shutil
import struct
import zlib

import pytest

from kdlvfm.reporting.html import Picture, to_html
from kdlvfm.reporting.tables import summarise

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ATTACK = "</script><img src=x onerror=alert(1)>"
GAINS = {"kd": 0.10, "cwd": 0.20, "fitnet": -0.05, "at": 0.0}
CLASSES = ["background", ATTACK]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser test")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox does not start for root, who runs the tests in many containers.
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


def png():
    """A picture of one white pixel."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0\xff\xff\xff")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture
def records(make_record):
    """Segmentation with everything there can be, and detection with one seed, neither teacher nor curve."""
    found = []
    for seed in range(3):
        base = 0.40 + 0.01 * seed
        for name, gain in {"none": 0.0, **GAINS}.items():
            score = base + gain + 0.004 * ((seed * 7 + len(name)) % 3 - 1)
            by_class = {CLASSES[0]: score, CLASSES[1]: None if seed == 0 else score / 2}
            made = make_record(name, seed, score, teacher=None) if name == "none" else make_record(name, seed, score)
            made["data"] = {**made["data"], "name": f"Data {ATTACK}", "classes": CLASSES}
            made["metrics"] = {"test": {"miou": score, "iou": by_class}}
            made["curve"] = [{"step": step, "metrics": {"miou": score * step / 100}} for step in (25, 50, 100)]
            if name != "none":
                term = {"value": 1.0, "grad_norm": 0.5, "cosine": 0.1 * seed}
                task = {"value": 1.0, "grad_norm": 2.0, "cosine": None}
                looks = [
                    {
                        "step": step,
                        "terms": {"student/task": task, f"student/{name}": term},
                        "cka": {"map.-1~map.-1": 0.5},
                    }
                    for step in (1, 100)
                ]
                made["diagnostics"] = {"points": looks}
            found.append(made)
    found.append(make_record("vkd", 0, status="failed", error=f"OutOfMemoryError {ATTACK}"))
    found[-1]["data"] = found[0]["data"]
    for name in ("none", "fgd"):
        made = make_record(name, 0, 0.2, teacher=None, config={"student": {"name": "resnet18_fcos"}}, curve=[])
        made["task"] = {"name": "detection", "primary_metric": "mAP"}
        made["metrics"] = {"test": {"mAP": 0.21, "AP50": 0.4, "AP": {"background": 0.21, "0": None}}}
        found.append(made)
    return found


@pytest.fixture
def visit(browser):
    """Opens a file and fails the test for anything the browser complains about."""
    complaints, pages = [], []

    def start(path, **options):
        page = browser.new_page(**options)
        page.set_default_timeout(300_000)  # a machine under load is no failure
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield start
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture
def open_page(visit, records, tmp_path):
    """Opens the report of the records."""
    files = {tmp_path / record["config_hash"] / "record.json": record for record in records}
    table = summarise(record for record in records if record["task"]["name"] == "segmentation")
    other = summarise(record for record in records if record["task"]["name"] == "detection")
    table = type(table)((*table.blocks, *other.blocks))
    pictures = [Picture(png(), "one scene"), Picture(None, "Boxes are not drawn.")]
    path = tmp_path / "report.html"
    path.write_text(to_html(table, files, tmp_path, pictures=pictures, problems=[ATTACK]), encoding="utf-8")
    return lambda **options: visit(path, **options)


def shown(page):
    """Names of the visible rows of the first comparison."""
    return page.locator("#comparison-0 tr.row:visible > th").all_inner_texts()


def test_rows_sort_by_any_column_and_references_stay_on_top(open_page):
    page = open_page()
    assert shown(page) == ["teacher", "baseline", "at", "cwd", "fitnet", "kd", "vkd"]
    score = page.locator("#comparison-0 thead th", has_text="mIoU")
    score.get_by_role("button").click()
    assert score.get_attribute("aria-sort") == "descending"
    assert shown(page) == ["teacher", "baseline", "cwd", "kd", "at", "fitnet", "vkd"]
    score.get_by_role("button").click()
    assert score.get_attribute("aria-sort") == "ascending"
    assert shown(page) == ["teacher", "baseline", "fitnet", "at", "kd", "cwd", "vkd"]  # vkd has no score: always last
    page.locator("#comparison-0 thead th", has_text="method").get_by_role("button").click()
    assert score.get_attribute("aria-sort") == "none"
    assert shown(page)[2:] == sorted([*GAINS, "vkd"])


def test_filter_narrows_table_and_figures(open_page):
    page = open_page()
    assert page.locator("#tools output").inner_text() == "6 of 6 methods"
    page.get_by_label("Filter").fill("DINOV3 d")
    page.get_by_label("Verdict").select_option("better")
    assert shown(page) == ["teacher", "baseline", "cwd", "kd"]
    assert page.locator("#tools output").inner_text() == "2 of 6 methods"
    assert page.locator("#comparison-0 .bar .name").all_text_contents() == ["cwd", "kd"]
    assert page.locator("#comparison-0 .heat tbody th").all_inner_texts() == ["baseline", "cwd", "kd"]
    page.get_by_label("Filter").fill("no such method")
    assert shown(page) == ["teacher", "baseline"]
    page.get_by_label("Filter").fill("")
    page.get_by_label("Verdict").select_option("")
    assert len(shown(page)) == 7


@pytest.mark.parametrize("key", ["click", "Enter", "Space"])
def test_a_row_opens_its_runs(open_page, records, key):
    page = open_page()
    button = page.locator("#comparison-0").locator("tr.row").get_by_role("button", name="kd", exact=True)
    button.click() if key == "click" else button.press(key)
    assert button.get_attribute("aria-expanded") == "true"
    runs = page.locator("#comparison-0 tr.runs:visible")
    assert runs.locator("details.run > summary").count() == 3
    first = runs.locator("details.run").first
    for text in ("kdlvfm train", "0" * 40, "torch 2.12.0", "record.json", "no log file", "cosine to the task"):
        assert text in first.inner_text()
    first.locator("summary", has_text="configuration").click()
    assert '"distiller": {' in first.inner_text()
    button.click() if key == "click" else button.press(key)
    assert runs.count() == 0


def test_what_failed_and_what_the_teacher_is(open_page):
    page = open_page()
    page.locator("#comparison-0 tr.row", has_text="vkd").locator("td").first.click()
    assert ATTACK in page.locator("tr.runs:visible .error").inner_text()
    page.locator("#comparison-0 tr.row.teacher").click()
    assert "dinov3-license" in page.locator("tr.runs:visible").first.inner_text()


def test_figures(open_page):
    page = open_page()
    first, second = page.locator("#comparison-0"), page.locator("#comparison-1")
    titles = ["Share of the gap closed", "mIoU against cost", "Learning curves", "What the terms do"]
    assert first.locator("figure h3").all_inner_texts() == [*titles, "By class, against the baseline", "Predictions"]
    assert first.locator(".bar rect").count() == len(GAINS)
    assert first.locator(".bar .none").text_content() == "no finished run"
    assert first.locator("img").evaluate("image => image.naturalWidth") == 1
    curves = first.locator("figure", has_text="Learning curves")
    assert curves.locator(".series").count() == 2 + len(GAINS)  # the failed run had come as far as a point
    curves.get_by_role("button", name="kd", exact=True).click()
    assert curves.locator(".series").count() == 1 + len(GAINS)
    for select in first.locator("figure select").all():
        for option in select.locator("option").all():
            select.select_option(option.get_attribute("value"))
    assert second.locator("figure h3").all_inner_texts()[0] == "Difference to the baseline"
    absent = second.locator("ul.remarks").last.inner_text()
    assert "No learning curves" in absent
    assert "Boxes are not drawn." in absent
    assert second.locator(".heat thead").inner_text().split() == ["points", "background", "0"]


def heads(page):
    return [text.split("\n")[0] for text in page.locator("#comparison-0 thead").first.locator("th").all_inner_texts()]


def test_columns_of_what_few_studies_have_are_shown_where_there_is_something(open_page, visit, rich_table, tmp_path):
    optional = {"vs equal time", "paper", "latency", "inference"}
    assert not optional & set(heads(open_page()))
    rows = [row for block in rich_table.blocks for row in block.rows]
    files = {tmp_path / record["config_hash"] / "record.json": record for row in rows for record in row.records}
    path = tmp_path / "rich.html"
    path.write_text(to_html(rich_table, files, tmp_path), encoding="utf-8")
    page = visit(path)
    assert optional < set(heads(page))
    assert shown(page) == ["teacher", "baseline", "baseline, equal time to kd", "cwd", "kd"]
    cells = page.locator("#comparison-0 tr.row", has_text="kd").last.locator("td").all_inner_texts()
    assert {"+12.0 [+10.0, +14.0]†", "+7.0", "68.2 [1]", "12.3 / 14.5", "321"} <= set(cells)
    page.locator("#comparison-0 thead th", has_text="vs equal time").get_by_role("button").click()
    assert shown(page)[3:] == ["kd", "cwd"]
    page.locator("#comparison-0 tr.row.equal_time").click()
    runs = page.locator("tr.runs:visible").inner_text()
    assert "12.3 ms for one image, 321 images/s in batches of 32, cpu, threads: 1" in runs


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable_and_fit_a_telephone(open_page, scheme):
    page = open_page(color_scheme=scheme, viewport={"width": 390, "height": 800})
    ink, paper = page.evaluate(
        "['color', 'background-color'].map(name => getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3))"
    )
    assert contrast(ink, paper) > 7
    assert (sum(map(int, paper)) > 600) == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def contrast(one, other):
    """Ratio of luminances as in WCAG 2."""

    def luminance(colour):
        parts = [int(part) / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
