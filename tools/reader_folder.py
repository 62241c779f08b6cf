# SPDX-License-Identifier: Apache-2.0
"""A folder laid out as a reader's: a clone, images where the documents have them, weights.

Images of COCO and VOC are generated; weights are random, but drawn so that something is found.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from document_commands import Need, RunError

from d2_decouple.config import get_config
from d2_decouple.data.shapes import SHAPES, make_shapes

__all__ = ["ReaderFolder"]

ROOT = Path(__file__).resolve().parents[1]
_TESTS = (ROOT / "tests", ROOT / "tests" / "checkpoint_tests")
_OFFICIAL = {
    "pdnet": ("official_pdnet", "R50"),
    "decoupled_rcnn": ("official_decoupled_rcnn", "R50"),
    "salt": ("official_salt", "R50"),
    "gflv2": ("official_salt", "GFLV2"),
}
_TRAINS = r"d2_decouple\.train\b|tools/(train_net|slurm_train)\.py"
_PICTURES = (8, 4)  # of FOLDER, in train and val
_VOC_NAMES = ("person", "dog", "cat")


class ReaderFolder:
    """A clone of this checkout with what a reader has beside it.

    Attributes:
        root: where commands are typed.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        """
        Args:
            folder: a clone in it is made anew, weights in it are used again.
            data: of BCCD, holds Annotations.
        """
        self.root = folder / "clone"
        self._weights = folder / "weights"
        _delete(self.root)
        _clone(self.root)
        datasets = self.root / "datasets"
        datasets.mkdir()
        (datasets / "BCCD").symlink_to(data.resolve(), target_is_directory=True)
        _make_coco(datasets / "coco")
        for year in ("VOC2007", "VOC2012"):
            _make_voc(datasets / year)
        self._own = {path.name for path in self.root.iterdir()}
        self.clean()

    def clean(self) -> None:
        """As it was: without what commands made, with FOLDER and the pictures anew."""
        for path in self.root.iterdir():
            if path.name not in self._own:
                _delete(path)
        images = _make_folder(self.root / "FOLDER")
        for name in ("picture.jpg", "photo.jpg"):
            shutil.copy(images[0], self.root / name)

    def prepare(self, command: str, needed: Iterable[Need]) -> None:
        """What a command finds: weights that it reads, and none that it would refuse to replace."""
        words = command.split()
        if "--eval-only" not in words and re.search(_TRAINS, command):
            _delete(self.root / "output")
            _delete(self.root / "FOLDER")  # which may have been an output, too
            _make_folder(self.root / "FOLDER")
        if "tools/convert_checkpoint.py" in words:
            _delete(self.root / [word for word in words[2:] if not word.startswith("--")][2])
        if "tools/gallery.py" in words:
            _delete(self.root / "output")
        for need in needed:
            file = self.root / need.file
            # What an earlier command of the document made is kept, but for a training's names.
            made_before = file.is_file() and not file.name.startswith("model_")
            if made_before and not need.official:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            made = self._official(need.recipe) if need.official else self._model(need.recipe)
            shutil.copy(made, file)
            if not need.official:
                shutil.copy(made.with_suffix(".yaml"), file.with_name("config.yaml"))

    def environment(self) -> dict[str, str]:
        """Variables of a reader whose environment is the one that this runs in."""
        unknown = ("DETECTRON2_DATASETS", "D2D_USE_EXT", "D2D_MAX_FILE_MIB")
        variables = {name: value for name, value in os.environ.items() if name not in unknown}
        binaries = str(Path(sys.executable).parent)
        return {
            **variables,
            "PATH": os.pathsep.join([binaries, os.environ.get("PATH", "")]),
            "PYTHONPATH": str(self.root),
            "FVCORE_CACHE": str(self._weights / "cache"),
            "D2D_ZOO": str(self._weights / "zoo"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }

    def _model(self, recipe: str) -> Path:
        """A recipe's weights, as a training leaves them, with its config beside them."""
        file = self._weights / f"{recipe}.pth"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            cfg = get_config(recipe)
            model = _of_tests("util").excite(instantiate(cfg.model), 0.7)
            for module in model.modules():
                if hasattr(module, "reset_class_bias"):  # that is no part of a convolution
                    module.reset_class_bias(0.0)
            classes = {"classes": ["RBC", "WBC", "Platelets"]} if "_bccd" in recipe else {}
            torch.save({"model": model.state_dict(), **classes}, file)
            LazyConfig.save(cfg, str(file.with_suffix(".yaml")))
        return file

    def _official(self, method: str) -> Path:
        """A file of the authors' code, with all its names and shapes."""
        file = self._weights / f"official_{method}.pth"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            name, network = _OFFICIAL[method]
            module = _of_tests(name)
            state = module.drawn(getattr(module, network))
            torch.save(module.training_file(state), file)
        return file


def _clone(folder: Path) -> None:
    """What is in this checkout now, committed or not, and what was compiled."""
    steps = (
        ["git", "clone", "-q", str(ROOT), str(folder)],
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"{ROOT} is no clone that git can read: {done.stderr.strip()}")
    compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "d2_decouple").glob("_C*")]
    for name in (*filter(None, done.stdout.split("\0")), *compiled):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
        else:  # tracked, and deleted here
            _delete(folder / name)


def _make_folder(folder: Path) -> list[Path]:
    """FOLDER: some photographs of BCCD in VOC's format."""
    source, splits = ROOT / "tests" / "data" / "bccd_mini", Path("ImageSets", "Main")
    for part in ("Annotations", "JPEGImages", str(splits)):
        (folder / part).mkdir(parents=True)
    for split, count in zip(("train", "val"), _PICTURES, strict=True):
        names = (source / splits / f"{split}.txt").read_text().split()[:count]
        (folder / splits / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            for file in (f"Annotations/{name}.xml", f"JPEGImages/{name}.jpg"):
                shutil.copy(source / file, folder / file)
    return sorted((folder / "JPEGImages").iterdir())


def _make_coco(folder: Path) -> None:
    """Generated images under the names and with the 80 categories of COCO 2017."""
    make_shapes(folder, images=6, size=(64, 96), layout="coco", difficult=0.0)
    kept = [{"id": x["id"], "name": x["name"]} for x in COCO_CATEGORIES if x["isthing"]]
    for split in ("train", "val"):
        file = folder / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"] = kept  # our 1 to 3 are persons, bicycles and cars
        file.with_name(f"instances_{split}2017.json").write_text(json.dumps(content))
        file.unlink()
        (folder / split).rename(folder / f"{split}2017")


def _make_voc(folder: Path) -> None:
    """Generated images with the splits and class names of Pascal VOC."""
    make_shapes(folder, images=6, size=(64, 96), difficult=0.0)
    for file in (folder / "Annotations").glob("*.xml"):
        text = file.read_text()
        for ours, theirs in zip(SHAPES, _VOC_NAMES, strict=False):
            text = text.replace(f"<name>{ours}</name>", f"<name>{theirs}</name>")
        file.write_text(text)
    splits = folder / "ImageSets" / "Main"
    (splits / "train.txt").rename(splits / "trainval.txt")
    (splits / "val.txt").rename(splits / "test.txt")


def _of_tests(name: str) -> Any:
    """A module of the checkout's tests."""
    for folder in map(str, _TESTS):
        if folder not in sys.path:
            sys.path.append(folder)
    return importlib.import_module(name)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
