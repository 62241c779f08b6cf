# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN's slot: two sets of proposals pass through Detectron2's own meta-architecture."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from util import loss_sum, random_input, tiny, without_gradient

from d2_decouple.config import get_config


def make_model():
    cfg = tiny(get_config("decoupled_rcnn_R_18_FPN_bccd"))
    cfg.model.vis_period = 1
    model = instantiate(cfg.model)
    assert type(model) is GeneralizedRCNN
    return model


@pytest.mark.parametrize("objects", [(4, 2), (3, 0), (0, 0)])
def test_two_sets_reach_the_roi_heads_through_detectron2(objects):
    model = make_model()
    seen = []
    model.roi_heads.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    with EventStorage() as storage:
        storage.iter = 1
        losses = model([random_input((96, 128), n) for n in objects])
        assert storage._vis_data  # Detectron2's own picture of the proposals was drawn
    (for_classes,) = seen
    assert len(for_classes) == len(for_classes.reg) == 2
    assert sum(map(len, for_classes.reg)) > sum(map(len, for_classes)) > 0
    assert torch.isfinite(loss_sum(losses))
    loss_sum(losses).backward()
    assert without_gradient(model) == []


def test_evaluation_has_one_set():
    model = make_model().eval()
    with torch.no_grad():
        assert "instances" in model([random_input((96, 128), 0)])[0]
        images = model.preprocess_image([random_input((96, 128), 0)])
        proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
    assert len(proposals) == 1
    assert not hasattr(proposals, "reg")
