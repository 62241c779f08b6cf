# SPDX-License-Identifier: Apache-2.0
"""PDNet's parts, small and in float64, with weights that move every point."""

from collections.abc import Sequence
from typing import Any

import torch
from pdnet_loops import Kinds
from torch import Tensor, nn

from d2_decouple.layers.points import Grid, make_grid
from d2_decouple.layers.tower import bias_free_tower
from d2_decouple.modeling import (
    BoundaryPoints,
    DenseHead,
    EdgeMidpoints,
    GridOffsetPoints,
    GridPoints,
    PDNetPredictor,
    SemanticPoints,
    SharedContext,
)

K = 2
CHANNELS = 4
STRIDES = (8, 16, 32, 64, 128)
SIZES = [(6, 9), (3, 5), (2, 3), (1, 2), (1, 1)]  # odd: the finer map is not twice as large
DOUBLE = torch.float64

Sizes = Sequence[tuple[int, int]]


def class_points(kinds: Kinds) -> Any:
    kind = {"grid": GridPoints, "grid_offset": GridOffsetPoints, "semantic": SemanticPoints}
    return kind[kinds.cls](num_points=kinds.num_points)


def box_points(kinds: Kinds) -> Any:
    if kinds.box in ("midpoints", "boundary"):
        return EdgeMidpoints() if kinds.box == "midpoints" else BoundaryPoints()
    return {"grid": GridPoints, "grid_offset": GridOffsetPoints}[kinds.box](num_points=4)


def excited(predictor: PDNetPredictor, scale: float = 0.3) -> PDNetPredictor:
    """Points some cells from where they begin, and some coarse boxes inverted; in float64."""
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=scale)
    nn.init.normal_(predictor.point_pred.bias, std=1.5)
    return predictor.double()


def fresh_predictor(kinds: Kinds, channels: int, classes: int = K) -> PDNetPredictor:
    return PDNetPredictor(
        num_classes=classes,
        in_channels=channels,
        class_points=class_points(kinds),
        box_points=box_points(kinds),
        box_levels=kinds.box_levels,
    )


def predictor_of(kinds: Kinds, channels: int = CHANNELS) -> PDNetPredictor:
    return excited(fresh_predictor(kinds, channels))


def grid_of(sizes: Sizes, offset: float = 0.0, dtype: torch.dtype = DOUBLE) -> Grid:
    strides = STRIDES[: len(sizes)]
    return make_grid(sizes, strides, offset, device=torch.device("cpu"), dtype=dtype)


def random_maps(sizes: Sizes, channels: int, images: int = 1) -> list[Tensor]:
    return [torch.randn(images, channels, *size, dtype=DOUBLE) for size in sizes]


def head_of(kinds: Kinds, context: Any = None, channels: int = 64, classes: int = K) -> DenseHead:
    context = context or SharedContext(channels=channels)
    return DenseHead(
        context=context,
        predictor=fresh_predictor(kinds, channels, classes),
        strides=STRIDES,
        offset=0.0,
        cls_conv_dims=[channels] * 4,
        box_conv_dims=[channels] * 4,
        tower=bias_free_tower,
    )


def excited_head(kinds: Kinds, context: Any = None) -> DenseHead:
    head = head_of(kinds, context)
    head.cls_subnet, head.bbox_subnet = head.cls_subnet[:2], head.bbox_subnet[:2]
    for part in (head.cls_subnet[0], head.bbox_subnet[0], head.cls_score):
        nn.init.kaiming_normal_(part.weight, a=1)
    excited(head.predictor, 0.1)
    return head.double()
