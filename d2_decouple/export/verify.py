# SPDX-License-Identifier: Apache-2.0
"""Whether an exported file finds what the model in PyTorch finds."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import read_rgb
from ..engine.predictor import Predictor
from ..runtime import Detections, ExportedDetector

__all__ = ["TOLERANCE", "Deviation", "compare", "deviation"]

TOLERANCE = 1e-3  # of scores, and of boxes in pixels of the image
_SAME = 1.0  # pixels: boxes that differ by more are of different detections


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far two lists of detections of one image are from each other.

    Attributes:
        detections: how many PyTorch finds.
        box: the largest difference of a coordinate, in pixels of the image.
        score: the largest difference of a score.
        unmatched: detections of either list that the other one has not, those aside that lie
            where both lists end: rounding may cut them off in one.
    """

    detections: int
    box: float
    score: float
    unmatched: int

    @property
    def accepted(self) -> bool:
        """Whether both agree to ``TOLERANCE``."""
        return max(self.box, self.score) <= TOLERANCE and not self.unmatched


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An image, how far the results are from each other, and how long they took.

    Attributes:
        image: its file.
        size: (H, W) of it.
        deviation: between the results.
        torch_ms: milliseconds that the predictor took.
        exported_ms: milliseconds that the exported file took.
    """

    image: Path
    size: tuple[int, int]
    deviation: Deviation
    torch_ms: float
    exported_ms: float


def compare(
    predictor: Predictor, detector: ExportedDetector, images: Sequence[Path], *, repeats: int = 1
) -> list[Comparison]:
    """Run both on images; each is read once, so that decoders play no part.

    Args:
        predictor: with ``channels="RGB"``, on the CPU.
        detector: of the exported file.
        images: files.
        repeats: of which the fastest counts.
    """
    rows = []
    for file in images:
        pixels = read_rgb(file)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            start = time.perf_counter()
            found = predictor(pixels)
            middle = time.perf_counter()
            exported = detector(pixels)
            times[0].append(middle - start)
            times[1].append(time.perf_counter() - middle)
        wanted = Detections(
            found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy()
        )
        rows.append(
            Comparison(
                image=file,
                size=(pixels.shape[0], pixels.shape[1]),
                deviation=deviation(wanted, exported, limit=detector.description["selection"]),
                torch_ms=1000 * min(times[0]),
                exported_ms=1000 * min(times[1]),
            )
        )
    return rows


def deviation(wanted: Detections, found: Detections, *, limit: Mapping[str, Any]) -> Deviation:
    """Match detections of one class with each other, and take the largest differences.

    Args:
        wanted: of one program.
        found: of the other.
        limit: the description's ``selection``: where lists end.
    """
    box = score = 0.0
    unmatched = 0
    for one, other in ((wanted, found), (found, wanted)):
        end = _end(one, limit)
        for index, value in enumerate(one.scores.tolist()):
            of_class = np.flatnonzero(other.classes == one.classes[index])
            apart = np.abs(other.boxes[of_class] - one.boxes[index]).max(axis=1, initial=0)
            differs = np.abs(other.scores[of_class] - value)
            near = apart <= _SAME
            if not near.any():
                unmatched += value > end
                continue
            # Of several at one place the one that is nearest in everything.
            best = int(np.argmin(np.where(near, np.maximum(apart, differs), np.inf)))
            box, score = max(box, float(apart[best])), max(score, float(differs[best]))
    return Deviation(detections=len(wanted.scores), box=box, score=score, unmatched=unmatched)


def _end(found: Detections, limit: Mapping[str, Any]) -> float:
    """The score below which a detection can be in one list and not in the other."""
    end = float(limit["test_score_thresh"])
    if len(found.scores) >= limit["max_detections_per_image"]:
        end = max(end, float(found.scores.min()))
    return end + TOLERANCE
