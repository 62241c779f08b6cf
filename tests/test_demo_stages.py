# SPDX-License-Identifier: Apache-2.0
"""The demo's --show-stages: its pictures, its JSON, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from demo_runs import CLASSES, demo_of, save_picture, write_trained, written
from PIL import Image

from d2_decouple.data.videos import VideoWriter
from d2_decouple.engine.predictor import Predictor
from d2_decouple.visualization import draw_stages

THREE, ONE = "decoupled_rcnn_R_18_FPN_bccd", "decoupled_rcnn_R_18_FPN_bccd_single"
FASTER, PDNET = "faster_rcnn_R_18_FPN_bccd_d2", "pdnet_R_18_FPN_bccd"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("trained"), (THREE, ONE, FASTER, PDNET))


@pytest.fixture
def run(trained, tmp_path, capsys):
    return demo_of(trained, tmp_path, capsys, "--show-stages", THREE)


@pytest.mark.parametrize(
    ("recipe", "options", "limit", "stages"), [(THREE, (), 4, 3), (ONE, ("2",), 2, 1)]
)
def test_pictures_and_json_hold_what_the_predictor_says(
    run, trained, tmp_path, recipe, options, limit, stages
):
    image = save_picture(tmp_path / "in" / "a.png")
    options = ["--json", "--show-stages", *options]
    status, printed, _ = run(image, options=options, recipe=recipe)
    assert status == 0
    assert "object" in printed
    assert written(tmp_path / "out") == ["a.jpg", "a_stages.jpg", "detections.json"]
    predictor = Predictor.from_config(*trained[recipe], device="cpu", score_thresh=0.05)
    seen = predictor.stages(image)
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert "levels" not in content
    (record,) = content["images"]
    assert record["stages_picture"] == "a_stages.jpg"
    assert record["proposals"] == seen.proposals_record()
    assert record["proposals"]["box"]["nms_thresh"] == 0.85
    detections = record["detections"]
    assert len(detections) == len(seen.instances) > limit
    boxes = torch.tensor([item["stages"]["boxes"] for item in detections])
    assert boxes.shape == (len(detections), stages + 1, 4)
    torch.testing.assert_close(boxes, seen.instances.stage_boxes, rtol=0, atol=0.006)
    last = [item["stages"]["boxes"][-1] for item in detections]
    assert last == [item["bbox"] for item in detections]
    ious = torch.tensor([item["stages"]["ious"] for item in detections])
    torch.testing.assert_close(ious, seen.instances.stage_ious, rtol=0, atol=6e-5)
    assert [item["stages"] for item in detections] == seen.as_records()
    expected = draw_stages(np.asarray(Image.open(image)), seen, CLASSES, limit=limit)
    drawn = np.asarray(Image.open(tmp_path / "out" / "a_stages.jpg"), dtype=float)
    assert drawn.shape == expected.shape
    assert abs(drawn - expected).mean() < 4  # JPEG


def test_without_the_option_nothing_is_added(run, tmp_path):
    image = save_picture(tmp_path / "in" / "a.png")
    assert run(image, options=["--json"])[0] == 0
    assert written(tmp_path / "out") == ["a.jpg", "detections.json"]
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert "proposals" not in content["images"][0]
    assert "stages" not in content["images"][0]["detections"][0]


def test_names_that_meet_get_numbers_and_inputs_are_never_replaced(run, tmp_path):
    images = [save_picture(tmp_path / "in" / name) for name in ("a_stages.png", "a.png")]
    assert run(*images, options=["--show-stages", "1"])[0] == 0
    assert written(tmp_path / "out") == [
        "a-2.jpg",
        "a-2_stages.jpg",
        "a_stages.jpg",
        "a_stages_stages.jpg",
    ]
    both = save_picture(tmp_path / "b.png"), save_picture(tmp_path / "b_stages.jpg", seed=1)
    before = both[1].read_bytes()
    status, _, complaint = run(both[0], output=".")
    assert status == 1
    assert "is a folder of inputs, and b_stages.jpg there would be replaced" in complaint
    assert both[1].read_bytes() == before


def test_videos_and_several_looks_are_refused_before_anything_is_done(run, tmp_path):
    image = save_picture(tmp_path / "a.png")
    with VideoWriter(tmp_path / "film", fps=10) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
    for inputs, options, message in (
        (
            [image, writer.path],
            [],
            f"--show-stages is for images, and there are videos among the "
            f"inputs: {writer.path}; give the images alone, or leave --show-stages out",
        ),
        ([image], ["--tta"], "--tta merges several looks; leave one of them out"),
    ):
        status, printed, complaint = run(*inputs, options=["--show-stages", *options])
        assert status == 1
        assert complaint.startswith("error: --show-stages")
        assert message in complaint
        assert complaint.count("\n") == 1
        assert printed == ""
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "found"),
    [(FASTER, "GeneralizedRCNN with RPN and StandardROIHeads"), (PDNET, "OneStageDetector")],
)
def test_a_model_without_stages_is_refused_and_writes_nothing(run, tmp_path, recipe, found):
    image = save_picture(tmp_path / "in" / "a.png")
    status, _, complaint = run(image, recipe=recipe, options=["--show-stages", "--json"])
    assert status == 1
    assert f"error: {found} is not a GeneralizedRCNN with DecoupledRPN and" in complaint
    assert "recipes with stages are decoupled_rcnn_R_" in complaint
    assert complaint.count("\n") == 1
    assert written(tmp_path / "out") == []


def test_a_broken_image_is_skipped_as_without_stages(run, tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff")
    good = save_picture(tmp_path / "c.png")
    options = ["--show-stages", "1", "--batch-size", "2"]
    status, _, complaint = run(tmp_path / "b.jpg", good, options=options)
    assert status == 1
    assert f"skipped: {tmp_path / 'b.jpg'} is no image" in complaint
    assert written(tmp_path / "out") == ["c.jpg", "c_stages.jpg"]


def test_points_and_stages_exclude_each_other(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("a.png", options=["--show-points", "--show-stages"])
    assert "--show-stages: not allowed with argument --show-points" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-2", "few"])
def test_a_number_of_detections_is_whole_and_positive(run, capsys, number):
    with pytest.raises(SystemExit, match="2"):
        run("a.png", options=[f"--show-stages={number}"])
    said = f"argument --show-stages: wanted a whole number from 1, got {number}\n"
    assert capsys.readouterr().err.endswith(said)
