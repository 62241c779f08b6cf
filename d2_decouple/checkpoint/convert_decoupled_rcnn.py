# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN's published weights, of mmdetection's kind, under this package's names.

Rows and channels are in the same order on both sides, so every tensor is only renamed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

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
    counter,
    norm,
    resnet,
    vote,
    winners,
)
from .errors import CheckpointError

__all__ = ["convert_decoupled_rcnn", "roi_heads_name"]

_MODEL = "Decoupled R-CNN"
_HEAD = "bbox_head."
_ROI_HEAD = "roi_head."
_HIDDEN = 1024  # outputs of fully connected layers in the networks that were published
_RECIPES = {
    "R-50, 3 stages": "decoupled_rcnn_R_50_FPN_2x",
    "R-101, 3 stages": "decoupled_rcnn_R_101_FPN_2x",
    "X-101-32x4d, 3 stages": "decoupled_rcnn_X_101_32x4d_FPN_2x",
    "X-101-64x4d, 3 stages": "decoupled_rcnn_X_101_64x4d_FPN_2x_ms",  # no other was published
    "R-50, 1 stage": "decoupled_rcnn_R_50_FPN_1x_single",
    "R-101, 1 stage": "decoupled_rcnn_R_101_FPN_1x_single",
    "X-101-32x4d, 1 stage": "decoupled_rcnn_X_101_32x4d_FPN_1x_single",
    "R-50, 1 stage, shared FC": "decoupled_rcnn_R_50_FPN_1x_shared",
    "R-50, 1 stage, double head": "decoupled_rcnn_R_50_FPN_1x_double",
    "R-50, 3 stages, double head": "decoupled_rcnn_R_50_FPN_1x_double_cascade",
}
# The same network, trained at several sizes and tested with soft suppression.
_ALSO_PUBLISHED = {"X-101-32x4d, 3 stages": "decoupled_rcnn_X_101_32x4d_FPN_2x_ms"}
_NUM_ANCHORS = 3
_CONV_BLOCKS = 4  # behind the first block of the double head
# The two layers of the class branch, by the kind of head.
_CLASS_LAYERS = {"": "cls_fcs", "shared FC": "shared_fcs", "double head": "fc_branch"}
# Words in shapes that follow from others.
_DERIVED: dict[str, tuple[str, Callable[[int], int]]] = {
    "K+1": ("K", lambda classes: classes + 1),
    "4K": ("K", lambda classes: 4 * classes),
    "49C": ("C", lambda channels: 7 * 7 * channels),
    "W/4": ("W", lambda width: width // 4),
}


def convert_decoupled_rcnn(state: Mapping[str, Tensor]) -> Converted:
    """The weights of the authors' Decoupled R-CNN, with ResNet or ResNeXt.

    The head may be a cascade or have one stage; the branches may have layers of their own, share
    them (Table II), or be a double head (Table XI).

    Args:
        state: tensors by the authors' names, without ``module.`` in front of them.

    Returns:
        The tensors that were given under new names, without the counters of the backbone's norms,
        which are frozen here.

    Raises:
        CheckpointError: names are missing or unknown, or shapes contradict each other.
    """
    blocks = count_blocks(state, "backbone", _MODEL)
    stages, kind = _count_stages(state), _kind(state)
    entries = [
        *resnet(blocks, "backbone", "backbone", counters=True),
        *_pyramid_entries(),
        *_proposal_entries(),
        *_head_entries(stages, kind),
    ]
    widths = _widths(entries, state)
    check(entries, widths, state, _MODEL)
    tensors = {entry.ours: state[entry.theirs] for entry in entries if entry.ours is not None}
    number = len(stages)
    parts = [backbone_name(blocks, widths), f"{number} stage{'s' if number > 1 else ''}"]
    parts += [kind] if kind else []
    described = ", ".join(parts)
    return Converted(tensors, f"{described}, {widths['K']} classes", _advice(parts, widths))


def roi_heads_name(name: str) -> str:
    """The name below our ``roi_heads.`` of what is below the authors' ``roi_head.``.

    Args:
        name: of a tensor or a layer, such as ``bbox_head.1.reg_fcs.0.weight``; without a number
            behind ``bbox_head`` it is of the only stage.

    Raises:
        CheckpointError: their heads have no such part.
    """
    stage, *path = name.removeprefix(_HEAD).split(".")
    if not stage.isdecimal():
        stage, path = "0", [stage, *path]
    branch = f"box_branches.{stage}"
    match path:
        case ["fc_cls", *value]:
            layer = ["class_branch", "cls_score"]
        case ["fc_reg", *value]:
            layer = [branch, "bbox_pred"]
        case ["cls_fcs" | "shared_fcs" | "fc_branch", index, *value]:
            layer = ["class_branch", "head", f"fc{int(index) + 1}"]
        case ["reg_fcs", index, *value]:
            layer = [branch, "head", f"fc{int(index) + 1}"]
        case ["res_block", conv, "conv" | "bn" as part, *value]:
            layer = [branch, "head", "0", conv.replace("conv_identity", "shortcut")]
            layer += ["norm"] if part == "bn" else []
        case ["conv_branch", index, part, *value]:
            layer = [branch, "head", str(int(index) + 1), part.replace("bn", "conv")]
            layer += ["norm"] if part.startswith("bn") else []
        case _:
            raise CheckpointError(
                f"{name} is no part of the authors' {_MODEL}; wanted is such as "
                "bbox_head.0.fc_cls.weight"
            )
    return ".".join((*layer, *value))


def _count_stages(state: Mapping[str, Tensor]) -> list[str]:
    """What is behind ``bbox_head`` of each stage: ".0", ".1" and so on, or nothing for one."""
    begin = _ROI_HEAD + _HEAD
    parts = (name.removeprefix(begin).split(".")[0] for name in state if name.startswith(begin))
    numbers = {part for part in parts if part.isdecimal()}
    return [f".{index}" for index in range(len(numbers))] or [""]


def _kind(state: Mapping[str, Tensor]) -> str:
    """A key of ``_CLASS_LAYERS``."""
    parts = {part for name in state if name.startswith(_ROI_HEAD) for part in name.split(".")}
    return next((kind for kind, part in _CLASS_LAYERS.items() if kind and part in parts), "")


def _pyramid_entries() -> Iterator[Entry]:
    for level in range(4):
        theirs, ours = f"neck.lateral_convs.{level}.conv", f"backbone.fpn_lateral{level + 2}"
        yield from affine(theirs, ours, ("C", f"O{level + 1}", 1, 1))
        theirs, ours = f"neck.fpn_convs.{level}.conv", f"backbone.fpn_output{level + 2}"
        yield from affine(theirs, ours, ("C", "C", 3, 3))


def _proposal_entries() -> Iterator[Entry]:
    ours = "proposal_generator.rpn_head"
    yield from affine("rpn_head.rpn_conv", f"{ours}.conv", ("C", "C", 3, 3))
    yield from affine("rpn_head.rpn_cls", f"{ours}.objectness_logits", (_NUM_ANCHORS, "C", 1, 1))
    yield from affine("rpn_head.rpn_reg", f"{ours}.anchor_deltas", (4 * _NUM_ANCHORS, "C", 1, 1))


def _head_entries(stages: Sequence[str], kind: str) -> Iterator[Entry]:
    """The classifier, and the regressor of each stage, the first of which knows the classes."""
    for index, stage in enumerate(stages):
        name = f"bbox_head{stage}"
        if index == 0:
            yield from _two_layers(f"{name}.{_CLASS_LAYERS[kind]}")
            yield from _layer(f"{name}.fc_cls", ("K+1", "F"))
        width = "F"
        if kind == "double head":
            yield from _convolutions(name)
            width = "W"
        elif kind == "" or index > 0:
            yield from _two_layers(f"{name}.reg_fcs")
        yield from _layer(f"{name}.fc_reg", (4 if index else "4K", width))


def _two_layers(name: str) -> Iterator[Entry]:
    yield from _layer(f"{name}.0", ("F", "49C"))
    yield from _layer(f"{name}.1", ("F", "F"))


def _convolutions(name: str) -> Iterator[Entry]:
    """The box branch of a double head."""
    shapes: dict[str, Shape] = {
        "conv1": ("C", "C", 3, 3),
        "conv2": ("W", "C", 1, 1),
        "conv_identity": ("W", "C", 1, 1),
    }
    for conv, shape in shapes.items():
        layer = f"{name}.res_block.{conv}"
        yield from _conv(f"{layer}.conv", f"{layer}.bn", shape)
    for index in range(_CONV_BLOCKS):
        block = f"{name}.conv_branch.{index}"
        yield from _conv(f"{block}.conv1", f"{block}.bn1", ("W/4", "W", 1, 1))
        yield from _conv(f"{block}.conv2", f"{block}.bn2", ("W/4", "W/4", 3, 3))
        yield from _conv(f"{block}.conv3", f"{block}.bn3", ("W", "W/4", 1, 1))


def _conv(conv: str, bn: str, shape: Shape) -> Iterator[Entry]:
    """A convolution without bias and its norm, which is not frozen."""
    yield Entry(f"{_ROI_HEAD}{conv}.weight", f"{_ours(conv)}.weight", shape)
    yield from norm(f"{_ROI_HEAD}{bn}", _ours(bn), shape[0])
    yield counter(f"{_ROI_HEAD}{bn}", _ours(bn))


def _layer(name: str, shape: Shape) -> Iterator[Entry]:
    return affine(f"{_ROI_HEAD}{name}", _ours(name), shape)


def _ours(name: str) -> str:
    return f"roi_heads.{roi_heads_name(name)}"


def _widths(entries: Sequence[Entry], state: Mapping[str, Tensor]) -> dict[str, int]:
    votes = vote(entries, state)
    # The number of classes is what most of the layers say that know it.
    for number, count in list(votes["K+1"].items()):
        votes["K"][number - 1] += count
    for number, count in list(votes["4K"].items()):
        votes["K"][number // 4] += count
    widths = winners({word: count for word, count in votes.items() if count})
    derived = {
        word: rule(widths[base]) for word, (base, rule) in _DERIVED.items() if base in widths
    }
    return {**widths, **derived}


def _advice(parts: Sequence[str], widths: Mapping[str, int]) -> str:
    """Which recipe has this network, or what to make of one."""
    network = ", ".join(parts)
    widths_fit = widths["C"] == CHANNELS and {widths["F"], widths.get("W", _HIDDEN)} == {_HIDDEN}
    if network not in _RECIPES or not widths_fit:
        return f"no recipe here is of {network}: write one on {_RECIPES['R-50, 3 stages']}"
    found = advice(_RECIPES[network], "model.roi_heads.num_classes", widths["K"])
    if second := _ALSO_PUBLISHED.get(network):
        found += f"; if its name has 'mstrain', with --config-file {second}"
    return found
