# SPDX-License-Identifier: Apache-2.0
"""Parts that take several steps in a batch, or train networks of their own, inside Compose."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kdlvfm.core import Distiller, Update
from kdlvfm.distillers import CIRKD, KD, Compose, CustomKD, FitNet, Pairwise


class Toy(Distiller):
    """Pulls a tap towards a number; `log` tells what happens, in order."""

    def __init__(self, goal=0.0, tap="map.-1", log=None):
        super().__init__()
        self.student_taps = (tap,)
        self.goal = goal
        self.log = [] if log is None else log

    def forward(self, student, teacher, target=None):
        return {"pull": (student[self.student_taps[0]] - self.goal).square().mean()}


class Judged(Toy):
    """With a network of its own that moves before the student does."""

    def __init__(self, **options):
        super().__init__(**options)
        self.judge = nn.Conv2d(8, 1, 1)

    def parameter_groups(self, student):
        return {"judge": list(self.judge.parameters()), "student": list(student.parameters())}

    def updates(self, step):
        feature = step.student_features(self.student_taps)[self.student_taps[0]].detach()
        yield Update({"judge": self.judge(feature).square().mean()}, "judge")
        self.log.append("judge taken")
        yield from super().updates(step)
        self.log.append("student taken")


class Alternating(Judged):
    """The judge in even epochs, the student in odd ones."""

    def updates(self, step):
        judge, *student = super().updates(step)
        yield from student if step.epoch % 2 else [judge]


class Repeated(Toy):
    """Three steps of the student in a batch."""

    def updates(self, step):
        for i in range(3):
            yield from super().updates(step)
            self.log.append(f"step {i} taken")


@pytest.fixture
def step(make_step):
    return make_step(progress=0.25)


def total(terms):
    return torch.stack(list(terms.values())).sum()


def take(distiller, step, rate=0.05):
    """Every update of a step taken by gradient descent on its group; the updates."""
    groups, taken = distiller.parameter_groups(step.student), []
    for update in distiller.updates(step):
        everything = [p for group in groups.values() for p in group]
        for p in everything:
            p.grad = None
        total(update.terms).backward()
        with torch.no_grad():
            for p in groups[update.group]:
                if p.grad is not None:
                    p -= rate * p.grad
        for p in everything:
            p.grad = None
        taken.append(update)
    return taken


def values(updates):
    return [(u.group, {name: term.item() for name, term in u.terms.items()}) for u in updates]


def test_groups_hold_each_parameter_once_under_the_name_of_its_part(student):
    frozen = next(student.parameters()).requires_grad_(False)
    judged = Judged()
    judged.parameter_groups = lambda s: {
        "judge": list(judged.judge.parameters()), "student": [p for p in s.parameters() if p.requires_grad]
    }  # fmt: skip
    method = Compose({"fitnet": FitNet(8, 12), "judged": judged, "kd": KD()})
    groups = method.parameter_groups(student)
    assert list(groups) == ["student", "judged/judge"]
    held = [id(p) for group in groups.values() for p in group]
    trainable = {id(p) for net in (student, method) for p in net.parameters() if p.requires_grad}
    assert len(held) == len(set(held))
    assert set(held) == trainable
    assert id(frozen) not in held
    assert {id(p) for p in groups["judged/judge"]} == {id(p) for p in judged.judge.parameters()}


def test_two_groups_cannot_share_a_parameter(student):
    class Greedy(Toy):
        def parameter_groups(self, student):
            return {"mine": list(student.parameters())}

    with pytest.raises(ValueError, match="groups student and greedy/mine have a parameter in common"):
        Compose({"toy": Toy(), "greedy": Greedy()}).parameter_groups(student)


def test_the_students_updates_of_all_parts_are_one_and_others_stay_in_their_order(step):
    log = []
    method = Compose({"toy": Toy(1.0), "judged": Judged(log=log)}, {"judged": 2.0})
    seen = []
    for update in method.updates(step):
        seen.append((update.group, list(update.terms), list(log)))
    assert seen == [
        ("judged/judge", ["judge"], []),
        ("student", ["cross_entropy", "toy/pull", "judged/pull"], ["judge taken"]),
    ]
    assert log == ["judge taken", "student taken"]


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_phases_work_inside(epoch, make_step):
    method = Compose({"toy": Toy(1.0), "turns": Alternating()})
    groups = [(u.group, list(u.terms)) for u in method.updates(make_step(epoch=epoch))]
    if epoch % 2:
        assert groups == [("student", ["cross_entropy", "toy/pull", "turns/pull"])]
    else:
        assert sorted(groups) == [("student", ["cross_entropy", "toy/pull"]), ("turns/judge", ["judge"])]


def test_the_student_moves_as_often_as_its_busiest_part_asks_and_is_looked_at_anew(step, student):
    method = Compose({"kd": KD(), "busy": Repeated(1.0)})
    student.calls.clear()
    updates = take(method, step)
    assert [list(u.terms) for u in updates] == [
        ["cross_entropy", "kd/kd", "busy/pull"], ["cross_entropy", "busy/pull"], ["cross_entropy", "busy/pull"]
    ]  # fmt: skip
    assert len(student.calls) == 3
    pulls = [u.terms["busy/pull"].item() for u in updates]
    assert len(set(pulls)) == 3
    assert method.parts["busy"].log == ["step 0 taken", "step 1 taken", "step 2 taken"]


@pytest.mark.parametrize(
    ("make", "epoch"),
    [
        pytest.param(lambda: Judged(goal=2.0), 0, id="judged"),
        pytest.param(lambda: Repeated(goal=2.0), 0, id="repeated"),
        pytest.param(
            lambda: Pairwise(adversarial_weight=0.1, judged_student_dim=5, judged_teacher_dim=5), 0, id="skds"
        ),
        pytest.param(lambda: CustomKD([16], [12]), 0, id="customisation"),
        pytest.param(lambda: CustomKD([16], [12]), 1, id="customkd"),
        pytest.param(lambda: CIRKD(8, 12, 5, pixel_memory=20, region_memory=4), 0, id="cirkd"),
    ],
)
def test_one_part_is_what_it_is_alone(make, epoch, make_step, student):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    results = []
    for wrap in (lambda part: part, lambda part: Compose({"it": part})):
        student.load_state_dict(before)
        torch.manual_seed(7)
        part = make()
        torch.manual_seed(8)
        updates = take(wrap(part), make_step(epoch=epoch))
        weights = {name: value.clone() for name, value in student.named_parameters()}
        results.append((values(updates), weights, part.state_dict()))
    (alone, moved, state), (inside, moved_inside, state_inside) = results
    for (group, terms), (group_inside, terms_inside) in zip(alone, inside, strict=True):
        assert group_inside == (group if group == "student" else f"it/{group}")
        if group == "student":
            terms = {name if name == "cross_entropy" else f"it/{name}": value for name, value in terms.items()}
        assert terms_inside == terms
    assert all(torch.equal(value, moved_inside[name]) for name, value in moved.items())
    assert all(torch.equal(value, state_inside[name]) for name, value in state.items())


def test_terms_of_the_task_that_are_not_said_to_be_are_refused(step):
    class Unsaid(Toy):
        def updates(self, step):
            for update in super().updates(step):
                yield replace(update, task_terms=())

    with pytest.raises(ValueError, match="cross_entropy would count twice: the updates of the part 'unsaid'"):
        list(Compose({"kd": KD(), "unsaid": Unsaid()}).updates(step))
