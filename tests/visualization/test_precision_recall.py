# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from d2_decouple.visualization import class_colors
from d2_decouple.visualization.precision_recall import best_f1, plain_text, plot_precision_recall

RECALL = np.linspace(0, 1, 101)


def draw(folder, precision, names, thresholds=(0.5, 0.75)):
    precision = np.asarray(precision, dtype=float)
    file = folder / "new" / "curves.png"
    plot_precision_recall(
        precision, np.full_like(precision, 0.4), names, file, iou_thresholds=thresholds
    )
    assert [path.name for path in file.parent.iterdir()] == ["curves.png"]
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def curves(*ends, panels=2):
    """For each class precision 1 up to a recall, then 0."""
    each = np.stack([np.where(end >= RECALL, 1.0, 0.0) for end in ends], axis=1)
    return np.stack([each] * panels)


def has(picture, color):
    return (np.abs(picture.astype(int) - color) <= 12).all(axis=2)


def test_best_f1_by_hand():
    # F1 of (0.5, 1) is 2/3, of (0.8, 0.8) 0.8, of (1, 0.5) 2/3.
    assert best_f1(np.array([0.5, 0.8, 1.0]), np.array([1.0, 0.8, 0.5])) == 1
    assert best_f1(np.zeros(3), np.zeros(3)) == 0


def test_each_class_has_its_color_in_each_panel(tmp_path):
    picture = draw(tmp_path, curves(0.9, 0.5), ["a", "b"])
    half = picture.shape[1] // 2
    for color in class_colors(2):
        drawn = has(picture, color)
        assert drawn[:, :half].sum() > 100
        assert drawn[:, half:].sum() > 100
    assert not has(picture, class_colors(3)[2]).any()


def test_a_curve_ends_where_recall_ends(tmp_path):
    color = class_colors(1)[0]
    widths = []
    for end in (0.3, 0.6):
        drawn = has(draw(tmp_path, curves(end, panels=1), ["a"], [0.5]), color)
        widths.append(np.ptp(np.flatnonzero(drawn.any(axis=0))))
    assert widths[1] > 1.5 * widths[0]


def test_many_classes_are_faint_behind_their_mean(tmp_path):
    ends = np.linspace(0.2, 0.9, 20)
    picture = draw(tmp_path, curves(*ends), [f"class {i}" for i in range(20)])
    assert has(picture, ImageColor.getrgb("#222222")).sum() > 200
    assert not any(has(picture, color).sum() > 20 for color in class_colors(8))


@pytest.mark.parametrize("known", [0, 1])
def test_classes_without_objects_are_left_out(tmp_path, known):
    precision = curves(0.8, 0.8)
    precision[..., known:] = np.nan
    picture = draw(tmp_path, precision, ["a", "b"])
    assert has(picture, class_colors(1)[0]).any() == bool(known)
    assert not has(picture, class_colors(2)[1]).any()


@pytest.mark.parametrize("name", ["$x_{$", "a$b$c", "_a", "US$"])
def test_names_are_drawn_letter_by_letter(tmp_path, name):
    draw(tmp_path, curves(0.8), [name])  # not a formula, which might be a wrong one
    axes = Figure().subplots()
    axes.plot([1], label=plain_text(name))
    (text,) = axes.legend().get_texts()
    assert text._preprocess_math(text.get_text()) == (text.get_text().replace(r"\$", "$"), False)
    assert text.get_text().replace(r"\$", "$").strip() == name


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    draw(tmp_path, curves(0.8), ["a"])
    before = (tmp_path / "new" / "curves.png").read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("d2_decouple.visualization.precision_recall.os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        draw(tmp_path, curves(0.3), ["a"])
    assert (tmp_path / "new" / "curves.png").read_bytes() == before
    assert len(list((tmp_path / "new").iterdir())) == 1
