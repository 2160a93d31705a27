# SPDX-License-Identifier: Apache-2.0
"""The pages are true: their code runs, their commands compose, and what they name and link to exists."""

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

import kdlvfm.cli.config
from kdlvfm.cli import _COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]
MADE_BY_THE_DEMO = ROOT / "docs" / "images" / "demo.png"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_CHOICE = re.compile(rf"\b({'|'.join(kdlvfm.cli.config.GROUPS)})=([a-z0-9_*,]+)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_YAML_PATH = re.compile(r"(?:# @package _global_\n)?# (configs/\S+\.yaml)\n")


def page_id(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    return [body for language, body in _BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def calls(page):
    """Every call of `kdlvfm` on a page, in blocks and in running text, as lists of arguments without the program."""
    lines = [line for body in blocks(page, "bash", "sh") for line in body.replace("\\\n", " ").splitlines()]
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    words = [shlex.split(line, comments=True) for line in (*lines, *_INLINE.findall(prose)) if "kdlvfm " in line]
    return [call[1:] for call in words if call[:1] == ["kdlvfm"]]


def single_run(arguments):
    """The overrides of the first run that the arguments of `train` or `inspect` ask for.

    A run that goes on from another one is composed as if it did not, for there is none.
    """
    overrides = [argument for argument in arguments if not argument.startswith(("-", "after="))]
    if "-m" not in arguments:
        return overrides
    return [o if o.partition("=")[2].startswith(("[", "{")) else o.partition(",")[0] for o in overrides]


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


CALLS = [pytest.param(page, call, id=f"{page_id(page)}: {' '.join(call)}") for page in PAGES for call in calls(page)]
COMPOSED = [
    case
    for case in CALLS
    if case.values[1][:1] in (["train"], ["inspect"])
    and "--help" not in case.values[1]
    and not re.fullmatch("inspect [^= ]+", " ".join(case.values[1]))  # a run, not a configuration
]
LINKS = [
    pytest.param(page, link, id=f"{page_id(page)}: {link}")
    for page in PAGES
    for link in _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8")))
    if "://" not in link
]


@pytest.fixture
def with_configs_of(tmp_path, monkeypatch):
    """Adds the YAML files that a page shows to a copy of the configurations, which is then the one in use."""

    def use(page):
        copy = tmp_path / "configs"
        shutil.copytree(kdlvfm.cli.config.config_dir(), copy)
        for body in blocks(page, "yaml"):
            path = _YAML_PATH.match(body)
            assert path, "a YAML block starts with a comment that says which file it is"
            assert not (tmp_path / path[1]).exists(), "a page does not repeat a file of the repository"
            (tmp_path / path[1]).write_text(body, encoding="utf-8")
        monkeypatch.setattr(kdlvfm.cli.config, "config_dir", lambda: copy)

    return use


def test_the_pages_hold_something_to_test():
    assert len(PAGES) > 18
    assert len(COMPOSED) > 15
    assert len(LINKS) > 10


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_id)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for number, body in enumerate(blocks(page, "python"), start=1):
        exec(compile(body, f"{page.name}, python block {number}", "exec", dont_inherit=True), namespace)
    for name, test in list(namespace.items()):
        if name.startswith("test_"):
            test()


@pytest.mark.parametrize(("page", "call"), COMPOSED)
def test_runs_compose(page, call, with_configs_of):
    with_configs_of(page)
    assert kdlvfm.cli.config.compose(single_run(call[1:]))["student"]


@pytest.mark.parametrize(("page", "call"), CALLS)
def test_subcommands_and_their_options_exist(page, call):
    command, *arguments = call
    if command.startswith("-"):
        command, arguments = None, call
    assert command is None or command in _COMMANDS
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        main([*([command] if command else []), "--help"])
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", shown.getvalue())) | {"--help"}
    assert {argument.partition("=")[0] for argument in arguments if argument.startswith("-")} <= known


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_of_parts_exist(page, with_configs_of):
    with_configs_of(page)
    text = page.read_text(encoding="utf-8")
    for body in blocks(page, "python"):
        text = text.replace(body, "")
    for group, names in _CHOICE.findall(text):
        for name in filter(None, names.split(",")):
            assert name in kdlvfm.cli.config.options(group), f"{group}={name}"


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if target == MADE_BY_THE_DEMO and not target.exists():
        pytest.skip("the picture is made by `make demo`")
    assert target.is_relative_to(ROOT)
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))) <= targets
