# SPDX-License-Identifier: Apache-2.0
"""Cases of GFL: the head with its detections, and targets with losses.

A case has maps with a channel for each side and bin, boxes cut to the image, and detections in
pixels of the original image; its losses are given level by level, too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.func import functional_call

from d2_decouple.layers.points import make_grid
from d2_decouple.layers.tower import bias_free_tower
from d2_decouple.modeling import (
    BestLocations,
    DenseHead,
    DistributionFocalTerm,
    GFLAssigner,
    GFLPredictor,
    GIoUTerm,
    HardNMS,
    QualityFocalTerm,
    Selection,
    SharedContext,
    box_distribution,
    class_score,
    clip_to_image,
)
from d2_decouple.structures import DensePredictions, DenseTargets

from .atss import gt_instances, level_features
from .case import Case, GoldenError, require

__all__ = [
    "as_maps",
    "decoded",
    "detections",
    "gfl_head",
    "gfl_loss",
    "gfl_terms",
    "ground_truth",
    "level_losses",
    "level_names",
    "our_parameters",
    "their_targets",
]

TOWERS = {"cls_convs": "cls_subnet", "reg_convs": "bbox_subnet"}
LAYERS = {"conv": 0, "gn": 1}  # of a tower's three: convolution, norm, ReLU
PREDICTORS = {"gfl_cls": "cls_score", "gfl_reg": "predictor.bbox_pred"}
SCALES = {"scales": "predictor.scales"}

Terms = Mapping[str, Callable[[DensePredictions, DenseTargets], Tensor]]


def gfl_head(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Maps of distributions and classes, boxes of all locations, detections."""
    config = case.config
    require(case.path, "config 'reg_topk'", str(config["reg_topk"]), ("None",))
    names = level_names(config)
    features = [case.tensor(f"feature/{name}", dtype) for name in names]
    # Strict, so that a parameter without a counterpart on either side is an error.
    parameters = our_parameters(case.weights(dtype), PREDICTORS, SCALES)
    predictions = functional_call(_head(config), parameters, features, strict=True)
    distributions = box_distribution(predictions).flatten(2)
    results: dict[str, Tensor] = {}
    for kind, rows in (("z", distributions), ("p_logits", predictions.logits)):
        maps = as_maps(rows, [x.shape[-2:] for x in features])
        results |= {f"{kind}/{name}": x for name, x in zip(names, maps, strict=True)}
    return results | detections(case, predictions)


def gfl_loss(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Targets, normalisers, the three losses of each level and in total, and their gradients."""
    config = case.config
    names = level_names(config)
    leaves = {
        f"{kind}/{name}": case.tensor(f"{kind}/{name}", dtype).requires_grad_()
        for kind in ("p", "z")
        for name in names
    }
    predictions = decoded(case, *([leaves[f"{x}/{name}"] for name in names] for x in ("p", "z")))
    sizes, images = case.tensor("level_sizes").tolist(), ground_truth(case)
    assigner = GFLAssigner(num_classes=config["cls_channels"], score=class_score)
    targets = assigner(level_features(sizes, len(images)), predictions, images)
    terms = gfl_terms(config)
    losses = {name: term(predictions, targets) for name, term in terms.items()}
    total = torch.stack([*losses.values()]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    return {
        **their_targets(targets, config["classes"]),
        **level_losses(terms, predictions, targets),
        **losses,
        "total": total,
        **{f"grad/{name}": x for name, x in zip(leaves, gradients, strict=True)},
    }


def level_names(config: Mapping[str, Any]) -> list[str]:
    """The name of each level: p3 where a cell has 8 pixels, and so on."""
    return [f"p{int(math.log2(stride))}" for stride in config["strides"]]


def as_maps(rows: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """(N, R, channels) -> (N, channels, H, W) of each level."""
    levels = rows.split([height * width for height, width in sizes], dim=1)
    return [
        level.transpose(1, 2).unflatten(2, tuple(size))
        for level, size in zip(levels, sizes, strict=True)
    ]


def detections(
    case: Case,
    predictions: DensePredictions,
    score: Callable[[DensePredictions], Tensor] = class_score,
) -> dict[str, Tensor]:
    """Boxes of all locations, cut to the image, and detections in the original's pixels."""
    config = case.config
    sizes = [(height, width) for height, width in case.tensor("images_hw").tolist()]
    selection = Selection(
        score=score,
        candidates=BestLocations(
            test_score_thresh=config["score_thr"], test_topk_candidates=config["nms_pre"]
        ),
        nms=HardNMS(test_nms_thresh=config["nms_iou"]),
        clip=clip_to_image,
        max_detections_per_image=config["max_per_img"],
    )
    factors = case.tensor("scale_factor").reshape(-1, 4).expand(len(sizes), 4)
    clipped = [clip_to_image(x, size) for x, size in zip(predictions.boxes, sizes, strict=True)]
    results = {"boxes": torch.stack(clipped)}
    for image, found in enumerate(selection(predictions, sizes)):
        boxes = found.pred_boxes.tensor
        if found.scores.dtype == torch.float64:  # Detectron2's boxes are float32
            boxes = clipped[image][found.location_index]
        boxes = boxes / factors[image].to(boxes.dtype)
        results |= {
            f"det_boxes/{image}": torch.cat((boxes, found.scores[:, None]), dim=1),
            f"det_labels/{image}": found.pred_classes,
        }
    return results


# Theirs to ours.


def our_parameters(
    theirs: Mapping[str, Tensor], layers: Mapping[str, str], scales: Mapping[str, str]
) -> dict[str, Tensor]:
    """The head's parameters from those of the reference implementation.

    Args:
        theirs: by their names; the towers' are the same in every kind.
        layers: the names of the other layers -> ours.
        scales: the names of the levels' factors -> ours.
    """
    ours: dict[str, Tensor] = {}
    levels: dict[str, dict[int, Tensor]] = {part: {} for part in scales}
    for name, value in theirs.items():
        part, *rest = name.split(".")
        layer, kind = name.rsplit(".", 1)
        if part in TOWERS:
            number, of_tower, kind = rest
            ours[f"{TOWERS[part]}.{3 * int(number) + LAYERS[of_tower]}.{kind}"] = value
        elif layer in layers:
            ours[f"{layers[layer]}.{kind}"] = value
        elif part in scales:
            levels[part][int(rest[0])] = value
        else:
            known = sorted([*TOWERS, *layers, *scales])
            raise GoldenError(f"unknown parameter {name!r}; this head has {known}")
    for part, values in levels.items():
        ours[scales[part]] = torch.stack([values[level] for level in sorted(values)])
    return ours


# Building what is compared.


def _head(config: Mapping[str, Any]) -> DenseHead:
    channels = config["channels"]
    dims = [channels] * config["stacked_convs"]
    return DenseHead(
        context=SharedContext(channels=channels),
        predictor=GFLPredictor(
            num_classes=config["cls_channels"],
            in_channels=channels,
            num_levels=len(config["strides"]),
            reg_max=config["reg_max"],
        ),
        strides=config["strides"],
        offset=0.0,
        cls_conv_dims=dims,
        box_conv_dims=dims,
        norm=lambda width: nn.GroupNorm(config["gn_groups"], width),
        tower=bias_free_tower,
    )


def ground_truth(case: Case) -> list[Instances]:
    """The images of a case's batch."""
    return [
        gt_instances(
            case,
            alone,
            padded,
            case.tensor(f"gt_boxes/{image}").reshape(-1, 4),
            case.tensor(f"gt_labels/{image}"),
        )
        for image, (alone, padded) in enumerate(
            zip(case.tensor("images_hw").tolist(), case.tensor("pad_hw").tolist(), strict=True)
        )
    ]


def decoded(case: Case, class_maps: list[Tensor], box_maps: list[Tensor]) -> DensePredictions:
    """What the predictor makes of the outputs of its convolution."""
    config = case.config
    predictor = GFLPredictor(
        num_classes=config["cls_channels"],
        in_channels=box_maps[0].shape[1],
        num_levels=len(box_maps),
        reg_max=config["reg_max"],
    )
    predictor.register_module("bbox_pred", nn.Identity())
    grid = make_grid(
        [(x.shape[-2], x.shape[-1]) for x in box_maps],
        config["strides"],
        0.0,
        device=box_maps[0].device,
        dtype=box_maps[0].dtype,
    )
    return predictor.to(box_maps[0].dtype)(class_maps, box_maps, grid)


def gfl_terms(config: Mapping[str, Any]) -> dict[str, Any]:
    """The three losses that GFL has, by their names in a case."""
    weights = config["loss_weights"]
    return {
        "loss_cls": QualityFocalTerm(beta=config["beta"], weight=weights["cls"]),
        "loss_bbox": GIoUTerm(weight=weights["bbox"]),
        "loss_dfl": DistributionFocalTerm(weight=weights["dfl"]),
    }


# Reading what comes out.


def their_targets(targets: DenseTargets, num_classes: int) -> dict[str, Tensor]:
    """What is ignored is background of weight 0 in a case; a class more does not move that."""
    named = (targets.labels >= 0) & (targets.labels < num_classes)
    return {
        "labels": torch.where(named, targets.labels, num_classes),
        "label_weights": (targets.labels >= 0).to(targets.boxes.dtype),
        "bbox_targets": targets.boxes,
        "num_pos": targets.cls_normalizer,
        "avg_factor": targets.box_normalizer,
    }


def level_losses(
    terms: Terms, predictions: DensePredictions, targets: DenseTargets
) -> dict[str, Tensor]:
    """Each loss of one level alone: as it is, and before the boxes' normaliser divides it."""
    sizes = list(predictions.level_sizes)
    level = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    weights = [targets.box_weights * (level == number) for number in range(len(sizes))]
    alone = [
        targets._replace(
            cls_weights=targets.cls_weights * (level == number)[:, None],
            box_weights=weights[number],
        )
        for number in range(len(sizes))
    ]
    results = {"avg_factor/level": torch.stack([x.sum() for x in weights])}
    for name, term in terms.items():
        losses = torch.stack([term(predictions, x) for x in alone])
        factor = 1 if name == "loss_cls" else targets.box_normalizer
        results |= {f"{name}/level": losses, f"{name}/raw": losses * factor}
    return results
