# SPDX-License-Identifier: Apache-2.0
"""Distillation without data: no synthesiser and no method sees the batch, and the teacher is shown each image once."""

import copy
from functools import partial

import pytest
import torch

from kdlvfm.cli.build import build_distiller
from kdlvfm.cli.config import compose, options
from kdlvfm.cli.list import read_about
from kdlvfm.core import Context, Distiller, Teacher
from kdlvfm.core.synthesizer import GROUP
from kdlvfm.distillers import CWD, DKD, KD, SCKD, Baseline, Compose, DataFree, FitNet
from kdlvfm.distillers.kd import kd_loss
from kdlvfm.distillers.synthesizers import ImageGenerator, ImagePool, Noise, Surrogate

PHOTOGRAPHS = torch.randint(0, 256, (6, 3, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
SYNTHESIZERS = {
    "generator": partial(ImageGenerator, (24, 32), latent=8, width=4, every=2),
    "pool": partial(ImagePool, 8, (24, 32), max_age=3),
    "surrogate": partial(Surrogate, PHOTOGRAPHS),
    "noise": Noise,
}


@pytest.fixture(params=SYNTHESIZERS)
def make_synthesizer(request):
    def make():
        torch.manual_seed(11)
        return SYNTHESIZERS[request.param]()

    return make


@pytest.fixture
def fitnet():
    torch.manual_seed(4)
    return FitNet(8, 12)


def total(terms):
    return torch.stack([term.float() for term in terms.values()]).sum()


def take(method, step, seed=5):
    """All updates of a step as plain numbers, each with the gradients it gives the student, without moving anything."""
    torch.manual_seed(seed)
    taken = []
    for update in method.updates(step):
        parameters = [p for group in method.parameter_groups(step.student).values() for p in group]
        gradients = torch.autograd.grad(total(update.terms), parameters, allow_unused=True)
        numbers = {name: term.item() for name, term in update.terms.items()}
        taken.append((update.group, tuple(update.task_terms), numbers, [g for g in gradients if g is not None]))
    return taken


@pytest.mark.parametrize("labels", ["none", "teacher"])
def test_the_batch_is_not_looked_at(make_synthesizer, make_step, student, batch, fitnet, labels):
    """A batch of NaN with another's labels leads to the same bits."""
    runs = []
    spoilt = {
        "images": torch.full_like(batch["image"], torch.nan),
        "target": torch.full_like(batch["mask"], 4),
        "index": torch.tensor([9, 9, 9, 9]),
    }
    for changes in ({}, spoilt):
        networks = copy.deepcopy(student)
        method = DataFree(Compose({"kd": KD(), "fitnet": copy.deepcopy(fitnet)}), make_synthesizer(), labels=labels)
        runs.append([take(method, make_step(student=networks, number=n, **changes)) for n in range(4)])
    for one, other in zip(*runs, strict=True):
        assert [update[:3] for update in one] == [update[:3] for update in other]
        for (*_, gradients), (*_, others) in zip(one, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_synthesizer_is_given_sizes_and_nothing_else(make_step, batch):
    given = []

    class Watching(Noise):
        def synthesize(self, step, taps):
            given.append((step, tuple(taps)))
            return super().synthesize(step, taps)

    step = make_step()
    list(DataFree(KD(), Watching()).updates(step))
    ((seen, taps),) = given
    assert seen.images.shape == batch["image"].shape
    assert not seen.images.any()
    assert seen.target is None
    assert seen.index.tolist() == [-1] * 4
    assert not seen.seen.student
    assert not seen.seen.teacher
    assert taps == ("logits",)


def test_the_student_learns_from_the_images_that_were_made(make_step, student, teacher):
    torch.manual_seed(5)
    images = torch.rand(4, 3, 24, 32)
    torch.manual_seed(5)
    (update,) = DataFree(KD(temperature=2.0), Noise()).updates(make_step())
    expected = kd_loss(student(images, ["logits"])["logits"], teacher(images, ["logits"])["logits"], 2.0)
    assert update.group == "student"
    assert not update.task_terms
    assert update.terms.keys() == {"kd"}
    torch.testing.assert_close(update.terms["kd"], expected)


def test_the_teacher_looks_once_in_each_step(make_synthesizer, make_step, teacher, fitnet):
    method = DataFree(Compose({"kd": KD(), "cwd": CWD(), "fitnet": fitnet}), make_synthesizer())
    for number in range(4):
        teacher.model.calls.clear()
        updates = take(method, make_step(number=number))
        assert [update[0] for update in updates].count("student") == 1
        assert len(teacher.model.calls) == 1


def test_synthesis_leaves_both_networks_as_they_were(make_synthesizer, make_step, student, teacher):
    """What the student's own pass moves is its statistics; those of the synthesiser's passes would be on top."""
    method = DataFree(KD(), make_synthesizer())
    frozen = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    for number in range(3):
        before = {key: value.clone() for key, value in student.state_dict().items()}
        take(method, make_step(number=number))
        counted = [key for key in before if "num_batches_tracked" in key]
        assert counted
        for key, value in student.state_dict().items():
            if key in counted:
                assert value == before[key] + 1
            elif "running" not in key:
                assert torch.equal(value, before[key])
    assert all(torch.equal(value, frozen[key]) for key, value in teacher.model.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())


def test_groups_are_the_methods_and_the_synthesizers(student, fitnet):
    groups = DataFree(fitnet, SYNTHESIZERS["generator"]()).parameter_groups(student)
    assert groups.keys() == {"student", GROUP}
    assert len(groups["student"]) == len(list(student.parameters())) + len(list(fitnet.parameters()))
    for name in ("pool", "noise", "surrogate"):
        assert DataFree(KD(), SYNTHESIZERS[name]()).parameter_groups(student).keys() == {"student"}


def test_the_teacher_may_label(make_step, student, teacher):
    torch.manual_seed(5)
    images = torch.rand(4, 3, 24, 32)
    probabilities = teacher(images, ["logits"])["logits"].softmax(1)
    least = probabilities.max(1).values.median().item()
    torch.manual_seed(5)
    (update,) = DataFree(Baseline(), Noise(), labels="teacher", confidence=least).updates(make_step())
    labels = probabilities.argmax(1).where(probabilities.max(1).values >= least, -1)
    assert 0.4 < (labels == -1).float().mean() < 0.6
    expected = make_step().task.loss(student, student(images, ["logits"]), labels)["cross_entropy"]
    assert tuple(update.task_terms) == ("cross_entropy",)
    torch.testing.assert_close(update.terms["cross_entropy"], expected)


def test_with_labels_a_method_may_need_truth(make_step):
    (update,) = DataFree(DKD(), Noise(), labels="teacher").updates(make_step())
    assert "cross_entropy" in update.terms
    assert update.distillation
    assert all(term.isfinite() for term in update.terms.values())


ZOO = [name for name in options("distiller") if name not in ("none", "data_free", "deit")]


def built(name, context):
    return build_distiller(compose([f"distiller={name}"])["distiller"], context)


@pytest.mark.parametrize("name", [name for name in ZOO if "segmentation" in read_about("distiller", name)["tasks"]])
def test_every_method_of_segmentation_does_without_truth_or_is_refused(name, context, make_step):
    method = built(name, context)
    if method.needs_truth:
        with pytest.raises(ValueError, match="needs ground truth, and synthetic images have none") as error:
            DataFree(method, Noise())
        assert "\n" not in str(error.value)
        return
    updates = list(DataFree(method, Noise()).updates(make_step()))
    assert updates
    assert all(update.terms and not update.task_terms for update in updates)
    assert all(term.isfinite() for update in updates for term in update.terms.values())


@pytest.mark.parametrize("name", [name for name in ZOO if "detection" in read_about("distiller", name)["tasks"]])
def test_every_method_of_detection_does_without_boxes_or_is_refused(
    name, detection_context, detection_batch, detector, detector_teacher, detection_task, make_step
):
    method = built(name, detection_context)
    if method.needs_truth:
        with pytest.raises(ValueError, match="needs ground truth"):
            DataFree(method, Noise())
        return
    networks = {"student": detector, "teacher": detector_teacher, "task": detection_task}
    step = make_step(images=detection_batch["image"], target=detection_batch["boxes"], **networks)
    updates = list(DataFree(method, Noise()).updates(step))
    assert updates
    assert all(term.isfinite() for update in updates for term in update.terms.values())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: Compose({"kd": KD(), "dkd": DKD()}), "Compose needs ground truth"),
        (lambda: Compose({"kd": KD()}, {"kd": {"share": 0.1}}), "Compose needs ground truth"),
        (lambda: SCKD({"kd": KD()}), "SCKD needs ground truth"),
        (Baseline, "Baseline reads nothing of the teacher"),
    ],
)
def test_what_cannot_be_learned_from_synthetic_images_is_refused(method, words):
    with pytest.raises(ValueError, match=words):
        DataFree(method(), Noise())
    assert DataFree(method(), Noise(), labels="teacher")


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="labels must be"):
        DataFree(KD(), Noise(), labels="truth")
    with pytest.raises(ValueError, match="confidence is a probability"):
        DataFree(KD(), Noise(), labels="teacher", confidence=1.0)


def test_it_is_built_of_one_method_or_of_several(context):
    def build(parts, **settings):
        return DataFree.from_context(context, parts, lambda context: Noise(), **settings)

    kd, cwd = (lambda context: KD(), lambda context: CWD())
    assert isinstance(build({"kd": kd}).distiller, KD)
    assert list(build({"kd": kd, "cwd": cwd}, weights={"cwd": 0.5}).distiller.weights) == ["kd", "cwd"]
    assert build({"kd": kd}, weights={"kd": 2.0}).distiller.weights["kd"].value == 2
    with pytest.raises(ValueError, match="must be parts"):
        build({})
    with pytest.raises(ValueError, match="'kd' is no method"):
        build({"kd": {"temperature": 2}})
    with pytest.raises(ValueError, match="needs a synthesizer"):
        DataFree.from_context(context, {"kd": kd})


def test_the_teacher_does_not_label_boxes(detection_context):
    with pytest.raises(ValueError, match="not with boxes"):
        DataFree.from_context(
            detection_context, {"kd": lambda context: KD()}, lambda context: Noise(), labels="teacher"
        )


def test_real_and_synthetic_images_may_be_joined(make_step, student, teacher, batch):
    method = Compose({"real": KD(), "made": DataFree(KD(), Noise())})
    torch.manual_seed(5)
    images = torch.rand(4, 3, 24, 32)
    torch.manual_seed(5)
    (update,) = method.updates(make_step())
    assert list(update.terms) == ["cross_entropy", "real/kd", "made/kd"]
    made = kd_loss(student(images, ["logits"])["logits"], teacher(images, ["logits"])["logits"])
    torch.testing.assert_close(update.terms["made/kd"], made)


@pytest.mark.parametrize("name", ["pool", "generator"])
def test_a_teacher_without_classes_will_do(name, toy_model, make_step, student, task, fitnet):
    blind = Teacher(toy_model(dims=(7, 9, 12), num_classes=0))
    context = Context(student, blind, task, 5, 12, batch_shape=(4, 24, 32))
    synthesizer = {"pool": ImagePool, "generator": ImageGenerator}[name].from_context(context)
    method = DataFree(fitnet, synthesizer)
    for number in range(5):
        for _, _, numbers, gradients in take(method, make_step(teacher=blind, number=number)):
            assert numbers
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_whole_steps_in_half_precision(make_synthesizer, make_step):
    method = DataFree(KD(), make_synthesizer())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for number in range(3):
            for update in method.updates(make_step(number=number)):
                loss = total(update.terms)
                loss.backward()
                assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_there_must_be_something_to_learn_at_all_times(fitnet):
    weights = {"kd": {"start": 0.5}, "fitnet": {"warmup": 0.1}}
    with pytest.raises(ValueError, match="every part has a weight that is 0 at some time"):
        DataFree(Compose({"kd": KD(), "fitnet": fitnet}, weights), Noise())
    assert DataFree(Compose({"kd": KD(), "fitnet": fitnet}, {"kd": {"start": 0.5}}), Noise())
    assert DataFree(Compose({"kd": KD(), "fitnet": fitnet}, weights), Noise(), labels="teacher")


def test_it_says_what_others_must_know():
    method = DataFree(KD(), Noise())
    assert isinstance(method, Distiller)
    assert method.calls_teacher
    assert method.moves_subsets
    assert DataFree(Baseline(), Noise(), labels="teacher").teacher_taps == ("logits",)
