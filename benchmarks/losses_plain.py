# SPDX-License-Identifier: Apache-2.0
"""The formulas of the zoo in plain PyTorch, as a paper's repository has them: what `losses.py` measures beside ours.

Same arguments and values as the functions of `kdlvfm.distillers` at their defaults, without checks of shapes, promotion
of half precision, blocks or identities. A matrix of similarities is formed where the formula has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 21
VOID = 255


def kd(student: Tensor, teacher: Tensor, temperature: float, target: Tensor) -> Tensor:
    first, second = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(first, second, reduction="none").sum(1)
    return temperature**2 * divergence[target != VOID].mean()


def dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    temperature, known = 4.0, target != VOID
    student, teacher = student.movedim(1, -1)[known], teacher.movedim(1, -1)[known]
    label = F.one_hot(target[known], CLASSES).bool()

    def binary(logits: Tensor) -> Tensor:
        own = (F.softmax(logits / temperature, dim=1) * label).sum(1)
        return torch.stack([own, 1 - own], dim=1)

    own = F.kl_div(binary(student).log(), binary(teacher), reduction="batchmean")
    rest, goal = (x / temperature - 1000.0 * label for x in (student, teacher))
    other = F.kl_div(F.log_softmax(rest, dim=1), F.softmax(goal, dim=1), reduction="batchmean")
    return temperature**2 * (own + 8.0 * other)


def dist(student: Tensor, teacher: Tensor) -> Tensor:
    first, second = (F.softmax(x, dim=1).movedim(1, -1).reshape(-1, x.shape[1]) for x in (student, teacher))

    def pearson(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean()

    return 2 - pearson(first, second) - pearson(first.T, second.T)


def ofa(student: Tensor, teacher: Tensor, target: Tensor, epsilon: float) -> Tensor:
    known = target != VOID
    student, teacher = student.movedim(1, -1)[known], teacher.movedim(1, -1)[known]
    label = F.one_hot(target[known], CLASSES)
    weights = (F.softmax(teacher, dim=1) + label) ** epsilon - label
    return -(weights * F.log_softmax(student, dim=1)).sum(1).mean()


def deit(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(student, teacher.argmax(1))


def score_kd(student: Tensor, teacher: Tensor) -> Tensor:
    goal = teacher.sigmoid()
    scale = (student.sigmoid() - goal).abs()
    entropy = F.binary_cross_entropy_with_logits(student, goal, reduction="none")
    return (entropy * scale).sum() / student[:, 0].numel()


def localization(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    temperature = 10.0
    first, second = F.log_softmax(student / temperature, dim=-1), F.softmax(teacher / temperature, dim=-1)
    return ((F.kl_div(first, second, reduction="none").mean(-1) * temperature**2) * weight).mean()


def crosskd_kl(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    sides = [x.reshape(len(x), 4, -1, *x.shape[2:]) for x in (student, teacher)]
    divergence = F.kl_div(F.log_softmax(sides[0], dim=2), F.softmax(sides[1], dim=2), reduction="none")
    return (divergence.sum(2).mean(1) * weight).mean()


def crosskd_giou(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    (left, top, right, bottom), (a, b, c, d) = student.unbind(1), teacher.unbind(1)
    shared = (torch.minimum(left, a) + torch.minimum(right, c)) * (torch.minimum(top, b) + torch.minimum(bottom, d))
    hull = (torch.maximum(left, a) + torch.maximum(right, c)) * (torch.maximum(top, b) + torch.maximum(bottom, d))
    union = (left + right) * (top + bottom) + (a + c) * (b + d) - shared
    return ((1 - shared / union + (hull - union) / hull) * weight).mean()


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def mgd(generated: Tensor, teacher: Tensor) -> Tensor:
    return (generated - teacher).square().sum() / len(teacher)


def dkdm_variance(student: dict[str, Tensor], teacher: dict[str, Tensor], steps: Tensor, schedule: object) -> Tensor:
    signal, noise, clean, least, most = (
        schedule.get_buffer(name)[steps].view(-1, 1, 1, 1)
        for name in ("signal", "noise", "from_clean", "least", "most")
    )

    def step(features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        share = (features["variance"] + 1) / 2
        return -clean * noise / signal * features["noise"], share * most + (1 - share) * least

    (mean, variance), (own, own_variance) = step(teacher), step({**student, "noise": student["noise"].detach()})
    distance = (mean - own).square() * torch.exp(-own_variance)
    return (0.5 * (-1 + own_variance - variance + torch.exp(variance - own_variance) + distance)).mean()


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    first, second = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher))
    return (first - second).pow(2).mean()


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        weight /= 2
        loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size))
        total += weight
    return loss / total


def attnfd(student: Tensor, teacher: Tensor) -> Tensor:
    return (student / student.norm() - teacher / teacher.norm()).pow(2).sum() / len(student)


def cwd(student: Tensor, teacher: Tensor) -> Tensor:
    batch, channels, *_ = student.shape
    first, second = (x.reshape(batch * channels, -1) / 4.0 for x in (student, teacher))
    goal = F.softmax(second, dim=1)
    return (goal * (F.log_softmax(second, dim=1) - F.log_softmax(first, dim=1))).sum() * 16.0 / (batch * channels)


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    def norm(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(x.shape[1], -1)
        return (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-6)

    return F.mse_loss(norm(student), norm(teacher)) / 2


def vkd(student: Tensor, teacher: Tensor) -> Tensor:
    rows, goal = (x.flatten(2).transpose(1, 2) for x in (student, teacher))
    return F.smooth_l1_loss(rows, F.layer_norm(goal, goal.shape[-1:]))


def scale_kd(student: Tensor, teacher: Tensor) -> Tensor:
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum() / len(student)


def cosine_smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    cosine = F.cosine_similarity(student, teacher, dim=1)
    return 0.9 * (1 - cosine).mean() + 0.1 * F.smooth_l1_loss(student, teacher)


def maskd(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    error = (student.unsqueeze(1) * masks.unsqueeze(2) - teacher.unsqueeze(1) * masks.unsqueeze(2)).square()
    return (error.sum((2, 3, 4)) / student.shape[1] / masks.sum((2, 3))).mean()


def fgd(student: Tensor, teacher: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    def attention(x: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = x.shape
        positions = F.softmax(x.abs().mean(1).view(batch, -1) / 0.5, dim=1) * height * width
        return positions.view(batch, height, width), F.softmax(x.abs().mean((2, 3)) / 0.5, dim=1) * channels

    (positions, channels), (goal, goal_channels) = attention(student), attention(teacher)
    scale = goal.unsqueeze(1).sqrt() * goal_channels[:, :, None, None].sqrt()
    first, second = student * scale, teacher * scale
    masks = [mask.unsqueeze(1).sqrt() for mask in (foreground, background)]
    parts = [F.mse_loss(first * mask, second * mask, reduction="sum") for mask in masks]
    apart = (positions - goal).abs().sum() + (channels - goal_channels).abs().sum()
    return (1e-3 * parts[0] + 5e-4 * parts[1] + 1e-3 * apart) / len(student)


def freekd(student: Tensor, teacher: Tensor, masks: Sequence[Tensor]) -> Tensor:
    def bands(low: Tensor) -> list[Tensor]:
        found = []
        for _ in range(len(masks) - 1):
            top, bottom = low[..., 0::2, :], low[..., 1::2, :]
            a, b, c, d = top[..., 0::2], top[..., 1::2], bottom[..., 0::2], bottom[..., 1::2]
            found.append(torch.stack([a + b - c - d, a - b + c - d, a - b - c + d], dim=2) / 2)
            low = (a + b + c + d) / 2
        return [low.unsqueeze(2), *reversed(found)]

    total = student.new_zeros(())
    for own, goal, mask in zip(bands(student), bands(teacher), masks, strict=True):
        total = total + (mask.mean(1)[:, None, None] * (own - goal).abs()).mean()
    return total
