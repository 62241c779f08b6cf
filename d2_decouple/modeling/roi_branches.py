# SPDX-License-Identifier: Apache-2.0
"""What is asked of the features of a region: its class, and a change of its box.

The branches are slots of :class:`.decoupled_rcnn.DecoupledROIHeads`: those of Decoupled R-CNN
with two fully connected layers each (Fig. 2, "Unshared-FC"), one that reads the classifier's
layers (Table II, "shared-FC"), and the convolutional one of Double-Head (Table XI).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import Tensor, nn

from ..layers.boxes import BoxTransform
from ..layers.norms import norm_layer

__all__ = [
    "BoxBranch",
    "ClassBranch",
    "ConvBoxBranch",
    "ConvHead",
    "FCHead",
    "Regressor",
    "SharedBoxBranch",
    "check_num_classes",
    "class_change",
]


class FCHead(FastRCNNConvFCHead):
    """Detectron2's fully connected layers with ReLU, weights drawn as the authors' (Xavier)."""

    def __init__(
        self, *, in_channels: int, resolution: int = 7, fc_dims: Sequence[int] = (1024, 1024)
    ) -> None:
        """
        Args:
            in_channels: C of the pooled features (S, C, resolution, resolution).
            resolution: their height and width, in cells.
            fc_dims: outputs of each layer.
        """
        shape = ShapeSpec(channels=in_channels, height=resolution, width=resolution)
        super().__init__(shape, conv_dims=[], fc_dims=list(fc_dims))
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)


class ConvHead(nn.Sequential):
    """Double-Head's convolutions: a residual block that widens, bottlenecks, average pooling.

    Batch norms see every region that the branch is given, so which ones these are matters in
    training.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int = 1024, num_convs: int = 4, norm: str = "BN"
    ) -> None:
        """
        Args:
            in_channels: C of the pooled features (S, C, H, W).
            out_channels: of the result (S, out_channels).
            num_convs: bottlenecks behind the first block.
            norm: normalisation of every convolution.
        """
        blocks: list[nn.Module] = [_WideningBlock(in_channels, out_channels, norm)]
        blocks += [_Bottleneck(out_channels, out_channels // 4, norm) for _ in range(num_convs)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.output_shape = ShapeSpec(channels=out_channels)


class _WideningBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, in_channels, 3, norm)
        self.conv2 = _conv(in_channels, out_channels, 1, norm)
        self.shortcut = _conv(in_channels, out_channels, 1, norm)
        for conv in (self.conv1, self.conv2, self.shortcut):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(S, C, H, W) -> (S, C', H, W)."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, inner: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _conv(channels, inner, 1, norm)
        self.conv2 = _conv(inner, inner, 3, norm)
        self.conv3 = _conv(inner, channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(S, C, H, W) -> the same shape."""
        return F.relu(x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))


def _conv(in_channels: int, out_channels: int, size: int, norm: str) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        size,
        padding=size // 2,
        bias=not norm,
        norm=norm_layer(norm, out_channels),
    )


class ClassBranch(nn.Module):
    """Features of a region -> logits of its classes."""

    def __init__(self, *, head: nn.Module, num_classes: int) -> None:
        """
        Args:
            head: pooled features (S, C, H, W) -> (S, D), with Detectron2's ``output_shape``.
            num_classes: K; the logits have one more, of background, at the end.
        """
        super().__init__()
        self.head, self.num_classes = head, num_classes
        self.cls_score = _linear(_width(head), num_classes + 1, std=0.01)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(S, C, H, W) -> logits (S, K + 1), and what they were read from (S, D)."""
        hidden = self.head(pooled)
        return self.cls_score(hidden), hidden


class Regressor(nn.Module):
    """One regression stage: its last layer, and what its outputs mean.

    Attributes:
        roi_scale: its regions are so many times as wide and high as the boxes.
        shares_head: whether it reads what the class branch's head makes of the region.
        sees_all: whether in training every sampled region goes through it, although positives
            alone are learned from; for norms whose statistics are those of the batch.
    """

    roi_scale = 1.0
    shares_head = False
    sees_all = False

    def __init__(
        self, *, in_features: int, transform: BoxTransform, num_classes: int | None, std: float
    ) -> None:
        """
        Args:
            in_features: D of what the last layer reads.
            transform: what the outputs mean.
            num_classes: K, for a change of its own for each class; None for one for all.
            std: standard deviation that the last layer's weights are drawn with.
        """
        super().__init__()
        for name in ("get_deltas", "apply_deltas"):
            if not callable(getattr(transform, name, None)):
                raise TypeError(f"transform must be a BoxTransform, got {transform!r}")
        self.transform, self.num_classes = transform, num_classes
        self.bbox_pred = _linear(in_features, 4 * (num_classes or 1), std=std)


class BoxBranch(Regressor):
    """Features of a region -> changes of its box, by layers of its own ("Unshared-FC")."""

    def __init__(
        self,
        *,
        head: nn.Module,
        transform: BoxTransform,
        num_classes: int | None = None,
        std: float = 0.001,
    ) -> None:
        """
        Args:
            head: pooled features (S, C, H, W) -> (S, D), with Detectron2's ``output_shape``.
            transform: as in :class:`Regressor`, like all that follow.
            num_classes: K, or None.
            std: of the last layer's weights.
        """
        super().__init__(
            in_features=_width(head), transform=transform, num_classes=num_classes, std=std
        )
        self.head = head

    def forward(self, pooled: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Changes (S, 4) or, with classes, (S, 4 K).

        Args:
            pooled: (S, C, H, W) features of the regions.
            hidden: (S, D) what the class branch's head made of them, for those who want it.
        """
        return self.bbox_pred(self.head(pooled))


class SharedBoxBranch(Regressor):
    """Reads the class branch's layers instead of having some (Table II, "shared-FC")."""

    shares_head = True

    def __init__(
        self,
        *,
        in_features: int,
        transform: BoxTransform,
        num_classes: int | None = None,
        std: float = 0.001,
    ) -> None:
        """
        Args:
            in_features: D of the class branch's head.
            transform: as in :class:`Regressor`, like all that follow.
            num_classes: K, or None.
            std: of the last layer's weights.
        """
        super().__init__(
            in_features=in_features, transform=transform, num_classes=num_classes, std=std
        )

    def forward(self, pooled: Tensor, hidden: Tensor | None = None) -> Tensor:
        """As :meth:`BoxBranch.forward`; ``pooled`` is not looked at."""
        return self.bbox_pred(hidden)


class ConvBoxBranch(BoxBranch):
    """Double-Head's box branch: convolutions, on regions 1.3 times as wide and as high.

    The pyramid level is that of the box itself, and regions may leave the image.
    """

    sees_all = True

    def __init__(
        self,
        *,
        head: nn.Module,
        transform: BoxTransform,
        num_classes: int | None = None,
        std: float = 0.01,
        roi_scale: float = 1.3,
    ) -> None:
        """
        Args:
            head: such as :class:`ConvHead`.
            transform: as in :class:`BoxBranch`.
            num_classes: as in :class:`BoxBranch`.
            std: as in :class:`BoxBranch`.
            roi_scale: how many times as wide and high as their boxes regions are.
        """
        super().__init__(head=head, transform=transform, num_classes=num_classes, std=std)
        if not roi_scale > 0:
            raise ValueError(f"roi_scale is {roi_scale}; wanted is a positive factor, such as 1.3")
        self.roi_scale = roi_scale


def _width(head: nn.Module) -> int:
    shape: Any = getattr(head, "output_shape", None)
    if not isinstance(getattr(shape, "channels", None), int):
        raise TypeError(
            f"a branch wants a head that tells its output_shape.channels, such as FCHead, got "
            f"{type(head).__name__}"
        )
    return shape.channels


def _linear(in_features: int, out_features: int, *, std: float) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def class_change(deltas: Tensor, classes: Tensor) -> Tensor:
    """(S, 4) changes of the given classes (S,) among (S, 4 K); of (S, 4) all."""
    if deltas.shape[1] == 4:
        return deltas
    changes = deltas.unflatten(1, (-1, 4))
    return changes[torch.arange(len(changes), device=changes.device), classes]


def check_settings(heads: Any) -> None:
    """Raise ValueError unless the numbers of :class:`.decoupled_rcnn.DecoupledROIHeads` fit."""
    stages, weights = len(heads.box_branches), heads.stage_loss_weights
    if not stages or stages != len(weights):
        raise ValueError(
            f"roi_heads has {stages} box_branches and {len(weights)} stage_loss_weights; wanted is "
            "at least one stage, and a weight for each"
        )
    names, levels = heads.box_in_features, len(heads.box_pooler.level_poolers)
    if len(names) != levels:
        raise ValueError(
            f"roi_heads.box_in_features names {names}, box_pooler has {levels} scales; wanted is "
            "one for each map: 1 / stride"
        )
    if heads.box_batch_size_per_image < 1:
        raise ValueError(
            f"roi_heads.box_batch_size_per_image is {heads.box_batch_size_per_image}; wanted is "
            "how many regions the box branches learn from, such as 512"
        )
    if not all(0 <= weight < math.inf for weight in (heads.box_loss_weight, *weights)):
        raise ValueError(
            f"roi_heads.box_loss_weight is {heads.box_loss_weight} and stage_loss_weights "
            f"{weights}; wanted are numbers from 0, such as 0.5"
        )


def check_num_classes(classifier: Any, regressors: Iterable[Any], num_classes: int) -> None:
    """Raise ValueError unless all branches that know K have the same ``num_classes``."""
    counts = {"class_branch": classifier.num_classes}
    counts |= {f"box_branches[{stage}]": x.num_classes for stage, x in enumerate(regressors)}
    wrong = {name: count for name, count in counts.items() if count not in (None, num_classes)}
    if wrong:
        raise ValueError(
            f"roi_heads.num_classes is {num_classes}, but {wrong}; set them alike, or let them say "
            '"${...num_classes}"'
        )
