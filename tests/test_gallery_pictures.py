# SPDX-License-Identifier: Apache-2.0
"""The gallery's pictures: which objects they show, and that each panel is the right one."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from gallery_scenes import CLASSES, predictor_of, scene_of, write_gallery
from PIL import Image
from util import make_instances

from d2_decouple import gallery, gallery_pictures
from d2_decouple.analysis.pictures import Panel
from d2_decouple.evaluation import GroundTruth
from d2_decouple.gallery_layout import captioned, jpeg_within, listed, rows_of
from d2_decouple.gallery_models import ATSS, DECOUPLED_RCNN, FCOS, PDNET, Weights
from d2_decouple.gallery_pictures import Scene, Shot, middle_objects
from d2_decouple.visualization import draw_stages
from d2_decouple.visualization.assignment_panel import draw_level, level_cells, object_colors
from d2_decouple.visualization.context_panel import draw_heat, ground_of
from d2_decouple.visualization.page import GAP, title_strip
from d2_decouple.visualization.point_panel import draw_panel, reading_of

STRIP = title_strip("", 9).shape[0]  # pixels: height of a title


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    models = (ATSS, DECOUPLED_RCNN, FCOS, PDNET)
    return write_gallery(tmp_path_factory.mktemp("trained"), models)


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(256, size=(480, 640, 3), dtype=np.uint8)


@pytest.fixture
def all_count(monkeypatch):
    """Detections of random weights score low."""
    monkeypatch.setattr(gallery_pictures, "SCORE_THRESH", -1.0)


def test_the_object_of_middle_area_that_is_not_cut():
    # Areas of class 0: 100, 400, 900 and, cut by the left edge, 25; the middle one is 400, and
    # would be 100 with what is cut.
    # Class 2: 1 and 4, both cut by the lower edge: the smaller one of two is the middle.
    boxes = [[10, 10, 40, 40], [10, 10, 20, 20], [0, 10, 5, 15], [10, 10, 30, 30]]
    boxes += [[50, 98, 52, 100], [60, 99, 61, 100]]
    truth = make_instances((100, 200), boxes, [0, 0, 0, 0, 2, 2])
    assert middle_objects(truth) == (3, 5)
    assert middle_objects(make_instances((100, 200), [], [])) == ()


def test_points_of_the_objects_that_were_found(trained, noise, all_count):
    predictor = predictor_of(trained, PDNET)
    seen = predictor.points(noise)
    scene = scene_of(seen.instances)
    (drawn,) = gallery_pictures.point_pictures(scene, {"P": predictor})
    for place in range(2):
        panel = draw_panel(noise, reading_of(seen, place, 3), seen.level_names, side=380)
        left = GAP + place * (380 + GAP)
        assert np.array_equal(drawn.pixels[2 * STRIP : 2 * STRIP + 380, left : left + 380], panel)
    assert drawn.alt == f"Image 1: the points at which P read {scene.listed(scene.shots[0])}"


def test_context_of_the_objects_that_were_found(trained, noise, all_count):
    predictor = predictor_of(trained, ATSS)
    found = predictor(noise)
    (drawn,) = gallery_pictures.context_pictures(scene_of(found[[1, 0]]), {"A": predictor})
    seen = predictor.context(noise, limit=2)
    for place, index in enumerate((1, 0)):
        for branch in range(2):
            ground = ground_of(seen, index, 3)
            panel = draw_heat(noise, ground, ground.heats[branch], side=300)
            left = GAP + (2 * place + branch) * (300 + GAP)
            part = drawn.pixels[2 * STRIP : 2 * STRIP + len(panel), left : left + 300]
            assert np.array_equal(part, panel)


def test_stages_of_the_objects_that_were_found(trained, noise, all_count):
    predictor = predictor_of(trained, DECOUPLED_RCNN)
    found = predictor(noise)
    scene = scene_of(found[[3, 1]])
    (drawn,) = gallery_pictures.stage_pictures(scene, {"D": predictor})
    seen = predictor.stages(noise, gt_boxes=scene.shots[0].truth.gt_boxes)
    best = [gallery_pictures._detection_of(seen.instances, scene.shots[0], x) for x in range(2)]
    seen = seen._replace(instances=seen.instances[best])
    assert np.array_equal(drawn.pixels, draw_stages(noise, seen, CLASSES, limit=2))


def test_cells_of_all_label_sets_three_beside_each_other(trained, noise):
    models = {x.title: predictor_of(trained, x) for x in (ATSS, PDNET, FCOS)}
    scene = scene_of(models["ATSS"](noise))
    first, second = gallery_pictures.assignment_pictures(scene, models)
    assert first.alt.endswith("; ATSS, PDNet: class and final box, PDNet: coarse box")
    assert second.alt.endswith("object; FCOS")
    shot = scene.shots[0]
    boxes = shot.truth.gt_boxes.tensor.numpy()
    seen = models["PDNet"].assignment(noise, shot.truth)
    used = models["ATSS"].assignment(noise, shot.truth).sets + seen.sets
    level = min(level for x in used for level in x.levels.tolist())
    cells = level_cells(seen.sets[1], level)
    count = len(np.unique(cells.squares, axis=0))
    panel = draw_level(
        noise,
        cells,
        boxes,
        object_colors(boxes),
        side=430,
        title="PDNet: coarse box",
        note=f"{count} cell{'' if count == 1 else 's'}",
    )
    left = GAP + 2 * (430 + GAP)
    part = first.pixels[STRIP : STRIP + len(panel), left : left + 430]
    assert np.array_equal(part, panel)


def test_an_object_is_found_by_its_class_its_place_and_its_score():
    truth = make_instances((100, 100), [[10, 10, 30, 30]], [1])
    shot = Shot(name="", pixels=np.zeros((100, 100, 3), np.uint8), truth=truth, chosen=(0,))

    def found(*rows):
        table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        return Instances(
            (100, 100),
            pred_boxes=Boxes(table[:, :4]),
            scores=table[:, 4],
            pred_classes=table[:, 5].long(),
        )

    exact, half = [10, 10, 30, 30], [10, 10, 30, 20]  # IoU 1, and 200 / 400
    detection_of = gallery_pictures._detection_of
    assert detection_of(found([*half, 0.9, 1], [*exact, 0.4, 1]), shot, 0) == 1
    assert detection_of(found([*exact, 0.9, 2], [*half, 0.4, 1]), shot, 0) == 1
    assert detection_of(found([*exact, 0.3, 1], [*half, 0.31, 1]), shot, 0) == 1  # not above 0.3
    assert detection_of(found([10, 10, 30, 19, 0.9, 1]), shot, 0) is None  # IoU 0.45
    assert detection_of(found(), shot, 0) is None
    scene = Scene(
        dataset="",
        truth=GroundTruth(class_names=CLASSES, dataset_ids=(0, 1, 2), images={}),
        shots=(shot,),
    )
    missed = gallery_pictures._missed(scene, shot, 1, 0, 100)
    assert missed.shape == (STRIP + 100, 100, 3)
    assert (missed[STRIP:] == (70, 215, 240)).all(-1).any()  # the object's outline


def test_images_are_given_to_the_models_as_rgb(trained, noise):
    config, file = map(str, trained[ATSS.recipe])
    plain = predictor_of(trained, ATSS)
    scene = scene_of(plain(noise))
    built = gallery._predictor(Weights(config=config, file=Path(file), seed=None), scene, "cpu")
    assert torch.equal(built(noise).scores, plain(noise).scores)
    assert not torch.equal(built(noise[..., ::-1]).scores, plain(noise).scores)


def test_captions_are_broken_into_lines_that_fit():
    pixels = np.zeros((50, 200, 3), np.uint8)
    short = captioned(Panel(pixels, "one: two"))
    long = captioned(Panel(pixels, "one: " + "a few words " * 10))
    assert short.shape[1] == long.shape[1] == 200
    assert np.array_equal(short[STRIP : STRIP + 50], pixels)
    line = short.shape[0] - STRIP - 50 - 12
    count = (long.shape[0] - STRIP - 50 - 12) / line
    assert count == int(count) >= 4
    assert (long[-line - 6 :] < 128).any()  # something is written in the last line
    assert (long[:, -3:][STRIP + 50 :] == 255).all()  # and nothing is cut
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert rows_of([]).shape == (1, 1, 3)


def test_a_picture_is_made_small_enough():
    generator = np.random.default_rng(0)
    noise = generator.integers(256, size=(300, 2000, 3), dtype=np.uint8)
    plain = jpeg_within(np.full((300, 2000, 3), 200, np.uint8), 150_000)
    assert Image.open(io.BytesIO(plain)).size == (1400, 210)
    small = jpeg_within(noise, 20_000)
    assert len(small) <= 20_000
    assert Image.open(io.BytesIO(small)).width < 1400
    with pytest.raises(ValueError, match="no JPEG has 10 bytes or less"):
        jpeg_within(noise, 10)
