# SPDX-License-Identifier: Apache-2.0
"""The relational formulas of the zoo in plain PyTorch, see `losses_plain.py`: each forms all its similarities."""

from __future__ import annotations

import torch
from losses_plain import CLASSES, VOID
from torch import Tensor
from torch.nn import functional as F


def pairwise(student: Tensor, teacher: Tensor) -> Tensor:
    first, second = (F.normalize(x, dim=1).flatten(2) for x in (student, teacher))
    return (first.mT @ first - second.mT @ second).square().mean()


def gram_batch(student: Tensor, teacher: Tensor) -> Tensor:
    first, second = (F.normalize(x, dim=1).movedim(1, -1).flatten(0, 2) for x in (student, teacher))
    return (first @ first.T - second @ second.T).square().mean()


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    first, second = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher))
    return (first - second).square().mean()


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    def centred(x: Tensor) -> Tensor:
        kernel = x.flatten(1) @ x.flatten(1).T
        return kernel - kernel.mean(0, keepdim=True) - kernel.mean(1, keepdim=True) + kernel.mean()

    first, second = centred(student), centred(teacher)
    return -torch.log((first * second).sum() / (first.norm() * second.norm()) + 1e-8)


def cka_positions(student: Tensor, teacher: Tensor) -> Tensor:
    return cka(*(x.movedim(1, -1).flatten(0, 2) for x in (student, teacher)))


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    def distances(x: Tensor) -> Tensor:
        squares = x.pow(2).sum(1)
        found = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        found = found * (1 - torch.eye(len(x), device=x.device))
        return found / found[found > 0].mean()

    return F.smooth_l1_loss(distances(student), distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    rays = [F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2) for x in (student, teacher)]
    return F.smooth_l1_loss(rays[0] @ rays[0].mT, rays[1] @ rays[1].mT)


def rsd(student: Tensor, teacher: Tensor) -> Tensor:
    first, second = ((x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-5) for x in (student, teacher))
    correlation = second.T @ first / len(first)
    same = torch.eye(len(correlation), device=correlation.device)
    error = (correlation - same).square()
    return (error * (same + 0.01 * (1 - same))).sum()


def divergence(own: Tensor, goal: Tensor, temperature: float) -> Tensor:
    return F.kl_div(F.log_softmax(own / temperature, dim=-1), F.softmax(goal / temperature, dim=-1), reduction="sum")


def cirkd_pixel(student: Tensor, teacher: Tensor) -> Tensor:
    first, second = (F.normalize(x, dim=1).flatten(2).mT for x in (student, teacher))
    batch, positions, _ = first.shape
    total = student.new_zeros(())
    for i in range(batch):
        for j in range(batch):
            total = total + divergence(first[i] @ first[j].T, second[i] @ second[j].T, 0.1)
    return total / (batch**2 * positions)


def memory_relation(student: Tensor, teacher: Tensor, memory: Tensor, temperature: float) -> Tensor:
    first, second, entries = (F.normalize(x, dim=1) for x in (student, teacher, memory))
    return divergence(first @ entries.T, second @ entries.T, temperature) / len(student)


def token_relation(student: Tensor, teacher: Tensor) -> Tensor:
    first, second = (F.normalize(x, dim=1).flatten(2).mT for x in (student, teacher))
    return divergence(first @ first.mT, second @ second.mT, 0.07) / first.shape[:2].numel()


def afdcd(student: Tensor, teacher: Tensor) -> Tensor:
    def pieces(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.reshape(batch, 16, channels // 16, height // 4, 4, width // 4, 4).permute(0, 3, 5, 4, 6, 1, 2)
        return x.reshape(-1, 256, channels // 16)

    distances = torch.cdist(pieces(student), pieces(teacher), p=1)
    group = torch.arange(256, device=student.device) % 16
    excluded = ((group[:, None] == group) & ~torch.eye(256, dtype=torch.bool, device=student.device)).float() * -1e9
    scores = (distances.diagonal(dim1=1, dim2=2).unsqueeze(2) - distances) / 0.07 + excluded
    return torch.logsumexp(scores, dim=2).sum() / (scores.shape[0] * 16)


def prototypes(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Means (B, K, C) of the classes in each image, and where each class is, (B, K, N)."""
    labels = F.interpolate(target[:, None].float(), x.shape[2:], mode="nearest-exact")[:, 0].long()
    masks = F.one_hot(torch.where(labels == VOID, CLASSES, labels), CLASSES + 1)[..., :-1].flatten(1, 2).mT.to(x)
    return masks @ x.flatten(2).mT, masks


def ifvd(student: Tensor, teacher: Tensor, target: Tensor, _: int) -> Tensor:
    def variation(x: Tensor) -> tuple[Tensor, Tensor]:
        sums, masks = prototypes(x, target)
        centres = (sums / (masks.sum(2, keepdim=True) + 1e-6)).mT @ masks
        return F.cosine_similarity(x.flatten(2), centres, dim=1) * masks.sum(1), masks.sum()

    (first, count), (second, _) = variation(student), variation(teacher)
    return (first - second).square().sum() / count


def idd(student: Tensor, teacher: Tensor, target: Tensor, _: int) -> Tensor:
    graphs = []
    for x in (student, teacher):
        sums, masks = prototypes(x, target)
        present = masks.sum((0, 2)) > 0
        means = (sums.sum(0) / masks.sum((0, 2)).clamp(min=1).unsqueeze(1))[present]
        graphs.append(torch.cdist(means, means))
    apart = (graphs[0] - graphs[1]).square()
    return apart.sum() / (len(apart) * (len(apart) - 1))


def i2ckd(student: Tensor, teacher: Tensor, target: Tensor, _: int) -> Tensor:
    means = []
    for x in (student, teacher):
        sums, masks = prototypes(x, target)
        means.append((sums.sum(0) / masks.sum((0, 2)).clamp(min=1).unsqueeze(1))[masks.sum((0, 2)) > 0])
    distances = torch.cdist(*means)
    hinge = F.relu(distances.diagonal().unsqueeze(1) - distances + 1.0)
    others = 1 - torch.eye(len(distances), device=distances.device)
    return (hinge * others).sum() / others.sum()


def channel_attention(x: Tensor, gamma: Tensor) -> Tensor:
    rows = x.flatten(2)
    energy = rows @ rows.mT
    attention = F.softmax((energy.amax(2, keepdim=True) - energy) / 2.0, dim=2)
    return (gamma * (attention @ rows) + rows).view(x.shape)


def position_attention(x: Tensor, query: Tensor, key: Tensor, value: Tensor, gamma: Tensor) -> Tensor:
    attention = F.softmax(query.flatten(2).mT @ key.flatten(2) / 2.0, dim=2)
    return gamma * (value.flatten(2) @ attention.mT).view(x.shape) + x
