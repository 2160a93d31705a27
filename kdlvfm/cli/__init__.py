# SPDX-License-Identifier: Apache-2.0
"""The command `kdlvfm`. Each subcommand is a module of this package, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

_COMMANDS = {
    "train": "train a student, with a distiller or without (the baseline)",
    "evaluate": "measure a finished run again, on any split",
    "tune": "search for hyper-parameters on the validation split",
    "predict": "draw what a finished run sees in images of yours; label maps and boxes as files",
    "label": "let a teacher label your images: masks or boxes that kdlvfm train reads",
    "export": "take a student out: weights for timm or SMP, ONNX, INT8, a model card",
    "status": "how far sweeps are: done, running, failed, interrupted, waiting",
    "table": "compare runs: records in, honest table out",
    "report": "the table as one page to send: figures, and command, revision and logs of every run",
    "inspect": "taps of a teacher and a student, and which of them pair up; of a run, its diagnostics",
    "profile": "where the time of a training step goes, and what its bottleneck is",
    "cache": "stored features of teachers: list them, verify them against the teacher, remove them",
    "synthesize": "look at the images that a run without data learns from",
    "list": "teachers, students, distillers, data and recipes, with licences and papers",
    "download": "fetch a data set from its public repository, checksummed",
    "demo": "the whole story in minutes: teacher, baseline, three distillers, table, picture",
}
_EXAMPLES = """\
examples:
  kdlvfm train teacher=dinov3_vits16 student=resnet18_deeplabv3plus distiller=cwd data=camvid recipe=cirkd_40k
  kdlvfm train -m distiller=none,kd,cwd seed=0,1,2 data=camvid teacher=from_run teacher.run=runs/my_teacher
  kdlvfm table runs
"""


class CommandError(Exception):
    """A mistake of the caller: shown as one line, without a traceback."""

    code = 1


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    The exit code is 0 for success, 1 for an error, 2 for a wrong call, 75 for a run that another process computes, 130
    for an interruption.
    """
    from kdlvfm import __version__

    parser = argparse.ArgumentParser(
        prog="kdlvfm",
        description="Knowledge distillation from vision foundation models into small CNNs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kdlvfm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in _COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    arguments = [*(sys.argv[1:] if argv is None else argv)]  # not list(): our sub-module of that name hides it
    if not arguments:
        parser.print_help()
        raise SystemExit(2)
    called = parser.parse_args(arguments[:1])
    try:
        module = importlib.import_module(f"kdlvfm.cli.{called.command}")
        code = module.run(arguments[1:])
    except CommandError as error:
        print(f"kdlvfm {called.command}: error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        print(
            f"kdlvfm {called.command}: error: {error.name} is not installed: pip install 'kdlvfm[{extra}]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"kdlvfm {called.command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    raise SystemExit(code)


_EXTRAS = {
    "lightning": "train",
    "hydra": "train",
    "omegaconf": "train",
    "segmentation_models_pytorch": "train",
    "torchmetrics": "train",
    "sklearn": "train",
    "scipy": "train",
    "matplotlib": "train",
    "rich": "train",
    "jsonschema": "train",
    "open_clip": "clip",
    "mmdet": "mmdet",
    "faster_coco_eval": "mmdet",
    "diffusers": "diffusion",
    "submitit": "slurm",
    "optuna": "tune",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
}
