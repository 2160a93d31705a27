# SPDX-License-Identifier: Apache-2.0
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from kdlvfm.reporting.block import Table
from kdlvfm.reporting.plot import draw_differences
from kdlvfm.reporting.tables import summarise

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


def runs(make_record, scores):
    return [make_record(name, seed, score) for name, values in scores.items() for seed, score in enumerate(values)]


@pytest.fixture
def draw(tmp_path):
    """Texts from left to right and down, and the places (x, y) of each kind of marker, of a drawn table."""

    def drawn(table):
        path = tmp_path / "figure.svg"
        with mpl.rc_context({"svg.fonttype": "none"}):
            assert draw_differences(table, [path])
        root = ElementTree.parse(path).getroot()
        texts = [element.text for element in root.iter(f"{SVG}text")]
        markers = {}
        for mark in root.iter(f"{SVG}use"):
            markers.setdefault(mark.get(LINK), []).append((float(mark.get("x")), float(mark.get("y"))))
        return texts, markers

    return drawn


def test_methods_stand_by_rank_and_markers_where_their_numbers_are(make_record, draw):
    scores = {
        "none": (0.40, 0.42, 0.41),
        "kd": (0.45, 0.46, 0.47),
        "cwd": (0.50, 0.55, 0.52),
        "at": (0.37, 0.39, 0.38),
    }
    texts, markers = draw(summarise(runs(make_record, scores)))
    assert [text for text in texts if text in scores] == ["cwd", "kd", "at"]
    assert {"baseline", "teacher", "better than the baseline", "worse than the baseline"} <= set(texts)
    (dots,) = (places for places in markers.values() if len(places) == 9)
    expected = np.concatenate([np.subtract(scores[name], scores["none"]) for name in ("cwd", "kd", "at")])
    x, y = np.array(dots).T
    slope, offset = np.polyfit(expected, x, 1)
    np.testing.assert_allclose(x, slope * expected + offset, atol=0.01)
    assert slope > 0
    assert (np.diff(y.reshape(3, 3)[:, 0]) > 0).all()


def test_an_interval_beyond_the_figure_ends_in_an_arrow(make_record, draw):
    near = {"none": (0.40, 0.41), "kd": (0.45, 0.461)}
    wide = {"none": (0.40, 0.41), "kd": (0.45, 0.60)}
    kinds = [len(draw(summarise(runs(make_record, scores)))[1]) for scores in (near, wide)]
    table = summarise(runs(make_record, wide))
    (row,) = (row for row in table.blocks[0].rows if row.role == "method")
    low, high = row.difference.interval
    assert low < -0.5  # of a figure from -0.4 to 0.8, since the teacher is 0.4 above the baseline
    assert high > 0.9
    assert kinds[1] == kinds[0] + 1  # its left arrow and its right one, in place of the one kind of stroke


def test_a_single_seed_has_a_dot_and_no_verdict(make_record, draw):
    texts, _ = draw(summarise(runs(make_record, {"none": (0.4,), "kd": (0.5,)})))
    assert "no verdict" in texts


def test_the_same_table_is_the_same_file(make_record, tmp_path):
    table = summarise(runs(make_record, {"none": (0.40, 0.42), "kd": (0.45, 0.46)}))
    files = [tmp_path / f"{name}.{form}" for name in "ab" for form in ("svg", "pdf")]
    for first, second in (files[:2], files[2:]):
        draw_differences(table, [first, second])
    assert files[0].read_bytes() == files[2].read_bytes()
    assert files[1].read_bytes() == files[3].read_bytes()


def test_each_comparison_has_its_own_lines(rich_table, draw):
    texts, _ = draw(Table((*rich_table.blocks, *rich_table.blocks)))
    assert texts.count("kd") == 2


def test_nothing_to_compare_is_no_file(make_record, tmp_path):
    for table in (Table(()), summarise([make_record("kd")]), summarise([make_record("none")])):
        assert not draw_differences(table, [tmp_path / "figure.svg"])
    assert not list(tmp_path.iterdir())
