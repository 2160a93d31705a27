# SPDX-License-Identifier: Apache-2.0
"""CustomKD of a detector: every level that its head reads has a customiser and a projector of its own."""

from dataclasses import replace

import torch

from kdlvfm.core import Teacher
from kdlvfm.distillers import CustomKD


def test_a_detector_has_all_levels_of_its_head_customised(detection_context, detection_batch, detector, make_step):
    customkd = CustomKD.from_context(detection_context)
    levels = ("fpn.0", "fpn.1", "fpn.2")
    assert customkd.student_taps == customkd.teacher_taps == levels
    images, target, index = detection_context.task.unpack(detection_batch)
    step = make_step(
        images=images,
        target=target,
        index=index,
        student=detector,
        teacher=detection_context.teacher,
        task=detection_context.task,
    )
    (update,) = customkd.updates(step)
    assert set(update.task_terms) == {"classes", "boxes"}
    sum(update.terms.values()).backward()
    assert all((parameter.grad != 0).any() for parameter in customkd.customisers.parameters())
    assert all(parameter.grad is None for parameter in (*detector.parameters(), *customkd.projectors.parameters()))
    (update,) = customkd.updates(replace(step, epoch=1))
    pairs = [(step.student_features(levels)[tap], step.teacher_features(levels)[tap]) for tap in levels]
    apart = [CustomKD([6], [8], specific_weight=0.0, student_taps=["x"], teacher_taps=["x"]) for _ in levels]
    for one, projector in zip(apart, customkd.projectors, strict=True):
        one.projectors[0] = projector
    terms = [one({"x": a}, {"x": b})["customkd_general"] for one, (a, b) in zip(apart, pairs, strict=True)]
    torch.testing.assert_close(update.terms["customkd_general"], sum(terms))


def test_an_encoder_is_customised_to_each_level_from_the_map_of_the_nearest_stride(detection_context, toy_model):
    hierarchical = Teacher(toy_model(dims=(7, 9, 12), strides=(4, 2, 2)))
    customkd = CustomKD.from_context(replace(detection_context, teacher=hierarchical))
    assert customkd.student_taps == ("fpn.0", "fpn.1", "fpn.2")
    assert customkd.teacher_taps == ("map.0", "map.1", "map.2")
    assert [customiser.weight.shape[:2] for customiser in customkd.customisers] == [(6, 7), (6, 9), (6, 12)]
