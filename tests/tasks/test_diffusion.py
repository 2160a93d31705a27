# SPDX-License-Identifier: Apache-2.0
"""The loss against loops, generated images that depend on nothing but their index, and distances against scipy's."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from kdlvfm.core import Denoiser, FeatureModel, ModelCard, TapInfo, Teacher
from kdlvfm.core.diffusion import Schedule
from kdlvfm.tasks.diffusion import Diffusion, frechet_distance

T, SIZE = 20, 4


class Net(Denoiser):
    """A convolution; keeps what it was shown."""

    def __init__(self, *, variance=False, steps=T, size=SIZE):
        super().__init__()
        self.card, self.state_shape = ModelCard("net", "random"), (1, size, size)
        self.schedule = Schedule.named("cosine", steps)
        self.names = ("noise", "variance") if variance else ("noise",)
        self.net = nn.Conv2d(1, len(self.names), 3, padding=1)

    def taps(self):
        return dict.fromkeys(self.names, TapInfo(1, 1))

    def forward(self, images, taps, timesteps=None):
        if timesteps is None:
            images, timesteps = self.encode(images), torch.zeros(len(images), dtype=torch.int64)
        self.seen, self.timesteps = images, timesteps
        return dict(zip(self.names, self.net(images).split(1, 1), strict=True))


class Judge(FeatureModel):
    """Sees the mean and the standard deviation of an image, and whether it is bright."""

    def __init__(self, classes=2):
        super().__init__()
        self.card, self.net, self.classes = ModelCard("judge", "random"), nn.Identity(), classes

    def taps(self):
        return {"pooled": TapInfo(2, None), "logits": TapInfo(self.classes, None), "map.0": TapInfo(3, 1)}

    def forward(self, images, taps):
        flat = images.flatten(1)
        bright = flat.mean(1) - 0.5
        found = {"pooled": torch.stack([flat.mean(1), flat.std(1)], 1), "logits": torch.stack([-bright, bright], 1)}
        return {tap: found[tap] for tap in taps}


@pytest.fixture
def task():
    return Diffusion(2, size=SIZE, judge=Teacher(Judge()), sampling_steps=5)


def batch_of(count, seed=0):
    images = torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).expand(-1, 3, -1, -1)
    return {"image": images, "index": torch.arange(count), "repeated": torch.zeros(count, dtype=torch.bool)}


def test_the_loss_is_the_error_of_the_noise_that_was_added(task):
    torch.manual_seed(0)
    student, batch = Net(), batch_of(3)
    images, target, index = task.unpack(batch)
    assert images is batch["image"]
    assert index is batch["index"]
    terms = task.loss(student, {}, target)
    assert set(terms) == {"noise"}
    total = 0.0
    for state, clean, t in zip(student.seen, 2 * images[:, :1] - 1, student.timesteps.tolist(), strict=True):
        signal, spread = student.schedule.signal[t].item(), student.schedule.noise[t].item()
        added = (state - signal * clean) / spread
        total += (student.net(state[None]) - added).square().sum().item()
    assert terms["noise"].item() == pytest.approx(total / (3 * SIZE * SIZE), rel=1e-3)
    terms["noise"].backward()
    assert student.net.weight.grad.abs().sum() > 0


def test_noise_is_standard_normal_and_steps_are_uniform(task):
    torch.manual_seed(0)
    student, batch = Net(), batch_of(4000)
    task.loss(student, {}, batch)
    clean, at = 2 * batch["image"][:, :1] - 1, student.timesteps.view(-1, 1, 1, 1)
    added = (student.seen - student.schedule.signal[at] * clean) / student.schedule.noise[at]
    assert abs(added.mean()) < 0.02
    assert abs(added.std() - 1) < 0.02
    assert (torch.bincount(student.timesteps, minlength=T) - 4000 / T).abs().max() < 60


def test_a_learned_variance_has_a_term_that_leaves_the_noise_alone(task):
    torch.manual_seed(0)
    student = Net(variance=True)
    terms = task.loss(student, {}, batch_of(8))
    assert set(terms) == {"noise", "variance"}
    terms["variance"].backward()
    of_noise, of_variance = student.net.weight.grad
    assert of_noise.abs().max() == 0
    assert of_variance.abs().max() > 0
    torch.manual_seed(0)
    heavier = Diffusion(2, size=SIZE, judge=task.judge, sampling_steps=5, variance_weight=0.1)
    assert heavier.loss(Net(variance=True), {}, batch_of(8))["variance"].item() == pytest.approx(
        100 * terms["variance"].item(), rel=1e-4
    )


@torch.no_grad()
def test_what_is_generated_depends_on_the_index_and_the_network_alone(task):
    torch.manual_seed(0)
    student, batch = Net(), batch_of(6)
    whole = task.predict(student, {}, batch)
    torch.manual_seed(7)
    order = torch.tensor([4, 1])
    part = task.predict(student, {}, {name: value[order] for name, value in batch.items()})
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name][order])
    assert whole["image"].shape == (6, 3, SIZE, SIZE)
    assert 0 <= whole["image"].min() <= whole["image"].max() <= 1
    assert len(whole["image"].flatten(1).unique(dim=0)) == 6
    other = task.predict(student, {}, {**batch, "image": torch.rand_like(batch["image"])})
    torch.testing.assert_close(other["image"], whole["image"])  # the real images have no part in it


@torch.no_grad()
def test_one_pass_is_one_step_of_denoising(task):
    student = Net()
    found = task.one_pass(student, torch.rand(2, 3, SIZE, SIZE))
    assert found["noise"].shape == (2, 1, SIZE, SIZE)
    assert task.student_taps(student) == ()
    assert task.solves(student)
    assert not task.solves(Net(size=8))
    assert not task.solves(Judge())


def predictions_of(batch, seed):
    made = batch_of(len(batch["image"]), seed)["image"]
    return {"image": made, "noise_error": torch.arange(1.0, len(made) + 1)}


def test_metrics_are_those_of_all_images_that_count(task):
    metrics, kept = task.metrics(), []
    for seed in (1, 2, 3):
        batch = batch_of(20, seed)
        batch["repeated"][17:] = seed == 3
        made = predictions_of(batch, seed + 10)
        metrics.update(made, batch)
        kept.append([x[~batch["repeated"]] for x in (made["image"], batch["image"], made["noise_error"])])
    made, real, errors = (torch.cat(parts) for parts in zip(*kept, strict=True))
    assert len(made) == 57
    judge = Judge()
    features = [judge(images, ["pooled"])["pooled"].double().numpy() for images in (made, real)]
    (mean, cov), (other_mean, other_cov) = ((f.mean(0), np.cov(f, rowvar=False)) for f in features)
    distance = ((mean - other_mean) ** 2).sum() + np.trace(
        cov + other_cov - 2 * scipy.linalg.sqrtm(cov @ other_cov).real
    )
    result = {name: float(value) for name, value in metrics.compute().items()}
    assert result["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    assert result["noise_error"] == pytest.approx(errors.mean().item())
    bright = [(images.mean((1, 2, 3)) > 0.5).float().mean().item() for images in (made, real)]
    assert result["class_shift"] == pytest.approx(abs(bright[0] - bright[1]), abs=1e-6)
    assert set(result) == set(task.distances)
    metrics.reset()
    batch = batch_of(9)
    metrics.update({"image": batch["image"], "noise_error": torch.zeros(9)}, batch)
    assert [float(x) for x in metrics.compute().values()] == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_judge_that_does_not_know_the_classes_does_not_count_them():
    metrics = Diffusion(3, size=SIZE, judge=Teacher(Judge()), sampling_steps=5).metrics()
    batch = batch_of(4)
    metrics.update(predictions_of(batch, 1), batch)
    assert set(metrics.compute()) == {"frechet_distance", "noise_error"}


def test_a_single_image_has_no_distance(task):
    metrics, batch = task.metrics(), batch_of(1)
    metrics.update(predictions_of(batch, 1), batch)
    assert math.isnan(metrics.compute()["frechet_distance"])


@pytest.mark.parametrize("rank", [6, 3])
def test_frechet_distance_against_scipy(rank):
    rng = np.random.default_rng(0)
    spread = [rng.normal(size=(6, rank)) for _ in range(2)]
    covariances = [s @ s.T + 1e-9 * np.eye(6) for s in spread]
    means = rng.normal(size=(2, 6))
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    pairs = [torch.from_numpy(x) for mean, cov in zip(means, covariances, strict=True) for x in (mean, cov)]
    assert frechet_distance(*pairs).item() == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(*pairs[2:], *pairs[:2]).item() == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(*pairs[:2], *pairs[:2]).item() == pytest.approx(0, abs=1e-6)


def test_in_one_dimension_it_is_that_of_two_normal_distributions():
    one, other = (torch.tensor([1.0]), torch.tensor([[4.0]])), (torch.tensor([4.0]), torch.tensor([[25.0]]))
    assert frechet_distance(*one, *other).item() == pytest.approx((1 - 4) ** 2 + (2 - 5) ** 2)


def test_students_and_judges_that_do_not_fit_are_refused(task, student):
    with pytest.raises(ValueError, match="toy is no diffusion model"):
        task.student_taps(student)
    with pytest.raises(ValueError, match=r"set student\.size=4"):
        task.student_taps(Net(size=8))
    with pytest.raises(ValueError, match="from 2 to the 4 steps"):
        task.student_taps(Net(steps=4))
    with pytest.raises(ValueError, match=r"task\.judge_tap=map\.0 has a place in the image"):
        Diffusion(2, size=SIZE, judge=Teacher(Judge()), judge_tap="map.0")
    with pytest.raises(ValueError, match="class_names has 3 entries for 2 classes"):
        Diffusion(2, class_names=("a", "b", "c"), size=SIZE, judge=Teacher(Judge()))
