# SPDX-License-Identifier: Apache-2.0
"""All numbers of a comparison: of each model, and of pairs of models on the same draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config import ConfigError, nearest
from ..evaluation import GroundTruth, coco_curves
from .error_kinds import KINDS, ORACLES, Judgement, ap_of_oracles, judge, kind_counts
from .intervals import Estimate, difference, estimate, image_weights
from .misalignment import (
    Pairs,
    correlation_within_classes,
    detection_pairs,
    object_measures,
)
from .observation import Observed

__all__ = ["MEASURES", "Comparison", "Measure", "Summary", "compare_models", "summarise"]


class Measure(NamedTuple):
    """How a number is called and read.

    Attributes:
        title: head of its column.
        about: one sentence for a reader who sees it for the first time.
        digits: behind the decimal point.
        better: 1 where higher is better aligned or better found, -1 where lower is, 0 for neither.
    """

    title: str
    about: str
    digits: int
    better: int


MEASURES = {
    "AP50": Measure("AP50", "average precision at IoU 0.5, in percent", 1, 1),
    "score_iou": Measure(
        "detections: rank correlation",
        "rank correlation of score and IoU among detections with IoU from 0.5, within each class, "
        "mean over classes",
        3,
        1,
    ),
    "rank_correlation": Measure(
        "objects: rank correlation",
        "rank correlation of score and IoU among the dense predictions of one object, mean over "
        "objects",
        3,
        1,
    ),
    "iou_gap": Measure(
        "IoU gap",
        "IoU of an object's best prediction, less the IoU of the one that scores best, mean over "
        "objects",
        3,
        -1,
    ),
    "distance": Measure(
        "distance",
        "between the locations of these two, in cells of the one that scores best, mean over "
        "objects",
        2,
        -1,
    ),
    "other_best": Measure(
        "other is best",
        "share of objects whose best-scoring prediction is not their best one",
        3,
        -1,
    ),
    "best_iou": Measure(
        "best IoU", "IoU of an object's best prediction, whatever its score, mean", 3, 1
    ),
    "reached": Measure("reached", "share of objects that some prediction overlaps by 0.5", 3, 1),
}
"""In the order of the report; all but the first two need dense predictions."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of one model.

    Attributes:
        observed: what they are made of.
        average_precision: COCO's AP, in percent.
        judgement: what is wrong with each detection.
        pairs: score and IoU of each detection.
        counts: how many errors there are of each kind.
        draws: (1 + B,) each measure that is known, and each oracle's gain as ``fix: NAME``.
        by_class: (K,) rank correlation of score and IoU of detections, NaN where unknown.
    """

    observed: Observed
    average_precision: float
    judgement: Judgement
    pairs: Pairs
    counts: Mapping[str, int]
    draws: Mapping[str, np.ndarray]
    by_class: np.ndarray

    @property
    def name(self) -> str:
        """What the user calls the model."""
        return self.observed.name

    def estimates(self) -> dict[str, Estimate]:
        """Every number with its interval, by its name in ``draws``."""
        return {name: estimate(values) for name, values in self.draws.items()}

    def as_record(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Everything for JSON; what is unknown is null."""
        return {
            "name": self.name,
            "source": self.observed.source,
            "notes": self.observed.notes,
            "AP": _number(self.average_precision),
            "detections": len(self.pairs.scores),
            "errors": dict(self.counts),
            "measures": {name: _record(item) for name, item in self.estimates().items()},
            "score_iou_by_class": {
                name: _number(value) for name, value in zip(class_names, self.by_class, strict=True)
            },
            "costs": [cost._asdict() for cost in self.observed.costs],
        }


class Comparison(NamedTuple):
    """One model less another, on the same draws of images.

    ``measures`` are those of :data:`MEASURES` that both have, and the costs of error kinds.
    """

    name: str
    host: str
    measures: dict[str, Estimate]

    def verdict(self, name: str) -> str:
        """``better``, ``worse``, or ``unclear`` where the interval holds 0."""
        _, low, high = self.measures[name]
        side = MEASURES[name].better if name in MEASURES else -1
        if not (low > 0 or high < 0) or side == 0:
            return "unclear"
        return "better" if (low > 0) == (side > 0) else "worse"

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        measures = {name: _record(item) for name, item in self.measures.items()}
        return {"name": self.name, "less": self.host, "measures": measures}


def summarise(seen: Observed, truth: GroundTruth, *, draws: int = 1000, seed: int = 0) -> Summary:
    """Everything about one model.

    Args:
        seen: the model's detections and views.
        truth: the objects of the images it was run on.
        draws: of the images, with replacement; they are the same for all models.
        seed: of the draws.
    """
    weights = image_weights(len(truth.images), draws=draws, seed=seed)
    judgement = judge(truth, seen.detections)
    pairs = detection_pairs(truth, seen.detections)
    by_class, mean = correlation_within_classes(pairs, weights, len(truth.class_names))
    oracles = ap_of_oracles(judgement, weights)
    values = {"AP50": oracles.pop("AP50"), "score_iou": mean}
    if seen.views is not None:
        values |= object_measures(seen.views, weights)
    values |= {f"fix: {name}": oracles[name] for name in ORACLES}
    return Summary(
        observed=seen,
        average_precision=coco_curves(truth, seen.detections).summary()["AP"],
        judgement=judgement,
        pairs=pairs,
        counts=kind_counts(judgement),
        draws=values,
        by_class=by_class[0],
    )


def compare_models(
    summaries: Sequence[Summary], pairs: Iterable[tuple[str, str]]
) -> list[Comparison]:
    """Differences of the named pairs, (model, host).

    Raises:
        ConfigError: a name is not among the models.
    """
    known = {summary.name: summary for summary in summaries}
    compared = []
    for pair in pairs:
        for name in pair:
            if name not in known:
                raise ConfigError(
                    f"--compare {':'.join(pair)}: no model is called {name!r}; "
                    f"{nearest(name, known)}"
                )
        ours, theirs = (known[name].draws for name in pair)
        names = [*MEASURES, *(f"fix: {kind}" for kind in KINDS)]
        measures = {
            name: difference(ours[name], theirs[name])
            for name in names
            if name in ours and name in theirs
        }
        compared.append(Comparison(*pair, measures))
    return compared


def _record(item: Estimate) -> dict[str, float | None]:
    return {"value": _number(item.value), "low": _number(item.low), "high": _number(item.high)}


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return float(value) if np.isfinite(value) else None
