# SPDX-License-Identifier: Apache-2.0
"""Heads of mmdet that classify and regress at every position: their outputs as taps, and a way into their middle."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kdlvfm.core.features import TapError
from kdlvfm.core.split_head import HeadTails

OUTPUTS = ("cls", "reg", "ctr")
"""Kinds of taps, in the order of a head's outputs."""

_STACKS = ("cls_convs", "reg_convs")
_THIRD = ("centernesses", "score_factors", "iou_preds", "objectnesses")


class DenseHead:
    """What this library asks of a dense head of mmdet beyond its loss and its decoder.

    Args:
        module: the head.

    Attributes:
        middles: channels of the maps before the last convolution of its two stacks, for classes and for boxes, by kind
            of tap; empty for a head without such stacks.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.middles: dict[str, int] = {}
        stacks = dict(module.named_children())
        if all(_is_stack(stacks.get(name)) for name in _STACKS):
            self.middles = {kind: self._stack(kind)[-2].out_channels for kind in ("cls_mid", "reg_mid")}

    def __call__(self, levels: Sequence[Tensor], middle: bool = False) -> dict[str, Tensor]:
        """Outputs for the levels of a pyramid, by tap; with `middle`, the maps inside the head as well."""
        found: dict[str, Tensor] = {}
        handles = [self._keep(kind, found) for kind in self.middles if middle]
        try:
            outputs = self.module(levels)
        finally:
            for handle in handles:
                handle.remove()
        for kind, maps in zip(OUTPUTS, outputs, strict=False):
            found.update({f"{kind}.{i}": x for i, x in enumerate(maps)})
        return found

    def _keep(self, kind: str, found: dict[str, Tensor]) -> Any:
        """Keep what the last but one convolution of a stack gives, level after level, before its activation."""

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            del module, inputs
            index = sum(tap.startswith(f"{kind}.") for tap in found)
            found[f"{kind}.{index}"] = output
            return output.clone()  # the activation works in place

        block = self._stack(kind)[-2]
        return (block.norm if block.with_norm else block.conv).register_forward_hook(hook)

    def _stack(self, kind: str) -> Any:
        return self.module.get_submodule(f"{kind.removesuffix('_mid')}_convs")

    def tails(self, index: int) -> HeadTails:
        """See `kdlvfm.core.split_head.SplitHead`.

        Raises:
            TapError: the head has no two stacks of convolutions.
        """
        if not self.middles:
            raise TapError(f"mmdet's {type(self.module).__name__} has no two stacks of convolutions to be entered.")
        return HeadTails(self._tail("cls_mid", index), self._tail("reg_mid", index), _sides_of(self.module))

    def _tail(self, kind: str, index: int) -> Callable[[Tensor], Tensor]:
        output = kind.removesuffix("_mid")

        def tail(x: Tensor) -> Tensor:
            before, last = self._stack(kind)[-2:]
            stacks = {name: nn.ModuleList([last] if name.startswith(output) else []) for name in _STACKS}
            rest = copy.copy(self.module)
            rest._modules = {**self.module._modules, **stacks}
            # A level's scale goes by its position; the levels before it are given next to nothing.
            levels = [*[x.new_zeros(1, x.shape[1], 2, 2)] * index, before.activate(x.clone())]
            found: Tensor = rest(levels)[OUTPUTS.index(output)][index]
            return found

        return tail


def _sides_of(head: Any) -> Callable[[Tensor], Tensor] | None:
    """What turns a head's numbers into distances to the sides of boxes; `None` where it does not have such numbers."""
    from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder

    coder = head.bbox_coder
    if isinstance(coder, DistancePointBBoxCoder) and "integral" not in dict(head.named_children()):
        return lambda x: x
    if not isinstance(coder, DeltaXYWHBBoxCoder) or coder.add_ctr_clamp:  # a clamp is in pixels
        return None

    def sides(deltas: Tensor) -> Tensor:
        from mmdet.structures.bbox import get_box_tensor

        batch, _, height, width = deltas.shape
        rows = deltas.reshape(batch, -1, 4, height, width).movedim(2, -1)
        anchor = rows.new_tensor([-0.5, -0.5, 0.5, 0.5]).expand(rows.numel() // 4, 4)
        boxes = get_box_tensor(coder.decode(anchor, rows.reshape(-1, 4)))
        distances: Tensor = boxes * boxes.new_tensor([-1.0, -1.0, 1.0, 1.0])
        return distances.view(rows.shape).movedim(-1, 2).flatten(1, 2)

    return sides


def _is_stack(module: Any) -> bool:
    from mmcv.cnn import ConvModule

    blocks = list(module) if isinstance(module, nn.ModuleList) else []
    return len(blocks) > 1 and all(isinstance(block, ConvModule) and block.with_activation for block in blocks)


def is_dense(net: Any) -> bool:
    """Whether a detector's head gives scores and boxes for every position of every level, in the order of `OUTPUTS`."""
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

    head = dict(net.named_children()).get("bbox_head")
    if not isinstance(head, BaseDenseHead):
        return False
    kind: Any = type(head)
    outputs = [name for name in inspect.signature(kind.loss_by_feat).parameters if name != "self"]
    outputs = outputs[: outputs.index("batch_gt_instances")]
    own = kind.loss is BaseDenseHead.loss and kind.predict is BaseDenseHead.predict
    return own and outputs[:2] == ["cls_scores", "bbox_preds"] and all(name in _THIRD for name in outputs[2:])
