# SPDX-License-Identifier: Apache-2.0
"""What is kept of a finished training: enough to trust its numbers and to compare it later."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from .coco import coco_curves
from .truth import EvaluationError, GroundTruth, ImageDetections, ImageId

__all__ = [
    "check_packed",
    "commit_of",
    "config_changes",
    "config_hash",
    "config_text",
    "machine",
    "pack_detections",
    "unpack_detections",
]

# Percent of AP that rounding may cost: in a class of 70 objects, one of three classes, a match that
# falls on the other side of one of the ten thresholds is 0.05.
_TOLERANCE = 0.15
_NOT_THE_EXPERIMENT = ("train.output_dir", "train.device")
_PACKAGE = __name__.partition(".")[0]
_GROWING = ("train.", "dataloader.")  # parts that get further options

Packed = dict[str, list[list[float]]]


def config_text(cfg: DictConfig) -> str:
    """A LazyConfig as YAML, without what is a matter of the machine: folder and device."""
    cfg = copy.deepcopy(cfg)
    for key in _NOT_THE_EXPERIMENT:
        OmegaConf.update(cfg, key, None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        LazyConfig.save(cfg, str(file))
        return file.read_text(encoding="utf-8")


def config_hash(text: str) -> str:
    """Twelve hexadecimal digits that change with the text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def config_changes(kept: str, now: str) -> list[str]:
    """Keys by which two configs differ, so that results of one do not belong to the other.

    A key of ``train`` or ``dataloader`` that the kept config does not have yet is no difference:
    an option that was added later, whose default is what was done before. Nor is another name of
    the same class or function: a module and the package that exports it both have one.
    """
    before, after = (_flat(yaml.load(text, Loader=_Plain)) for text in (kept, now))
    changed = [key for key in before if key not in after or not _same(before[key], after[key])]
    new = [key for key in after if key not in before]
    return sorted(changed + [key for key in new if not key.startswith(_GROWING)])


class _Plain(yaml.SafeLoader):
    """Reads a config without looking up the functions and classes that it names."""


def _as_text(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [suffix, *loader.construct_sequence(node, deep=True)]
    if isinstance(node, yaml.MappingNode):
        return {"": suffix, **loader.construct_mapping(node, deep=True)}
    return suffix


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", _as_text)


def _same(before: Any, after: Any) -> bool:
    """Whether two values of a config are equal, or two names of one object of this package."""
    if before == after:
        return True
    found = [_ours(value) for value in (before, after)]
    return found[0] is not None and found[0] is found[1]


def _ours(value: Any) -> Any:
    """The class or function of this package that a value names, or None."""
    name = str(value).removeprefix("name:")
    return locate(name) if name.startswith(f"{_PACKAGE}.") else None


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping) or not node:
        return {key: node}
    return {
        name: value
        for child, item in node.items()
        for name, value in _flat(item, f"{key}.{child}" if key else str(child)).items()
    }


def commit_of(root: Path, folders: Iterable[str]) -> dict[str, Any]:
    """The commit of a checkout, and whether tracked or new files in ``folders`` differ from it.

    Returns:
        ``{"id": ..., "dirty": ...}``, both None where there is no git or no checkout.
    """
    try:
        head, state = (
            subprocess.run(
                ["git", "-C", str(root), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *folders])
        )
    except (OSError, subprocess.SubprocessError):
        return {"id": None, "dirty": None}
    return {"id": head, "dirty": bool(state)}


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores that this process may use, threads, and versions of what computes."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.system() + " " + platform.machine(),
        "processor": _processor(),
        "cores": usable,
        "threads": threads,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": _version("detectron2"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout on the path
        import detectron2

        return str(detectron2.__version__)


def pack_detections(
    results: Iterable[Mapping[str, Any]], *, score_thresh: float = 0.05, limit: int = 100
) -> Packed:
    """COCO's list of results, made small: the best detections of each image, rounded.

    Args:
        results: with the data set's own ids; boxes as x, y, width, height.
        score_thresh: lower scores are left out.
        limit: how many of an image are kept.

    Returns:
        By image id rows of x1, y1, x2, y2 (2 decimals), score (4) and category id.
    """
    images: dict[str, list[list[float]]] = defaultdict(list)
    for item in results:
        if item["score"] < score_thresh:
            continue
        x, y, width, height = item["bbox"]
        corners = [round(value, 2) for value in (x, y, x + width, y + height)]
        images[item["image_id"]].append([*corners, round(item["score"], 4), item["category_id"]])
    return {image: sorted(rows, key=lambda row: -row[4])[:limit] for image, rows in images.items()}


def unpack_detections(images: Packed, truth: GroundTruth) -> dict[ImageId, ImageDetections]:
    """The reverse of :func:`pack_detections`, but for what was rounded or left out.

    Raises:
        EvaluationError: an image or category that the data set does not have.
    """
    classes = {category: index for index, category in enumerate(truth.dataset_ids)}
    detections: dict[ImageId, ImageDetections] = {}
    for image, rows in images.items():
        found = np.array(rows, dtype=np.float64).reshape(-1, 6)
        unknown = set(found[:, 5]) - set(classes)
        if image not in truth.images or unknown:
            raise EvaluationError(
                f"kept detections of image {image!r} do not fit the data set: "
                + (f"it has no category {unknown}" if unknown else "it has no such image")
            )
        labels = np.array([classes[int(category)] for category in found[:, 5]], dtype=np.int64)
        detections[image] = ImageDetections(found[:, :4], found[:, 4], labels)
    return detections


def check_packed(
    name: str, images: Packed, truth: GroundTruth, expected_ap: float
) -> dict[ImageId, ImageDetections]:
    """The detections, after a look whether they still give the AP that was reported for them.

    Raises:
        EvaluationError: the two differ by more than rounding: annotations or detections have
            changed since.
    """
    detections = unpack_detections(images, truth)
    found = coco_curves(truth, detections).summary()["AP"]
    if not abs(found - expected_ap) <= _TOLERANCE:
        raise EvaluationError(
            f"{name}: the kept detections give AP {found:.2f}, but {expected_ap:.2f} was reported; "
            "the annotations have changed since, or the file was edited: type --rerun"
        )
    return detections
