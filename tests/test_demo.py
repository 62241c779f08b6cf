# SPDX-License-Identifier: Apache-2.0
"""The demo: what it writes, what it says, and what it does with bad input."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from util import excite, tiny_model

from d2_decouple import demo
from d2_decouple.data.videos import VideoError, VideoReader, VideoWriter
from d2_decouple.engine.predictor import Predictor

CLASSES = ["ant", "bee", "cat"]
RECIPE = """
from util import tiny
from d2_decouple.config import get_config

cfg = tiny(get_config("fcos_R_18_FPN_bccd"))
model, dataloader = cfg.model, cfg.dataloader
dataloader.test.mapper.augmentations[0].update(short_edge_length=64, max_size=96)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe and its weights."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.py").write_text(RECIPE)
    torch.manual_seed(0)
    model = excite(tiny_model("fcos_R_18_FPN_bccd"), 0.7)
    torch.save({"model": model.state_dict(), "classes": CLASSES}, folder / "model.pth")
    return folder / "tiny.py", folder / "model.pth"


@pytest.fixture
def run(trained, tmp_path, capsys):
    """Runs the demo on inputs; exit status, what was printed, what was complained about."""

    def call(*inputs, output="out", options=()):
        config, weights = trained
        status = demo.main(
            [
                *("--config-file", str(config), "--weights", str(weights), "--device", "cpu"),
                *("--output", str(tmp_path / output), "--score-thresh", "0.1", *options),
                *("--input", *map(str, inputs)),
            ]
        )
        return status, *capsys.readouterr()

    return call


def save_picture(path: Path, height=60, width=90, seed=0) -> Path:
    noise = np.random.default_rng(seed).integers(256, size=(8, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST).save(path)
    return path


def save_film(path: Path, frames=6) -> Path:
    with VideoWriter(path, fps=10) as writer:
        for index in range(frames):
            frame = np.random.default_rng(index).integers(256, size=(48, 64, 3), dtype=np.uint8)
            writer.write(frame)
    return writer.path


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pictures_and_json_hold_what_the_predictor_finds(run, trained, tmp_path):
    image = save_picture(tmp_path / "in" / "a.png")
    status, printed, _ = run(image, options=["--json", "--batch-size", "2"])
    assert status == 0
    assert written(tmp_path / "out") == ["a.jpg", "detections.json"]
    found = Predictor.from_config(*trained, device="cpu", score_thresh=0.1)(image)
    assert len(found) > 3
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content["classes"] == CLASSES
    assert content["skipped"] == []
    (record,) = content["images"]
    assert (record["file_name"], record["picture"]) == (str(image), "a.jpg")
    assert (record["width"], record["height"]) == (90, 60)
    detections = record["detections"]
    assert [x["class_id"] for x in detections] == found.pred_classes.tolist()
    assert [x["class"] for x in detections] == [CLASSES[x["class_id"]] for x in detections]
    boxes = torch.tensor([x["bbox"] for x in detections])
    torch.testing.assert_close(boxes, found.pred_boxes.tensor, rtol=0, atol=0.01)
    scores = torch.tensor([x["score"] for x in detections])
    torch.testing.assert_close(scores, found.scores, rtol=0, atol=1e-4)
    assert f"{image}: {len(found)} objects (" in printed
    drawn = Image.open(tmp_path / "out" / "a.jpg")
    assert drawn.size == (640, 427)  # small images are enlarged, so that labels can be read


def test_folders_patterns_and_equal_names_in_different_folders(run, tmp_path):
    save_picture(tmp_path / "in" / "a.png")
    save_picture(tmp_path / "in" / "A.JPG", seed=1)
    save_picture(tmp_path / "in" / "deeper" / "a.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    pattern = tmp_path / "in" / ".." / "in" / "**" / "*.png"
    status, printed, _ = run(tmp_path / "in" / "a.png", tmp_path / "in", pattern, output="all")
    assert status == 0
    assert written(tmp_path / "all") == ["A-2.jpg", "a-3.jpg", "a.jpg"]
    assert "[3/3]" in printed  # in/a.png was named three times
    status, printed, _ = run(tmp_path / "in" / "a.png", output="all")
    assert f"to be replaced in {tmp_path / 'all'}: a.jpg\n" in printed


def test_a_broken_file_is_reported_and_skipped_and_fails_at_the_end(run, tmp_path):
    good = save_picture(tmp_path / "c.png")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "d.mp4").write_bytes(b"nothing")
    names = [tmp_path / "b.jpg", tmp_path / "d.mp4", good]
    status, printed, complaint = run(*names, options=["--json", "--batch-size", "3"])
    assert status == 1
    assert f"skipped: {tmp_path / 'b.jpg'} is no image" in complaint
    assert f"skipped: {tmp_path / 'd.mp4'} cannot be opened as a video" in complaint
    assert "1 of 3 files" in printed
    assert "2 skipped" in printed
    assert written(tmp_path / "out") == ["c.jpg", "detections.json"]
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [Path(x["file_name"]).name for x in content["skipped"]] == ["b.jpg", "d.mp4"]
    assert len(content["images"]) == 1


def test_one_pixel_and_large_images(run, tmp_path):
    save_picture(tmp_path / "in" / "one.png", 1, 1)
    save_picture(tmp_path / "in" / "large.png", 4000, 5000)
    assert run(tmp_path / "in")[0] == 0
    assert Image.open(tmp_path / "out" / "large.jpg").size == (2000, 1600)
    assert Image.open(tmp_path / "out" / "one.jpg").size == (640, 640)


def test_a_video_becomes_a_video_and_a_line_for_each_frame(run, tmp_path):
    film = save_film(tmp_path / "film")
    options = ["--json", "--every", "2", "--max-frames", "2", "--batch-size", "4"]
    status, printed, _ = run(film, options=options)
    assert status == 0
    assert "2 frames" in printed
    lines = (tmp_path / "out" / "film.jsonl").read_text().splitlines()
    frames = [json.loads(line) for line in lines]
    assert [(x["frame"], x["time"]) for x in frames] == [(0, 0.0), (2, 0.2)]
    assert all(x["detections"] for x in frames)
    with VideoReader(tmp_path / "out" / "film.mp4") as drawn:
        assert drawn.fps == pytest.approx(5)  # as long as the part of the original
        assert [frame.shape for _, frame in drawn] == [(48, 64, 3)] * 2


def test_a_video_without_frames_leaves_no_lines(run, tmp_path, monkeypatch):
    class Frameless(VideoReader):
        def __iter__(self):
            raise VideoError("film.mp4 holds no frame that can be decoded")

    monkeypatch.setattr(demo, "VideoReader", Frameless)
    status, _, complaint = run(save_film(tmp_path / "film"), options=["--json"])
    assert status == 1
    assert "skipped: film.mp4 holds no frame" in complaint
    assert written(tmp_path / "out") == ["detections.json"]


def test_an_input_is_never_replaced(run, tmp_path):
    image, film = save_picture(tmp_path / "a.jpg"), save_film(tmp_path / "film")
    for source in (image, film):
        before = source.read_bytes()
        status, _, complaint = run(source, output=".")
        assert status == 1
        assert f"{source.name} would replace an input; type --output" in complaint
        assert source.read_bytes() == before


def test_pictures_beside_an_input_are_never_replaced(run, tmp_path):
    original = save_picture(tmp_path / "in" / "a.jpg").read_bytes()
    image = save_picture(tmp_path / "in" / "a.png", seed=1)
    status, _, complaint = run(image, output="in")
    assert status == 1
    assert "in is a folder of inputs, and a.jpg there would be replaced; type --ou" in complaint
    assert (tmp_path / "in" / "a.jpg").read_bytes() == original


def test_hidden_files_are_passed_over_and_links_to_nothing_are_not(run, tmp_path):
    save_picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "._a.png").write_bytes(b"of a Mac's archive")
    assert run(tmp_path / "in")[0] == 0
    (tmp_path / "in" / "b.png").symlink_to("nowhere.png")
    for inputs in (tmp_path / "in", tmp_path / "in" / "b*.png", tmp_path / "in" / "b.png"):
        status, _, complaint = run(inputs)
        assert status == 1
        assert f"skipped: {tmp_path / 'in' / 'b.png'} cannot be read: No such file" in complaint


@pytest.mark.parametrize("value", ["50", "-0.1", "nan", "half"])
def test_a_threshold_that_is_no_share_is_refused(run, capsys, value):
    with pytest.raises(SystemExit, match="2"):
        run("a.png", options=[f"--score-thresh={value}"])
    assert "argument --score-thresh: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jpg", "there is no such file or folder"),
        ("none*.jpg", "no file fits it as a pattern"),
        ("empty", "no image or video lies directly in this folder (looked for .avi, .bmp"),
    ],
)
def test_nothing_to_read_is_said_before_anything_is_done(run, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    status, _, complaint = run(tmp_path / name)
    assert status == 1
    assert complaint.startswith(f"error: --input {tmp_path / name}: ")
    assert message in complaint
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(run, tmp_path):
    image = save_picture(tmp_path / "a.png")
    for options, message in (
        (["--config-file", "fcos_R_18"], "did you mean 'fcos_R_18_FPN_bccd'"),
        (["--weights", "none.pth"], "error: there are no weights 'none.pth'"),
        (["--precision", "float16"], "float16 is for GPUs"),
        (["model.num_clases=2"], "'model.num_clases=2'"),
    ):
        status, _, complaint = run(image, options=options)
        assert status == 1
        assert message in complaint
        assert complaint.startswith("error: ")
        assert complaint.count("\n") == 1
    (tmp_path / "file").touch()
    status, _, complaint = run(image, output="file")
    assert status == 1
    assert complaint.startswith("error: ")
    assert f"--output {tmp_path / 'file'} is a file; type the name of a folder" in complaint


def test_test_time_augmentation_can_be_asked_for(run, tmp_path):
    status, printed, _ = run(save_picture(tmp_path / "a.png"), options=["--tta"])
    assert status == 0
    assert "object" in printed


def test_the_script_explains_itself(monkeypatch, capsys):
    script = Path(__file__).parents[1] / "tools" / "demo.py"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "examples:" in printed
    assert "--input photo.jpg" in printed
    # As in the quickstart's pictures: scores of FCOS are products, and rarely above a half.
    assert "show detections above it (0.3)" in printed
