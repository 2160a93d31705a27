# SPDX-License-Identifier: Apache-2.0
"""SCKD: the decisions of its gates against whole backward passes."""

import pytest
import torch

from kdlvfm.core import Distiller, Update
from kdlvfm.distillers import CWD, KD, SCKD, Compose, FitNet, Gram


class Multiple(Distiller):
    """The task's own loss, a number of times; an early tap, so that the gradient is the same everywhere."""

    student_taps = ("logits",)

    def __init__(self, task, *factors):
        super().__init__()
        self.task = task
        self.factors = factors

    def forward(self, student, teacher, target=None):
        loss = self.task.loss(None, student, target)["cross_entropy"]
        return {f"times{factor:g}": factor * loss for factor in self.factors}


class Constant(Distiller):
    """A term without a graph."""

    def forward(self, student, teacher, target=None):
        return {"constant": torch.tensor(2.0)}


class Unsupervised(Distiller):
    """Moves the student, twice in a batch if asked, without the task."""

    student_taps = ("map.-1",)

    def __init__(self, repeats=1):
        super().__init__()
        self.repeats = repeats

    def forward(self, student, teacher, target=None):
        return {"small": student["map.-1"].square().mean()}

    def updates(self, step):
        for _ in range(self.repeats):
            yield Update(self(step.student_features(self.student_taps), {}))


@pytest.fixture
def step(make_step):
    return make_step()


def total(terms):
    return torch.stack(list(terms.values())).sum()


def gradient_of(loss, network):
    for p in network.parameters():
        p.grad = None
    loss.backward(retain_graph=True)
    found = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in network.parameters()]
    for p in network.parameters():
        p.grad = None
    return torch.cat(found)


@pytest.mark.parametrize("at", [None, "map.-1", "map.0", "logits"])
def test_what_pulls_with_the_task_is_open_and_what_pulls_against_it_is_closed(at, step, student, task):
    method = SCKD({"copy": Multiple(task, 0.5, -0.5, 1e-5, -1e-5)}, at=at)
    (update,) = method.updates(step)
    assert list(update.terms) == ["cross_entropy", "copy/times0.5", "copy/times1e-05"]
    alone = gradient_of(update.terms["cross_entropy"], student)
    torch.testing.assert_close(gradient_of(total(update.terms), student), (1 + 0.5 + 1e-5) * alone)


@pytest.mark.parametrize("threshold", [-0.01, 0.0, 0.05])
def test_the_update_is_the_tasks_gradient_and_those_of_the_open_terms(threshold, step, student):
    decisions = []
    for seed in range(4):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in student.parameters():
                p += 0.2 * torch.randn_like(p)
        parts = {"kd": KD(), "cwd": CWD(), "fitnet": FitNet(8, 12), "gram": Gram()}
        weights = {"kd": 0.5, "gram": 3.0}
        (everything,) = Compose(parts, weights).updates(step)
        gradients = {name: gradient_of(term, student) for name, term in everything.terms.items()}
        task = gradients["cross_entropy"]
        open_terms = {
            name: gradient
            for name, gradient in gradients.items()
            if torch.dot(gradient, task) / (gradient.norm() * task.norm()) >= threshold
        }
        (update,) = SCKD(parts, weights, threshold=threshold, at=None).updates(step)
        assert list(update.terms) == list(open_terms)
        torch.testing.assert_close(
            gradient_of(total(update.terms), student),
            torch.stack(list(open_terms.values())).sum(0),
            rtol=1e-4,
            atol=1e-5,
        )
        decisions.append(len(open_terms))
    assert min(decisions) < 5, "no gate was closed, so nothing was tested"


@pytest.mark.parametrize("at", ["map.-1", "map.1"])
def test_at_a_tap_the_gradients_of_the_tap_decide(at, step, student):
    kept = {}
    forward = student.forward
    student.forward = lambda images, taps: kept.update(forward(images, taps)) or {tap: kept[tap] for tap in taps}
    torch.manual_seed(3)
    parts = {"kd": KD(), "fitnet": FitNet(8, 12), "gram": Gram()}
    (everything,) = Compose(parts, at=at).updates(step)
    found = {
        name: torch.autograd.grad(term, kept[at], retain_graph=True)[0].flatten()
        for name, term in everything.terms.items()
    }
    expected = [name for name, gradient in found.items() if torch.dot(gradient, found["cross_entropy"]) >= 0]
    (update,) = SCKD(parts, at=at).updates(step)
    assert list(update.terms) == expected


def test_gates_leave_no_gradient_behind_and_do_not_change_the_terms(step, student):
    parts = {"kd": KD(), "fitnet": FitNet(8, 12)}
    (gated,) = SCKD(parts, threshold=-1.0).updates(step)
    assert all(p.grad is None for net in (student, *parts.values()) for p in net.parameters())
    (plain,) = Compose(parts).updates(step)
    assert {name: term.item() for name, term in gated.terms.items()} == {
        name: term.item() for name, term in plain.terms.items()
    }


def test_forward_gives_all_terms():
    features = {"logits": torch.rand(2, 3, 4, 4), "map.-1": torch.rand(2, 3, 4, 4)}
    assert list(SCKD({"kd": KD(), "cwd": CWD()}, {"cwd": 2.0})(features, features)) == ["kd/kd", "cwd/cwd"]


def test_calibration_and_schedules_work_under_the_gate(make_step, student, task):
    weights = {"copy": {"share": 0.25}, "late": {"start": 0.5}}
    method = SCKD({"copy": Multiple(task, 7.0), "late": KD()}, weights)
    (update,) = method.updates(make_step(progress=0.2))
    torch.testing.assert_close(update.terms["copy/times7"], 0.25 * update.terms["cross_entropy"])
    assert list(update.terms) == ["cross_entropy", "copy/times7"]


@pytest.mark.parametrize("tap", ["map.-1", "decoder"])
def test_a_term_that_does_not_depend_on_the_tap_is_refused_by_name(tap, step):
    early = FitNet(4, 7, student_tap="map.0", teacher_tap="map.0")
    with pytest.raises(ValueError, match=rf"early/fitnet cannot be judged at={tap}.*earlier tap.*null"):
        list(SCKD({"kd": KD(), "early": early}, at=tap).updates(step))


def test_a_tap_of_frozen_layers_is_refused(step, student):
    student.net["stages"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"cross_entropy cannot be judged at=map\.0"):
        list(SCKD({"kd": KD()}, at="map.0").updates(step))


@pytest.mark.parametrize("at", [None, "map.-1"])
def test_a_constant_term_is_let_through(at, step):
    (update,) = SCKD({"constant": Constant()}, at=at).updates(step)
    assert list(update.terms) == ["cross_entropy", "constant/constant"]


def test_a_batch_without_labels_closes_no_gate(make_step, batch, task):
    class Summed(type(task)):
        def loss(self, student, features, target):
            return {"cross_entropy": 0 * features["logits"].sum()}

    step = make_step(target=torch.full_like(batch["mask"], -1), task=Summed())
    (update,) = SCKD({"kd": KD(ignore_index=None), "cwd": CWD()}).updates(step)
    assert list(update.terms) == ["cross_entropy", "kd/kd", "cwd/cwd"]


def test_an_update_without_the_task_has_nothing_to_oppose(step):
    (update,) = SCKD({"small": Unsupervised()}).updates(step)
    assert list(update.terms) == ["small/small"]


def test_a_tap_is_known_in_the_first_step_of_the_student_only(step):
    class Twice(Unsupervised):
        def updates(self, step):
            for _ in range(2):
                yield from Distiller.updates(self, step)

    with pytest.raises(ValueError, match=r"several steps of the student .* set at to null"):
        list(SCKD({"twice": Twice()}).updates(step))
    assert len(list(SCKD({"twice": Twice()}, at=None).updates(step))) == 2


@pytest.mark.parametrize("threshold", [-1.5, 2.0, float("nan")])
def test_a_threshold_is_a_cosine(threshold):
    with pytest.raises(ValueError, match="threshold is a cosine"):
        SCKD({"kd": KD()}, threshold=threshold)


def test_processes_are_told_that_projectors_may_rest():
    assert SCKD({"kd": KD()}).moves_subsets


def test_from_context_builds_the_parts(context):
    method = SCKD.from_context(context, {"fitnet": FitNet.from_context}, threshold=0.1, weights={"fitnet": 2})
    assert (12, 8, 1, 1) in [parameter.shape for parameter in method.parameters()]
    assert method.threshold == 0.1
