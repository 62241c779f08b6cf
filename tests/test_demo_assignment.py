# SPDX-License-Identifier: Apache-2.0
"""The demo's --show-assignment: its pictures, its JSON, where it finds objects, what it refuses."""

import json

import numpy as np
import pytest
from demo_runs import CLASSES, demo_of, save_picture, write_trained, written
from PIL import Image

from d2_decouple import demo
from d2_decouple.data.annotations import open_annotations
from d2_decouple.demo_assignment import _shown, _split, build_predictor
from d2_decouple.engine.predictor import Predictor
from d2_decouple.visualization import draw_assignment

FCOS, GFL, TWO_STAGES = "fcos_R_18_FPN_bccd", "gfl_R_18_FPN_bccd", "faster_rcnn_R_18_FPN_bccd_d2"
XML = """<annotation><filename>{name}</filename>
<size><width>{size[0]}</width><height>{size[1]}</height></size>
<object><name>bee</name>
<bndbox><xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>50</ymax></bndbox></object>
</annotation>"""
BOX = [20.0, 10.0, 60.0, 50.0]  # VOC counts from 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("trained"), (FCOS, GFL, TWO_STAGES))


@pytest.fixture
def run(trained, tmp_path, capsys):
    return demo_of(trained, tmp_path, capsys, "--show-assignment", FCOS)


def annotated(image, size=(90, 60)):
    image.with_suffix(".xml").write_text(XML.format(name=image.name, size=size))
    return image


def test_pictures_and_json_hold_what_the_predictors_say(run, trained, tmp_path):
    image = annotated(save_picture(tmp_path / "in" / "a.png"))
    config, weights = trained[GFL]
    options = ["--json", "--show-assignment", "--compare", f"{config}:{weights}"]
    status, printed, complaint = run(image, options=options)
    assert (status, complaint) == (0, "")
    assert "1 of 1 files" in printed
    assert written(tmp_path / "out") == ["a.jpg", "a_assignment.jpg", "detections.json"]
    truth = open_annotations(None, CLASSES).objects(image, (60, 90))
    rows = []
    for name in (FCOS, GFL):
        predictor = Predictor.from_config(*trained[name], device="cpu", score_thresh=0.05)
        rows.append((name, predictor.assignment(image, truth)))
    expected = draw_assignment(np.asarray(Image.open(image)), rows, CLASSES)
    drawn = np.asarray(Image.open(tmp_path / "out" / "a_assignment.jpg"), dtype=float)
    assert drawn.shape == expected.shape
    assert abs(drawn - expected).mean() < 4  # JPEG
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content["levels"] == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    (record,) = content["images"]
    assert record["assignment_picture"] == "a_assignment.jpg"
    assert len(record["detections"]) == len(rows[0][1].instances) > 0
    assert "assignment" not in record["detections"][0]
    assert [x["model"] for x in record["assignment"]] == [FCOS, GFL]
    assert [x["assigner"] for x in record["assignment"]] == ["FCOSAssigner", "GFLAssigner"]
    for got, (_, seen) in zip(record["assignment"], rows, strict=True):
        (thing,) = got["objects"]
        assert (thing["class"], thing["class_id"], thing["bbox"]) == ("bee", 1, BOX)
        assert thing["learned_by"] == seen.as_records()[0]["learned_by"] != {}


def test_an_image_without_annotation_is_named_and_the_others_are_drawn(run, tmp_path):
    lonely = save_picture(tmp_path / "in" / "b.png")
    image = annotated(save_picture(tmp_path / "in" / "a.png"))
    larger = annotated(save_picture(tmp_path / "in" / "c.png"), size=(91, 60))
    status, printed, complaint = run(image, lonely, larger)
    assert status == 1
    assert "1 of 3 files" in printed
    first, second = complaint.splitlines()
    assert f"skipped: {lonely} has no annotation: looked for {lonely.with_suffix('.xml')}" in first
    assert "type --annotations with a COCO file, a VOC folder, " in first
    assert "c.png is 90 x 60 pixels as it is displayed, its annotation is for 91 x 60" in second
    assert written(tmp_path / "out") == ["a.jpg", "a_assignment.jpg"]


def test_random_weights_and_the_warning_where_they_say_nothing(trained, tmp_path, capsys):
    images = [annotated(save_picture(tmp_path / "in" / name)) for name in ("a.png", "b.png")]
    for image in images:  # what the recipe's own test set calls its classes
        file = image.with_suffix(".xml")
        file.write_text(file.read_text().replace("bee", "WBC"))
    arguments = ["--config-file", str(trained[FCOS][0]), "--input", *map(str, images)]
    arguments += ["--output", str(tmp_path / "out"), "--show-assignment", "--device", "cpu"]
    assert demo.main([*arguments, "--compare", str(trained[GFL][0])]) == 0
    printed, complaint = capsys.readouterr()
    assert f"{trained[FCOS][0]} with random weights: 3 classes" in printed
    assert complaint.count("\n") == 1  # once, and not of FCOS
    assert complaint.startswith(f"warning: {GFL}, random weights: GFLAssigner assigns by what")
    assert "give its weights (--weights FILE, or --compare NAME:FILE)" in complaint
    one, two = (build_predictor(str(trained[FCOS][0]), None, device="cpu") for _ in range(2))
    assert one.classes == ("RBC", "WBC", "Platelets")
    for name, x in one.model.state_dict().items():
        assert x.equal(two.model.state_dict()[name]), name


def test_names_of_models(tmp_path):
    assert _split("fcos_R_50_FPN_1x") == ("fcos_R_50_FPN_1x", None)
    assert _split("fcos_R_50_FPN_1x:a:b.pth") == ("fcos_R_50_FPN_1x", "a:b.pth")
    assert _split("nothing") == ("nothing", None)
    strange = tmp_path / "a:b.py"
    strange.touch()
    assert _split(str(strange)) == (str(strange), None)
    assert _shown("fcos_R_50_FPN_1x", "f.pth") == "fcos_R_50_FPN_1x"
    assert _shown("folder/mine.py", None) == "mine, random weights"
    assert _shown(str(tmp_path / "config.yaml"), "f.pth") == tmp_path.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--annotations", "x.json"], "--annotations goes with --show-assignment; add that"),
        (["--compare", FCOS], "--compare goes with --show-assignment; add that, or leave it out"),
        ([], "the following arguments are required: --weights"),
        (["--show-assignment", "--show-context"], "not allowed with argument --show-assignment"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, message):
    weights = ["--weights", "x.pth"] if options else []
    arguments = ["--config-file", FCOS, "--output", str(tmp_path / "out"), "--input", "a.png"]
    with pytest.raises(SystemExit, match="2"):
        demo.main([*arguments, *weights, *options])
    assert message in capsys.readouterr().err


def test_what_cannot_be_shown_stops_before_anything_is_written(run, trained, tmp_path):
    image = annotated(save_picture(tmp_path / "in" / "a.png"))
    for options, recipe, message in (
        (["--annotations", "no_such_set"], FCOS, "no such file or folder; unknown dataset"),
        (["--compare", "no_such_recipe"], FCOS, "no_such_recipe"),
        (["--compare", FCOS], FCOS, "it knows the classes RBC, WBC, Platelets, "),
        (["--tta"], FCOS, "--show-assignment shows how one look at an image"),
        ([], TWO_STAGES, "GeneralizedRCNN is not a OneStageDetector"),
        (["--compare", ":".join(map(str, trained[TWO_STAGES]))], FCOS, "not a OneStageDetector"),
    ):
        status, _, complaint = run(image, recipe=recipe, options=["--show-assignment", *options])
        assert status == 1
        assert complaint.startswith("error: ")
        assert message in complaint
        assert complaint.count("\n") == 1
        assert not (tmp_path / "out").exists() or written(tmp_path / "out") == []
