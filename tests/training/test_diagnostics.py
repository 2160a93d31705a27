# SPDX-License-Identifier: Apache-2.0
import copy
import itertools

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F

from kdlvfm.core import Distiller, Update
from kdlvfm.core.similarity import tap_cka
from kdlvfm.distillers import KD, Baseline
from kdlvfm.distillers.kd import kd_loss
from kdlvfm.training.diagnostics import Diagnostics, tap_pairs, thin


def two_terms(student, teacher, call):
    return {"square": (student - teacher).square().mean(), "kl": 0.1 * kd_loss(student, teacher, 2.0)}


class TwoGroups(Distiller):
    """Each batch moves a bias twice, without a task term, and then the student."""

    student_taps = teacher_taps = ("logits",)

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))
        self.values = []

    def forward(self, student, teacher, target=None):
        return {"square": (student["logits"] + self.bias - teacher["logits"]).square().mean()}

    def parameter_groups(self, student):
        return {"student": list(student.parameters()), "bias": [self.bias]}

    def updates(self, step):
        teacher = step.teacher_features(self.teacher_taps)
        for group in ("bias", "bias", "student"):
            features = step.student(step.images, ["logits"])
            own = self(features, teacher)
            task = step.task.loss(step.student, features, step.target) if group == "student" else {}
            self.values.append(own["square"].item())
            yield Update({**task, **own}, group, tuple(task))


def first_batch(data):
    batch = next(iter(data.train_dataloader()))
    return batch["image"], batch["mask"]


def gradient(loss, module):
    """All of the gradient of a full backward pass as one vector."""
    module.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def test_norms_and_cosines_are_those_of_full_backward_passes(logits_distiller, make_module, make_data, run_fit):
    module = make_module(steps=1, distiller=logits_distiller(two_terms))
    student, teacher = copy.deepcopy(module.student.net), copy.deepcopy(module.teacher.model.net)
    result = run_fit(module, make_data(steps=1))

    images, masks = first_batch(make_data(steps=1))
    goal = teacher(images - 0.5).detach()
    losses = {
        "task": lambda logits: F.cross_entropy(logits, masks),
        "square": lambda logits: F.mse_loss(logits, goal),
        "kl": lambda logits: 0.1 * kd_loss(logits, goal, 2.0),
    }
    values = {name: loss(student(images - 0.5)) for name, loss in losses.items()}
    gradients = {name: gradient(value, student) for name, value in values.items()}
    (point,) = result.diagnostics
    assert point["step"] == 1
    assert list(point["terms"]) == ["student/task", "student/square", "student/kl"]
    for name, value in values.items():
        found = point["terms"][f"student/{name}"]
        assert found["value"] == pytest.approx(value.item(), rel=1e-5)
        assert found["grad_norm"] == pytest.approx(gradients[name].norm().item(), rel=1e-5)
        cosine = F.cosine_similarity(gradients[name], gradients["task"], dim=0).item()
        assert found["cosine"] == (None if name == "task" else pytest.approx(cosine, rel=1e-4))
    assert point["cka"] == {"logits~logits": pytest.approx(tap_cka(student(images - 0.5), goal).item(), rel=1e-5)}


def test_a_group_without_the_student_has_norms_of_its_own_and_no_cosine(make_module, make_data, run_fit):
    distiller = TwoGroups()
    module = make_module(steps=1, distiller=distiller)
    student, teacher = copy.deepcopy(module.student.net), copy.deepcopy(module.teacher.model.net)
    result = run_fit(module, make_data(steps=1))
    (point,) = result.diagnostics
    assert list(point["terms"]) == ["bias/square", "student/task", "student/square"]

    images, _ = first_batch(make_data(steps=1))
    bias = torch.zeros(3, 1, 1, requires_grad=True)
    F.mse_loss(student(images - 0.5).detach() + bias, teacher(images - 0.5).detach()).backward()
    own = point["terms"]["bias/square"]
    assert own["value"] == distiller.values[0] != distiller.values[1]  # the first of the two updates
    assert own["grad_norm"] == pytest.approx(bias.grad.norm().item(), rel=1e-5)
    assert own["cosine"] is None
    assert point["terms"]["student/square"]["cosine"] is not None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("method", ["kd", "logits", "groups"])
def test_a_run_with_diagnostics_has_the_bits_of_one_without(
    logits_distiller, method, accumulate, precision, make_module, make_data, small_net, run_fit
):
    methods = {"kd": KD, "logits": lambda: logits_distiller(two_terms), "groups": TwoGroups}
    ends = []
    for every in (None, 1):
        module = make_module(
            steps=7,
            distiller=methods[method](),
            accumulate=accumulate,
            student=small_net(dropout=0.3),
            batches_per_epoch=2,
        )
        result = run_fit(
            module,
            make_data(steps=7),
            f"every-{every}",
            trainer={"precision": precision},
            diagnose_every=every,
            val_every=3,
        )
        assert [point["step"] for point in result.diagnostics] == ([] if every is None else [1, 2, 3, 4, 5, 6, 7])
        ends.append((module.state_dict(), torch.get_rng_state(), result.curve))
        assert not module.observers
        assert not module.student._forward_hooks
    without, diagnosed = ends
    assert without[0].keys() == diagnosed[0].keys()
    for name, value in without[0].items():
        assert torch.equal(value, diagnosed[0][name]), name
    assert torch.equal(without[1], diagnosed[1])
    assert without[2] == diagnosed[2]


def test_a_gradient_scaler_is_left_as_it_is_and_norms_are_those_of_single_precision(
    logits_distiller, make_module, make_data, run_fit
):
    def run(name, every, **trainer):
        module = make_module(steps=5, distiller=logits_distiller(two_terms))
        return module, run_fit(module, make_data(steps=5), name, trainer=trainer, diagnose_every=every).diagnostics

    found = {
        every: run(f"half-{every}", every, precision=None, plugins=[MixedPrecision("16-mixed", "cpu")])
        for every in (None, 1)
    }
    for name, value in found[None][0].state_dict().items():
        assert torch.equal(value, found[1][0].state_dict()[name]), name
    plain = run("plain", 1)[1][0]["terms"]
    for name, facts in found[1][1][0]["terms"].items():
        assert facts["grad_norm"] == pytest.approx(plain[name]["grad_norm"], rel=0.02)


def test_steps_1_and_10_and_every_so_many(make_module, make_data, run_fit):
    result = run_fit(make_module(steps=25), make_data(steps=25), diagnose_every=12)
    assert [point["step"] for point in result.diagnostics] == [1, 10, 12, 24]
    diagnostics = Diagnostics(100)
    assert [step for step in range(1, 301) if diagnostics.due(step)] == [1, 10, 100, 200, 300]
    assert not any(Diagnostics(None).due(step) for step in range(1, 301))
    with pytest.raises(ValueError, match=r"run\.diagnose_every must be at least 1, not 0"):
        Diagnostics(0)


def test_the_baseline_is_not_looked_at(make_module, make_data, run_fit):
    module = make_module(steps=3, distiller=Baseline(), teacher=None)
    assert run_fit(module, make_data(steps=3), diagnose_every=1, dead_term_steps=1).diagnostics == []


def test_what_is_not_defined_is_none(logits_distiller, make_module, make_data, run_fit):
    """A term without a gradient has no direction; a network that was not asked has no features."""

    class Deaf(logits_distiller):
        student_taps = ("logits", "logits")

    module = make_module(steps=1, distiller=Deaf(lambda student, teacher, call: {"dead": student.detach().sum()}))
    (point,) = run_fit(module, make_data(steps=1)).diagnostics
    assert point["terms"]["student/dead"]["cosine"] is None
    assert point["terms"]["student/dead"]["grad_norm"] == 0
    assert list(point["cka"]) == ["logits~logits"]


def test_a_term_cannot_be_called_task(logits_distiller, make_module, make_data, run_fit):
    module = make_module(steps=1, distiller=logits_distiller(lambda student, teacher, call: {"task": student.mean()}))
    with pytest.raises(ValueError, match="a distillation term cannot be called 'task'"):
        run_fit(module, make_data(steps=1))


def test_loggers_get_each_look_once(logits_distiller, make_module, make_data, run_fit, make_noted):
    noted = make_noted()
    module = make_module(steps=6, distiller=logits_distiller(two_terms))
    result = run_fit(module, make_data(steps=6), loggers=[noted], diagnose_every=3)
    rows = [(step, row) for step, row in noted.rows if any(name.startswith("diagnostics/") for name in row)]
    assert [step + 1 for step, _ in rows] == [1, 3, 6]
    facts = {"value", "grad_norm", "cosine"}
    names = {f"student/{term}/{fact}" for term in ("task", "square", "kl") for fact in facts} - {"student/task/cosine"}
    assert rows[1][1].keys() == {f"diagnostics/{name}" for name in (*names, "cka/logits~logits")}
    assert rows[1][1]["diagnostics/student/kl/value"] == result.diagnostics[1]["terms"]["student/kl"]["value"]


def test_points_are_thinned_evenly_and_keep_their_ends():
    points = []
    for step in [1, 10, *range(100, 40001, 100)]:
        points.append({"step": step})
        thin(points, 30)
        steps = [point["step"] for point in points]
        assert len(steps) <= 30
        assert (steps[0], steps[-1]) == (1, step)
        gaps = [after - before for before, after in itertools.pairwise(steps)]
        if step > 10000:
            assert max(gaps[1:-1]) <= 3 * min(gaps[1:-1])


def test_taps_pair_up_in_order_or_each_with_each():
    assert tap_pairs(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "y")]
    assert tap_pairs(["a", "a"], ["x", "x"]) == [("a", "x")]
    assert tap_pairs(["a"], ["x", "y"]) == [("a", "x"), ("a", "y")]
    assert tap_pairs(["a"], []) == []
    assert len(tap_pairs([*"abcdef"], [*"tuvxy"])) == 16
