# SPDX-License-Identifier: Apache-2.0
"""The command in this process, and the options of a run of seconds."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kdlvfm.cli import main

CHECKOUT = Path(__file__).parents[2]

SMALL = (
    "data=digit_scenes",
    "data.labelled=8",
    "data.unlabelled=8",
    "data.val=4",
    "data.test=4",
    "recipe=digit_scenes",
    "recipe.steps=6",
    "recipe.batch_size=4",
    "recipe.warmup_steps=2",
    "run.num_workers=0",
    "run.checkpoint_every=2",
    "run.progress=line",
    "run.inference_seconds=null",
    "logger=none",
)
STUDENT = ("student=timm_linear", "student.encoder.name=test_resnet", "student.encoder.pretrained=false")
VIT = ("teacher=timm", "teacher.name=test_vit", "teacher.pretrained=false")
TWO_STEPS = (
    "data=digit_scenes",
    "data.labelled=6",
    "data.unlabelled=6",
    "data.val=2",
    "data.test=2",
    "recipe=digit_scenes",
    "recipe.steps=2",
    "recipe.batch_size=6",
    "recipe.warmup_steps=0",
    "run.num_workers=0",
    "run.progress=none",
    "logger=none",
    "teacher=digit_scenes_vit",
)
RESNET = ("student=resnet18_fpn", "student.pretrained=false")
SCENES = ("deep/er/s3", "s0", "s1", "s2", "s4", "s5")
# A method that is for students of one kind only.
STUDENTS = {
    "deit": (
        "student=timm_linear",
        "student.encoder.name=deit_tiny_distilled_patch16_224",
        "student.encoder.pretrained=false",
        "student.encoder.model_kwargs.depth=2",
        "student.encoder.model_kwargs.num_classes=11",
    )
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def kdlvfm(capsys):
    """Run the command in this process."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def train(kdlvfm):
    """A short run of a small student."""

    def call(*overrides):
        return kdlvfm("train", *SMALL, *STUDENT, *overrides)

    return call


@pytest.fixture
def vit():
    return VIT


@pytest.fixture(scope="session")
def small():
    return (*SMALL, *STUDENT)


@pytest.fixture(scope="session")
def two_steps():
    """The options of a run of two steps with the package's own ViT as teacher; the student is still to be named."""
    return TWO_STEPS


@pytest.fixture(scope="session")
def student_of():
    """The options of a student that a distiller can teach."""
    return lambda distiller: STUDENTS.get(distiller, RESNET)


@pytest.fixture
def refused(kdlvfm, small, tmp_path):
    """Asserts that a run ends with one line and exit code 1 and leaves no folder; gives the line."""

    def call(*overrides, base=small):
        out = tmp_path / "refused"
        ended = kdlvfm("train", *base, f"out={out}", *overrides)
        assert ended.code == 1
        assert ended.err.startswith("kdlvfm train: error: ")
        assert ended.err.count("\n") == 1
        assert "step " not in ended.out
        assert not out.exists()
        return ended.err

    return call


@pytest.fixture(scope="session")
def shell():
    """A started process of the command, for what a process alone can show."""

    def start(*arguments, **options):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KDLVFM_DATA": "", **options.pop("env", {})}
        return subprocess.Popen(
            [sys.executable, "-m", "kdlvfm", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **{"cwd": CHECKOUT, **options},
        )

    return start


@pytest.fixture(scope="session")
def head(tmp_path_factory):
    """A finished run of a teacher's head: a frozen ViT with a linear head."""
    folder = tmp_path_factory.mktemp("head") / "teacher"
    encoder = ("student=timm_linear", "student.encoder.name=test_vit", "student.encoder.pretrained=false")
    with pytest.raises(SystemExit) as ended:
        main(["train", *SMALL, *encoder, "student.freeze=true", "distiller=none", f"out={folder}"])
    assert not ended.value.code
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Six scenes of 64x64 pixels, one of them in a folder of its own, and a file that is no image."""
    from PIL import Image

    from kdlvfm.data.digit_scenes import SceneGenerator

    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(SCENES):
        Image.fromarray(SceneGenerator("test").scene(number).image).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def interrupt_at(monkeypatch):
    """Let Ctrl-C be pressed once, when `Masks` or `Boxes` has labelled so many images; gives the names of all."""
    from kdlvfm.cli import label_kinds

    def arrange(kind, images):
        labeller, names, pressed = getattr(label_kinds, kind), [], []
        label = labeller.label

        def interrupted(self, item, image):
            if len(names) == images and not pressed:
                pressed.append(True)
                raise KeyboardInterrupt
            names.append(item.name)
            return label(self, item, image)

        monkeypatch.setattr(labeller, "label", interrupted)
        return names

    return arrange


@pytest.fixture(scope="session")
def gfl_pair(tmp_path_factory):
    """Overrides: a small ResNet with GFL, its encoder's weights from a file, so frozen in part, and a teacher for it.

    The student's scores are high from the start: GFL divides by their sum where objects are, and by 1 where it is less.
    """
    import timm
    import torch

    from kdlvfm.models.mmdet import MMDetModel

    folder = tmp_path_factory.mktemp("gfl")
    head = {"in_channels": 64, "feat_channels": 64, "stacked_convs": 2}
    sure = {"type": "Normal", "name": "gfl_cls", "std": 0.01, "bias_prob": 0.5}
    narrow = {"neck": {"out_channels": 64}, "bbox_head": head}
    high = {**head, "init_cfg": {"type": "Normal", "layer": "Conv2d", "std": 0.01, "override": sure}}
    wide = {"in_channels": [64, 128, 256, 512], "out_channels": 64}
    teacher = {"backbone": {"depth": 18}, "neck": wide, "bbox_head": head}
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), folder / "encoder.pt")
    torch.save(MMDetModel("gfl_r50_fpn_1x_coco", 10, changes=teacher).net.state_dict(), folder / "teacher.pt")
    return (
        "student=resnet18_gfl",
        "student.encoder.name=test_resnet",
        f"student.encoder.checkpoint={folder / 'encoder.pt'}",
        f"student.changes={_written({**narrow, 'bbox_head': high})}",
        "teacher=mmdet",
        "teacher.config=gfl_r50_fpn_1x_coco",
        f"teacher.checkpoint={folder / 'teacher.pt'}",
        "teacher.num_classes=10",
        f"teacher.changes={_written(teacher)}",
    )


def _written(value):
    """A value as an override has it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    return str(value)
