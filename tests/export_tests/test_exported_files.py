# SPDX-License-Identifier: Apache-2.0
"""ONNX files find what PyTorch finds, at other sizes too, and run without PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from demo_runs import CLASSES, write_trained
from PIL import Image
from util import TORCH, environment, excite, tiny_model

from d2_decouple import demo
from d2_decouple.engine.predictor import Predictor
from d2_decouple.export import exportable, verify
from d2_decouple.export.__main__ import _verify, main
from d2_decouple.export.description import ExportError, describe
from d2_decouple.export.graph import class_wise_nms
from d2_decouple.export.programs import export_file
from d2_decouple.export.translations import FreeSizes, translations
from d2_decouple.export.verify import compare, deviation
from d2_decouple.layers.point_gather import deformable_point_gather, dynamic_point_gather
from d2_decouple.runtime import Detections, ExportedDetector, ExportedModelError
from d2_decouple.runtime.images import read_image

if TORCH < (2, 10):
    pytest.skip("the export needs torch 2.10 or newer", allow_module_level=True)
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT / "tests" / "data" / "bccd_mini" / "JPEGImages"
RECIPE = "fcos_R_18_FPN_bccd"
# What is not in the model that the command exports below: BFP, candidates as outputs, and maps of
# neighbouring levels that fit each other or not, as the image has it.
GRAPHS = [("sapd_R_18_FPN_bccd", False), ("tscode_fcos_R_18_FPN_bccd", False)]
BLOCKER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""
BLOCKED = {
    "PIL", "detectron2", "fvcore", "matplotlib", "omegaconf", "onnx", "onnxscript",
    "pycocotools", "torch", "torchvision", "yaml",
}  # fmt: skip


class Operators(torch.nn.Module):
    """What needs care to become ONNX, alone."""

    def forward(self, x):
        half = x[..., ::2, ::2]  # 6 x 7 cells of 11 x 14: the windows of 6 do not fit
        points = x[:, :2].unsqueeze(1).expand(-1, 3, -1, -1, -1) * (x.shape[-1] + 2) - 1.5
        rows = x.flatten(1)
        low = torch.stack((rows.cumsum(1) % 17, rows.cumsum(1) % 13), dim=-1)
        boxes = torch.cat((low, low + rows[..., None] * 9), dim=-1)
        return (
            F.adaptive_max_pool2d(x, half.shape[-2:]),
            F.adaptive_max_pool2d(half, x.shape[-2:]),
            dynamic_point_gather(x, points, "sum"),
            dynamic_point_gather(x, points),
            deformable_point_gather(x, points),
            class_wise_nms(boxes, torch.stack((rows, rows.flip(1)), dim=1), 0.4, 0.3, 9),
        )


def test_operators_are_translated_for_every_size(tmp_path):
    free = {"x": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    with torch.no_grad(), FreeSizes():
        program = torch.export.export(
            Operators(), (torch.rand(2, 3, 11, 14),), dynamic_shapes=free, strict=False
        )
    torch.onnx.export(
        program, dynamo=True, custom_translation_table=translations(), verbose=False
    ).save(tmp_path / "operators.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "operators.onnx")
    for shape in ((2, 3, 11, 14), (1, 3, 5, 9), (3, 3, 16, 7)):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(2))
        wanted = Operators()(x)
        assert 4 < wanted[-1].sum() < 2 * 9 * shape[0] + 1
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(other), one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "inside"), GRAPHS)
def test_a_file_answers_what_the_graph_answers_at_other_sizes(name, inside, tmp_path):
    torch.manual_seed(0)
    model = excite(tiny_model(name), 0.7).eval()
    graph = exportable(model, nms_inside=inside)
    described = describe(model, recipe=name, classes=CLASSES, augmentations=[], nms_inside=inside)
    export_file(graph, described, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    # 97 x 64 and 300 x 150 pixels: maps of one cell, and of odd numbers of them.
    for shape in ((1, 3, 97, 64), (3, 3, 300, 150)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 255
        with torch.no_grad():
            wanted = graph(images)
        found = session.run(list(graph.output_names), {"image": images.numpy()})
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(other), one, rtol=1e-4, atol=1e-3)
    detector = ExportedDetector(tmp_path / "model.onnx")
    assert detector.description == described
    graph.nms_inside = True
    with torch.no_grad():
        chosen = graph(images)
    for index, found in enumerate(detector.run(images.numpy())):
        boxes, scores, classes = (x[index][: chosen[3][index]].numpy() for x in chosen[:3])
        apart = deviation(Detections(boxes, scores, classes), found, limit=described["selection"])
        assert apart.detections > 3
        assert apart.accepted, apart
    with pytest.raises(ExportedModelError, match=r"does not say how images are resized.*run\(\)"):
        detector(np.zeros((8, 8, 3), np.uint8))


def test_a_file_for_one_size_takes_no_other(tmp_path):
    torch.manual_seed(0)
    model = excite(tiny_model("sapd_R_18_FPN_bccd"), 0.7).eval()
    graph = exportable(model, nms_inside=False)
    rule = {"recipe": "a", "classes": CLASSES, "augmentations": [], "nms_inside": False}
    described = describe(model, fixed_size=(70, 100), **rule)
    image = torch.rand(1, 3, 70, 100) * 255
    with torch.no_grad():
        boxes, scores, _ = graph(image)
    export_file(graph, described, tmp_path / "model.onnx", fixed_size=(70, 100))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == [1, 3, 70, 100]
    found = session.run(["boxes", "scores"], {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(found[1]), scores, rtol=1e-4, atol=1e-5)
    detector = ExportedDetector(tmp_path / "model.onnx")
    assert len(detector.run(image.numpy())[0].scores) > 3
    with pytest.raises(ExportedModelError, match=r"one image of 70x100 \(HxW\) at a time"):
        detector.run(np.zeros((1, 3, 64, 64), np.float32))

    export_file(graph, described, tmp_path / "a.pt2", kind="torch-export", fixed_size=(70, 100))
    written = {"d2_decouple": ""}
    loaded = torch.export.load(tmp_path / "a.pt2", extra_files=written).module()
    assert json.loads(written["d2_decouple"]) == described
    torch.testing.assert_close(loaded(image)[0], boxes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with real images, a file made by the command, and its recipe and weights."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "images").mkdir()
    for file, size in zip(sorted(PHOTOS.iterdir())[:2], ((160, 120), (100, 130)), strict=True):
        # Without losses: decoders of JPEG files differ by a few grey values.
        Image.open(file).resize(size).save(folder / "images" / f"{file.stem}.png")
    files = write_trained(folder, [RECIPE])[RECIPE]
    status = main(
        [
            *("--config-file", str(files[0]), "--weights", str(files[1])),
            *("--output", str(folder / "new" / "model.onnx"), "--nms", "inside"),
            *("--verify", str(folder / "images")),
        ]
    )
    return folder, files, status


def test_the_command_writes_a_file_and_compares_it(exported, capsys):
    folder, files, status = exported
    assert status == 0
    detector = ExportedDetector(folder / "new" / "model.onnx")
    assert detector.classes == tuple(CLASSES)
    assert detector.description["recipe"] == RECIPE
    assert detector.description["resize"] == {"short_edge": 64, "max_size": 96}
    arguments = ["--config-file", str(files[0]), "--weights", str(files[1])]
    for options, message in (
        (["--output", str(folder / "new" / "model.onnx")], "type another name, or --overwrite\n"),
        (["--output", str(folder / "new"), "--overwrite"], "type another name\n"),
        (["--output", "a.onnx", "--verify", "nowhere"], "--verify nowhere: no image lies dire"),
        (["--output", "a.pt2", "--format", "aoti", "--verify", "."], "--verify runs ONNX files"),
        (["--output", "a.b", "--format", "onx", "--verify", "."], "--format is 'onx'; wanted is"),
    ):
        assert main([*arguments, *options]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", [("0", "0"), ("-5", "100"), ("64", "x")])
def test_sizes_that_no_image_has(size, capsys):
    required = ["--config-file", RECIPE, "--weights", "a.pth", "--output", "a.onnx"]
    with pytest.raises(SystemExit):
        main([*required, "--size", *size])
    wrong = next(side for side in size if side not in ("64", "100"))
    assert f"got '{wrong}', wanted are whole numbers from 1 on" in capsys.readouterr().err


def test_the_name_is_checked_before_anything_is_read(capsys):
    required = ["--config-file", "none", "--weights", "none", "--format", "aoti"]
    assert main([*required, "--output", "runs/a.onnx"]) == 1
    assert "--output is runs/a.onnx; type --output runs/a.pt2\n" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_skipped_and_counted(
    exported, tmp_path, capsys, monkeypatch
):
    folder, files, _ = exported
    (tmp_path / "images").mkdir()
    for file in (folder / "images").iterdir():
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images" / "A.png").write_text("no image")
    predictor = Predictor.from_config(*files, device="cpu", channels="RGB")
    images = sorted((tmp_path / "images").iterdir())
    assert _verify(predictor, folder / "new" / "model.onnx", images) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("skipped: ")
    assert "A.png" in captured.err
    assert captured.out.count(" detections, boxes differ by ") == 2
    assert captured.out.endswith("2 of 2 images agree to 0.001, 1 skipped\n")
    assert _verify(predictor, folder / "new" / "model.onnx", images[1:]) == 0
    capsys.readouterr()

    def refuses_the_last(predictor, detector, files):
        assert f"{images[1].name} (" in capsys.readouterr().out or files == images[1:2]  # when made
        if images[-1] in files:
            raise ExportedModelError("of another size")
        return compare(predictor, detector, files)

    monkeypatch.setattr(verify, "compare", refuses_the_last)
    assert _verify(predictor, folder / "new" / "model.onnx", images[1:]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"skipped: {images[-1]}: of another size\n"
    assert captured.out == "1 of 1 images agree to 0.001, 1 skipped\n"


def test_an_opset_that_the_exporter_cannot_write(tmp_path):
    model = tiny_model(RECIPE).eval()
    graph = exportable(model, nms_inside=False)
    with pytest.raises(ExportError, match=r"--opset is 99, .* made opset 18 of it.*--opset 18"):
        export_file(graph, {}, tmp_path / "a.onnx", opset=99, fixed_size=(64, 64))
    assert list(tmp_path.iterdir()) == []


def run_blocked(folder, *arguments):
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(BLOCKER.format(names=BLOCKED))
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(folder / "site"), variables["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, "-m", "d2_decouple.demo", *map(str, arguments)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )


def test_the_demo_runs_where_nothing_but_numpy_opencv_and_onnxruntime_is(exported):
    folder, files, _ = exported
    options = ["--input", folder / "images", "--output", folder / "out", "--score-thresh", "0.1"]
    without = run_blocked(folder, *options, "--config-file", files[0], "--weights", files[1])
    assert "is blocked" in without.stderr  # the model in PyTorch does need them
    done = run_blocked(folder, *options, "--json", "--model", folder / "new" / "model.onnx")
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "out" / "detections.json").read_text())
    predictor = Predictor.from_config(*files, device="cpu", score_thresh=0.1)
    assert len(content["images"]) == 2
    for record in content["images"]:
        wanted = predictor(record["file_name"])
        detections = record["detections"]
        assert len(detections) == len(wanted) > 3
        assert [x["class_id"] for x in detections] == wanted.pred_classes.tolist()
        assert [x["class"] for x in detections] == [CLASSES[i] for i in wanted.pred_classes]
        boxes = torch.tensor([x["bbox"] for x in detections])
        torch.testing.assert_close(boxes, wanted.pred_boxes.tensor, rtol=0, atol=0.01)
        scores = torch.tensor([x["score"] for x in detections])
        torch.testing.assert_close(scores, wanted.scores, rtol=0, atol=2e-4)
        picture = Image.open(folder / "out" / record["picture"])
        assert max(picture.size) == 640
        assert (record["width"], record["height"]) == Image.open(record["file_name"]).size


def test_the_demo_skips_what_it_cannot_read_and_keeps_inputs(exported, tmp_path, capsys):
    model = str(exported[0] / "new" / "model.onnx")
    image = sorted((exported[0] / "images").iterdir())[0]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(image.read_bytes())
    (tmp_path / "in" / "A.jpg").write_text("no image")
    common = ["--input", str(tmp_path / "in"), "--output"]
    assert demo.main(["--model", model, *common, str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "skipped: " in captured.err
    assert "A.jpg (8 bytes) is no image" in captured.err
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["a-2.jpg"]
    (tmp_path / "file").touch()
    for arguments, message in (
        ([f"--model={model}", *common, str(tmp_path / "in")], "is a folder of inputs"),
        (["--model", model, *common, str(tmp_path / "file")], "is a file; type the name of a fo"),
        (["--model", "none.onnx", *common, str(tmp_path / "b")], "there is no model 'none.onnx'"),
        (
            ["--model", model, "--input", "none*.png", "--output", str(tmp_path / "b")],
            "--input none*.png: no such image",
        ),
    ):
        assert demo.main(arguments) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_images_of_another_size_than_the_files_are_skipped(exported, tmp_path, capsys):
    """One that stands upright among those that lie does not end it."""
    import onnx

    lying, upright = sorted((exported[0] / "images").iterdir())
    first = ExportedDetector(exported[0] / "new" / "model.onnx")
    model = onnx.load(exported[0] / "new" / "model.onnx")
    (entry,) = (x for x in model.metadata_props if x.key == "d2_decouple")
    size = first.prepared(read_image(lying)).shape[-2:]
    entry.value = json.dumps({**first.description, "fixed_size": list(size)})
    onnx.save(model, tmp_path / "one.onnx")
    inputs = ["--input", str(upright), str(lying), "--output", str(tmp_path / "out"), "--json"]
    assert demo.main(["--model", str(tmp_path / "one.onnx"), *inputs]) == 1
    assert f"skipped: {upright}: this file takes one image of" in capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [x["file_name"] for x in content["images"]] == [str(lying)]
    assert [x["file_name"] for x in content["skipped"]] == [str(upright)]


def test_files_that_cannot_be_run_say_why(exported, tmp_path, monkeypatch):
    import onnx

    model = onnx.load(exported[0] / "new" / "model.onnx")
    (entry,) = (x for x in model.metadata_props if x.key == "d2_decouple")
    described = json.loads(entry.value)

    def changed(**changes):
        entry.value = json.dumps({**described, **changes})
        onnx.save(model, tmp_path / "changed.onnx")
        return tmp_path / "changed.onnx"

    with pytest.raises(ExportedModelError, match="a description of format 2, this version reads 1"):
        ExportedDetector(changed(format=2))
    outside = {**described["selection"], "inside": False}
    with pytest.raises(ExportedModelError, match=r"has outputs .*'counts'.*; wanted are .*strides"):
        ExportedDetector(changed(selection=outside))
    model.metadata_props.remove(entry)
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ExportedModelError, match=r"not written by python -m d2_decouple\.export"):
        ExportedDetector(tmp_path / "foreign.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportedModelError, match="cannot be run by onnxruntime: "):
        ExportedDetector(tmp_path / "text.onnx")
    with pytest.raises(ExportedModelError, match=r"wanted an image \(H, W, 3\) of uint8, got"):
        ExportedDetector(exported[0] / "new" / "model.onnx")(np.zeros((4, 4)))
    detector = ExportedDetector(exported[0] / "new" / "model.onnx")
    with pytest.raises(ExportedModelError, match=r"wanted images .* got \(3, 4, 4\) of float64"):
        detector.run(np.zeros((3, 4, 4)))
    detector.description = {**described, "fixed_size": [64, 96]}
    with pytest.raises(ExportedModelError, match=r"one image of 64x96 .* got \(1, 3, 64, 64\)"):
        detector.run(np.zeros((1, 3, 64, 64), np.float32))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportedModelError, match="type: pip install onnxruntime"):
        ExportedDetector(tmp_path / "text.onnx")


def test_missing_packages_are_named(exported, tmp_path, capsys, monkeypatch):
    from d2_decouple.export import programs

    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    config, weights = exported[1]
    arguments = ["--config-file", str(config), "--weights", str(weights)]
    assert main([*arguments, "--output", str(tmp_path / "a.onnx")]) == 1
    complaint = capsys.readouterr().err
    assert "onnx and onnxscript must be installed; type: pip install onnx onnxscript" in complaint
    assert not (tmp_path / "a.onnx").exists()
