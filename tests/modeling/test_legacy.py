# SPDX-License-Identifier: Apache-2.0
"""Boxes of maskrcnn-benchmark: x2 and y2 are the last pixels inside, and leave as their ends."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.structures import ImageList
from torch import Tensor
from util import excite, make_instances, random_input, tiny

from d2_decouple.config import get_config
from d2_decouple.data.legacy import LegacyResizeShortestEdge
from d2_decouple.engine.predictor import Predictor
from d2_decouple.modeling import (
    BestPairs,
    HardNMS,
    OneStageDetector,
    Selection,
    TestTimeAugmentation,
    class_score,
)
from d2_decouple.modeling.legacy import LegacyBoxDetector, legacy_clip
from d2_decouple.structures import DensePredictions


def detector(kind: type = LegacyBoxDetector) -> Any:
    torch.manual_seed(0)
    cfg = tiny(get_config("fcos_R_50_FPN_1x")).model
    cfg._target_ = kind
    cfg.selection.clip = legacy_clip
    cfg.selection.nms.side_offset = 1.0
    return excite(instantiate(cfg)).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return detector()


CLIPPED = [
    # An image of 20 x 30 (H, W): the last pixel is (29, 19).
    ([3.0, 4.0, 9.5, 8.0], [3.0, 4.0, 9.5, 8.0]),
    ([-2.0, -0.5, 31.0, 20.0], [0.0, 0.0, 29.0, 19.0]),
    ([3.0, 4.0, 29.5, 19.0], [3.0, 4.0, 29.0, 19.0]),
    ([9.0, 4.0, 3.0, 8.0], [9.0, 4.0, 9.0, 8.0]),  # inverted: no length, at the greater end
    ([9.0, 8.0, 3.0, 4.0], [9.0, 8.0, 9.0, 8.0]),
    ([40.0, 4.0, 35.0, 8.0], [29.0, 4.0, 29.0, 8.0]),  # to the right of the image
    ([-9.0, -9.0, -3.0, -5.0], [0.0, 0.0, 0.0, 0.0]),
    ([40.0, 50.0, 3.0, 4.0], [29.0, 19.0, 29.0, 19.0]),
]


@pytest.mark.parametrize(("box", "want"), CLIPPED)
def test_clip(box: list[float], want: list[float]) -> None:
    found = legacy_clip(torch.tensor([box, box], dtype=torch.float64), (20, 30))
    assert found.dtype == torch.float64
    assert found.tolist() == [want, want]


def test_clip_of_nothing() -> None:
    assert legacy_clip(torch.zeros(0, 4), (20, 30)).shape == (0, 4)


def seeing(*boxes: Sequence[float]) -> Any:
    """In place of ``OneStageDetector.predict``: these boxes, the best first, in every image."""

    def predict(batched_inputs: Sequence[Mapping[str, Any]]) -> Any:
        images = ImageList.from_tensors([item["image"] for item in batched_inputs], 32)
        count, found = len(batched_inputs), torch.tensor(boxes, dtype=torch.float32)
        logits = 5 - torch.arange(float(len(boxes)))
        predictions = DensePredictions(
            logits=logits[None, :, None].expand(count, -1, -1),
            boxes=found.expand(count, -1, -1),
            quality=None,
            locations=torch.zeros(len(boxes), 2),
            strides=torch.ones(len(boxes)),
            priors=torch.zeros(len(boxes), 4),
            level_sizes=(len(boxes),),
            extras={},
        )
        return images, [], predictions

    return predict


SELECTION = Selection(
    score=class_score,
    candidates=BestPairs(test_score_thresh=0.1, test_topk_candidates=10),
    nms=HardNMS(test_nms_thresh=0.6, side_offset=1.0),
    clip=legacy_clip,
)
IMAGE = torch.zeros(3, 40, 60)
BOXES = [[10.0, 5.0, 20.0, 15.0], [30.0, 10.0, 30.0, 10.0], [50.0, 20.0, 70.0, 50.0]]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, model: Any) -> Any:
    monkeypatch.setattr(model, "predict", seeing(*BOXES))
    monkeypatch.setattr(model, "selection", SELECTION)
    return model


ANSWERS = {
    # By the (H, W) of the original; the image that is seen has (40, 60).
    (40, 60): [[10, 5, 21, 16], [30, 10, 31, 11], [50, 20, 60, 40]],
    (80, 120): [[20, 10, 41, 31], [60, 20, 61, 21], [100, 40, 119, 79]],
    (20, 120): [[20, 2.5, 41, 8.5], [60, 5, 61, 6], [100, 10, 119, 20]],
    (20, 30): [[5, 2.5, 11, 8.5], [15, 5, 16, 6], [25, 10, 30, 20]],
}


@pytest.mark.parametrize("size", ANSWERS)
def test_one_pixel_of_the_original_is_added(planted: Any, size: tuple[int, int]) -> None:
    """The second box has no length where it is found, and is a pixel; the third is cut off."""
    height, width = size
    item = {"image": IMAGE, "height": height, "width": width}
    (result,) = planted([item])
    found = result["instances"]
    assert found.image_size == size
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor(ANSWERS[size]).float())
    assert found.location_index.tolist() == [0, 1, 2]
    assert found.scores.argsort(descending=True).tolist() == [0, 1, 2]


def test_without_a_size_the_original_is_what_is_seen(planted: Any) -> None:
    for result in planted([{"image": IMAGE}, {"image": IMAGE}]):
        boxes = result["instances"].pred_boxes.tensor
        torch.testing.assert_close(boxes, torch.tensor(ANSWERS[40, 60]).float())


@torch.no_grad()
def test_it_is_the_host_but_for_that_pixel(model: Any) -> None:
    host = detector(OneStageDetector)
    host.load_state_dict(model.state_dict())
    inputs = [random_input((64, 96), 0), {**random_input((75, 53), 0), "height": 150, "width": 80}]
    for item, answer, plain in zip(inputs, model(inputs), host(inputs), strict=True):
        found, want = answer["instances"], plain["instances"]
        # The host drops what has no area in the resized image.
        found = found[torch.isin(found.location_index, want.location_index)]
        assert len(want) > 10
        assert torch.equal(found.scores, want.scores)
        boxes = want.pred_boxes.tensor + torch.tensor([0.0, 0, 1, 1])
        limit = torch.tensor([item["width"], item["height"]] * 2)
        torch.testing.assert_close(found.pred_boxes.tensor, torch.minimum(boxes, limit))


def test_it_trains_on_boxes_that_end_with_their_last_pixel(model: Any) -> None:
    """The first image was halved, so a pixel of its original is half of one; the last box has no
    more than that, and a box of theirs is never inverted. The second image has no other size.
    """
    host = detector(OneStageDetector).train()
    ours = detector().train()
    for part in (ours, host):
        part.load_state_dict(model.state_dict())
    boxes = [[8.0, 4.0, 40.0, 50.0], [60.0, 30.0, 60.25, 30.5]]
    plain = [make_instances((64, 96), boxes, [0, 1]), make_instances((64, 64), boxes[:1], [2])]
    theirs = [
        make_instances((64, 96), [[8.0, 4.0, 39.5, 49.5], [60.0, 30.0, 60.0, 30.0]], [0, 1]),
        make_instances((64, 64), [[8.0, 4.0, 39.0, 49.0]], [2]),
    ]
    images = [random_input((64, 96), 0), random_input((64, 64), 0)]
    images[0].update(height=128, width=192)
    del images[1]["height"], images[1]["width"]
    given = [{**item, "instances": x} for item, x in zip(images, plain, strict=True)]
    losses = ours(given)
    wanted = host([{**item, "instances": x} for item, x in zip(images, theirs, strict=True)])
    assert losses.keys() == wanted.keys()
    assert all(torch.equal(losses[name], wanted[name]) for name in losses)
    assert plain[0].gt_boxes.tensor.tolist() == boxes  # what was given stays as it was


def test_nothing_found(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    nothing = BestPairs(test_score_thresh=1.0, test_topk_candidates=10)
    monkeypatch.setattr(model.selection, "candidates", nothing)
    (result,) = model([{"image": IMAGE, "height": 7, "width": 9}])
    assert len(result["instances"]) == 0
    assert result["instances"].image_size == (7, 9)


def where_it_is_white(batched_inputs: Sequence[Mapping[str, Any]]) -> Any:
    """The first and the last white pixels of an image."""
    (image,) = (item["image"] for item in batched_inputs)
    rows, columns = (image[0] > 127).nonzero(as_tuple=True)
    box = [float(x) for x in (columns.min(), rows.min(), columns.max(), rows.max())]
    return seeing(box)([{"image": image}])


@pytest.mark.parametrize("size", [(40, 60), (50, 30)])
def test_augmented_boxes_come_back(
    monkeypatch: pytest.MonkeyPatch, model: Any, size: tuple[int, int]
) -> None:
    """White pixels 5 to 19 and 10 to 29; enlarged k times the last is 20k - 1, as 20 - 1/k."""
    everything = Selection(
        score=class_score,
        candidates=BestPairs(test_score_thresh=0.1, test_topk_candidates=10),
        nms=lambda candidates: candidates,
        clip=legacy_clip,
    )
    monkeypatch.setattr(model, "selection", everything)
    monkeypatch.setattr(model, "predict", where_it_is_white)
    height, width = size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 10:30, 5:20] = 255
    short = min(size)
    tta = TestTimeAugmentation(
        model, short_edge_lengths=[short, 2 * short], max_size=200, flip=True
    ).eval()
    (result,) = tta([{"image": image, "height": 3 * height, "width": 2 * width}])
    found = result["instances"].pred_boxes.tensor
    once = [10.0, 30.0, 2 * 19 + 1, 3 * 29 + 1]
    twice = [10.0, 30.0, 2 * 19.5 + 1, 3 * 29.5 + 1]
    torch.testing.assert_close(found, torch.tensor([once, once, twice, twice]))


@torch.no_grad()
def test_one_size_without_flip_is_the_detector(model: Any) -> None:
    image = torch.randint(256, (3, 45, 66), dtype=torch.uint8)
    resize, array = LegacyResizeShortestEdge(64, max_size=200), image.permute(1, 2, 0).numpy()
    tta = TestTimeAugmentation.around(model, [resize], short_edge_lengths=[64], flip=False)
    (found,) = tta([{"image": image}])
    resized = resize.get_transform(array).apply_image(array).transpose(2, 0, 1)
    assert resized.shape == (3, 64, 93)  # 93.87: Detectron2 makes it 94
    seen = torch.from_numpy(np.array(resized, order="C"))
    (want,) = model([{"image": seen, "height": 45, "width": 66}])
    boxes = found["instances"].pred_boxes.tensor, want["instances"].pred_boxes.tensor
    assert len(boxes[0]) > 10
    torch.testing.assert_close(*boxes, rtol=1e-5, atol=1e-4)


def test_augmentation_makes_sizes_as_those_of_the_test_images(
    monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    shapes, predict = [], model.predict

    def spy(items: Sequence[Mapping[str, Any]]) -> Any:
        shapes.append(tuple(items[0]["image"].shape[-2:]))
        return predict(items)

    monkeypatch.setattr(model, "predict", spy)
    image = torch.randint(256, (3, 48, 66), dtype=torch.uint8)
    for kind in (LegacyResizeShortestEdge, T.ResizeShortestEdge):
        TestTimeAugmentation.around(model, [kind(60, max_size=100)], flip=False)([{"image": image}])
    assert shapes[:3] == [(45, 61), (60, 82), (75, 103)]
    assert shapes[3:] == [(45, 62), (60, 83), (75, 103)]


def test_the_recipe_of_published_weights() -> None:
    """With the predictor: the image is as large as theirs, and what is found ends inside."""
    cfg = tiny(get_config("pdnet_R_50_FPN_2x_official"))
    model = excite(instantiate(cfg.model))
    assert type(model) is LegacyBoxDetector
    assert model.selection.clip is legacy_clip
    assert model.selection.nms.side_offset == model.assigner.side_offset == 1
    torch.testing.assert_close(
        model.pixel_mean.flatten(), torch.tensor([102.9801, 115.9465, 122.7717])
    )
    for mapper in (cfg.dataloader.train.mapper, cfg.dataloader.test.mapper):
        assert mapper.augmentations[0]._target_ is LegacyResizeShortestEdge
    test = cfg.dataloader.test.mapper.augmentations
    assert (test[0].short_edge_length, test[0].max_size) == (800, 1333)
    test[0].update(short_edge_length=80, max_size=133)
    predictor = Predictor(model, augmentations=instantiate(test), device="cpu", score_thresh=0.05)
    seen: list[Tensor] = []
    predictor.model.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]["image"]))
    picture = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    found = predictor(picture)
    assert seen[0].shape == (3, 80, 106)
    assert len(found) > 5
    boxes = found.pred_boxes.tensor
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([64.0, 48, 64, 48])).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
