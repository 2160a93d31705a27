# SPDX-License-Identifier: Apache-2.0
"""The set that the teacher makes first: made once, by its steps, and then the only thing that is learned from."""

from types import SimpleNamespace

import pytest
import torch

from kdlvfm.core import Context, Denoiser, ModelCard, Step, TapInfo, Teacher
from kdlvfm.core.diffusion import Schedule
from kdlvfm.distillers import SyntheticSet

T, BATCH = 6, 4


class Brush(Denoiser):
    """Leads any noise to images whose pixels are all 0.75."""

    def __init__(self):
        super().__init__()
        self.card, self.state_shape, self.schedule = (
            ModelCard("brush", "random"),
            (1, 4, 4),
            Schedule.named("cosine", T),
        )
        self.shown = 0

    def taps(self):
        return {"noise": TapInfo(1, 1)}

    def forward(self, images, taps, timesteps=None):
        self.shown += len(images)
        at = timesteps.view(-1, 1, 1, 1)
        return {"noise": (images - self.schedule.signal[at] * 0.5) / self.schedule.noise[at]}


class Noted(SimpleNamespace):
    """A task that notes what it is asked to learn from."""

    def loss(self, student, features, target):
        self.images.append(target["image"])
        return {"noise": target["image"].mean() * student}


@pytest.fixture
def parts():
    teacher, task = Teacher(Brush()), Noted(truth="images", images=[])
    return teacher, task, Context(Brush(), teacher, task, 10, 9, batch_shape=(BATCH, 4, 4))


def step_of(teacher, task, number):
    images = torch.full((BATCH, 3, 4, 4), torch.nan)
    weight = torch.ones((), requires_grad=True)
    return Step(images, {"image": images}, torch.arange(BATCH), 0, number, weight, teacher, task, number=number)


def test_the_set_is_made_once_and_learned_from_by_the_tasks_terms(parts):
    teacher, task, context = parts
    method = SyntheticSet.from_context(context)
    assert not len(method.images)
    for number in range(3):
        (update,) = method.updates(step_of(teacher, task, number))
        assert tuple(update.terms) == update.task_terms == ("noise",)
    assert teacher.model.shown == 9 * T  # as many images as the data has
    assert method.images.shape == (9, 3, 4, 4)
    torch.testing.assert_close(method.images, torch.full((9, 3, 4, 4), 0.75))
    assert all(images.shape == (BATCH, 3, 4, 4) for images in task.images)
    torch.testing.assert_close(torch.cat(task.images), torch.full((3 * BATCH, 3, 4, 4), 0.75))


def test_size_and_steps_are_ones_own(parts):
    teacher, task, context = parts
    method = SyntheticSet.from_context(context, size=7, sampling_steps=3)
    next(method.updates(step_of(teacher, task, 0)))
    assert len(method.images) == 7
    assert teacher.model.shown == 7 * 3


def test_batches_are_drawn_from_the_whole_set_by_the_number_of_the_step(parts):
    teacher, task, context = parts
    methods = []
    for _ in range(2):
        torch.manual_seed(1)
        method = SyntheticSet.from_context(context)
        method.images = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 4, 4)
        methods.append(method)
    for number in range(30):
        next(methods[0].updates(step_of(teacher, task, number)))
    drawn = torch.stack([images[:, 0, 0, 0] for images in task.images])
    assert set(drawn.flatten().tolist()) == set(range(9))
    torch.manual_seed(99)  # nothing but the method's own seed and the step decides
    next(methods[1].updates(step_of(teacher, task, 12)))
    assert torch.equal(task.images[-1][:, 0, 0, 0], drawn[12])


def test_a_checkpoint_holds_the_set(parts, tmp_path):
    teacher, task, context = parts
    first, second = (SyntheticSet.from_context(context) for _ in range(2))
    next(first.updates(step_of(teacher, task, 0)))
    torch.save(first.state_dict(), tmp_path / "set.pt")
    second.load_state_dict(torch.load(tmp_path / "set.pt", weights_only=True))
    shown = teacher.model.shown
    for method in (first, second):
        next(method.updates(step_of(teacher, task, 5)))
    assert teacher.model.shown == shown
    assert torch.equal(task.images[-1], task.images[-2])


def test_it_has_no_terms_of_its_own(parts):
    assert SyntheticSet.from_context(parts[2])({}, {}) == {}
    assert SyntheticSet.from_context(parts[2]).teacher_taps == ("noise",)


def test_bad_arguments_are_refused(parts, context):
    with pytest.raises(ValueError, match=r"distiller\.size must be 1 or more, not 0"):
        SyntheticSet.from_context(parts[2], size=0)
    with pytest.raises(ValueError, match="from 2 to the 6 steps"):
        SyntheticSet.from_context(parts[2], sampling_steps=7)
    with pytest.raises(ValueError, match="toy is no diffusion model"):
        SyntheticSet.from_context(context)
