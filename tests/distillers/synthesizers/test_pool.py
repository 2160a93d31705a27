# SPDX-License-Identifier: Apache-2.0
"""The pool: ages, replacement, the step of the optimiser, and the same pool whoever works on it."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from kdlvfm.core import TapError, Teacher
from kdlvfm.distillers.synthesizers import ImagePool, Objective, pool

SIZE = (6, 8)
BATCH = 3


class Towards:
    """An objective that knows no networks: each image towards one colour."""

    def __init__(self, goal=0.3):
        self.goal = goal
        self.shown = []

    def __call__(self, step, images, taps):
        self.shown.append(images.detach().clone())
        features = {tap: images.detach().mean((2, 3)) for tap in taps}
        return {"towards": (images - self.goal).square().sum()}, features


@pytest.fixture
def make_pool():
    def make(count=8, seed=0, **options):
        torch.manual_seed(seed)
        return ImagePool(count, SIZE, Towards(), **{"max_age": 4, "shift": 0.0, **options})

    return make


@pytest.fixture
def blank(make_step):
    def make(number, count=BATCH):
        images = torch.zeros(()).expand(count, 3, *SIZE)
        return make_step(images=images, target=None, index=torch.full((count,), -1), number=number)

    return make


def run(making):
    """The step that a synthesiser ends with."""
    while True:
        try:
            next(making)
        except StopIteration as end:
            return end.value


def state_of(images):
    return {name: value.clone() for name, value in images.get_extra_state().items()}


def test_size_and_ages_stay_in_bounds(make_pool, blank):
    images, seen = make_pool(), set()
    for number in range(60):
        run(images.synthesize(blank(number), ()))
        assert images.images.shape == (8, 3, *SIZE)
        assert images.images.min() >= 0
        assert images.images.max() <= 1
        seen |= set(images.ages.tolist())
    assert seen == {0, 1, 2, 3, 4}


def test_ages_start_anywhere():
    assert set(ImagePool(300, (2, 2), max_age=3).ages.tolist()) == {0, 1, 2, 3}


def test_only_what_was_drawn_changes_and_grows_older(make_pool, blank):
    images = make_pool()
    images.ages.zero_()
    before = state_of(images)
    made = run(images.synthesize(blank(0), ()))
    changed = [i for i in range(8) if not torch.equal(images.images[i], before["images"][i])]
    assert len(changed) == BATCH
    assert images.ages.tolist() == [int(i in changed) for i in range(8)]
    # The student is shown the images as they were before the step.
    for image in made.images:
        assert any(torch.equal(image, x) or torch.equal(image.flip(2), x) for x in before["images"][changed])


def test_an_entry_that_is_through_is_replaced_by_fresh_noise(make_pool, blank):
    images = make_pool()
    for number in range(10):
        run(images.synthesize(blank(number), ()))
    images.ages.fill_(4)
    before = state_of(images)
    made = run(images.synthesize(blank(10), ()))
    drawn = images.ages == 1
    assert drawn.sum() == BATCH
    assert (images.ages[~drawn] == 4).all()
    for image in made.images:
        assert all((image - x).abs().max() > 0.1 for x in before["images"])
        assert 0.2 < image.std() < 0.4
    # Without momentum from earlier: the mean of gradients, 2 (x - 0.3), has one of them.
    noise = images.get_extra_state()["moments"][0, drawn] + 0.3
    assert noise.min() > -1e-6
    assert noise.max() < 1 + 1e-6
    flipped = [x for image in made.images for x in (image, image.flip(2))]
    assert all(min((x - y).abs().max() for y in flipped) < 1e-6 for x in noise)


def test_a_step_is_adams(make_pool, blank):
    """Entries drawn at different times, each as if it had an optimiser of its own."""
    images = make_pool(max_age=50)
    images.ages.zero_()
    parameters = [torch.nn.Parameter(x.clone()) for x in images.images]
    optimizers = [torch.optim.Adam([p], lr=0.05, betas=(0.5, 0.9), eps=1e-12) for p in parameters]
    for number in range(25):
        ages = images.ages.clone()
        run(images.synthesize(blank(number), ()))
        for index in (images.ages > ages).nonzero().flatten().tolist():
            optimizers[index].zero_grad()
            (parameters[index] - 0.3).square().sum().backward()
            optimizers[index].step()
            parameters[index].data.clamp_(0, 1)
    torch.testing.assert_close(images.images, torch.stack([p.detach() for p in parameters]), atol=1e-5, rtol=1e-4)
    assert (images.images - 0.3).abs().mean() < 0.2


def test_a_view_is_shifted_and_mirrored_and_its_gradient_finds_back(blank):
    torch.manual_seed(0)
    images = ImagePool(BATCH, SIZE, Towards(), max_age=9, shift=0.5, lr=1e-6)
    images.objective.goal = 0.9
    images.ages.zero_()
    before, shown = images.images.clone(), []
    for number in range(8):
        shown.append(run(images.synthesize(blank(number), ())).images)
        torch.testing.assert_close(shown[-1].mean((2, 3)).sort(0).values, before.mean((2, 3)).sort(0).values)
    assert len({tuple(x.flatten().tolist()) for x in shown}) > 4
    # Adam's mean of eight gradients that, brought back, are one and the same.
    mean = (1 - 0.5**8) * 2 * (before - 0.9)
    torch.testing.assert_close(images.get_extra_state()["moments"][0], mean, atol=1e-3, rtol=1e-3)


def test_the_teachers_features_are_handed_on(make_pool, blank):
    made = run(make_pool().synthesize(blank(0), ("pooled",)))
    torch.testing.assert_close(made.seen.teacher["pooled"], made.images.mean((2, 3)))


def test_a_restored_pool_goes_on_as_one_that_was_not_stopped(make_pool, blank):
    whole, stopped = make_pool(), make_pool()
    for number in range(12):
        torch.manual_seed(number)
        run(whole.synthesize(blank(number), ()))
        if number < 5:
            torch.manual_seed(number)
            run(stopped.synthesize(blank(number), ()))
    resumed = make_pool(seed=7)
    resumed.load_state_dict(stopped.state_dict())
    for number in range(5, 12):
        torch.manual_seed(number)
        run(resumed.synthesize(blank(number), ()))
    expected = state_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in state_of(resumed).items())


def test_two_seeds_make_two_pools(make_pool):
    assert not torch.equal(make_pool(seed=0).images, make_pool(seed=1).images)


def test_it_is_as_large_as_dkdms_unless_told_otherwise(context):
    assert ImagePool.from_context(context, max_age=10).images.shape == (16, 3, 24, 32)  # 0.4 * 10 batches of 4
    assert ImagePool.from_context(context, size=5, image_size=[8, 12]).images.shape == (5, 3, 8, 12)


def test_weights_reach_the_objective(context):
    made = ImagePool.from_context(context, max_age=2, lr=0.1, tv=0.5, entropy=2.0)
    assert (made.max_age, made.lr) == (2, 0.1)
    assert (made.objective.tv, made.objective.entropy, made.objective.bn) == (0.5, 2.0, Objective().bn)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 3}, "cannot fill a batch of 4"),
        ({"max_age": 0}, "must be positive"),
        ({"lr": 0}, "must be positive"),
        ({"shift": 2}, "from 0 to 1"),
        ({"tv": -1}, "must not be negative: tv=-1"),
        ({"gap": "pixels"}, "gap must be"),
        ({"size": 10**7}, "GiB of memory"),
    ],
)
def test_mistakes_are_named(context, options, words):
    with pytest.raises(ValueError, match=words):
        ImagePool.from_context(context, **options)


def test_a_pool_larger_than_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(pool.os, "sysconf", {"SC_PHYS_PAGES": 3 * 100 * 3 * 4 * 16 - 1, "SC_PAGE_SIZE": 4}.get)
    with pytest.raises(ValueError, match=r"a pool of 100 images of 4x16 takes .* choose a smaller size"):
        ImagePool(100, (4, 16))
    ImagePool(99, (4, 16))


def test_terms_of_classes_need_a_teacher_with_classes(context, toy_model):
    blind = Teacher(toy_model(num_classes=0))
    unlabelled = type(context)(context.student, blind, context.task, 5, 12, batch_shape=(4, 24, 32))
    with pytest.raises(TapError, match="has no classes"):
        ImagePool.from_context(unlabelled, one_hot=1.0)
    assert ImagePool.from_context(unlabelled).objective.gap == "relations"


WORLD = 2


def worker(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        torch.save(after_steps(rank, 2), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def after_steps(rank, count):
    """The state of a pool after some steps with `count` images for each process."""
    from kdlvfm.core import Step

    torch.manual_seed(0)
    images = ImagePool(8, SIZE, Towards(), max_age=3, shift=0.0)
    for number in range(9):
        torch.manual_seed(100 * rank + number)
        zeros = torch.zeros(count, 3, *SIZE)
        run(images.synthesize(Step(zeros, None, torch.zeros(count), 0, 0, None, None, None, number=number), ()))
    return state_of(images)


@pytest.mark.ddp
def test_two_processes_have_one_pool(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    expected = after_steps(0, 4)
    for name, value in expected.items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], value)
