# SPDX-License-Identifier: Apache-2.0
import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlvfm.core import Distiller, TapError, Teacher, Update
from kdlvfm.data.transforms import Augmentation
from kdlvfm.distillers import KD, Baseline
from kdlvfm.tasks.segmentation import Segmentation
from kdlvfm.training.fit import check_fit, check_schedule, evaluate

STEPS = 9


class CrashError(Exception):
    """Stands for a kill: nothing in the library catches it."""


class Crashing(Segmentation):
    """Fails, or sends this process a signal, at one training step or one batch of validation."""

    def __init__(self, *, at_step=None, at_validation=None, number=None):
        super().__init__(3)
        self._left = {"loss": at_step, "predict": at_validation}
        self._number = number

    def _count(self, what):
        if self._left[what] is not None:
            self._left[what] -= 1
            if self._left[what] == 0:
                if self._number is None:
                    raise CrashError
                os.kill(os.getpid(), self._number)

    def loss(self, student, features, target):
        self._count("loss")
        return super().loss(student, features, target)

    def predict(self, student, features, target):
        self._count("predict")
        return super().predict(student, features, target)


class Alternating(Distiller):
    """Two epochs for the student, one for a bias, with a memory written after each step; epochs have two batches."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))
        self.register_buffer("memory", torch.zeros(()))

    def forward(self, student, teacher, target=None):
        return {"bias": F.cross_entropy(student["logits"] + self.bias, target, ignore_index=255) + self.memory}

    def parameter_groups(self, student):
        return {"student": list(student.parameters()), "bias": [self.bias]}

    def updates(self, step):
        features = step.student(step.images, ["logits"])
        group = "bias" if step.epoch % 3 == 2 else "student"
        yield Update({**self(features, {}, step.target), **step.task.loss(step.student, features, step.target)}, group)
        self.memory += features["logits"].detach().mean()


@pytest.fixture
def run_once(make_module, make_data, small_net, run_fit):
    """One start of a run with everything random in play: dropout, flips, the order of samples."""

    def run(folder, method=KD, task=None, accumulate=1, **settings):
        module = make_module(
            steps=STEPS,
            student=small_net(dropout=0.3),
            distiller=method(),
            task=task or Segmentation(3),
            accumulate=accumulate,
            batches_per_epoch=2,
        )
        data = make_data(steps=STEPS, augmentation=Augmentation(scale=(0.8, 1.2), crop=(8, 8), flip=0.5))
        return module, run_fit(module, data, folder, **settings)

    return run


def assert_same_state(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("at_step", [1, 2, 4, 5, 6, 9])
@pytest.mark.parametrize(
    ("method", "accumulate"), [(KD, 1), (KD, 2), (Alternating, 1), (Alternating, 3)], ids=lambda value: str(value)
)
def test_a_crashed_run_resumes_to_the_same_bits(method, accumulate, at_step, run_once):
    settings = {"method": method, "accumulate": accumulate, "checkpoint_every": 3, "val_every": 2}
    whole, expected = run_once("whole", **settings)
    with pytest.raises(CrashError):
        run_once("crashed", task=Crashing(at_step=at_step), **settings)
    resumed, result = run_once("crashed", **settings)
    assert_same_state(whole, resumed)
    assert result.finished
    assert result.curve == expected.curve
    assert [point["step"] for point in result.curve] == [2, 4, 6, 8]


@pytest.mark.parametrize("selection", ["last", "best_val"])
@pytest.mark.parametrize("at_validation", [1, 8, 13, 18])
def test_a_crash_in_a_validation_loses_none(at_validation, selection, run_once):
    # Six validation samples, so six calls of `predict` for each validation; the third one belongs to the last step.
    settings = {"checkpoint_every": 1, "val_every": 3, "selection": selection}
    whole, expected = run_once("whole", **settings)
    with pytest.raises(CrashError):
        run_once("crashed", task=Crashing(at_validation=at_validation), **settings)
    resumed, result = run_once("crashed", **settings)
    assert_same_state(whole, resumed)
    assert result.curve == expected.curve
    assert [point["step"] for point in result.curve] == [3, 6, 9]
    assert result.selected_step == expected.selected_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment", [{"at_step": 4}, {"at_step": 6}, {"at_step": 9}, {"at_validation": 2}], ids=lambda value: str(value)
)
def test_a_signal_saves_stops_and_can_be_resumed(moment, number, run_once, tmp_path, capsys):
    settings = {"checkpoint_every": 100, "val_every": 3, "selection": "best_val"}
    whole, expected = run_once("whole", **settings)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    _, stopped = run_once("stopped", task=Crashing(**moment, number=number), **settings)
    assert not stopped.finished
    assert "checkpoint is saved" in capsys.readouterr().err
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = torch.load(tmp_path / "stopped/checkpoints/last.ckpt", weights_only=True)
    assert saved["kdlvfm_completed"] == moment.get("at_step", 3)
    resumed, result = run_once("stopped", **settings)
    assert result.finished
    assert result.curve == expected.curve
    assert result.selected_step == expected.selected_step
    assert_same_state(whole, resumed)


def test_a_finished_fit_takes_no_further_step(run_once):
    whole, _ = run_once("run", checkpoint_every=4)
    again, result = run_once("run", task=Crashing(at_step=1))
    assert result.finished
    assert_same_state(whole, again)


def test_the_checkpoint_is_plain_and_has_no_teacher(run_once, tmp_path):
    module, _ = run_once("run", val_every=3, selection="best_val")
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys()
    assert len(saved["optimizer_states"]) == 1
    wide = {value.shape for value in module.teacher.model.state_dict().values()} - {
        value.shape for value in module.student.state_dict().values()
    }
    assert wide
    assert wide.isdisjoint(shapes(saved))
    assert not list((tmp_path / "run/checkpoints").glob("*.partial"))


def shapes(node):
    if isinstance(node, torch.Tensor):
        return {node.shape}
    members = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    return set().union(*(shapes(member) for member in members))


def test_best_val_keeps_the_best_and_last_the_last(make_module, make_data, run_fit, weights_of, monkeypatch):
    scores = iter([0.1, 0.7, 0.4])
    module = make_module()
    monkeypatch.setattr(module._metrics, "compute", lambda: {"miou": next(scores)})
    result = run_fit(module, make_data(), "best", val_every=2, selection="best_val")
    assert result.selected_step == 4
    assert [point["metrics"]["miou"] for point in result.curve] == pytest.approx([0.1, 0.7, 0.4])
    reference = make_module()
    with pytest.raises(CrashError):
        run_fit(make_crash_at(reference, 5), make_data(), "reference")
    for name, value in weights_of(module).items():
        assert torch.equal(value, weights_of(reference)[name]), name
    final = make_module()
    assert run_fit(final, make_data(), "last", val_every=2).selected_step == 6
    assert not torch.equal(weights_of(final)["net.0.weight"], weights_of(module)["net.0.weight"])


def make_crash_at(module, step):
    module.task = Crashing(at_step=step)
    return module


def test_a_validation_without_labels_is_no_score_and_no_best(make_module, make_data, run_fit, monkeypatch):
    scores = iter([float("nan"), 0.2])
    module = make_module(steps=4)
    monkeypatch.setattr(module._metrics, "compute", lambda: {"miou": next(scores)})
    result = run_fit(module, make_data(steps=4), val_every=2, selection="best_val")
    assert [point["metrics"]["miou"] for point in result.curve] == [None, pytest.approx(0.2)]
    assert result.selected_step == 4


def test_cost_is_measured(make_module, make_data, run_fit):
    cost = run_fit(make_module(), make_data()).cost
    assert cost["train_seconds"] > 0
    assert cost["images_per_second"] > 0
    assert 0 < cost["teacher_share"] < 1
    assert cost["peak_memory_mib"] > 10
    assert run_fit(make_module(distiller=Baseline()), make_data(), "baseline").cost["teacher_share"] == 0


def test_progress_lines(make_module, make_data, run_fit, capsys):
    run_fit(make_module(), make_data(), progress="line")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == [f"step {n}/6" for n in range(1, 7)]


def test_evaluate_counts_by_hand(small_net, make_data):
    model, data = small_net(), make_data()
    hits, seen, predicted, right, total = [0] * 3, [0] * 3, [0] * 3, 0, 0
    for batch in data.val_dataloader():
        guess, truth = model(batch["image"], ["logits"])["logits"].argmax(1), batch["mask"]
        right, total = right + int((guess == truth).sum()), total + truth.numel()
        for k in range(3):
            hits[k] += int(((guess == k) & (truth == k)).sum())
            seen[k] += int((truth == k).sum())
            predicted[k] += int((guess == k).sum())
    iou = [hits[k] / (seen[k] + predicted[k] - hits[k]) for k in range(3)]
    model.train()
    result = evaluate(model, data.val_dataloader(), Segmentation(3, class_names=data.class_names))
    assert model.training
    assert result["pixel_accuracy"] == pytest.approx(right / total)
    assert result["miou"] == pytest.approx(sum(iou) / 3)
    assert result["iou"] == pytest.approx(dict(zip("rgb", iou, strict=True)))
    assert evaluate(Teacher(model), data.val_dataloader(), Segmentation(3, class_names=data.class_names)) == result


def test_evaluate_tells_what_each_image_adds(small_net, make_data):
    model, data, task = small_net(), make_data(), Segmentation(3)
    found = []
    result = evaluate(model, data.val_dataloader(), task, each=lambda *batch: found.append(batch))
    assert torch.cat([index for index, _ in found]).tolist() == list(range(data.counts()["val"]))
    hits, seen, predicted = (torch.cat([adds[key] for _, adds in found]) for key in ("hits", "truth", "predicted"))
    iou = hits.sum(0) / (seen.sum(0) + predicted.sum(0) - hits.sum(0))
    assert result["miou"] == pytest.approx(iou.mean().item())


def test_evaluate_without_labels_has_no_scores(small_net, make_data):
    batches = [{**batch, "mask": torch.full_like(batch["mask"], 255)} for batch in make_data().val_dataloader()]
    assert evaluate(small_net(), batches, Segmentation(3)) == {"iou": {"0": None, "1": None, "2": None}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "best"}, "recipe.selection must be last or best_val, not 'best'"),
        ({"selection": "best_val", "val_every": None}, "needs recipe.val_every"),
        ({"val_every": 11}, "recipe.val_every must be from 1 to recipe.steps=10, not 11"),
        ({"val_every": 0}, "recipe.val_every must be from 1"),
        ({"checkpoint_every": 0}, "run.checkpoint_every must be at least 1, not 0"),
        ({"progress": "bra"}, "run.progress must be auto, bar, line, none, not 'bra'"),
    ],
)
def test_what_cannot_be_scheduled(changes, message):
    settings = {"steps": 10, "selection": "last", "val_every": 5, "checkpoint_every": 3, "progress": "bar"}
    check_schedule(**settings)
    with pytest.raises(ValueError, match=message):
        check_schedule(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"distiller": KD(student_tap="logit")}, TapError, "no tap 'logit'. Did you mean logits"),
        ({"distiller": KD(teacher_tap="map.0")}, TapError, "no tap 'map.0'"),
        ({"teacher": None}, ValueError, "KD needs a teacher"),
        ({"num_classes": 4}, ValueError, "head has 3 classes, the data has 4"),
        ({"precision": "16-mixed"}, ValueError, "needs a GPU: use trainer.precision=bf16-mixed"),
        ({"precision": 16}, ValueError, "needs a GPU"),
    ],
)
def test_what_cannot_be_trained(changes, error, message, small_net):
    arguments = {
        "student": small_net(),
        "distiller": KD(),
        "teacher": Teacher(small_net()),
        "num_classes": 3,
        "precision": "32-true",
        "accelerator": "cpu",
    }
    check_fit(**arguments)
    with pytest.raises(error, match=message):
        check_fit(**{**arguments, **changes})
