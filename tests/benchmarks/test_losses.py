# SPDX-License-Identifier: Apache-2.0
"""The plain forms are the losses they are measured beside, and the page shows the committed records."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import kdlvfm.distillers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import losses
import losses_cases
import losses_page
import step

CASES = {case.name: case for case in losses_cases.CASES}
FUNCTIONS = [name for name in kdlvfm.distillers.__all__ if name.endswith("_loss")]


def doubled(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_plain_form(name):
    torch.manual_seed(0)
    student, *rest = (doubled(value) for value in CASES[name].inputs(losses_cases.Shape(3, 16, 32)))
    student.requires_grad_()
    found = [form(student, *rest) for form in (CASES[name].ours, CASES[name].plain)]
    # 1e-6 and 1e-5: constants that papers add to a deviation.
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-12)
    gradients = [torch.autograd.grad(value, student)[0] for value in found]
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_every_loss_function_is_measured():
    names = {function.removesuffix("_loss").replace("sp", "similarity_preserving") for function in FUNCTIONS}
    assert names <= CASES.keys()


def test_a_batch_is_halved_until_the_plain_form_fits():
    shape = losses_cases.Shape(8, 64, 256)
    of_image, of_batch = (losses.fitting(CASES[name], shape, 2**31) for name in ("pairwise", "cirkd_pixel"))
    assert 1 <= of_batch < of_image < 8
    assert losses.fitting(CASES["kd"], shape, 2**33) == 8
    assert losses.fitting(CASES["pairwise"], shape, 1) == 1


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.rand(1000, 250)
    assert losses.peak_bytes(lambda: (x + 1).exp_(), "cpu") == pytest.approx(10**6, abs=100)
    assert losses.peak_bytes(lambda: (x + 1).exp().sum(), "cpu") == pytest.approx(2 * 10**6, abs=100)


def test_a_record_keeps_what_is_not_measured_again():
    chosen = Namespace(only="kd,fitnet", size=[8], channels=[16], batch=2, device="cpu", memory=1.0, seconds=0.01)
    first = losses.measure_all(chosen, None)
    assert [entry["loss"] for entry in first["cases"]] == ["kd", "fitnet"]
    assert all(entry["faster"] > 0 and entry["smaller"] > 0 for entry in first["cases"])
    chosen.only = "kd"
    second = losses.measure_all(chosen, first)
    assert second["cases"][1] == first["cases"][1]
    title, _, line, *_ = losses_page.table(second)
    assert title.startswith("| loss | channels | 8x8: batch | ours | MiB | times faster |")
    assert line.startswith("| `kd` | – | 2 | ")
    assert f" | **{second['cases'][0]['faster']:.2f}** | " in line
    other = {**second["cases"][1], "size": 16, "faster": 1.25}
    (row,) = [
        x for x in losses_page.table({**second, "cases": [*second["cases"], other]}) if x.startswith("| `fitnet`")
    ]
    assert row.count("|") == 13
    assert row.endswith(f"**1.25** | **{other['smaller']:.1f}** |")
    chosen.only = "kdd"
    with pytest.raises(SystemExit, match="no loss kdd; there are kd, "):
        losses.measure_all(chosen, second)


def test_trainer_and_loop_do_the_same_arithmetic():
    found = step.measured("test_resnet", "test_vit", 32, batch=2, steps=6)
    assert found["pairs"] == 4
    assert found["ratio"] > 0


def test_the_page_is_rendered_from_the_records():
    again = "run: python benchmarks/losses.py --table; python benchmarks/step.py --table"
    text = losses_page.PAGE.read_text(encoding="utf-8")
    assert text == losses_page.page(), again
    assert text == step.page(json.loads(step.RECORD.read_text(encoding="utf-8"))), again
