# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN's ROI heads, small, with what they are trained and tested with."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from util import make_instances

from d2_decouple.layers.boxes import BoxTransform
from d2_decouple.modeling import (
    BoxBranch,
    ClassBranch,
    ConvBoxBranch,
    ConvHead,
    DecoupledProposals,
    DecoupledROIHeads,
    FCHead,
    HardNMS,
    RegionSelection,
    SharedBoxBranch,
)

K = 3
CHANNELS = 4
WIDTH = 16  # of the fully connected layers
SIZE = (96, 128)  # of an image, (H, W)
LEVELS = ["p2", "p3", "p4", "p5"]
STRIDES = [4, 8, 16, 32]
WEIGHTS = ([10.0, 10, 5, 5], [20.0, 20, 10, 10], [1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067])


def fc_head() -> FCHead:
    return FCHead(in_channels=CHANNELS, fc_dims=[WIDTH, WIDTH])


def box_branches(stages: int = 3, kind: str = "fc") -> list[Any]:
    """As in the recipes: a change for each class at first, one for all in further stages."""
    branches = []
    for stage in range(stages):
        options: dict[str, Any] = {
            "transform": BoxTransform(weights=WEIGHTS[stage]),
            "num_classes": None if stage else K,
        }
        if kind == "fc":
            branches.append(BoxBranch(head=fc_head(), **options))
        elif kind == "shared":
            branches.append(SharedBoxBranch(in_features=WIDTH, **options))
        else:
            head = ConvHead(in_channels=CHANNELS, out_channels=WIDTH, num_convs=1)
            branches.append(ConvBoxBranch(head=head, **options))
    return branches


def pooler_of(strides: Sequence[int] = STRIDES, output_size: int = 7) -> ROIPooler:
    return ROIPooler(output_size, [1 / stride for stride in strides], 0, "ROIAlignV2")


def heads_of(branches: Sequence[nn.Module] | None = None, **changes: Any) -> DecoupledROIHeads:
    """Heads whose outputs differ between regions; ``changes`` replace arguments."""
    branches = box_branches() if branches is None else branches
    settings: dict[str, Any] = {
        "num_classes": K,
        "batch_size_per_image": 64,
        "positive_fraction": 0.25,
        "proposal_matcher": Matcher([0.5], [0, 1]),
        "box_matcher": Matcher([0.5], [0, 1]),
        "box_in_features": LEVELS,
        "box_pooler": pooler_of(),
        "class_branch": ClassBranch(head=fc_head(), num_classes=K),
        "box_branches": branches,
        "box_batch_size_per_image": 64,
        "stage_loss_weights": [1.0, 0.5, 0.25][: len(branches)],
        "selection": RegionSelection(test_score_thresh=0.05, nms=HardNMS(test_nms_thresh=0.5)),
        **changes,
    }
    heads = DecoupledROIHeads(**settings)
    nn.init.normal_(heads.class_branch.cls_score.weight, std=0.5)
    for branch in heads.box_branches:
        nn.init.normal_(branch.bbox_pred.weight, std=0.2)
    return heads


def features_of(images: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    height, width = SIZE
    return {
        name: torch.randn(images, CHANNELS, height // stride, width // stride, dtype=dtype)
        for name, stride in zip(LEVELS, STRIDES, strict=True)
    }


def proposals_of(boxes: Tensor | Sequence[Sequence[float]], size: Any = SIZE) -> Instances:
    """Proposals of one image, the first the best."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    logits = -torch.arange(len(boxes)).float()
    return Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits)


def near(boxes: Sequence[Sequence[float]], copies: int, spread: float = 0.1) -> Tensor:
    """Copies of boxes, of which each side is moved by about ``spread`` of its length."""
    origin = torch.tensor(boxes).reshape(-1, 4).repeat(copies, 1)
    sides = (origin[:, 2:] - origin[:, :2]).repeat(1, 2)
    moved = origin + spread * sides * (2 * torch.rand(len(origin), 4) - 1)
    limits = torch.tensor([SIZE[1], SIZE[0]]).repeat(2)
    return torch.minimum(moved.clamp(min=0), limits)


def anywhere(count: int) -> Tensor:
    """Boxes of 2 to 40 pixels in the image."""
    corner = torch.rand(count, 2) * torch.tensor([SIZE[1] - 40.0, SIZE[0] - 40.0])
    return torch.cat((corner, corner + 2 + 38 * torch.rand(count, 2)), dim=-1)


OBJECTS = (([[10.0, 12, 50, 60], [60.0, 20, 120, 80]], [0, 2]), ([[30.0, 30, 90, 70]], [1]))


def targets_of(objects: Any = OBJECTS) -> list[Instances]:
    return [make_instances(SIZE, boxes, classes) for boxes, classes in objects]


def scene(objects: Any = OBJECTS) -> tuple[DecoupledProposals, list[Instances]]:
    """Proposals of both kinds around objects and elsewhere, and the ground truth."""
    sets = [
        [proposals_of(torch.cat((near(boxes, 6), anywhere(20)))) for boxes, _ in objects]
        for _ in range(2)
    ]
    return DecoupledProposals(*sets), targets_of(objects)
