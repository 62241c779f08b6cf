# SPDX-License-Identifier: Apache-2.0
"""Precision against recall, a panel for each IoU threshold and a curve for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .detections import class_colors

__all__ = ["best_f1", "plain_text", "plot_precision_recall"]

_MOST_COLORS = 8  # classes with a colour of their own; more cannot be told apart
_MEAN_COLOR = "#222222"
_FAINT = "#9a9a9a"


def best_f1(recall: np.ndarray, precision: np.ndarray) -> int:
    """The place at which the harmonic mean of recall and precision, both (R,), is highest."""
    total = recall + precision
    return int(np.argmax(np.where(total > 0, recall * precision / np.maximum(total, 1e-12), 0.0)))


def plain_text(name: str) -> str:
    """A class name as matplotlib draws it letter by letter, in legends, too."""
    # What stands between two dollar signs would be a formula, and a label that begins with an
    # underscore would be left out of the legend.
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def plot_precision_recall(
    precision: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
    output_file: str | os.PathLike[str],
    *,
    iou_thresholds: Sequence[float],
) -> None:
    """Draw a PNG. The dot on a curve is its best F1, with the score that a user would demand.

    Up to eight classes have a colour each; more are drawn faint behind their mean.

    Args:
        precision: (T, R, K) at R recalls from 0 to 1; NaN for classes without objects.
        scores: (T, R, K) the score from which on a recall is reached.
        class_names: K names.
        output_file: where to write; it is replaced whole or not at all.
        iou_thresholds: T numbers, one for each panel.
    """
    panels = len(iou_thresholds)
    figure = Figure(figsize=(0.4 + 4.6 * panels, 5.4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for place, threshold in enumerate(iou_thresholds):
        _style(axes[place], f"IoU {threshold:.2f}", first=place == 0)
        _draw(axes[place], precision[place], scores[place], class_names)
    if any(axis.texts for axis in axes):
        note = "dots: best F1, and the score to demand for it"
        figure.supxlabel(note, fontsize=9, color="#666666")
    output = Path(output_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        canvas.print_png(unfinished)
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw(
    axes: Axes, precision: np.ndarray, scores: np.ndarray, class_names: Sequence[str]
) -> None:
    recall = np.linspace(0, 1, len(precision))
    known = np.flatnonzero(~np.isnan(precision).any(axis=0)).tolist()
    if not known:
        axes.set_title("no objects", loc="right", color="#666666", fontsize=9)
        return
    many = len(known) > _MOST_COLORS
    colors = [tuple(value / 255 for value in color) for color in class_colors(len(class_names))]
    for index in known:
        curve = precision[:, index]
        label = f"{plain_text(class_names[index])}  {100 * curve.mean():.1f}"
        if many:
            axes.plot(recall, _reached(curve), color=_FAINT, alpha=0.5, linewidth=0.8)
            continue
        axes.plot(recall, _reached(curve), color=colors[index], linewidth=2, label=label)
        _mark(axes, recall, curve, scores[:, index], colors[index])
    if many or len(known) > 1:
        mean = precision[:, known].mean(axis=1)
        label = f"mean of {len(known)}  {100 * mean.mean():.1f}"
        axes.plot(
            recall,
            _reached(mean),
            color=_MEAN_COLOR,
            linewidth=2.4 if many else 1.4,
            linestyle="-" if many else (0, (4, 2)),
            label=label,
        )
    # Below the panel: curves come near every place inside.
    axes.legend(
        title="AP (%)",
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.13),
        alignment="left",
        ncols=2,
        columnspacing=1.2,
        handlelength=1.6,
        frameon=False,
        fontsize=9,
    )


def _reached(curve: np.ndarray) -> np.ndarray:
    """Nothing is drawn behind the last recall that is reached."""
    return np.where(curve > 0, curve, np.nan)


def _mark(
    axes: Axes,
    recall: np.ndarray,
    precision: np.ndarray,
    scores: np.ndarray,
    color: tuple[float, ...],
) -> None:
    place = best_f1(recall, precision)
    if precision[place] <= 0:
        return
    where = (recall[place], precision[place])
    axes.plot(*where, "o", color=color, markersize=7, markeredgecolor="white", clip_on=False)
    axes.annotate(
        f"{scores[place]:.2f}",
        where,
        xytext=(5, 6) if recall[place] < 0.9 else (4, 9),
        ha="left" if recall[place] < 0.9 else "right",
        textcoords="offset points",
        color=color,
        fontsize=9,
        fontweight="bold",
    )


def _style(axes: Axes, title: str, *, first: bool) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("recall")
    if first:
        axes.set_ylabel("precision")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.04)
    axes.grid(alpha=0.25, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
