# SPDX-License-Identifier: Apache-2.0
"""Finding, loading and overriding recipes, and the door for Detectron2's yacs configs.

A recipe is a Detectron2 LazyConfig file below ``configs/`` or ``projects/*/configs/``. It is
found by its bare name from a checkout, an editable install and a wheel alike.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "YACS_VALUES",
    "ConfigError",
    "add_decouple_config",
    "apply_overrides",
    "check_key",
    "config_names",
    "configs_root",
    "door_model",
    "door_recipe",
    "find_config",
    "get_config",
    "instantiate_parts",
    "nearest",
    "text_override",
]


_SUFFIXES = (".py", ".yaml", ".yml")


class ConfigError(ValueError):
    """A recipe, key or value that does not exist; the message says what to type instead."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the known names closest to ``name``, for error messages."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "known are: " + (", ".join(names) or "none")


def configs_root() -> Path:
    """The folder that holds ``common/`` and ``baselines/``.

    It lies in the package when that was installed from a wheel, beside it in a checkout.
    """
    return _data_root() / "configs"


def _data_root() -> Path:
    package = Path(__file__).resolve().parent
    for root in (package, package.parent):
        if (root / "configs" / "common").is_dir():
            return root
    raise ConfigError(
        f"no configs/common beside or inside {package}: this installation is incomplete; install "
        "d2-decouple again from its wheel, or from a checkout with `pip install -e .`"
    )


def _recipe_files(suffix: str) -> dict[str, Path]:
    root = _data_root()
    folders = [root / "configs" / "baselines", *sorted(root.glob("projects/*/configs"))]
    files = (path for folder in folders for path in sorted(folder.rglob(f"*{suffix}")))
    return {path.stem: path for path in files if not path.name.startswith("_")}


def config_names() -> list[str]:
    """Names of all recipes, sorted, as :func:`get_config` takes them."""
    return sorted(_recipe_files(".py"))


def find_config(name: str | Path) -> Path:
    """The file of a recipe's name (``fcos_R_50_FPN_1x``) or of a path to a .py or .yaml file.

    Raises:
        ConfigError: no such file or name; the message names the nearest recipes.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ConfigError(
                f"{path} is no config: wanted a file that ends in {', '.join(_SUFFIXES)}, or the "
                "name of a recipe"
            )
        return path.resolve()
    suffix = path.suffix if path.suffix in _SUFFIXES else ".py"
    stem = path.name.removesuffix(path.suffix) if path.suffix == suffix else path.name
    recipes = _recipe_files(suffix)
    if path.parent == Path() and stem in recipes:
        return recipes[stem]
    raise ConfigError(
        f"no config {str(name)!r}: neither a file nor a recipe; {nearest(stem, recipes)} "
        "(`python -m d2_decouple.config` lists them all)"
    )


def get_config(name: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Load a recipe by name or path.

    Args:
        name: such as ``fcos_R_50_FPN_1x``, or the path of a LazyConfig file.
        overrides: ``key=value`` strings, such as ``model.num_classes=3``.

    Returns:
        omegaconf's ``DictConfig`` with ``model``, ``dataloader``, ``optimizer``,
        ``lr_multiplier`` and ``train``; nothing in it has been built yet.

    Raises:
        ConfigError: unknown name or key.
    """
    from detectron2.config import LazyConfig

    path = find_config(name)
    if path.suffix != ".py":
        raise ConfigError(
            f"{path.name} is a yacs config, a LazyConfig (.py) is wanted here; "
            "`python -m d2_decouple.train --config-file` takes both kinds"
        )
    return apply_overrides(LazyConfig.load(str(path)), overrides)


def apply_overrides(cfg: Any, overrides: Sequence[str]) -> Any:
    """``cfg`` with ``key=value`` strings applied.

    Only keys that the config or the constructor it calls knows are accepted: a mistyped one
    would otherwise be ignored without a word, or fail far away. So would a word where a switch or a
    number of the model stood: Python takes ``no`` and ``off``, which are texts here, for true.

    Raises:
        ConfigError: a string without ``=``, an unknown key (the nearest one is named), or a word in
            the place of true and false, or of a number of the model.
    """
    from detectron2.config import LazyConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    before = []
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise ConfigError(
                f"override {override!r} has no value: write key=value, as in train.max_iter=100"
            )
        if key.startswith("~"):
            raise ConfigError(
                f"override {override!r}: a key cannot be deleted from the command line; write a "
                "config file that imports this one and deletes it"
            )
        before.append(check_key(cfg, key.lstrip("+"), override))
    try:
        cfg = LazyConfig.apply_overrides(cfg, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            f"among the overrides {list(overrides)} one has a value that cannot be read ({error}); "
            "put values with brackets, quotes or spaces in quotes: key='\"value\"'"
        ) from error
    for override, known in zip(overrides, before, strict=True):
        if isinstance(known, bool | int | float):
            _check_kind(known, cfg, override)
    return cfg


def _check_kind(before: bool | int | float, cfg: Any, override: str) -> None:
    """Raise ConfigError if a word has taken the place of a switch, or of a number of the model.

    Other numbers are checked where they are used, with what each of them may be.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    key = override.partition("=")[0].lstrip("+")
    if not isinstance(before, bool) and not key.startswith("model."):
        return
    try:
        after = OmegaConf.select(cfg, key)
    except InterpolationResolutionError:  # what it refers to may still come
        return
    if not isinstance(after, str):
        return
    wanted = "true or false" if isinstance(before, bool) else "a number"
    raise ConfigError(
        f"override {override!r} gives the text {after!r}; wanted is {wanted}, such as "
        f"{str(before).lower()}"
    )


def text_override(key: str, value: str | Path) -> str:
    """``key='value'`` for :func:`apply_overrides`; ``value`` may hold quotes and backslashes."""
    # Hydra reads a backslash as itself, but for those in front of a quote.
    inside = re.sub(r"(\\*)'", r"\1\1\\'", str(value))
    end = inside[len(inside.rstrip("\\")) :]
    return f"{key}='{inside}{end}'"


def check_key(cfg: Any, key: str, override: str) -> Any:
    """Raise ConfigError unless a Lazy or yacs config has the dotted ``key``.

    The last step may be a parameter that a Lazy recipe left at its default. ``override`` is what
    was typed, for the message.

    Returns:
        What stands there, or the parameter's default.
    """
    from omegaconf import ListConfig

    node, walked = cfg, ""
    parts = key.split(".")
    for position, part in enumerate(parts):
        if isinstance(node, ListConfig):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(
                    f"override {override!r}: {walked} is a list of {len(node)}; index it with "
                    f"0 to {len(node) - 1}"
                )
            node = node[int(part)]
        elif isinstance(node, Mapping):
            known = {str(name) for name in node}
            if part not in known:
                optional = _parameters(node)
                if position == len(parts) - 1 and (part in optional or optional is _ANYTHING):
                    return optional.get(part)
                where = f"in {walked}" if walked else "at the top of the config"
                raise ConfigError(
                    f"override {override!r}: there is no key {part!r} {where}; "
                    f"{nearest(part, (known | {*optional}) - {'_target_'})}"
                )
            node = node[part]
        else:
            raise ConfigError(
                f"override {override!r}: {walked} is {node!r} and has no keys below it"
            )
        walked = f"{walked}.{part}" if walked else part
    return node


_ANYTHING: dict[str, Any] = {"*": None}


def _parameters(node: Any) -> dict[str, Any]:
    """Parameters of the callable that a lazy node will call, and their defaults."""
    import inspect

    from detectron2.utils.registry import locate

    target = node.get("_target_")
    if target is None:
        return {}
    called = locate(target) if isinstance(target, str) else target
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return _ANYTHING
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return _ANYTHING
    return {parameter.name: parameter.default for parameter in parameters}


def add_decouple_config(cfg: Any) -> None:
    """Add the node ``MODEL.DECOUPLE`` to a yacs config, which opens the door to the recipes.

    The architecture stays in the LazyConfig file; the node names it and holds the few values
    that people override. Keys:

    * ``MODEL_FILE``: name or path of a recipe whose ``model`` is built.
    * ``NUM_CLASSES``, ``SCORE_THRESH_TEST``, ``NMS_THRESH_TEST``: replace the recipe's value
      when they are not None. Detectron2's own keys of these (``MODEL.ROI_HEADS``, ...) do
      nothing to our heads, and the launcher refuses other thresholds than the model's there; of a
      two-stage model the backbone alone is the yacs config's.
    * ``OVERRIDES``: a list of ``model.key=value`` for everything else, and of ``train.key=value``
      for ``amp.dtype``, ``accumulate``, ``max_grad_norm`` and ``ema``.

    This one call is all that another launcher needs: it also registers the meta-architectures
    and the data sets of the recipes.
    """
    from detectron2.config import CfgNode

    from . import modeling  # noqa: F401 - registers
    from .data import register_bccd

    register_bccd()

    cfg.MODEL.DECOUPLE = CfgNode()
    cfg.MODEL.DECOUPLE.MODEL_FILE = ""
    cfg.MODEL.DECOUPLE.NUM_CLASSES = None
    cfg.MODEL.DECOUPLE.SCORE_THRESH_TEST = None
    cfg.MODEL.DECOUPLE.NMS_THRESH_TEST = None
    cfg.MODEL.DECOUPLE.OVERRIDES = []


YACS_VALUES = {
    "NUM_CLASSES": ("model.num_classes", "model.roi_heads.num_classes"),
    "SCORE_THRESH_TEST": (
        "model.selection.candidates.test_score_thresh",
        "model.roi_heads.selection.test_score_thresh",
    ),
    "NMS_THRESH_TEST": (
        "model.selection.nms.test_nms_thresh",
        "model.roi_heads.selection.nms.test_nms_thresh",
    ),
}
"""What a key of ``MODEL.DECOUPLE`` replaces in a one-stage recipe, and in a two-stage one."""


def instantiate_parts(
    cfg: Any, node: str = "", input_shape: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Build the parts of the model that a yacs config names: constructor argument -> object.

    ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` are taken from the yacs config,
    since its data loader follows the first of them.

    Args:
        cfg: the yacs config.
        node: which part of the recipe's model is meant, such as "roi_heads"; by default all.
        input_shape: the maps of the backbone that it will work on, compared with the recipe's.

    Raises:
        ConfigError: ``MODEL.DECOUPLE`` or its ``MODEL_FILE`` is missing or unknown, the recipe
            has no such part, or the maps are not those of the recipe's backbone.
    """
    from detectron2.config import instantiate

    lazy = door_model(cfg)
    if node and node not in lazy:
        raise ConfigError(
            f"MODEL.DECOUPLE.MODEL_FILE is {cfg.MODEL.DECOUPLE.MODEL_FILE!r}, whose model has no "
            f"{node}; name a recipe of a two-stage detector, such as decoupled_rcnn_R_50_FPN_1x, "
            "or set MODEL.META_ARCHITECTURE OneStageDetector"
        )
    if node and input_shape is not None:
        _check_maps(lazy[node], node, lazy.backbone.out_channels, input_shape)
    chosen = lazy[node] if node else lazy
    return {name: instantiate(part) for name, part in chosen.items() if name != "_target_"}


def _check_maps(part: Any, node: str, channels: int, shapes: Mapping[str, Any]) -> None:
    """Compare the maps of a yacs config's backbone with what a recipe's part expects."""
    wanted = [str(name) for key in ("in_features", "box_in_features") for name in part.get(key, [])]
    got = {name: shapes[name].channels for name in wanted if name in shapes}
    if got.keys() != set(wanted) or set(got.values()) != {channels}:
        raise ConfigError(
            f"the recipe's {node} works on {wanted} of {channels} channels each, the yacs "
            f"config's backbone gives { ({name: x.channels for name, x in shapes.items()}) }; set "
            f"MODEL.BACKBONE.NAME build_resnet_fpn_backbone and MODEL.FPN.OUT_CHANNELS {channels}, "
            "or name another MODEL.DECOUPLE.MODEL_FILE"
        )


def door_model(cfg: Any) -> Any:
    """The lazy ``model`` node that a yacs config names, with its values filled in."""
    return door_recipe(cfg).model


def door_recipe(cfg: Any) -> Any:
    """The LazyConfig that a yacs config names, with its values filled in.

    Of it the ``model`` counts, and in ``train`` what yacs has no key for (``train.ema``, ...).
    """
    if "DECOUPLE" not in cfg.MODEL:
        raise ConfigError(
            "this config has no MODEL.DECOUPLE: call d2_decouple.add_decouple_config(cfg) right "
            "after get_cfg()"
        )
    door = cfg.MODEL.DECOUPLE
    if not door.MODEL_FILE:
        raise ConfigError(
            "MODEL.DECOUPLE.MODEL_FILE is empty: name a recipe, as in "
            f"MODEL_FILE: fcos_R_50_FPN_1x ({', '.join(config_names())})"
        )
    recipe = get_config(door.MODEL_FILE)
    two_stages = "roi_heads" in recipe.model
    values = {keys[two_stages]: door[name] for name, keys in YACS_VALUES.items()}
    overrides = [f"{key}={value}" for key, value in values.items() if value is not None]
    recipe = apply_overrides(recipe, [*overrides, *door.OVERRIDES])
    # Slots may depend on the length of the training, which is the yacs config's to say.
    recipe.train.max_iter = cfg.SOLVER.MAX_ITER
    recipe.model.update(
        input_format=cfg.INPUT.FORMAT,
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
    )
    return recipe


if __name__ == "__main__":
    for recipe_name, recipe_path in sorted(_recipe_files(".py").items()):
        print(f"{recipe_name:32} {recipe_path}")
