# SPDX-License-Identifier: Apache-2.0
"""The gallery's pictures: the same objects of the same images, as several models see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from detectron2.structures import Instances

from .analysis import Observed, Summary, observe, summarise
from .analysis.pictures import error_panels, misaligned_panels, worst_objects
from .engine.predictor import Predictor
from .evaluation import GroundTruth
from .gallery_layout import captioned, listed, rows_of
from .layers.boxes import overlaps
from .visualization import draw_boxes, draw_stages
from .visualization.assignment_panel import draw_level, level_cells, object_colors
from .visualization.canvas import BLACK, Canvas, rectangle, square_around
from .visualization.context_panel import draw_heat, ground_of
from .visualization.detections import class_color
from .visualization.page import Bar, bars, blank, framed, stacked, title_strip
from .visualization.point_panel import Reading, draw_panel, reading_of
from .visualization.stage_panel import draw_truth

__all__ = [
    "SCORE_THRESH",
    "Draw",
    "Drawn",
    "Predictors",
    "Scene",
    "Shot",
    "assignment_pictures",
    "context_pictures",
    "error_pictures",
    "image_pictures",
    "middle_objects",
    "misalignment_pictures",
    "point_pictures",
    "stage_pictures",
]

SCORE_THRESH = 0.3  # a detection below it counts as not there, as in the demo
_FOUND_IOU = 0.5
_SIDE = 380  # pixels of an object's panel
_HEAT_SIDE = 300
_LEVEL_SIDE = 430
_COLUMNS = 3  # label sets beside each other
_OVERVIEW = 400  # pixels: width of an image among others
_FADE = 0.2
_DOT_NAMES = ("white", "yellow", "pink", "green")  # as point_panel colours kinds of points


@dataclass(frozen=True, kw_only=True)
class Shot:
    """An image of the gallery.

    Attributes:
        name: of its file, without folder and ending.
        pixels: (H, W, 3) RGB, uint8.
        truth: its objects, ``gt_boxes`` xyxy pixels and ``gt_classes``.
        chosen: places of the objects that are looked at, at most one of each class.
    """

    name: str
    pixels: np.ndarray
    truth: Instances
    chosen: tuple[int, ...]

    def box(self, place: int) -> np.ndarray:
        """(4,) of an object."""
        return self.truth.gt_boxes.tensor[place].numpy()

    def label(self, place: int) -> int:
        """Class of an object."""
        return int(self.truth.gt_classes[place])


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The images of the gallery, in its order, and what is known of all.

    Attributes:
        dataset: registered name of the set that the images are of.
        truth: the objects of these images.
        shots: the images.
        seen: what was observed of a model, by its title, so that it is observed once.
    """

    dataset: str
    truth: GroundTruth
    shots: tuple[Shot, ...]
    seen: dict[str, Observed] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by index."""
        return self.truth.class_names

    def listed(self, shot: Shot) -> str:
        """The numbered objects of an image, in words."""
        names = [self.classes[shot.label(place)] for place in shot.chosen]
        return ", ".join(f"{number} {name}" for number, name in enumerate(names, start=1))


class Drawn(NamedTuple):
    """A picture, (H, W, 3) RGB uint8, with what a reader who does not see it is told."""

    pixels: np.ndarray
    alt: str


Predictors: TypeAlias = Mapping[str, Predictor]  # by title, in the order of the pictures
Draw: TypeAlias = Callable[[Scene, Predictors], Iterator[Drawn]]


def middle_objects(truth: Instances) -> tuple[int, ...]:
    """Of each class the object of middle area, among those that the image's edge does not cut.

    Where it cuts all of a class, among all of it.
    """
    boxes, labels = truth.gt_boxes.tensor, truth.gt_classes
    height, width = truth.image_size
    limits = torch.tensor([width - 1, height - 1], dtype=boxes.dtype)
    whole = (boxes[:, :2] >= 1).all(1) & (boxes[:, 2:] <= limits).all(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    chosen = []
    for label in labels.unique().tolist():
        own = labels == label
        places = (own & whole if bool((own & whole).any()) else own).nonzero()[:, 0]
        ranked = places[areas[places].argsort(stable=True)]
        chosen.append(int(ranked[(len(ranked) - 1) // 2]))
    return tuple(chosen)


def image_pictures(scene: Scene, predictors: Predictors) -> Iterator[Drawn]:
    """All images with their objects; the numbered ones are looked at below."""
    columns = []
    for number, shot in enumerate(scene.shots, start=1):
        labels = [""] * len(shot.truth)
        for rank, place in enumerate(shot.chosen, start=1):
            labels[place] = f"{rank} {scene.classes[shot.label(place)]}"
        colors = [
            class_color(label, len(scene.classes)) for label in shot.truth.gt_classes.tolist()
        ]
        boxes = shot.truth.gt_boxes.tensor.numpy()
        scale = _OVERVIEW / shot.pixels.shape[1]
        drawn = draw_boxes(shot.pixels, boxes, labels, colors=colors, scale=scale)
        title = title_strip(f"Image {number}", drawn.shape[1], note=shot.name)
        columns.append(np.concatenate((title, drawn)))
    names = "; ".join(
        f"image {number}, {shot.name}: {scene.listed(shot)}"
        for number, shot in enumerate(scene.shots, start=1)
    )
    yield Drawn(
        framed(stacked(columns, axis=1)), f"The images and their annotated objects. {names}"
    )


def point_pictures(scene: Scene, predictors: Predictors) -> Iterator[Drawn]:
    """For each of the first two images a row of objects for each model, with its points."""
    for number, shot in enumerate(scene.shots[:2], start=1):
        rows = []
        for name, predictor in predictors.items():
            seen = predictor.points(shot.pixels)
            panels, dots = [], ""
            for rank, place in enumerate(shot.chosen, start=1):
                index = _detection_of(seen.instances, shot, place)
                if index is None:
                    panels.append(_missed(scene, shot, rank, place, _SIDE))
                    continue
                reading = reading_of(seen, index, len(scene.classes))
                note = seen.level_names[reading.level]
                title = _title(scene, shot, rank, place, seen.instances, index, _SIDE, note)
                picture = draw_panel(shot.pixels, reading, seen.level_names, side=_SIDE)
                panels.append(np.concatenate((title, picture)))
                dots = _dots_note(reading)
            rows.append((name, f"Image {number}{dots}", panels))
        alt = f"Image {number}: the points at which {listed(predictors)} read {scene.listed(shot)}"
        yield Drawn(rows_of(rows), alt)


def context_pictures(scene: Scene, predictors: Predictors) -> Iterator[Drawn]:
    """For each of the first two images a row for each model: evidence of two objects."""
    for number, shot in enumerate(scene.shots[:2], start=1):
        rows = []
        for name, predictor in predictors.items():
            found = predictor(shot.pixels)
            places = shot.chosen[:2]
            indices = [_detection_of(found, shot, place) for place in places]
            limit = max([0, *(index for index in indices if index is not None)]) + 1
            seen = predictor.context(shot.pixels, limit=limit)
            panels = []
            for rank, (place, index) in enumerate(zip(places, indices, strict=True), start=1):
                if index is None:
                    missed = _missed(scene, shot, rank, place, _HEAT_SIDE)
                    panels.append(stacked([missed, blank(_HEAT_SIDE, 1).pixels()], axis=1))
                    continue
                ground = ground_of(seen, index, len(scene.classes))
                heats = [draw_heat(shot.pixels, ground, x, side=_HEAT_SIDE) for x in ground.heats]
                both = stacked(heats, axis=1)
                note = seen.level_names[ground.level]
                title = _title(scene, shot, rank, place, found, index, both.shape[1], note)
                common = Bar("overlap", ground.overlap, f"{ground.overlap:.2f}", BLACK)
                panels.append(np.concatenate((title, both, bars([common], both.shape[1]))))
            rows.append((name, f"Image {number}", panels))
        alt = f"Image {number}: the evidence for class and box, of {listed(predictors)}"
        yield Drawn(rows_of(rows), alt)


def stage_pictures(scene: Scene, predictors: Predictors) -> Iterator[Drawn]:
    """The first image: proposals at both densities, and the objects' boxes after each stage."""
    shot = scene.shots[0]
    for name, predictor in predictors.items():
        seen = predictor.stages(shot.pixels, gt_boxes=shot.truth.gt_boxes)
        places = [_detection_of(seen.instances, shot, place) for place in shot.chosen]
        first = list(dict.fromkeys(index for index in places if index is not None))
        first = first or [*range(min(1, len(seen.instances)))]
        seen = seen._replace(instances=seen.instances[first])
        drawn = draw_stages(shot.pixels, seen, scene.classes, limit=max(len(first), 1))
        alt = f"Image 1: proposals of {name} at two densities, and boxes after each of its stages"
        yield Drawn(drawn, alt)


def assignment_pictures(scene: Scene, predictors: Predictors) -> Iterator[Drawn]:
    """The first image: a column for each label set of the models, a row for each used level."""
    shot = scene.shots[0]
    boxes = shot.truth.gt_boxes.tensor.numpy()
    colors = object_colors(boxes)
    sets = []
    for name, predictor in predictors.items():
        seen = predictor.assignment(shot.pixels, shot.truth)
        one = len(seen.sets) == 1
        sets += [(name if one else f"{name}: {x.learns}", seen, x) for x in seen.sets]
    for start in range(0, len(sets), _COLUMNS):
        part = sets[start : start + _COLUMNS]
        rows = []
        for level in sorted({level for *_, x in part for level in x.levels.tolist()}):
            panels = []
            for title, _, labels in part:
                cells = level_cells(labels, level)
                count = len(np.unique(cells.squares, axis=0))
                note = f"{count} cell{'' if count == 1 else 's'}"
                panels.append(
                    draw_level(
                        shot.pixels, cells, boxes, colors, side=_LEVEL_SIDE, title=title, note=note
                    )
                )
            seen = part[0][1]
            rows.append(
                (f"{seen.level_names[level]}, stride {seen.strides[level]}", "Image 1", panels)
            )
        names = ", ".join(title for title, *_ in part)
        yield Drawn(rows_of(rows), f"Image 1: the cells that learn each object; {names}")


def misalignment_pictures(scene: Scene, predictors: Predictors) -> Iterator[Drawn]:
    """A row for an object of each image: the box that scores best and the best box, by model."""
    summaries = _summaries(scene, predictors)
    limit = len(scene.shots)
    places = worst_objects(summaries, limit)
    views = next((x.observed.views for x in summaries if x.observed.views), None) or []
    rows = {}
    worst = misaligned_panels(summaries, lambda place: scene.shots[place].pixels, limit)
    for place, panels in zip(places, worst, strict=True):
        view = views[place]
        title = f"Image {view.image + 1}: {scene.classes[view.label]}"
        rows[view.image] = (title, "", [captioned(panel) for panel in panels])
    alt = (
        "For an object of each image, the box with the best score and the box with the best IoU, "
        f"of {listed(predictors)}"
    )
    yield Drawn(rows_of([rows[image] for image in sorted(rows)]), alt)


def error_pictures(scene: Scene, predictors: Predictors) -> Iterator[Drawn]:
    """The image with most wrong detections: all detections, by the kind of error."""
    summaries = _summaries(scene, predictors)
    files = [shot.name for shot in scene.shots]
    looked: list[int] = []

    def read(place: int) -> np.ndarray:
        looked.append(place)
        return scene.shots[place].pixels

    panels = [captioned(x) for x in error_panels(summaries, [*scene.truth.images], read)]
    rows = [stacked(panels[start : start + 2], axis=1) for start in range(0, len(panels), 2)]
    alt = (
        f"Image {looked[0] + 1}, {files[looked[0]]}: the detections of {listed(predictors)}, "
        "coloured by whether they are right, and what is wrong with them"
    )
    yield Drawn(framed(stacked(rows, axis=0)), alt)


def _summaries(scene: Scene, predictors: Predictors) -> list[Summary]:
    for name, predictor in predictors.items():
        if name not in scene.seen:
            scene.seen[name] = observe(
                name, predictor, scene.dataset, scene.truth, source="", repeats=0
            )
    return [summarise(scene.seen[name], scene.truth, draws=1) for name in predictors]


def _detection_of(found: Instances, shot: Shot, place: int) -> int | None:
    """The detection of an object: of its class, with the largest IoU, if that is from 0.5."""
    ious = _ious(found, shot, place)
    ious = torch.where(found.pred_classes == shot.label(place), ious, 0.0)
    ious = torch.where(found.scores > SCORE_THRESH, ious, 0.0)
    if not len(ious) or float(ious.max()) < _FOUND_IOU:
        return None
    return int(ious.argmax())


def _ious(found: Instances, shot: Shot, place: int) -> torch.Tensor:
    """(D,) of an object with each detection."""
    return overlaps(shot.truth.gt_boxes.tensor[place : place + 1], found.pred_boxes.tensor)[0]


def _title(
    scene: Scene,
    shot: Shot,
    rank: int,
    place: int,
    found: Instances,
    index: int,
    width: int,
    note: str,
) -> np.ndarray:
    """The strip over the panel of an object that was found."""
    label = shot.label(place)
    iou = float(_ious(found, shot, place)[index])
    return title_strip(
        scene.classes[label],
        width,
        tail=f" {float(found.scores[index]):.2f}",
        badge=f"{rank}",
        color=class_color(label, len(scene.classes)),
        note=f"IoU {iou:.2f}, {note}",
    )


def _missed(scene: Scene, shot: Shot, rank: int, place: int, side: int) -> np.ndarray:
    """The panel of an object that was not found: itself."""
    label, box = shot.label(place), rectangle(shot.box(place).tolist())
    color = class_color(label, len(scene.classes))
    title = title_strip(scene.classes[label], side, badge=f"{rank}", color=color, note="not found")
    view = square_around(box, np.array([box[:2], box[2:]]))
    canvas = Canvas(shot.pixels, view, (side, side), fade=_FADE)
    draw_truth(canvas, box)
    return np.concatenate((title, canvas.pixels()))


def _dots_note(reading: Reading) -> str:
    """What the colours of a panel's dots mean."""
    pairs = zip(_DOT_NAMES, reading.dots, strict=False)
    return "".join(f"; {color}: {name.replace('_', ' ')}" for color, name in pairs)
