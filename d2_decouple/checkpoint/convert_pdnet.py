# SPDX-License-Identifier: Apache-2.0
"""PDNet's published weights under this package's names.

The authors' code counts y before x: sides are top, left, bottom, right. Ours are left, top, right,
bottom, so rows of two layers change places; every other tensor is only renamed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError, listed

_listed = partial(listed, most=8)
__all__ = ["Converted", "convert_pdnet"]

_DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_BLOCK = re.compile(r"backbone\.body\.layer([1-4])\.(\d+)\..+")
_NORM = ("weight", "bias", "running_mean", "running_var")
_AFFINE = ("weight", "bias")
_RESNET_WIDTH = 64  # of the 3x3 convolutions in a ResNet's first stage
_CHANNELS, _CLASSES = 256, 80  # of the networks that were published
_NUM_POINTS = 9
_POINT_ROWS = 34  # 4 of the coarse box, 4 slides, 9 x 2 offsets, 4 x 2 shares of levels
_HEAD = "rpn.head."
_PREDICTORS = f"{_HEAD}pred_head."

Shape = tuple[int | str, ...]  # a letter stands for a width that the file tells


class Converted(NamedTuple):
    """What a converter gives.

    Attributes:
        tensors: the model's, by our names.
        description: which model it looks like, such as "R-50, 80 classes".
        advice: which recipe takes it.
    """

    tensors: dict[str, Tensor]
    description: str
    advice: str


class _Entry(NamedTuple):
    theirs: str
    ours: str | None  # None: a constant, which is no part of our model
    shape: Shape


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
    blocks = _count_blocks(state)
    entries = list(_entries(blocks, _deformable(state)))
    widths = _widths(entries, state)
    _check(entries, widths, state)
    _check_constants(state)
    rows = _row_order()
    tensors = {
        entry.ours: state[entry.theirs][rows[entry.theirs]]
        if entry.theirs in rows
        else state[entry.theirs]
        for entry in entries
        if entry.ours is not None
    }
    return Converted(tensors, _description(blocks, widths), _advice(blocks, widths))


def _count_blocks(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Residual blocks of the four stages."""
    last = [-1] * 4
    for match in filter(None, map(_BLOCK.fullmatch, state)):
        stage = int(match[1]) - 1
        last[stage] = max(last[stage], int(match[2]))
    blocks = tuple(index + 1 for index in last)
    if blocks in _DEPTHS:
        return blocks
    if not any(blocks):
        raise CheckpointError(
            "it has no backbone.body.layer1.0.conv1.weight, as the authors' PDNet has; its names "
            f"are {_listed(state) or 'none'}"
        )
    known = ", ".join(f"{'+'.join(map(str, x))} (ResNet-{depth})" for x, depth in _DEPTHS.items())
    raise CheckpointError(
        f"backbone.body.layer1 to layer4 have {'+'.join(map(str, blocks))} blocks, wanted are "
        f"{known}; the file is incomplete or of another network"
    )


def _deformable(state: Mapping[str, Tensor]) -> set[str]:
    """Prefixes of the blocks whose 3x3 convolution is deformable."""
    end = ".conv2.conv.weight"
    return {name.removesuffix(end) for name in state if name.endswith(end)}


def _entries(blocks: Sequence[int], deformable: Collection[str]) -> Iterator[_Entry]:
    body, bottom_up = "backbone.body", "backbone.bottom_up"
    yield _Entry(f"{body}.stem.conv1.weight", f"{bottom_up}.stem.conv1.weight", ("S", 3, 7, 7))
    yield from _layer(f"{body}.stem.bn1", f"{bottom_up}.stem.conv1.norm", ("S",), _NORM)
    for stage, count in enumerate(blocks, 1):
        for index in range(count):
            theirs = f"{body}.layer{stage}.{index}"
            ours = f"{bottom_up}.res{stage + 1}.{index}"
            inputs = f"O{stage}" if index else f"O{stage - 1}" if stage > 1 else "S"
            yield from _block(theirs, ours, stage, inputs, deformable=theirs in deformable)
            if index == 0:
                shape = (f"O{stage}", inputs, 1, 1)
                yield _Entry(f"{theirs}.downsample.0.weight", f"{ours}.shortcut.weight", shape)
                norm = f"{ours}.shortcut.norm"
                yield from _layer(f"{theirs}.downsample.1", norm, (f"O{stage}",), _NORM)
    for stage in (2, 3, 4):
        theirs, ours = f"backbone.fpn.fpn_inner{stage}", f"backbone.fpn_lateral{stage + 1}"
        yield from _conv(theirs, ours, ("C", f"O{stage}", 1, 1))
        theirs, ours = f"backbone.fpn.fpn_layer{stage}", f"backbone.fpn_output{stage + 1}"
        yield from _conv(theirs, ours, ("C", "C", 3, 3))
    for level, inputs in (("p6", "O4"), ("p7", "C")):
        theirs, ours = f"backbone.fpn.top_blocks.{level}", f"backbone.top_block.{level}"
        yield from _conv(theirs, ours, ("C", inputs, 3, 3))
    yield from _head_entries()


def _block(
    theirs: str, ours: str, stage: int, inputs: str, *, deformable: bool
) -> Iterator[_Entry]:
    middle, outputs = f"M{stage}", f"O{stage}"
    yield _Entry(f"{theirs}.conv1.weight", f"{ours}.conv1.weight", (middle, inputs, 1, 1))
    shape = (middle, f"G{stage}", 3, 3)
    if deformable:
        yield from _conv(f"{theirs}.conv2.offset", f"{ours}.conv2_offset", ("D", middle, 3, 3))
        yield _Entry(f"{theirs}.conv2.conv.weight", f"{ours}.conv2.weight", shape)
    else:
        yield _Entry(f"{theirs}.conv2.weight", f"{ours}.conv2.weight", shape)
    yield _Entry(f"{theirs}.conv3.weight", f"{ours}.conv3.weight", (outputs, middle, 1, 1))
    for conv, channels in ((1, middle), (2, middle), (3, outputs)):
        yield from _layer(f"{theirs}.bn{conv}", f"{ours}.conv{conv}.norm", (channels,), _NORM)


def _head_entries() -> Iterator[_Entry]:
    for task, ours in (("cls", "head.cls_subnet"), ("reg", "head.bbox_subnet")):
        for conv in (0, 3, 6, 9):
            theirs = f"{_HEAD}{task}_conv_tower"
            yield _Entry(f"{theirs}.{conv}.weight", f"{ours}.{conv}.weight", ("C", "C", 3, 3))
            yield from _layer(f"{theirs}.{conv + 1}", f"{ours}.{conv + 1}", ("C",), _AFFINE)
    predictor = "head.predictor"
    yield from _conv(
        f"{_PREDICTORS}dyn_pt_pred", f"{predictor}.point_pred", (_POINT_ROWS, "C", 3, 3)
    )
    shape: Shape = (4, "C", 1, 1)
    yield _Entry(f"{_PREDICTORS}reg_map_pred.weight", f"{predictor}.bbox_pred.weight", shape)
    shape = ("PK", "C", 1, 1)
    yield _Entry(f"{_PREDICTORS}cls_map_pred.weight", "head.cls_score.weight", shape)
    yield _Entry(f"{_PREDICTORS}cls_pred_collect.bias", f"{predictor}.cls_score.bias", ("K",))
    for name, matrix in _constants().items():
        yield _Entry(name, None, (len(matrix), 4, 1, 1))


def _layer(theirs: str, ours: str, shape: Shape, values: Sequence[str]) -> Iterator[_Entry]:
    for value in values:
        yield _Entry(f"{theirs}.{value}", f"{ours}.{value}", shape)


def _conv(theirs: str, ours: str, shape: Shape) -> Iterator[_Entry]:
    """A convolution with its bias."""
    yield _Entry(f"{theirs}.weight", f"{ours}.weight", shape)
    yield _Entry(f"{theirs}.bias", f"{ours}.bias", shape[:1])


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


def _widths(entries: Sequence[_Entry], state: Mapping[str, Tensor]) -> dict[str, int]:
    """What each letter stands for: the number that most tensors agree on."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for entry in entries:
        found = _shape(state[entry.theirs]) if entry.theirs in state else ()
        if len(found) == len(entry.shape):
            for letter, number in zip(entry.shape, found, strict=True):
                if isinstance(letter, str):
                    votes[letter][number] += 1
    widths = {letter: count.most_common(1)[0][0] for letter, count in votes.items()}
    if "K" in widths:
        widths["PK"] = _NUM_POINTS * widths["K"]
    return widths


def _check(
    entries: Sequence[_Entry], widths: Mapping[str, int], state: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError unless the file has exactly these names and shapes."""
    wanted = {
        entry.theirs: tuple(widths.get(x, x) if isinstance(x, str) else x for x in entry.shape)
        for entry in entries
    }
    missing = [f"{name} {_text(wanted[name])}" for name in wanted if name not in state]
    misshapen = [
        f"{name} is {_text(_shape(state[name]))}, wanted {_text(shape)}"
        for name, shape in wanted.items()
        if name in state and _shape(state[name]) != shape
    ]
    unknown = [f"{name} {_text(_shape(state[name]))}" for name in state if name not in wanted]
    faults = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (
            ("missing", missing),
            ("of another shape", misshapen),
            ("unknown (left over)", unknown),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"its tensors are not PDNet's, of which there are {len(wanted)}: {'; '.join(faults)}"
        )


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


def _description(blocks: tuple[int, ...], widths: Mapping[str, int]) -> str:
    return f"{_backbone(blocks, widths)}, {widths['K']} classes"


def _backbone(blocks: tuple[int, ...], widths: Mapping[str, int]) -> str:
    depth, groups = _DEPTHS[blocks], widths["M1"] // widths["G1"]
    name = f"R-{depth}" if groups == 1 else f"X-{depth}-{groups}x{widths['G1']}d"
    if "D" in widths:
        name += "-DCN"
    if groups == 1 and widths["M1"] != _RESNET_WIDTH:
        name += f" (res2 {widths['M1']} wide)"
    return name


def _advice(blocks: tuple[int, ...], widths: Mapping[str, int]) -> str:
    """Which recipe has this network, or what to make of one."""
    backbone = _backbone(blocks, widths)
    names = {
        "R-50": "pdnet_R_50_FPN_2x_official",
        "R-101": "pdnet_R_101_FPN_2x_official",
        "X-101-64x4d": "pdnet_X_101_64x4d_FPN_2x_official",
    }
    if backbone not in names or widths["C"] != _CHANNELS:
        return f"no recipe here is of {backbone}: write one on pdnet_R_50_FPN_2x_official"
    advice = f"evaluate it with --config-file {names[backbone]} --eval-only"
    if widths["K"] != _CLASSES:
        advice += f" model.num_classes={widths['K']}"
    return advice + " train.init_checkpoint=FILE"


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _text(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"
