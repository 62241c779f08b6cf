# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation of a detector whose candidates come from ROI heads."""

import pytest
import torch
from detectron2.config import instantiate
from torch.testing import assert_close
from util import random_input, tiny

from d2_decouple.config import get_config
from d2_decouple.modeling import TestTimeAugmentation

SIZE = (64, 96)


def built(name):
    torch.manual_seed(3)
    model = instantiate(tiny(get_config(name)).model)
    if name.startswith("decoupled"):
        for parameter in model.roi_heads.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.1)
        model.roi_heads.selection.test_score_thresh = 0.3
    return model.eval()


@pytest.fixture
def model():
    return built("decoupled_rcnn_R_18_FPN_bccd")


def found(detector, item):
    (result,) = detector([item])
    return result["instances"]


@torch.no_grad()
def test_one_variant_of_the_images_own_size_is_the_plain_detector(model):
    item = random_input(SIZE, 0)
    tta = TestTimeAugmentation(model, short_edge_lengths=[64], max_size=96, flip=False).eval()
    plain, seen = found(model, item), found(tta, item)
    assert len(plain) > 5
    assert_close(seen.scores, plain.scores)
    assert_close(seen.pred_boxes.tensor, plain.pred_boxes.tensor)
    assert (seen.variant_index == 0).all()


@torch.no_grad()
def test_sizes_and_mirrors_are_merged_before_suppression(model):
    item = random_input(SIZE, 0)
    tta = TestTimeAugmentation(model, short_edge_lengths=[48, 64], max_size=200).eval()
    seen = found(tta, item)
    assert {0, 1, 2, 3} == set(seen.variant_index.tolist())
    # Of a mirrored image the boxes are the mirrored ones.
    mirrored = {**item, "image": item["image"].flip(-1)}
    other = found(tta, mirrored)
    assert_close(other.scores, seen.scores, atol=1e-4, rtol=1e-4)
    left, top, right, bottom = other.pred_boxes.tensor.unbind(-1)
    turned = torch.stack((96 - right, top, 96 - left, bottom), dim=-1)
    assert_close(turned, seen.pred_boxes.tensor, atol=1e-2, rtol=1e-3)


def test_detectron2s_own_heads_are_refused():
    model = built("faster_rcnn_R_18_FPN_bccd_d2")
    with pytest.raises(TypeError, match="GeneralizedRCNN with DecoupledROIHeads"):
        TestTimeAugmentation(model, short_edge_lengths=[64], max_size=96)


def test_masks_are_refused(model):
    model.roi_heads.mask_on = True
    with pytest.raises(ValueError, match="gives boxes alone"):
        TestTimeAugmentation(model, short_edge_lengths=[64], max_size=96)
