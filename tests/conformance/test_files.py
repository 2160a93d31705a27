# SPDX-License-Identifier: Apache-2.0
"""What belongs to every distiller: an export, a YAML file, a test, an example and a source. All are discovered."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import kdlvfm.core
import kdlvfm.distillers
import kdlvfm.distillers.synthesizers
from kdlvfm.core import Distiller

ROOT = Path(__file__).parents[2]
PACKAGE = kdlvfm.distillers
MODULES = [f"{PACKAGE.__name__}.{found.name}" for found in pkgutil.iter_modules(PACKAGE.__path__) if not found.ispkg]
DOCUMENTED = [
    f"{package.__name__}.{found.name}"
    for package in (kdlvfm.core, PACKAGE, kdlvfm.distillers.synthesizers)
    for found in pkgutil.iter_modules(package.__path__)
]
TASKS = ("segmentation", "detection", "diffusion", "representation")
YAML_FILES = sorted((ROOT / "configs" / "distiller").glob("*.yaml"))


def public(module, kind):
    """Classes or functions that `module` defines itself under a public name."""
    members = inspect.getmembers(importlib.import_module(module), kind)
    return [member for name, member in members if member.__module__ == module and not name.startswith("_")]


def distillers_of(module):
    return [found for found in public(module, inspect.isclass) if issubclass(found, Distiller)]


def target_of(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["_target_"]


@pytest.fixture(params=MODULES, ids=lambda name: name.rpartition(".")[2])
def module(request):
    return request.param


@pytest.fixture(params=YAML_FILES, ids=lambda path: path.stem)
def yaml_file(request):
    return request.param


def test_there_is_something_to_test():
    assert len(MODULES) >= 4
    assert len(YAML_FILES) >= len(MODULES)


def test_one_module_one_method_and_it_is_exported(module):
    found = distillers_of(module)
    assert len(found) == 1
    losses = [function for function in public(module, inspect.isfunction) if function.__name__.endswith("_loss")]
    for member in (*found, *losses):
        assert member.__name__ in PACKAGE.__all__, f"kdlvfm/distillers/__init__.py does not export {member.__name__}"
        assert vars(PACKAGE)[member.__name__] is member


def test_what_the_package_exports_is_defined_in_its_modules_or_in_the_core():
    homes = {*MODULES, *DOCUMENTED}
    assert len(PACKAGE.__all__) == len(set(PACKAGE.__all__))
    for name in PACKAGE.__all__:
        member = vars(PACKAGE)[name]
        assert not name.startswith("_")
        assert inspect.isclass(member) or inspect.isfunction(member), name
        assert member.__module__ in homes, name


def test_some_yaml_file_names_the_class(module):
    (method,) = distillers_of(module)
    target = f"{PACKAGE.__name__}.{method.__name__}.from_context"
    assert target in [target_of(path) for path in YAML_FILES]


def test_every_yaml_file_names_an_exported_class_and_introduces_it(yaml_file):
    node = yaml.safe_load(yaml_file.read_text(encoding="utf-8"))
    package, name, builder = node["_target_"].rsplit(".", 2)
    assert (package, builder) == (PACKAGE.__name__, "from_context")
    assert issubclass(vars(PACKAGE)[name], Distiller)
    assert node["_partial_"] is True
    about = node["about"]
    tasks = about.pop("tasks", [])
    assert tasks, "`about.tasks` says what the method is for"
    assert tasks == [task for task in TASKS if task in tasks], f"out of {', '.join(TASKS)}, in this order"
    assert set(about) == {"title", "trains", "paper"}
    assert all(isinstance(line, str) and line for line in about.values())


def test_it_has_a_test_file(module):
    name = module.rpartition(".")[2]
    path = ROOT / "tests" / "distillers" / f"test_{name}.py"
    assert path.is_file()
    assert "def test_" in path.read_text(encoding="utf-8")


def test_the_class_shows_an_example_that_can_be_run(module):
    (method,) = distillers_of(module)
    assert doctest.DocTestParser().get_examples(method.__doc__)


def test_a_loss_says_its_shapes_its_source_and_shows_an_example(module):
    for function in public(module, inspect.isfunction):
        if not function.__name__.endswith("_loss"):
            continue
        text = inspect.getdoc(function)
        source = text.partition("Source:\n")[2].partition("\n\n")[0]
        assert re.search(r"\b(19|20)\d\d\b", source), "name the paper and its year under 'Source:'"
        assert "Returns:\n" in text
        assert re.search(r"Args:\n(?:.*\n)*?.*\(B, ", text), "give the shapes of the arguments"
        assert doctest.DocTestParser().get_examples(text)


def test_what_a_yaml_file_cites_is_the_source_of_the_code(yaml_file):
    cited = re.findall(r"\b(?:19|20)\d\d\b", yaml.safe_load(yaml_file.read_text(encoding="utf-8"))["about"]["paper"])
    code = importlib.import_module(vars(PACKAGE)[target_of(yaml_file).rsplit(".", 2)[1]].__module__)
    text = Path(code.__file__).read_text(encoding="utf-8")
    assert all(year in text for year in cited)


@pytest.mark.parametrize("name", DOCUMENTED, ids=lambda name: name.removeprefix("kdlvfm."))
def test_examples_in_docstrings_run_as_shown(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
