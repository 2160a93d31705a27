# SPDX-License-Identifier: Apache-2.0
"""The objective term by term against formulas written out, on networks whose every layer is known."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from kdlvfm.core import Context, TapError, Teacher
from kdlvfm.distillers.synthesizers import Objective, patch_entropy, relation_gap, statistics_gap, total_variation
from kdlvfm.distillers.synthesizers.priors import attention_layers, centred_patches, inputs_of
from kdlvfm.models.head import EncoderHead
from kdlvfm.models.timm import TimmEncoder

OFF = {field.name: 0.0 for field in dataclasses.fields(Objective) if field.name != "gap"}


def only(**weights):
    return Objective(**{**OFF, **weights})


@pytest.fixture
def images():
    return torch.rand(4, 3, 24, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def step(make_step):
    return make_step(target=None)


@pytest.fixture
def logits(step, images):
    """What the two say of the images, the student in eval mode."""
    student = step.student.eval()(images, ("logits",))["logits"].detach()
    step.student.train()
    return student, step.teacher(images, ("logits",))["logits"]


@pytest.fixture
def vit():
    """A plain ViT with a class token, blocks 0 to 3, and a head without batch normalisation."""
    torch.manual_seed(0)
    arguments = {"depth": 4, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "num_classes": 0}
    return TimmEncoder("vit_tiny_patch16_224", pretrained=False, model_kwargs=arguments)


def test_the_adversarial_term_is_dfads_for_segmentation(step, images, logits):
    terms, _ = only(adversarial=2.0)(step, images, ())
    distance = (logits[0] - logits[1]).abs().mean()
    assert terms.keys() == {"adversarial"}
    torch.testing.assert_close(terms["adversarial"].detach(), -2 * (distance + 1).log())


def test_it_is_0_at_agreement_and_falls_with_distance(step, images, toy_model):
    torch.manual_seed(3)
    twins = toy_model(), toy_model()
    twins[1].load_state_dict(twins[0].state_dict())
    agreeing = dataclasses.replace(step, student=twins[0], teacher=Teacher(twins[1]))
    assert only(adversarial=1.0)(agreeing, images, ())[0]["adversarial"].abs() < 1e-6
    values = []
    for scale in (1.0, 2.0, 4.0):
        with torch.no_grad():
            twins[1].net["head"].bias += scale
        values.append(only(adversarial=1.0)(agreeing, images, ())[0]["adversarial"].item())
    assert 0 > values[0] > values[1] > values[2]


def test_terms_of_the_teachers_classes_are_dafls(step, images, logits):
    terms, _ = only(one_hot=0.5, balance=3.0, activation=0.1)(step, images, ())
    probabilities = logits[1].softmax(dim=1)
    torch.testing.assert_close(terms["one_hot"].detach(), -0.5 * probabilities.max(dim=1).values.log().mean())
    mean = probabilities.mean(dim=(0, 2, 3))
    torch.testing.assert_close(terms["balance"].detach(), 3 * (mean * mean.log()).sum())
    read = step.teacher(images, ("decoder",))["decoder"]
    torch.testing.assert_close(terms["activation"].detach(), -0.1 * read.abs().mean())


def test_balance_is_least_where_all_classes_occur_alike(step, images):
    class Fixed(torch.nn.Module):
        def __init__(self, logits, model):
            super().__init__()
            self.logits, self.model = logits, model

        def forward(self, images, taps, input_grad=False):
            return {"logits": self.logits}

    uniform, one = torch.zeros(4, 5, 2, 2), torch.zeros(4, 5, 2, 2)
    one[:, 2] = 50.0
    values = []
    for found in (uniform, one):
        fixed = dataclasses.replace(step, teacher=Fixed(found, step.teacher.model))
        values.append(only(balance=1.0)(fixed, images, ())[0]["balance"].item())
    assert values == pytest.approx([-torch.tensor(5.0).log().item(), 0.0], abs=1e-5)


def test_statistics_are_those_of_the_teachers_layers(step, images):
    terms, _ = only(bn=2.0)(step, images, ("map.2",))
    x, inputs, norms = images.detach() - 0.5, [], []
    for stage in step.teacher.model.net["stages"]:
        inputs.append(stage[0](x))
        norms.append(stage[1])
        x = stage(x)
    torch.testing.assert_close(terms["bn"].detach(), 2 * statistics_gap(norms, inputs))


def test_entropy_is_of_every_third_attention_of_a_vit(step, images, vit):
    teacher = Teacher(vit)
    layers = attention_layers(vit)
    assert len(layers) == 4
    with torch.no_grad(), inputs_of([layers[0].projection, layers[3].projection]) as inputs:
        vit(images, ("map.3",))
        expected = sum(patch_entropy(layers[i].patches(inputs[layers[i].projection])) for i in (0, 3))
    terms, _ = only(entropy=0.5)(dataclasses.replace(step, teacher=teacher), images, ("map.3",))
    torch.testing.assert_close(terms["entropy"].detach(), -0.5 * expected)


def test_entropy_is_of_centred_maps_where_there_is_no_attention(step, images):
    terms, _ = only(entropy=1.0)(step, images, ())
    last = step.teacher(images, ("map.2",))["map.2"]
    torch.testing.assert_close(terms["entropy"].detach(), -patch_entropy(centred_patches(last)))


def test_variation_is_of_the_images(step, images):
    terms, _ = only(tv=0.01)(step, images, ())
    torch.testing.assert_close(terms["tv"], 0.01 * total_variation(images))


def test_relations_know_no_channels_and_no_scale():
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    rotated = torch.einsum("dc,bchw->bdhw", torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64)).Q, x)
    assert relation_gap(3 * rotated, x) < 1e-12
    a, b = x[:1, :, :1, :2], torch.randn(1, 4, 1, 2, dtype=torch.float64)
    cosines = [F.cosine_similarity(y[0, :, 0, 0], y[0, :, 0, 1], dim=0) for y in (a, b)]
    torch.testing.assert_close(relation_gap(a, b), (cosines[0] - cosines[1]).abs() / 2)


def test_large_maps_are_compared_on_a_smaller_grid():
    x = torch.rand(1, 3, 40, 20)
    resized = F.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(relation_gap(x.flip(1)[:, :2], x), relation_gap(resized.flip(1)[:, :2], resized))


def test_one_pass_of_the_teacher_serves_all(step, images):
    step.teacher.model.calls.clear()
    step.student.calls.clear()
    _, seen = Objective(activation=1.0)(step, images, ("pooled", "logits"))
    assert len(step.teacher.model.calls) == len(step.student.calls) == 1
    assert seen.keys() == {"pooled", "logits"}
    assert not any(value.requires_grad for value in seen.values())


def test_both_networks_are_constants_that_pass_the_gradient_on(step, images):
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (step.student, step.teacher.model)]
    for name in OFF:
        images.grad = None
        terms, _ = only(**{name: 1.0})(step, images, ())
        terms[name].backward()
        assert images.grad.isfinite().all(), name
        assert (images.grad != 0).any(), name
    for network, state in zip((step.student, step.teacher.model), states, strict=True):
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert step.student.training
    assert all(parameter.requires_grad for parameter in step.student.parameters())


def test_terms_are_finite_in_half_precision(step, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, _ = Objective(activation=1.0)(step, images, ())
    total = torch.stack([term.float() for term in terms.values()]).sum()
    total.backward()
    assert total.isfinite()
    assert images.grad.isfinite().all()


def test_what_a_teacher_does_not_offer_is_left_out(step, images, vit):
    bare = dataclasses.replace(step, teacher=Teacher(vit))
    terms, _ = Objective(one_hot=0, balance=0, gap="relations")(bare, images, ())
    assert terms.keys() == {"adversarial", "entropy", "tv"}


def fitting(student, teacher, task, **chosen):
    return Objective.fitting(Context(student, Teacher(teacher), task, 5, 12), **chosen)


def test_it_fits_the_networks(student, toy_model, vit, task):
    own = Objective()
    assert fitting(student, toy_model(), task) == dataclasses.replace(own, entropy=0.0)
    other = {"gap": "relations"}
    assert fitting(student, toy_model(num_classes=7), task) == dataclasses.replace(own, entropy=0.0, **other)
    blind = {**other, "one_hot": 0.0, "balance": 0.0}
    assert fitting(student, vit, task) == dataclasses.replace(own, bn=0.0, **blind)
    with_head = EncoderHead(vit, 5)  # whose batch normalisation has statistics
    assert fitting(student, with_head, task) == dataclasses.replace(own, entropy=0.0)
    assert fitting(student, with_head, task, entropy=2.0, tv=0.0) == dataclasses.replace(own, entropy=2.0, tv=0.0)


def test_what_networks_lack_cannot_be_chosen(student, vit, task):
    for chosen in ({"one_hot": 1.0}, {"balance": 1.0}, {"gap": "logits"}):
        with pytest.raises(TapError, match="has no classes"):
            fitting(student, vit, task, **chosen)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tv": -1.0}, "must not be negative: tv=-1.0"),
        ({"bn": float("nan")}, "must not be negative: bn=nan"),
        (OFF, "all of adversarial, .* are 0"),
        ({"gap": "pixels"}, "gap must be 'logits' or 'relations'"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Objective(**arguments)


def test_a_step_needs_a_teacher(make_step, images):
    with pytest.raises(ValueError, match="this step has none"):
        Objective()(make_step(teacher=None), images, ())
