# SPDX-License-Identifier: Apache-2.0
"""Detectors of mmdet as students and teachers: its necks, heads, assigners and losses, and nothing else of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kdlvfm.core.align import promote, resize_map
from kdlvfm.core.features import FeatureModel, Features, ModelCard, TapError, TapInfo
from kdlvfm.core.split_head import HeadTails
from kdlvfm.models.adapter import Adapter
from kdlvfm.models.feature_pyramid import fit_neck
from kdlvfm.models.freezing import freeze_encoder
from kdlvfm.models.geometry import fit_to_multiple
from kdlvfm.models.mmcv_ops import provide_operators
from kdlvfm.models.mmdet_build import build_detector, nothing_frozen, outline, quiet, statistics
from kdlvfm.models.mmdet_config import merge, read_model_config
from kdlvfm.models.mmdet_decoder import DenseDecoder
from kdlvfm.models.mmdet_head import OUTPUTS, DenseHead, is_dense
from kdlvfm.models.weights import read_weights, sha256_of, wrong_architecture

_MULTIPLE = 32
"""Pixels; images are padded to a multiple of it, as mmdet's own preprocessing does."""


class MMDetModel(Adapter):
    """A detector of mmdet, with its own backbone or on an encoder of ours; `net` is mmdet's own class.

    Images of any size are padded with black at the right and the bottom to a multiple of 32 pixels; every tap covers
    the padded image. Taps: all of the encoder's (`map.<i>`: the outputs of mmdet's backbone where that is kept), the
    levels of the neck as `fpn.<i>` and, for detectors that classify and regress at every position of a level,
    `cls.<i>` (class scores before the sigmoid), `reg.<i>` and, where the head has a third output, `ctr.<i>`;
    inside such heads, before the last convolution of their two stacks, `cls_mid.<i>` and `reg_mid.<i>`. Detectors with
    proposals or queries run their heads in `loss` and `predict`, on the levels of the neck.

    Args:
        config: a configuration of mmdet: the name of one that comes with it, the path of a file, or the settings of the
            detector themselves.
        num_classes: classes of the boxes.
        encoder: replaces the backbone. A network with a pyramid feeds the configuration's neck; one whose maps have a
            single stride, a ViT, gets a simple feature pyramid in the neck's place. With a ResNet of timm,
            `net.state_dict()` loads into the same configuration with mmdet's ResNet.
        freeze: keep the encoder as it is (`True`), or, unless its weights are random, the first entries of its pyramid
            (a number): no gradient, and the batch norms keep their statistics.
        norm_eval: batch norms of the encoder keep their statistics, though their scale and shift are trained, unless
            its weights are random: batches of detection are small.
        checkpoint: weights of the whole detector, in mmdet's format.
        changes: settings merged into those of `config`.

    Attributes:
        num_classes: classes of the boxes.
        task_taps: the taps that `loss` and `predict` read.

    Raises:
        ConfigError: there is no such configuration, it cannot be read, or it is not one of a detector of boxes.
        MissingOperatorError: the detector needs operators that only a compiled mmcv has.
        ValueError: `freeze` is none of these, or there is no encoder to freeze.
        WeightsError: the checkpoint cannot be read, or is another architecture's.
        ModuleNotFoundError: mmdet is not installed.
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any],
        num_classes: int,
        encoder: FeatureModel | None = None,
        freeze: bool | int = False,
        norm_eval: bool = True,
        checkpoint: str | Path | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(freeze, int) or (freeze and encoder is None):
            raise ValueError(
                "freeze is true, false or a number of entries of the encoder's pyramid, for an encoder of ours; an own "
                f"backbone has frozen_stages among its settings (freeze={freeze!r})."
            )
        base = config if isinstance(config, Mapping) else read_model_config(config)
        settings = merge(base, changes or {})
        title = str(settings["type"]).lower() if isinstance(config, Mapping) else Path(config).stem
        self.num_classes = num_classes
        self._frozen: tuple[nn.Module, ...] = ()
        self._maps: tuple[str, ...] = ()
        self.encoder = encoder
        if encoder is None:
            self.card = ModelCard(title, "random")
            self.normalise, self._bgr = statistics(settings.get("data_preprocessor") or {})
            if checkpoint is None:
                settings["backbone"] = nothing_frozen(settings["backbone"])
            self.net: Any = build_detector(settings, num_classes)
        else:
            self.card = replace(encoder.card, name=f"{encoder.card.name}-{title}")
            settings["neck"], self._maps = fit_neck(settings.get("neck"), encoder)
            settings["backbone"] = {"type": nn.Identity}
            self.net = build_detector(settings, num_classes)
            # Not before: mmdet initialises the weights of all that it built.
            self.net.backbone = encoder.net
            if freeze is True or encoder.card.weights != "random":
                self._frozen = freeze_encoder(encoder, freeze, norm_eval)
        if checkpoint is not None:
            self._fill(checkpoint)
        self._head = DenseHead(self.net.bbox_head) if is_dense(self.net) else None
        self._taps = self._describe()
        kinds = OUTPUTS if self._head is not None else ("fpn",)
        self.task_taps = tuple(tap for tap in self._taps if tap.partition(".")[0] in kinds)
        self.head_taps = tuple(tap for tap in self._taps if tap.startswith("fpn."))
        self.train(self.training)

    def _fill(self, path: str | Path) -> None:
        state = read_weights(path)
        try:
            self.net.load_state_dict(state)
        except RuntimeError:
            raise wrong_architecture(path, self.card.name, self.net.state_dict(), state) from None
        self.card = ModelCard(self.card.name, "file", sha256=sha256_of(path), source=str(path))

    def _describe(self) -> dict[str, TapInfo]:
        """Channels and strides. mmdet does not state those of its networks, so an outline of an image is sent through.

        On the meta device nothing is computed; a compiled mmcv has no operators there.
        """
        device, side = torch.device("meta" if provide_operators() else "cpu"), 640
        if self.encoder is None:
            taps: dict[str, TapInfo] = {}
            maps = outline(self.net.backbone, device, torch.zeros(1, 3, side, side, device=device))
            outputs = {f"map.{i}": x for i, x in enumerate(maps)}
        else:
            taps = {tap: info for tap, info in self.encoder.taps().items() if tap != "logits"}
            infos = [taps[tap] for tap in self._maps]
            sides = [round(side / info.stride) for info in infos if info.stride is not None]
            maps = tuple(torch.zeros(1, info.dim, s, s, device=device) for info, s in zip(infos, sides, strict=True))
            outputs = {}
        levels = outline(self.net.neck, device, maps) if self.net.with_neck else maps
        outputs.update({f"fpn.{i}": x for i, x in enumerate(levels)})
        if self._head is not None:
            heads = outline(self.net.bbox_head, device, levels)
            outputs.update(
                {f"{kind}.{i}": x for kind, maps in zip(OUTPUTS, heads, strict=False) for i, x in enumerate(maps)}
            )
        taps |= {tap: TapInfo(x.shape[1], round(side / x.shape[-1])) for tap, x in outputs.items()}
        for kind, dim in self._head.middles.items() if self._head is not None else ():
            taps |= {f"{kind}.{i}": TapInfo(dim, taps[f"fpn.{i}"].stride) for i in range(len(levels))}
        return taps

    def taps(self) -> dict[str, TapInfo]:
        """Every portable tap with its facts."""
        return dict(self._taps)

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but what is frozen."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def features(self, images: Tensor, taps: frozenset[str], *, complete: bool) -> dict[str, Tensor]:
        """See `Adapter.features`; neck and head run only where they are needed."""
        padded = fit_to_multiple(images, _MULTIPLE, "pad")
        encoded = set(self.encoder.taps()) if self.encoder is not None else set()
        beyond = {tap.partition(".")[0] for tap in taps if tap not in encoded} - {"map"}
        to_neck = complete or bool(beyond)
        found: dict[str, Tensor] = {}
        if self.encoder is None:
            x = self.normalise(padded)
            with quiet():
                maps = self.net.backbone(x.flip(1) if self._bgr else x)
            found.update({f"map.{i}": x for i, x in enumerate(maps)})
        else:
            wanted = (taps & encoded) | (set(self._maps) if to_neck else set())
            found.update(self.encoder(padded, wanted))
            maps = tuple(found[tap] for tap in self._maps if to_neck)
        if to_neck:
            levels = self._levels(maps)
            found.update({f"fpn.{i}": x for i, x in enumerate(levels)})
            if self._head is not None and (complete or beyond - {"fpn"}):
                found.update(self._head(levels, middle=not beyond.isdisjoint(self._head.middles)))
        return found

    def _levels(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.net.with_neck:
            return maps
        # Of a convolution that moves by two over a map one pixel wide, as the last levels of a small image are, torch
        # on a CPU leaves a part of the weights' gradient unset in bfloat16 (2.15).
        on_cpu = maps[0].device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            levels: tuple[Tensor, ...] = self.net.neck(tuple(map(promote, maps)) if on_cpu else maps)
        return levels

    def apply_head(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """The `task_taps` that the head makes of the levels of any pyramid, see `FeatureModel.apply_head`."""
        levels = {}
        for tap in self.head_taps:
            stride = self._taps[tap].stride
            assert stride is not None
            padded = (-(-side // _MULTIPLE) * _MULTIPLE for side in size)
            levels[tap] = resize_map(features[tap], [-(-side // stride) for side in padded])
        return levels if self._head is None else levels | self._head(tuple(levels.values()))

    def loss(self, features: Features, target: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Mmdet's own losses of features already computed, by name; those of several levels or stages are summed.

        Args:
            features: at least `task_taps`.
            target: for each image `boxes` (n, 4) in pixels (x1, y1, x2, y2), `labels` (n,) from 0, `size` (2,), the
                height and width of what is not padding and, optionally, `iscrowd` (n,): boxes to be passed over.
        """
        from mmengine.structures import InstanceData

        samples = self._samples(features, [item["size"] for item in target])
        device = features[self.task_taps[0]].device
        for sample, item in zip(samples, target, strict=True):
            crowd = item["iscrowd"].bool() if "iscrowd" in item else torch.zeros_like(item["labels"], dtype=torch.bool)
            for name, chosen in (("gt_instances", ~crowd), ("ignored_instances", crowd)):
                boxes, labels = item["boxes"][chosen].to(device), item["labels"][chosen].to(device)
                setattr(sample, name, InstanceData(bboxes=boxes, labels=labels))
        with self._answering(features):
            losses = self.net.loss(None, samples)
        terms: dict[str, Tensor] = {}
        for name, value in losses.items():
            if "loss" in name:
                term = torch.stack([x.mean() for x in value]).sum() if isinstance(value, list) else value.mean()
                stage = name.rpartition(".")[2]
                terms[stage] = terms[stage] + term if stage in terms else term
        return terms

    @torch.no_grad()
    def predict(self, features: Features, sizes: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """What is detected in each image: `boxes` (m, 4) in pixels of the image given, `scores` (m,), `labels` (m,).

        Args:
            features: at least `task_taps`, of a model in eval mode.
            sizes: height and width (2,) of what is not padding, for each image; boxes are clipped to it.
        """
        samples = self._samples(features, sizes)
        with self._answering(features):
            found = [sample.pred_instances for sample in self.net.predict(None, samples, rescale=False)]
        return [{"boxes": x.bboxes, "scores": x.scores, "labels": x.labels} for x in found]

    def _samples(self, features: Features, sizes: Sequence[Tensor]) -> list[Any]:
        """What mmdet keeps of each image beside its pixels."""
        from mmdet.structures import DetDataSample

        stride = self._taps[self.task_taps[0]].stride
        assert stride is not None
        padded = tuple(side * stride for side in features[self.task_taps[0]].shape[-2:])
        common = {"pad_shape": padded, "batch_input_shape": padded, "scale_factor": (1.0, 1.0)}
        shapes = [tuple(int(side) for side in size) for size in sizes]
        return [DetDataSample(metainfo={"img_shape": shape, "ori_shape": shape, **common}) for shape in shapes]

    def head_tails(self, index: int) -> HeadTails:
        """What the head at level `index` does with the maps inside it, see `kdlvfm.core.split_head.SplitHead`.

        Raises:
            TapError: the head has no two stacks of convolutions.
        """
        if self._head is None:
            raise TapError(f"the head of {self.card.name} does not work position by position: it cannot be entered.")
        return self._head.tails(index)

    def box_decoder(self) -> DenseDecoder:
        """See `kdlvfm.core.detector.DenseDetector`.

        Raises:
            ValueError: the head has no outputs at every position, or decodes them in a way of its own.
        """
        return DenseDecoder(self.net, self.card.name, self.task_taps)

    @contextmanager
    def _answering(self, features: Features) -> Iterator[None]:
        """Within the context, mmdet's detector gives features that were computed already instead of running again."""

        def level(kind: str) -> list[Tensor]:
            return [promote(features[tap]) for tap in self.task_taps if tap.startswith(f"{kind}.")]

        head = self._head.module if self._head is not None else None
        self.net.extract_feat = lambda _: tuple(level("fpn"))
        if head is not None:
            head.forward = lambda _: tuple(outputs for kind in OUTPUTS if (outputs := level(kind)))
        # Nothing but losses, or the decoding of boxes, is left for a dense head to compute: that in full precision.
        kind = features[self.task_taps[0]].device.type
        try:
            with quiet(), torch.autocast(kind, enabled=False) if head is not None else nullcontext():
                yield
        finally:
            del self.net.extract_feat
            if head is not None:
                del head.forward
