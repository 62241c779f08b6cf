# SPDX-License-Identifier: Apache-2.0
"""Weights by name: from Detectron2's catalogue, torchvision and timm to a file on this machine."""

import importlib
import logging
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError

import torch
from detectron2.utils.file_io import Detectron2Handler, PathManager

from ..config import nearest
from .download import download, parse_address
from .errors import WEIGHTS_KEYS, CheckpointError, DamagedCheckpointError

__all__ = ["local_file", "read_safetensors", "without_heuristics"]

_logger = logging.getLogger(__name__)

_ADDRESSES = ("detectron2", "http", "https")
_HEURISTICS = "matching_heuristics"  # Detectron2's parameter behind the name of a file
_SCHEMES = ("catalog", "detectron2", "http", "https", "timm", "torchvision")
_CATALOGUE = tuple(
    f"detectron2://ImageNetPretrained/{name}.pkl"
    for name in (
        "FAIR/X-101-32x8d",
        "FAIR/X-101-64x4d",
        "MSRA/R-101",
        "MSRA/R-50",
        "torchvision/R-50",
    )
)
# Not resnet50d, resnext26ts or resnet50_clip, which are other networks; of the Res2Nets those
# with a deep stem.
# Folders of Detectron2's model zoo, and one name below.
_ZOO_NAME = re.compile(r"(COCO|Cityscapes|Detectron1|LVIS|Misc|PascalVOC)[\w-]*/[\w.-]+")
_RESNET = re.compile(r"(wide_)?resne(t|xt)\d+(_(?!clip)\w+)?|res2net\d+d")


def local_file(source: str) -> str:
    """The path of a file with the weights that ``source`` names; downloads it once if need be.

    * ``torchvision://resnet50``: torchvision's best ResNet-50; ``torchvision://resnet50.NAME``
      the weights of that name, such as ``IMAGENET1K_V1``.
    * ``timm://resnet50.a1_in1k``: timm's model and tag; needs the package timm.
    * ``detectron2://ImageNetPretrained/MSRA/R-50.pkl``, ``https://...``: as in Detectron2, with
      ``#sha256=...`` behind it compared with that hash (:mod:`.download`). A query ("?") is the
      server's business, but for Detectron2's ``matching_heuristics=True``, which then stands
      behind the path (:func:`without_heuristics`).
    * ``COCO-Detection/retinanet_R_50_FPN_1x``: a model of Detectron2's zoo, with or without
      ``.yaml``, unless there is a file of that name.
    * anything else is a path, and handed back; so is what has a "?" and is none of these
      addresses.

    Raises:
        CheckpointError: an unknown name (the nearest ones are said), or one that could not be
            fetched.
    """
    scheme, separator, name = source.partition("://")
    address = bool(separator) and scheme.lower() in _ADDRESSES
    if not address and ("?" in source or not (separator or _is_zoo_name(source))):
        return source
    parameter = ""
    if not separator:
        file = _zoo_file(source)
    elif scheme == "torchvision":
        file = _torchvision_file(source, name)
    elif scheme == "timm":
        file = _timm_file(source, name)
    else:
        plain, by_names = without_heuristics(source)
        file = _detectron2_file(plain)
        parameter = f"?{_HEURISTICS}=True" if by_names else ""
    _logger.info("%s is %s", source, file)
    return file + parameter


def without_heuristics(source: str) -> tuple[str, bool]:
    """A path or an address without Detectron2's ``?matching_heuristics=True``, and if it was on.

    Detectron2 then matches names by their ends. Other parameters and a fragment stay.
    """
    url, fragment_mark, fragment = source.partition("#")
    base, _, query = url.partition("?")
    parameters = query.split("&") if query else []
    others = [each for each in parameters if each.partition("=")[0] != _HEURISTICS]
    if len(others) == len(parameters):
        return source, False
    given = [each.partition("=")[2] for each in parameters if each not in others]
    rest = f"?{'&'.join(others)}" if others else ""
    return f"{base}{rest}{fragment_mark}{fragment}", given == ["True"]


def read_safetensors(filename: str) -> dict[str, torch.Tensor]:
    """Tensors by name of a ``.safetensors`` file.

    Raises:
        CheckpointError: the package safetensors is missing.
        DamagedCheckpointError: the file is no such file, or only a part of one.
    """
    library = _optional("safetensors", filename)
    reader = importlib.import_module("safetensors.torch")
    try:
        tensors: dict[str, torch.Tensor] = reader.load_file(filename)
    except (library.SafetensorError, OSError) as error:
        raise DamagedCheckpointError(
            f"{filename} cannot be read as a checkpoint: it is damaged or cut off ({error}); "
            "copy it again"
        ) from error
    return tensors


def _torchvision_file(source: str, name: str) -> str:
    import torchvision

    models = torchvision.models
    model, _, weights = name.partition(".")
    known = [known for known in models.list_models(module=models) if _RESNET.fullmatch(known)]
    if model not in known:
        raise _unknown(source, (f"torchvision://{known_name}" for known_name in known))
    choice = models.get_model_weights(model)
    if (weights or "DEFAULT") not in choice.__members__:
        raise _unknown(source, (f"torchvision://{model}.{member.name}" for member in choice))
    url: str = choice[weights or "DEFAULT"].url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / url.rpartition("/")[2]
    if file.is_file():
        return str(file)
    # torchvision ends its files' names with the beginning of their hash.
    prefix = file.stem.rpartition("-")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), prefix, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # RuntimeError: another hash
        raise _unreachable(source, url, error) from error
    return str(file)


def _timm_file(source: str, name: str) -> str:
    timm, hub = _optional("timm", source), _optional("huggingface_hub", source)
    model, separator, _ = name.partition(".")
    tagged = [of for of in timm.list_models(pretrained=True) if _RESNET.fullmatch(of.split(".")[0])]
    models = {of.partition(".")[0] for of in tagged}
    if name not in tagged and (separator or model not in models):
        known = [of for of in tagged if of.startswith(f"{model}.")] or models
        raise _unknown(source, (f"timm://{known_name}" for known_name in known))
    entry = timm.get_pretrained_cfg(name)
    wanted = entry.hf_hub_filename or "model.safetensors"
    try:
        # It says how the input was normalised, and is looked for beside the weights.
        hub.hf_hub_download(entry.hf_hub_id, "config.json")
        return str(hub.hf_hub_download(entry.hf_hub_id, wanted))
    except OSError as error:
        where = f"{wanted} and config.json of {entry.hf_hub_id} from the Hugging Face hub"
        raise _unreachable(source, where, error) from error


def _is_zoo_name(source: str) -> bool:
    return bool(_ZOO_NAME.fullmatch(source)) and not Path(source).exists()


def _zoo_file(source: str) -> str:
    from detectron2 import model_zoo

    try:
        url = model_zoo.get_checkpoint_url(source)
    except RuntimeError as error:  # how the zoo says "unknown"
        urls = getattr(model_zoo.model_zoo, "_ModelZooUrls", None)
        known = getattr(urls, "CONFIG_PATH_TO_URL_SUFFIX", {})
        raise _unknown(source, known, " (nor is there such a file)") from error
    try:
        return str(download(url, called=source))
    except HTTPError as error:
        raise _unreachable(source, url, error) from error


def _detectron2_file(source: str) -> str:
    handler: Any = Detectron2Handler
    url = source.replace(handler.PREFIX, handler.S3_DETECTRON2_PREFIX, 1)
    if not url.startswith(("http://", "https://")):
        return _catalogue_file(source)
    try:
        return str(download(url, called=source))
    except HTTPError as error:
        if source.startswith(handler.PREFIX) and parse_address(source).url not in _CATALOGUE:
            raise _unknown(source, _CATALOGUE, f" ({error})") from error
        raise _unreachable(source, url, error) from error


def _catalogue_file(source: str) -> str:
    """Of Detectron2's old ``catalog://``, or of a scheme that nobody knows."""
    try:
        file = PathManager.get_local_path(source)
    except (KeyError, RuntimeError) as error:  # how that catalogue says "unknown"
        raise _unknown(source, _CATALOGUE) from error
    except OSError as error:
        raise _unreachable(source, source, error) from error
    if not Path(file).is_file():
        raise _unknown(source, (f"{scheme}://" for scheme in _SCHEMES))
    return str(file)


def _optional(package: str, source: str) -> ModuleType:
    """An optional package, or an error that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        install = "safetensors" if package == "safetensors" else "timm"
        raise CheckpointError(
            f"{source} needs the package {package} ({error}); type pip install {install}, or set "
            f"{WEIGHTS_KEYS} to a .pth file"
        ) from error


def _unknown(source: str, known: Iterable[str], reason: str = "") -> CheckpointError:
    return CheckpointError(
        f"{source} is no name of weights that can be used here{reason}; {nearest(source, known)} "
        f"(or set {WEIGHTS_KEYS} to a file)"
    )


def _unreachable(source: str, url: str, error: Exception) -> CheckpointError:
    what = "" if url == source else f" (that is {url})"
    return CheckpointError(
        f"{source} could not be fetched ({error}); without a network, bring the file{what} here "
        f"and set {WEIGHTS_KEYS} to it, or to an empty string for random weights"
    )
