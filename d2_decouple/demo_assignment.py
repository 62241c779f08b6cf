# SPDX-License-Identifier: Apache-2.0
"""What the demo's --show-assignment needs beside a detector: annotations, and models to compare."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Instances

from .config import ConfigError, config_names
from .data.annotations import Annotations, open_annotations
from .engine.assignment import Assignment
from .engine.inference_config import inference_config
from .engine.predictor import Predictor
from .visualization import draw_assignment

__all__ = [
    "Supervised",
    "Supervision",
    "add_options",
    "build_predictor",
    "check_options",
    "draw_supervised",
    "open_supervision",
]

_RANDOM = "random weights"


class Supervised(NamedTuple):
    """What models say about one image.

    Attributes:
        rows: the name of each, and its assignment; the first one's detections are the demo's.
    """

    rows: tuple[tuple[str, Assignment], ...]

    @property
    def instances(self) -> Instances:
        """Detections of the first model."""
        return self.rows[0][1].instances

    @property
    def level_names(self) -> tuple[str, ...]:
        """Of the first model."""
        return self.rows[0][1].level_names

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the first model's levels."""
        return self.rows[0][1].strides

    def as_records(self) -> list[dict[str, Any]]:
        """Nothing is known of single detections."""
        return []

    def assignment_record(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """For each model its objects, and the cells that learn them, for JSON."""
        return [
            {
                "model": name,
                "assigner": assignment.assigner,
                "objects": [
                    {"class": class_names[x["class_id"]], **x} for x in assignment.as_records()
                ],
            }
            for name, assignment in self.rows
        ]


@dataclass(kw_only=True)
class Supervision:
    """The models that are compared, and where objects are annotated."""

    models: list[tuple[str, Predictor]]
    annotations: Annotations
    random: list[str]  # names of models without trained weights that nothing was said about yet

    def objects(self, source: Path, image: np.ndarray) -> Instances:
        """The annotated objects of an image (H, W, 3)."""
        return self.annotations.objects(source, (image.shape[0], image.shape[1]))

    def seen(self, image: np.ndarray, truth: Instances) -> Supervised:
        """Ask all models about an image (H, W, 3) RGB."""
        rows = tuple((name, model.assignment(image, truth)) for name, model in self.models)
        for name, assignment in rows:
            if name in self.random and assignment.by_predictions:
                self.random.remove(name)
                print(
                    f"warning: {name}: {assignment.assigner} assigns by what the model predicts, "
                    "which means little now; give its weights (--weights FILE, or --compare "
                    "NAME:FILE)",
                    file=sys.stderr,
                    flush=True,
                )
        return Supervised(rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that go with --show-assignment."""
    add = parser.add_argument
    add("--annotations", metavar="WHERE", help="objects: COCO file, VOC folder or .xml, data set")
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME[:FILE]",
        help="further recipes or config files, and their weights, in the same picture",
    )


def check_options(args: argparse.Namespace) -> str:
    """What is wrong with a command line, or nothing: options that need, or miss, another one."""
    if args.show_assignment:
        return ""
    for option, value in (("annotations", args.annotations), ("compare", args.compare)):
        if value:
            return f"--{option} goes with --show-assignment; add that, or leave it out"
    return "" if args.weights else "the following arguments are required: --weights"


def build_predictor(
    name: str, weights: str | None, overrides: Sequence[str] = (), **options: Any
) -> Predictor:
    """A predictor; without weights one of random weights, always the same, for its assigner."""
    if weights:
        return Predictor.from_config(name, weights, overrides, **options)
    config = inference_config(name, overrides, score_thresh=options.get("score_thresh"))
    classes = config.class_names()
    if not classes:
        raise ConfigError(
            f"{name} does not say how its classes are called, since its test set is not "
            "registered; type --weights with a checkpoint, which does"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = config.model(len(classes))
    return Predictor(
        model,
        augmentations=config.augmentations,
        image_format=config.image_format,
        classes=classes,
        **options,
    )


def open_supervision(first: Predictor, args: argparse.Namespace, options: Any) -> Supervision:
    """Build the other models and open the annotations.

    Args:
        first: of the command's own config file.
        args: of the command line.
        options: of :func:`build_predictor`, for the others.

    Raises:
        ConfigError: models have different classes.
    """
    models = [(_shown(args.config_file, args.weights), first)]
    random = [] if args.weights else [models[0][0]]
    for text in args.compare:
        name, weights = _split(text)
        model = build_predictor(name, weights, **options)
        if model.classes != first.classes:
            raise ConfigError(
                f"--compare {text}: it knows the classes {', '.join(model.classes)}, "
                f"{args.config_file} knows {', '.join(first.classes)}; compare models of the same "
                "classes"
            )
        models.append((_shown(name, weights), model))
        random += [] if weights else [models[-1][0]]
    annotations = open_annotations(args.annotations, first.classes)
    return Supervision(models=models, annotations=annotations, random=random)


def draw_supervised(
    image: np.ndarray, seen: Supervised, class_names: Sequence[str], *, limit: int
) -> np.ndarray:
    """The picture of all models; all objects are drawn, whatever the ``limit`` of detections."""
    return draw_assignment(image, seen.rows, class_names)


def _split(text: str) -> tuple[str, str | None]:
    """NAME or NAME:FILE."""
    if text in config_names() or Path(text).is_file():
        return text, None
    name, _, weights = text.partition(":")
    return name, weights or None


def _shown(name: str, weights: str | None) -> str:
    """What a model is called in a picture: its recipe, or the folder of its training."""
    path = Path(name)
    known = path.resolve().parent.name if path.name == "config.yaml" else path.stem
    return known if weights else f"{known}, {_RANDOM}"
