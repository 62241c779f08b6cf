# SPDX-License-Identifier: Apache-2.0
"""What inference needs of a config: recipes, yacs files, and the ``config.yaml`` of a training.

The yaml that Detectron2 writes of a LazyConfig names functions to call. It may come from somebody
else, so only the building blocks of models and of image transforms are called for it. Of a yacs
config ``MODEL.DECOUPLE`` must name a shipped recipe and may not exchange what that calls.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import (
    ConfigError,
    add_decouple_config,
    apply_overrides,
    check_key,
    config_names,
    door_model,
    find_config,
    get_config,
)
from .unread_keys import refuse_unread

__all__ = ["InferenceConfig", "inference_config", "yacs_config"]

_PACKAGES = ("d2_decouple", "detectron2", "fvcore", "torch")
# Where what a saved config calls must be defined, wherever it was imported from.
_DEFINED_IN = (
    "d2_decouple.data.augmentation",
    "d2_decouple.data.legacy",
    "d2_decouple.layers",
    "d2_decouple.modeling",
    "detectron2.data.transforms",
    "detectron2.layers",
    "detectron2.modeling",
    "fvcore.transforms",
    "torch.nn",
)
_NUM_CLASSES = ("model.num_classes", "model.roi_heads.num_classes")
_SCORE_THRESH = (
    "model.selection.candidates.test_score_thresh",
    "model.test_score_thresh",
    "model.roi_heads.selection.test_score_thresh",
    "model.roi_heads.box_predictor.test_score_thresh",
)
_YACS_NUM_CLASSES = ("DECOUPLE.NUM_CLASSES", "RETINANET.NUM_CLASSES", "ROI_HEADS.NUM_CLASSES")
_YACS_SCORE_THRESH = (
    "DECOUPLE.SCORE_THRESH_TEST",
    "RETINANET.SCORE_THRESH_TEST",
    "ROI_HEADS.SCORE_THRESH_TEST",
)


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """One view of both kinds of config.

    Attributes:
        augmentations: what is done to test images before the model sees them.
        image_format: order of the channels that the model wants, "BGR" or "RGB".
        dataset: name of the test set, or "".
        model: builds the model for a number of classes (None: as the config says), on the CPU.
    """

    augmentations: list[T.Augmentation]
    image_format: str
    dataset: str
    model: Callable[[int | None], nn.Module]

    def class_names(self) -> list[str]:
        """Names of the test set's classes; empty if it is not registered."""
        if not self.dataset or self.dataset not in MetadataCatalog.list():
            return []
        return list(MetadataCatalog.get(self.dataset).get("thing_classes") or [])


def inference_config(
    name: str | Path, overrides: Sequence[str] = (), *, score_thresh: float | None = None
) -> InferenceConfig:
    """Read a config of any kind.

    Args:
        name: a recipe's name, or the path of a LazyConfig (.py), of a yacs config (.yaml) or of
            the ``config.yaml`` that a training left in its output folder.
        overrides: ``key=value`` strings; for a yacs config ``KEY VALUE`` pairs.
        score_thresh: replaces the score below which the model drops candidates.

    Raises:
        ConfigError: unknown name, key or kind of file, a saved config that calls something else
            than parts of models and image transforms, a yacs config with yaml's tags for calls, or
            one whose ``MODEL.DECOUPLE`` names another file or exchanges what a recipe calls, or
            whose thresholds its model does not read.
    """
    path = find_config(name)
    if path.suffix == ".py":
        return _lazy(get_config(path, overrides), score_thresh)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        cfg = OmegaConf.create(content, flags={"allow_objects": True})
        _check_saved(cfg)  # first, since looking up the keys of overrides imports what is named
        return _lazy(apply_overrides(cfg, overrides), score_thresh)
    if isinstance(content, dict) and ({"MODEL", "_BASE_"} & content.keys()):
        _check_door(path, overrides)
        return _yacs(yacs_config(path, overrides, allow_unsafe=False), score_thresh)
    raise ConfigError(
        f"{path} is no config: wanted a yacs config (with MODEL or _BASE_), or the config.yaml of "
        "a training's output folder (with model)"
    )


def yacs_config(
    path: Path,
    overrides: Sequence[str] = (),
    prepare: Callable[[CfgNode], None] = lambda cfg: None,
    *,
    allow_unsafe: bool = True,
) -> CfgNode:
    """Detectron2's defaults, with ``MODEL.DECOUPLE``, the file and ``KEY VALUE`` pairs.

    Args:
        path: of the file.
        overrides: keys and values in turn.
        prepare: changes the config between the file and the overrides.
        allow_unsafe: let the file, and the ``_BASE_`` that it names (maybe on another machine),
            call Python functions, as some of Detectron2's own do.

    Raises:
        ConfigError: a key or a value that Detectron2 does not know, or half a pair.
    """
    cfg = get_cfg()
    add_decouple_config(cfg)
    # The shipped yaml files say nothing about the device; the machine does.
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    if len(overrides) % 2:
        raise ConfigError(
            f"a yacs config is overridden by pairs, KEY VALUE; got {' '.join(overrides)!r}"
        )
    for key in overrides[::2]:
        check_key(cfg, key, key)
    try:
        cfg.merge_from_file(str(path), allow_unsafe=allow_unsafe)
        prepare(cfg)
        cfg.merge_from_list(list(overrides))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path.name} or its _BASE_ cannot be read as plain yaml: {error}; give the "
            "config.yaml that its training left, which has no tags and no base"
        ) from error
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f"{path.name} or an override of it: {error}") from error
    return cfg


def _lazy(cfg: DictConfig, score_thresh: float | None) -> InferenceConfig:
    if "model" not in cfg:
        raise ConfigError(
            "this config has no model; give a recipe, as `python -m "
            + ("d2_decouple.config` lists them")
        )
    mapper = _test_mapper(cfg)
    if mapper is None:
        raise ConfigError(
            "this config has no dataloader.test.mapper, which says how large images are shown to "
            "the model; add one, as configs/common/data/coco.py has it"
        )
    if score_thresh is not None:
        _set_first(cfg, _SCORE_THRESH, score_thresh)

    def model(num_classes: int | None) -> nn.Module:
        if num_classes is not None:
            _set_first(cfg, _NUM_CLASSES, num_classes)
        return instantiate(cfg.model)

    dataset = OmegaConf.select(cfg, "dataloader.test.dataset.names", default="")
    return InferenceConfig(
        augmentations=list(instantiate(mapper.augmentations)),
        image_format=mapper.image_format,
        dataset=dataset if isinstance(dataset, str) else str(next(iter(dataset), "")),
        model=model,
    )


def _test_mapper(cfg: DictConfig) -> Any:
    return OmegaConf.select(cfg, "dataloader.test.mapper", default=None)


def _set_first(cfg: DictConfig, keys: Sequence[str], value: Any) -> None:
    """Set the first of these keys that the config, or a constructor that it calls, has."""
    for key in keys:
        try:
            check_key(cfg, key, key)
        except ConfigError:
            continue
        OmegaConf.update(cfg, key, value)
        return


def _yacs(cfg: CfgNode, score_thresh: float | None) -> InferenceConfig:
    cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DECOUPLE.MODEL_FILE:
        refuse_unread(cfg, door_model(cfg))
    if score_thresh is not None:
        cfg.merge_from_list(_pairs(_YACS_SCORE_THRESH, float(score_thresh)))

    def model(num_classes: int | None) -> nn.Module:
        if num_classes is not None:
            cfg.merge_from_list(_pairs(_YACS_NUM_CLASSES, num_classes))
        return build_model(cfg)

    return InferenceConfig(
        augmentations=build_augmentation(cfg, is_train=False),
        image_format=cfg.INPUT.FORMAT,
        dataset=next(iter(cfg.DATASETS.TEST), ""),
        model=model,
    )


def _pairs(keys: Sequence[str], value: Any) -> list[Any]:
    return [item for key in keys for item in (f"MODEL.{key}", value)]


class _Loader(yaml.SafeLoader):
    """Plain yaml, tuples, and names of functions that a model or a transform is made of."""


class _Foreign:
    """Stands for a function that is no building block; other parts of a config may name some."""

    def __init__(self, name: str) -> None:
        self.name = name


def _construct_name(loader: yaml.SafeLoader, name: str, node: yaml.Node) -> Any:
    return _building_block(name) or _Foreign(name)


def _construct_tuple(loader: yaml.SafeLoader, node: Any) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", _construct_name)
_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def _check_door(path: Path, overrides: Sequence[str]) -> None:
    """Raise ConfigError if what a yacs file says of a recipe could run a program.

    What the user types in its place is the user's own.
    """
    door = yacs_config(path, allow_unsafe=False).MODEL.DECOUPLE
    named = "" if "MODEL.DECOUPLE.MODEL_FILE" in overrides[::2] else door.MODEL_FILE
    if named and named not in config_names():
        raise ConfigError(
            f"{path.name} has MODEL.DECOUPLE.MODEL_FILE {named!r}: a file may name shipped recipes "
            "alone (`python -m d2_decouple.config` lists them), since another one is a program; if "
            "you trust it, add MODEL.DECOUPLE.MODEL_FILE and its path to the command"
        )
    if "MODEL.DECOUPLE.OVERRIDES" not in overrides[::2]:
        for text in map(str, door.OVERRIDES):
            if "_target_" in text or "${" in text:
                raise ConfigError(
                    f"{path.name} has {text!r} in MODEL.DECOUPLE.OVERRIDES, which is not called: a "
                    "file may change values of a recipe, not what it calls; if you trust it, add "
                    "MODEL.DECOUPLE.OVERRIDES and the list to the command"
                )


def _check_saved(cfg: DictConfig) -> None:
    _check_calls(cfg.model, "model")
    key = "dataloader.test.mapper.augmentations"  # all that is built of the data's part
    _check_calls(OmegaConf.select(cfg, key, default=None), key)


def _check_calls(node: Any, where: str) -> None:
    """Raise ConfigError unless everything that a saved node will call is a building block."""
    if isinstance(node, Mapping):
        for key in node:
            if key != "_target_":
                _check_calls(node[key], f"{where}.{key}")
            elif _building_block(node[key]) is None:
                raise _refusal(where, node[key])
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, item in enumerate(node):
            _check_calls(item, f"{where}.{index}")
    elif isinstance(node, _Foreign):
        raise _refusal(where, node.name)


def _refusal(where: str, name: Any) -> ConfigError:
    return ConfigError(
        f"{where} of this saved config is {name}, which is not called: a saved config may name "
        f"classes and functions of {', '.join(_DEFINED_IN)} alone; if you trust it, write a "
        "LazyConfig (.py) that imports what it needs"
    )


def _located(name: str) -> Any:
    if name.split(".")[0] not in _PACKAGES:  # not even imported
        return None
    try:
        return locate(name)
    except ImportError:
        return None


def _building_block(name: Any) -> Any:
    """The class or function of a dotted name if it is a part of models or transforms, or None."""
    found = _located(name) if isinstance(name, str) else name
    module = f"{getattr(found, '__module__', '')}."
    callable_ = inspect.isroutine(found) or inspect.isclass(found)
    if callable_ and any(module.startswith(f"{known}.") for known in _DEFINED_IN):
        return found
    return None
