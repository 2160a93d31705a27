# SPDX-License-Identifier: Apache-2.0
"""Agglomerate against loops and numpy, the dropping of teachers, and ensembles of them."""

import math

import numpy as np
import pytest
import torch

from kdlvfm.core import Teacher
from kdlvfm.core.phi_s import PHISTransform as FromCore
from kdlvfm.distillers import Agglomerate, cosine_smooth_l1_loss
from kdlvfm.distillers.agglomerate import PHISTransform
from kdlvfm.models.ensemble import TeacherEnsemble


def features(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(student, teacher, weight):
    """One image and one position at a time: a list with one loss for each image."""
    losses = []
    for own, other in zip(student, teacher, strict=True):
        vectors = zip(own.reshape(len(own), -1).T.tolist(), other.reshape(len(other), -1).T.tolist(), strict=True)
        angles, lengths = [], []
        for a, b in vectors:
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            angles.append(1 - dot / (math.hypot(*a) * math.hypot(*b)))
            gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
            lengths += [gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps]
        losses.append(weight * np.mean(angles) + (1 - weight) * np.mean(lengths))
    return losses


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (3, 7), (4, 2, 1, 3)])
@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9, 1.0])
def test_function_against_loops(shape, weight):
    student, teacher = features(*shape, seed=1, scale=2.0), features(*shape, seed=2)
    expected = np.mean(reference(student.numpy(), teacher.numpy(), weight))
    assert cosine_smooth_l1_loss(student, teacher, weight).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_zero_at_equality_and_the_scale_matters_only_to_the_smaller_part():
    student, teacher = features(2, 3, 4, 5, seed=1), features(2, 3, 4, 5, seed=2)
    assert cosine_smooth_l1_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert cosine_smooth_l1_loss(2 * teacher, teacher, 1.0).item() == pytest.approx(0, abs=1e-12)
    assert cosine_smooth_l1_loss(2 * teacher, teacher, 0.9).item() > 0
    torch.testing.assert_close(cosine_smooth_l1_loss(-teacher, teacher, 1.0).item(), 2.0)
    for weight in (0.3, 0.9):
        mixed = weight * cosine_smooth_l1_loss(student, teacher, 1.0)
        mixed += (1 - weight) * cosine_smooth_l1_loss(student, teacher, 0.0)
        torch.testing.assert_close(cosine_smooth_l1_loss(student, teacher, weight), mixed)


def test_directions_do_not_change_under_a_rotation_of_the_channels():
    student, teacher = features(2, 6, 4, 5, seed=1), features(2, 6, 4, 5, seed=2)
    rotation = torch.linalg.qr(features(6, 6, seed=3))[0]
    turned = [torch.einsum("oc,bchw->bohw", rotation, x) for x in (student, teacher)]
    torch.testing.assert_close(cosine_smooth_l1_loss(*turned, 1.0), cosine_smooth_l1_loss(student, teacher, 1.0))


def test_gradcheck():
    student, teacher = features(2, 3, 2, 2, seed=1).requires_grad_(), features(2, 3, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: cosine_smooth_l1_loss(x, teacher), (student,), raise_exception=True)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\) \(teacher\)"):
        cosine_smooth_l1_loss(features(2, 3, 4, 4), features(2, 3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_half_precision_at_extreme_values(value, dtype):
    student = torch.full((2, 4, 3, 3), value, dtype=dtype, requires_grad=True)
    loss = cosine_smooth_l1_loss(student, -student.detach())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.9 * 2 + 0.1 * (2 * value - 0.5) if value else 0.9, rel=1e-2)
    assert student.grad.isfinite().all()


def build(**options):
    """Two teachers, the first with two levels; linear projectors and targets as they are, for hand computation."""
    torch.manual_seed(0)
    return Agglomerate(
        [3, 4, 3],
        [5, 2, 6],
        student_taps=["map.-1", "map.0", "map.-1"],
        teacher_taps=["a/map.-1", "a/map.3", "b/map.-1"],
        **{"projector": "linear", "target": "raw", **options},
    ).double()


def inputs(batch=2):
    student = {"map.-1": features(batch, 3, 4, 4, seed=1), "map.0": features(batch, 4, 4, 4, seed=2)}
    teacher = {
        "a/map.-1": features(batch, 5, 4, 4, seed=3),
        "a/map.3": features(batch, 2, 4, 4, seed=4),
        "b/map.-1": features(batch, 6, 4, 4, seed=5, scale=3.0),
    }
    return student, teacher


def losses_by_hand(method, student, teacher):
    """Teachers by images."""
    found = []
    for own, other, aligner in zip(method.student_taps, method.teacher_taps, method.aligners, strict=True):
        weight = aligner.projector.weight.detach().numpy()[:, :, 0, 0]
        projected = np.einsum("oc,bchw->bohw", weight, student[own].numpy())
        projected += aligner.projector.bias.detach().numpy()[:, None, None]
        found.append(reference(projected, teacher[other].numpy(), method.cosine_weight))
    return np.array([np.mean(found[:2], axis=0), found[2]])


def test_without_dropping_it_is_the_mean_over_teachers_of_the_mean_over_their_taps():
    method, (student, teacher) = build(teacher_drop=0.0, loss_weight=3.0, cosine_weight=0.7), inputs()
    terms = method(student, teacher)
    expected = 3 * losses_by_hand(method, student, teacher).mean(axis=1) / 2
    assert list(terms) == ["agglomerate_a", "agglomerate_b"]
    assert [term.item() for term in terms.values()] == pytest.approx(expected.tolist(), rel=1e-9)


def test_an_image_always_hears_its_worst_teacher_and_others_by_chance():
    method, (student, teacher) = build(teacher_drop=0.5), inputs(batch=64)
    # The second teacher is the worse of the two for every other image.
    teacher["b/map.-1"][::2] *= 0.01
    torch.manual_seed(7)
    terms = method(student, teacher)
    losses = losses_by_hand(method, student, teacher)
    torch.manual_seed(7)
    heard = torch.rand(2, 64, dtype=torch.float64).numpy() >= 0.5
    heard[losses.argmax(axis=0), np.arange(64)] = True
    assert len(set(losses.argmax(axis=0))) == 2
    assert not heard.all()
    expected = (losses * heard).sum(axis=1) / heard.sum()
    assert [term.item() for term in terms.values()] == pytest.approx(expected.tolist(), rel=1e-9)


def test_with_certain_dropping_every_image_hears_its_worst_teacher_alone():
    method, (student, teacher) = build(teacher_drop=1.0), inputs(batch=8)
    total = sum(method(student, teacher).values())
    assert total.item() == pytest.approx(losses_by_hand(method, student, teacher).max(axis=0).mean(), rel=1e-9)


def test_a_teacher_that_nobody_hears_stays_in_the_graph():
    method, (student, teacher) = build(teacher_drop=1.0), inputs()
    teacher["b/map.-1"] = teacher["b/map.-1"] + 50
    terms = method(student, teacher)
    assert terms["agglomerate_a"].item() == 0
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_nothing_is_dropped_in_evaluation_or_of_a_single_teacher():
    method, (student, teacher) = build(teacher_drop=1.0).eval(), inputs()
    expected = losses_by_hand(method, student, teacher).mean()
    assert sum(method(student, teacher).values()).item() == pytest.approx(expected, rel=1e-9)
    alone = Agglomerate([3], [5], teacher_drop=1.0, projector="linear", target="raw").double()
    terms = alone(student, {"map.-1": teacher["a/map.-1"]})
    projected = alone.aligners[0].projector(student["map.-1"])
    assert list(terms) == ["agglomerate"]
    torch.testing.assert_close(terms["agglomerate"], cosine_smooth_l1_loss(projected, teacher["a/map.-1"]))


@pytest.mark.parametrize("target", ["standardize", "layernorm", "ema"])
def test_the_scale_of_a_teacher_does_not_matter_once_it_is_normalised(target):
    method, (student, teacher) = build(teacher_drop=0.0, target=target), inputs()
    plain = {tap: value.clone() for tap, value in teacher.items()}
    scaled = {tap: 100 * value for tap, value in teacher.items()}
    other = build(teacher_drop=0.0, target=target)
    torch.testing.assert_close(method(student, plain), other(student, scaled), rtol=1e-3, atol=0)


def test_phi_s_is_fitted_to_each_teacher():
    method, (student, teacher) = build(target="phi_s"), inputs(batch=8)
    method(student, teacher)
    for tap, aligner in zip(method.teacher_taps, method.aligners, strict=True):
        expected = PHISTransform(teacher[tap].shape[1]).double().fit(teacher[tap])
        torch.testing.assert_close(aligner.targets(teacher[tap]), expected(teacher[tap]), rtol=1e-4, atol=1e-5)


def test_pooled_features_of_student_and_teacher():
    method = Agglomerate(
        [3, 3], [5, 5], student_taps=["map.-1", "pooled"], teacher_taps=["a/map.-1", "a/pooled"], target="raw"
    ).double()
    student = {"map.-1": features(2, 3, 4, 4, seed=1), "pooled": features(2, 3, seed=2).requires_grad_()}
    terms = method(student, {"a/map.-1": features(2, 5, 2, 2, seed=3), "a/pooled": features(2, 5, seed=4)})
    terms["agglomerate_a"].backward()
    assert (student["pooled"].grad != 0).any()


def test_student_and_projectors_get_a_gradient_and_the_teachers_none():
    method, (student, teacher) = build(teacher_drop=0.0, target="standardize"), inputs()
    for value in (*student.values(), *teacher.values()):
        value.requires_grad_()
    sum(method(student, teacher).values()).backward()
    assert all((value.grad != 0).any() for value in student.values())
    assert all((parameter.grad != 0).any() for parameter in method.parameters())
    assert all(value.grad is None for value in teacher.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_autocast_with_constant_teachers(dtype, batch):
    method = Agglomerate([3, 3], [5, 6], student_taps=["map.-1"] * 2, teacher_taps=["a/m", "b/m"], target="ema")
    student = torch.ones(batch, 3, 2, 2, dtype=dtype, requires_grad=True)
    teacher = {"a/m": torch.full((batch, 5, 4, 4), 1e4, dtype=dtype), "b/m": torch.zeros(batch, 6, 1, 1, dtype=dtype)}
    with torch.autocast("cpu", dtype=dtype):
        terms = method({"map.-1": student}, teacher)
    sum(terms.values()).backward()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert all(parameter.grad.isfinite().all() for parameter in method.parameters())


def test_bad_arguments():
    with pytest.raises(ValueError, match="2 teacher_dims"):
        Agglomerate([3], [5, 6])
    with pytest.raises(ValueError, match="teacher_drop must be from 0 to 1"):
        Agglomerate([3], [5], teacher_drop=1.5)
    with pytest.raises(ValueError, match="cosine_weight must be from 0 to 1"):
        Agglomerate([3], [5], cosine_weight=-1)


def test_from_context_takes_the_last_map_of_every_teacher(context, toy_model, teacher):
    plain = Agglomerate.from_context(context)
    assert (plain.student_taps, plain.teacher_taps) == (("map.-1",), ("map.-1",))
    ensemble = Teacher(TeacherEnsemble({"a": teacher, "b": Teacher(toy_model(dims=(2, 3, 5)))}))
    several = type(context)(context.student, ensemble, context.task, num_classes=5, num_samples=12)
    method = Agglomerate.from_context(several)
    assert method.teacher_taps == ("a/map.-1", "b/map.-1")
    assert method.student_taps == ("map.-1", "map.-1")
    assert [aligner.targets.phi_s.mean.numel() for aligner in method.aligners] == [12, 5]
    chosen = Agglomerate.from_context(several, teacher_taps=["b/map.0", "b/decoder"], student_taps=["map.0", "map.1"])
    assert chosen.aligners[1].projector[0].weight.shape[:2] == (10, 6)
    with pytest.raises(ValueError, match="1 student_taps"):
        Agglomerate.from_context(several, student_taps=["map.0"])


def test_steps_on_an_ensemble(context, toy_model, teacher, make_step):
    ensemble = Teacher(TeacherEnsemble({"a": teacher, "b": Teacher(toy_model(dims=(2, 3, 5)), input_size=40)}))
    several = type(context)(context.student, ensemble, context.task, num_classes=5, num_samples=12)
    method = Agglomerate.from_context(several)
    (update,) = method.updates(make_step(teacher=ensemble))
    assert list(update.distillation) == ["agglomerate_a", "agglomerate_b"]
    sum(update.terms.values()).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_the_transform_is_the_one_of_the_core():
    assert PHISTransform is FromCore
