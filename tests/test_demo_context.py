# SPDX-License-Identifier: Apache-2.0
"""The demo's --show-context: its pictures, its JSON, and what it refuses."""

import json

import numpy as np
import pytest
from demo_runs import CLASSES, demo_of, save_picture, write_trained, written
from PIL import Image

from d2_decouple.data.videos import VideoWriter
from d2_decouple.engine.predictor import Predictor
from d2_decouple.visualization import draw_context

FCOS, PDNET = "fcos_R_18_FPN_bccd", "pdnet_R_18_FPN_bccd"
TWO_STAGES = ("faster_rcnn_R_18_FPN_bccd_d2", "decoupled_rcnn_R_18_FPN_bccd")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("trained"), (FCOS, PDNET, *TWO_STAGES))


@pytest.fixture
def run(trained, tmp_path, capsys):
    return demo_of(trained, tmp_path, capsys, "--show-context=1", FCOS)


@pytest.mark.parametrize(("recipe", "options", "limit"), [(PDNET, (), 4), (FCOS, ("2",), 2)])
def test_pictures_and_json_hold_what_the_predictor_says(
    run, trained, tmp_path, recipe, options, limit
):
    image = save_picture(tmp_path / "in" / "a.png")
    options = ["--json", "--show-context", *options]
    status, printed, _ = run(image, recipe=recipe, options=options)
    assert status == 0
    assert "object" in printed
    assert written(tmp_path / "out") == ["a.jpg", "a_context.jpg", "detections.json"]
    predictor = Predictor.from_config(*trained[recipe], device="cpu", score_thresh=0.05)
    seen = predictor.context(image, limit=limit)
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content["levels"] == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    (record,) = content["images"]
    assert record["context_picture"] == "a_context.jpg"
    assert len(record["detections"]) == len(seen.instances) > limit
    explained = [item["context"] for item in record["detections"][:limit]]
    assert not any("context" in item for item in record["detections"][limit:])
    for got, expected in zip(explained, seen.as_records(), strict=True):
        assert got["level"] == expected["level"]
        assert got["location"] == expected["location"]
        assert got["overlap"] == pytest.approx(expected["overlap"], abs=2e-4)
        for branch in ("class", "box"):
            assert got[branch] == pytest.approx(expected[branch], abs=2e-4)
    expected = draw_context(np.asarray(Image.open(image)), seen, CLASSES, limit=limit)
    drawn = np.asarray(Image.open(tmp_path / "out" / "a_context.jpg"), dtype=float)
    assert drawn.shape == expected.shape
    assert abs(drawn - expected).mean() < 4  # JPEG


def test_without_the_option_nothing_is_added(run, tmp_path):
    image = save_picture(tmp_path / "in" / "a.png")
    assert run(image, options=["--json"])[0] == 0
    assert written(tmp_path / "out") == ["a.jpg", "detections.json"]
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert "levels" not in content
    assert "context" not in content["images"][0]["detections"][0]


def test_an_image_without_detections_has_a_picture(run, tmp_path):
    image = save_picture(tmp_path / "in" / "a.png")
    options = ["--show-context", "--json", "--score-thresh", "1"]
    status, printed, _ = run(image, options=options)
    assert status == 0
    assert "0 objects" in printed
    assert written(tmp_path / "out") == ["a.jpg", "a_context.jpg", "detections.json"]
    assert Image.open(tmp_path / "out" / "a_context.jpg").width == 640 + 36


def test_names_that_meet_get_numbers(run, tmp_path):
    images = [save_picture(tmp_path / "in" / name) for name in ("a_context.png", "a.png")]
    assert run(*images, options=["--show-context", "1", "--batch-size", "2"])[0] == 0
    assert written(tmp_path / "out") == [
        "a-2.jpg",
        "a-2_context.jpg",
        "a_context.jpg",
        "a_context_context.jpg",
    ]


def test_videos_and_several_looks_are_refused_before_anything_is_done(run, tmp_path):
    image = save_picture(tmp_path / "a.png")
    with VideoWriter(tmp_path / "film", fps=10) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
    for inputs, options, message in (
        ([writer.path], [], "--show-context is for images, and there are videos among the"),
        ([image], ["--tta"], "--tta merges several looks; leave one of them out"),
    ):
        status, printed, complaint = run(*inputs, options=["--show-context", *options])
        assert status == 1
        assert complaint.startswith("error: --show-context")
        assert message in complaint
        assert complaint.count("\n") == 1
        assert printed == ""
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", TWO_STAGES)
def test_a_two_stage_model_is_refused_and_writes_nothing(run, tmp_path, recipe):
    image = save_picture(tmp_path / "in" / "a.png")
    status, _, complaint = run(image, recipe=recipe)
    assert status == 1
    assert "error: GeneralizedRCNN is not a OneStageDetector, whose predictions say" in complaint
    assert "recipes with context are fcos_R_18_FPN_bccd, fcos_R_50_FPN_1x, " in complaint
    assert complaint.count("\n") == 1
    assert written(tmp_path / "out") == []


@pytest.mark.parametrize("other", ["--show-points", "--show-stages"])
def test_looks_exclude_each_other(run, capsys, other):
    with pytest.raises(SystemExit, match="2"):
        run("a.png", options=[other, "--show-context"])
    assert f"--show-context: not allowed with argument {other}" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-2", "few"])
def test_a_number_of_detections_is_whole_and_positive(run, capsys, number):
    with pytest.raises(SystemExit, match="2"):
        run("a.png", options=[f"--show-context={number}"])
    said = f"argument --show-context: wanted a whole number from 1, got {number}\n"
    assert capsys.readouterr().err.endswith(said)
