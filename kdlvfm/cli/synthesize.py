# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm synthesize`: look at the images that a run without data learns from."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kdlvfm.cli import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from kdlvfm.core import FeatureModel, Step, Task, Teacher, Update
    from kdlvfm.core.synthesizer import Synthesizer
    from kdlvfm.data.base import SampleData

_DESCRIPTION = """\
Write a sheet of synthetic images with the teacher's predictions beside them, or
its features as colours where it has no classes: the images that a finished run
without data ended with, or those that a configuration comes to against a
student that has not learned yet.
"""
_EXAMPLES = """\
examples:
  kdlvfm synthesize runs/digit_scenes/resnet18_fpn/data_free-kd@pool-digit_scenes_vit-seed0-1a2b3c
  kdlvfm synthesize experiment=demo distiller=data_free:kd synthesizer=pool --steps 100 --out pool.png
"""
_OWN = re.compile(r"kdlvfm\.distillers\.synthesizers\.(\w+)\.from_context")
_STATE = "distiller.synthesizer."


class _Source(NamedTuple):
    """Everything that images are made with."""

    synthesizer: Synthesizer
    teacher: Teacher
    student: FeatureModel
    task: Task
    data: SampleData
    size: tuple[int, int]


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm synthesize",
        usage="kdlvfm synthesize (RUN | GROUP=NAME KEY=VALUE ...) [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="+", metavar="RUN", help="folder of a run, or the configuration of one")
    parser.add_argument("--images", type=int, default=24, metavar="N", help="on the sheet (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="of synthesis for a configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="(default: synthetic.png, in the folder of the run if there is one)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    options = parser.parse_intermixed_args(arguments)
    if options.images < 1 or options.steps < 0:
        raise CommandError("--images must be at least 1, and --steps at least 0.")
    folder = Path(options.what[0]) if len(options.what) == 1 and "=" not in options.what[0] else None
    path = options.out or (folder or Path()) / "synthetic.png"
    if path.is_dir():
        raise CommandError(f"--out {path} is a folder; name a file in it, such as {path / 'synthetic.png'}.")
    import torch

    from kdlvfm.cli.runs import find_device

    device = find_device(options.device)
    try:
        if folder is None:
            source, config = _of_configuration(options.what)
            _move(source, device)
            _practise(source, config, options.steps, options.images, device)
        else:
            source = _of_run(folder)
            _move(source, device)
        torch.manual_seed(0)
        images = _last(_blank(source, options.images, 0, device), source, None)
        _draw(images, source, path)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"wrote  {path} ({len(images)} images of {images.shape[2]}x{images.shape[3]})")
    print("next   " + (f"kdlvfm table {folder.parent}" if folder else f"kdlvfm train {' '.join(options.what)}"))
    return 0


def _of_configuration(overrides: Sequence[str]) -> tuple[_Source, dict[str, Any]]:
    """All parts of a run that has not begun."""
    from kdlvfm.cli.build import build
    from kdlvfm.cli.config import compose
    from kdlvfm.distillers import DataFree

    config = compose(overrides)
    if not isinstance(config["distiller"].get("synthesizer"), Mapping):
        raise CommandError(
            f"distiller={config['choices']['distiller']} learns from the images of the data; choose "
            "distiller=data_free:kd, for example."
        )
    config["run"]["progress"] = "none"
    cell = build(config)
    assert isinstance(cell.distiller, DataFree)
    assert cell.teacher is not None
    size = cell.data.batch_shape()[1:]
    return _Source(cell.distiller.synthesizer, cell.teacher, cell.student, cell.task, cell.data, size), config


def _of_run(folder: Path) -> _Source:
    """The parts of a finished run. Nothing in its folder can execute: it may only name parts of this library."""
    import torch

    from kdlvfm.cli.build import build_data, build_task, build_teacher
    from kdlvfm.cli.runs import load_student, read_run, teacher_from_run
    from kdlvfm.cli.targets import check_targets, instantiate
    from kdlvfm.core import Context

    record, origin = read_run(folder), folder / "record.json"
    config = record["config"]
    node = config["distiller"].get("synthesizer")
    if not isinstance(node, Mapping):
        raise CommandError(f"{folder} learned from the images of its data: it has no synthesizer.")
    _check_synthesizer(node, origin)
    # A teacher from a run makes the same check on that run.
    from_run = f"{teacher_from_run.__module__}.{teacher_from_run.__name__}"
    named = {key: value for key, value in config["teacher"].items() if (key, value) != ("_target_", from_run)}
    check_targets([config["data"], config["task"], named], origin)
    data = build_data(config)
    task, teacher = build_task(config, data), build_teacher(config["teacher"], data.class_names)
    assert teacher is not None
    student, shape = load_student(folder, record), data.batch_shape()
    context = Context(student, teacher, task, data.num_classes, data.num_samples, batch_shape=shape)
    synthesizer: Synthesizer = instantiate(node)(context)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        kept = {key.removeprefix(_STATE): value for key, value in state.items() if key.startswith(_STATE)}
        synthesizer.load_state_dict(kept)
    except (OSError, RuntimeError, KeyError) as error:
        raise CommandError(f"{checkpoint} does not hold the synthesizer of the run: {error}") from error
    return _Source(synthesizer, teacher, student, task, data, shape[1:])


def _check_synthesizer(node: Mapping[str, Any], origin: Path) -> None:
    """As `check_targets`, for a synthesiser of this library."""
    from kdlvfm.cli.targets import check_targets
    from kdlvfm.core.synthesizer import Synthesizer
    from kdlvfm.distillers import synthesizers

    target = str(node.get("_target_"))
    found = _OWN.fullmatch(target)
    named = vars(synthesizers).get(found[1]) if found else None
    if not (isinstance(named, type) and issubclass(named, Synthesizer)):
        raise CommandError(f"{origin} asks to call {target!r}, which is no synthesizer of kdlvfm; it was not loaded.")
    check_targets([value for key, value in node.items() if key != "_target_"], origin)


def _move(source: _Source, device: Any) -> None:
    for part in (source.synthesizer, source.teacher, source.student):
        part.to(device)


def _blank(source: _Source, count: int, number: int, device: Any) -> Step:
    """A step without data."""
    import torch

    from kdlvfm.core import Step

    images = torch.zeros((), device=device).expand(count, 3, *source.size)
    index = torch.full((count,), -1, device=device)
    return Step(images, None, index, 0, number, source.student, source.teacher, source.task, number=number)


def _last(step: Step, source: _Source, optimizer: Any) -> Tensor:
    """The images of a step, with the synthesiser's updates taken, if it has an optimizer."""
    import torch

    making = source.synthesizer.synthesize(step, ())
    while True:
        try:
            update: Update = next(making)
        except StopIteration as end:
            images: Tensor = end.value.images
            return images
        if optimizer is not None:
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(list(update.terms.values())).sum())
            optimizer.step()


def _practise(source: _Source, config: Mapping[str, Any], steps: int, count: int, device: Any) -> None:
    """Steps of synthesis with the recipe's optimizer, at its initial learning rate."""
    import torch

    from kdlvfm.cli.build import build_plans
    from kdlvfm.core.synthesizer import GROUP

    trained = [parameter for parameter in source.synthesizer.parameters() if parameter.requires_grad]
    optimizer = build_plans(config["recipe"])[GROUP].optimizer(trained) if trained else None
    for number in range(steps):
        torch.manual_seed(number)
        _last(_blank(source, count, number, device), source, optimizer)
        if (number + 1) % max(1, steps // 5) == 0:
            print(f"step {number + 1}/{steps}", flush=True)


def _draw(images: Tensor, source: _Source, path: Path) -> None:
    """The sheet."""
    import torch

    from kdlvfm.reporting.sheet import component_colours, image_sheet

    model = source.teacher.model
    if source.task.truth == "masks" and source.task.solves(model):
        with torch.no_grad():
            sure, classes = source.teacher(images, ("logits",))["logits"].float().softmax(dim=1).max(dim=1)
        palette = torch.tensor(source.data.palette) / 255
        present = torch.unique(classes.cpu()).tolist()
        legend = [(source.data.class_names[index], source.data.palette[index]) for index in present]
        captions = [f"sure {100 * share:.0f} %" for share in sure.mean(dim=(1, 2)).tolist()]
        image_sheet(images.cpu(), palette[classes.cpu()].permute(0, 3, 1, 2), captions, "teacher", path, legend)
        return
    tap = next(tap for tap in reversed(model.taps()) if "map." in tap)
    with torch.no_grad():
        colours = component_colours(source.teacher(images, (tap,))[tap]).cpu()
    image_sheet(images.cpu(), colours, [""] * len(images), f"teacher, {tap}", path)
