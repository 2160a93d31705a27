# SPDX-License-Identifier: Apache-2.0
"""From the settings of a detector to mmdet's network, without its downloads, global state and log of each weight."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import nn

from kdlvfm.models.adapter import Normalise
from kdlvfm.models.mmcv_ops import MissingOperatorError, provide_operators
from kdlvfm.models.mmdet_config import ConfigError

# Modules of mmcv.ops with layers that neither torchvision nor mmcv's own Python code can stand in for.
_COMPILED = (
    "carafe",
    "cc_attention",
    "deform_conv",
    "deform_roi_pool",
    "masked_conv",
    "modulated_deform_conv",
    "saconv",
)
_MASKS = ("mask_head", "mask_iou_head", "semantic_head", "panoptic_head", "segm_head")


def build_detector(settings: dict[str, Any], num_classes: int) -> Any:
    """Mmdet's detector with its initial weights.

    Raises:
        ConfigError: the settings are not those of a detector of boxes, or name something that is no part of mmdet.
        ModuleNotFoundError: mmdet is not installed.
        MissingOperatorError: a layer needs an operator that only a compiled mmcv has.
        OSError: a library of the system is missing.
    """
    _import_mmdet()
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict

    # Images are normalised and padded by us. The scope is where mmengine looks for names, for this call only.
    settings = _harmless(settings) | {"data_preprocessor": None, "_scope_": "mmdet"}
    heads = [settings[name] for name in ("bbox_head", "roi_head") if settings.get(name)]
    for head in heads:
        _check_and_set(head, num_classes)
    if not heads:
        raise ConfigError(f"{settings.get('type')} is no detector of boxes: it has neither bbox_head nor roi_head.")
    with quiet(), _silent_log():
        try:
            net = MODELS.build(ConfigDict(settings))
        except (KeyError, TypeError, AssertionError) as error:
            raise ConfigError(f"mmdet cannot build {settings.get('type')}: {str(error).splitlines()[0]}") from error
        if provide_operators():
            _check_operators(net)
        if torch.get_default_device().type != "meta":
            try:
                net.init_weights()
            except (KeyError, TypeError, AssertionError, RuntimeError) as error:
                kind = type(error).__name__
                raise ConfigError(f"mmdet cannot use an init_cfg of {settings.get('type')}: {kind}: {error}") from error
    return net


def outline(module: nn.Module, device: torch.device, *inputs: Any) -> Any:
    """What a copy of a network on `device` makes of inputs there: on the meta device, shapes without a computation.

    Raises:
        ConfigError: the inputs are not what the network reads.
    """
    there = copy.deepcopy(module, {id(x): x.to(device) for x in chain(module.parameters(), module.buffers())})
    try:
        with torch.no_grad(), quiet():
            return there(*inputs)
    except RuntimeError as error:
        raise ConfigError(
            f"mmdet's {type(module).__name__} cannot read what comes before it ({error}): make in_channels and "
            "out_channels agree."
        ) from error


def _import_mmdet() -> None:
    if find_spec("mmdet") is None or find_spec("mmcv") is None:
        raise ModuleNotFoundError("detectors need mmdet: pip install 'kdlvfm[mmdet]'", name="mmdet")
    try:
        with quiet():
            provide_operators()
            import mmdet.models  # noqa: F401  it registers the networks
    except AssertionError as error:  # mmdet's check of the versions of mmcv and mmengine
        raise OSError(str(error)) from None
    except ImportError as error:
        if ".so" not in str(error):
            raise
        raise OSError(
            f"mmdet imports OpenCV, which lacks a library of the system ({error}): apt-get install libgl1 "
            "libglib2.0-0, or pip install --force-reinstall opencv-python-headless."
        ) from None


def _harmless(settings: Any) -> Any:
    """A copy of settings, without weights to fetch; a name of anything but a part of mmdet is refused.

    mmengine would import whatever a dotted name says, and mmcv would run the name of a kind of NMS as an expression.
    """
    if isinstance(settings, (list, tuple)):
        return type(settings)(_harmless(item) for item in settings)
    if not isinstance(settings, Mapping):
        return settings
    kind = settings.get("type", "")
    if isinstance(kind, str) and kind and not kind.removeprefix("mmdet.").isidentifier():
        raise ConfigError(f"{kind!r} is no part of mmdet.")
    kept = {key: value for key, value in settings.items() if key not in ("_scope_", "pretrained", "init_cfg")}
    starts = settings.get("init_cfg")
    starts = [start for start in (starts if isinstance(starts, list) else [starts]) if start is not None]
    if any(start.get("type") != "Pretrained" for start in starts):
        kept["init_cfg"] = [start for start in starts if start.get("type") != "Pretrained"]
    return {key: _harmless(value) for key, value in kept.items()}


def _check_and_set(head: Any, num_classes: int) -> None:
    """Set the number of classes wherever a head, or a loss of it, states one."""
    if isinstance(head, Mapping):
        masks = [name for name in _MASKS if head.get(name)]
        if masks:
            raise ConfigError(f"this detector is trained on masks too ({masks[0]}): choose one of boxes only.")
        for key, value in head.items():
            if key == "num_classes":
                head[key] = num_classes  # type: ignore[index]
            else:
                _check_and_set(value, num_classes)
    elif isinstance(head, list):
        for part in head:
            _check_and_set(part, num_classes)


def _check_operators(net: nn.Module) -> None:
    for module in net.modules():
        package, _, name = type(module).__module__.rpartition(".")
        if package == "mmcv.ops" and name in _COMPILED:
            raise MissingOperatorError(name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what there is to say of mmdet's own ways of calling torch, which no user can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mm(cv|det|engine)\b")
        warnings.filterwarnings("ignore", "torch.meshgrid")
        yield


@contextmanager
def _silent_log() -> Iterator[None]:
    """Keep mmengine from logging how each parameter was initialised."""
    from mmengine.logging import MMLogger

    handlers = MMLogger.get_current_instance().handlers
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel("ERROR")
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def statistics(preprocessor: Mapping[str, Any]) -> tuple[Normalise, bool]:
    """Normalisation of images in [0, 1] as the settings of mmdet's preprocessor say, and whether channels are BGR."""
    mean, std = preprocessor.get("mean") or (0.0, 0.0, 0.0), preprocessor.get("std") or (1.0, 1.0, 1.0)
    bgr = not preprocessor.get("bgr_to_rgb", False)
    order = slice(None, None, -1 if bgr else 1)
    return Normalise([x / 255 for x in mean][order], [x / 255 for x in std][order]), bgr


def nothing_frozen(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a backbone, made for weights of ImageNet as configurations have them, for random ones."""
    learns = {"frozen_stages": -1, "norm_eval": False}
    changed = {**backbone, **{key: value for key, value in learns.items() if key in backbone}}
    if isinstance(backbone.get("norm_cfg"), Mapping) and "requires_grad" in backbone["norm_cfg"]:
        changed["norm_cfg"] = {**backbone["norm_cfg"], "requires_grad": True}
    return changed
