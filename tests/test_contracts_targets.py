# SPDX-License-Identifier: Apache-2.0
"""Assigner, loss terms and selection hold what the papers need: stand-ins pass through them."""

import torch
from compositions import (
    CLASSES,
    aligned,
    anchors,
    learned_levels,
    nested,
    padding_ignored,
    pdnet,
    recipe,
    score_weighted,
)
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from standin_assigners import PerClassWeights
from util import excite, make_instances, random_input

from d2_decouple.layers.losses import generalized_iou_loss, sigmoid_focal_loss
from d2_decouple.modeling import (
    BestLocations,
    BestPairs,
    clip_to_image,
    coarse_boxes,
    predicted_boxes,
)


def test_assigner_trains_its_own_module_and_the_features():
    model = excite(instantiate(recipe(learned_levels)))
    losses = model([random_input((96, 96), 4, CLASSES)])
    losses["loss_select"].backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n, _ in model.named_parameters() if n.startswith("assigner.")} <= reached
    assert "backbone.fpn_output3.weight" in reached
    assert not {name for name in reached if name.startswith("head.")}


def test_assigner_is_no_part_of_evaluation(monkeypatch):
    model = excite(instantiate(recipe(learned_levels))).eval()
    monkeypatch.setattr(model, "assigner", None)
    with torch.no_grad():
        assert len(model([random_input((64, 64), 0)])[0]["instances"]) > 0


def test_assigner_and_terms_run_without_autocast():
    """The maps may be half precision; the assigner's own network and every sum are not."""
    model = excite(instantiate(recipe(learned_levels)))
    seen = []

    def look(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))

    def probe(predictions, targets):
        look()
        return predictions.logits.sum() * 0

    model.assigner.net.register_forward_hook(look)
    model.losses["loss_probe"] = probe
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([random_input((64, 64), 2, CLASSES)])
    assert seen == [False, False]
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())


def giou_by_hand(boxes, targets, weight, smoothing=0.0):
    losses = generalized_iou_loss(boxes, targets.boxes, smoothing)
    return weight * (losses * targets.box_weights).sum() / targets.box_normalizer


def assigned(model, inputs):
    """Predictions and targets of one training step."""
    _, features, predictions = model.predict(inputs)
    levels = features[-len(predictions.level_sizes) :]
    return predictions, model.assigner(levels, predictions, [x["instances"] for x in inputs])


def test_two_label_sets():
    model = excite(instantiate(recipe(pdnet)))
    inputs = [random_input((128, 128), 6, CLASSES)]
    predictions, targets = assigned(model, inputs)
    coarse = targets.extras["coarse"]
    assert coarse.box_weights.any()
    assert targets.box_weights.any()
    assert not torch.equal(coarse.labels, targets.labels)
    losses = model(inputs)
    torch.testing.assert_close(
        losses["loss_box_reg"], giou_by_hand(predictions.boxes, targets, 2.0, 1.0)
    )
    torch.testing.assert_close(
        losses["loss_box_coarse"],
        giou_by_hand(predictions.extras["coarse_boxes"], coarse, 0.5, 1.0),
    )


def test_box_weights_differ_from_class_weights():
    """One score serves the assigner and selection; it weighs boxes, classes count once each."""
    model = excite(instantiate(recipe(score_weighted)))
    assert model.assigner.score is model.selection.score
    inputs = [random_input((128, 128), 6, CLASSES)]
    predictions, targets = assigned(model, inputs)
    positive = targets.labels < CLASSES
    scores = model.selection.score(predictions).amax(-1)
    torch.testing.assert_close(targets.box_weights[positive], scores[positive])
    assert torch.all(targets.cls_weights == 1)
    assert not targets.box_weights.requires_grad
    losses = model(inputs)
    torch.testing.assert_close(
        losses["loss_box_reg"], giou_by_hand(predictions.boxes, targets, 1.0)
    )
    focal = sigmoid_focal_loss(predictions.logits, targets.labels, 0.25, 2.0).sum()
    torch.testing.assert_close(losses["loss_cls"], focal / positive.sum())


def test_class_weights_of_each_class():
    def ignoring(model):
        model.assigner = L(PerClassWeights)(host=nested(model.assigner), ignored=1)

    model = excite(instantiate(recipe(ignoring)))
    inputs = [random_input((64, 64), 3, CLASSES)]
    predictions, targets = assigned(model, inputs)
    assert targets.cls_weights.shape == predictions.logits.shape
    predictions.logits.retain_grad()
    model.losses["loss_cls"](predictions, targets).backward()
    reached = predictions.logits.grad.abs().amax((0, 1)) > 0
    assert reached.tolist() == [True, False, True]


def test_cells_in_the_batch_padding_can_be_ignored():
    model = excite(instantiate(recipe(padding_ignored)))
    inputs = [random_input((40, 64), 2, CLASSES), random_input((96, 96), 2, CLASSES)]
    predictions, targets = assigned(model, inputs)
    finest = targets.labels[:, : predictions.level_sizes[0]].view(2, 12, 12)
    ignored = torch.zeros(12, 12, dtype=torch.bool)
    ignored[8:], ignored[:, 8:] = True, True  # 40 x 64 pixels, padded to 64 x 64: 8 x 8 cells
    assert torch.equal(finest[0] == -1, ignored)
    assert not (targets.labels[1] == -1).any()
    predictions.logits.retain_grad()
    model.losses["loss_cls"](predictions, targets).backward()
    assert not predictions.logits.grad[targets.labels == -1].any()


def test_nine_anchors_per_cell():
    model = excite(instantiate(recipe(anchors)))
    size = (64, 64)
    # The anchor of 4 strides around the middle of cell (3, 2) of P4: 64 pixels wide and high.
    box = [24.0, 8.0, 88.0, 72.0]
    inputs = [random_input(size, 0)]
    inputs[0]["instances"] = make_instances(size, [box], [2])
    predictions, targets = assigned(model, inputs)
    index = 9 * (8 * 8 + 2 * 4 + 3) + 1
    torch.testing.assert_close(predictions.priors[index], torch.tensor(box))
    assert targets.labels[0, index] == 2
    assert (targets.labels == -1).any()
    assert predictions.locations[index].tolist() == [56, 40]

    model.eval()
    with torch.no_grad():
        model.head.predictor.bbox_pred.weight.zero_()
        model.head.predictor.bbox_pred.bias.zero_()
        images, features, predictions = model.predict(inputs)
        found = model.forward_inference(images, features, predictions)[0]
    expected = clip_to_image(predictions.priors[found.location_index], size)
    assert len(found)
    torch.testing.assert_close(found.pred_boxes.tensor, expected)


def test_anchors_logits_are_a_cells_fastest():
    """Channel a * K + k of the class map belongs to anchor a: Detectron2's order."""
    model = instantiate(recipe(anchors))
    with torch.no_grad():
        model.head.cls_score.weight.zero_()
        model.head.cls_score.bias.copy_(torch.arange(27.0))
        logits = model.predict([random_input((32, 32), 0)])[2].logits
    assert logits[0, :9].flatten().tolist() == list(range(27))


def test_best_pairs_and_best_locations_differ():
    scores = torch.tensor([[0.9, 0.8], [0.7, 0.1], [0.6, 0.3], [0.2, 0.5]])
    levels = (3, 1)
    pairs = BestPairs(test_score_thresh=0.2, test_topk_candidates=2)(scores, levels)
    assert [x.tolist() for x in pairs[1:]] == [[0, 0, 3], [0, 1, 1]]
    locations = BestLocations(test_score_thresh=0.2, test_topk_candidates=2)(scores, levels)
    assert sorted(zip(*(x.tolist() for x in locations[1:]), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (3, 1),
    ]
    for value, location, label in (pairs, locations):
        torch.testing.assert_close(value, scores[location, label])


def test_selection_can_mean_the_coarse_boxes():
    """SALT's first-stage rows: the same scores on other boxes, without a second forward."""
    model = excite(instantiate(recipe(aligned))).eval()
    inputs = [random_input((64, 64), 0)]
    with torch.no_grad():
        images, features, predictions = model.predict(inputs)
        assert model.selection.boxes is predicted_boxes
        model.selection.boxes = coarse_boxes
        found = model.forward_inference(images, features, predictions)[0]
    expected = predictions.extras["coarse_boxes"][0, found.location_index]
    expected = clip_to_image(expected, found.image_size)
    assert len(found)
    assert not torch.equal(
        expected, clip_to_image(predictions.boxes[0, found.location_index], (64, 64))
    )
    torch.testing.assert_close(found.pred_boxes.tensor, expected)
