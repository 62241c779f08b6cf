# SPDX-License-Identifier: Apache-2.0
"""SALT-Net and GFLv2 behind the backbone, as their authors have it: names, shapes, order of rows.

The authors count y before x, and nine points by the taps of a 3x3 kernel: the four extremes lie
in the middles of the kernel's edges. Ours are the extremes (left, top, right, bottom) first, and
x before y.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .conversion import Entry, Shape, affine

__all__ = [
    "FRACTION_ROWS",
    "GFLV2_LAYERS",
    "GFLV2_SCALES",
    "HEAD",
    "POINT_ROWS",
    "SALT_LAYERS",
    "SALT_SCALES",
    "Layer",
    "inverse",
    "our_order",
    "pyramid_entries",
    "their_order",
    "tower_entries",
]


HEAD = "bbox_head."
"""What the authors' names of a head begin with."""


class Layer(NamedTuple):
    """A layer of an authors' head.

    Attributes:
        ours: its name below our ``head.``.
        shape: of its weight there; C channels, K+1 classes.
        bias: whether it has one.
    """

    ours: str
    shape: Shape
    bias: bool = True


_NORM: Shape = ("C",)
_SQUARE: Shape = ("C", "C", 3, 3)
_QUALITY = {
    "reg_conf.0": Layer("predictor.reg_conf.0", (64, 20, 1, 1)),
    "reg_conf.2": Layer("predictor.reg_conf.2", (1, 64, 1, 1)),
}
_CLASSES = Layer("cls_score", ("K+1", "C", 3, 3))
_SIDES = Layer("predictor.bbox_pred", (4 * 17, "C", 3, 3))

GFLV2_LAYERS = {"gfl_cls": _CLASSES, "gfl_reg": _SIDES, **_QUALITY}
"""GFLv2's, by the authors' names below ``bbox_head.``, without the towers."""

SALT_LAYERS = {
    "salt_cls": _CLASSES,
    "salt_reg": _SIDES,
    **_QUALITY,
    "reg_init_out.conv": Layer("aligner.coarse_subnet.0", _SQUARE),
    "reg_init_out.bn": Layer("aligner.coarse_subnet.1", _NORM),
    "reg_init_out.regression": Layer("aligner.coarse_pred", (4, "C", 3, 3)),
    "reg_init_out.scale_fs": Layer("aligner.fraction_pred", (14, "C", 3, 3)),
    "salt_reg_conv.conv": Layer("aligner.box_align.conv", _SQUARE, bias=False),
    "salt_reg_conv.bn": Layer("aligner.box_align.norm", _NORM),
    "salt_cls_refinement.conv": Layer("aligner.vector_subnet.0", _SQUARE),
    "salt_cls_refinement.bn": Layer("aligner.vector_subnet.1", _NORM),
    "salt_cls_refinement.proposal": Layer("aligner.vector_pred", (18, "C", 3, 3)),
    "salt_cls_conv.conv": Layer("aligner.cls_align.conv", _SQUARE, bias=False),
    "salt_cls_conv.bn": Layer("aligner.cls_align.norm", _NORM),
}
"""SALT-Net's, likewise."""

GFLV2_SCALES = {"scales": "predictor.scales"}
"""The factors of levels, which are a parameter each there and one tensor here."""

SALT_SCALES = {**GFLV2_SCALES, "scales_init": "aligner.scales"}
"""SALT-Net's, likewise."""

# For each of our points, left, top, right, bottom and five inside, its tap in theirs.
_TAPS = [3, 1, 5, 7, 0, 2, 4, 6, 8]
# For each of our rows, theirs: (x, y) of each point; four fractions, then (x, y) of five points.
POINT_ROWS = [2 * tap + axis for tap in _TAPS for axis in (1, 0)]
FRACTION_ROWS = [*range(4), *(4 + 2 * point + axis for point in range(5) for axis in (1, 0))]

_ROWS = {"aligner.fraction_pred": FRACTION_ROWS, "aligner.vector_pred": POINT_ROWS}
_BY_TAPS = ("aligner.box_align.conv", "aligner.cls_align.conv")
_LINEAR = ("predictor.reg_conf.0", "predictor.reg_conf.2")  # 1x1 convolutions there


def inverse(rows: list[int]) -> list[int]:
    """For each of their rows, ours."""
    return [rows.index(row) for row in range(len(rows))]


def our_order(name: str, value: Tensor) -> Tensor:
    """A tensor of the authors' head as our parameter ``name``, below ``head.``."""
    layer, _, kind = name.rpartition(".")
    if layer in _ROWS:
        return value[_ROWS[layer]]
    if layer in _BY_TAPS:
        return _taps_moved(value, _TAPS)
    return value.flatten(1) if layer in _LINEAR and kind == "weight" else value


def their_order(name: str, value: Tensor) -> Tensor:
    """The inverse of :func:`our_order`."""
    layer, _, kind = name.rpartition(".")
    if layer in _ROWS:
        return value[inverse(_ROWS[layer])]
    if layer in _BY_TAPS:
        return _taps_moved(value, inverse(_TAPS))
    return value[..., None, None] if layer in _LINEAR and kind == "weight" else value


def _taps_moved(weight: Tensor, taps: list[int]) -> Tensor:
    return weight.flatten(2)[..., taps].reshape(weight.shape)


def pyramid_entries(norms: bool) -> Iterator[Entry]:
    """P3 to P7; with group norms or with biases."""
    layers: list[tuple[str, str, Shape]] = []
    for index in range(3):
        shape: Shape = ("C", f"O{index + 2}", 1, 1)
        layers.append((f"neck.lateral_convs.{index}", f"fpn_lateral{index + 3}", shape))
    outputs = ("fpn_output3", "fpn_output4", "fpn_output5", "top_block.p6", "top_block.p7")
    for index, output in enumerate(outputs):
        layers.append((f"neck.fpn_convs.{index}", output, ("C", "C", 3, 3)))
    for theirs, name, shape in layers:
        ours = f"backbone.{name}"
        if norms:
            yield Entry(f"{theirs}.conv.weight", f"{ours}.weight", shape)
            yield from affine(f"{theirs}.gn", f"{ours}.norm", ("C",))
        else:
            yield from affine(f"{theirs}.conv", ours, shape)


def tower_entries(convs: int, deformed: bool) -> Iterator[Entry]:
    """Both towers; ``deformed``: the last convolution of each makes offsets."""
    for tower, subnet in (("cls_convs", "cls_subnet"), ("reg_convs", "bbox_subnet")):
        for index in range(convs):
            # Each of our convolutions is followed by its norm and a ReLU.
            theirs, ours = f"{HEAD}{tower}.{index}", f"head.{subnet}.{3 * index}"
            yield Entry(f"{theirs}.conv.weight", f"{ours}.weight", ("C", "C", 3, 3))
            if deformed and index == convs - 1:
                offsets = (27, "C", 3, 3)  # of the second version
                yield from affine(f"{theirs}.conv.conv_offset", f"{ours}.conv_offset", offsets)
            yield from affine(f"{theirs}.gn", f"head.{subnet}.{3 * index + 1}", ("C",))
