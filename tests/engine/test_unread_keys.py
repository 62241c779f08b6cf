# SPDX-License-Identifier: Apache-2.0
"""Thresholds of a yacs config: those that the model behind the door does not read are refused."""

import pytest

from d2_decouple.config import ConfigError, find_config
from d2_decouple.engine.inference_config import inference_config, yacs_config
from d2_decouple.engine.recipe import yacs_recipe

ONE, TWO = "fcos_R_18_FPN_bccd.yaml", "decoupled_rcnn_R_18_FPN_bccd.yaml"
LIMIT = "max_detections_per_image"


def recipe(name, *values):
    return yacs_recipe(yacs_config(find_config(name), list(map(str, values))))


@pytest.mark.parametrize(
    ("name", "key", "value", "wanted"),
    [
        (ONE, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.3, "MODEL.DECOUPLE.SCORE_THRESH_TEST 0.3"),
        (ONE, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.7, "MODEL.DECOUPLE.NMS_THRESH_TEST 0.7"),
        (ONE, "TEST.DETECTIONS_PER_IMAGE", 7, f"\"['model.selection.{LIMIT}=7']\""),
        (TWO, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3, "MODEL.DECOUPLE.SCORE_THRESH_TEST 0.3"),
        (TWO, "TEST.DETECTIONS_PER_IMAGE", 7, f"\"['model.roi_heads.selection.{LIMIT}=7']\""),
    ],
)
@pytest.mark.parametrize("reads", [recipe, lambda name, *x: inference_config(name, x)])
def test_what_nobody_reads_is_refused(name, key, value, wanted, reads):
    with pytest.raises(ConfigError) as refusal:
        reads(name, key, str(value))
    assert f"{key} is {value}" in str(refusal.value)
    assert wanted in str(refusal.value)


def test_what_the_door_sets_may_stand_under_both_keys():
    """Detectron2's own key is not refused where the door's says what counts."""
    limit, score = f"model.selection.{LIMIT}=300", "model.selection.candidates.test_score_thresh"
    values = ["TEST.DETECTIONS_PER_IMAGE", 300, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.3]
    in_text = ["MODEL.DECOUPLE.OVERRIDES", f"['{limit}', '{score}=0.3']"]
    own = ["MODEL.DECOUPLE.OVERRIDES", f"['{limit}']", "MODEL.DECOUPLE.SCORE_THRESH_TEST", 0.3]
    for door in (in_text, own):
        model = recipe(ONE, *values, *door).model()
        assert model.selection.max_detections_per_image == 300
        assert model.selection.candidates.test_score_thresh == 0.3


def test_what_the_model_has_anyhow_is_no_mistake():
    """FCOS suppresses at 0.6."""
    assert recipe(ONE, "MODEL.RETINANET.NMS_THRESH_TEST", 0.6).model().selection.nms
    with pytest.raises(ConfigError):
        recipe(ONE, "MODEL.RETINANET.NMS_THRESH_TEST", 0.7)


def test_detectron2s_heads_behind_our_proposals_follow_their_own_keys():
    heads = {
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": "['p2','p3','p4','p5']",
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.3,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "TEST.DETECTIONS_PER_IMAGE": 7,
    }
    model = recipe(TWO, *[part for pair in heads.items() for part in pair]).model()
    assert type(model.proposal_generator).__name__ == "DecoupledRPN"
    assert model.roi_heads.box_predictor.test_score_thresh == 0.3
    assert model.roi_heads.box_predictor.test_topk_per_image == 7
