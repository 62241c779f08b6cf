# SPDX-License-Identifier: Apache-2.0
"""Networks of the package timm as Detectron2 backbones."""

import importlib
from collections.abc import Mapping, Sequence
from math import log2
from types import ModuleType
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from omegaconf import OmegaConf
from torch import Tensor, nn

from ..config import nearest

__all__ = ["TimmBackbone", "timm_pixels"]

_KEY = "model.backbone.bottom_up"
# A saved config from elsewhere must not say what is read or fetched.
_REFUSED = frozenset({"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"})


class TimmBackbone(Backbone):
    """Any network of timm that has a ``features_only`` form, with Detectron2's names of maps.

    A map of stride 2^k is called ``res{k}``: ``res2`` has stride 4, ``res5`` 32. Parameters are
    below ``net.`` with timm's own names.
    """

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool = False,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        freeze_norms: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            name: as timm knows it, with or without a tag (``convnext_tiny.fb_in1k``).
            pretrained: fetch timm's weights for it, by timm's own means and into its cache.
            out_features: maps that are handed out. What is behind the coarsest is not built.
            freeze_at: as Detectron2's: 1 keeps what is before ``res2`` at its weights, 2 and more
                everything up to that map.
            freeze_norms: keep the statistics, factors and summands of all batch norms.
            options: further arguments of ``timm.create_model``, such as ``img_size``.

        Raises:
            ValueError: timm is missing or does not know the network, or it has no such maps.
        """
        super().__init__()
        timm = _timm(name)
        wanted = [str(feature) for feature in out_features]
        # timm looks for lists and dicts; those of a config are others.
        plain = {key: _plain(value) for key, value in (options or {}).items()}
        create = {"pretrained": pretrained, **plain}
        net = _create(timm, name, create)
        found = _features(net, name)
        missing = [feature for feature in wanted if feature not in found]
        if missing or not wanted:
            raise ValueError(
                f"{name} has the maps {sorted(found)}, wanted are {missing or 'none'}; name some "
                f"of these in {_KEY}.out_features, or take another network"
            )
        last = max(list(found).index(feature) for feature in wanted)
        if last + 1 < len(found):
            indices = list(net.feature_info.out_indices)[: last + 1]
            net = _create(timm, name, {**create, "out_indices": indices})
        self.net: Any = net
        self._name = name
        self._order = list(_features(net, name))
        self._out_features = [feature for feature in self._order if feature in wanted]
        shapes = {feature: found[feature] for feature in self._out_features}
        self._out_feature_channels = {key: shape.channels for key, shape in shapes.items()}
        self._out_feature_strides = {key: shape.stride for key, shape in shapes.items()}
        self._freeze(freeze_at, freeze_norms)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> maps (N, C, H / stride, W / stride) by name.

        Raises:
            ValueError: the network takes images of another size alone.
        """
        try:
            maps = self.net(x)
        except AssertionError as error:  # how timm refuses a size
            raise ValueError(
                f"{self._name} cannot take images of {tuple(x.shape[-2:])} pixels ({error}); if "
                f"timm can build it for any size, type +{_KEY}.options.dynamic_img_size=True, or "
                "take a network without fixed windows, such as a ConvNeXt"
            ) from error
        named = dict(zip(self._order, maps, strict=True))
        return {key: self._channels_first(key, named[key]) for key in self._out_features}

    def _channels_first(self, key: str, x: Tensor) -> Tensor:
        """Some networks hand out (N, H, W, C)."""
        last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        return x.permute(0, 3, 1, 2) if last else x

    def _freeze(self, freeze_at: int, norms: bool) -> None:
        frozen = {id(parameter) for parameter in self._until(freeze_at)}
        for parameter in self.net.parameters():
            if id(parameter) in frozen:
                parameter.requires_grad = False
        convert = importlib.import_module("timm.layers").freeze_batch_norm_2d
        for parent in list(self.net.modules()):
            for name, child in list(parent.named_children()):
                own = [*child.parameters(recurse=False)]
                still = own and all(id(parameter) in frozen for parameter in own)
                if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm) and (norms or still):
                    setattr(parent, name, convert(child))

    def _until(self, freeze_at: int) -> list[nn.Parameter]:
        """Parameters of what runs up to a stage; they stand in the order in which they run."""
        if not freeze_at:
            return []
        names = [name for name, _ in self.net.named_parameters()]
        stages = [self._first_stage, *range(self._first_stage + 1, 6)]
        modules = dict(zip(stages, self.net.feature_info.module_name(), strict=False))
        if freeze_at not in (1, *modules):
            raise ValueError(
                f"{_KEY}.freeze_at is {freeze_at}; {self._name} has the stages {list(modules)}, "
                "and 1 is what is before res2"
            )
        inside = [_inside(name, modules[max(freeze_at, 2)]) for name in names]
        count = inside.index(True) if freeze_at == 1 else len(names) - inside[::-1].index(True)
        return list(self.net.parameters())[:count]

    @property
    def _first_stage(self) -> int:
        return int(self._order[0].removeprefix("res"))


def timm_pixels(name: str, input_format: str = "RGB") -> dict[str, Any]:
    """What a detector's ``pixel_mean``, ``pixel_std`` and ``input_format`` are for timm's weights.

    Values are grey levels (0..255) in the order of ``input_format``: put them into a recipe by
    ``model.update(timm_pixels("convnext_tiny.fb_in1k"))``, and let the data have the same order.
    """
    timm = _timm(name)
    if input_format not in ("RGB", "BGR"):
        raise ValueError(f"input_format is {input_format!r}; wanted is RGB or BGR")
    said = timm.get_pretrained_cfg(name, allow_unregistered=False)
    step = 1 if input_format == "RGB" else -1
    return {
        "pixel_mean": [round(255 * value, 3) for value in said.mean][::step],
        "pixel_std": [round(255 * value, 3) for value in said.std][::step],
        "input_format": input_format,
    }


def _timm(name: str) -> ModuleType:
    """The package, if it is there and knows the network."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"the network {name} needs the package timm ({error}); type pip install "
            '"d2-decouple[timm]"'
        ) from error
    base, _, tag = name.partition(".")
    known = timm.list_models()
    if base not in known:
        raise ValueError(f"timm has no network {name!r}; {nearest(base, known)}")
    tags = [of.partition(".")[2] for of in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise ValueError(f"timm has no weights {tag!r} of {base}; {nearest(tag, tags)}")
    return timm


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _create(timm: ModuleType, name: str, options: Mapping[str, Any]) -> Any:
    if refused := options.keys() & _REFUSED:
        raise ValueError(
            f"{_KEY}.options has {sorted(refused)}, which name other weights than timm's own: load "
            "them by train.init_checkpoint"
        )
    try:
        return timm.create_model(name, features_only=True, **options)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"timm cannot build {name} as a network of maps with {dict(options)} ({error}); take "
            f"another one in {_KEY}.name, or other {_KEY}.options"
        ) from error


def _features(net: Any, name: str) -> dict[str, ShapeSpec]:
    """Shapes of the maps by our names, finest first."""
    info = net.feature_info
    strides = [int(stride) for stride in info.reduction()]
    if sorted(set(strides)) != strides:
        raise ValueError(
            f"{name} has maps of strides {strides}, which are no pyramid; take a network whose "
            "strides double, or for a plain ViT the recipes vitdet_... (docs/backbones.md)"
        )
    return {
        f"res{round(log2(stride))}": ShapeSpec(channels=channels, stride=stride)
        for stride, channels in zip(strides, info.channels(), strict=True)
    }


def _inside(name: str, module: str) -> bool:
    """Whether a parameter belongs to a module; timm may write ``stages.0`` as ``stages_0``."""
    places = (f"{module}.", f"{module.replace('.', '_')}.")
    return name.startswith(places)
