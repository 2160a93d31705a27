# SPDX-License-Identifier: Apache-2.0
"""Diffusion: generating images like those of the data, and how far what is generated is from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from kdlvfm.core.align import promote
from kdlvfm.core.denoiser import Denoiser, as_denoiser
from kdlvfm.core.diffusion import sample
from kdlvfm.core.features import FeatureModel, Features
from kdlvfm.core.task import Task
from kdlvfm.core.teacher import Teacher

Target = Mapping[str, Tensor]
_NOISE_SEED = 2020
_LEVELS = 10  # of noise, at which a network's prediction is measured


class Diffusion(Task):
    """A network that makes images out of noise.

    The ground truth is the images themselves. A target is a mapping with `"image"`, (B, 3, H, W) in [0, 1], and for
    predictions and metrics `"index"`, (B,), and `"repeated"`, bool (B,), true for images that count elsewhere.

    Args:
        num_classes: of the data.
        class_names: their names, which nothing here needs.
        size: side of the images in pixels.
        judge: in whose features generated images are compared with real ones.
        judge_tap: which features, (B, D).
        sampling_steps: steps in which images are generated, at most the network's own.
        variance_weight: weight of the term that trains a learned variance. The paper's value.

    Raises:
        ValueError: a judge without such features, or for other classes.
    """

    primary_metric = "frechet_distance"
    distances = ("frechet_distance", "noise_error", "class_shift")
    truth = "images"

    def __init__(
        self,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        size: int,
        judge: Teacher,
        judge_tap: str = "pooled",
        sampling_steps: int = 50,
        variance_weight: float = 0.001,
    ) -> None:
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} entries for {num_classes} classes.")
        if judge.tap_info(judge_tap).stride is not None:
            raise ValueError(
                f"task.judge_tap={judge_tap} has a place in the image: choose one that has none, as pooled."
            )
        self.size = size
        self.judge = judge
        self.judge_tap = judge_tap
        self.sampling_steps = sampling_steps
        self.variance_weight = variance_weight
        logits = judge.taps().get("logits")
        self._tells_classes = logits is not None and logits.stride is None and logits.dim == num_classes

    def student_taps(self, student: FeatureModel) -> tuple[str, ...]:
        """None: the noise that a network is asked to find is drawn in `loss`, and so is what it is shown.

        Raises:
            ValueError: the student finds no noise, or in images of another size, or in fewer steps than are sampled.
        """
        denoiser = as_denoiser(student)
        if denoiser.state_shape[1:] != (self.size, self.size):
            raise ValueError(
                f"{student.card.name} makes images of {denoiser.state_shape[1:]} pixels, the data has {self.size}: set "
                f"student.size={self.size}."
            )
        denoiser.schedule.respaced(self.sampling_steps)
        return ()

    def one_pass(self, student: FeatureModel, images: Tensor) -> dict[str, Tensor]:
        """The noise in the images, which is found once for each step of sampling."""
        return dict(student(images, as_denoiser(student).step_taps))

    def solves(self, model: FeatureModel) -> bool:
        """Whether the model makes images of this size."""
        return isinstance(model, Denoiser) and model.state_shape[1:] == (self.size, self.size)

    def unpack(self, batch: Target) -> tuple[Tensor, Target, Tensor]:
        """Images (B, 3, H, W), the batch itself as target, and indices (B,)."""
        return batch["image"], batch, batch["index"]

    def loss(self, student: FeatureModel, features: Features, target: Target) -> dict[str, Tensor]:
        """The mean squared error of the noise found in noised images; where the variance is learned, its divergence.

        The divergence is between one step back as it is, given the clean image, and the student's, whose mean gets no
        gradient from it. At step 0, where the true one has no spread, that of step 1 stands in.

        Source: Ho et al., 2020, L_simple; Nichol and Dhariwal, 2021, L_hybrid.
        """
        del features
        denoiser = as_denoiser(student)
        clean = denoiser.encode(target["image"])
        schedule = denoiser.schedule
        steps = torch.randint(len(schedule), (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        found = denoiser(schedule.add_noise(clean, noise, steps), denoiser.step_taps, schedule.timesteps[steps])
        terms = {"noise": F.mse_loss(promote(found["noise"]), noise)}
        if "variance" in found:
            divergence = schedule.divergence(
                noise,
                schedule.log_variance(None, steps),
                found["noise"].detach(),
                schedule.log_variance(found["variance"], steps),
                steps,
            )
            terms["variance"] = self.variance_weight * divergence.mean()
        return terms

    def predict(self, student: FeatureModel, features: Features, target: Target) -> dict[str, Tensor]:
        """As many images as the batch has, generated, and how well the student finds noise in those of the batch.

        Everything random depends on the index of an image alone, so neither batches nor processes matter.

        Returns:
            `"image"`, (B, 3, H, W) in [0, 1], and `"noise_error"`, (B,).
        """
        del features
        denoiser = as_denoiser(student)
        generators = [torch.Generator().manual_seed(_NOISE_SEED + int(i)) for i in target["index"]]

        def draw() -> Tensor:
            each = [torch.randn(denoiser.state_shape, generator=generator) for generator in generators]
            return torch.stack(each).to(target["image"].device)

        taps, schedule = denoiser.step_taps, denoiser.schedule
        made = sample(denoiser, taps, schedule.respaced(self.sampling_steps), draw)
        noise = draw()
        steps = (target["index"] % _LEVELS * 2 + 1) * len(schedule) // (2 * _LEVELS)
        states = schedule.add_noise(denoiser.encode(target["image"]), noise, steps)
        found = denoiser(states, ("noise",), schedule.timesteps[steps])["noise"]
        error = (promote(found) - noise).square().flatten(1).mean(1)
        return {"image": denoiser.decode(made), "noise_error": error}

    def metrics(self) -> DiffusionMetrics:
        """Fresh metrics."""
        return DiffusionMetrics(self.judge, self.judge_tap, tells_classes=self._tells_classes)


class DiffusionMetrics(Metric):
    """How far generated images are from real ones. All are plain numbers, and 0 is the best.

    `compute` gives `frechet_distance`, between two Gaussians fitted to the judge's features of generated and of real
    images; `noise_error`, the mean squared error of the noise found in real images; and, of a judge that knows the
    classes, `class_shift`, half the sum over the classes of how far their shares are apart, as the judge sees them.

    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017, with another judge than theirs;
    so distances compare under one judge and one number of images, and with no published ones.

    Args:
        judge: a frozen network.
        tap: its features, (B, D).
        tells_classes: it has `logits` for the classes of the data.
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    outer: Tensor
    classes: Tensor
    error: Tensor
    count: Tensor

    def __init__(self, judge: Teacher, tap: str, *, tells_classes: bool) -> None:
        super().__init__()
        self._judge = (judge,)  # not a sub-module: a metric's state is its own
        self._taps = (tap, "logits") if tells_classes else (tap,)
        dim = judge.tap_info(tap).dim
        # Row 0 is of generated images, row 1 of real ones.
        kinds = judge.tap_info("logits").dim if tells_classes else 0
        for name, shape in {"total": (2, dim), "outer": (2, dim, dim), "classes": (2, kinds), "error": ()}.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Mapping[str, Tensor], target: Target) -> None:
        """Add one batch, as `Diffusion.predict` makes it; images that are repeated are passed over."""
        judge, counted = self._judge[0].to(target["image"].device), ~target["repeated"]
        for row, images in enumerate((predictions["image"], target["image"])):
            found = judge(images[counted], self._taps)
            features = found[self._taps[0]].double()
            self.total[row] += features.sum(0)
            self.outer[row] += features.mT @ features
            if len(self._taps) > 1:
                likeliest = found["logits"].argmax(1)
                self.classes[row] += torch.bincount(likeliest, minlength=self.classes.shape[1])
        self.error += predictions["noise_error"][counted].double().sum()
        self.count += counted.sum()

    def compute(self) -> dict[str, Any]:
        """Scalars by name; a distance needs two images."""
        count = self.count.double()
        mean = self.total / count
        covariance = (self.outer - count * mean.unsqueeze(2) * mean.unsqueeze(1)) / (count - 1)
        scores = {"frechet_distance": frechet_distance(mean[0], covariance[0], mean[1], covariance[1])}
        scores["noise_error"] = self.error / count
        if len(self._taps) > 1:
            scores["class_shift"] = (self.classes[0] - self.classes[1]).abs().sum() / (2 * count)
        return scores


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    r"""Squared Fréchet distance of two Gaussians.

    .. math:: \|\mu_a - \mu_b\|^2 + \mathrm{tr}\big(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2}\big)

    Args:
        mean: (D,).
        covariance: (D, D).
        other_mean: (D,).
        other_covariance: (D, D).

    Returns:
        A scalar; NaN where a covariance is not finite.
    """
    if not (covariance.isfinite().all() and other_covariance.isfinite().all()):
        return mean.new_tensor(torch.nan)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    # The eigenvalues of this symmetric product are those of the product of the covariances.
    trace = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    distance: Tensor = (mean - other_mean).square().sum() + (covariance + other_covariance).trace() - 2 * trace
    return distance
