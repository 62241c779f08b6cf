# SPDX-License-Identifier: Apache-2.0
"""What a predictor says beside its detections: how each of them was found, in numbers, drawn."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from detectron2.structures import Instances

from ..visualization import draw_assignment, draw_context, draw_points, draw_stages
from .assignment import Assignment, assignment_of, check_assignment
from .context import DetectionContext, check_context, context_of
from .looks import check_limit, kept_outputs
from .points import DetectionPoints, kept_predictions, points_of
from .stages import DetectionStages, kept_proposals, stages_of

__all__ = ["ImageLike", "Inspection"]

ImageLike: TypeAlias = np.ndarray | str | os.PathLike[str]


class Inspection(ABC):
    """Looks inside a detector at work; :class:`~d2_decouple.engine.predictor.Predictor` has them.

    Attributes:
        model: the detector.
        classes: names of its classes, by index.
    """

    model: Any
    classes: tuple[str, ...]

    @abstractmethod
    def _rgb(self, image: ImageLike) -> np.ndarray:
        """(H, W, 3) RGB, uint8."""

    @abstractmethod
    def _input(self, image: ImageLike) -> dict[str, Any]:
        """Detectron2's input dict of an image."""

    @abstractmethod
    def _detect(self, inputs: Sequence[dict[str, Any]]) -> list[Instances]:
        """Detections of each input, in pixels of its image, best first."""

    def points(self, image: ImageLike, *, limit: int | None = None) -> DetectionPoints:
        """Detect objects, and say where each of them was read.

        ::

            seen = predictor.points("photo.jpg", limit=4)
            seen.instances.boundary_points  # (D, 4, 2), of the left, top, right, bottom side

        Args:
            image: one image, as for a call of the predictor.
            limit: only so many detections, the strongest; by default all.

        Returns:
            :class:`~d2_decouple.engine.points.DetectionPoints`: the detections that a call of the
            predictor finds, with their points, coarse boxes and levels, all of one forward.

        Raises:
            ConfigError: the model has no points, is no one-stage detector, or sees the image
                several times (test-time augmentation).
            ImageError: the image cannot be used; the message names it.
        """
        check_limit(limit)
        with kept_predictions(self.model) as kept:
            item = self._input(image)
            found = self._detect([item])[0][:limit]
        return points_of(self.model, kept[0], found, tuple(item["image"].shape[-2:]))

    def draw_points(self, image: ImageLike, *, limit: int = 4) -> np.ndarray:
        """The picture of :meth:`points`: (H, W, 3) RGB, uint8, with a panel for each detection.

        Args:
            image: one image, as for a call of the predictor.
            limit: so many detections have a panel, the strongest.

        Raises:
            ConfigError: as :meth:`points` says.
            ImageError: the image cannot be used; the message names it.
        """
        return draw_points(self._rgb(image), self.points(image), self.classes, limit=limit)

    def context(self, image: ImageLike, *, limit: int | None = 4) -> DetectionContext:
        """Detect objects, and say where in the image the evidence for them lies.

        ::

            seen = predictor.context("photo.jpg", limit=2)
            seen.class_evidence.maps, seen.box_evidence.maps  # (2, H, W), each adds up to 1
            seen.class_evidence.shares, seen.overlaps  # (2,) inside the box; common to both

        Evidence are gradients of a detection's class logit, and of the four sides of its box, with
        respect to the image: five backward passes a detection, in float32 whatever the precision.

        Args:
            image: one image, as for a call of the predictor.
            limit: of so many detections, the strongest; None for all.

        Returns:
            :class:`~d2_decouple.engine.context.DetectionContext`: all detections that a call of
            the predictor finds, and the evidence for the strongest.

        Raises:
            ConfigError: the model is no one-stage detector, sees the image several times
                (test-time augmentation), or has no finite gradient.
            ImageError: the image cannot be used; the message names it.
        """
        check_limit(limit)
        check_context(self.model)
        item = self._input(image)
        return context_of(self.model, item, self._detect([item])[0], limit=limit)

    def draw_context(self, image: ImageLike, *, limit: int = 4) -> np.ndarray:
        """The picture of :meth:`context`: (H, W, 3) RGB, uint8, two panels for each detection.

        Args:
            image: one image, as for a call of the predictor.
            limit: so many detections have panels, the strongest.

        Raises:
            ConfigError: as :meth:`context` says.
            ImageError: the image cannot be used; the message names it.
        """
        seen = self.context(image, limit=limit)
        return draw_context(self._rgb(image), seen, self.classes, limit=limit)

    def stages(
        self, image: ImageLike, *, limit: int | None = None, gt_boxes: Any = None
    ) -> DetectionStages:
        """Detect objects, and say how the box of each of them came about (Decoupled R-CNN).

        ::

            seen = predictor.stages("photo.jpg", limit=4)
            seen.instances.stage_boxes  # (D, K + 1, 4): the proposal, after stage 1, ..., K

        Args:
            image: one image, as for a call of the predictor.
            limit: only so many detections, the strongest; by default all.
            gt_boxes: (M, 4) of its objects, xyxy in pixels of the image, which IoU is then with.

        Returns:
            :class:`~d2_decouple.engine.stages.DetectionStages`: the detections that a call of the
            predictor finds, their boxes after each stage, and the proposals, all of one forward.

        Raises:
            ConfigError: the model is no Decoupled R-CNN, or ``gt_boxes`` are no boxes.
            ImageError: the image cannot be used; the message names it.
        """
        check_limit(limit)
        with kept_proposals(self.model) as kept:
            found = self._detect([self._input(image)])[0][:limit]
        return stages_of(self.model, kept, found, gt_boxes)

    def draw_stages(self, image: ImageLike, *, limit: int = 4, gt_boxes: Any = None) -> np.ndarray:
        """The picture of :meth:`stages`: (H, W, 3) RGB, uint8, with a panel for each detection.

        Args:
            image: one image, as for a call of the predictor.
            limit: so many detections have a panel, the strongest.
            gt_boxes: as for :meth:`stages`.

        Raises:
            ConfigError: as :meth:`stages` says.
            ImageError: the image cannot be used; the message names it.
        """
        seen = self.stages(image, gt_boxes=gt_boxes)
        return draw_stages(self._rgb(image), seen, self.classes, limit=limit)

    def assignment(self, image: ImageLike, truth: Instances) -> Assignment:
        """Detect objects, and say which cells of which level would learn each annotated object.

        ::

            truth = d2_decouple.data.ground_truth(record)  # of a dataset dict
            (labels,) = predictor.assignment("photo.jpg", truth).sets
            labels.cells, labels.levels, labels.gt_index, labels.cls_weights  # of C cells

        The assigner is asked as at the end of a training, and the model is not changed.

        Args:
            image: one image, as for a call of the predictor.
            truth: its objects: ``gt_boxes``, xyxy in pixels of the image, and ``gt_classes``.

        Returns:
            :class:`~d2_decouple.engine.assignment.Assignment`: the cells, their weights, and the
            detections that a call of the predictor finds, all of one forward.

        Raises:
            ConfigError: the model is no one-stage detector, sees the image several times
                (test-time augmentation), or does not know the objects' classes.
            ImageError: the image cannot be used; the message names it.
        """
        model = check_assignment(self.model)
        item = self._input(image)
        with kept_outputs(model.backbone, model.head) as (maps, predictions):
            found = self._detect([item])[0]
        features = [maps[0][name] for name in model.head_in_features]
        seen = (item["image"].shape[-2], item["image"].shape[-1])
        return assignment_of(model, features, predictions[0], found, truth, seen)

    def draw_assignment(self, image: ImageLike, truth: Instances) -> np.ndarray:
        """The picture of :meth:`assignment`: (H, W, 3) RGB, uint8, a panel for each level.

        Args:
            image: one image, as for a call of the predictor.
            truth: as for :meth:`assignment`.

        Raises:
            ConfigError: as :meth:`assignment` says.
            ImageError: the image cannot be used; the message names it.
        """
        seen = self.assignment(image, truth)
        return draw_assignment(self._rgb(image), [("", seen)], self.classes)
