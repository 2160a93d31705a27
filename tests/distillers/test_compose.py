# SPDX-License-Identifier: Apache-2.0
"""Compose against sums written by hand: terms, weights over the run, and construction."""

from functools import partial

import pytest
import torch

from kdlvfm.core import Context, Distiller
from kdlvfm.distillers import CIRKD, CWD, KD, Compose, FitNet, Weight
from kdlvfm.distillers.kd import kd_loss


class Toy(Distiller):
    """Pulls a tap towards a number; `log` tells what happens, in order."""

    def __init__(self, goal=0.0, tap="map.-1", log=None):
        super().__init__()
        self.student_taps = (tap,)
        self.goal = goal
        self.log = [] if log is None else log

    def forward(self, student, teacher, target=None):
        return {"pull": (student[self.student_taps[0]] - self.goal).square().mean()}


@pytest.fixture
def fitnet():
    torch.manual_seed(4)
    return FitNet(8, 12)


@pytest.fixture
def step(make_step):
    return make_step(progress=0.25)


def total(terms):
    return torch.stack(list(terms.values())).sum()


def gradients_of(loss, *networks):
    """Gradients by a backward pass, as one vector."""
    parameters = [p for network in networks for p in network.parameters()]
    for p in parameters:
        p.grad = None
    loss.backward(retain_graph=True)
    found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return found


def test_an_update_is_the_sum_written_by_hand(step, student, teacher, fitnet):
    method = Compose({"kd": KD(temperature=2.0), "fitnet": fitnet}, {"kd": 0.5, "fitnet": Weight(3.0)})
    (update,) = method.updates(step)
    features = student(step.images, ["logits", "map.-1"])
    goals = teacher(step.images, ["logits", "map.-1"])
    expected = {
        "cross_entropy": step.task.loss(student, features, step.target)["cross_entropy"],
        "kd/kd": 0.5 * kd_loss(features["logits"], goals["logits"], 2.0, step.target),
        "fitnet/fitnet": 3.0 * fitnet(features, goals)["fitnet"],
    }
    assert list(update.terms) == list(expected)
    assert update.group == "student"
    assert tuple(update.task_terms) == ("cross_entropy",)
    for name, term in expected.items():
        torch.testing.assert_close(update.terms[name], term)
    torch.testing.assert_close(
        gradients_of(total(update.terms), student, method), gradients_of(total(expected), student, fitnet)
    )


def test_forward_gives_weighted_terms_on_plain_tensors():
    student, teacher = {"logits": torch.rand(2, 3, 4, 4)}, {"logits": torch.rand(2, 3, 4, 4)}
    method = Compose({"a": KD(), "b": CWD(), "off": KD()}, {"a": 2.0, "b": {"value": 0.5, "warmup": 0.5}, "off": 0})
    terms = method(student, teacher)
    assert list(terms) == ["a/kd", "b/cwd"]
    torch.testing.assert_close(terms["a/kd"], 2 * KD()(student, teacher)["kd"])
    torch.testing.assert_close(terms["b/cwd"], 0.5 * CWD()(student, teacher)["cwd"])


def test_everything_is_computed_once(step, student, teacher, monkeypatch):
    losses = []
    original = type(step.task).loss
    monkeypatch.setattr(type(step.task), "loss", lambda *args: losses.append(args) or original(*args))
    early = FitNet(4, 7, student_tap="map.0", teacher_tap="map.0")
    method = Compose({"kd": KD(), "deep": FitNet(8, 12), "early": early})
    student.calls.clear()
    teacher.model.calls.clear()
    (update,) = method.updates(step)
    total(update.terms).backward()
    assert student.calls == [("logits", "map.-1", "map.0")]
    assert teacher.model.calls == [("logits", "map.-1", "map.0")]
    assert method.student_taps == ("logits", "map.-1", "map.0")
    assert len(losses) == 1


def test_a_method_may_be_there_twice(step):
    method = Compose({"deep": FitNet(8, 12), "early": FitNet(4, 7, student_tap="map.0", teacher_tap="map.0")})
    (update,) = method.updates(step)
    assert list(update.terms) == ["cross_entropy", "deep/fitnet", "early/fitnet"]


def test_composites_nest(step, fitnet):
    flat = Compose({"kd": KD(), "fitnet": fitnet}, {"kd": 6.0})
    nested = Compose({"inner": Compose({"kd": KD()}, {"kd": 2.0}), "fitnet": fitnet}, {"inner": 3.0})
    (one,), (other,) = flat.updates(step), nested.updates(step)
    step.student.calls.clear()
    list(nested.updates(step))
    assert len(step.student.calls) == 1
    assert list(other.terms) == ["cross_entropy", "inner/kd/kd", "fitnet/fitnet"]
    torch.testing.assert_close(other.terms["inner/kd/kd"], one.terms["kd/kd"])
    torch.testing.assert_close(total(one.terms), total(other.terms))


@pytest.mark.parametrize(("progress", "expected"), [(0.0, None), (0.1, 1.0), (0.2, 2.0), (0.5, 2.0), (0.8, None)])
def test_a_part_rests_while_its_weight_is_zero(progress, expected, make_step, student, teacher):
    method = Compose({"kd": KD(), "toy": Toy()}, {"kd": Weight(2.0, warmup=0.2, stop=0.8)})
    student.calls.clear()
    teacher.model.calls.clear()
    step = make_step(progress=progress)
    (update,) = method.updates(step)
    alone = KD()(student(step.images, ["logits"]), teacher(step.images, ["logits"]), step.target)["kd"]
    if expected is None:
        assert list(update.terms) == ["cross_entropy", "toy/pull"]
        assert len(teacher.model.calls) == 1  # the one of this test
    else:
        torch.testing.assert_close(update.terms["kd/kd"], expected * alone)


def test_with_all_parts_at_rest_the_task_goes_on(make_step, teacher):
    method = Compose({"kd": KD()}, {"kd": Weight(start=0.5)})
    teacher.model.calls.clear()
    (update,) = method.updates(make_step(progress=0.2))
    assert list(update.terms) == ["cross_entropy"]
    assert tuple(update.task_terms) == ("cross_entropy",)
    assert not update.distillation
    assert teacher.model.calls == []


def test_processes_are_told_of_parts_that_rest():
    assert not Compose({"kd": KD()}).moves_subsets
    assert not Compose({"kd": KD()}, {"kd": Weight(decay="cosine")}).moves_subsets
    for weight in (Weight(warmup=0.1), Weight(start=0.1), Weight(stop=0.9), Weight(0.0)):
        assert Compose({"kd": KD()}, {"kd": weight}).moves_subsets
    assert Compose({"inner": Compose({"kd": KD()}, {"kd": Weight(stop=0.5)})}).moves_subsets


def test_parts_start_as_they_would_alone(context):
    torch.manual_seed(11)
    alone = FitNet.from_context(context)
    torch.manual_seed(11)
    parts = {"cirkd": CIRKD.from_context, "fitnet": partial(FitNet.from_context, loss_weight=3.0)}
    method = Compose.from_context(context, parts, weights={"fitnet": 2})
    assert method.parts["fitnet"].loss_weight == 3.0
    assert method.weights["fitnet"] == Weight(2)
    inside = method.parts["fitnet"].state_dict()
    assert all(torch.equal(value, inside[name]) for name, value in alone.state_dict().items())


def test_a_part_that_needs_a_teacher_says_so(student, task):
    context = Context(student, None, task, 5, 12)
    with pytest.raises(ValueError, match="needs a teacher"):
        Compose.from_context(context, {"fitnet": FitNet.from_context})


def test_a_part_that_is_no_method_is_named(context):
    with pytest.raises(ValueError, match=r"'ftinet' is no method: .* or mean another part, kd\."):
        Compose.from_context(context, {"kd": KD.from_context, "ftinet": {"loss_weight": 2}})
    with pytest.raises(ValueError, match="parts must be distillers by name, not 3"):
        Compose.from_context(context, parts=3)
    with pytest.raises(ValueError, match="there must be parts"):
        Compose.from_context(context)


@pytest.mark.parametrize(
    ("parts", "options", "match"),
    [
        ({}, {}, "there must be parts"),
        ({"a/b": KD()}, {}, "names without a slash"),
        ({"pop": KD()}, {}, "another name: .*pop"),
        ({"a.b": KD()}, {}, "another name"),
        ({"kd": KD()}, {"weights": {"cwd": 2.0}}, "a weight for cwd, and the parts are kd"),
        ({"kd": KD()}, {"weights": {"kd": -1.0}}, "weight of 'kd': value must be"),
        ({"kd": KD()}, {"weights": {"kd": {"shaer": 0.1}}}, "weight of 'kd': .*settings among"),
        ({"kd": KD()}, {"weights": {"kd": {"warmup": "long"}}}, "weight of 'kd'"),
        ({"kd": KD()}, {"calibrate_every": 0}, "calibrate_every must be at least 1"),
    ],
)
def test_what_cannot_be_composed_is_refused(parts, options, match):
    with pytest.raises(ValueError, match=match):
        Compose(parts, **options)


def test_a_teacher_never_receives_a_gradient():
    own, goal = ({"logits": torch.rand(2, 5, 4, 4, requires_grad=True)} for _ in range(2))
    total(Compose({"kd": KD(), "cwd": CWD()})(own, goal)).backward()
    assert goal["logits"].grad is None
    assert (own["logits"].grad != 0).any()
