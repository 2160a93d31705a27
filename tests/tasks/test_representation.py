# SPDX-License-Identifier: Apache-2.0
"""The share of a teacher's features that a student's hold, against scikit-learn; which methods teach without labels."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from kdlvfm.cli.build import build_distiller, check_teaching
from kdlvfm.cli.config import compose, options
from kdlvfm.cli.list import read_about
from kdlvfm.core import Context, Teacher
from kdlvfm.models.ensemble import TeacherEnsemble
from kdlvfm.tasks.representation import Representation

METHODS = [name for name in options("distiller") if "representation" in read_about("distiller", name)["tasks"]]
RIDGE = 0.01


@functools.cache
def node_of(name):
    return compose([f"distiller={name}"])["distiller"]


@pytest.fixture
def encoder(toy_model):
    torch.manual_seed(1)
    return toy_model(num_classes=0)


@pytest.fixture
def judge(toy_model):
    torch.manual_seed(2)
    return Teacher(toy_model(dims=(7, 9, 12), strides=(4, 1, 1), num_classes=0))


@pytest.fixture
def representation(judge):
    return Representation(0, judge=judge)


def batch_of(count, first=0, repeated=()):
    generator = torch.Generator().manual_seed(first)
    return {
        "image": torch.rand(count, 3, 32, 32, generator=generator),
        "index": torch.arange(first, first + count),
        "repeated": torch.tensor([i in repeated for i in range(count)]),
    }


def measured(task, student, *batches):
    metrics = task.metrics()
    with torch.no_grad():
        for batch in batches:
            images, target, _ = task.unpack(batch)
            features = student.eval()(images, task.student_taps(student))
            metrics.update(task.predict(student, features, target), target)
    return {name: value.item() for name, value in metrics.compute().items()}


def test_it_is_the_r2_of_a_ridge_regression_on_the_other_half_of_the_images(representation, encoder, judge):
    batches = batch_of(5), batch_of(6, first=5)
    index = torch.cat([batch["index"] for batch in batches])
    images = torch.cat([batch["image"] for batch in batches])
    with torch.no_grad():
        x = torch.nn.functional.interpolate(encoder.eval()(images, ["map.-1"])["map.-1"], (8, 8), mode="bilinear")
        y = judge(images, ["map.-1"])["map.-1"]
    errors, spreads = np.zeros(12), np.zeros(12)
    for half in (0, 1):
        (x1, y1), (x2, y2) = (
            [m[index % 2 == h].movedim(1, -1).reshape(-1, m.shape[1]).double().numpy() for m in (x, y)]
            for h in (half, 1 - half)
        )
        strength = RIDGE * ((x1 - x1.mean(0)) ** 2).sum(0).mean()
        found = Ridge(alpha=strength).fit(x1, y1).predict(x2)
        errors += ((y2 - found) ** 2).sum(0)
        spreads += ((y2 - y1.mean(0)) ** 2).sum(0)
    assert measured(representation, encoder, *batches) == {"teacher_r2": pytest.approx((1 - errors / spreads).mean())}


def test_a_linear_map_of_the_teachers_own_features_holds_all_and_noise_holds_nothing(representation, judge):
    metrics, noise = representation.metrics(), representation.metrics()
    mix = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    for batch in (batch_of(16), batch_of(16, first=16)):
        own = judge(batch["image"], ["map.-1"])["map.-1"]
        metrics.update(torch.einsum("bchw,cd->bdhw", 100 * own, mix) + 7, batch)
        noise.update(torch.randn(own.shape, generator=torch.Generator().manual_seed(1)), batch)
    assert metrics.compute()["teacher_r2"] > 0.9
    assert abs(noise.compute()["teacher_r2"]) < 0.05


def test_neither_batches_nor_repeated_images_matter_nor_the_scale_of_a_channel(representation, encoder, judge):
    whole = measured(representation, encoder, batch_of(8))
    halves = [{key: value[part] for key, value in batch_of(8).items()} for part in (slice(0, 3), slice(3, 8))]
    assert measured(representation, encoder, *halves) == pytest.approx(whole)
    more = {key: torch.cat([value, value[-2:]]) for key, value in batch_of(8).items()}
    more["repeated"][8:] = True
    assert measured(representation, encoder, more) == pytest.approx(whole)
    with torch.no_grad():
        judge.model.net["stages"][-1][1].train(False)
        judge.model.net["stages"][-1].append(torch.nn.Conv2d(12, 12, 1, bias=False))
        judge.model.net["stages"][-1][-1].weight.copy_(torch.diag(torch.logspace(-2, 2, 12))[..., None, None])
    assert measured(representation, encoder, batch_of(8)) == pytest.approx(whole, rel=1e-3)


def test_without_images_in_both_halves_nothing_is_defined(representation, encoder):
    assert np.isnan(measured(representation, encoder, batch_of(1))["teacher_r2"])


def test_of_an_ensemble_each_member_counts_alike(toy_model, encoder, judge):
    torch.manual_seed(3)
    other = Teacher(toy_model(num_classes=0))
    joint = Representation(0, judge=Teacher(TeacherEnsemble({"a": judge, "b": other})))
    assert joint.judge_taps == ("a/map.2", "b/map.2")
    found = measured(joint, encoder, batch_of(8))
    for name, member in {"a": judge, "b": other}.items():
        alone = measured(Representation(0, judge=member), encoder, batch_of(8))["teacher_r2"]
        assert found[f"r2/{name}/map.2"] == pytest.approx(alone)
    assert found["teacher_r2"] == pytest.approx((found["r2/a/map.2"] + found["r2/b/map.2"]) / 2)


def test_a_training_batch_has_no_target_and_the_task_no_terms(representation, encoder):
    batch = batch_of(2)
    assert representation.unpack(batch)[1] is batch
    del batch["repeated"]
    assert representation.unpack(batch)[1] is None
    assert representation.loss(encoder, {}, None) == {}
    assert not representation.solves(encoder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"judge": None}, "need a teacher"),
        ({"judge_taps": ["pooled"]}, "pooled is not"),
        ({"judge_taps": ["map.7"]}, r"has no tap 'map\.7'"),
        ({"ridge": 0.0}, "ridge must be above 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(judge, arguments, message):
    with pytest.raises(ValueError, match=message):
        Representation(0, **{"judge": judge, **arguments})


def test_features_without_a_place_cannot_be_measured(judge, encoder):
    with pytest.raises(ValueError, match="tokens is not"):
        Representation(0, judge=judge, student_tap="tokens").student_taps(encoder)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_says_so_teaches_an_encoder_from_an_encoder(name, representation, encoder, judge, make_step):
    context = Context(encoder, judge, representation, num_classes=0, num_samples=12, batch_shape=(4, 24, 32))
    torch.manual_seed(0)
    distiller = build_distiller(node_of(name), context) if name != "compose" else two_parts(context)
    check_teaching(distiller, representation)
    step = replace(make_step(student=encoder, teacher=judge, task=representation), target=None)
    updates = 0
    for update in distiller.updates(step):
        assert update.terms
        assert not update.task_terms
        torch.stack([*update.terms.values()]).sum().backward()
        updates += 1
    assert updates
    assert any(p.grad is not None and (p.grad != 0).any() for p in encoder.parameters())


def two_parts(context):
    return build_distiller(compose(["distiller=fitnet+gram"])["distiller"], context)


@pytest.mark.parametrize("name", ["ifvd", "none"])
def test_a_method_that_has_nothing_to_teach_without_labels_is_refused(name, representation, context):
    from kdlvfm.cli import CommandError

    distiller = build_distiller(node_of(name), context)
    with pytest.raises(CommandError, match="without labels there is nothing else to learn from"):
        check_teaching(distiller, representation)
