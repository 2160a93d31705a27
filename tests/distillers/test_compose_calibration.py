# SPDX-License-Identifier: Apache-2.0
"""Calibrated weights, against lengths of gradients from whole backward passes."""

import pytest
import torch

from kdlvfm.distillers import CWD, KD, Compose, FitNet, Weight


def total(terms):
    return torch.stack(list(terms.values())).sum()


def gradients_of(loss, student):
    """Gradients by a backward pass, as one vector."""
    parameters = list(student.parameters())
    for p in parameters:
        p.grad = None
    loss.backward(retain_graph=True)
    found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return found


def values(updates):
    return [(u.group, {name: term.item() for name, term in u.terms.items()}) for u in updates]


def lengths(update, student, parts):
    """Lengths of the student's gradients by whole backward passes: of the task and of the terms of each part."""
    task = total({name: update.terms[name] for name in update.task_terms})
    found = [gradients_of(task, student).norm()]
    for part in parts:
        terms = {name: term for name, term in update.terms.items() if name.startswith(f"{part}/")}
        found.append(gradients_of(total(terms), student).norm())
    return torch.stack(found)


def test_calibration_reaches_the_share(make_step, student):
    parts = {"kd": KD(loss_weight=1e-4), "fitnet": FitNet(8, 12), "free": CWD()}
    (update,) = Compose(parts, {"kd": {"share": 0.1}, "fitnet": {"share": 2.0}}).updates(make_step())
    task, kd, regression, free = lengths(update, student, ["kd", "fitnet", "free"])
    torch.testing.assert_close(kd, 0.1 * task)
    torch.testing.assert_close(regression, 2.0 * task)
    assert not torch.isclose(free, task)


def test_a_schedule_multiplies_what_was_calibrated(make_step, student):
    method = Compose({"kd": KD()}, {"kd": Weight(warmup=0.5, share=0.4)})
    (update,) = method.updates(make_step(progress=0.125))
    task, kd = lengths(update, student, ["kd"])
    torch.testing.assert_close(kd, 0.25 * 0.4 * task)


def test_at_a_tap_the_gradients_of_the_tap_have_the_share(make_step, student):
    method = Compose({"kd": KD()}, {"kd": {"share": 0.3}}, at="map.1")
    assert method.student_taps == ("logits", "map.1")
    kept = {}
    forward = student.forward
    student.forward = lambda images, taps: kept.update(forward(images, taps)) or {tap: kept[tap] for tap in taps}
    (update,) = method.updates(make_step())
    (task,) = torch.autograd.grad(update.terms["cross_entropy"], kept["map.1"], retain_graph=True)
    (kd,) = torch.autograd.grad(update.terms["kd/kd"], kept["map.1"])
    torch.testing.assert_close(kd.norm(), 0.3 * task.norm())


def weight_in(update, student, teacher, step):
    """What the term of `kd` was multiplied by."""
    alone = KD()(student(step.images, ["logits"]), teacher(step.images, ["logits"]), step.target)["kd"]
    return (update.terms["kd/kd"] / alone).item()


def test_gradients_are_measured_now_and_then_and_averaged(make_step, student, teacher):
    method = Compose({"kd": KD()}, {"kd": {"share": 0.5}}, calibrate_every=3)
    weights, measured = [], []
    for number in range(2, 9):
        step = make_step(number=number)
        (update,) = method.updates(step)
        weights.append(weight_in(update, student, teacher, step))
        terms = {"task": update.terms["cross_entropy"], "kd": update.terms["kd/kd"] / weights[-1]}
        measured.append([gradients_of(term, student).norm().item() for term in terms.values()])
        with torch.no_grad():
            for p in student.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    task, kd = measured[0]
    assert weights[:3] == pytest.approx([0.5 * task / kd] * 3, rel=1e-4)
    task, kd = (task + measured[3][0]) / 2, (kd + measured[3][1]) / 2
    assert weights[3:6] == pytest.approx([0.5 * task / kd] * 3, rel=1e-4)
    task, kd = (task + measured[6][0]) / 2, (kd + measured[6][1]) / 2
    assert weights[6] == pytest.approx(0.5 * task / kd, rel=1e-4)
    assert len({round(w, 6) for w in weights}) == 3


def test_a_part_is_measured_when_it_starts(make_step, student):
    method = Compose({"kd": KD(), "late": CWD()}, {"kd": {"share": 0.1}, "late": {"share": 0.2, "start": 0.5}})
    list(method.updates(make_step(number=0, progress=0.1)))
    (update,) = method.updates(make_step(number=7, progress=0.5))
    task, late = lengths(update, student, ["late"])
    torch.testing.assert_close(late, 0.2 * task)


def test_what_cannot_be_measured_leaves_the_weight_as_it_is(make_step, student, teacher, task, batch, monkeypatch):
    method = Compose({"kd": KD()}, {"kd": {"share": 0.5}}, calibrate_every=1)
    original = type(task).loss
    factor = [0.0]
    monkeypatch.setattr(type(task), "loss", lambda *a: {name: factor[0] * x for name, x in original(*a).items()})
    found = []
    for number, factor[0] in enumerate((0.0, 1.0, 0.0, float("inf"), 1.0)):
        step = make_step(number=number)
        (update,) = method.updates(step)
        found.append(weight_in(update, student, teacher, step))
    assert found[0] == pytest.approx(1.0)
    assert found[1] != pytest.approx(1.0)
    assert found[2:] == pytest.approx([found[1]] * 3)


def test_a_resumed_run_weighs_as_one_that_was_not_stopped(make_step, student, tmp_path):
    def fresh():
        return Compose({"kd": KD(), "cwd": CWD()}, {"kd": {"share": 0.5}, "cwd": 2.0}, calibrate_every=4)

    first = fresh()
    list(first.updates(make_step(number=0)))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for p in student.parameters():
            p *= 1.1
    second = fresh()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for number in (1, 3, 4, 5, 9):
        (one,), (other,) = (method.updates(make_step(number=number)) for method in (first, second))
        assert values([one]) == values([other])
    assert torch.equal(first.state_dict()["_extra_state"], second.state_dict()["_extra_state"])
