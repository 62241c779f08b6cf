# SPDX-License-Identifier: Apache-2.0
"""Detectron2's feature pyramid, extended by what the papers need."""

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone import FPN as _FPN
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from fvcore.nn import weight_init
from torch import Tensor, nn

from ..layers.norms import norm_layer

__all__ = [
    "BFP",
    "FPN",
    "PAFPN",
    "BalancedFeatures",
    "FoldedConv2d",
    "LinearP6P7",
    "fold_frozen_norms",
]


class FPN(_FPN):
    """Detectron2's FPN that hands out some of the bottom-up maps, too; same parameter names.

    TSCODE reads C2 beside P3. The map exists anyway: passing it on costs nothing. Frozen batch
    norms of the bottom-up network are folded into their convolutions (:class:`FoldedConv2d`).
    """

    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        out_channels: int,
        norm: str | Callable[[int], nn.Module] = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
        passed_on: Sequence[str] = ("res2",),
    ) -> None:
        """
        Args:
            bottom_up: backbone whose maps are merged.
            in_features: which of them, finest first.
            out_channels: channels of every pyramid level.
            norm: normalisation of the lateral and output convolutions.
            top_block: makes the levels above, such as ``LastLevelP6P7``.
            fuse_type: "sum" or "avg", how a level and the one above are merged.
            passed_on: bottom-up maps that appear in the output beside p3, p4, ...
        """
        shapes = bottom_up.output_shape()
        missing = [name for name in passed_on if name not in shapes]
        if missing:
            raise ValueError(
                f"the bottom-up network gives {sorted(shapes)}, but {missing} shall be passed on; "
                "add them to its out_features or set backbone.passed_on"
            )
        super().__init__(
            fold_frozen_norms(bottom_up),
            list(in_features),
            out_channels,
            norm=norm,
            top_block=top_block,
            fuse_type=fuse_type,
        )
        self._passed_on = tuple(passed_on)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> maps by name: the pyramid and the bottom-up maps that are passed on."""
        bottom_up: dict[str, Tensor] = {}
        thread = get_ident()  # another thread may run the same module at this moment

        def keep(module: nn.Module, inputs: Any, output: dict[str, Tensor]) -> None:
            if get_ident() == thread:
                bottom_up.update(output)

        handle = self.bottom_up.register_forward_hook(keep)
        try:
            pyramid = super().forward(x)
        finally:
            handle.remove()
        return {**pyramid, **{name: bottom_up[name] for name in self._passed_on}}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map that :meth:`forward` gives."""
        bottom_up = self.bottom_up.output_shape()
        return {**super().output_shape(), **{name: bottom_up[name] for name in self._passed_on}}


class LinearP6P7(LastLevelP6P7):
    """Detectron2's P6 and P7 without the ReLU between them; same parameter names.

    The hosts ATSS and GFL have them so. With a norm, as SALT-Net's largest recipes have it, it
    stands behind each convolution, which then has no bias; there is no activation there either.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_feature: str = "res5",
        norm: str | Callable[[int], nn.Module] = "",
    ) -> None:
        super().__init__(in_channels, out_channels, in_feature)
        if norm:
            for name, channels in (("p6", in_channels), ("p7", out_channels)):
                conv = Conv2d(
                    *(channels, out_channels, 3),
                    stride=2,
                    padding=1,
                    bias=False,
                    norm=norm_layer(norm, out_channels),
                )
                weight_init.c2_xavier_fill(conv)
                setattr(self, name, conv)

    def forward(self, c5: Tensor) -> list[Tensor]:
        """(N, C, H, W) of P5 or C5 -> maps of half and a quarter of its size."""
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


class PAFPN(FPN):
    """FPN with a second, bottom-up path (PANet, Liu et al., CVPR 2018, Sec. 3.1).

    Every level gets what a strided convolution makes of the finer one, and a convolution behind
    it: ``N_l = P_l + down(N_{l-1})``, ``output_l = conv(N_l)``, where the finest level stays as it
    is. Levels of the top block are made from the last output, so they are part of the path. There
    are neither norms nor activations.
    """

    def __init__(self, bottom_up: Backbone, **options: Any) -> None:
        """
        Args:
            bottom_up: backbone whose maps are merged.
            options: the other arguments of :class:`FPN`. A top block must start from the pyramid's
                last level ("p5"), not from a bottom-up map.
        """
        super().__init__(bottom_up, **options)
        channels = options["out_channels"]
        merged = [name for name in self._out_features if f"fpn_output{name[1:]}" in self._modules]
        if self.top_block is not None and self.top_block.in_feature != merged[-1]:
            raise ValueError(
                f"the top block starts from {self.top_block.in_feature!r}; behind a bottom-up path "
                f"it must start from {merged[-1]!r}: set backbone.top_block.in_feature and its "
                "in_channels"
            )
        self._merged = tuple(merged)
        self.pa_down = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in merged[1:]
        )
        self.pa_output = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in merged[1:]
        )
        for conv in (*self.pa_down, *self.pa_output):
            weight_init.c2_xavier_fill(conv)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> maps by name, as :class:`FPN`."""
        # Detectron2's FPN runs the output convolutions from the coarsest to the finest level, and
        # the top block after them: right before that all are there, and P5 can be exchanged.
        levels: list[Tensor] = []
        aggregated: list[Tensor] = []
        thread = get_ident()

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if get_ident() == thread:
                levels.insert(0, output)

        def exchange(module: nn.Module, inputs: Any) -> tuple[Tensor, ...] | None:
            if get_ident() != thread:
                return None
            aggregated.extend(self._aggregate(levels))
            return (aggregated[-1],)

        handles = [conv.register_forward_hook(keep) for conv in self.output_convs]
        if self.top_block is not None:
            handles.append(self.top_block.register_forward_pre_hook(exchange))
        try:
            maps = super().forward(x)
        finally:
            for handle in handles:
                handle.remove()
        return {
            **maps,
            **dict(zip(self._merged, aggregated or self._aggregate(levels), strict=True)),
        }

    def _aggregate(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, C, H, W), finest first -> the same sizes, behind the bottom-up path."""
        path, outputs = levels[0], [levels[0]]
        for level, down, output in zip(levels[1:], self.pa_down, self.pa_output, strict=True):
            path = level + down(path)
            outputs.append(output(path))
        return outputs


class BFP(FPN):
    """FPN whose levels are balanced at the end (Libra R-CNN, Pang et al., CVPR 2019, Sec. 3.2).

    SAPD uses it (Sec. 4.1). The levels of the top block are balanced with the others, and maps
    passed on are not. Names are the plain pyramid's and ``balance.*``.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        *,
        refine_level: str = "p4",
        balanced: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            bottom_up: backbone whose maps are merged.
            refine_level: level whose size the mean of all levels has while it is refined.
            balanced: levels that take part; None means every level of the pyramid.
            options: the other arguments of :class:`FPN`.
        """
        super().__init__(bottom_up, **options)
        pyramid = [str(name) for name in self._out_features]  # finest first
        balanced = pyramid if balanced is None else [str(name) for name in balanced]
        unknown = [name for name in balanced if name not in pyramid]
        if unknown or not balanced:
            raise ValueError(
                f"balanced is {balanced}, but the pyramid has {pyramid}; name some of these in "
                "backbone.balanced, or leave it out to balance all"
            )
        self._balanced = tuple(name for name in pyramid if name in balanced)
        if refine_level not in self._balanced:
            raise ValueError(
                f"the levels cannot be refined at {refine_level!r}: balanced are "
                f"{list(self._balanced)}; set backbone.refine_level to one of these"
            )
        self.balance = BalancedFeatures(
            channels=options["out_channels"], refine_level=self._balanced.index(refine_level)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> maps by name, as :class:`FPN`."""
        maps = super().forward(x)
        balanced = self.balance([maps[name] for name in self._balanced])
        return {**maps, **dict(zip(self._balanced, balanced, strict=True))}


class BalancedFeatures(nn.Module):
    """Add to each level of a pyramid what all levels together say.

    The levels are brought to the size of one of them and averaged; every cell of the mean then
    looks at all others (non-local block, Wang et al., CVPR 2018, embedded Gaussian: similarities
    are plain dot products, without a division by the root of C); the result goes back to each
    level's size. To a smaller size it is by the maximum of adaptive windows, else by the nearest.

    Convolutions begin as Xavier's, the last one too, so a new block is not the identity; and
    even a last convolution of zeros would leave the mean.
    """

    def __init__(self, *, channels: int, refine_level: int) -> None:
        """
        Args:
            channels: C of every level.
            refine_level: index of the level whose size the mean has.
        """
        super().__init__()
        self.channels = channels
        self.refine_level = refine_level
        self.theta = nn.Conv2d(channels, channels, 1)
        self.phi = nn.Conv2d(channels, channels, 1)
        self.g = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        for conv in (self.theta, self.phi, self.g, self.out):
            weight_init.c2_xavier_fill(conv)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, C, H_l, W_l), finest first -> new ones of the same sizes.

        Raises:
            ValueError: maps of other channels, or too few of them to have the refined one.
        """
        channels = [x.shape[1] for x in maps]
        if len(maps) <= self.refine_level or set(channels) != {self.channels}:
            raise ValueError(
                f"maps of {channels} channels were given; wanted are more than {self.refine_level} "
                f"of them (refine_level) with {self.channels} each (backbone.out_channels)"
            )
        finer, coarser = maps[: self.refine_level], maps[self.refine_level :]
        size = coarser[0].shape[-2:]
        gathered = [
            *(F.adaptive_max_pool2d(x, size) for x in finer),
            *(F.interpolate(x, size=size) for x in coarser),
        ]
        refined = self.refine(torch.stack(gathered).mean(0))
        return [
            *(x + F.interpolate(refined, size=x.shape[-2:]) for x in finer),
            *(x + F.adaptive_max_pool2d(refined, x.shape[-2:]) for x in coarser),
        ]

    def refine(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same: ``x + out(softmax(theta(x)' phi(x)) g(x))`` over all cells."""
        query, key, value = (
            conv(x).flatten(2).transpose(1, 2)[:, None]  # (N, 1, HW, C): one head
            for conv in (self.theta, self.phi, self.g)
        )
        read = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.out(read[:, 0].transpose(1, 2).reshape(x.shape))


class FoldedConv2d(Conv2d):
    """Detectron2's ``Conv2d`` whose frozen batch norm costs nothing.

    A frozen norm is one factor and one summand per channel, so it can be applied to the weight,
    a few thousand numbers, instead of to the map, millions of them. The norm stays where it was:
    names in checkpoints, ``freeze`` and conversions of norms work as before.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'), as Detectron2's."""
        norm = self.norm
        if not isinstance(norm, FrozenBatchNorm2d):
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(module: nn.Module) -> nn.Module:
    """Put a :class:`FoldedConv2d` in place of every plain ``Conv2d`` with a frozen norm.

    Works in place on ``module`` and returns it; parameters, buffers and their names stay.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d):
                setattr(parent, name, _folded(child))
    return module


def _folded(conv: Conv2d) -> FoldedConv2d:
    with torch.device("meta"):
        folded = FoldedConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            norm=conv.norm,
            activation=conv.activation,
        )
    folded.weight, folded.bias = conv.weight, conv.bias
    return folded.train(conv.training)
