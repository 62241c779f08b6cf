# SPDX-License-Identifier: Apache-2.0
"""What rows about whole detectors share: one image, its ground truth, planted candidates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .row import Row, Step

__all__ = [
    "CLASSES",
    "PLANTED",
    "SizedRow",
    "ground_truth",
    "image",
    "inference",
    "plant",
    "train_step",
    "training",
    "training_inputs",
]

Size = tuple[int, int]

CLASSES = 80
PLANTED = 4  # classes that every location predicts: about 1,000 candidates a level


@dataclass(frozen=True, kw_only=True)
class SizedRow(Row):
    """A comparison that says what some of the memory of both sides is for.

    Attributes:
        sizes: measures MiB of ours and of the reference, by what they are of.
        size_targets: for some of them the ratio ours / reference that shall not be exceeded.
    """

    sizes: Callable[[], Mapping[str, tuple[float, float]]]
    size_targets: Mapping[str, float] = field(default_factory=dict)


def plant(class_bias: Tensor, distance_bias: Tensor | None = None) -> None:
    """Make a random network propose: the first classes score high everywhere.

    Where boxes are given by four distances, these become 2 strides each, so that boxes overlap.
    """
    with torch.no_grad():
        class_bias[:PLANTED] = 1.0
        if distance_bias is not None:
            distance_bias[:] = 2.0


def image(size: Size) -> Tensor:
    """(3, H, W) noise, uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)


def ground_truth(size: Size) -> tuple[Tensor, Tensor]:
    """20 boxes of 16 to 512 pixels (xyxy) and their classes."""
    generator = torch.Generator().manual_seed(1)
    height, width = size
    side = 2 ** (4 + 5 * torch.rand(20, 2, generator=generator))
    corner = torch.rand(20, 2, generator=generator) * (torch.tensor([width, height]) - side)
    return torch.cat((corner, corner + side), 1), torch.arange(20)


def inference(build: Callable[[], nn.Module], size: Size) -> Step:
    """The detections of a detector of Detectron2's kind."""
    model = build().eval()
    inputs = [{"image": image(size), "height": size[0], "width": size[1]}]

    def step() -> Any:
        with torch.no_grad():
            return model(inputs)

    return step


def train_step(model: nn.Module, losses: Callable[[], dict[str, Tensor]], lr: float = 1e-6) -> Step:
    """Forward, backward and an optimizer's step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()

    return step


def training_inputs(size: Size) -> list[dict[str, Any]]:
    """The image and its ground truth, as detectors of Detectron2's kind take them."""
    boxes, classes = ground_truth(size)
    truth = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
    return [{"image": image(size), "instances": truth}]


def training(build: Callable[[], nn.Module], size: Size, lr: float = 1e-6) -> Step:
    """A training step of a detector of Detectron2's kind."""
    model, inputs = build().train(), training_inputs(size)
    return train_step(model, lambda: model(inputs), lr)
