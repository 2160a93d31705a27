# SPDX-License-Identifier: Apache-2.0
"""Every method, built from its YAML file as in a run, keeps the contract of a distiller on toy networks."""

import copy
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdlvfm.cli import CommandError
from kdlvfm.cli.build import build_distiller
from kdlvfm.cli.config import compose, options
from kdlvfm.cli.list import read_about
from kdlvfm.core import Distiller
from kdlvfm.training.cache.formats import TapFormat
from kdlvfm.training.cache.served import CachedTeacher

BASELINE = "none"
WITHOUT_TERMS = (BASELINE, "synthetic_set")  # whose terms are the task's own
# A YAML file that names no tasks is found, and told so, in test_files.py.
# What teaches without labels teaches masks too; that it does without is shown in tests/tasks/test_representation.py.
CASES = [
    (name, task)
    for name in options("distiller")
    for task in read_about("distiller", name).get("tasks", ())
    if task != "representation"
]
EPOCHS = (0, 1)  # a method may alternate between phases


@functools.cache
def node_of(name):
    return compose([f"distiller={name}"])["distiller"]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def name(case):
    return case[0]


def fitting(request, case, default, **fixtures):
    """What the task of the case has in the place of what is for masks."""
    return request.getfixturevalue(fixtures[case[1]]) if case[1] in fixtures else default


@pytest.fixture
def student(request, case, student):
    return fitting(request, case, student, detection="detector", diffusion="denoiser")


@pytest.fixture
def teacher(request, case, teacher):
    return fitting(request, case, teacher, detection="detector_teacher", diffusion="denoiser_teacher")


@pytest.fixture
def task(request, case, task):
    return fitting(request, case, task, detection="detection_task", diffusion="diffusion_task")


@pytest.fixture
def batch(request, case, batch):
    return fitting(request, case, batch, detection="detection_batch", diffusion="diffusion_batch")


@pytest.fixture
def context(context, batch):
    return replace(context, batch_shape=(4, *batch["image"].shape[2:]))


@pytest.fixture
def target(task, batch):
    return task.unpack(batch)[1]


@pytest.fixture
def nothing(case, target):
    """The target of images without labels."""
    if case[1] == "diffusion":
        return target
    if case[1] == "segmentation":
        return torch.full_like(target, -1)
    return [{**image, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for image in target]


@pytest.fixture
def node(name):
    return node_of(name)


@pytest.fixture
def build(node, context):
    """A factory of distillers with their own initial weights."""

    def make(seed=0):
        torch.manual_seed(seed)
        distiller = build_distiller(node, context)
        assert isinstance(distiller, Distiller)
        return distiller

    return make


@pytest.fixture
def seen(student, teacher, batch):
    """What a distiller reads, as plain tensors without a graph; the teacher's could take a gradient."""

    def features(distiller, dtype=torch.float32):
        with torch.no_grad():
            from_student = student(batch["image"], distiller.student_taps)
            from_teacher = teacher(batch["image"], distiller.teacher_taps)
        return tuple(
            {tap: value.detach().clone().to(dtype).requires_grad_() for tap, value in features.items()}
            for features in (from_student, from_teacher)
        )

    return features


def total(terms):
    """The sum of the terms; a sum of none is a constant."""
    return torch.stack([torch.zeros(()), *(term.float() for term in terms.values())]).sum()


def check(terms):
    for name, term in terms.items():
        assert isinstance(name, str)
        assert name
        assert term.shape == ()
        assert term.isfinite()
        assert term.dtype == torch.float32


def backward(terms):
    if terms:
        total(terms).backward()


def test_the_files_are_found():
    assert {(BASELINE, "segmentation"), (BASELINE, "detection")} < set(CASES)


def test_taps_are_names_that_the_networks_have(build, student, teacher):
    distiller = build()
    for taps, model in ((distiller.student_taps, student), (distiller.teacher_taps, teacher)):
        assert isinstance(taps, tuple)
        for tap in taps:
            model.tap_info(tap)


def test_plain_tensors_give_finite_named_scalars(name, build, seen, target, nothing):
    distiller = build()
    for labels in (target, nothing):
        terms = distiller(*seen(distiller), labels)
        check(terms)
        assert bool(terms) == (name not in WITHOUT_TERMS)


def test_gradient_reaches_what_is_read_of_the_student_and_nothing_of_the_teacher(name, build, seen, target):
    distiller = build()
    from_student, from_teacher = seen(distiller)
    backward(distiller(from_student, from_teacher, target))
    assert all(value.grad is None for value in from_teacher.values())
    reached = [value.grad for value in from_student.values() if value.grad is not None]
    assert all(grad.isfinite().all() for grad in reached)
    assert any((grad != 0).any() for grad in reached) == (name not in WITHOUT_TERMS)


def test_inputs_are_left_as_they_were(build, seen, target):
    distiller = build()
    features = seen(distiller)
    before = copy.deepcopy([{tap: value.detach() for tap, value in half.items()} for half in features])
    labels = copy.deepcopy(target)
    distiller(*features, target)
    torch.testing.assert_close(target, labels, rtol=0, atol=0)
    for half, kept in zip(features, before, strict=True):
        assert all(torch.equal(half[tap], kept[tap]) for tap in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_under_autocast(build, seen, target, dtype):
    distiller = build()
    from_student, from_teacher = seen(distiller, dtype)
    with torch.autocast("cpu", dtype=dtype):
        terms = distiller(from_student, from_teacher, target)
    check(terms)
    backward(terms)
    reached = [*from_student.values(), *distiller.parameters()]
    assert all(value.grad.isfinite().all() for value in reached if value.grad is not None)


def test_whole_step_under_autocast(build, make_step):
    distiller = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for update in distiller.updates(make_step()):
            assert all(term.shape == () and term.isfinite() for term in update.terms.values())
            backward(update.terms)


def test_distillation_moves_the_student_by_itself(name, build, student, teacher, batch, target):
    distiller = build()
    features = student(batch["image"], distiller.student_taps)
    backward(distiller(features, teacher(batch["image"], distiller.teacher_taps), target))
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert all(grad.isfinite().all() for grad in gradients)
    assert any((grad != 0).any() for grad in gradients) == (name not in WITHOUT_TERMS)


def test_groups_hold_every_trainable_parameter_once(build, student):
    next(student.parameters()).requires_grad_(False)
    distiller = build()
    groups = distiller.parameter_groups(student)
    assert "student" in groups
    held = [id(parameter) for group in groups.values() for parameter in group]
    trainable = {id(p) for model in (student, distiller) for p in model.parameters() if p.requires_grad}
    assert len(held) == len(set(held))
    assert set(held) == trainable


def test_steps_are_taken_and_touch_nothing_of_the_teacher(build, make_step, student, teacher, case):
    distiller = build()
    groups = distiller.parameter_groups(student)
    constant = copy.deepcopy(teacher.model.state_dict())
    trained = set()
    for epoch in EPOCHS:
        taken = 0
        for update in distiller.updates(make_step(epoch=epoch)):
            assert update.terms
            assert all(term.shape == () and term.isfinite() for term in update.terms.values())
            total(update.terms).backward()
            taken += 1
            for parameter in groups[update.group]:
                if parameter.grad is not None:
                    trained.add(id(parameter))
                    parameter.data -= 1e-3 * parameter.grad
            for parameter in (*student.parameters(), *distiller.parameters()):
                parameter.grad = None
        assert taken >= 1
    every = {id(parameter) for group in groups.values() for parameter in group}
    assert trained == every or (case == ("data_free", "detection") and trained < every)  # nothing teaches boxes there
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert all(torch.equal(constant[key], value) for key, value in teacher.model.state_dict().items())
    assert not any(module.training for module in teacher.model.modules())


def test_stored_features_serve_every_method_that_does_not_say_otherwise(build, make_step, teacher, task, batch):
    """Of the teacher nothing is left but its features of the step's images: its weights are no numbers any more."""
    distiller = build()
    if distiller.calls_teacher:
        pytest.skip("it wants more of the teacher, and says so")
    images = task.unpack(batch)[0]
    features = teacher(images, distiller.teacher_taps)
    formats = [TapFormat.of(tap, value, "fp32") for tap, value in features.items()]
    stand_in = CachedTeacher(teacher, formats)
    with torch.no_grad():
        for tensor in (*teacher.model.parameters(), *teacher.model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
    stand_in.hold(images, {format.tap: format.encode(features[format.tap]) for format in formats})
    for epoch in EPOCHS:
        for update in distiller.updates(make_step(teacher=stand_in, epoch=epoch)):
            assert all(term.isfinite() for term in update.terms.values())


def test_a_checkpoint_holds_all_that_a_distiller_has_learned(build, seen, make_step, target, tmp_path: Path):
    first, second = build(seed=0), build(seed=1)
    for update in first.updates(make_step()):
        backward(update.terms)
        with torch.no_grad():
            for parameter in first.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    torch.save(first.state_dict(), tmp_path / "distiller.pt")
    second.load_state_dict(torch.load(tmp_path / "distiller.pt", weights_only=True))
    results = []
    for distiller in (first, second):
        torch.manual_seed(5)
        results.append(distiller(*seen(distiller), target))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][term], results[1][term]) for term in results[0])


def test_a_wrong_argument_is_refused(node, context):
    with pytest.raises(CommandError, match="no_such_argument"):
        build_distiller({**node, "no_such_argument": 1}, context)
