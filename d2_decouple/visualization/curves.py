# SPDX-License-Identifier: Apache-2.0
"""Losses, learning rate and average precision of a training, from Detectron2's metrics.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

__all__ = ["plot_curves", "read_metrics"]

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000")
_TOTAL_COLOR = "#222222"
_AP_NAMES = {"bbox/AP": "AP", "bbox/AP50": "AP50"}


def read_metrics(metrics_file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read Detectron2's metrics.json: one JSON object a line, each with an ``iteration``.

    Returns:
        For each name of a number an array (T, 2) of iteration and value, in the order of
        iterations. A resumed training writes some iterations again; the later line counts.
    """
    file = Path(metrics_file)
    if not file.is_file():
        raise FileNotFoundError(
            f"no metrics at {file.absolute()}; training writes metrics.json into train.output_dir"
        )
    points: dict[str, dict[int, float]] = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        entry = _parse_line(line, file, number)
        iteration = entry.pop("iteration")
        for name, value in entry.items():
            if isinstance(value, (int, float)):
                points.setdefault(name, {})[iteration] = float(value)
    if not points:
        raise ValueError(f"{file} has no metrics: training stopped before its first report")
    return {name: np.array(sorted(values.items())) for name, values in points.items()}


def plot_curves(metrics_file: str | os.PathLike[str], output_file: str | os.PathLike[str]) -> None:
    """Draw a PNG: the losses and the learning rate on the left, AP and AP50 on the right.

    Losses are drawn as logged, light, and smoothed, strong; the learning rate is the shade
    behind them. Nothing of matplotlib's global state is read or changed.
    """
    metrics = read_metrics(metrics_file)
    figure = Figure(figsize=(12, 4.6), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_losses(left, metrics)
    _draw_precision(right, metrics)
    last = max(float(series[-1, 0]) for series in metrics.values())
    for axes in (left, right):
        axes.set_xlim(0, max(last, 1.0) * 1.04)
    output = Path(output_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(output)


def _parse_line(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
        raise ValueError(f"{file}, line {number}: wanted an object with an integer 'iteration'")
    return entry


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over about an eighth of the points around each; values that are not finite are left out.

    Centred, since a running mean of the past lags behind a falling loss.
    """
    reach = len(values) // 16
    window = np.ones(2 * reach + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window)[reach : reach + len(values)]
    count = np.convolve(finite.astype(float), window)[reach : reach + len(values)]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_losses(axes: Axes, metrics: dict[str, np.ndarray]) -> None:
    names = sorted(name for name in metrics if name.startswith("loss"))
    lines = [(name, _COLORS[i % len(_COLORS)], 1.8) for i, name in enumerate(names)]
    if "total_loss" in metrics:
        lines.append(("total_loss", _TOTAL_COLOR, 2.4))
    _style(axes, "Training losses", "loss")
    if not lines:
        _note(axes, "no losses logged")
        return
    for name, color, width in lines:
        iterations, values = metrics[name].T
        axes.plot(iterations, values, color=color, alpha=0.25, linewidth=1)
        axes.plot(iterations, _smooth(values), color=color, linewidth=width, label=name)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    handles, _ = axes.get_legend_handles_labels()
    if "lr" in metrics:
        handles.append(_draw_rate(axes, metrics["lr"]))
    axes.legend(handles=handles, frameon=False, fontsize=9)


def _draw_rate(axes: Axes, series: np.ndarray) -> PolyCollection:
    """The learning rate as a low shade behind the losses: its shape counts, not its scale."""
    highest = float(series[:, 1].max())
    below = axes.twinx()
    below.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)
    below.set_ylim(0, 4 * highest if highest > 0 else 1)
    below.set_axis_off()
    return below.fill_between(
        *series.T, color="#000000", alpha=0.08, linewidth=0, label=f"lr (highest {highest:g})"
    )


def _draw_precision(axes: Axes, metrics: dict[str, np.ndarray]) -> None:
    _style(axes, "Box AP on the validation images", "AP (%)")
    axes.set_ylim(0, 100)
    for (key, label), color in zip(_AP_NAMES.items(), _COLORS, strict=False):
        if key not in metrics:
            continue
        iterations, values = metrics[key].T
        axes.plot(iterations, values, "o-", color=color, label=label, markersize=5, clip_on=False)
        if np.isfinite(values[-1]):
            axes.annotate(
                f"{values[-1]:.1f}",
                (iterations[-1], values[-1]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                color=color,
                fontweight="bold",
            )
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    else:
        _note(axes, "no evaluation logged")


def _style(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("iteration")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#666666")
