# SPDX-License-Identifier: Apache-2.0
"""What converters share: tables of an authors' names and shapes with ours, and their check."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from .errors import CheckpointError, listed
from .res2net import res2net_name

__all__ = [
    "CHANNELS",
    "Converted",
    "Entry",
    "Shape",
    "advice",
    "affine",
    "backbone_name",
    "check",
    "count_blocks",
    "counter",
    "norm",
    "res2net",
    "resnet",
    "vote",
    "winners",
]

_listed = partial(listed, most=8)

CHANNELS = 256
"""Of the pyramid in the networks that were published."""

_BOTTOM_UP = "backbone.bottom_up"
_CLASSES = 80
_RESNET_WIDTH = 64  # of the 3x3 convolutions in a ResNet's first stage
_DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}

Shape = tuple[int | str, ...]  # a word stands for a width that the file tells


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


class Entry(NamedTuple):
    """A tensor of an authors' file.

    Attributes:
        theirs: its name there.
        ours: its name here; None for what is no part of our model.
        shape: its shape, the same on both sides.
    """

    theirs: str
    ours: str | None
    shape: Shape


def affine(theirs: str, ours: str, shape: Shape) -> Iterator[Entry]:
    """The weight of this shape and the bias of a layer."""
    yield Entry(f"{theirs}.weight", f"{ours}.weight", shape)
    yield Entry(f"{theirs}.bias", f"{ours}.bias", shape[:1])


def norm(theirs: str, ours: str, width: int | str) -> Iterator[Entry]:
    """A batch norm's four tensors."""
    yield from affine(theirs, ours, (width,))
    for value in ("running_mean", "running_var"):
        yield Entry(f"{theirs}.{value}", f"{ours}.{value}", (width,))


def counter(theirs: str, ours: str | None) -> Entry:
    """How many batches a norm has seen, which a frozen one of ours (None) does not know."""
    name = "num_batches_tracked"
    return Entry(f"{theirs}.{name}", None if ours is None else f"{ours}.{name}", ())


def resnet(
    blocks: Sequence[int],
    body: str,
    stem: str,
    *,
    deformable: Collection[str] = (),
    deformed: tuple[str, str] = ("conv2.conv", "conv2.offset"),
    counters: bool = False,
) -> Iterator[Entry]:
    """A ResNet or ResNeXt of bottlenecks.

    Its widths are S of the stem, and of stage i M{i} of the 3x3 convolutions, G{i} of their
    groups, O{i} of the outputs; D of the offsets.

    Args:
        blocks: how many each stage has.
        body: what is before ``.layer1`` in their names.
        stem: what is before ``.conv1`` and ``.bn1`` of the stem.
        deformable: prefixes of the blocks whose 3x3 convolution is deformable.
        deformed: names of such a convolution and of the one that makes its offsets, in a block.
        counters: whether their norms count batches.
    """
    bottom_up = _BOTTOM_UP
    frozen = partial(_frozen_norm, counters=counters)
    yield Entry(f"{stem}.conv1.weight", f"{bottom_up}.stem.conv1.weight", ("S", 3, 7, 7))
    yield from frozen(f"{stem}.bn1", f"{bottom_up}.stem.conv1.norm", "S")
    for stage, count in enumerate(blocks, 1):
        middle, outputs = f"M{stage}", f"O{stage}"
        for index in range(count):
            theirs = f"{body}.layer{stage}.{index}"
            ours = f"{bottom_up}.res{stage + 1}.{index}"
            inputs = outputs if index else f"O{stage - 1}" if stage > 1 else "S"
            yield Entry(f"{theirs}.conv1.weight", f"{ours}.conv1.weight", (middle, inputs, 1, 1))
            yield from _conv2(theirs, ours, stage, deformed if theirs in deformable else None)
            yield Entry(f"{theirs}.conv3.weight", f"{ours}.conv3.weight", (outputs, middle, 1, 1))
            for conv, width in ((1, middle), (2, middle), (3, outputs)):
                yield from frozen(f"{theirs}.bn{conv}", f"{ours}.conv{conv}.norm", width)
            if index == 0:
                shape = (outputs, inputs, 1, 1)
                yield Entry(f"{theirs}.downsample.0.weight", f"{ours}.shortcut.weight", shape)
                yield from frozen(f"{theirs}.downsample.1", f"{ours}.shortcut.norm", outputs)


def _frozen_norm(theirs: str, ours: str, width: str, *, counters: bool) -> Iterator[Entry]:
    yield from norm(theirs, ours, width)
    if counters:
        yield counter(theirs, None)


def _conv2(theirs: str, ours: str, stage: int, deformed: tuple[str, str] | None) -> Iterator[Entry]:
    conv, offset = deformed or ("conv2", None)
    if offset is not None:
        offsets = ("D", f"M{stage}", 3, 3)
        yield from affine(f"{theirs}.{offset}", f"{ours}.conv2_offset", offsets)
    shape: Shape = (f"M{stage}", f"G{stage}", 3, 3)
    yield Entry(f"{theirs}.{conv}.weight", f"{ours}.conv2.weight", shape)


def res2net(
    blocks: Sequence[int],
    body: str,
    scales: int,
    *,
    deformable: Collection[str] = (),
    counters: bool = False,
) -> Iterator[Entry]:
    """A Res2Net-v1d of mmdetection's kind.

    Widths as in :func:`resnet`; H of the stem's first convolutions, W{i} of a 3x3 one in stage i.

    Args:
        blocks: as in :func:`resnet`.
        body: as in :func:`resnet`; the stem's name begins with it, too.
        scales: groups of channels in a block, each but one with a 3x3 convolution.
        deformable: prefixes of the blocks whose 3x3 convolutions are deformable.
        counters: as in :func:`resnet`.
    """
    for name, shape in _res2net_layers(blocks, scales):
        offset = f"{name}.conv_offset"
        if name.rpartition(".convs.")[0] in {x.removeprefix(f"{body}.") for x in deformable}:
            ours = str(res2net_name(f"{offset}.weight")).removesuffix(".weight")
            yield from affine(f"{body}.{offset}", f"{_BOTTOM_UP}.{ours}", ("D", *shape[1:]))
        ours = f"{_BOTTOM_UP}.{res2net_name(f'{name}.weight')}"
        if len(shape) > 1:
            yield Entry(f"{body}.{name}.weight", ours, shape)
        else:
            yield from _frozen_norm(
                f"{body}.{name}", ours.removesuffix(".weight"), str(shape[0]), counters=counters
            )


def _res2net_layers(blocks: Sequence[int], scales: int) -> Iterator[tuple[str, Shape]]:
    """Convolutions and, by one number, norms."""
    stem: dict[int, Shape] = {0: ("H", 3, 3, 3), 3: ("H", "H", 3, 3), 6: ("S", "H", 3, 3)}
    for conv, shape in stem.items():
        yield f"stem.{conv}", shape
        yield f"stem.{conv + 1}", shape[:1]
    for stage, count in enumerate(blocks, 1):
        middle, width, outputs = f"M{stage}", f"W{stage}", f"O{stage}"
        for index in range(count):
            inputs = outputs if index else f"O{stage - 1}" if stage > 1 else "S"
            name = f"layer{stage}.{index}"
            yield f"{name}.conv1", (middle, inputs, 1, 1)
            yield f"{name}.bn1", (middle,)
            for group in range(scales - 1):
                yield f"{name}.convs.{group}", (width, width, 3, 3)
                yield f"{name}.bns.{group}", (width,)
            yield f"{name}.conv3", (outputs, middle, 1, 1)
            yield f"{name}.bn3", (outputs,)
            if index == 0:
                yield f"{name}.downsample.1", (outputs, inputs, 1, 1)
                yield f"{name}.downsample.2", (outputs,)


def count_blocks(state: Mapping[str, Tensor], body: str, model: str) -> tuple[int, ...]:
    """Residual blocks of the four stages.

    Args:
        state: tensors by their names.
        body: as in :func:`resnet`.
        model: its name, for messages.

    Raises:
        CheckpointError: there are none, or as many as no ResNet has.
    """
    block = re.compile(rf"{re.escape(body)}\.layer([1-4])\.(\d+)\..+")
    last = [-1] * 4
    for match in filter(None, map(block.fullmatch, state)):
        stage = int(match[1]) - 1
        last[stage] = max(last[stage], int(match[2]))
    blocks = tuple(index + 1 for index in last)
    if blocks in _DEPTHS:
        return blocks
    if not any(blocks):
        raise CheckpointError(
            f"it has no {body}.layer1.0.conv1.weight, as the authors' {model} has; its names "
            f"are {_listed(state) or 'none'}"
        )
    known = ", ".join(f"{'+'.join(map(str, x))} (ResNet-{depth})" for x, depth in _DEPTHS.items())
    raise CheckpointError(
        f"{body}.layer1 to layer4 have {'+'.join(map(str, blocks))} blocks, wanted are "
        f"{known}; the file is incomplete or of another network"
    )


def vote(entries: Iterable[Entry], state: Mapping[str, Tensor]) -> dict[str, Counter[int]]:
    """For each word in the shapes, how many tensors have which number there."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for entry in entries:
        found = _shape(state[entry.theirs]) if entry.theirs in state else ()
        if len(found) == len(entry.shape):
            for word, number in zip(entry.shape, found, strict=True):
                if isinstance(word, str):
                    votes[word][number] += 1
    return votes


def winners(votes: Mapping[str, Counter[int]]) -> dict[str, int]:
    """What each word stands for: the number that most tensors agree on."""
    return {word: count.most_common(1)[0][0] for word, count in votes.items()}


def check(
    entries: Iterable[Entry], widths: Mapping[str, int], state: Mapping[str, Tensor], model: str
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
            f"its tensors are not {model}'s, of which there are {len(wanted)}: {'; '.join(faults)}"
        )


def backbone_name(blocks: tuple[int, ...], widths: Mapping[str, int]) -> str:
    """Such as "R-50", "X-101-64x4d-DCN" or "R2-101-26w4s".

    Of checked widths of :func:`resnet` or :func:`res2net`.
    """
    depth = _DEPTHS[blocks]
    if "W1" in widths:
        name = f"R2-{depth}-{widths['W1']}w{widths['M1'] // widths['W1']}s"
        return f"{name}-DCN" if "D" in widths else name
    groups = widths["M1"] // widths["G1"]
    name = f"R-{depth}" if groups == 1 else f"X-{depth}-{groups}x{widths['G1']}d"
    if "D" in widths:
        name += "-DCN"
    if groups == 1 and widths["M1"] != _RESNET_WIDTH:
        name += f" (res2 {widths['M1']} wide)"
    return name


def advice(recipe: str, classes_key: str, classes: int) -> str:
    """How the converted file is used with a recipe that fits it but for the number of classes."""
    override = f" {classes_key}={classes}" if classes != _CLASSES else ""
    return (
        f"evaluate it with --config-file {recipe} --eval-only{override} train.init_checkpoint=FILE"
    )


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _text(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"
