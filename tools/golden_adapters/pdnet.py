# SPDX-License-Identifier: Apache-2.0
"""Cases of PDNet: the head, targets with losses, detections.

A case writes boxes as (top, left, bottom, right) in cells of their own level, points as (y, x),
and labels from 1. Every difference is an exchange of neighbours: *swapped* below. Parameters and
predictions go in and out through it by differentiable steps, so that gradients come out in the
case's conventions by themselves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.func import functional_call

from d2_decouple.layers.points import make_grid, squares
from d2_decouple.layers.tower import bias_free_tower
from d2_decouple.modeling import (
    BestPairs,
    BoundaryPoints,
    DenseHead,
    FocalTerm,
    GIoUTerm,
    HardNMS,
    PDNetAssigner,
    PDNetPredictor,
    Selection,
    SemanticPoints,
    SharedContext,
    class_score,
    coarse_boxes,
    coarse_targets,
)
from d2_decouple.modeling.legacy import legacy_clip
from d2_decouple.structures import DensePredictions, DenseTargets, foreground

from .case import Case, GoldenError

__all__ = ["pdnet_head", "pdnet_infer", "pdnet_loss"]

PREFIX = "rpn.head."
DYNAMIC_BIAS = f"{PREFIX}pred_head.dyn_pt_pred.bias"
WHOLE_GRADIENT = 1300  # a gradient with more values is given by its first ones, in C order
FIRST_VALUES = 256
PARTS = {
    "cls_conv_tower": "cls_subnet",
    "reg_conv_tower": "bbox_subnet",
    "pred_head.dyn_pt_pred": "predictor.point_pred",
    "pred_head.reg_map_pred": "predictor.bbox_pred",
    "pred_head.cls_map_pred": "cls_score",
    "pred_head.cls_pred_collect": "predictor.cls_score",
}


def pdnet_head(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The head's maps and points on each level, and the gradients of its parameters."""
    config = case.config
    names = [f"p{int(math.log2(stride))}" for stride in config["strides"]]
    features = [case.tensor(f"feature/{name}", dtype) for name in names]
    leaves = {name: value.requires_grad_() for name, value in case.weights(dtype).items()}
    # Strict, so that a parameter without a counterpart on either side is an error.
    predictions = functional_call(_head(config), _our_parameters(leaves), features, strict=True)

    maps = {
        kind: dict(zip(names, _maps(rows, config["level_sizes"]), strict=True))
        for kind, rows in _rows(predictions).items()
    }
    totals = {
        kind: torch.stack(
            [(x * case.tensor(f"upstream/{kind}/{name}", dtype)).sum() for name, x in found.items()]
        ).sum()
        for kind, found in maps.items()
        if any(name.startswith(f"upstream/{kind}/") for name in case.inputs)
    }
    results = {f"{kind}/{name}": x for kind, found in maps.items() for name, x in found.items()}
    for kind, total in totals.items():
        found = _gradients(total, {DYNAMIC_BIAS: leaves[DYNAMIC_BIAS]})
        results[f"grad_dyn_bias_from/{kind}"] = found[DYNAMIC_BIAS]
    for name, gradient in _gradients(torch.stack([*totals.values()]).sum(), leaves).items():
        whole = gradient.numel() <= WHOLE_GRADIENT
        results[f"grad/{name}"] = gradient if whole else gradient.flatten()[:FIRST_VALUES]
        results[f"gradnorm/{name}"] = torch.stack((gradient.sum(), gradient.norm()))
    return results


def pdnet_loss(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Targets, the three losses and their gradients, with the legacy "+1" of the matching.

    ``num_pos`` and ``num_coarse_pos`` count what was matched; that the losses are divided by them
    shows in the losses.
    """
    config = case.config
    _only(case, "neg_iou", config["pos_iou"])  # nothing between background and positive
    _only(case, "num_gpus", 1)
    leaves = {
        name: case.tensor(name, dtype).requires_grad_()
        for name in ("coarse_box", "reg_box", "logits")
    }
    predictions = _predictions(config, leaves["logits"], leaves["reg_box"], leaves["coarse_box"])
    assigner = PDNetAssigner(
        num_classes=config["num_classes"], iou_threshold=config["pos_iou"], side_offset=1.0
    )
    images = len(leaves["logits"])
    features = [leaves["logits"].new_empty(images, 0, *size) for size in config["level_sizes"]]
    targets = assigner(features, predictions, _gt_instances(case, images))
    losses = {name: term(predictions, targets) for name, term in _terms(config).items()}
    gradients = _gradients(torch.stack([*losses.values()]).sum(), leaves)

    index, gt = _matches(targets, config["num_classes"])
    coarse_index, coarse_gt = _matches(coarse_targets(targets), config["num_classes"])
    return {
        **losses,
        **{f"grad/{name}": gradient for name, gradient in gradients.items()},
        "num_pos": torch.tensor(len(index)),
        "num_coarse_pos": torch.tensor(len(coarse_index)),
        "labels": _their_labels(targets.labels, config["num_classes"]).flatten(),
        "pos_index": index,
        "pos_gt": gt,
        "coarse_pos_index": coarse_index,
        "coarse_pos_gt": coarse_gt,
    }


def pdnet_infer(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Detections by the legacy rules, and how many pairs and boxes each step has left."""
    config = case.config
    _only(case, "min_size", 0)
    logits, boxes = case.tensor("logits", dtype), case.tensor("reg_box", dtype)
    predictions = _predictions(config, logits, boxes, boxes)
    threshold = config["score_threshold"]
    everything = BestPairs(test_score_thresh=threshold, test_topk_candidates=logits[0].numel())
    selection = Selection(
        score=class_score,
        candidates=BestPairs(
            test_score_thresh=threshold,
            test_topk_candidates=config["pre_nms_top_n_per_level"],
        ),
        nms=HardNMS(test_nms_thresh=config["nms_threshold"], side_offset=1.0),
        clip=legacy_clip,
        max_detections_per_image=config["detections_per_image"],
    )
    sizes = [_image_size(case, image) for image in range(len(logits))]
    level_sizes = predictions.level_sizes
    proposals = selection.propose(predictions, sizes)
    results = {
        "num_pairs_over_threshold": torch.stack(
            [
                _per_level(everything(scores, level_sizes)[1], level_sizes)
                for scores in class_score(predictions)
            ]
        ),
        "num_candidates": torch.stack(
            [_per_level(found.location_index, level_sizes) for found in proposals]
        ),
        "num_after_nms": torch.tensor([len(selection.nms(found)) for found in proposals]),
    }
    for image, found in enumerate(selection(predictions, sizes)):
        results |= {
            f"boxes/{image}": found.pred_boxes.tensor,
            f"scores/{image}": found.scores,
            f"labels/{image}": found.pred_classes + 1,
        }
    return results


# Ours to theirs, and theirs to ours: the same step.


def _swapped(values: Tensor, dim: int, size: int = 1) -> Tensor:
    """Along ``dim``, every two neighbouring groups of ``size`` change places.

    (x1, y1, x2, y2) becomes (y1, x1, y2, x2), a point (x, y) becomes (y, x), and what belongs to
    the sides left, top, right, bottom comes in the order top, left, bottom, right.
    """
    return values.unflatten(dim, (-1, 2, size)).flip(dim + 1).flatten(dim, dim + 2)


def _our_parameters(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's parameters from those of the reference implementation."""
    ours = {}
    for name, value in theirs.items():
        part = next((x for x in PARTS if name.startswith(f"{PREFIX}{x}.")), None)
        if part is None:
            raise GoldenError(f"unknown parameter {name!r}; PDNet's head has {sorted(PARTS)}")
        if part == "pred_head.reg_map_pred":
            value = _swapped(value, 0)
        elif part == "pred_head.dyn_pt_pred":
            # All in pairs, but for the level logits of the four sides: two for each side.
            value = torch.cat((_swapped(value[:-8], 0), _swapped(value[-8:], 0, 2)))
        ours[PARTS[part] + name.removeprefix(PREFIX + part)] = value
    return ours


def _rows(predictions: DensePredictions) -> dict[str, Tensor]:
    """(N, R, channels) of each kind of map; coordinates in cells of their own level."""
    strides = predictions.strides[:, None]
    sides = predictions.extras["boundary_points"].flatten(2)
    return {
        "coarse_box": _swapped(predictions.extras["coarse_boxes"], 2) / strides,
        "reg_box": _swapped(predictions.boxes, 2) / strides,
        "logits": predictions.logits,
        "bound_pt": _swapped(_swapped(sides, 2, 2), 2) / strides,
        "semantic_pt": _swapped(predictions.extras["class_points"].flatten(2), 2) / strides,
    }


def _maps(rows: Tensor, level_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(N, R, channels) -> (N, channels, H, W) of each level."""
    levels = rows.split([height * width for height, width in level_sizes], dim=1)
    return [
        level.transpose(1, 2).unflatten(2, tuple(size))
        for level, size in zip(levels, level_sizes, strict=True)
    ]


def _their_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Background, which is the last of ours, is 0 of theirs; -1 stays ignored."""
    return torch.where(labels < 0, labels, (labels + 1) % (num_classes + 1))


# Building what is compared.


def _head(config: Mapping[str, Any]) -> DenseHead:
    channels = config["channels"]
    dims = [channels] * config["num_convs"]
    return DenseHead(
        context=SharedContext(channels=channels),
        predictor=PDNetPredictor(
            num_classes=config["num_classes"],
            in_channels=channels,
            class_points=SemanticPoints(num_points=config["num_points"]),
            box_points=BoundaryPoints(limit=config["limit_ratio"]),
        ),
        strides=config["strides"],
        offset=0.0,
        cls_conv_dims=dims,
        box_conv_dims=dims,
        norm=lambda width: nn.GroupNorm(config["gn_groups"], width, config["gn_eps"]),
        tower=bias_free_tower,
    )


def _predictions(
    config: Mapping[str, Any], logits: Tensor, final: Tensor, coarse: Tensor
) -> DensePredictions:
    """What a head would have handed on; ``final`` and ``coarse`` (N, R, 4) are a case's boxes."""
    grid = make_grid(
        config["level_sizes"], config["strides"], 0.0, device=logits.device, dtype=logits.dtype
    )
    strides = grid.strides[:, None]
    return DensePredictions(
        logits=logits,
        boxes=_swapped(final, 2) * strides,
        quality=None,
        locations=grid.locations,
        strides=grid.strides,
        priors=squares(grid.locations, 4 * grid.strides),
        level_sizes=grid.level_sizes,
        extras={"coarse_boxes": _swapped(coarse, 2) * strides},
    )


def _terms(config: Mapping[str, Any]) -> dict[str, FocalTerm | GIoUTerm]:
    return {
        "loss_cls": FocalTerm(
            alpha=config["focal_alpha"], gamma=config["focal_gamma"], weight=config["weight_cls"]
        ),
        "loss_crs": GIoUTerm(
            weight=config["weight_coarse"],
            boxes=coarse_boxes,
            targets=coarse_targets,
            smoothing=1.0,
        ),
        "loss_reg": GIoUTerm(weight=config["weight_reg"], smoothing=1.0),
    }


def _gt_instances(case: Case, images: int) -> list[Instances]:
    return [
        Instances(
            _image_size(case, image),
            gt_boxes=Boxes(case.tensor(f"gt_boxes/{image}").reshape(-1, 4)),
            gt_classes=case.tensor(f"gt_labels/{image}").long() - 1,
        )
        for image in range(images)
    ]


def _image_size(case: Case, image: int) -> tuple[int, int]:
    height, width = case.tensor(f"image_size_hw/{image}").tolist()
    return height, width


# Reading what comes out.


def _gradients(total: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(
        total, list(leaves.values()), retain_graph=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def _matches(targets: DenseTargets, num_classes: int) -> tuple[Tensor, Tensor]:
    """(positives,) flat indices into (N, R) and, of each, its box's index in its image."""
    index = foreground(targets.labels, num_classes).flatten().nonzero()[:, 0]
    return index, targets.extras["gt_index"].flatten()[index]


def _per_level(locations: Tensor, level_sizes: Sequence[int]) -> Tensor:
    """(levels,) how many of the locations, which are indices into R, each level has."""
    ends = torch.tensor(level_sizes).cumsum(0)
    return torch.bincount(torch.bucketize(locations, ends, right=True), minlength=len(ends))


def _only(case: Case, key: str, wanted: Any) -> None:
    """Refuse a setting that the package has no counterpart for."""
    if case.config[key] != wanted:
        raise GoldenError(
            f"{case.path}: config {key!r} is {case.config[key]!r}; only {wanted!r} is compared"
        )
