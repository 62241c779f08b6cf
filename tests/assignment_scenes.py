# SPDX-License-Identifier: Apache-2.0
"""What the tests of assignments have in common: models, an image, its objects, cells as a dict."""

import functools

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from util import excite, make_instances, tiny

from d2_decouple.config import config_names, get_config
from d2_decouple.engine.predictor import Predictor

SIZE = (40, 60)  # (H, W) of the image; the model sees 80 x 120, in cells of 4, 8, ... pixels here
SMALL, WHOLE, EDGE = (20, 12, 40, 28), (0, 0, 60, 40), (40, 2, 59, 25)
SOFT = "autoassign_R_18_FPN_bccd"
RULES = ("fcos_R_18_FPN_bccd", "atss_R_18_FPN_bccd", "retinanet_R_18_FPN_bccd")
PREDICTIVE = (
    *("gfl_R_18_FPN_bccd", "gflv2_R_18_FPN_bccd", "ddod_R_18_FPN_bccd", "ota_R_50_FPN_1x"),
    *(SOFT, "pdnet_R_18_FPN_bccd"),
)
SAPD = tuple(name for name in config_names() if name == "sapd_R_18_FPN_bccd")
BY_ROWS = [x for x in (*RULES, *PREDICTIVE, *SAPD) if x != SOFT]
BY_ROWS += ["tscode_fcos_R_18_FPN_bccd", "salt_R_18_FPN_bccd"]


def build(name, short=80, **options):
    torch.manual_seed(0)
    model = excite(instantiate(tiny(get_config(name)).model), 0.7)
    resize = [T.ResizeShortestEdge(short, 200)]
    return Predictor(model, augmentations=resize, device="cpu", **options)


@functools.cache
def shared(name):
    """One predictor of a recipe for all tests that do not change it."""
    return build(name)


def picture(size=SIZE):
    return np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)


def truth_of(*boxes, classes=None, size=SIZE):
    return make_instances(size, boxes, classes or [index % 3 for index in range(len(boxes))])


def listed(labels):
    """{(level, x1, y1, x2, y2, object): (class weight, box weight)} of a label set."""
    names = zip(
        labels.levels.tolist(), labels.cells.tolist(), labels.gt_index.tolist(), strict=True
    )
    weights = [
        [None] * len(labels.cells) if x is None else x.tolist()
        for x in (labels.cls_weights, labels.box_weights)
    ]
    keys = [(level, *(round(x, 3) for x in cell), index) for level, cell, index in names]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, zip(*weights, strict=True), strict=True))
