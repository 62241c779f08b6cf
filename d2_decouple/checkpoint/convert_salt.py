# SPDX-License-Identifier: Apache-2.0
"""The weights of SALT-Net's and GFLv2's authors' code under this package's names, and back.

Both are of mmdetection's kind. Their classifier has a class more than there are, which learns 0
for everything; ours has not. It, the numbers of the bins and the counters of frozen norms are put
aside (:func:`salt_left_out`), and with these the way back gives every bit again.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    res2net,
    resnet,
    vote,
    winners,
)
from .errors import CheckpointError
from .salt_layout import (
    GFLV2_LAYERS,
    GFLV2_SCALES,
    HEAD,
    SALT_LAYERS,
    SALT_SCALES,
    Layer,
    our_order,
    pyramid_entries,
    their_order,
    tower_entries,
)

__all__ = [
    "convert_gflv2",
    "convert_salt",
    "gflv2_left_out",
    "revert_gflv2",
    "revert_salt",
    "salt_left_out",
]

_BODY = "backbone"
_STAGE = "backbone.bottom_up.res"
_DEFORMED = ("conv2", "conv2.conv_offset")
_COUNTER = ".num_batches_tracked"
_BINS = f"{HEAD}integral.project"
_NUM_BINS = 17
_NUM_LEVELS = 5
_CLASS_LAYER = "head.cls_score."
_GROUP_NORM, _DEFORMED_TOWERS = "GN in the pyramid", "DCN in the towers"
_DCNX = f"{_GROUP_NORM}, {_DEFORMED_TOWERS}"
# The logit of a class that was made up. Its score is 0 for whoever compares or adds.
_NEVER = -100.0

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Method:
    """What differs between the two.

    Attributes:
        model: its name.
        convs: how many each tower has.
        layers: behind the towers, by the authors' names.
        scales: factors of the levels, likewise.
        recipes: of the networks that were published, by their description.
    """

    model: str
    convs: int
    layers: Mapping[str, Layer]
    scales: Mapping[str, str]
    recipes: Mapping[str, str]


class _Network(NamedTuple):
    """What differs between networks of a method.

    Attributes:
        blocks: of each stage of the backbone.
        scales: groups of channels in a Res2Net's blocks; 0 of another network.
        deformable: the authors' prefixes of the blocks that read at learned offsets.
        norms: whether the pyramid has them.
        deformed_towers: whether the last convolution of both is deformable.
    """

    blocks: tuple[int, ...]
    scales: int
    deformable: frozenset[str]
    norms: bool
    deformed_towers: bool


_SALT = _Method(
    model="SALT-Net",
    convs=3,
    layers=SALT_LAYERS,
    scales=SALT_SCALES,
    recipes={
        "R-50": "salt_R_50_FPN_2x_ms",
        "R-101": "salt_R_101_FPN_2x_ms",
        "X-101-32x4d-DCN": "salt_X_101_32x4d_DCN_FPN_2x_ms",
        f"X-101-32x4d-DCN, {_DCNX}": "salt_X_101_32x4d_DCNX_FPN_2x_ms",
        "R2-101-26w4s-DCN": "salt_R2_101_DCN_FPN_2x_ms",
        f"R2-101-26w4s-DCN, {_DCNX}": "salt_R2_101_DCNX_FPN_2x_ms",
    },
)
_GFLV2 = _Method(
    model="GFLv2",
    convs=4,
    layers=GFLV2_LAYERS,
    scales=GFLV2_SCALES,
    recipes={"R-50": "gflv2_R_50_FPN_1x"},
)


def convert_salt(state: State) -> Converted:
    """The weights of the authors' SALT-Net, with ResNet, ResNeXt or Res2Net.

    Args:
        state: tensors by the authors' names, without ``module.`` in front of them.

    Returns:
        New names for all of them but what :func:`salt_left_out` gives. The layers that predict
        and read points have their rows and taps in our order, and the factors of the levels are
        one tensor.

    Raises:
        CheckpointError: names are missing or unknown, shapes contradict each other, or the bins
            are not those of 0 to 16 strides.
    """
    return _convert(_SALT, state)


def convert_gflv2(state: State) -> Converted:
    """The weights of the authors' GFLv2; else as :func:`convert_salt`."""
    return _convert(_GFLV2, state)


def salt_left_out(state: State) -> dict[str, Tensor]:
    """What our SALT-Net has no place for: constants, counters, the last class.

    Args:
        state: as for :func:`convert_salt`, which has accepted it.
    """
    return _left_out(_SALT, state)


def gflv2_left_out(state: State) -> dict[str, Tensor]:
    """As :func:`salt_left_out`, of GFLv2."""
    return _left_out(_GFLV2, state)


def revert_salt(ours: State, left_out: State) -> Converted:
    """The inverse of :func:`convert_salt`.

    Args:
        ours: tensors by our names.
        left_out: what was put aside when they were converted; of weights that were trained here
            there is none. Then the last class is made up: its weight is 0 and its logit -100, so
            that it is never found and never the best. Counters are 0.

    Raises:
        CheckpointError: they are of another network, or ``left_out`` does not belong to it.
    """
    return _revert(_SALT, ours, left_out)


def revert_gflv2(ours: State, left_out: State) -> Converted:
    """The inverse of :func:`convert_gflv2`; else as :func:`revert_salt`."""
    return _revert(_GFLV2, ours, left_out)


def _convert(method: _Method, state: State) -> Converted:
    network = _network(method, state)
    entries = _entries(method, network, _has_counters(state))
    widths = _widths(entries, state)
    check(entries, widths, state, method.model)
    bins = state[_BINS].tolist()
    if bins != list(range(_NUM_BINS)):
        raise CheckpointError(
            f"{_BINS} is {bins}, wanted are the numbers 0 to {_NUM_BINS - 1}: these weights were "
            "trained with other distances, which this package does not have"
        )
    tensors = {}
    for ours, places in _places(entries).items():
        values = [state[place] for place in places]
        value = values[0] if len(values) == 1 else torch.stack(values)
        if ours.startswith(_CLASS_LAYER):
            value = value[:-1].clone()  # not a view of what is left out
        tensors[ours] = our_order(ours.removeprefix("head."), value)
    parts = _parts(network, widths)
    described = f"{', '.join(parts)}, {widths['K']} classes, without the authors' last one"
    return Converted(tensors, described, _advice(method, parts, widths))


def _left_out(method: _Method, state: State) -> dict[str, Tensor]:
    entries = _entries(method, _network(method, state), _has_counters(state))
    whole = {entry.theirs for entry in entries if entry.ours is None}
    names = [entry.theirs for entry in _aside(entries)]
    return {x: state[x] if x in whole else state[x][-1:].clone() for x in names}


def _revert(method: _Method, ours: State, left_out: State) -> Converted:
    if not any(name.startswith(f"{_STAGE}2.") for name in ours):
        raise CheckpointError(
            f"it has no {_STAGE}2.0.conv1.weight, as our {method.model} has; the way back is for "
            "weights of this package"
        )
    network = _network(method, {_their_name(method, name): x for name, x in ours.items()})
    entries = _entries(method, network, not left_out or _has_counters(left_out))
    mirrored = [
        Entry(entry.ours, entry.theirs, _our_shape(method, entry))
        for entry in entries
        if entry.ours is not None
    ]
    widths = _widths(mirrored, ours)
    check(mirrored, widths, ours, f"our {method.model}")
    aside, origin = _aside(entries), ""
    if left_out:
        check(aside, widths, left_out, f"what was left out of the authors' {method.model}")
    else:
        left_out = {entry.theirs: _made_up(entry, widths) for entry in aside}
        origin = ", which is made up"
    theirs = {entry.theirs: left_out[entry.theirs] for entry in entries if entry.ours is None}
    for name, places in _places(entries).items():
        value = their_order(name.removeprefix("head."), ours[name])
        if name.startswith(_CLASS_LAYER):
            value = torch.cat((value, left_out[places[0]].to(value.dtype)))
        values = [value] if len(places) == 1 else [x.clone() for x in value]
        theirs.update(zip(places, values, strict=True))
    parts = _parts(network, widths)
    return Converted(
        theirs,
        f"{', '.join(parts)}, {widths['K']} classes and the authors' last one{origin}",
        "test it with the authors' code and their config of this network",
    )


# What the networks consist of.


def _network(method: _Method, state: State) -> _Network:
    deformed = re.compile(rf"({_BODY}\..+)\.(conv2|convs\.\d+)\.conv_offset\.weight")
    inner = re.compile(rf"{_BODY}\.layer1\.0\.convs\.\d+\.weight")
    convs = sum(inner.fullmatch(name) is not None for name in state)
    return _Network(
        blocks=count_blocks(state, _BODY, method.model),
        scales=convs + 1 if convs else 0,
        deformable=frozenset(match[1] for match in map(deformed.fullmatch, state) if match),
        norms="neck.lateral_convs.0.gn.weight" in state,
        deformed_towers=f"{HEAD}cls_convs.{method.convs - 1}.conv.conv_offset.weight" in state,
    )


def _their_name(method: _Method, ours: str) -> str:
    """Theirs of what tells a network from another; any other name as it is."""
    block = re.fullmatch(rf"{re.escape(_STAGE)}(\d)\.(.+)", ours)
    if block:
        rest = block[2].replace("conv2_offset", _DEFORMED[1])
        return f"{_BODY}.layer{int(block[1]) - 1}.{rest}"
    last = method.convs - 1
    telling = {
        "backbone.fpn_lateral3.norm.weight": "neck.lateral_convs.0.gn.weight",
        f"head.cls_subnet.{3 * last}.conv_offset.weight": (
            f"{HEAD}cls_convs.{last}.conv.conv_offset.weight"
        ),
    }
    return telling.get(ours, ours)


def _has_counters(state: State) -> bool:
    return any(name.endswith(_COUNTER) for name in state)


def _entries(method: _Method, network: _Network, counters: bool) -> list[Entry]:
    options: Any = {"deformable": network.deformable, "counters": counters}
    backbone = (
        res2net(network.blocks, _BODY, network.scales, **options)
        if network.scales
        else resnet(network.blocks, _BODY, _BODY, deformed=_DEFORMED, **options)
    )
    return [
        *backbone,
        *pyramid_entries(network.norms),
        *tower_entries(method.convs, network.deformed_towers),
        *_head_entries(method),
    ]


def _head_entries(method: _Method) -> Iterator[Entry]:
    for name, layer in method.layers.items():
        theirs, ours = f"{HEAD}{name}", f"head.{layer.ours}"
        if layer.bias:
            yield from affine(theirs, ours, layer.shape)
        else:
            yield Entry(f"{theirs}.weight", f"{ours}.weight", layer.shape)
    for name, scales in method.scales.items():
        for level in range(_NUM_LEVELS):
            yield Entry(f"{HEAD}{name}.{level}.scale", f"head.{scales}", ())
    yield Entry(_BINS, None, (_NUM_BINS,))


def _places(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """For each of our tensors the names of what it is made from."""
    places = defaultdict(list)
    for entry in entries:
        if entry.ours is not None:
            places[entry.ours].append(entry.theirs)
    return dict(places)


def _our_shape(method: _Method, entry: Entry) -> Shape:
    name = str(entry.ours).removeprefix("head.")
    if name in method.scales.values():
        return (_NUM_LEVELS,)
    if "reg_conf" in name:
        return entry.shape[:2]
    return tuple("K" if word == "K+1" else word for word in entry.shape)


def _aside(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of what is left out."""
    return [
        *(entry for entry in entries if entry.ours is None),
        *(
            Entry(entry.theirs, None, (1, *entry.shape[1:]))
            for entry in entries
            if entry.ours is not None and entry.ours.startswith(_CLASS_LAYER)
        ),
    ]


def _made_up(entry: Entry, widths: Mapping[str, int]) -> Tensor:
    if entry.theirs == _BINS:
        return torch.arange(_NUM_BINS, dtype=torch.float32)
    if entry.theirs.endswith(_COUNTER):
        return torch.zeros((), dtype=torch.int64)
    shape = [widths[word] if isinstance(word, str) else word for word in entry.shape]
    return torch.full(shape, _NEVER) if len(shape) == 1 else torch.zeros(shape)


def _widths(entries: Sequence[Entry], state: State) -> dict[str, int]:
    widths = winners(vote(entries, state))
    if "K+1" in widths:
        widths["K"] = widths["K+1"] - 1
    return widths


def _parts(network: _Network, widths: Mapping[str, int]) -> list[str]:
    """The description of a network, without its classes."""
    norms = [_GROUP_NORM] if network.norms else []
    towers = [_DEFORMED_TOWERS] if network.deformed_towers else []
    return [backbone_name(network.blocks, widths), *norms, *towers]


def _advice(method: _Method, parts: Sequence[str], widths: Mapping[str, int]) -> str:
    network = ", ".join(parts)
    if network not in method.recipes or widths["C"] != CHANNELS:
        return f"no recipe here is of {network}: write one on {method.recipes['R-50']}"
    return advice(method.recipes[network], "model.num_classes", widths["K"])
