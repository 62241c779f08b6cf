# SPDX-License-Identifier: Apache-2.0
"""Cases of SALT-Net: the head with its detections and gradients, and targets with losses.

A case has its rows in the order of :mod:`d2_decouple.checkpoint.salt_layout`, and a class more
than the objects do.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from d2_decouple.checkpoint.salt_layout import (
    FRACTION_ROWS,
    POINT_ROWS,
    SALT_LAYERS,
    SALT_SCALES,
    inverse,
    our_order,
)
from d2_decouple.layers.points import make_grid
from d2_decouple.layers.tower import bias_free_tower
from d2_decouple.modeling import (
    DenseHead,
    DistributionQuality,
    GFLAssigner,
    GFLv2Predictor,
    GIoUTerm,
    SharedContext,
    box_distribution,
    class_score,
    coarse_boxes,
    product_score,
)
from d2_decouple.modeling.head import map_size
from d2_decouple.modeling.salt import SALT, AlignedPoints
from d2_decouple.structures import DensePredictions

from .atss import level_features
from .case import Case
from .gfl import (
    as_maps,
    decoded,
    detections,
    gfl_terms,
    ground_truth,
    level_losses,
    level_names,
    our_parameters,
    their_targets,
)

__all__ = ["salt_head", "salt_loss"]

LAYERS = {name: layer.ours for name, layer in SALT_LAYERS.items()}


def salt_head(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Maps of every step, boxes of all locations, detections, gradients of three sums."""
    config = case.config
    names = level_names(config)
    leaves = {name: x.requires_grad_() for name, x in case.weights(dtype).items()}
    leaves |= {f"feature/{x}": case.tensor(f"feature/{x}", dtype).requires_grad_() for x in names}
    features = [leaves[f"feature/{name}"] for name in names]
    head, points = _head(config), []
    aligner = head.get_submodule("aligner")
    aligner.register_forward_hook(lambda _, inputs, outputs: points.append(outputs[2]))
    parameters = _our_parameters({name: x for name, x in leaves.items() if "/" not in name})
    predictions = functional_call(head, parameters, features, strict=True)
    results = _their_maps(predictions, points, names)
    for kind in ("p", "z", "d"):
        prefix = f"grad_{kind}/"
        wanted = [x.removeprefix(prefix) for x in case.outputs if x.startswith(prefix)]
        gradients = torch.autograd.grad(
            [results[f"{kind}/{name}"] for name in names],
            [leaves[name] for name in wanted],
            [case.tensor(f"probe/{kind}/{name}", dtype) for name in names],
            retain_graph=True,
            materialize_grads=True,
        )
        results |= {f"{prefix}{x}": grad for x, grad in zip(wanted, gradients, strict=True)}
    return results | detections(case, predictions, product_score)


def salt_loss(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Targets, normalisers, the four losses of each level and in total, and their gradients."""
    config = case.config
    names = level_names(config)
    leaves = {
        f"{kind}/{name}": case.tensor(f"{kind}/{name}", dtype).requires_grad_()
        for kind in ("p", "z", "d")
        for name in names
    }
    scores, maps, distances = ([leaves[f"{x}/{name}"] for name in names] for x in ("p", "z", "d"))
    # A case has one probability where we have a class's and a quality's logits.
    predictions = decoded(case, [x.logit() for x in scores], maps)
    coarse = _coarse_boxes(config, distances)
    predictions = predictions._replace(extras={**predictions.extras, "coarse_boxes": coarse})
    sizes, images = case.tensor("level_sizes").tolist(), ground_truth(case)
    assigner = GFLAssigner(num_classes=config["cls_channels"], score=class_score)
    targets = assigner(level_features(sizes, len(images)), predictions, images)
    weight = config["loss_weights"]["bbox_init"]
    terms = {**gfl_terms(config), "loss_bbox_init": GIoUTerm(boxes=coarse_boxes, weight=weight)}
    losses = {name: term(predictions, targets) for name, term in terms.items()}
    total = torch.stack([*losses.values()]).sum()
    gradients = torch.autograd.grad(
        total, list(leaves.values()), retain_graph=True, materialize_grads=True
    )
    return {
        **their_targets(targets, config["classes"]),
        **level_losses(terms, predictions, targets),
        **losses,
        "total": total,
        **{f"grad/{name}": x for name, x in zip(leaves, gradients, strict=True)},
    }


# Theirs to ours.


def _our_parameters(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's parameters from those of the reference implementation."""
    ours = our_parameters(theirs, LAYERS, SALT_SCALES)
    return {name: our_order(name, value) for name, value in ours.items()}


# Building what is compared.


def _head(config: Mapping[str, Any]) -> DenseHead:
    channels = config["channels"]
    dims = [channels] * config["stacked_convs"]
    predictor = GFLv2Predictor(
        num_classes=config["cls_channels"],
        in_channels=channels,
        num_levels=len(config["strides"]),
        reg_max=config["reg_max"],
    )
    predictor.register_module("reg_conf", DistributionQuality(topk=config["reg_topk"]))

    def norm(width: int) -> nn.Module:
        return nn.GroupNorm(config["gn_groups"], width)

    return DenseHead(
        context=SharedContext(channels=channels),
        aligner=SALT(channels=channels, num_levels=len(config["strides"]), norm=norm),
        predictor=predictor,
        strides=config["strides"],
        offset=0.0,
        cls_conv_dims=dims,
        box_conv_dims=dims,
        norm=norm,
        tower=bias_free_tower,
    )


def _coarse_boxes(config: Mapping[str, Any], distances: list[Tensor]) -> Tensor:
    """What the aligner makes of maps of distances (N, 4, H, W)."""
    grid = make_grid(
        [map_size(x) for x in distances],
        config["strides"],
        0.0,
        device=distances[0].device,
        dtype=distances[0].dtype,
    )
    extras = []
    for x in distances:
        rows = x.permute(0, 2, 3, 1)
        no_points = rows.new_zeros(*rows.shape[:3], 0, 2)
        extras.append(AlignedPoints(rows, rows[..., :0], no_points, no_points))
    aligner = SALT(channels=1, num_levels=len(distances), norm="")
    return aligner.decode(extras, grid)["coarse_boxes"]


# Reading what comes out.


def _their_maps(
    predictions: DensePredictions, points: list[AlignedPoints], names: list[str]
) -> dict[str, Tensor]:
    """Every step of each level as a map with a channel for each number."""
    sizes = [x.distances.shape[1:3] for x in points]
    assert predictions.quality is not None
    rows = {
        "q": predictions.quality.sigmoid()[..., None],
        "z": box_distribution(predictions).flatten(2),
        "p": product_score(predictions),
    }
    maps = {kind: as_maps(x, sizes) for kind, x in rows.items()}
    maps["d"] = [_channels(x.distances) for x in points]
    maps["s"] = [_channels(x.fractions)[:, inverse(FRACTION_ROWS)] for x in points]
    taps = inverse(POINT_ROWS)
    maps["r_points"] = [_channels(x.box_points.flatten(3))[:, taps] for x in points]
    maps["c_points"] = [_channels(x.class_points.flatten(3))[:, taps] for x in points]
    return {
        f"{kind}/{name}": x
        for kind, levels in maps.items()
        for name, x in zip(names, levels, strict=True)
    }


def _channels(rows: Tensor) -> Tensor:
    """(N, H, W, channels) -> (N, channels, H, W)."""
    return rows.permute(0, 3, 1, 2)
