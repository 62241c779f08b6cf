# SPDX-License-Identifier: Apache-2.0
"""``--method``, ``--host`` and ``--size``: the recipe that they mean, and what a size changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from omegaconf import DictConfig

from ..config import ConfigError, nearest

__all__ = [
    "METHODS",
    "SIZES",
    "Size",
    "chosen_recipe",
    "resize_network",
    "train_from_scratch",
    "use_finer_levels",
]

_OWN = ""  # the host of a method that is a whole detector


class _Family(NamedTuple):
    """Recipes of one network: the small one, which not all have, and COCO's with ResNet-50."""

    small: str
    large: str


def _family(name: str, *, small: bool = True) -> _Family:
    return _Family(f"{name}_R_18_FPN_bccd" if small else "", f"{name}_R_50_FPN_1x")


METHODS: dict[str, dict[str, _Family]] = {
    "fcos": {_OWN: _family("fcos")},
    "atss": {_OWN: _family("atss")},
    "gfl": {_OWN: _family("gfl")},
    "pdnet": {_OWN: _family("pdnet")},
    "decoupled_rcnn": {_OWN: _family("decoupled_rcnn")},
    "tscode": {
        **{host: _family(f"tscode_{host}") for host in ("fcos", "atss", "gfl", "pdnet")},
        **{
            host: _family(f"tscode_{host}", small=False)
            for host in ("retinanet", "autoassign", "ddod", "ota")
        },
    },
    "salt": {
        "gflv2": _family("salt"),
        **{host: _family(f"salt_{host}", small=False) for host in ("fcos", "atss")},
    },
    "sapd": {
        _OWN: _family("sapd"),
        **{host: _family(f"sapd_{host}") for host in ("fcos", "atss")},
    },
}
"""Recipes by method and host; the first host is the one without ``--host``."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What ``--size`` means.

    Attributes:
        about: the network in a few words.
        depth: layers of the ResNet.
        short_side: pixels of an image, unless the data want more.
        batch: images of a step, where they fit.
        min_iterations: a training has so many, whatever its number of images.
        epochs: how often it sees each image, otherwise.
        memory_per_pixel: bytes that a step needs for a pixel of its input; twice what was measured
            on a CPU.
        memory: bytes that it needs besides.
    """

    about: str
    depth: int
    short_side: int
    batch: int
    min_iterations: int
    epochs: int
    memory_per_pixel: int
    memory: int


SIZES = {
    "s": Size(
        about="ResNet-18, pyramid of 64 channels, from scratch",
        depth=18,
        short_side=240,
        batch=4,
        min_iterations=800,
        epochs=36,
        memory_per_pixel=2400,
        memory=2**30,
    ),
    "m": Size(
        about="ResNet-50, pyramid of 256 channels, pretrained",
        depth=50,
        short_side=640,
        batch=8,
        min_iterations=1000,
        epochs=24,
        memory_per_pixel=3400,
        memory=2 * 2**30,
    ),
    "l": Size(
        about="ResNet-101, pyramid of 256 channels, pretrained",
        depth=101,
        short_side=800,
        batch=8,
        min_iterations=1000,
        epochs=24,
        memory_per_pixel=4800,
        memory=3 * 2**30,
    ),
}


def chosen_recipe(method: str, host: str | None, size: str) -> str:
    """The name of the recipe that the options mean.

    Raises:
        ConfigError: an unknown method, host or size, or a host that the method or the size does
            not have; the message says which there are.
    """
    if method not in METHODS:
        raise ConfigError(
            f"--method {method}: there is no such method; {nearest(method, METHODS)} (all: "
            f"{', '.join(METHODS)})"
        )
    if size not in SIZES:
        listed = "; ".join(f"{name}: {known.about}" for name, known in SIZES.items())
        raise ConfigError(f"--size {size}: there is no such size; wanted s, m or l ({listed})")
    hosts = METHODS[method]
    named = [name for name in hosts if name]
    if host is None:
        host = next(iter(hosts))
    elif host not in named:
        if not named:
            raise ConfigError(
                f"--host {host}: {method} is a whole detector and stands on no other; leave --host "
                "out"
            )
        alone = f", or no --host for {method}'s own detector" if _OWN in hosts else ""
        raise ConfigError(
            f"--host {host}: {method} does not stand on it; type --host {' or '.join(named)}{alone}"
        )
    family = hosts[host]
    if size == "s" and not family.small:
        small = [name for name in named if hosts[name].small]
        raise ConfigError(
            f"--size s: there is no small recipe of {method} on {host}; type --size m, or --host "
            f"{' or '.join(small)}"
        )
    return family.small if size == "s" else family.large


def resize_network(cfg: DictConfig, size: Size) -> None:
    """Give a recipe of ResNet-50 the depth of a size, with the weights that belong to it."""
    if size.depth != 101:
        return
    cfg.model.backbone.bottom_up.stages.depth = 101
    for old, new in (("R-50.", "R-101."), ("resnet50.", "resnet101.")):
        cfg.train.init_checkpoint = cfg.train.init_checkpoint.replace(old, new)


def train_from_scratch(cfg: DictConfig) -> None:
    """Freeze nothing and let batch norm learn its statistics: no weights are begun with."""
    bottom_up = cfg.model.backbone.bottom_up
    bottom_up.freeze_at = 0
    bottom_up.stem.norm = bottom_up.stages.norm = "BN"


def use_finer_levels(cfg: DictConfig) -> bool:
    """Predict on P2 to P6 in the place of P3 to P7, in place; False where the model cannot.

    P6 is then made by pooling, as in Faster R-CNN. Models that read another map beside the levels
    (TSCODE) or mix the levels (SAPD's BFP) stay as they are; two stages use P2 anyway.
    """
    model = cfg.model
    levels = ["p3", "p4", "p5", "p6", "p7"]
    if "head_in_features" not in model or list(model.head_in_features) != levels:
        return False
    if list(model.backbone.in_features) != ["res3", "res4", "res5"] or "BFP" in str(
        model.backbone._target_
    ):
        return False
    model.backbone.in_features = ["res2", "res3", "res4", "res5"]
    model.backbone.top_block = L(LastLevelMaxPool)()
    model.head_in_features = ["p2", "p3", "p4", "p5", "p6"]
    model.head.strides = [stride // 2 for stride in model.head.strides]
    return True
