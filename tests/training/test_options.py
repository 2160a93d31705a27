# SPDX-License-Identifier: Apache-2.0
"""How a student runs while it is trained changes neither what it is nor, but for rounding, what it learns."""

import pytest
import torch

from kdlvfm.core import Teacher
from kdlvfm.distillers import KD, Baseline
from kdlvfm.training.options import check_options, running

TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "precision": "32-true",
    "compile": False,
    "channels_last": False,
}


class Reaching(KD):
    """Says that it wants more of the teacher than its features."""

    calls_teacher = True


@pytest.mark.usefixtures("traced")
def test_the_student_is_what_it_was_before_and_afterwards(small_net):
    student, images = small_net(), torch.rand(2, 3, 8, 8)
    expected, names = student(images, ("logits",))["logits"], list(student.state_dict())
    parameters = list(student.parameters())
    seen = []
    student.register_forward_hook(lambda module, inputs, output: seen.append(type(output["logits"])))
    with running(student, compile=True, channels_last=True):
        assert list(student.state_dict()) == names
        assert all(a is b for a, b in zip(student.parameters(), parameters, strict=True))
        assert parameters[0].is_contiguous(memory_format=torch.channels_last)
        found = student(images, ("logits",))["logits"]
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected)
        # As diagnostics do: several walks through one graph.
        for _ in range(2):
            gradients = torch.autograd.grad(found.sum(), parameters, retain_graph=True)
    assert "forward" not in vars(student)
    assert parameters[0].is_contiguous()
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), parameters), strict=True):
        torch.testing.assert_close(one, other)
    # Called by each pass, and not by the compiler alone.
    student(images, ("logits",))
    assert len(seen) == 2


def test_it_is_so_too_after_a_failure(small_net):
    student = small_net()
    with pytest.raises(RuntimeError, match="training failed"), running(student, compile=True, channels_last=True):
        raise RuntimeError("training failed")
    assert "forward" not in vars(student)
    assert next(student.parameters()).is_contiguous()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("options", [{"channels_last": True}, {"compile": True}], ids=["channels_last", "compile"])
def test_a_run_learns_the_same(make_module, make_data, run_fit, weights_of, options):
    modules = [make_module() for _ in range(2)]
    for module, trainer in zip(modules, ({}, options), strict=True):
        result = run_fit(module, make_data(num_workers=0), folder=str(trainer), trainer=trainer, val_every=3)
        assert result.cost["teacher_share"] is not None
        assert [point["step"] for point in result.curve] == [3, 6]
        assert len(result.diagnostics) == 1
    plain, other = map(weights_of, modules)
    assert list(plain) == list(other)
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-4, atol=1e-5)


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.usefixtures("traced")
def test_a_stopped_run_goes_on_to_the_same_weights(make_module, make_data, run_fit, weights_of, small_net):
    """The compiler's own work, which is then done at another step, draws no random numbers."""

    def run(folder, stop_at=None):
        module = make_module(student=small_net(dropout=0.3))

        def stop(update):
            if module.completed == stop_at:
                raise StopError

        module.observers.append(stop)
        options = {"compile": True, "channels_last": True}
        run_fit(module, make_data(num_workers=0), folder=folder, trainer=options, checkpoint_every=2)
        return weights_of(module)

    whole = run("whole")
    with pytest.raises(StopError):
        run("parts", stop_at=3)
    resumed = run("parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def check(distiller=None, teacher=None, **trainer):
    check_options(distiller or KD(), teacher, {**TRAINER, **trainer})


def test_all_that_goes_together(small_net):
    check(teacher=Teacher(small_net(), batch=1, device="cpu", precision="bf16", channels_last=True))
    check(teacher=Teacher(small_net(), precision="fp32"), precision="bf16-mixed")
    check(Reaching(), Teacher(small_net(), precision="bf16", channels_last=True))
    check(Baseline(), channels_last=True)


@pytest.mark.parametrize(
    ("distiller", "options", "trainer", "message"),
    [
        (Reaching, {"batch": 2}, {}, "Reaching reaches into the teacher's network, .* leave teacher.batch out"),
        (Reaching, {"compile": True, "device": "cpu"}, {}, "leave teacher.compile and run.teacher_device out"),
        (KD, {"device": "cpu"}, {"devices": 2}, "run.teacher_device is for a run of one process"),
        (KD, {"device": "cpu"}, {"num_nodes": 2}, "set trainer.devices=1"),
        (KD, {"precision": "bf16"}, {"precision": "bf16-true"}, "does not go with trainer.precision=bf16-true"),
        (KD, {"precision": "fp16"}, {}, "teacher.precision=fp16 needs a GPU"),
        (KD, {}, {"compile": "yes"}, "trainer.compile must be true or false, not 'yes'"),
        (Baseline, {}, {"channels_last": None}, "trainer.channels_last must be true or false, not None"),
    ],
)
def test_what_does_not(small_net, distiller, options, trainer, message):
    with pytest.raises(ValueError, match=message):
        check(distiller(), Teacher(small_net(), **options), **trainer)


@pytest.mark.parametrize("of_teacher", [True, False])
def test_a_missing_compiler_is_told_in_one_line(small_net, monkeypatch, of_teacher):
    def failing(function):
        del function

        def call(*inputs):
            raise OSError("no g++ was found\nin so many\nlines")

        return call

    teacher = Teacher(small_net(), compile=of_teacher)
    monkeypatch.setattr(torch, "compile", failing)
    message = r"torch.compile does not work here on cpu \(no g\+\+ was found\): it needs a C\+\+ compiler"
    with pytest.raises(ValueError, match=message) as caught:
        check(teacher=teacher, compile=not of_teacher)
    assert "\n" not in str(caught.value)


def test_a_method_without_a_teacher_asks_nothing_of_one(small_net):
    check(Baseline(), Teacher(small_net(), precision="fp16"))
