# SPDX-License-Identifier: Apache-2.0
"""The comparison as one HTML file that needs nothing beside itself: no script, no other file."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape

from ..evaluation import GroundTruth
from .costs import WHOLE
from .error_kinds import KINDS, ORACLES
from .figures import (
    calibration_curves,
    cost_bars,
    error_bars,
    gap_curves,
    reliability,
    score_iou_maps,
)
from .intervals import Estimate
from .pictures import (
    BY_IOU,
    BY_SCORE,
    KIND_COLORS,
    TRUTH,
    Panel,
    ReadImage,
    error_panels,
    jpeg,
    misaligned_panels,
)
from .summary import MEASURES, Comparison, Summary

__all__ = ["render_report"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --soft: #f1f3f5;
  --line: #d0d4d9; --faint: #5b626a; --good: #0b7a35; --bad: #c0262d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --paper: #17191c; --soft: #23272c;
  --line: #3c4249; --faint: #a6adb5; --good: #5fd38a; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; padding: 1.5rem; max-width: 1240px; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p, li { max-width: 75ch; } .note { color: var(--faint); }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; } thead th { background: var(--soft); }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td:nth-child(2) { overflow-wrap: anywhere; }
.words td:first-child { white-space: nowrap; }
td small { display: block; color: var(--faint); white-space: nowrap; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
figure { margin: .6rem 0; } figure img { max-width: 100%; height: auto; border-radius: 6px;
  background: #ffffff; } figcaption { color: var(--faint); font-size: .85rem; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: .8rem; }
.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.row figure img { width: 100%; } .key { white-space: nowrap; margin-right: .8em; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em; }
"""

_OBJECTS_SHOWN = 4


def render_report(
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    truth: GroundTruth,
    read: ReadImage,
    *,
    title: str,
    draws: int,
    where: str,
) -> str:
    """The whole page.

    Args:
        summaries: of one model or more.
        comparisons: of pairs of them.
        truth: of the images that all were run on.
        read: gives an image by its place in ``truth``.
        title: of the page.
        draws: how many draws the intervals are made of.
        where: device and threads that times were measured with.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        _introduction(summaries, truth, draws),
        _section("Misalignment of score and IoU", _misalignment(summaries)),
        _section("Differences", _differences(comparisons)),
        _section("Score against IoU", _diagrams(summaries)),
        _section("Objects whose best box is not chosen", _objects(summaries, read)),
        _section("Kinds of errors", _errors(summaries, truth, read)),
        _section("Costs by slot", _costs(summaries, where)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _introduction(summaries: Sequence[Summary], truth: GroundTruth, draws: int) -> str:
    counts = truth.count_objects()
    classes = zip(truth.class_names, counts, strict=True)
    objects = ", ".join(f"{count} {escape(name)}" for name, count in classes)
    rows = [
        [escape(x.name), escape(x.observed.source), str(len(x.pairs.scores)), _notes(x)]
        for x in summaries
    ]
    return (
        f"<p>{len(truth.images)} images with {int(counts.sum())} objects: {objects}. Brackets hold "
        f"95 % of the values when the images are drawn anew, {draws} times, with replacement; "
        "differences are taken on the same draws. They say how much is luck of the test images, "
        "not of the training: another seed makes another model.</p>"
        + _table(["model", "from", "detections", "notes"], rows, style="words")
    )


def _notes(summary: Summary) -> str:
    return escape("; ".join(summary.observed.notes)) or "–"


def _misalignment(summaries: Sequence[Summary]) -> str:
    rows = []
    for summary in summaries:
        known = summary.estimates()
        cells = [_cell(known.get(name), measure.digits) for name, measure in MEASURES.items()]
        rows.append([escape(summary.name), _plain(summary.average_precision, 1), *cells])
    about = "".join(
        f"<li><b>{escape(measure.title)}</b>: {escape(measure.about)}"
        + (" (more is better)" if measure.better > 0 else " (less is better)")
        + "</li>"
        for measure in MEASURES.values()
    )
    header = ["model", "AP", *(escape(measure.title) for measure in MEASURES.values())]
    names = summaries[0].judgement.class_names
    by_class = [
        [escape(x.name), *(_plain(value, 3) for value in x.by_class.tolist())] for x in summaries
    ]
    return (
        _table(header, rows)
        + f"<ul>{about}</ul><p>A mean over objects is over those that the model reaches. The rank "
        "correlation of detections, class by class:</p>"
        + _table(["model", *map(escape, names)], by_class)
    )


def _differences(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return ""
    names = [name for name in MEASURES if any(name in x.measures for x in comparisons)]
    rows = []
    for item in comparisons:
        cells = [_difference_cell(item, name, MEASURES[name].digits) for name in names]
        rows.append([f"{escape(item.name)} less {escape(item.host)}", *cells])
    return (
        _table(["difference", *(escape(MEASURES[name].title) for name in names)], rows)
        + '<p class="note">Coloured: the interval does not hold 0, <span class="better">better'
        '</span> or <span class="worse">worse</span>. Where nothing differs, one cell in twenty is '
        "coloured by chance.</p>"
    )


def _difference_cell(item: Comparison, name: str, digits: int) -> str:
    if name not in item.measures:
        return "–"
    text = _cell(item.measures[name], digits, sign=True)
    verdict = item.verdict(name)
    return text if verdict == "unclear" else f'<span class="{verdict}">{text}</span>'


def _diagrams(summaries: Sequence[Summary]) -> str:
    rows = [[escape(x.name), _plain(reliability(x)[2], 3)] for x in summaries]
    return (
        "<p>Every detection by its score and its IoU with the object of its class that it overlaps "
        "most; dark cells hold many, on a logarithmic scale. Were score and IoU aligned, all would "
        "lie on a rising line.</p>"
        + _image(score_iou_maps(summaries), "score against IoU of all detections", "png")
        + '<div class="row large">'
        + _image(calibration_curves(summaries), "share of right detections by score", "png")
        + _image(gap_curves(summaries), "share of objects by IoU gap", "png")
        + "</div>"
        + _table(["model", "calibration error"], rows)
    )


def _objects(summaries: Sequence[Summary], read: ReadImage) -> str:
    rows = [_row(panels) for panels in misaligned_panels(summaries, read, _OBJECTS_SHOWN)]
    if not rows:
        return ""
    return (
        "<p>The objects with the largest IoU gap, mean over the models, one of an image. "
        f"{_key('best score (dashed)', BY_SCORE)}{_key('largest IoU', BY_IOU)}"
        f"{_key('the object', TRUTH)}Dots are the locations that predict them.</p>" + "".join(rows)
    )


def _errors(summaries: Sequence[Summary], truth: GroundTruth, read: ReadImage) -> str:
    rows, counts = [], []
    for summary in summaries:
        known = summary.estimates()
        cells = [_cell(known[f"fix: {name}"], 1) for name in ORACLES]
        rows.append([escape(summary.name), _cell(known["AP50"], 1), *cells])
        counts.append([escape(summary.name), *(str(summary.counts[kind]) for kind in KINDS)])
    colors = "".join(_key(kind, color) for kind, color in KIND_COLORS.items() if kind != "missed")
    return (
        "<p>After TIDE (Bolya et al., ECCV 2020): what AP at IoU 0.5 gains when one kind of error "
        "is mended and nothing else. Kinds do not add up to what is missing, since errors hide "
        "each other.</p>"
        + _table(["model", "AP50", *ORACLES], rows)
        + _image(error_bars(summaries), "cost of each kind of error", "png")
        + "<p>How many there are, at any score:</p>"
        + _table(["model", *KINDS], counts)
        + f"<p>The image with most wrong detections that score from 0.3: {colors}</p>"
        + _row(error_panels(summaries, list(truth.images), read), style="row large")
    )


def _costs(summaries: Sequence[Summary], where: str) -> str:
    rows = [
        [
            escape(summary.name) if place == 0 else "",
            f"<b>{cost.slot}</b>" if cost.slot == WHOLE else escape(cost.slot),
            f"{cost.parameters / 1e6:.3f}",
            f"{cost.multiply_adds / 1e9:.3f}",
            f"{cost.milliseconds:.1f}",
            f"{cost.peak_mib:.1f}",
        ]
        for summary in summaries
        for place, cost in enumerate(summary.observed.costs)
    ]
    if not rows:
        return ""
    header = ["model", "slot", "parameters (10⁶)", "multiply-adds (10⁹)", "ms", "memory (MiB)"]
    return (
        f"<p>Of one image, the first, on {escape(where)}. Time is a median. Memory is of the "
        "tensors that are alive at a time, beside weights and those before the slot. "
        f"<b>{WHOLE}</b> is everything but assigner and selection. The assigner runs in training "
        "alone.</p>"
        + _image(cost_bars(summaries), "multiply-adds and time by slot", "png")
        + _table(header, rows)
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, style: str = "numbers") -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    table = f'<table class="{style}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>\n'


def _cell(item: Estimate | None, digits: int, *, sign: bool = False) -> str:
    if item is None or math.isnan(item.value):
        return "–"
    value, low, high = (f"{x:{'+' if sign else ''}.{digits}f}" for x in item)
    return f"{value}<small>{low} to {high}</small>"


def _plain(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _key(text: str, color: tuple[int, int, int]) -> str:
    swatch = f'<i style="background: rgb{color}"></i>'
    return f'<span class="key">{swatch}{escape(text)}</span> '


def _row(panels: Sequence[Panel], *, style: str = "row") -> str:
    pictures = (_image(jpeg(x.pixels), x.caption, "jpeg", caption=x.caption) for x in panels)
    return f'<div class="{style}">{"".join(pictures)}</div>\n'


def _image(content: bytes | None, alt: str, kind: str, *, caption: str = "") -> str:
    if content is None:
        return ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">{below}</figure>'
    )
