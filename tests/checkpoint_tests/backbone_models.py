# SPDX-License-Identifier: Apache-2.0
"""Networks for the tests of backbone weights, with random weights and statistics."""

import torch
import torchvision
from detectron2.modeling.backbone import BasicStem, ResNet
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXEL_MEAN = [123.675, 116.280, 103.530]
STAGES = ["res2", "res3", "res4", "res5"]


class Pyramid(nn.Module):
    """What lies between a detector and its bottom-up network: names only."""

    def __init__(self, bottom_up: ResNet) -> None:
        super().__init__()
        self.bottom_up = bottom_up


class Detector(nn.Module):
    """As much of a detector as weights of a backbone need."""

    def __init__(
        self, bottom_up: nn.Module, input_format: str = "BGR", std: float | list[float] = 1.0
    ) -> None:
        super().__init__()
        self.backbone = Pyramid(bottom_up)
        mean = PIXEL_MEAN if input_format == "RGB" else PIXEL_MEAN[::-1]
        std = [std] * 3 if isinstance(std, float) else std
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(std).view(-1, 1, 1), False)

    def features(self, rgb: Tensor) -> list[Tensor]:
        """Maps of all stages of an image (3, H, W) of grey levels in RGB."""
        image = rgb if self.input_format == "RGB" else rgb.flip(0)
        maps = self.backbone.bottom_up(((image - self.pixel_mean) / self.pixel_std)[None])
        return [maps[name] for name in STAGES]


def our_resnet(depth: int, *, norm: str = "FrozenBN", in_1x1: bool = False, **options) -> ResNet:
    """Detectron2's, in evaluation mode."""
    if depth > 34:
        options["stride_in_1x1"] = in_1x1
    stages = ResNet.make_default_stages(depth, norm=norm, **options)
    resnet = ResNet(BasicStem(norm=norm), stages, out_features=STAGES, freeze_at=0)
    return resnet.eval()


def their_resnet(depth: int) -> nn.Module:
    """torchvision's, with statistics that a wrong name would show."""
    return randomized(torchvision.models.get_model(f"resnet{depth}", weights=None))


def randomized(model: nn.Module) -> nn.Module:
    """Draw what normalises; the rest is random from the start. In evaluation mode."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.3, 0.9)
            nn.init.normal_(part.bias, std=0.3)
    return model.eval()


def their_features(
    model: nn.Module, rgb: Tensor, mean: tuple = MEAN, std: tuple = STD
) -> list[Tensor]:
    """Maps of layer1 to layer4 of torchvision's or timm's network."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    x = model.maxpool(model.bn1(model.conv1(((rgb / 255 - mean) / std)[None])).relu())
    maps = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        x = getattr(model, name)(x)
        maps.append(x)
    return maps


def grey_levels(height: int = 96, width: int = 64) -> Tensor:
    """A random image (3, H, W)."""
    return torch.randint(256, (3, height, width)).float()


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Over all maps, relative to the largest value of each."""
    assert [tuple(a.shape) for a in ours] == [tuple(b.shape) for b in theirs]
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
