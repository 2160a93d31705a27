# SPDX-License-Identifier: Apache-2.0
"""mmcv's focal losses in plain torch, with the arguments of its compiled operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _sigmoid_focal(logits: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal loss (Lin et al., 2017), (N, K), of logits (N, K) against classes (N,), where K is the background."""
    logits = logits.float()
    truth = F.one_hot(target, logits.shape[1] + 1)[:, :-1].to(logits)
    missed = torch.sigmoid(logits * (1 - 2 * truth))
    share = alpha * truth + (1 - alpha) * (1 - truth)
    return share * missed**gamma * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """The loss of each logit, into `output`."""
    _refuse(weight)
    output.copy_(_sigmoid_focal(input, target, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Gradient of the sum of the loss, into `grad_input`."""
    _refuse(weight)
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _sigmoid_focal(logits, target, gamma, alpha).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    grad_input.copy_(grad)


def softmax_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Focal loss of probabilities (N, K) after softmax against classes (N,), into `output` (N,)."""
    _refuse(weight)
    hit = _probability_of_truth(input, target)
    output.copy_(-alpha * (1 - hit) ** gamma * hit.log() * (target >= 0))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Gradient of the sum of the loss with respect to the logits, into `grad_input` (N, K)."""
    _refuse(weight)
    hit = _probability_of_truth(input, target)
    # d loss / d logit_c = hit * (d loss / d hit) * (1[c is the class] - probability of c)
    slope = gamma * (1 - hit) ** (gamma - 1) * hit * hit.log() - (1 - hit) ** gamma
    buff.copy_(alpha * slope * (target >= 0))
    truth = F.one_hot(target.clamp_min(0), input.shape[1]).to(input)
    grad_input.copy_(buff.unsqueeze(1) * (truth - input))


def _probability_of_truth(probabilities: Tensor, target: Tensor) -> Tensor:
    found = probabilities.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1)
    return found.float().clamp_min(torch.finfo(torch.float32).tiny)


def _refuse(weight: Tensor) -> None:
    if weight.numel():
        raise ValueError("focal loss with class weights needs a compiled mmcv; mmdet itself gives none.")
