# SPDX-License-Identifier: Apache-2.0
"""Backbone weights of other projects, so that a model sees with them exactly what they saw.

A ResNet of torchvision or timm has other names than Detectron2's, wants RGB values of 0..1
normalised by ImageNet's statistics, and strides in its 3x3 convolutions. Names are translated,
the order and scale of the input are folded into the first convolution, and a model with its
strides elsewhere is refused: it would load without a word and be several AP worse.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.modeling.backbone import ResNet
from torch import Tensor, nn

from .errors import CheckpointError, listed
from .networks import fit_network
from .res2net import holds_res2net, res2net_name

_listed = partial(listed, most=3)
__all__ = ["IMAGENET", "Normalization", "convert_resnet", "fit_backbone", "unwrap"]

_logger = logging.getLogger(__name__)

_PREFIX = "backbone.bottom_up."
_STEM = "stem.conv1.weight"
_STEM_MEAN = "stem.conv1.norm.running_mean"
_CHANNELS = {"RGB": [0, 1, 2], "BGR": [2, 1, 0]}
_SUPPORTED = (
    "supported are ResNet-18, 34, 50, 101 and 152, ResNeXt and Wide ResNet with torchvision's "
    "names (timm's resnet50, not its resnet50d or seresnet50), and Res2Net v1b or v1d (timm's "
    "res2net101d, not its res2net101_26w_4s)"
)
_STRIDE_KEY = "model.backbone.bottom_up.stages.stride_in_1x1"
# A difference of the means below this many grey levels is rounding.
_SAME_MEAN = 0.01
_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
_THEIR_NAME = re.compile(
    r"(?:layer(?P<stage>[1-4])\.(?P<block>\d+)\.)?(?P<layer>conv[123]|bn[123]|downsample\.[01])"
    r"\.(?P<value>weight|bias|running_mean|running_var|num_batches_tracked)"
)
_THEIR_BACKBONE = re.compile(r"(stem|conv1|bn1|layer\d+)\..*")
_OUR_NAME = re.compile(
    r"(stem\.conv[123]|res[2-5]\.\d+\.(conv[123]|convs\.\d+|shortcut))"
    r"\.(weight|norm\.(weight|bias|running_mean|running_var))"
)


class Normalization(NamedTuple):
    """What a network's input was: (RGB / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def unwrap(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """A file's content with its tensors by name under "model", as Detectron2 wants it.

    They may lie there already, under "state_dict" (timm's and others' training scripts), under
    "model_state" (pycls, whose names Detectron2 matches by their ends), or at the top.
    """
    if isinstance(loaded.get("model"), Mapping):
        return dict(loaded)
    if isinstance(loaded.get("state_dict"), Mapping):
        return {"model": dict(loaded["state_dict"])}
    if isinstance(loaded.get("model_state"), Mapping):
        state = _without_counters(loaded["model_state"])
        return {"model": state, "__author__": "pycls", "matching_heuristics": True}
    return {"model": dict(loaded)}


def convert_resnet(
    state: Mapping[str, Any],
    *,
    input_format: str,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    normalization: Normalization = IMAGENET,
    prefix: str = _PREFIX,
) -> dict[str, Tensor]:
    """Weights of torchvision's or timm's ResNet under Detectron2's names, fitted to our input.

    Args:
        state: tensors by their names there (``layer1.0.conv1.weight``). What belongs to no
            backbone, such as the classifier ``fc``, is left out.
        input_format: order of our channels, "RGB" or "BGR".
        pixel_mean: our mean in grey levels (0..255), in the order of ``input_format``.
        pixel_std: what we divide by, likewise.
        normalization: the input that the weights were trained with.
        prefix: what precedes ``stem`` and ``res2`` in the model.

    Returns:
        New tensors. A network with them maps our normalised image to the features that the
        original makes of its own; where the means differ (more than rounding), except close to
        the border, since a padded zero is another grey.

    Raises:
        CheckpointError: names of another network, or an unknown ``input_format``.
    """
    bare = _renamed(state)
    _fit_stem(bare, input_format, pixel_mean, pixel_std, normalization)
    return {prefix + name: value for name, value in bare.items()}


def fit_backbone(
    checkpoint: Mapping[str, Any], model: nn.Module, *, filename: str = ""
) -> dict[str, Any]:
    """A checkpoint with a backbone's weights brought to the names and the input of ``model``.

    Recognised are a ResNet of torchvision or timm, a Res2Net of its authors, timm or mmdetection,
    Detectron2's own with or without a part of its prefix, Detectron2's converted copy of
    torchvision's, and the file of another network alone (:mod:`.networks`). Everything else, above
    all the checkpoint of a whole detector, is handed back as it is.

    Args:
        checkpoint: :func:`unwrap`'s; ``matching_heuristics`` and ``__author__`` as in Detectron2.
        model: a detector; one on a ResNet has one Detectron2 ``ResNet``, ``pixel_mean``,
            ``pixel_std`` and ``input_format``.
        filename: where it was read; a ``config.json`` of timm beside it says the normalization.

    Raises:
        CheckpointError: the weights would not fit, or load and silently be worse.
    """
    checkpoint = dict(checkpoint)
    state = {name.removeprefix("module."): x for name, x in checkpoint["model"].items()}
    resnets = [(name, m) for name, m in model.named_modules() if isinstance(m, ResNet)]
    if len(resnets) != 1:
        return fit_network(checkpoint, state, model)
    name, resnet = resnets[0]
    prefix = f"{name}." if name else ""
    if "conv1_w" in state:
        _doubt_stride(state, resnet)
        return checkpoint
    if any(name.startswith("layer1.0.") for name in state):
        return {"model": _theirs(state, resnet, model, prefix, _normalization(filename))}
    found = [name.removesuffix(_STEM) for name in state if f".{name}".endswith(f".{_STEM}")]
    if len(found) != 1 or found[0] == prefix or not prefix.endswith(found[0]):
        return checkpoint
    if not found[0]:
        _check_fit(state, resnet)
        if checkpoint.get("__author__") == "torchvision":
            # Detectron2's copy: torchvision's values under Detectron2's names.
            _check_stride(resnet)
            state = _tensors(state)
            _fit_stem(state, *_input_of(model), IMAGENET)
    checkpoint.pop("matching_heuristics", None)
    missing = prefix.removesuffix(found[0])
    checkpoint["model"] = {missing + name: value for name, value in state.items()}
    _logger.info("The file's names get the prefix %s: it holds a backbone", missing)
    return checkpoint


def _theirs(
    state: Mapping[str, Any],
    resnet: ResNet,
    model: nn.Module,
    prefix: str,
    normalization: Normalization,
) -> dict[str, Tensor]:
    """As :func:`convert_resnet`, checked against the model."""
    bare = _renamed(state)
    _check_fit(bare, resnet)
    _check_stride(resnet)
    input_format, mean, std = _input_of(model)
    _fit_stem(bare, input_format, mean, std, normalization)
    # Detectron2's frozen batch norm counts no batches.
    known = resnet.state_dict().keys()
    bare = {name: value for name, value in bare.items() if name in known}
    others = [name for name, our_name in _our_names(state).items() if our_name is None]
    _logger.info(
        "%s of torchvision or timm: %d tensors converted, the first convolution fitted to %s and "
        "pixel_std %s%s",
        _described(bare),
        len(bare),
        input_format,
        tuple(round(value, 3) for value in std),
        f"; left out: {', '.join(others[:4])}{' ...' if others[4:] else ''}" if others else "",
    )
    return {prefix + name: value for name, value in bare.items()}


def _renamed(state: Mapping[str, Any]) -> dict[str, Tensor]:
    named = _our_names(state)
    strange = [name for name in state if named[name] is None and _THEIR_BACKBONE.fullmatch(name)]
    if strange or _STEM not in named.values():
        raise CheckpointError(
            f"this is no plain ResNet of torchvision or timm: {_listed(strange)} is unknown"
            f"{'' if _STEM in named.values() else ', and the first convolution is missing'}; "
            f"{_SUPPORTED}"
        )
    return _tensors({ours: state[name] for name, ours in named.items() if ours is not None})


def _our_names(state: Mapping[str, Any]) -> dict[str, str | None]:
    """Detectron2's name of every tensor; None of what belongs to no backbone, or is unknown."""
    translate = res2net_name if holds_res2net(state) else _our_name
    return {name: translate(name) for name in state}


def _our_name(name: str) -> str | None:
    match = _THEIR_NAME.fullmatch(name)
    if match is None:
        return None
    layer = match["layer"].replace("bn", "conv").replace("downsample.0", "shortcut")
    layer = layer.replace("downsample.1", "shortcut")
    norm = ".norm" if match["layer"].startswith("bn") or match["layer"].endswith(".1") else ""
    where = f"res{int(match['stage']) + 1}.{match['block']}" if match["stage"] else "stem"
    return f"{where}.{layer}{norm}.{match['value']}"


def _fit_stem(
    bare: dict[str, Tensor],
    input_format: str,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    normalization: Normalization,
) -> None:
    """Fold order, scale and (into the norm) mean of the input into the stem, in place."""
    if input_format not in _CHANNELS:
        raise CheckpointError(
            f"these weights were trained on colour images, but input_format is {input_format!r}; "
            "type model.input_format=BGR or RGB (yacs: INPUT.FORMAT), as the data are loaded"
        )
    order = _CHANNELS[input_format]
    mean = 255 * torch.tensor(normalization.mean, dtype=torch.float64)[order]
    std = 255 * torch.tensor(normalization.std, dtype=torch.float64)[order]
    our_mean = torch.tensor(list(pixel_mean), dtype=torch.float64)
    our_std = torch.tensor(list(pixel_std), dtype=torch.float64)
    weight = bare[_STEM].double()[:, order]
    # With p a pixel: (p - mean) / std = (p - our_mean) / our_std * our_std / std + offset.
    bare[_STEM] = (weight * (our_std / std).view(-1, 1, 1)).to(bare[_STEM].dtype)
    offset = (our_mean - mean) / std
    if (our_mean - mean).abs().max() < _SAME_MEAN:
        return
    if _STEM_MEAN not in bare:
        raise CheckpointError(
            f"these weights were trained with a mean of {_rounded(mean)} per channel, the model "
            f"subtracts {_rounded(our_mean)}, and without batch norm this cannot be evened out; "
            f"type model.pixel_mean={_rounded(mean)} (yacs: MODEL.PIXEL_MEAN)"
        )
    moved = weight.sum((2, 3)) @ offset
    bare[_STEM_MEAN] = (bare[_STEM_MEAN].double() - moved).to(bare[_STEM_MEAN].dtype)


def _input_of(model: nn.Module) -> tuple[str, list[float], list[float]]:
    """Order of the channels, mean and std of a detector's input."""
    mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        raise CheckpointError(
            f"weights of torchvision or timm are fitted to a detector's input, but a "
            f"{type(model).__name__} has no pixel_mean and pixel_std; load them into the detector"
        )
    values = mean.detach().flatten().tolist(), std.detach().flatten().tolist()
    return str(getattr(model, "input_format", None)), *values


def _check_stride(resnet: ResNet) -> None:
    if _strides_in_1x1(resnet):
        raise CheckpointError(
            "these weights of torchvision or timm have their strides in the 3x3 convolutions, the "
            f"model has them in the 1x1 before; type {_STRIDE_KEY}=False (yacs: "
            "MODEL.RESNETS.STRIDE_IN_1X1 False)"
        )


def _doubt_stride(state: Mapping[str, Any], resnet: ResNet) -> None:
    """Warn of MSRA's weights (Caffe2's names, batch norm, one group) in the other kind."""
    bottleneck = any("branch2c" in name for name in state)
    norm = any(name.startswith("res_conv1_bn") for name in state)
    grouped = any(getattr(m, "groups", 1) > 1 for m in resnet.modules() if isinstance(m, nn.Conv2d))
    if bottleneck and norm and not grouped and not _strides_in_1x1(resnet):
        _logger.warning(
            "These weights look like MSRA's, whose strides are in the 1x1 convolutions, but the "
            "model has them in the 3x3; if they are, type %s=True (yacs: "
            "MODEL.RESNETS.STRIDE_IN_1X1 True)",
            _STRIDE_KEY,
        )


def _strides_in_1x1(resnet: ResNet) -> bool:
    """Whether some bottleneck block makes its map smaller in a 1x1 convolution."""
    first = (getattr(m, "conv1", None) for m in resnet.modules())
    return any(
        isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and max(conv.stride) > 1
        for conv in first
    )


def _check_fit(bare: Mapping[str, Any], resnet: ResNet) -> None:
    """Every tensor of a plain ResNet must come from the file, and the file not go deeper.

    What else the model's has (offsets of deformable convolutions) keeps its initial values.
    """
    wanted = {name: x for name, x in resnet.state_dict().items() if _OUR_NAME.fullmatch(name)}
    stages = {name.split(".")[0] for name in wanted}
    faults = [f"the file has no {name}" for name in wanted if name not in bare]
    faults += [
        f"{name} is {tuple(bare[name].shape)} in the file, {tuple(value.shape)} here"
        for name, value in wanted.items()
        if name in bare and tuple(bare[name].shape) != tuple(value.shape)
    ]
    faults += [
        f"the model has no {name}"
        for name in bare
        if _OUR_NAME.fullmatch(name) and name.split(".")[0] in stages and name not in wanted
    ]
    if faults:
        raise CheckpointError(
            f"the file's {_described(bare)} does not fit the model's {_described(wanted)}: "
            f"{_listed(faults)}; take other weights, or set "
            "model.backbone.bottom_up.stages.depth, and .norm in stages and stem (yacs: "
            "MODEL.RESNETS.DEPTH, .NORM), as the file has them"
        )


def _described(bare: Mapping[str, Any]) -> str:
    """Such as "ResNet-50 with batch norm", from Detectron2's names without prefix."""
    blocks = {tuple(name.split(".")[:2]) for name in bare if re.match(r"res\d\.\d", name)}
    stages = sorted({stage for stage, _ in blocks})
    counts = tuple(sum(stage == of for of, _ in blocks) for stage in stages)
    depth = _DEPTHS.get((counts, "res2.0.conv3.weight" in bare))
    size = f"-{depth}" if depth else f" of {'+'.join(map(str, counts))} blocks"
    norm = "no norm"
    if "stem.conv1.norm.weight" in bare:
        norm = "batch norm" if _STEM_MEAN in bare else "group norm"
    family = "Res2Net" if any(".convs." in name for name in bare) else "ResNet"
    return f"{family}{size} with {norm}"


def _normalization(filename: str) -> Normalization:
    """What timm's ``config.json`` beside the file says, else ImageNet's.

    Raises:
        CheckpointError: it says something that no image can be normalised by.
    """
    config = Path(filename).with_name("config.json") if filename else None
    if config is None or not config.is_file():
        return IMAGENET
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
        said = said.get("pretrained_cfg", said)
        mean, std = (tuple(_float(x) for x in said[key]) for key in ("mean", "std"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return IMAGENET  # some other program's
    if not len(mean) == len(std) == 3:
        return IMAGENET
    if not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        raise CheckpointError(
            f"{config} says that images were normalised by mean {mean} and std {std}; wanted are "
            "three finite numbers each, those of std above 0: correct the file, or delete it and "
            "ImageNet's are taken"
        )
    return Normalization(mean, std)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of some hundred digits
        return math.inf


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in state.items()}


def _without_counters(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}


def _rounded(values: Tensor) -> str:
    return "[" + ",".join(f"{value:.2f}" for value in values.tolist()) + "]"
