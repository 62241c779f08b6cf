# SPDX-License-Identifier: Apache-2.0
"""A one-stage detector's predictions as proposals: against plain loops, by hand, bad input."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from util import (
    excite,
    make_instances,
    random_input,
    tiny,
)

from d2_decouple.config import get_config
from d2_decouple.modeling import (
    DecoupledProposals,
    DenseProposals,
    FocalTerm,
    OneStageDetector,
)
from d2_decouple.modeling.dense_proposals import probability_logits
from d2_decouple.structures import DensePredictions

RECIPE = "composed_atss_decoupled_rcnn_R_18_FPN_bccd"
RCNN = "decoupled_rcnn_R_18_FPN_bccd"
SIZES = [(60, 90), (64, 50)]  # of the images; they are padded to 64x96
LEVELS = (30, 12, 4)


def single_score(predictions: DensePredictions) -> Tensor:
    return predictions.logits.sigmoid()


class GivenHead(nn.Module):
    """A head with one answer, for maps of three levels."""

    def __init__(self, predictions: DensePredictions) -> None:
        super().__init__()
        self.predictions, self.strides = predictions, (16, 32, 64)
        self.context = SimpleNamespace(finer_levels=0)

    def forward(self, features: list[Tensor]) -> DensePredictions:
        return self.predictions


def random_predictions(classes: int = 1) -> DensePredictions:
    """Boxes of all kinds: overlapping, outside of the image, without area, turned inside out."""
    rows = sum(LEVELS)
    corner = torch.rand(2, rows, 2) * torch.tensor([70.0, 40.0])
    boxes = torch.cat((corner, corner + 12 + 20 * torch.rand(2, rows, 2)), dim=-1)
    boxes[:, ::2] = boxes[:, :1] + 3 * torch.randn(2, len(range(0, rows, 2)), 4)
    boxes[:, 5] = torch.tensor([-20.0, -20, -1, -1])
    boxes[:, 7] = torch.tensor([20.0, 20, 20, 40])
    boxes[:, 9] = torch.tensor([40.0, 40, 20, 20])
    boxes[:, 11] = torch.tensor([80.0, 50, 200, 200])
    return DensePredictions(
        logits=torch.randn(2, rows, classes),
        boxes=boxes,
        quality=None,
        locations=torch.zeros(rows, 2),
        strides=torch.ones(rows),
        priors=torch.zeros(rows, 4),
        level_sizes=LEVELS,
        extras={},
    )


def generator_of(head: Any = None, **changes: Any) -> DenseProposals:
    settings: dict[str, Any] = {
        "head": head or GivenHead(random_predictions()),
        "assigner": nn.Identity(),
        "losses": {"loss_cls": FocalTerm()},
        "score": single_score,
        "head_in_features": ["p4", "p5", "p6"],
        "pre_nms_topk": (20, 9),
        "post_nms_topk": (14, 11),
        "nms_thresh": 0.5,
        "nms_thresh_reg": 0.8,
        "post_nms_topk_reg": 17,
        **changes,
    }
    return DenseProposals(**settings)


def images_of(height: int = 64, width: int = 96) -> ImageList:
    return ImageList(torch.zeros(2, 3, height, width), SIZES)


def maps_of() -> dict[str, Tensor]:
    sizes = {"p4": (4, 6), "p5": (2, 3), "p6": (1, 2)}
    return {name: torch.zeros(2, 8, *size) for name, size in sizes.items()}


# --- proposals ----------------------------------------------------------------------------------


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def loop_proposals(
    predictions: DensePredictions, image: int, topk: int, threshold: float, limit: int
) -> list[tuple[float, list[float]]]:
    """Logits and boxes of an image, best first, one box after the other."""
    height, width = SIZES[image]
    survivors, start = [], 0
    for size in LEVELS:
        level = list(range(start, start + size))
        start += size
        logits = predictions.logits[image, :, 0].tolist()
        best = sorted(level, key=lambda row: -logits[row])[:topk]
        kept: list[list[float]] = []
        for row in best:
            x1, y1, x2, y2 = predictions.boxes[image, row].tolist()
            box = [max(min(x1, width), 0.0), max(min(y1, height), 0.0)]
            box += [max(min(x2, width), 0.0), max(min(y2, height), 0.0)]
            if box[2] - box[0] <= 0 or box[3] - box[1] <= 0:
                continue
            if all(iou(box, other) <= threshold for other in kept):
                kept.append(box)
                survivors.append((logits[row], box))
    return sorted(survivors, key=lambda pair: -pair[0])[:limit]


def check(found: list[Instances], predictions: DensePredictions, *limits: Any) -> None:
    assert len(found) == 2
    for image, proposals in enumerate(found):
        wanted = loop_proposals(predictions, image, *limits)
        assert proposals.image_size == SIZES[image]
        assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits"}
        logits, boxes = zip(*wanted, strict=True)
        torch.testing.assert_close(
            proposals.objectness_logits, torch.tensor(logits), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(proposals.proposal_boxes.tensor, torch.tensor(boxes))
        assert not proposals.proposal_boxes.tensor.requires_grad
        assert not proposals.objectness_logits.requires_grad


@pytest.mark.parametrize("limits", [{}, {"post_nms_topk": (99, 99), "post_nms_topk_reg": 99}])
def test_both_lists_by_plain_loops(limits: dict[str, Any]) -> None:
    generator = generator_of(**limits)
    predictions = generator.head.predictions
    predictions.logits.requires_grad_()
    predictions.boxes.requires_grad_()
    found = generator.propose(predictions, SIZES)
    assert isinstance(found, DecoupledProposals)
    counts = (99, 99, 99) if limits else (14, 17, 11)
    check(found, predictions, 20, 0.5, counts[0])
    check(found.reg, predictions, 20, 0.8, counts[1])
    if limits:
        assert all(len(a) < len(b) for a, b in zip(found, found.reg, strict=True))
    single = generator.eval().propose(predictions, SIZES)
    assert type(single) is list
    check(single, predictions, 9, 0.5, counts[2])


def test_evaluation_has_no_losses() -> None:
    generator = generator_of().eval()
    found, losses = generator(images_of(), maps_of(), None)
    assert losses == {}
    check(found, generator.head.predictions, 9, 0.5, 11)


def test_least_size() -> None:
    found = generator_of(min_box_size=15.0).propose(random_predictions(), SIZES)
    sides = [x.proposal_boxes.tensor[:, 2:] - x.proposal_boxes.tensor[:, :2] for x in found]
    assert (torch.cat(sides) > 15).all()
    assert len(torch.cat(sides)) > 5


def test_logits_of_probabilities() -> None:
    """log 3 of 3/4; of what rounds to 0 and 1 something finite; a NaN stays one."""
    found = probability_logits(torch.tensor([0.75, 0.25, 0.5, 1e-30]))
    assert found.tolist() == pytest.approx([math.log(3), -math.log(3), 0, -69.0776], rel=1e-5)
    low, high, bad = probability_logits(torch.tensor([0.0, 1.0, math.nan])).tolist()
    assert low == pytest.approx(math.log(torch.finfo(torch.float32).tiny))
    assert high == pytest.approx(15.94, abs=0.01)
    assert math.isnan(bad)
    exact = torch.tensor([-20.0, 0.3, 11.0], dtype=torch.float64)
    torch.testing.assert_close(probability_logits(exact.sigmoid()), exact)


@pytest.mark.parametrize("part", ["logits", "boxes"])
def test_outputs_that_are_no_numbers(part: str) -> None:
    """Training stops and says where; a test goes on without them."""
    predictions = random_predictions()
    generator = generator_of(GivenHead(predictions))
    plain = generator.eval().propose(predictions, SIZES)
    rows = getattr(predictions, part)[0]
    best = int(predictions.logits[0, 30:42, 0].argmax()) + 30
    rows[best] = math.nan
    message = r"proposal generator's head predicts NaN or infinity for 1 proposals of level 1"
    with pytest.raises(FloatingPointError, match=message):
        generator.train().propose(predictions, SIZES)
    found = generator.eval().propose(predictions, SIZES)
    assert found[0].proposal_boxes.tensor.isfinite().all()
    assert torch.equal(found[1].objectness_logits, plain[1].objectness_logits)


# --- what it wants ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 3}, ValueError, r"num_classes is 3; wanted is 1.*model\.roi_heads"),
        ({"score": "product"}, TypeError, r"proposal_generator\.score must be callable"),
        ({"losses": {"loss_cls": 1}}, TypeError, r"proposal_generator\.losses\.loss_cls must be"),
        ({"nms_thresh": 0.0}, ValueError, r"proposal_generator\.nms_thresh is 0\.0"),
        ({"nms_thresh_reg": 1.5}, ValueError, r"proposal_generator\.nms_thresh_reg is 1\.5"),
        ({"post_nms_topk_reg": 0}, ValueError, r"proposal_generator\.post_nms_topk_reg is 0"),
        ({"pre_nms_topk": (5,)}, ValueError, r"pre_nms_topk is \(5,\); wanted are two numbers"),
        ({"post_nms_topk": (5, 0)}, ValueError, r"post_nms_topk is \(5, 0\); wanted are two"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generator_of(**options)


def test_wrong_maps_are_named() -> None:
    generator = generator_of().eval()
    with pytest.raises(ValueError, match=r"names \['p4', 'p5', 'p6'\].*gives \['p4', 'p5'\]"):
        generator(images_of(), {k: v for k, v in maps_of().items() if k != "p6"})
    with pytest.raises(ValueError, match=r"p4 has \(4, 6\) cells.*\(128, 96\).*stride 16"):
        generator(images_of(128), maps_of())
    few = generator_of(head_in_features=["p4", "p5"]).eval()
    with pytest.raises(ValueError, match=r"head_in_features names \['p4', 'p5'\].*wanted are 3"):
        few(images_of(), maps_of())
    # Rounded up, as the usual pyramids, or down.
    generator(images_of(57, 81), maps_of())
    generator(images_of(79, 100), {**maps_of(), "p5": torch.zeros(2, 8, 2, 3)})


def test_a_head_of_many_classes_is_named() -> None:
    generator = generator_of(GivenHead(random_predictions(classes=3)))
    with pytest.raises(ValueError, match=r"predicts 3 classes.*predictor\.num_classes=1"):
        generator(images_of(), maps_of())


def test_training_wants_ground_truth() -> None:
    with pytest.raises(AssertionError, match="need ground truth"):
        generator_of()(images_of(), maps_of())


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["fcos_R_18_FPN_bccd", "gflv2_R_18_FPN_bccd"])
def test_losses_are_those_of_the_detector_with_one_class(host: str) -> None:
    dense = instantiate(tiny(get_config(host), num_classes=1).model)
    assert isinstance(dense, OneStageDetector)
    excite(dense, gain=0.5)
    inputs = [random_input((64, 96), 3), random_input((64, 96), 0), random_input((64, 96), 2)]
    for item in inputs:
        item["instances"].gt_classes[:] = 2
    objects = [
        make_instances((64, 96), x["instances"].gt_boxes.tensor.tolist(), [0] * len(x["instances"]))
        for x in inputs
    ]
    expected = dense([{**x, "instances": y} for x, y in zip(inputs, objects, strict=True)])
    generator = DenseProposals(
        head=dense.head,
        assigner=dense.assigner,
        losses=dense.losses,
        score=dense.selection.score,
        head_in_features=dense.head_in_features,
    )
    images = dense.preprocess_image(inputs)
    truth = [x["instances"] for x in inputs]
    with EventStorage() as storage:
        _, losses = generator(images, dense.backbone(images.tensor), truth)
        count = storage.latest()["rpn/num_positives_per_image"][0]
    assert losses.keys() == {name.replace("loss_", "loss_rpn_") for name in expected}
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name.replace("loss_", "loss_rpn_")], loss)
    assert truth[0].gt_classes.tolist() == [2, 2, 2]  # the second stage's are left alone
    levels = [x for name, x in dense.backbone(images.tensor).items() if name[0] == "p"]
    targets = dense.assigner(levels, dense.head(levels), objects)
    assert count == pytest.approx((targets.labels == 0).sum().item() / 3)
