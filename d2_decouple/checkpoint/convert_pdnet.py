# SPDX-License-Identifier: Apache-2.0
"""PDNet's published weights under this package's names.

The authors' code counts y before x: sides are top, left, bottom, right. Ours are left, top, right,
bottom, so rows of two layers change places; every other tensor is only renamed.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .conversion import (
    CHANNELS,
    Converted,
    Entry,
    Shape,
    advice,
    affine,
    backbone_name,
    check,
    count_blocks,
    resnet,
    vote,
    winners,
)
from .errors import CheckpointError

__all__ = ["convert_pdnet"]

_MODEL = "PDNet"
_BODY = "backbone.body"
_NUM_POINTS = 9
_POINT_ROWS = 34  # 4 of the coarse box, 4 slides, 9 x 2 offsets, 4 x 2 shares of levels
_HEAD = "rpn.head."
_PREDICTORS = f"{_HEAD}pred_head."


def convert_pdnet(state: Mapping[str, Tensor]) -> Converted:
    """The weights of the authors' PDNet, with ResNet or ResNeXt, deformable or not.

    Args:
        state: tensors by the authors' names, without ``module.`` in front of them.

    Returns:
        New names for all of them but two constants. The layers that predict points and box sides
        have their rows in our order; the others are the tensors that were given.

    Raises:
        CheckpointError: names are missing or unknown, shapes contradict each other, or a constant
            is not the one that our points stand for.
    """
    blocks = count_blocks(state, _BODY, _MODEL)
    entries = [
        *resnet(blocks, _BODY, f"{_BODY}.stem", deformable=_deformable(state)),
        *_pyramid_entries(),
        *_head_entries(),
    ]
    widths = _widths(entries, state)
    check(entries, widths, state, _MODEL)
    _check_constants(state)
    rows = _row_order()
    tensors = {
        entry.ours: state[entry.theirs][rows[entry.theirs]]
        if entry.theirs in rows
        else state[entry.theirs]
        for entry in entries
        if entry.ours is not None
    }
    backbone = backbone_name(blocks, widths)
    return Converted(tensors, f"{backbone}, {widths['K']} classes", _advice(backbone, widths))


def _deformable(state: Mapping[str, Tensor]) -> set[str]:
    """Prefixes of the blocks whose 3x3 convolution is deformable."""
    end = ".conv2.conv.weight"
    return {name.removesuffix(end) for name in state if name.endswith(end)}


def _pyramid_entries() -> Iterator[Entry]:
    for stage in (2, 3, 4):
        theirs, ours = f"backbone.fpn.fpn_inner{stage}", f"backbone.fpn_lateral{stage + 1}"
        yield from affine(theirs, ours, ("C", f"O{stage}", 1, 1))
        theirs, ours = f"backbone.fpn.fpn_layer{stage}", f"backbone.fpn_output{stage + 1}"
        yield from affine(theirs, ours, ("C", "C", 3, 3))
    for level, inputs in (("p6", "O4"), ("p7", "C")):
        theirs, ours = f"backbone.fpn.top_blocks.{level}", f"backbone.top_block.{level}"
        yield from affine(theirs, ours, ("C", inputs, 3, 3))


def _head_entries() -> Iterator[Entry]:
    for task, ours in (("cls", "head.cls_subnet"), ("reg", "head.bbox_subnet")):
        for conv in (0, 3, 6, 9):
            theirs = f"{_HEAD}{task}_conv_tower"
            yield Entry(f"{theirs}.{conv}.weight", f"{ours}.{conv}.weight", ("C", "C", 3, 3))
            yield from affine(f"{theirs}.{conv + 1}", f"{ours}.{conv + 1}", ("C",))
    predictor = "head.predictor"
    yield from affine(
        f"{_PREDICTORS}dyn_pt_pred", f"{predictor}.point_pred", (_POINT_ROWS, "C", 3, 3)
    )
    shape: Shape = (4, "C", 1, 1)
    yield Entry(f"{_PREDICTORS}reg_map_pred.weight", f"{predictor}.bbox_pred.weight", shape)
    shape = ("PK", "C", 1, 1)
    yield Entry(f"{_PREDICTORS}cls_map_pred.weight", "head.cls_score.weight", shape)
    yield Entry(f"{_PREDICTORS}cls_pred_collect.bias", f"{predictor}.cls_score.bias", ("K",))
    for name, matrix in _constants().items():
        yield Entry(name, None, (len(matrix), 4, 1, 1))


def _constants() -> dict[str, Tensor]:
    """The authors' matrices (coordinates, 4) from a box to the points that lie on it."""
    top, left, bottom, right = torch.eye(4)
    y, x = (top + bottom) / 2, (left + right) / 2
    middles = [top, x, y, left, bottom, x, y, right]
    lattice = [
        value for row in (top, y, bottom) for column in (left, x, right) for value in (row, column)
    ]
    return {
        f"{_PREDICTORS}box_to_bound_pt": torch.stack(middles),
        f"{_PREDICTORS}box_to_semantic_pt": torch.stack(lattice),
    }


def _row_order() -> dict[str, list[int]]:
    """For each of our rows its row in the authors' layer."""
    sides = [1, 0, 3, 2]  # left, top, right, bottom among top, left, bottom, right
    points = [4 + 4 + 2 * point + axis for point in range(_NUM_POINTS) for axis in (1, 0)]
    levels = [26 + 2 * side + level for side in sides for level in (0, 1)]
    order = [*sides, *(4 + side for side in sides), *points, *levels]
    return {
        f"{_PREDICTORS}dyn_pt_pred.weight": order,
        f"{_PREDICTORS}dyn_pt_pred.bias": order,
        f"{_PREDICTORS}reg_map_pred.weight": sides,
    }


def _widths(entries: Sequence[Entry], state: Mapping[str, Tensor]) -> dict[str, int]:
    widths = winners(vote(entries, state))
    if "K" in widths:
        widths["PK"] = _NUM_POINTS * widths["K"]
    return widths


def _check_constants(state: Mapping[str, Tensor]) -> None:
    for name, wanted in _constants().items():
        found = state[name].flatten(1).float()
        if not torch.equal(found, wanted):
            row = int((found != wanted).any(1).nonzero()[0])
            raise CheckpointError(
                f"{name} is {found[row].tolist()} in row {row}, wanted {wanted[row].tolist()}: "
                "these weights were trained with points elsewhere on the box, which this package "
                "does not have"
            )


def _advice(backbone: str, widths: Mapping[str, int]) -> str:
    """Which recipe has this network, or what to make of one."""
    names = {
        "R-50": "pdnet_R_50_FPN_2x_official",
        "R-101": "pdnet_R_101_FPN_2x_official",
        "X-101-64x4d": "pdnet_X_101_64x4d_FPN_2x_official",
    }
    if backbone not in names or widths["C"] != CHANNELS:
        return f"no recipe here is of {backbone}: write one on {names['R-50']}"
    return advice(names[backbone], "model.num_classes", widths["K"])
