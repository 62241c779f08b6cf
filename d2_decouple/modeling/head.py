# SPDX-License-Identifier: Apache-2.0
"""The dense head: context -> towers -> aligner -> predictor, each of them a slot.

The head turns pyramid features into boxes. It knows strides and coordinates, and neither ground
truth, losses nor any paper.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..layers.points import Grid, make_grid
from ..layers.precision import at_least_float32
from ..layers.tower import conv_tower, init_conv
from ..structures import DensePredictions
from .loading import drop_misfits

__all__ = [
    "Aligner",
    "ClassBiasOwner",
    "ClassPredictor",
    "Context",
    "DenseHead",
    "Predictor",
    "SharedContext",
    "flatten_maps",
    "map_size",
    "prior_bias",
]

Size = tuple[int, int]


def prior_bias(probability: float = 0.01) -> float:
    """The class bias that makes every class start at this probability (focal loss paper, 4.1)."""
    return -math.log((1 - probability) / probability)


def map_size(feature: Tensor) -> Size:
    """(H, W) of a (N, C, H, W) map."""
    return feature.shape[-2], feature.shape[-1]


def flatten_maps(maps: Sequence[Tensor], dims: int) -> Tensor:
    """(N, R, dims) from one (N, A * dims, H, W) map per level; A anchors are a cell's fastest."""
    flat = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, dims) for x in maps]
    return torch.cat(flat, dim=1)


class Context(Protocol):
    """Which pyramid features each task may read, and the facts that let the head build itself.

    Attributes:
        in_channels: of the pyramid levels it is given.
        cls_channels: of the class features it makes.
        box_channels: of the box features it makes.
        cls_stride: class features have ceil(size / cls_stride) cells of their level.
        finer_levels: maps it wants in front of the predicted levels (TSCODE: 1, C2). If they have
            other channels than ``in_channels``, an attribute ``finer_channels`` says how many.
    """

    in_channels: int
    cls_channels: int
    box_channels: int
    cls_stride: int
    finer_levels: int

    def __call__(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps, finest first -> (class features, box features), one map per predicted level."""

    def class_predictor(
        self, in_channels: int, out_channels: int, kernel_size: int, bias: bool
    ) -> nn.Module:
        """A module ``(feature, size) -> class map`` whose output always has ``size`` (H, W)."""


class Aligner(Protocol):
    """Where in space each task reads its features.

    It runs where the towers run, under autocast if that is on: what it computes coordinates
    from, and the extras it returns, must be made float32 by itself.
    """

    def __call__(
        self, feature: Tensor, cls_feature: Tensor, box_feature: Tensor, level: int
    ) -> tuple[Tensor, Tensor, Any]:
        """A level's pyramid map and tower outputs -> class feature, box feature, extras."""

    def decode(self, extras: list[Any], grid: Grid) -> dict[str, Any]:
        """The levels' extras -> entries of ``DensePredictions.extras``, in pixels."""


class Predictor(Protocol):
    """At which locations each target is predicted; the facts shape the class convolution.

    Attributes:
        in_channels: of the box features.
        class_outputs: channels of the class maps it wants.
        class_kernel_size: of the convolution that makes them.
        class_bias: whether that has a bias. If not, the predictor is a :class:`ClassBiasOwner`.
    """

    in_channels: int
    class_outputs: int
    class_kernel_size: int
    class_bias: bool

    def __call__(
        self, class_maps: list[Tensor], box_features: list[Tensor], grid: Grid
    ) -> DensePredictions:
        """The maps of all levels, each at its level's size -> predictions."""


@runtime_checkable
class ClassBiasOwner(Protocol):
    """A predictor that adds the classes' bias itself, behind the convolution."""

    def reset_class_bias(self, value: float) -> None:
        """Let every class start at this bias."""


class ClassPredictor(nn.Conv2d):
    """The convolution that makes class maps from a tower at the resolution of its own level."""

    def forward(self, input: Tensor, size: Size | None = None) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H, W); ``size`` is the (H, W) that is wanted."""
        if size is not None and tuple(input.shape[-2:]) != tuple(size):
            raise ValueError(
                f"class feature is {tuple(input.shape[-2:])} cells, its level {tuple(size)}; a "
                "context with cls_stride 2 must bring its own class predictor"
            )
        return super().forward(input)


class SharedContext(nn.Module):
    """The plain host: both tasks read the same pyramid level (a :class:`Context`)."""

    cls_stride = 1
    finer_levels = 0

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.in_channels = self.cls_channels = self.box_channels = channels

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pyramid maps, finest first -> (class features, box features), a map per level each."""
        return features, features

    def class_predictor(
        self, in_channels: int, out_channels: int, kernel_size: int, bias: bool
    ) -> nn.Module:
        """A module ``(feature, size) -> class map`` whose output always has ``size`` (H, W)."""
        return ClassPredictor(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )


class DenseHead(nn.Module):
    """Features of all levels -> :class:`DensePredictions`, with weights shared over levels.

    Parameter names are Detectron2's (``cls_subnet``, ``bbox_subnet``, ``cls_score``). The box
    predictors live in the ``predictor`` slot; Detectron2's flat names for them are accepted when
    a state dict is loaded, and tensors of another shape are left out and reported.
    """

    def __init__(
        self,
        *,
        context: Context,
        predictor: Predictor,
        strides: Sequence[int],
        offset: float,
        cls_conv_dims: Sequence[int],
        box_conv_dims: Sequence[int],
        aligner: Aligner | None = None,
        norm: str | Callable[[int], nn.Module] = "GN",
        tower: Callable[..., nn.Module] = conv_tower,
        prior_prob: float = 0.01,
    ) -> None:
        """
        Args:
            context: which features each task reads (:class:`SharedContext`, TSCODE).
            predictor: ``(class maps, box features, grid) -> DensePredictions``, with the facts
                ``class_outputs``, ``class_kernel_size``, ``class_bias`` and ``in_channels``.
            strides: pixels per cell of each predicted level, finest first.
            offset: where in its cell a reference point lies: 0.5 the middle, 0 the corner.
            cls_conv_dims: channels of the class tower's convolutions.
            box_conv_dims: channels of the box tower's convolutions.
            aligner: where in space each task reads its features (SALT), or None.
            norm: normalisation of both towers.
            tower: builds a tower from ``in_channels``, ``conv_dims`` and ``norm``.
            prior_prob: the probability every class starts with.
        """
        super().__init__()
        if not callable(tower):
            raise TypeError(f"tower must be callable, such as conv_tower, not {tower!r}")
        if aligner is not None and context.cls_stride != 1:
            raise ValueError(
                f"{type(aligner).__name__} samples both tasks on each level's own grid, but "
                f"{type(context).__name__} makes class features at 1/{context.cls_stride} of it; "
                "use the context's box half alone, or no aligner"
            )
        self.strides = tuple(int(stride) for stride in strides)
        self.offset = float(offset)
        self.context, self.aligner, self.predictor = context, aligner, predictor
        self.cls_subnet = tower(
            in_channels=context.cls_channels, conv_dims=list(cls_conv_dims), norm=norm
        )
        self.bbox_subnet = tower(
            in_channels=context.box_channels, conv_dims=list(box_conv_dims), norm=norm
        )
        box_channels = [context.box_channels, *box_conv_dims][-1]
        if predictor.in_channels != box_channels:
            raise ValueError(
                f"the box tower ends with {box_channels} channels, {type(predictor).__name__} "
                f"expects {predictor.in_channels}; set predictor.in_channels={box_channels}"
            )
        self.cls_score = context.class_predictor(
            [context.cls_channels, *cls_conv_dims][-1],
            predictor.class_outputs,
            predictor.class_kernel_size,
            predictor.class_bias,
        )
        init_conv(self.cls_score, bias=prior_bias(prior_prob))
        if isinstance(predictor, ClassBiasOwner):
            predictor.reset_class_bias(prior_bias(prior_prob))

    def forward(self, features: list[Tensor]) -> DensePredictions:
        """Maps (N, C, H, W), finest first -> predictions.

        ``features`` are the predicted levels, one per stride, perhaps with finer maps in front
        that only the context reads. Whatever autocast says, the predictor gets float32 maps and
        runs with autocast off, since coordinates do not survive 8 or 11 bits of mantissa.
        """
        cls_features, box_features = self.context(features)
        levels = features[-len(self.strides) :]
        class_maps, box_maps, aligned = [], [], []
        for level, (feature, cls_feature, box_feature) in enumerate(
            zip(levels, cls_features, box_features, strict=True)
        ):
            cls_feature = self.cls_subnet(cls_feature)
            box_feature = self.bbox_subnet(box_feature)
            if self.aligner is not None:
                cls_feature, box_feature, extra = self.aligner(
                    feature, cls_feature, box_feature, level
                )
                aligned.append(extra)
            class_maps.append(self.cls_score(cls_feature, map_size(feature)))
            box_maps.append(box_feature)
        with torch.autocast(features[0].device.type, enabled=False):
            class_maps, box_maps = (
                [at_least_float32(x) for x in maps] for maps in (class_maps, box_maps)
            )
            return self._predict(class_maps, box_maps, aligned)

    def _predict(
        self, class_maps: list[Tensor], box_maps: list[Tensor], aligned: list[Any]
    ) -> DensePredictions:
        grid = make_grid(
            [map_size(x) for x in box_maps],
            self.strides,
            self.offset,
            device=box_maps[0].device,
            dtype=box_maps[0].dtype,
        )
        predictions = self.predictor(class_maps, box_maps, grid)
        if self.aligner is None:
            return predictions
        decoded = self.aligner.decode(aligned, grid)
        if both := decoded.keys() & predictions.extras.keys():
            raise ValueError(
                f"{type(self.predictor).__name__} and {type(self.aligner).__name__} both write "
                f"extras {sorted(both)}; give them different names"
            )
        return predictions._replace(extras={**predictions.extras, **decoded})

    def check_pyramid(self, shapes: Mapping[str, Any], names: Sequence[str]) -> None:
        """Raise ValueError unless the backbone's named levels have this head's strides, channels.

        Args:
            shapes: Detectron2's ``backbone.output_shape()``.
            names: levels handed to :meth:`forward`, finest first.
        """
        unknown = [name for name in names if name not in shapes]
        if unknown:
            raise ValueError(
                f"model.head_in_features names {unknown}, the backbone gives {sorted(shapes)}; "
                "name levels among these, or make the backbone give more: a bottom-up map such as "
                "res2 by model.backbone.bottom_up.out_features and model.backbone.passed_on"
            )
        expected = self.context.finer_levels + len(self.strides)
        if len(names) != expected:
            raise ValueError(
                f"model.head_in_features names {list(names)} of strides "
                f"{tuple(shapes[name].stride for name in names)}; wanted are {expected}: "
                f"{self.context.finer_levels} finer maps for {type(self.context).__name__} (such "
                f"as res2), then levels of strides {self.strides}; change it or "
                "model.head.strides"
            )
        predicted = [*names][-len(self.strides) :]
        strides = tuple(shapes[name].stride for name in predicted)
        if strides != self.strides:
            raise ValueError(
                f"the backbone's levels {predicted} have strides {strides}, the head is told "
                f"{self.strides}; set model.head.strides={list(strides)} or change "
                "model.head_in_features"
            )
        self._check_finer({name: shapes[name] for name in names[: -len(self.strides)]})
        channels = {name: shapes[name].channels for name in predicted}
        if set(channels.values()) != {self.context.in_channels}:
            raise ValueError(
                f"the backbone's levels have channels {channels}, "
                f"{type(self.context).__name__} expects {self.context.in_channels} in each; make "
                "model.head.context agree with model.backbone.out_channels"
            )

    def _check_finer(self, finer: Mapping[str, Any]) -> None:
        """Compare the maps in front of the predicted levels with what the context expects."""
        wanted = getattr(self.context, "finer_channels", self.context.in_channels)
        channels = {name: shape.channels for name, shape in finer.items()}
        if channels and set(channels.values()) != {wanted}:
            raise ValueError(
                f"the backbone's finer maps have channels {channels}, "
                f"{type(self.context).__name__} expects {wanted}; set "
                f"model.head.context.finer_channels={next(iter(channels.values()))}"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Runs before the children load, and after fvcore has compared shapes by name: the names
        # that are translated here are the ones it could not know.
        nested_children = dict(self.get_submodule("predictor").named_children())
        for child in nested_children.keys() - dict(self.named_children()).keys():
            flat = f"{prefix}{child}."
            for name in [key for key in state_dict if key.startswith(flat)]:
                nested = f"{prefix}predictor.{child}.{name[len(flat) :]}"
                state_dict[nested] = state_dict.pop(name)
        drop_misfits(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
