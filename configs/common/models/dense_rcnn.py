# SPDX-License-Identifier: Apache-2.0
"""A probabilistic two-stage detector: any one-stage detector proposes, Decoupled R-CNN decides."""

from typing import Any

from detectron2.config import LazyCall as L
from omegaconf import OmegaConf

from d2_decouple.modeling import DenseProposals, ProbabilisticROIHeads

_SLOTS = ("head", "assigner", "losses", "head_in_features")
_LIMITS = (
    *("pre_nms_topk", "post_nms_topk", "post_nms_topk_reg"),
    *("nms_thresh", "nms_thresh_reg"),
)


def dense_rcnn(dense: Any, rcnn: Any) -> Any:
    """A Decoupled R-CNN's model node with a one-stage detector's in front.

    Backbone, pixels and classes are those of ``dense``, limits and branches those of ``rcnn``.
    Regions are pooled from the levels on which proposals are predicted.
    """
    slots = {key: OmegaConf.to_container(dense[key], resolve=False) for key in _SLOTS}
    strides = list(dense.head.strides)
    model = rcnn.copy()
    model.update({key: dense[key] for key in ("pixel_mean", "pixel_std", "input_format")})
    model.backbone = dense.backbone
    model.proposal_generator = L(DenseProposals)(
        **_one_node_deeper(slots),
        score=dense.selection.score,
        num_classes=1,
        **{key: rcnn.proposal_generator[key] for key in _LIMITS},
    )
    model.roi_heads._target_ = ProbabilisticROIHeads
    model.roi_heads.update(
        num_classes=dense.num_classes,
        box_in_features=list(dense.head_in_features)[-len(strides) :],
        test_score_thresh=0.05,
    )
    model.roi_heads.box_pooler.scales = [1 / stride for stride in strides]
    model.roi_heads.selection.test_score_thresh = 0.05**2  # of the class alone
    return model


def _one_node_deeper(node: Any) -> Any:
    """What refers to the detector's backbone or score, from inside of a proposal generator."""
    if isinstance(node, dict):
        return {key: _one_node_deeper(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_one_node_deeper(value) for value in node]
    if isinstance(node, str) and node.startswith("${"):
        return node.replace("backbone.", ".backbone.").replace("selection.score", "score")
    return node
