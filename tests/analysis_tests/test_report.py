# SPDX-License-Identifier: Apache-2.0
"""The numbers of a comparison, and its page, also in a real browser if there is one."""

import base64
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape

import numpy as np
import pytest
from helpers_of_analysis import found, objects, observed, random_scene, truth_of
from PIL import Image

from d2_decouple.analysis import (
    MEASURES,
    ORACLES,
    Estimate,
    SlotCost,
    compare_models,
    render_report,
    summarise,
)
from d2_decouple.analysis.figures import reliability
from d2_decouple.analysis.pictures import error_panels, misaligned_panels, worst_objects
from d2_decouple.analysis.summary import Comparison
from d2_decouple.config import ConfigError
from d2_decouple.evaluation import coco_curves

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ODD = '<b>&"odd" $\\x$'  # a name that would break a page, or matplotlib, if it were taken as it is
COSTS = [
    SlotCost("backbone", 3_000_000, 2_000_000_000, 9.5, 4.25),
    SlotCost("context", 1_000, 5_000_000, 1.5, 0.25),
    SlotCost("forward", 3_001_000, 2_005_000_000, 12.5, 4.5),
]


def read(place):
    return np.full((400, 420, 3), 60 * place % 256, np.uint8)


@pytest.fixture(scope="module")
def scene():
    return random_scene(images=4)


@pytest.fixture(scope="module")
def summaries(scene):
    truth, detections = scene
    worse = {key: item._replace(scores=1 - item.scores) for key, item in detections.items()}
    models = [
        observed(ODD, truth, detections),
        observed("worse", truth, worse),
        observed("kept", truth, detections, dense=False),
    ]
    models[0].costs += COSTS
    models[2].notes.append("5 < 6")
    return [summarise(model, truth, draws=10) for model in models]


@pytest.fixture(scope="module")
def page(scene, summaries):
    compared = compare_models(summaries, [("worse", ODD), ("kept", ODD)])
    title = "A & B"
    where = "a <CPU>"
    return render_report(summaries, compared, scene[0], read, title=title, draws=10, where=where)


def test_summary_holds_every_number(scene, summaries):
    truth, detections = scene
    first, _, kept = summaries
    assert set(first.draws) == {*MEASURES, *(f"fix: {name}" for name in ORACLES)}
    assert {"AP50", "score_iou"} == set(kept.draws) & set(MEASURES)
    assert all(len(values) == 11 for values in first.draws.values())
    known = coco_curves(truth, detections).summary()
    assert first.average_precision == pytest.approx(known["AP"])
    assert first.draws["AP50"][0] == pytest.approx(known["AP50"])


def test_records_are_json(scene, summaries):
    record = summaries[0].as_record(scene[0].class_names)
    assert record["measures"]["AP50"]["value"] == pytest.approx(summaries[0].draws["AP50"][0])
    assert record["costs"][1] == {
        "slot": "context",
        "parameters": 1000,
        "multiply_adds": 5_000_000,
        "milliseconds": 1.5,
        "peak_mib": 0.25,
    }
    empty = summarise(observed("none", scene[0], {}), scene[0], draws=2)
    assert empty.as_record(scene[0].class_names)["measures"]["score_iou"] == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_differences_are_on_the_same_draws(summaries):
    (item,) = compare_models(summaries, [("kept", ODD)])
    assert (item.name, item.host) == ("kept", ODD)
    # The same detections: no difference on any draw, although each has an interval of its own.
    assert item.measures["AP50"] == Estimate(0, 0, 0)
    assert "iou_gap" not in item.measures
    assert "fix: background" in item.measures
    (other,) = compare_models(summaries, [("worse", ODD)])
    ours, theirs = (summaries[at].draws["iou_gap"] for at in (1, 0))
    assert other.measures["iou_gap"].value == pytest.approx(ours[0] - theirs[0])
    assert other.measures["iou_gap"].low == pytest.approx(np.percentile(ours[1:] - theirs[1:], 2.5))


def test_unknown_model(summaries):
    with pytest.raises(ConfigError, match="--compare worse:wurst: no model is called 'wurst'"):
        compare_models(summaries, [("worse", "wurst")])


@pytest.mark.parametrize(
    ("name", "low", "high", "verdict"),
    [
        ("iou_gap", 0.1, 0.2, "worse"),
        ("iou_gap", -0.2, -0.1, "better"),
        ("AP50", 0.1, 0.2, "better"),
        ("AP50", -0.2, -0.1, "worse"),
        ("AP50", -0.1, 0.2, "unclear"),
        ("AP50", 0.0, 0.2, "unclear"),
        ("AP50", np.nan, np.nan, "unclear"),
        ("fix: missed", 0.1, 0.2, "worse"),
    ],
)
def test_verdicts(name, low, high, verdict):
    assert Comparison("a", "b", {name: Estimate(low, low, high)}).verdict(name) == verdict


def test_reliability_by_hand():
    truth = truth_of(objects([0, 0, 10, 10, 0], [50, 0, 60, 10, 0]))
    right = [[0, 0, 10, 10, 0.92, 0], [50, 0, 60, 10, 0.94, 0]]
    wrong = [[200, 0, 210, 10, 0.95, 0]] * 3
    low = [[200, 0, 210, 10, 0.15, 0]] * 4  # too few to be drawn
    detections = {"i0": found(*right, *wrong, *low)}
    scores, shares, error = reliability(summarise(observed("m", truth, detections), truth, draws=2))
    mean = (0.92 + 0.94 + 3 * 0.95) / 5
    assert scores == pytest.approx([mean])
    assert shares == pytest.approx([2 / 5])
    assert error == pytest.approx((5 * (mean - 0.4) + 4 * 0.15) / 9)


def test_worst_objects_are_of_different_images(scene, summaries):
    places = worst_objects(summaries, 10)
    views = summaries[0].observed.views
    assert (
        0 < len({views[place].image for place in places}) == len(places) <= 3
    )  # one image has no detections
    gaps = [np.mean([x.observed.views[place].iou_gap for x in summaries[:2]]) for place in places]
    assert gaps == sorted(gaps, reverse=True)
    every = np.array([[view.iou_gap for view in x.observed.views] for x in summaries[:2]])
    assert gaps[0] == pytest.approx(np.nanmax(every.mean(0)))
    assert worst_objects(summaries[2:], 3) == []
    row = next(misaligned_panels(summaries, read, 1))
    assert [panel.caption.partition(":")[0] for panel in row] == [ODD, "worse"]
    assert all(panel.pixels.shape == (300, 300, 3) for panel in row)


def test_error_picture_is_of_the_image_with_most_errors():
    """Of the second image, although the first has no detections at all and so no entry."""
    easy = [[x, 0, x + 10, 10, 0] for x in (0, 50, 100, 150)]
    truth = truth_of(objects(), objects([0, 0, 10, 10, 0]), objects(*easy))
    rows = [[0, 0, 10, 10, 0.9, 0], [100, 0, 120, 20, 0.8, 0], [100, 0, 120, 20, 0.2, 0]]
    detections = {"i1": found(*rows), "i2": found(*([*row[:4], 0.9, 0] for row in easy))}
    seen = []

    def watched(place):
        seen.append(place)
        return np.zeros((50, 140, 3), np.uint8)

    summary = summarise(observed("m", truth, detections), truth, draws=2)
    (panel,) = error_panels([summary], list(truth.images), watched)
    assert seen == [1]
    assert panel.caption == "m: 1 right of 2"
    # Four times as large: the wrong box's left side, in the colour of a background error.
    assert panel.pixels[70, 400].tolist() == [217, 4, 43]


def test_page_needs_nothing_beside_it(page):
    assert "<script" not in page
    assert "http" not in page
    assert "<link" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) > 6
    for source in sources:
        kind, _, data = source.partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert kind == f"data:image/{image.format.lower()}"
    assert "url(" not in page


def test_names_are_escaped(page):
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;&quot;odd&quot;" in page
    assert "<title>A &amp; B</title>" in page
    assert "a &lt;CPU&gt;" in page
    assert "5 &lt; 6" in page


def test_page_says_the_numbers(page, summaries):
    known = summaries[1].estimates()["iou_gap"]
    assert f"{known.value:.3f}<small>{known.low:.3f} to {known.high:.3f}</small>" in page
    assert "3.000</td><td>2.000</td><td>9.5</td><td>4.2</td>" in page
    for measure in MEASURES.values():
        assert escape(measure.about) in page
    assert f"{summaries[0].counts['background']}</td>" in page


def test_dark_and_light(page):
    assert "prefers-color-scheme: dark" in page


def test_parts_without_content_are_left_out(scene, summaries):
    bare = replace(summaries[2], observed=replace(summaries[2].observed, notes=[]))
    page = render_report([bare], [], scene[0], read, title="t", draws=10, where="w")
    for title in ("Differences", "Costs by slot", "Objects whose best box"):
        assert title not in page
    assert "Kinds of errors" in page


def test_a_model_that_finds_nothing(scene):
    summary = summarise(observed("none", scene[0], {}), scene[0], draws=2)
    page = render_report([summary], [], scene[0], read, title="t", draws=2, where="w")
    assert ">nan" not in page


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome: apt install chromium")
def test_in_a_browser(page, tmp_path):
    """It counts what it shows: pictures with pixels, rows of tables, sections, and its width."""
    count = """<script>addEventListener("load", () => {
      const all = (query) => [...document.querySelectorAll(query)];
      document.body.dataset.seen = [all("img").filter((x) => x.naturalWidth > 100).length,
        all("img").filter((x) => x.getBoundingClientRect().width > 100).length,
        all("tbody tr").length, all("section h2").length, all("b > b").length,
        document.documentElement.scrollWidth <= innerWidth].join(" ");
    });</script></body>"""
    file = tmp_path / "report.html"
    file.write_text(page.replace("</body>", count), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, done.stderr
    images = page.count("<img")
    rows = page.count("<tr>") - page.count("<thead>")
    sections = page.count("<section>")
    assert seen[1] == f"{images} {images} {rows} {sections} 0 true"
    assert sections == 6
