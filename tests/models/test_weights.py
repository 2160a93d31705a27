# SPDX-License-Identifier: Apache-2.0
"""Reading and fetching weights: nothing executes, and each failure is one line with its remedy."""

import argparse
import hashlib
import pathlib
from collections import OrderedDict
from urllib.error import URLError

import numpy as np
import pytest
import torch

from kdlvfm.models import weights
from kdlvfm.models.weights import WeightsError, fetch, read_weights, sha256_of


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (pathlib.Path.touch, (self.target,))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"w": torch.zeros(1), "x": Malice(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="weights only") as error:
        read_weights(tmp_path / "evil.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


class Opening(Malice):
    def __reduce__(self):
        return (open, (str(self.target), "w"))


class Log:
    """Of a class that only whoever trained has."""

    def __init__(self):
        self.values = np.arange(3.0)


@pytest.mark.parametrize("beside", [{"log": Log()}, {"args": argparse.Namespace(lr=0.1)}, {"step": np.float64(2)}])
def test_what_lies_beside_the_weights_is_passed_over_and_does_not_run(beside, tmp_path):
    content = {**beside, "evil": [Opening(tmp_path / "ran")], "state_dict": OrderedDict(w=torch.ones(2))}
    torch.save(content, tmp_path / "trained.pth")
    assert {name: value.tolist() for name, value in read_weights(tmp_path / "trained.pth").items()} == {"w": [1, 1]}
    assert not (tmp_path / "ran").exists()
    torch.save({**beside, "state_dict": torch.nn.Linear(2, 2)}, tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match=r"save its state_dict\(\) alone"):
        read_weights(tmp_path / "whole.pth")


def test_files_of_a_torch_before_zip_files(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.pth")["w"].tolist() == [1, 1]
    torch.save({"w": torch.ones(2), "log": Log()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="not a file of weights only"):
        read_weights(tmp_path / "old.pth")


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth"])
def test_unreadable_files_are_one_clear_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights in here")
    with pytest.raises(WeightsError, match=name) as error:
        read_weights(tmp_path / name)
    assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match="does not exist"):
        read_weights(tmp_path / "absent.pth")


def test_wrappings_come_off_and_other_content_is_refused(tmp_path):
    torch.save({"epoch": 3, "model": {"module.w": torch.ones(2)}}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth")["w"].tolist() == [1, 1]
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="no state dict"):
        read_weights(tmp_path / "b.pth")


def test_checksum(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_unreachable_hub_names_the_file_and_the_option_after_one_attempt(monkeypatch):
    attempts = []

    def no_network(*args, **kwargs):
        attempts.append(args)
        raise URLError("no network")

    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "urlopen", no_network)
    with pytest.raises(WeightsError, match=r"model.safetensors of timm/x .*checkpoint=PATH") as error:
        fetch("timm/x", "model.safetensors")
    assert len(attempts) == 1
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__


def test_offline_mode_is_obeyed_and_the_cache_used_first(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "urlopen", lambda *a, **k: pytest.fail("the network was used"))
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *args: None)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        fetch("timm/x", "model.safetensors")
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *args: str(tmp_path))
    assert fetch("timm/x", "model.safetensors") == tmp_path
