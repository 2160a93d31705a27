# SPDX-License-Identifier: Apache-2.0
"""The generator: what it makes, when it learns, and what its gradient passes through."""

import pytest
import torch

from kdlvfm.core.synthesizer import GROUP
from kdlvfm.distillers.synthesizers import ImageGenerator, Objective


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return ImageGenerator((24, 32), latent=8, width=4, every=3)


@pytest.fixture
def blank(make_step):
    def make(number):
        images = torch.zeros(()).expand(4, 3, 24, 32)
        return make_step(images=images, target=None, number=number)

    return make


def run(making):
    """The updates of a synthesiser, and the step that it ends with."""
    updates = []
    while True:
        try:
            updates.append(next(making))
        except StopIteration as end:
            return updates, end.value


@pytest.mark.parametrize("size", [(1, 1), (24, 32), (37, 65), (64, 64), (100, 300)])
def test_images_have_the_size_asked_for(size):
    generator = ImageGenerator(size, latent=4, width=2)
    images = generator(torch.randn(2, 4))
    assert images.shape == (2, 3, *size)
    assert images.min() >= 0
    assert images.max() <= 1


def test_its_first_layer_does_not_grow_with_large_images():
    small, large = (ImageGenerator(size, width=8).layers[0].out_features for size in ((64, 64), (512, 512)))
    assert small == large


def test_it_learns_in_one_of_some_steps(generator, blank):
    taken = [len(run(generator.synthesize(blank(number), ()))[0]) for number in range(7)]
    assert taken == [0, 0, 1, 0, 0, 1, 0]


def test_its_update_is_the_objective_of_its_images(generator, blank):
    torch.manual_seed(1)
    (update,), made = run(generator.synthesize(blank(2), ("logits",)))
    assert update.group == GROUP
    assert not update.task_terms
    terms, seen = generator.objective(blank(2), made.images, ("logits",))
    assert terms.keys() == update.terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, update.terms[name])
    torch.testing.assert_close(made.seen.teacher["logits"], seen["logits"])
    assert not made.images.requires_grad


def test_the_gradient_passes_the_frozen_teacher(generator, blank, teacher, student):
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    # Of the teacher alone: no other way leads to the generator.
    generator.objective = Objective(adversarial=0, one_hot=1, balance=1, bn=1, entropy=0, tv=0)
    (update,), _ = run(generator.synthesize(blank(2), ()))
    torch.stack(list(update.terms.values())).sum().backward()
    # A bias before a batch normalisation changes nothing.
    weights = [parameter for parameter in generator.parameters() if parameter.dim() > 1]
    assert all((weight.grad != 0).any() and weight.grad.isfinite().all() for weight in weights)
    assert all(parameter.grad is None for parameter in (*teacher.model.parameters(), *student.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())


def test_it_learns_what_it_is_asked_for(generator, blank):
    generator.every = 1
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.01)
    values = []
    for number in range(25):
        torch.manual_seed(number)
        making = generator.synthesize(blank(number), ())
        update = next(making)
        optimizer.zero_grad()
        total = torch.stack(list(update.terms.values())).sum()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert sum(values[-5:]) < sum(values[:5])


def test_inside_a_run_it_knows_the_size_and_the_objective(context):
    generator = ImageGenerator.from_context(context, width=4, entropy=2.0)
    assert generator(torch.randn(2, generator.latent)).shape == (2, 3, 24, 32)
    assert generator.objective == Objective.fitting(context, entropy=2.0)


@pytest.mark.parametrize("options", [{"latent": 0}, {"width": 0}, {"every": 0}, {"image_size": (0, 4)}])
def test_numbers_are_positive(context, options):
    with pytest.raises(ValueError, match="must be positive"):
        ImageGenerator.from_context(context, **options)


def test_a_size_must_be_known_or_given(context):
    unknown = type(context)(context.student, context.teacher, context.task, 5, 12)
    with pytest.raises(ValueError, match="pass image_size"):
        ImageGenerator.from_context(unknown)
    assert ImageGenerator.from_context(unknown, image_size=(8, 8), width=2)
