# SPDX-License-Identifier: Apache-2.0
"""The scene of SALT-Net's fact sheet, section 6: four locations, four channels, two objects."""

import torch
from torch import Tensor, nn

from d2_decouple.layers.points import Grid, make_grid
from d2_decouple.modeling import GFLAssigner, GFLPredictor, class_score
from d2_decouple.structures import DensePredictions, DenseTargets, foreground

SIZE = (2, 2)
STRIDE = 8
LOSSES = {"cls": 0.332041, "bbox": 1.752382, "dfl": 0.860802, "init": 0.482582}


def grid(dtype: torch.dtype) -> Grid:
    return make_grid([SIZE], [STRIDE], 0.0, device=torch.device("cpu"), dtype=dtype)


def scene(dtype: torch.dtype) -> tuple[DensePredictions, DenseTargets]:
    """Predictions without coarse boxes, and targets."""
    n = torch.arange(4, dtype=dtype)
    scores = 0.05 * (n + 1) + 0.1 * n[:, None]
    side, index = torch.arange(4, dtype=dtype)[:, None], torch.arange(17, dtype=dtype)
    logits = (0.3 * index + 0.5 * side + 0.7 * n[:, None, None]).cos()
    predictor = GFLPredictor(num_classes=4, in_channels=68, num_levels=1).to(dtype)
    predictor.register_module("bbox_pred", nn.Identity())
    maps = [x.flatten(1).T.reshape(1, -1, *SIZE) for x in (scores.logit(), logits)]
    predictions = predictor([maps[0]], [maps[1]], grid(dtype))
    boxes = torch.zeros(1, 4, 4, dtype=dtype)
    boxes[0, 0] = torch.tensor([-20.0, -12, 28, 36])
    boxes[0, 3] = torch.tensor([-10.0, -16, 44, 40])
    labels = torch.tensor([[1, 4, 4, 0]])
    assigner = GFLAssigner(num_classes=4, score=class_score)
    weights, quality, minimum = assigner._weights(predictions, boxes, foreground(labels, 4))
    assert minimum < 1e-6
    return predictions, DenseTargets(
        labels=labels,
        boxes=boxes,
        cls_weights=torch.ones(1, 4, 1, dtype=dtype),
        box_weights=weights,
        quality=quality,
        cls_normalizer=torch.tensor(2.0, dtype=dtype),
        box_normalizer=weights.sum(),
        extras={},
    )


def distances(dtype: torch.dtype) -> Tensor:
    """(1, 2, 2, 4) sides of the coarse boxes, in cells."""
    n = torch.arange(4, dtype=dtype)
    return (1 + 0.25 * n + 0.5 * n[:, None]).view(1, *SIZE, 4)
