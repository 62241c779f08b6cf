# SPDX-License-Identifier: Apache-2.0
"""Detectron2's own transformers, Swin, MViT and ViTDet, as backbones of every method here.

Detectron2 has them since 2022; the source archive of its version 0.6 is older. Names of parameters
are Detectron2's, so its weights load. Names of maps are those of a ResNet, so that recipes need
not know which network they stand on.
"""

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import detectron2
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.solver.build import get_default_optimizer_params
from torch import Tensor, nn

__all__ = ["decayed_by_layer", "mvit", "simple_pyramid", "swin", "vit"]

_STAGES = ("res2", "res3", "res4", "res5")
_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # MViT's and ViT's weights are trained with it


def swin(
    *,
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int = 7,
    drop_path_rate: float = 0.2,
    freeze_at: int = 0,
    out_features: Sequence[str] = _STAGES,
) -> Backbone:
    """Detectron2's ``SwinTransformer`` (Liu et al., ICCV 2021); without arguments Swin-T.

    Args:
        embed_dim: channels of ``res2``; each later map has twice as many.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: cells of a window's side.
        drop_path_rate: of the last block; that of the first one is 0.
        freeze_at: 1 keeps the patch embedding at its weights, 2 and more the stages up to ``res2``
            and so on, too.
        out_features: which maps are handed out; each has a norm of its own.

    Raises:
        ValueError: Detectron2 is too old, or has no such map.
    """
    indices = _positions(out_features)
    net: Backbone = _renamed("swin", "SwinTransformer")(
        embed_dim=embed_dim,
        depths=list(depths),
        num_heads=list(num_heads),
        window_size=window_size,
        drop_path_rate=drop_path_rate,
        frozen_stages=freeze_at if freeze_at else -1,
        out_indices=indices,
    )
    return net


def mvit(
    *,
    embed_dim: int = 96,
    depth: int = 10,
    num_heads: int = 1,
    last_block_indexes: Sequence[int] = (0, 2, 7, 9),
    drop_path_rate: float = 0.2,
    window_size: int = 56,
    out_features: Sequence[str] = _STAGES,
) -> Backbone:
    """Detectron2's ``MViT`` (MViTv2, Li et al., CVPR 2022); without arguments MViTv2-T.

    Args:
        embed_dim: channels of ``res2``; each later map has twice as many.
        depth: number of blocks.
        num_heads: attention heads of the first stage; each later one has twice as many.
        last_block_indexes: the last block of each stage.
        drop_path_rate: of the last block; that of the first one is 0.
        window_size: cells of a window's side in the first stage.
        out_features: which maps are handed out; each has a norm of its own.

    Raises:
        ValueError: Detectron2 is too old, or has no such map.
    """
    names = [f"scale{index + 2}" for index in _positions(out_features)]
    net: Backbone = _renamed("mvit", "MViT")(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        last_block_indexes=tuple(last_block_indexes),
        drop_path_rate=drop_path_rate,
        adaptive_window_size=window_size,
        residual_pooling=True,
        norm_layer=_LAYER_NORM,
        out_features=tuple(names),
    )
    return net


def vit(
    *,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    drop_path_rate: float = 0.1,
    img_size: int = 1024,
    window_size: int = 14,
    global_blocks: Sequence[int] = (2, 5, 8, 11),
) -> Backbone:
    """Detectron2's ``ViT`` for ViTDet (Li et al., ECCV 2022), without arguments ViT-B.

    It has one map, of stride 16, ``last_feat``: :func:`simple_pyramid` makes levels of it.

    Args:
        embed_dim: channels.
        depth: number of blocks.
        num_heads: attention heads.
        drop_path_rate: of the last block; that of the first one is 0.
        img_size: size in pixels that the tables of relative positions are made for; for other
            sizes they are interpolated.
        window_size: cells of a window's side.
        global_blocks: which blocks look at the whole image and not at windows.

    Raises:
        ValueError: Detectron2 is too old.
    """
    kind: Any = _class("vit", "ViT")
    net: Backbone = kind(
        img_size=img_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        drop_path_rate=drop_path_rate,
        window_size=window_size,
        window_block_indexes=[i for i in range(depth) if i not in set(global_blocks)],
        norm_layer=_LAYER_NORM,
        use_rel_pos=True,
    )
    return net


def simple_pyramid(
    *,
    net: Backbone,
    out_channels: int,
    top_block: nn.Module | None = None,
    finest: str = "p3",
    norm: str = "LN",
) -> Backbone:
    """Detectron2's ``SimpleFeaturePyramid`` (ViTDet, Sec. 3): levels up to p5 of one map.

    Departs from it in one point: images are padded to multiples of the coarsest stride, 32, as
    with every other pyramid. (Detectron2 means to, and misspells the key.)

    Args:
        net: :func:`vit`.
        out_channels: channels of every level.
        top_block: makes the levels above p5, from ``p5``.
        finest: the first level, "p2" or "p3".
        norm: of the convolutions.

    Raises:
        ValueError: Detectron2 is too old, or ``finest`` is another level.
    """
    factors = {"p2": (4.0, 2.0, 1.0, 0.5), "p3": (2.0, 1.0, 0.5)}
    if finest not in factors:
        raise ValueError(
            f"model.backbone.finest is {finest!r}; a simple pyramid begins with one of "
            f"{', '.join(factors)}"
        )
    kind: Any = type("SimplePyramid", (_Padded, _class("vit", "SimpleFeaturePyramid")), {})
    (in_feature,) = net.output_shape()
    pyramid: Backbone = kind(
        net=net,
        in_feature=in_feature,
        out_channels=out_channels,
        scale_factors=factors[finest],
        top_block=top_block,
        norm=norm,
    )
    return pyramid


def decayed_by_layer(
    model: nn.Module, *, base_lr: float, decay: float, depth: int, **options: Any
) -> list[dict[str, Any]]:
    """Detectron2's parameter groups, where earlier blocks of a ViT learn more slowly (ViTDet, A.2).

    Block i of ``depth`` has the rate ``base_lr * decay ** (depth - i)``, the embeddings in front
    ``base_lr * decay ** (depth + 1)``, everything behind the blocks ``base_lr``.

    Args:
        model: a detector on :func:`vit`.
        base_lr: the rate of what is behind the network.
        decay: factor from one block to the one before it.
        depth: number of blocks.
        options: of ``get_default_optimizer_params``.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for group in get_default_optimizer_params(model, base_lr=base_lr, **options):
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            factor = decay ** _layers_behind(names[id(parameter)], depth)
            by_rate.setdefault(group["lr"] * factor, []).append(parameter)
        groups += [{**group, "params": params, "lr": rate} for rate, params in by_rate.items()]
    return groups


def _layers_behind(name: str, depth: int) -> int:
    """How many steps of the decay lie behind a parameter."""
    path = name.split(".")
    if "blocks" in path and path[path.index("blocks") + 1].isdigit():
        return depth - int(path[path.index("blocks") + 1])
    return depth + 1 if "pos_embed" in path or "patch_embed" in path else 0


class _NamedLikeResNet:
    """Hands out another network's maps as ``res2``, ``res3``, ... by their strides."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> maps by name."""
        shapes = super().output_shape()  # type: ignore[misc]
        maps = super().forward(x)  # type: ignore[misc]
        return {_by_stride(shapes[name]): maps[name] for name in shapes}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride by name."""
        return {_by_stride(x): x for x in super().output_shape().values()}  # type: ignore[misc]


class _Padded:
    """Says by what an image's sides must be divisible."""

    _size_divisibility: int

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility


def _by_stride(shape: ShapeSpec) -> str:
    return f"res{shape.stride.bit_length() - 1}"


def _renamed(module: str, name: str) -> Any:
    return type(name, (_NamedLikeResNet, _class(module, name)), {})


def _positions(out_features: Sequence[str]) -> list[int]:
    """Indices of maps among the stages, finest first."""
    unknown = [name for name in out_features if name not in _STAGES]
    if unknown or not out_features:
        raise ValueError(
            f"model.backbone.bottom_up.out_features is {list(out_features)}; wanted are some of "
            f"{', '.join(_STAGES)}"
        )
    return sorted(_STAGES.index(name) for name in out_features)


def _class(module: str, name: str) -> Any:
    """A class of Detectron2's, or an error that says how to get it."""
    try:
        return getattr(importlib.import_module(f"detectron2.modeling.backbone.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Detectron2 {detectron2.__version__} in {detectron2.__path__[0]} has no {name} "
            f"({error}): it is older than 2022. Type python tools/install_detectron2.py where "
            "GitHub can be reached, which takes a newer one, or take a recipe with a ResNet"
        ) from error
