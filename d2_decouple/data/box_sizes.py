# SPDX-License-Identifier: Apache-2.0
"""Sizes of annotated boxes against the levels of a feature pyramid, as a table and a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.structures import BoxMode
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from tabulate import tabulate

from ..visualization import class_colors
from ..visualization.precision_recall import plain_text

__all__ = [
    "LEVELS",
    "LEVEL_BOUNDS",
    "Objects",
    "class_table",
    "collect_objects",
    "draw_box_sizes",
    "levels",
]

LEVELS = ("P3", "P4", "P5", "P6", "P7")
LEVEL_BOUNDS = (64.0, 128.0, 256.0, 512.0)
"""Pixels: the largest distance from an object's middle to a side, between one level and the next.

FCOS's ranges. That distance is half the longer side.
"""

_QUANTILES = (0.05, 0.5, 0.95)
_MAX_POINTS = 20_000  # more only hide each other
_GREY = "#555555"


class Objects(NamedTuple):
    """M objects, among them crowds.

    Attributes:
        sizes: (M, 2) width and height in pixels of the image file.
        scales: (M,) what the recipe's resizing multiplies them by.
        classes: (M,) category ids.
        images: (M,) positions in the list of dataset dicts.
        crowd: (M,) bool: difficult, or a crowd.
    """

    sizes: np.ndarray
    scales: np.ndarray
    classes: np.ndarray
    images: np.ndarray
    crowd: np.ndarray

    @property
    def resized(self) -> np.ndarray:
        """(M, 2) width and height in pixels of the network's input."""
        return self.sizes * self.scales[:, None]


def collect_objects(
    records: Sequence[dict[str, Any]], *, short_side: int, max_size: int
) -> Objects:
    """The objects of dataset dicts whose boxes are axis-aligned and have an area.

    Args:
        records: dataset dicts.
        short_side: pixels that the shorter side of an image is resized to.
        max_size: pixels that its longer side then has at most.
    """
    rows = []
    for index, record in enumerate(records):
        sides = (record.get("height", short_side), record.get("width", short_side))
        scale = min(short_side / min(sides), max_size / max(sides))
        for item in record.get("annotations", ()):
            if len(item["bbox"]) != 4:
                continue
            x1, y1, x2, y2 = BoxMode.convert(
                list(map(float, item["bbox"])), item["bbox_mode"], BoxMode.XYXY_ABS
            )
            crowd = item.get("iscrowd", 0)
            rows.append((x2 - x1, y2 - y1, scale, item["category_id"], index, crowd))
    table = np.array(rows, dtype=float).reshape(-1, 6)
    table = table[np.isfinite(table).all(axis=1) & (table[:, :2] > 0).all(axis=1)]
    return Objects(
        sizes=table[:, :2],
        scales=table[:, 2],
        classes=table[:, 3].astype(int),
        images=table[:, 4].astype(int),
        crowd=table[:, 5] > 0,
    )


def levels(resized: np.ndarray) -> np.ndarray:
    """Sizes (M, 2) in pixels of the network's input -> index into LEVELS (M,).

    The level on which FCOS assigns the middle of the object; cells beside the middle may lie one
    level higher.
    """
    return np.searchsorted(LEVEL_BOUNDS, resized.max(axis=1, initial=0) / 2, side="left")


def class_table(objects: Objects, classes: Sequence[str]) -> str:
    """One line a class and one for all: counts, sizes, and the share on each level.

    Sizes are quantiles of the root of the area, in pixels of the image files, without crowds.
    """
    names = [f"size {round(100 * share)}%" for share in _QUANTILES]
    header = ["class", "objects", "images", "difficult/crowd", *names, *LEVELS]
    rows = []
    everything = np.ones(len(objects.classes), dtype=bool)
    chosen = [(name, objects.classes == index) for index, name in enumerate(classes)]
    for name, mask in (*chosen, ("all", everything)):
        counted = mask & ~objects.crowd
        roots = np.sqrt(objects.sizes[counted].prod(axis=1))
        sizes = [f"{x:.0f}" for x in np.quantile(roots, _QUANTILES)] if len(roots) else ["–"] * 3
        counts = np.bincount(levels(objects.resized[counted]), minlength=len(LEVELS))
        shares = [_percent(x) for x in counts / max(len(roots), 1)]
        images = len(np.unique(objects.images[mask]))
        crowd = int((mask & objects.crowd).sum())
        rows.append([name, int(counted.sum()), images, crowd, *sizes, *shares])
    align = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True)


def _percent(share: float) -> str:
    if share == 0:
        return "–"
    return "<1%" if share < 0.005 else f"{share:.0%}"


def draw_box_sizes(
    objects: Objects,
    classes: Sequence[str],
    output_file: str | os.PathLike[str],
    *,
    short_side: int,
    max_size: int,
) -> None:
    """Draw a PNG: widths against heights on the left, the longer sides on the right.

    Both in pixels of the network's input, with the ranges of the pyramid's levels. Crowds are
    left out. Nothing of matplotlib's global state is read or changed.
    """
    figure = Figure(figsize=(12.5, 6), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(
        f"Boxes at short side {short_side}, long side at most {max_size}",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    left, right = figure.subplots(1, 2)
    counted = ~objects.crowd
    resized, labels = objects.resized[counted], objects.classes[counted]
    if len(resized):
        # A few boxes of a pixel would take half of the picture: they are drawn at its edge.
        middle = np.log2(np.quantile(resized, (0.002, 0.998)))
        low, high = 2.0 ** np.round(middle + np.array((-0.7, 0.7)))
        limits = (float(low), float(max(high, 4 * low)))
        _scatter(left, resized, labels, classes, limits)
        _histogram(right, resized, labels, classes, limits)
    else:
        for axes in (left, right):
            axes.text(0.5, 0.5, "no objects", transform=axes.transAxes, ha="center", color=_GREY)
    output = Path(output_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(output)


def _colors(classes: Sequence[str]) -> list[tuple[float, ...]]:
    return [tuple(channel / 255 for channel in color) for color in class_colors(len(classes))]


def _scatter(
    axes: Axes,
    resized: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    limits: tuple[float, float],
) -> None:
    _style(axes, limits, "width (pixels)")
    axes.set_yscale("log", base=2)
    axes.set_ylim(*limits)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=16))
    axes.set_ylabel("height (pixels)")
    axes.set_title("width and height of each box", loc="left", fontsize=11)
    # In one random order for all: a class drawn last would hide the others.
    order = np.random.default_rng(0).permutation(len(resized))[:_MAX_POINTS]
    colors = np.array(_colors(classes))[np.minimum(labels[order], len(classes) - 1)]
    size = float(np.clip(4000 / max(len(order), 1), 3, 24))
    widths, heights = resized[order].T.clip(*limits)
    axes.scatter(widths, heights, s=size, c=colors, alpha=0.55, linewidths=0)
    for bound in LEVEL_BOUNDS:
        side = 2 * bound
        if not limits[0] < side < limits[1]:
            continue
        axes.plot([limits[0], side, side], [side, side, limits[0]], color=_GREY, lw=1, ls="--")
    for name, middle in _level_places(limits):
        axes.text(
            middle,
            limits[0] * 1.06,
            name,
            ha="center",
            va="bottom",
            color=_GREY,
            fontweight="bold",
        )


def _histogram(
    axes: Axes,
    resized: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    limits: tuple[float, float],
) -> None:
    _style(axes, limits, "longer side (pixels)")
    axes.set_title("longer side of the boxes, and the level it leads to", loc="left", fontsize=11)
    axes.set_ylabel("boxes")
    longer = resized.max(axis=1).clip(*limits)
    steps = np.geomspace(*limits, 1 + 4 * round(np.log2(limits[1] / limits[0])))
    # The most frequent class lies at the bottom, so that the rare ones stay whole on top of it.
    order = sorted(range(len(classes)), key=lambda index: -int((labels == index).sum()))
    axes.hist(
        [longer[labels == index] for index in order],
        bins=steps.tolist(),
        stacked=True,
        color=[_colors(classes)[index] for index in order],
        label=[f"{plain_text(classes[index])} ({int((labels == index).sum())})" for index in order],
    )
    for bound in LEVEL_BOUNDS:
        if limits[0] < 2 * bound < limits[1]:
            axes.axvline(2 * bound, color=_GREY, lw=1, ls="--")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.14)
    found = levels(resized)
    for index, (name, middle) in zip(*_visible_levels(limits), strict=True):
        share = float((found == index).mean())
        axes.text(
            middle,
            axes.get_ylim()[1] * 0.985,
            f"{name}\n{_percent(share)}",
            ha="center",
            va="top",
            color=_GREY,
            fontweight="bold",
        )
    shown = min(len(classes), 12)
    handles, texts = axes.get_legend_handles_labels()
    rest = [f"and {len(classes) - shown} more classes"] if len(classes) > shown else []
    axes.legend(
        handles[:shown],
        texts[:shown],
        title=rest[0] if rest else None,
        frameon=False,
        fontsize=9,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )


def _level_places(limits: tuple[float, float]) -> list[tuple[str, float]]:
    """Name and middle of the levels that can be seen between two lengths in pixels."""
    edges = np.clip((limits[0], *(2 * bound for bound in LEVEL_BOUNDS), limits[1]), *limits)
    return [
        (name, float(np.sqrt(low * high)))
        for name, low, high in zip(LEVELS, edges[:-1], edges[1:], strict=True)
        if high > low
    ]


def _visible_levels(
    limits: tuple[float, float],
) -> tuple[list[int], list[tuple[str, float]]]:
    places = _level_places(limits)
    return [LEVELS.index(name) for name, _ in places], places


def _style(axes: Axes, limits: tuple[float, float], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(*limits)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=16))
    axes.set_xlabel(label)
    axes.set_box_aspect(1)
    axes.grid(alpha=0.2, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
