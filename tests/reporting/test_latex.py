# SPDX-License-Identifier: Apache-2.0
import re
import shutil
import subprocess

import pytest

from kdlvfm.reporting.block import Table
from kdlvfm.reporting.latex import escape, to_latex
from kdlvfm.reporting.tables import summarise

STUDENTS = ("resnet18_fpn", "mobilenetv2_fpn")
HOSTILE = 'a_b & 50 % of #1 $x$ {y} \\input{z} ~ ^ <c> "d" |'


def runs(make_record, student="resnet18_fpn", methods=("kd", "cwd")):
    records = [make_record("none", seed, 0.4 + 0.01 * seed, teacher=None) for seed in range(3)]
    for index, name in enumerate(methods, start=1):
        records += [make_record(name, seed, 0.4 + 0.01 * seed + 0.1 / index + 0.001 * seed) for seed in range(3)]
    for record in records:
        record["student"] = {**record["student"], "name": student}
    return records


def body(text):
    """Rows of the tabular, as lists of cells."""
    inside = re.search(r"\\begin\{tabular\}\{l(r+)\}\n(.*)\\end\{tabular\}", text, re.DOTALL)
    lines = [line.removesuffix(r" \\") for line in inside[2].splitlines() if line.endswith(r"\\")]
    rows = [re.split(r"(?<!\\) ?& ?", line) for line in lines]
    assert {len(row) for row in rows} == {1 + len(inside[1])}
    return rows


def test_one_block_has_a_column_for_score_difference_and_gap(make_record):
    rows = {row[0]: row[1:] for row in body(to_latex(summarise(runs(make_record))))}
    assert list(rows)[-4:] == ["teacher", "baseline", "cwd", "kd"]
    assert rows["teacher"] == ["80.0", "$+39.0$", "--"]
    assert rows["baseline"] == [r"41.0 $\pm$ 1.0", "--", "--"]
    assert rows["kd"][0] == r"\textbf{51.1} $\pm$ 1.1"
    assert rows["kd"][1] == r"$+10.1$ [$+9.9$, $+10.3$]$^\uparrow$"
    assert re.fullmatch(r"\$26\$ \[\$2\d\$, \$2\d\$\]", rows["kd"][2])


def test_several_blocks_are_columns_and_what_is_missing_is_a_dash(make_record):
    records = [*runs(make_record, STUDENTS[0]), *runs(make_record, STUDENTS[1], ("kd",))]
    text = to_latex(summarise(records))
    rows = body(text)
    assert [row[0] for row in rows] == ["", "method", "teacher", "baseline", "cwd", "kd"]
    assert [head.split()[0] for head in rows[0][1:]] == ["(1)", "(2)"]
    assert rows[1][1:] == [r"mIoU, \%", r"mIoU, \%"]
    assert re.findall(r"Column (\d): teacher .*, student (.*) \(", text) == [
        ("1", r"mobilenetv2\_fpn"),
        ("2", r"resnet18\_fpn"),
    ]
    assert rows[4][1:] == ["--", r"46.1 $\pm$ 1.1 ($+5.1$)$^\uparrow$"]
    assert rows[5][1] == r"51.1 $\pm$ 1.1 ($+10.1$)$^\uparrow$"  # the only method of its column is not called the best
    assert "Column 2: Verdicts: paired t-tests" in text


def test_a_second_baseline_and_a_paper_have_columns(rich_table):
    text = to_latex(rich_table)
    rows = {row[0]: row[1:] for row in body(text)}
    assert rows[""] == ["mIoU", "vs baseline", "vs equal time", "gap closed", "paper"]
    assert list(rows)[-5:] == ["teacher", "baseline", "baseline, equal time to kd", "cwd", "kd"]
    assert rows["kd"][1:3] == [r"$+12.0$ [$+10.0$, $+14.0$]\dag{}", "$+7.0$"]
    assert (rows["kd"][4], rows["cwd"][4]) == ("68.2 [1]", "--")
    assert r"\par\footnotesize \dag{} One seed." in text
    assert text.count(r"\midrule") == 2


def test_costs_have_an_environment_for_each_block(rich_table):
    text = to_latex(Table((*rich_table.blocks, *rich_table.blocks)), cost=True)
    first, second = text.split(r"\end{table}")[:2]
    assert first.strip() == second.strip()
    rows = {row[0]: row[1:] for row in body(first)}
    assert rows["method"][3:5] == ["ms, p50 / p95", "images/s"]
    assert rows["kd"][3:5] == ["12.3 / 14.5", "321"]
    assert rows["cwd"][3] == "--"
    assert to_latex(Table(()), cost=True) == ""


def test_warnings_and_failures_are_printed(make_record):
    card = make_record()["teacher"] | {"weights": "random"}
    failed = make_record("cwd", status="failed", error=HOSTILE, teacher=card)
    text = to_latex(summarise([make_record("none", teacher=None), make_record("kd", teacher=card), failed]))
    assert r"\par\footnotesize \textbf{The teacher's weights are RANDOM" in text
    assert rf"cwd, seed 0 failed: {escape(HOSTILE)}" in text
    assert ["cwd", "--", "--", "--"] in body(text)


def test_nothing_in_a_name_is_a_command(make_record):
    assert re.sub(r"\\text\w+\{\}|\\[&%$#_{}]", "", escape(HOSTILE)) == "ab  50  of 1 x y input" + "z   c d "
    assert r"\input" not in escape(HOSTILE)


def test_detection(make_record):
    records = [make_record(name, teacher=None) for name in ("none", "fgd")]
    for record in records:
        record["task"] = {"name": "detection", "primary_metric": "mAP"}
        record["metrics"] = {"test": {"mAP": 0.25, "AP": {"background": 0.25, "0": None}}}
    assert body(to_latex(summarise(records)))[0][1] == "mAP"


def test_no_blocks():
    assert to_latex(Table(())) == ""


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_it_compiles(make_record, rich_table, tmp_path):
    records = [*runs(make_record, STUDENTS[0]), *runs(make_record, STUDENTS[1], ("kd",))]
    failed = make_record("at", status="failed", error=HOSTILE)
    packages = r"\usepackage[T1]{fontenc}\usepackage{booktabs}"
    tables = {"pair": summarise(records), "one": summarise([*runs(make_record), failed]), "rich": rich_table}
    for name, table in tables.items():
        content = to_latex(table) + to_latex(table, cost=True)
        (tmp_path / f"{name}.tex").write_text(
            rf"\documentclass{{article}}{packages}\begin{{document}}{content}\end{{document}}"
        )
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", f"{name}.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
