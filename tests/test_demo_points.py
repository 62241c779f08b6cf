# SPDX-License-Identifier: Apache-2.0
"""The demo's --show-points: its pictures, its JSON, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from demo_runs import CLASSES, demo_of, save_picture, write_trained, written
from PIL import Image

from d2_decouple.data.videos import VideoWriter
from d2_decouple.engine.predictor import Predictor
from d2_decouple.visualization import draw_points

PDNET, FCOS = "pdnet_R_18_FPN_bccd", "fcos_R_18_FPN_bccd"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("trained"), (PDNET, FCOS))


@pytest.fixture
def run(trained, tmp_path, capsys):
    return demo_of(trained, tmp_path, capsys, "--show-points", PDNET)


@pytest.mark.parametrize(("options", "limit"), [((), 4), (("2",), 2)])
def test_pictures_and_json_hold_what_the_predictor_says(run, trained, tmp_path, options, limit):
    image = save_picture(tmp_path / "in" / "a.png")
    status, printed, _ = run(image, options=["--json", "--show-points", *options])
    assert status == 0
    assert "object" in printed
    assert written(tmp_path / "out") == ["a.jpg", "a_points.jpg", "detections.json"]
    predictor = Predictor.from_config(*trained[PDNET], device="cpu", score_thresh=0.05)
    seen = predictor.points(image)
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content["levels"] == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    (record,) = content["images"]
    assert record["points_picture"] == "a_points.jpg"
    assert len(record["detections"]) == len(seen.instances) > limit
    for name, tolerance in (
        ("boundary_points", 0.006),
        ("class_points", 0.006),
        ("coarse_boxes", 0.006),
        ("box_level_weights", 6e-5),
    ):
        got = torch.tensor([item["points"][name] for item in record["detections"]])
        torch.testing.assert_close(got, seen.instances.get(name), rtol=0, atol=tolerance)
    levels = [item["points"]["level"] for item in record["detections"]]
    assert levels == [seen.level_names[level] for level in seen.instances.levels]
    expected = draw_points(np.asarray(Image.open(image)), seen, CLASSES, limit=limit)
    drawn = np.asarray(Image.open(tmp_path / "out" / "a_points.jpg"), dtype=float)
    assert drawn.shape == expected.shape
    assert abs(drawn - expected).mean() < 4  # JPEG


def test_without_the_option_nothing_is_added(run, tmp_path):
    image = save_picture(tmp_path / "in" / "a.png")
    assert run(image, options=["--json"])[0] == 0
    assert written(tmp_path / "out") == ["a.jpg", "detections.json"]
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert "levels" not in content
    assert "points" not in content["images"][0]["detections"][0]


def test_names_that_meet_get_numbers_and_inputs_are_never_replaced(run, tmp_path):
    images = [save_picture(tmp_path / "in" / name) for name in ("a_points.png", "a.png")]
    assert run(*images)[0] == 0
    assert written(tmp_path / "out") == [
        "a-2.jpg",
        "a-2_points.jpg",
        "a_points.jpg",
        "a_points_points.jpg",
    ]
    assert run(*reversed(images), output="other")[0] == 0
    assert written(tmp_path / "other") == [
        "a.jpg",
        "a_points-2.jpg",
        "a_points-2_points.jpg",
        "a_points.jpg",
    ]
    both = save_picture(tmp_path / "b.png"), save_picture(tmp_path / "b_points.jpg", seed=1)
    before = both[1].read_bytes()
    status, _, complaint = run(both[0], output=".")
    assert status == 1
    assert "is a folder of inputs, and b_points.jpg there would be replaced" in complaint
    status, _, complaint = run(*both, output=".")
    assert status == 1
    assert "b_points.jpg would replace an input; type --output" in complaint
    assert both[1].read_bytes() == before


def test_videos_and_several_looks_are_refused_before_anything_is_done(run, tmp_path):
    image = save_picture(tmp_path / "a.png")
    with VideoWriter(tmp_path / "film", fps=10) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
    for inputs, options, message in (
        (
            [image, writer.path],
            [],
            f"--show-points is for images, and there are videos among the "
            f"inputs: {writer.path}; give the images alone",
        ),
        ([image], ["--tta"], "--tta merges several looks; leave one of them out"),
    ):
        status, printed, complaint = run(*inputs, options=["--show-points", *options])
        assert status == 1
        assert complaint.startswith("error: --show-points")
        assert message in complaint
        assert complaint.count("\n") == 1
        assert printed == ""
        assert not (tmp_path / "out").exists()


def test_a_model_without_points_is_refused_and_writes_nothing(run, tmp_path):
    image = save_picture(tmp_path / "in" / "a.png")
    status, _, complaint = run(image, recipe=FCOS, options=["--show-points", "--json"])
    assert status == 1
    assert "error: this OneStageDetector with FCOSPredictor has no points to show" in complaint
    assert f"recipes with points are {PDNET.split('_')[0]}_" in complaint
    assert written(tmp_path / "out") == []


def test_a_broken_image_is_skipped_as_without_points(run, tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff")
    good = save_picture(tmp_path / "c.png")
    options = ["--show-points", "--batch-size", "2"]
    status, _, complaint = run(tmp_path / "b.jpg", good, options=options)
    assert status == 1
    assert f"skipped: {tmp_path / 'b.jpg'} is no image" in complaint
    assert written(tmp_path / "out") == ["c.jpg", "c_points.jpg"]


@pytest.mark.parametrize("number", ["0", "-2", "few"])
def test_a_number_of_detections_is_whole_and_positive(run, capsys, number):
    with pytest.raises(SystemExit, match="2"):
        run("a.png", options=[f"--show-points={number}"])
    said = f"argument --show-points: wanted a whole number from 1, got {number}\n"
    assert capsys.readouterr().err.endswith(said)


def test_an_override_is_not_taken_for_a_number(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("a.png", options=["--show-points", "model.selection.nms.test_nms_thresh=0.3"])
    assert "give this option its number, too" in capsys.readouterr().err
