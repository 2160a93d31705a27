# SPDX-License-Identifier: Apache-2.0
"""What of a student loads into which library, for its export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kdlvfm.cli.runs import WEIGHTS, without_weights
from kdlvfm.core import FeatureModel
from kdlvfm.export.card import Statistics
from kdlvfm.export.weights import TARGET, Network
from kdlvfm.models.adapter import Normalise
from kdlvfm.models.timm import TimmEncoder

ENCODER = "encoder.safetensors"


def networks_of(student: FeatureModel, node: Mapping[str, Any], num_classes: int) -> Iterator[Network]:
    """The whole student, for SMP where it is one of SMP's networks and else for kdlvfm; and its encoder for timm.

    Args:
        student: a student that was loaded from a run.
        node: its configuration.
        num_classes: of its head.
    """
    target = str(node[TARGET])
    if target.endswith(".SMPModel"):
        named = {"arch": node["decoder"], "encoder_name": f"tu-{node['name']}", "encoder_weights": None}
        arguments = {**named, "classes": num_classes, **(node.get("decoder_kwargs") or {})}
        about = "for segmentation_models_pytorch; it takes images whose sides are multiples of its stride"
        yield Network(WEIGHTS, student.net, "segmentation_models_pytorch.create_model", arguments, about=about)
        return
    encoders = [module for module in student.modules() if isinstance(module, TimmEncoder)]
    arguments = without_weights(node)
    if isinstance(node.get("encoder"), Mapping) and len(encoders) == 1:
        # As it is and not as it was asked for: a file of weights may have left the classifier out.
        kwargs = {**(node["encoder"].get("model_kwargs") or {}), "num_classes": _classes(encoders[0])}
        arguments["encoder"] = {**arguments["encoder"], "model_kwargs": kwargs}
        arguments["encoder"].pop("input_size", None)
    arguments = {**{key: value for key, value in arguments.items() if key != TARGET}, "num_classes": num_classes}
    yield Network(WEIGHTS, student.net, target, arguments, ".net", about="for kdlvfm")
    if "encoder" in arguments and len(encoders) == 1 and "name" in arguments["encoder"]:
        given = {"model_name": arguments["encoder"]["name"], **arguments["encoder"]["model_kwargs"]}
        yield Network(ENCODER, encoders[0].net, "timm.create_model", given, about="the encoder alone, for timm")


def statistics_of(student: FeatureModel) -> Statistics:
    """What a student normalises images with."""
    used = next(module for module in student.modules() if isinstance(module, Normalise))
    mean, std = (tuple(round(x, 6) for x in values.flatten().tolist()) for values in (used.mean, used.std))
    return Statistics(mean, std)


def _classes(encoder: TimmEncoder) -> int:
    net: Any = encoder.net
    return int(net.num_classes)
