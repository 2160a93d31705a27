# SPDX-License-Identifier: Apache-2.0
"""Trains the judge of generated digits and puts its weights into the package. A minute on a CPU.

python experiments/dkdm/judge.py
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from kdlvfm.data.digits import Digits, digits_of
from kdlvfm.models.digit_classifier import WEIGHTS, DigitClassifier

STEPS, BATCH = 3000, 64


def shifted(images: torch.Tensor) -> torch.Tensor:
    """The images up to a pixel to either side, so that the judge does not know its digits by heart."""
    down, right = (int(torch.randint(-1, 2, ())) for _ in range(2))
    return F.pad(images, (1, 1, 1, 1))[..., 1 + down : 9 + down, 1 + right : 9 + right]


def main() -> None:
    """Train, report, write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = Digits(batch_size=1, steps=1)
    images = {split: data.images(split).float() / 255 for split in data.splits}
    labels = {split: torch.from_numpy(digits_of(split)[1]) for split in data.splits}
    judge = DigitClassifier(pretrained=False)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(labels["train"]), (BATCH,))
        logits = judge(shifted(images["train"][chosen]), ["logits"])["logits"]
        optimizer.zero_grad()
        F.cross_entropy(logits, labels["train"][chosen]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for split in data.splits:
            right = judge(images[split], ["logits"])["logits"].argmax(1) == labels[split]
            print(f"{split:<6} {int(right.sum())} of {len(right)} digits are recognised")
    save_file(judge.net.state_dict(), WEIGHTS)
    print(f"wrote  {WEIGHTS}")


if __name__ == "__main__":
    main()
