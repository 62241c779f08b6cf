# SPDX-License-Identifier: Apache-2.0
"""The report's diagrams, as PNG. Nothing of matplotlib's global state is read or changed."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..visualization.precision_recall import plain_text
from .costs import WHOLE
from .error_kinds import KINDS, RIGHT
from .misalignment import MATCHED_IOU
from .summary import Summary

__all__ = [
    "calibration_curves",
    "cost_bars",
    "error_bars",
    "gap_curves",
    "model_colors",
    "reliability",
    "score_iou_maps",
]

_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#444444")
_BINS = 10  # of scores
_LEAST = 5  # detections of a bin that a share is drawn for
_COLUMNS = 4  # panels beside each other
_CELLS = np.linspace(0, 1, 26)


def model_colors(count: int) -> list[str]:
    """A colour for each model, the same in all diagrams; after eight they begin anew."""
    return [_PALETTE[index % len(_PALETTE)] for index in range(count)]


def score_iou_maps(summaries: Sequence[Summary]) -> bytes:
    """A panel for each model: how many detections have which score and IoU."""
    columns = min(_COLUMNS, len(summaries))
    rows = -(-len(summaries) // columns)
    figure = Figure(figsize=(0.8 + 3.1 * columns, 0.5 + 3.1 * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, summary in zip(panels, summaries, strict=False):
        counts = np.histogram2d(summary.pairs.scores, summary.pairs.ious, bins=(_CELLS, _CELLS))[0]
        shown = np.where(counts > 0, counts, np.nan).T
        highest = max(float(counts.max(initial=0)), 2.0)
        axes.pcolormesh(_CELLS, _CELLS, shown, cmap="viridis_r", norm=LogNorm(1, highest))
        _style(axes, summary.name, "score", "IoU with its object")
        axes.axhline(MATCHED_IOU, color="#888888", linewidth=0.8, linestyle="--")
        axes.set_xticks(np.arange(5) / 5)  # the last would touch the first of the next panel
        axes.label_outer()
        text = f"rank correlation {summary.draws['score_iou'][0]:.2f}"
        axes.text(0.97, 0.04, text, transform=axes.transAxes, ha="right", fontsize=9)
    for axes in panels[len(summaries) :]:
        axes.set_visible(False)
    return _png(figure)


def error_bars(summaries: Sequence[Summary]) -> bytes:
    """What each kind of error costs in AP50: a bar for each model, with its interval."""
    count = len(summaries)
    figure = Figure(figsize=(10, 1.4 + 0.16 * len(KINDS) * (count + 1.5)), dpi=100)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    _style(axes, "What each kind of error costs", "AP50 that is gained when it is mended", "")
    middles = np.arange(len(KINDS))
    thickness = 0.84 / count
    for index, (summary, color) in enumerate(zip(summaries, model_colors(count), strict=True)):
        known = summary.estimates()
        values = np.array([known[f"fix: {kind}"] for kind in KINDS])
        places = middles - 0.42 + (index + 0.5) * thickness
        label = plain_text(summary.name)
        axes.barh(places, values[:, 0], thickness * 0.9, color=color, label=label)
        axes.hlines(places, values[:, 1], values[:, 2], color="#222222", linewidth=1)
    axes.set_yticks(middles, KINDS)
    axes.invert_yaxis()
    _legend_below(axes, count)
    return _png(figure)


def calibration_curves(summaries: Sequence[Summary]) -> bytes:
    """Share of right detections by score; on the diagonal a score says how likely one is right."""
    figure = Figure(figsize=(6, 5.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    _style(axes, "Calibration", "score", "share of right detections (IoU 0.5)")
    axes.plot((0, 1), (0, 1), color="#999999", linewidth=1, linestyle="--")
    for summary, color in zip(summaries, model_colors(len(summaries)), strict=True):
        scores, shares, _ = reliability(summary)
        axes.plot(scores, shares, "o-", color=color, markersize=4, label=plain_text(summary.name))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    _legend_below(axes, len(summaries))
    return _png(figure)


def reliability(summary: Summary) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean score and share of right ones of each bin of scores, and how far they are apart.

    Returns:
        (B,) and (B,) for the bins with five detections or more, and the mean of the differences
        over all detections (expected calibration error; NaN without any).
    """
    judged = summary.judgement
    counted = judged.kinds >= RIGHT
    scores, right = judged.scores[counted], judged.kinds[counted] == RIGHT
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    numbers = np.bincount(bins, minlength=_BINS)
    means, shares = (
        np.bincount(bins, weights=values, minlength=_BINS) / np.maximum(numbers, 1)
        for values in (scores, right)
    )
    total = numbers.sum()
    error = float(numbers @ np.abs(means - shares) / total) if total else float("nan")
    shown = numbers >= _LEAST
    return means[shown], shares[shown], error


def gap_curves(summaries: Sequence[Summary]) -> bytes | None:
    """Share of the reached objects whose IoU gap is larger; None where no model has views."""
    dense = [
        (summary, color)
        for summary, color in zip(summaries, model_colors(len(summaries)), strict=True)
        if summary.observed.views
    ]
    if not dense:
        return None
    figure = Figure(figsize=(6, 5.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    _style(axes, "IoU lost by choosing by score", "IoU gap", "share of objects with a larger gap")
    for summary, color in dense:
        gaps = np.sort([view.iou_gap for view in summary.observed.views or () if view.candidates])
        larger = 1 - np.arange(1, len(gaps) + 1) / max(len(gaps), 1)
        label = plain_text(summary.name)
        axes.step(gaps, larger, where="post", color=color, linewidth=1.6, label=label)
    axes.set_xlim(0, MATCHED_IOU)
    axes.set_ylim(0, 1)
    _legend_below(axes, len(dense))
    return _png(figure)


def cost_bars(summaries: Sequence[Summary]) -> bytes | None:
    """Multiply-adds and time by slot, without the backbone; None where nothing was measured."""
    measured = [summary for summary in summaries if summary.observed.costs]
    if not measured:
        return None
    figure = Figure(figsize=(12, 1.8 + 0.4 * len(measured)), dpi=100, layout="constrained")
    slots = list(
        dict.fromkeys(cost.slot for summary in measured for cost in summary.observed.costs)
    )
    slots = [slot for slot in slots if slot not in (WHOLE, "backbone")]
    panels = figure.subplots(1, 2, sharey=True)
    columns = (("multiply_adds", 1e9, "multiply-adds (10⁹)"), ("milliseconds", 1, "milliseconds"))
    for axes, (column, unit, label) in zip(panels, columns, strict=True):
        _style(axes, "Behind the backbone", label, "")
        ends = np.zeros(len(measured))
        for slot, color in zip(slots, model_colors(len(slots)), strict=True):
            values = np.array([_cost_of(summary, slot, column) / unit for summary in measured])
            axes.barh(np.arange(len(measured)), values, 0.7, left=ends, color=color, label=slot)
            ends += values
        axes.set_yticks(np.arange(len(measured)), [plain_text(x.name) for x in measured])
    panels[0].invert_yaxis()  # of both: they share it
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(slots), frameon=False)
    return _png(figure)


def _cost_of(summary: Summary, slot: str, column: str) -> float:
    return sum(getattr(cost, column) for cost in summary.observed.costs if cost.slot == slot)


def _legend_below(axes: Axes, count: int) -> None:
    """Curves come near every place inside."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14 if count < 20 else -0.06),
        ncols=2,
        frameon=False,
        fontsize=9,
    )


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(plain_text(title), loc="left", fontweight="bold", fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
