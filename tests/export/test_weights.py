# SPDX-License-Identifier: Apache-2.0
"""Weights under the names of their library, and the lines that load them, executed."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from kdlvfm.export.weights import Network, as_text, write_weights


def execute(network, folder, monkeypatch):
    """What a stranger has after the three lines, in the folder of the file."""
    monkeypatch.chdir(folder)
    namespace = {}
    exec("\n".join(network.lines()), namespace)
    return namespace


def test_three_lines_load_a_network_and_a_call_within_a_call(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 1, enable_nested_tensor=False)
    layer = {"_target_": "torch.nn.TransformerEncoderLayer", "d_model": 4, "nhead": 2, "dim_feedforward": 8}
    arguments = {"encoder_layer": layer, "num_layers": 1, "enable_nested_tensor": False}
    network = Network("net.safetensors", net, "torch.nn.TransformerEncoder", arguments)
    write_weights(network, tmp_path, {})
    assert network.lines()[0] == "import safetensors.torch, torch.nn"
    loaded = execute(network, tmp_path, monkeypatch)["net"]
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())


def test_a_network_may_be_held_by_a_model():
    network = Network("a.safetensors", nn.Identity(), "pkg.Model", {"size": [1, 2], "more": {"k": None}}, ".net")
    assert network.lines() == (
        "import safetensors.torch, pkg",
        "model = pkg.Model(size=[1, 2], more={'k': None}).eval()",
        'model.net.load_state_dict(safetensors.torch.load_file("a.safetensors"))',
    )


def test_metadata_stand_in_the_file(tmp_path):
    network = Network("net.safetensors", nn.Linear(2, 3), "torch.nn.Linear", {"in_features": 2, "out_features": 3})
    write_weights(network, tmp_path, {"classes": ["a", "b"], "licence": "MIT"})
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {"weight", "bias"}
    assert metadata["format"] == "pt"
    assert metadata["target"] == "torch.nn.Linear"
    assert json.loads(metadata["arguments"]) == {"in_features": 2, "out_features": 3}
    assert json.loads(metadata["classes"]) == ["a", "b"]
    assert metadata["licence"] == "MIT"
    assert metadata["load"].count("\n") == 2


@pytest.mark.parametrize(
    ("value", "text"), [("plain", "plain"), (3, "3"), ([1.5], "[1.5]"), ({"a": None}, '{"a": null}')]
)
def test_text_is_kept_and_everything_else_is_json(value, text):
    assert as_text({"key": value}) == {"key": text}
