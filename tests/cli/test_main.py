# SPDX-License-Identifier: Apache-2.0
import builtins
import importlib

import pytest

from kdlvfm import __version__

COMMANDS = ("train", "evaluate", "status", "table", "inspect", "list", "download", "demo")


def test_without_arguments_the_help_is_shown(kdlvfm):
    ended = kdlvfm()
    assert ended.code == 2
    assert all(command in ended.out for command in COMMANDS)


def test_version(kdlvfm):
    assert kdlvfm("--version").out == f"kdlvfm {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command, kdlvfm):
    ended = kdlvfm(command, "--help")
    assert ended.code == 0
    assert f"usage: kdlvfm {command}" in ended.out


def test_an_unknown_subcommand_is_refused_with_those_there_are(kdlvfm):
    ended = kdlvfm("trian")
    assert ended.code == 2
    assert "'trian'" in ended.err
    assert "train" in ended.err


@pytest.mark.parametrize("command", ["evaluate", "status", "table", "list", "download", "demo"])
def test_an_unknown_option_is_refused(command, kdlvfm):
    ended = kdlvfm(command, "--nope")
    assert ended.code == 2
    assert "--nope" in ended.err or "required" in ended.err


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_an_unknown_option_of_a_hydra_command_is_refused(command, kdlvfm):
    ended = kdlvfm(command, "--nope")
    assert ended.code == 1
    assert "--nope" in ended.err


def test_a_library_that_is_not_installed_is_named_with_its_extra(kdlvfm, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'hydra'", name="hydra.core")

    monkeypatch.setattr(importlib, "import_module", missing)
    ended = kdlvfm("train")
    assert ended.code == 1
    assert ended.err == "kdlvfm train: error: hydra.core is not installed: pip install 'kdlvfm[train]'\n"


def test_the_subcommand_called_list_does_not_break_the_next_call(kdlvfm):
    assert kdlvfm("list", "distiller").code == 0
    assert kdlvfm("list", "distiller").code == 0
    assert builtins.list is list
