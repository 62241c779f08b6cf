# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2_decouple.visualization import class_colors, compare, draw_boxes, plot_curves, read_metrics
from d2_decouple.visualization.curves import _smooth

GRAY = 128
RED, BLUE = (255, 0, 0), (0, 0, 255)


def write_metrics(file, *entries):
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def training(iterations, **more):
    return [
        {"iteration": i, "loss_cls": 1.0 + (i // 20) % 2, "total_loss": 3.0, "lr": 0.01, **more}
        for i in range(0, iterations, 20)
    ]


def picture(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_metrics_are_read_in_order_and_later_lines_count(tmp_path):
    file = write_metrics(
        tmp_path / "metrics.json",
        {"iteration": 39, "total_loss": 9.0, "note": "text"},
        {"iteration": 59, "total_loss": 2.0, "bbox/AP": float("nan")},
        {"iteration": 39, "total_loss": 3.0},  # a resumed training writes 39 again
        {"iteration": 19, "total_loss": 4},
    )
    metrics = read_metrics(file)
    assert metrics["total_loss"].tolist() == [[19, 4], [39, 3], [59, 2]]
    assert np.isnan(metrics["bbox/AP"][0, 1])
    assert metrics.keys() == {"total_loss", "bbox/AP"}


def test_curves_show_losses_and_precision(tmp_path):
    entries = [*training(1000), {"iteration": 499, "bbox/AP": 20.0, "bbox/AP50": 40.0}]
    pictures = []
    for number, changed in enumerate([{}, {"loss_cls": 1.0}, {"lr": 0.001}, {"bbox/AP": 60.0}]):
        last = {"iteration": 999, "bbox/AP": 30.0, "bbox/AP50": 50.0, "loss_cls": 0.1, "lr": 0.01}
        file = write_metrics(tmp_path / "metrics.json", *entries, {**last, **changed})
        plot_curves(file, tmp_path / "new" / f"{number}.png")
        pictures.append(picture(tmp_path / "new" / f"{number}.png"))
    assert pictures[0].shape == (552, 1440, 3)
    differs = [(pictures[0] != other).any(axis=(0, 2)) for other in pictures[1:]]
    half = pictures[0].shape[1] // 2
    assert [(left[:half].any(), left[half:].any()) for left in differs] == [
        (True, False),  # a loss: left
        (True, False),  # the learning rate: left
        (False, True),  # the precision: right
    ]


def test_losses_are_drawn_smooth_and_as_logged(tmp_path):
    # The loss jumps between 1 and 2 all the time; 60 columns of the plot clear of the legend.
    plot_curves(write_metrics(tmp_path / "m.json", *training(4000)), tmp_path / "curves.png")
    part = picture(tmp_path / "curves.png")[:, 300:360].astype(int)
    blue = (part[..., 2] - part[..., 0] > 20).any(axis=1)  # the smoothed loss is all but flat
    strong = (np.abs(part - (0x00, 0x72, 0xB2)) <= 40).all(axis=2).any(axis=1)
    assert 1 <= strong.sum() <= 12
    assert blue.sum() > 100


def test_smoothing_does_not_lag_and_leaves_gaps_out():
    ramp = np.arange(64.0)
    smooth = _smooth(ramp)  # the mean of 9 values, 4 on each side
    assert smooth[4:-4] == pytest.approx(ramp[4:-4])
    assert smooth[0] == pytest.approx(2)  # 0..4
    ramp[10] = np.nan
    assert _smooth(ramp)[10] == pytest.approx(10)
    assert np.isnan(_smooth(np.array([np.inf]))).all()


@pytest.mark.parametrize(
    "entries",
    [
        [{"iteration": 0, "total_loss": 1.0}],
        [{"iteration": 9, "bbox/AP": float("nan"), "bbox/AP50": 1.0}],
        [{"iteration": 0, "loss_cls": float("nan")}, {"iteration": 1, "loss_cls": float("inf")}],
        [{"iteration": 0, "loss_a": 0.0, "lr": 0.0}, {"iteration": 9, "loss_a": -1.0, "lr": 0.0}],
        [{"iteration": 0, "data_time": 1.0}],
        training(100_000),
    ],
    ids=["one line", "nan precision", "nan loss", "negative", "other metrics", "long"],
)
@pytest.mark.filterwarnings("error")
def test_curves_of_unusual_trainings(tmp_path, entries):
    plot_curves(write_metrics(tmp_path / "metrics.json", *entries), tmp_path / "curves.png")
    assert picture(tmp_path / "curves.png").std() > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"metrics\.json has no metrics: training stopped before its first report"),
        ('{"iteration": 3}\n', "has no metrics"),
        ('{"iteration": 3, "lr": 1}\n{"iter', r"metrics\.json, line 2: not JSON"),
        ('{"lr": 1}\n', "line 1: wanted an object with an integer 'iteration'"),
        ("[1]\n", "line 1: wanted an object"),
    ],
)
def test_a_bad_metrics_file_is_named(tmp_path, text, message):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        plot_curves(tmp_path / "metrics.json", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_missing_metrics_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics at .*absent\.json; .*output_dir"):
        plot_curves(tmp_path / "absent.json", tmp_path / "curves.png")


def test_matplotlib_is_left_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_curves(write_metrics(tmp_path / "m.json", *training(100)), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, d2_decouple.visualization as v; v.plot_curves(*sys.argv[1:]); "
        "print([name for name in ('matplotlib.pyplot', 'torch', 'detectron2') "
        "if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m.json"), str(tmp_path / "again.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (picture(tmp_path / "again.png") == picture(tmp_path / "curves.png")).all()


def gray_image(height=100, width=160):
    return np.full((height, width, 3), GRAY, dtype=np.uint8)


def count(image, color):
    return int((image == color).all(axis=2).sum())


def test_a_box_is_drawn_where_it_is():
    image = gray_image()
    drawn = draw_boxes(image, np.array([[40, 50, 80, 90]]), [""], colors=[RED])
    changed = (drawn != image).any(axis=2)
    assert (image == GRAY).all()
    rows, columns = np.nonzero(changed)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (40, 50, 80, 90)
    assert not changed[52:89, 42:79].any()
    assert (drawn[changed] == RED).all()


def test_labels_and_scores_are_drawn():
    box = np.array([[40, 50, 80, 90]])
    bare, label, other, score = (
        draw_boxes(gray_image(), box, [text], scores, [RED])
        for text, scores in (("", None), ("cell", None), ("cull", None), ("cell", [0.5]))
    )
    assert count(label, RED) > count(bare, RED)
    assert (label != other).any()
    # The label lies above the box and ends where its text does.
    labels = [
        np.nonzero((drawn != GRAY).any(axis=2)[:50].any(axis=0))[0] for drawn in (label, score)
    ]
    assert [columns.min() for columns in labels] == [40, 40]
    assert labels[1].max() > labels[0].max() + 15


def test_labels_stay_in_the_picture_and_clear_of_each_other():
    corners = [[0, 0, 30, 30], [130, 0, 160, 30], [0, 70, 30, 100], [130, 70, 160, 100]]
    for corner in corners:
        free = draw_boxes(
            gray_image(300, 300), np.array([[100, 100, 130, 130]]), ["HMH"], colors=[RED]
        )
        drawn = draw_boxes(gray_image(), np.array([corner]), ["HMH"], colors=[RED])
        # A label that was cut off would leave less of the text's white behind.
        assert count(drawn, (255, 255, 255)) == count(free, (255, 255, 255)) > 0
    twins = np.array([[60, 40, 100, 80], [60, 40, 100, 80]])
    drawn = draw_boxes(gray_image(), twins, ["HMH", "HMH"], colors=[RED, BLUE])
    alone = draw_boxes(gray_image(), twins[:1], ["HMH"], colors=[RED])
    assert count(drawn, (255, 255, 255)) == 2 * count(alone, (255, 255, 255))


def test_pictures_are_enlarged_with_their_boxes():
    drawn = draw_boxes(gray_image(), np.array([[40, 50, 80, 90]]), [""], colors=[RED], scale=2.5)
    assert drawn.shape == (250, 400, 3)
    rows, columns = np.nonzero((drawn != GRAY).any(axis=2))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (100, 125, 200, 225)


def test_no_boxes_is_normal():
    assert (draw_boxes(gray_image(), np.zeros((0, 4)), []) == GRAY).all()
    assert (draw_boxes(gray_image(), np.zeros((0, 4)), [], scores=[], colors=[]) == GRAY).all()


def test_boxes_outside_the_image_or_without_area_do_not_matter():
    boxes = np.array([[-50, -50, 30, 30], [500, 500, 600, 600], [20, 20, 20, 20], [80, 80, 60, 60]])
    drawn = draw_boxes(gray_image(), boxes, ["a", "b", "c", "d"])
    assert drawn.shape == (100, 160, 3)
    assert all(count(drawn, color) for color in class_colors(4))


@pytest.mark.parametrize(
    ("image", "boxes", "labels", "scores", "message"),
    [
        (gray_image() / 255, [[0, 0, 1, 1]], ["a"], None, r"got \(100, 160, 3\) of float64"),
        (gray_image()[..., 0], [[0, 0, 1, 1]], ["a"], None, r"got \(100, 160\) of uint8"),
        (gray_image(), [[0, 0, 1, 1]], ["a", "b"], None, "1 boxes, but 2 labels"),
        (gray_image(), [[0, 0, 1, 1]], ["a"], [], "1 boxes, but 0 scores"),
        (
            gray_image(),
            [[0, 0, np.nan, 1]],
            ["a"],
            None,
            r"box \[ *0\. +0\. +nan +1\.\] is not fin",
        ),
    ],
)
def test_what_cannot_be_drawn_is_named(image, boxes, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        draw_boxes(image, np.array(boxes), labels, scores)


def test_colors_are_distinct_and_do_not_depend_on_their_number():
    many = class_colors(80)
    assert len(set(many)) == 80
    assert class_colors(3) == many[:3]
    assert class_colors(0) == []


def truth(boxes, classes, size=(100, 160)):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def found(boxes, classes, scores, size=(100, 160)):
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    instances.scores = torch.tensor(scores)
    return instances


def test_comparison_shows_truth_left_and_predictions_right():
    boxes = [[10, 40, 50, 80], [90, 40, 130, 80]]
    image, names = gray_image(), ("cat", "dog")
    both = compare(
        image, truth(boxes, [0, 1]), found(boxes, [1, 1], [0.9, 0.8]), names, score_thresh=0.5
    )
    width = (both.shape[1] - 12) // 2
    left, right = both[:, :width], both[:, -width:]
    assert width == 800  # small images are enlarged
    assert both.shape[0] > 500  # and carry a title
    cat, dog = class_colors(2)
    assert count(left, cat) > 100
    assert count(left, dog) > 100
    assert count(right, cat) == 0
    assert count(right, dog) > count(left, dog)
    assert (both[-1, width : width + 12] == 255).all()


def test_comparison_leaves_low_scores_out():
    boxes = [[10, 40, 50, 80], [90, 40, 130, 80]]
    image, names, objects = gray_image(), ("cat", "dog"), truth(boxes, [0, 1])
    low = compare(image, objects, found(boxes, [0, 1], [0.9, 0.5]), names, score_thresh=0.5)
    one = compare(image, objects, found(boxes[:1], [0], [0.9]), names, score_thresh=0.5)
    two = compare(image, objects, found(boxes, [0, 1], [0.9, 0.6]), names, score_thresh=0.5)
    assert (low == one).all()  # titles with their counts included
    assert (two != one).any()
    assert (two[:, :800] == one[:, :800]).all()


def test_comparison_of_nothing():
    empty = compare(gray_image(), truth([], []), found([], [], []), ("cat",), score_thresh=0.5)
    assert (empty[-600:, :800][100:] == GRAY).all()


@pytest.mark.parametrize("wrong", ["ground_truth", "detections"])
def test_comparison_wants_the_images_own_frame(wrong):
    sizes = {"ground_truth": (100, 160), "detections": (100, 160), wrong: (50, 80)}
    with pytest.raises(ValueError, match=rf"{wrong} are for .* \(50, 80\).* \(100, 160\)"):
        compare(
            gray_image(),
            truth([], [], sizes["ground_truth"]),
            found([], [], [], sizes["detections"]),
            ("cat",),
            score_thresh=0.5,
        )
