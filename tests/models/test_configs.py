# SPDX-License-Identifier: Apache-2.0
"""The YAML of teachers and students: each builds, and says the truth about its licence."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from timm.models import get_pretrained_cfg

from kdlvfm.cli.build import build_student
from kdlvfm.cli.config import compose
from kdlvfm.core import Detector

CONFIGS = Path(__file__).parents[2] / "configs"
TEACHERS = sorted((CONFIGS / "teacher").glob("*.yaml"))
STUDENTS = sorted((CONFIGS / "student").glob("*.yaml"))
OF_TIMM = [p for p in TEACHERS if "TimmEncoder" in p.read_text() and "???" not in p.read_text()]
COMPLETE = [p for p in STUDENTS if "???" not in p.read_text() and "defaults:" not in p.read_text()]
DETECTORS = [p for p in COMPLETE if "MMDetModel" in p.read_text()]
OUR_DETECTOR = CONFIGS / "student" / "digit_scenes_detector.yaml"  # which has tests of its own
DENOISERS = [p for p in COMPLETE if "models.diffusers" in p.read_text()]
ENCODERS = [p for p in COMPLETE if "for task=representation" in p.read_text()]
SEGMENTERS = [p for p in COMPLETE if p not in (*DETECTORS, OUR_DETECTOR, *DENOISERS, *ENCODERS)]


def load(path):
    config = OmegaConf.load(path)
    about = config.pop("about")
    return config, about


@pytest.mark.parametrize("path", TEACHERS + STUDENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_introduces_itself(path):
    _, about = load(path)
    assert {"title", "licence"} <= set(about) <= {"title", "licence", "paper", "data"}
    assert about.title


@pytest.mark.parametrize("path", OF_TIMM, ids=lambda path: path.stem)
def test_teachers_of_timm_build_and_state_timms_licence(path):
    config, about = load(path)
    assert about.paper
    assert about.licence == (get_pretrained_cfg(config.name).license or "unknown")
    config.pop("input_size")
    with torch.device("meta"):
        model = instantiate(config, pretrained=False)
        features = model(torch.empty(1, 3, 90, 70), ["map.-1", "tokens", "pooled"])
    assert model.card.name == config.name
    assert features["map.-1"].shape[1] == model.tap_info("map.-1").dim


@pytest.mark.parametrize("path", SEGMENTERS, ids=lambda path: path.stem)
def test_students_build_and_label_every_pixel(path):
    config, _ = load(path)
    inner = config.encoder if "encoder" in config else config
    inner.pretrained = False
    model = instantiate(config, num_classes=4).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 61, 75), ["logits"])["logits"].shape == (1, 4, 61, 75)


@pytest.mark.parametrize("path", ENCODERS, ids=lambda path: path.stem)
def test_encoders_build_for_data_without_classes_and_have_no_classifier(path):
    model = build_student(compose([f"student={path.stem}", "student.pretrained=false"])["student"], num_classes=0)
    assert "logits" not in model.taps()
    assert not any(key.startswith("fc.") for key in model.net.state_dict())


@pytest.mark.parametrize("path", DETECTORS, ids=lambda path: path.stem)
def test_students_build_and_detect(path):
    pytest.importorskip("mmdet")
    config, about = load(path)
    assert about.paper
    config.encoder.pretrained = False
    with torch.device("meta"):
        model = instantiate(config, num_classes=4)
    assert isinstance(model, Detector)
    assert model.num_classes == 4
    assert set(model.task_taps) <= set(model.taps())


@pytest.mark.parametrize("path", DENOISERS, ids=lambda path: path.stem)
def test_students_build_and_find_noise_in_images_of_the_datas_size(path):
    pytest.importorskip("diffusers")
    chosen = ("task=diffusion", "data=digits", "recipe=diffusion_digits", f"student={path.stem}")
    model = build_student(compose(chosen)["student"], num_classes=10).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 8, 8), ["noise"])["noise"].shape == (2, 3, 8, 8)


def test_head_takes_an_encoder_from_the_list_of_teachers():
    encoder = ("teacher@student.encoder=timm", "student.encoder.name=test_vit", "student.encoder.pretrained=false")
    student = build_student(compose(["student=head", *encoder])["student"], num_classes=4)
    assert not any(parameter.requires_grad for parameter in student.encoder.parameters())
    with torch.no_grad():
        assert student.eval()(torch.rand(1, 3, 61, 75), ["logits"])["logits"].shape == (1, 4, 61, 75)


def test_detector_head_takes_an_encoder_from_the_list_of_teachers():
    pytest.importorskip("mmdet")
    encoder = ("teacher@student.encoder=timm", "student.encoder.name=test_vit", "student.encoder.pretrained=false")
    student = build_student(compose(["student=detector_head", *encoder])["student"], num_classes=4)
    assert not any(parameter.requires_grad for parameter in student.encoder.parameters())
    with torch.no_grad():
        assert student.eval()(torch.rand(1, 3, 61, 75), ["cls.0"])["cls.0"].shape == (1, 4, 8, 12)


def test_any_configuration_of_mmdet_on_any_cnn():
    pytest.importorskip("mmdet")
    chosen = ("student=mmdet_timm", "student.config=atss_r50_fpn_1x_coco", "student.encoder.name=test_convnext")
    changed = ("student.encoder.pretrained=false", "student.changes.bbox_head.stacked_convs=2")
    student = build_student(compose([*chosen, *changed])["student"], num_classes=4)
    assert isinstance(student, Detector)
    assert len(student.net.bbox_head.cls_convs) == 2
