# SPDX-License-Identifier: Apache-2.0
"""TSCODE (Zhuang et al., "Task-Specific Context Decoupling for Object Detection", 2303.01047):
each task reads pyramid features of its own.

Classes are predicted from few, wide features at half the resolution (semantic context encoding,
SCE), boxes from features with the edges of the next finer level in them (detail-preserving
encoding, DPE). Losses, assigner and everything behind the head are the host's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from fvcore.nn import weight_init
from torch import Tensor, nn

from ..layers.point_gather import is_exporting
from ..layers.strided import HalvingConv2d, StridedConv
from .head import ClassPredictor, Size, map_size

__all__ = ["TSCODE", "RearrangedClassPredictor", "TSCODEOptions", "blocks_to_cells"]

_TERMS = ("self", "up1", "up2", "low")


@dataclass(frozen=True, kw_only=True)
class TSCODEOptions:
    """What the paper compares (Tables 1, 2, 3 and 6), and what it leaves open.

    Attributes:
        use_sce: classes are read from semantic context (Eq. 3); if not, from P_l, and the class
            tower should be the host's (``cls_conv_dims=[256, 256, 256, 256]``).
        use_dpe: boxes are read from detail-preserving features (Eq. 5); if not, from P_l.
        sce_down: what brings P_l to half its size: "conv", "avg" or "max" (Table 2).
        sce_kernel: its kernel, 3, 5 or 7 cells (Table 2).
        sce_use_upper: P_{l+1} is concatenated (Table 2).
        dpe_terms: what is added up (Table 3): "self" is P_l, "up1" P_{l+1}, "up2" P_{l+2}, and
            "low" the strided convolution of P_{l-1}, together with P_l if "self" is there.
        dpe_as_neck: the class branch reads the detail-preserving features too, without SCE
            (Table 6).
        top_level: what SCE takes for the level above the last one: "conv", a strided convolution
            of its own, "maxpool", every second cell, "dup", the reduced P_l again, or "zeros".
            The paper does not say; its operation counts fit the convolution.
        down_norm: normalisation behind strided convolutions, a name Detectron2's ``get_norm``
            knows, or "" for none.
        down_act: a ReLU behind that.
        upsample: how coarser maps are enlarged, "nearest" or "bilinear".
        c2_projection: a 1x1 convolution of the finest map: "auto" where its channels differ from
            the pyramid's, "always", or "never".
    """

    use_sce: bool = True
    use_dpe: bool = True
    sce_down: str = "conv"
    sce_kernel: int = 3
    sce_use_upper: bool = True
    dpe_terms: Sequence[str] = ("self", "up1", "low")
    dpe_as_neck: bool = False
    top_level: str = "conv"
    down_norm: str = "GN"
    down_act: bool = True
    upsample: str = "nearest"
    c2_projection: str = "auto"

    def __post_init__(self) -> None:
        allowed = {
            "sce_down": ("conv", "avg", "max"),
            "sce_kernel": (3, 5, 7),
            "top_level": ("conv", "maxpool", "dup", "zeros"),
            "upsample": ("nearest", "bilinear"),
            "c2_projection": ("auto", "always", "never"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"TSCODEOptions.{name} is {getattr(self, name)!r}; wanted is one of {values}"
                )
        terms = list(self.dpe_terms)
        own = "self" in terms or "low" in terms  # the coarsest level has nothing else
        if not own or len(set(terms)) < len(terms) or not set(terms) <= set(_TERMS):
            raise ValueError(
                f"TSCODEOptions.dpe_terms is {terms}; wanted are some of {_TERMS}, each once, "
                "'self' or 'low' among them, such as ['self', 'up1', 'low']"
            )
        if self.dpe_as_neck and (self.use_sce or not self.use_dpe):
            raise ValueError(
                f"TSCODEOptions.dpe_as_neck goes with use_dpe=True and use_sce=False, not with "
                f"use_dpe={self.use_dpe} and use_sce={self.use_sce}"
            )

    @property
    def reads_finer(self) -> bool:
        """Whether a map finer than the first predicted level is read."""
        return self.use_dpe and "low" in self.dpe_terms


def blocks_to_cells(x: Tensor, size: Size) -> Tensor:
    """(N, 4C, h, w) -> (N, C, H, W) of ``size`` (H, W): Eq. 4.

    Channel ``(2 i + j) * C + c`` of cell (y, x) becomes channel c of cell (2 y + i, 2 x + j). (The
    paper's index "(2i + j)c" can only mean this.) The order is not ``pixel_shuffle``'s, which has
    the four of a class side by side. What is beyond an odd size is cut off.
    """
    x = x.unflatten(1, (2, 2, -1)).permute(0, 4, 1, 5, 2, 3)  # (N, h, 2, w, 2, C)
    # Channels stay a cell's neighbours, as the convolution leaves them: one copy, of whole rows.
    x = x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    return x[..., : size[0], : size[1]]


class RearrangedClassPredictor(nn.Conv2d):
    """Predicts the classes of four cells at each cell of a map of half the resolution (Eq. 4)."""

    def forward(self, input: Tensor, size: Size | None = None) -> Tensor:
        """(N, C, h, w) -> (N, out_channels / 4, H, W) of ``size`` (H, W), by default (2h, 2w)."""
        half = map_size(input)
        size = size or (2 * half[0], 2 * half[1])
        if half != ((size[0] + 1) // 2, (size[1] + 1) // 2):
            raise ValueError(
                f"class feature is {half} cells, its level {tuple(size)}; wanted is half of that, "
                "rounded up: a tower in front of it must keep the size"
            )
        return blocks_to_cells(super().forward(input), size)


class TSCODE(nn.Module):
    """The context that gives each task features of its own (Sec. 3; a ``Context``).

    With SCE the class tower should be two convolutions of 512 channels, twice the pyramid's. With
    ``"low"`` among the terms the head wants one finer map in front of the predicted levels:
    ``head_in_features=["res2", "p3", ...]``. P3 reads it in the place of P2, which would have to be
    made. The coarsest level has no coarser one for DPE and does without.
    """

    def __init__(
        self,
        *,
        channels: int,
        finer_channels: int | None = None,
        options: TSCODEOptions = TSCODEOptions(),
    ) -> None:
        """
        Args:
            channels: C of the pyramid levels.
            finer_channels: of the finer map (C2: 256 in a ResNet-50, 64 in a ResNet-18); C if
                not given.
            options: variants that the paper compares.
        """
        super().__init__()
        self.options = options
        self.in_channels = self.cls_channels = self.box_channels = channels
        self.cls_stride = 2 if options.use_sce else 1
        self.finer_levels = int(options.reads_finer)
        self.finer_channels = channels if finer_channels is None else finer_channels
        if options.use_sce:
            self._build_sce(channels)
        if options.reads_finer:
            self.dpe_down = _strided_conv(channels, 3, options)
            self.c2_projection = self._projection()

    def _build_sce(self, channels: int) -> None:
        options = self.options
        kernel, padding = options.sce_kernel, options.sce_kernel // 2
        self.sce_down = {
            "conv": lambda: _strided_conv(channels, kernel, options),
            "avg": lambda: nn.AvgPool2d(kernel, stride=2, padding=padding),
            "max": lambda: nn.MaxPool2d(kernel, stride=2, padding=padding),
        }[options.sce_down]()
        if options.sce_use_upper:
            self.cls_channels = 2 * channels
            if options.top_level == "conv":
                self.sce_top = HalvingConv2d(channels, channels, 3, stride=2, padding=1)
                weight_init.c2_xavier_fill(self.sce_top)

    def _projection(self) -> nn.Module:
        finer, channels, wanted = self.finer_channels, self.in_channels, self.options.c2_projection
        if wanted == "always" or (wanted == "auto" and finer != channels):
            projection = nn.Conv2d(finer, channels, 1)
            weight_init.c2_xavier_fill(projection)
            return projection
        if finer != channels:
            raise ValueError(
                f"the finer map has {finer} channels, the pyramid {channels}, and they cannot be "
                "added; set model.head.context.options.c2_projection=auto"
            )
        return nn.Identity()

    def class_predictor(
        self, in_channels: int, out_channels: int, kernel_size: int, bias: bool
    ) -> nn.Module:
        """A module ``(feature, size) -> class map`` whose output always has ``size`` (H, W)."""
        kind, count = (RearrangedClassPredictor, 4) if self.options.use_sce else (ClassPredictor, 1)
        return kind(
            in_channels, count * out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (N, C, H, W), finest first -> (class features, box features), one per level each.

        Class features are (N, 2C, ceil(H / 2), ceil(W / 2)), or (N, C, H, W) without SCE; box
        features (N, C, H, W).
        """
        levels = features[self.finer_levels :]
        box = self._detail(features, levels) if self.options.use_dpe else levels
        if self.options.dpe_as_neck:
            return box, box
        return self._semantics(levels) if self.options.use_sce else levels, box

    def _semantics(self, levels: list[Tensor]) -> list[Tensor]:
        """G_cls = Concat(DConv(P_l), P_{l+1}) (Eq. 3)."""
        reduced = [self.sce_down(level) for level in levels]
        if not self.options.sce_use_upper:
            return reduced
        above = [*levels[1:], self._top_level(levels[-1], reduced[-1])]
        return [
            torch.cat((down, _fitted(up, down)), dim=1)
            for down, up in zip(reduced, above, strict=True)
        ]

    def _top_level(self, level: Tensor, reduced: Tensor) -> Tensor:
        """What stands for the level above the coarsest one."""
        kind = self.options.top_level
        if kind == "conv":
            return self.sce_top(level)
        if kind == "maxpool":
            return level[..., ::2, ::2]
        return reduced if kind == "dup" else torch.zeros_like(reduced)

    def _detail(self, features: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
        """G_loc = P_l + up(P_{l+1}) + DConv(up(P_l) + P_{l-1}) (Eq. 5), or the chosen terms."""
        terms = self.options.dpe_terms
        finer = self._finer_maps(features, levels) if "low" in terms else []
        details = []
        for index, level in enumerate(levels):
            parts = []
            for term, step in (("up1", 1), ("up2", 2)):
                if term in terms and index + step < len(levels):
                    path = levels[index : index + step + 1]  # level by level: sizes may be odd
                    parts.append(reduce(self._enlarged, reversed(path)))
            # What was enlarged is nobody else's, so the rest is added to it in place: a map of
            # the finest size costs more time to allocate than to add.
            total = parts.pop(0) if parts else None
            if "self" in terms:
                parts.append(level)
            if "low" in terms:
                low = finer[index]
                if "self" not in terms:
                    parts.append(self.dpe_down(low))
                elif self.options.upsample == "nearest":
                    parts.append(self.dpe_down.over_enlarged(level, low))
                else:
                    parts.append(self.dpe_down(self._enlarged(level, low).add_(low)))
            if total is None:
                details.append(reduce(torch.add, parts))
            else:
                details.append(reduce(Tensor.add_, parts, total))
        return details

    def _finer_maps(self, features: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
        """The next finer map of each level."""
        for finer, level in pairwise(map_size(x) for x in features):
            if level != ((finer[0] + 1) // 2, (finer[1] + 1) // 2):
                raise ValueError(
                    f"a level of {level} cells has a map of {finer} below it; wanted is one of "
                    "twice that, such as head_in_features=['res2', 'p3', ...]"
                )
        return [self.c2_projection(features[0]), *levels[:-1]]

    def _enlarged(self, x: Tensor, like: Tensor) -> Tensor:
        """``x`` at the size of ``like``; of an odd size the last row of copies is cut off."""
        if self.options.upsample == "nearest":
            return F.interpolate(x, map_size(like), mode="nearest")
        return F.interpolate(x, map_size(like), mode="bilinear", align_corners=False)


def _strided_conv(channels: int, kernel_size: int, options: TSCODEOptions) -> StridedConv:
    return StridedConv(
        channels, kernel_size=kernel_size, norm=options.down_norm, activation=options.down_act
    )


def _fitted(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of another one, for pyramids that do not round sizes up.

    A program that is being exported always resizes: which sizes are equal depends on the image.
    """
    if not is_exporting() and map_size(x) == map_size(like):
        return x
    return F.interpolate(x, map_size(like), mode="nearest")
