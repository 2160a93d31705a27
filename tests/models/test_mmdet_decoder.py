# SPDX-License-Identifier: Apache-2.0
"""Boxes from dense heads, against mmdet's own: the same detections from all candidates at once."""

import pytest
import torch

pytest.importorskip("mmdet")

from kdlvfm.core.detector import DenseDetector
from kdlvfm.export.suppression import NO_CLASS, select
from kdlvfm.models.mmdet import MMDetModel
from kdlvfm.models.timm import TimmEncoder

CONFIGS = {
    "GFL": "gfl_r50_fpn_1x_coco",
    "RetinaNet": "retinanet_r50_fpn_1x_coco",
    "FCOS": "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "ATSS": "atss_r50_fpn_1x_coco",
}
NARROW = {"neck": {"out_channels": 64}, "bbox_head": {"in_channels": 64, "feat_channels": 64, "stacked_convs": 2}}
SIZE = (96, 160)


def make(name, changes=NARROW):
    """A detector with weights that make it see things everywhere."""
    torch.manual_seed(0)
    encoder = TimmEncoder("test_resnet", pretrained=False, model_kwargs={"num_classes": 0})
    detector = MMDetModel(CONFIGS.get(name, name), 3, encoder=encoder, changes=changes).eval()
    for module in detector.net.bbox_head.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.05)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.5)
    return detector


def candidates(detector, images):
    with torch.no_grad():
        features = detector(images, detector.task_taps)
        return features, detector.box_decoder()(features, images.shape[-2:])


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # mmdet's, in the points of FCOS
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_selected_from_the_candidates_is_what_mmdet_detects(name):
    detector = make(name)
    features, found = candidates(detector, torch.rand(2, 3, *SIZE))
    expected = detector.predict(features, [torch.tensor(SIZE)] * 2)
    boxes, scores, labels = select(found, detector.box_decoder().selection)
    assert sum(len(image["scores"]) for image in expected) > 20
    for i, image in enumerate(expected):
        count = len(image["scores"])
        torch.testing.assert_close(scores[i, :count], image["scores"])
        torch.testing.assert_close(boxes[i, :count], image["boxes"], atol=1e-4, rtol=1e-5)
        assert torch.equal(labels[i, :count], image["labels"])
        assert not scores[i, count:].any()
        assert (labels[i, count:] == NO_CLASS).all()


def test_candidates_lie_in_the_image_and_count_every_anchor():
    detector = make("RetinaNet")
    _, found = candidates(detector, torch.rand(1, 3, 70, 90))  # padded to 96 by 96
    positions = [12 * 12, 6 * 6, 3 * 3, 2 * 2, 1]
    assert [level.shape for level in found.scores] == [(1, 9 * count, 3) for count in positions]
    assert found.boxes.shape == (1, 9 * sum(positions), 4)
    assert found.boxes.min() >= 0
    assert found.boxes[..., 0::2].max() <= 90
    assert found.boxes[..., 1::2].max() <= 70
    assert found.quality is None


def test_only_heads_with_a_third_output_rate_their_boxes():
    assert [make(name).box_decoder().rates for name in CONFIGS] == [False, False, True, True]


def test_the_selection_is_that_of_the_configuration():
    changes = {**NARROW, "test_cfg": {"score_thr": 0.2, "nms_pre": 7, "nms": {"iou_threshold": 0.4}, "max_per_img": 9}}
    selection = make("GFL", changes).box_decoder().selection
    assert (selection.score_threshold, selection.per_level) == (0.2, 7)
    assert (selection.iou_threshold, selection.limit) == (0.4, 9)


@pytest.mark.parametrize("changes", [{"nms": {"type": "soft_nms"}}, {"min_bbox_size": 4}])
def test_another_way_to_select_is_refused(changes):
    with pytest.raises(ValueError, match="does not select by plain NMS"):
        make("GFL", {**NARROW, "test_cfg": changes}).box_decoder()


def test_another_head_is_refused():
    encoder = TimmEncoder("test_resnet", pretrained=False, model_kwargs={"num_classes": 0})
    detector = MMDetModel("paa_r50_fpn_1x_coco", 3, encoder=encoder)
    assert isinstance(detector, DenseDetector)
    with pytest.raises(ValueError, match="does not decode its boxes as GFL, RetinaNet, FCOS and ATSS do"):
        detector.box_decoder()
