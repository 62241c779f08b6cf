# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation: boxes come back to the original image, and one suppression ends it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import ImageList, Instances
from PIL import Image
from torch import Tensor, nn
from util import excite, tiny_model

from d2_decouple.modeling import BestPairs, HardNMS, Selection, augmented, class_score
from d2_decouple.structures import DensePredictions


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return excite(tiny_model()).eval()


def image_of(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def augment(model: Any, **changes: Any) -> Any:
    arguments = {"short_edge_lengths": [64], "max_size": 200, "flip": False, **changes}
    return augmented.TestTimeAugmentation(model, **arguments).eval()


def plain(model: Any, item: dict[str, Any], length: int = 64) -> Instances:
    """The detector's own answer to the resized image."""
    array = item["image"].permute(1, 2, 0).numpy()
    resize = T.ResizeShortestEdge(length, 200).get_transform(array)
    resized = torch.as_tensor(resize.apply_image(array).transpose(2, 0, 1).copy())
    height, width = array.shape[:2]
    with torch.no_grad():
        (result,) = model([{"height": height, "width": width, **item, "image": resized}])
    return result["instances"]


def same(found: Instances, want: Instances) -> None:
    assert found.image_size == want.image_size
    assert len(found) == len(want) > 5
    assert torch.equal(found.pred_classes, want.pred_classes)
    torch.testing.assert_close(found.scores, want.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found.pred_boxes.tensor, want.pred_boxes.tensor, atol=1e-4, rtol=1e-5
    )


SIZES = [
    {"image": image_of(64, 96)},
    {"image": image_of(45, 67)},  # odd
    {"image": image_of(130, 61)},  # upright
    {"image": image_of(45, 67), "height": 91, "width": 133},
    {"image": image_of(40, 300)},  # the long side is limited
]


@pytest.mark.parametrize("item", SIZES)
def test_one_size_without_flip_is_the_plain_detector(model: Any, item: dict[str, Any]) -> None:
    (result,) = augment(model)([item])
    same(result["instances"], plain(model, item))
    assert (result["instances"].variant_index == 0).all()
    assert not result["instances"].has("location_index")


def test_several_images_are_answered_one_by_one(model: Any) -> None:
    tta = augment(model, short_edge_lengths=[48, 64], flip=True)
    together = tta(SIZES)
    assert len(together) == len(SIZES)
    for item, result in zip(SIZES, together, strict=True):
        same(result["instances"], tta([item])[0]["instances"])
    assert tta([]) == []


def test_variants_are_suppressed_together(model: Any) -> None:
    """The best of all variants survive, and no two of a class overlap by more than allowed."""
    item = SIZES[0]
    (result,) = augment(model, short_edge_lengths=[48, 64], flip=True)([item])
    found = result["instances"]
    assert set(found.variant_index.tolist()) == {0, 1, 2, 3}
    best = max(plain(model, item, length).scores.max().item() for length in (48, 64))
    assert found.scores[0].item() >= best - 1e-4
    assert len(found) <= model.selection.max_detections_per_image
    again = HardNMS(test_nms_thresh=model.selection.nms.test_nms_thresh + 1e-4)(found)
    assert len(again) == len(found)


def where_it_is_white(batched_inputs: list[dict[str, Any]]) -> Any:
    """In place of ``OneStageDetector.predict``: one box around the white pixels of an image."""
    (image,) = (item["image"] for item in batched_inputs)
    rows, columns = (image[0] > 127).nonzero(as_tuple=True)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    predictions = DensePredictions(
        logits=torch.zeros(1, 1, 1),
        boxes=torch.tensor(box, dtype=torch.float32).reshape(1, 1, 4),
        quality=None,
        locations=torch.zeros(1, 2),
        strides=torch.ones(1),
        priors=torch.zeros(1, 4),
        level_sizes=(1,),
        extras={},
    )
    return ImageList.from_tensors([image], 32), [], predictions


@pytest.mark.parametrize("size", [(40, 60), (50, 30)])
def test_boxes_come_back_exactly(
    monkeypatch: pytest.MonkeyPatch, model: Any, size: tuple[int, int]
) -> None:
    """A white rectangle, found at every size in both directions, has always the same corners.

    The widths are no multiples of 32: a box mirrored about the padded width would be far off.
    """
    everything = Selection(
        score=class_score,
        candidates=BestPairs(test_score_thresh=0.1, test_topk_candidates=10),
        nms=lambda candidates: candidates,
    )
    monkeypatch.setattr(model, "selection", everything)
    monkeypatch.setattr(model, "predict", where_it_is_white)
    height, width = size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 10:30, 5:20] = 255
    short = min(size)
    tta = augment(model, short_edge_lengths=[short, 2 * short, 3 * short], flip=True)
    (result,) = tta([{"image": image, "height": 3 * height, "width": 2 * width}])
    found = result["instances"]
    assert found.image_size == (3 * height, 2 * width)
    want = torch.tensor([10.0, 30.0, 40.0, 90.0]).expand(6, 4)
    torch.testing.assert_close(found.pred_boxes.tensor, want)
    assert found.variant_index.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_symmetric_image_has_symmetric_candidates(
    monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    half = image_of(64, 33)
    image = torch.cat((half, half.flip(-1)), dim=-1)
    monkeypatch.setattr(model.selection, "nms", lambda candidates: candidates)
    monkeypatch.setattr(model.selection, "max_detections_per_image", 10_000)
    (result,) = augment(model, flip=True)([{"image": image}])
    found = result["instances"]
    first, second = (found[found.variant_index == index] for index in (0, 1))
    assert len(first) == len(second) > 20
    left, top, right, bottom = first.pred_boxes.tensor.unbind(-1)
    mirrored = torch.stack((66 - right, top, 66 - left, bottom), dim=-1)
    torch.testing.assert_close(second.pred_boxes.tensor, mirrored)
    torch.testing.assert_close(second.scores, first.scores)
    assert not torch.allclose(first.pred_boxes.tensor, mirrored, atol=1)


def test_boxes_end_in_the_original_image(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Also where the selection cuts nothing; what lies outside is no detection."""
    monkeypatch.setattr(model.selection, "clip", None)
    (result,) = augment(model, flip=True)([SIZES[3]])
    boxes = result["instances"].pred_boxes.tensor
    assert (boxes == 0).any()
    assert (boxes[:, 2] == 133).any()
    assert (boxes.amin() >= 0) & (boxes <= torch.tensor([133, 91, 133, 91])).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_nothing_found(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    nothing = BestPairs(test_score_thresh=1.0, test_topk_candidates=10)
    monkeypatch.setattr(model.selection, "candidates", nothing)
    (result,) = augment(model, flip=True)([SIZES[1]])
    assert len(result["instances"]) == 0
    assert result["instances"].image_size == (45, 67)
    assert result["instances"].variant_index.shape == (0,)


def test_a_file_is_read_in_the_order_of_the_detector(model: Any, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (45, 67, 3), dtype=np.uint8)  # RGB
    Image.fromarray(array).save(tmp_path / "image.png")
    (from_file,) = augment(model)([{"file_name": str(tmp_path / "image.png")}])
    bgr = torch.from_numpy(array[:, :, ::-1].transpose(2, 0, 1).copy())
    (from_array,) = augment(model)([{"image": bgr}])
    same(from_file["instances"], from_array["instances"])


def test_random_numbers_are_left_alone(model: Any) -> None:
    """An evaluation in the middle of a training must not change what follows."""
    np.random.seed(3)
    torch.manual_seed(3)
    want = np.random.random(), torch.rand(1)
    np.random.seed(3)
    torch.manual_seed(3)
    augment(model, flip=True)([SIZES[0]])
    assert (np.random.random(), torch.rand(1)) == want


def test_weights_follow_the_detector(model: Any) -> None:
    tta = augment(model)
    assert tta.model is model
    assert not tta.train().eval().model.training


def test_wrong_use(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    with pytest.raises(TypeError, match=r"needs a OneStageDetector .*, got Linear"):
        augment(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"short_edge_lengths=\[\], max_size=200"):
        augment(model, short_edge_lengths=[])
    with pytest.raises(ValueError, match=r"short_edge_lengths=\[64, 0\]"):
        augment(model, short_edge_lengths=[64, 0])
    with pytest.raises(ValueError, match=r"'image' or 'file_name', got only \['height'\]"):
        augment(model)([{"height": 3}])
    training = augment(model)
    training.train()
    with pytest.raises(RuntimeError, match=r"call \.eval\(\) first"):
        training([SIZES[0]])
    model.eval()
    monkeypatch.setattr(model, "selection", lambda predictions, sizes: [])
    with pytest.raises(TypeError, match=r"whose selection is a function"):
        augment(model)
