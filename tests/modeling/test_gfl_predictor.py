# SPDX-License-Identifier: Apache-2.0
"""GFL's and GFLv2's predictors: decoding and statistics by hand, names, and precision."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2_decouple.layers.points import make_grid
from d2_decouple.layers.tower import bias_free_tower
from d2_decouple.modeling import (
    DenseHead,
    DistributionQuality,
    GFLPredictor,
    GFLv2Predictor,
    SharedContext,
    box_distribution,
    product_score,
)
from d2_decouple.structures import DensePredictions

STRIDES = [8, 16, 32, 64, 128]
SIZES = [(13, 17), (7, 9), (4, 5), (2, 3), (1, 2)]
BOTH = (GFLPredictor, GFLv2Predictor)


def make_head(kind: Any = GFLPredictor, channels: int = 8, convs: int = 0, **facts: Any) -> Any:
    torch.manual_seed(0)
    settings = {"num_classes": 3, "in_channels": channels, "num_levels": len(STRIDES), **facts}
    head = DenseHead(
        context=SharedContext(channels=channels),
        predictor=kind(**settings),
        strides=STRIDES,
        offset=0.0,
        cls_conv_dims=[channels] * convs,
        box_conv_dims=[channels] * convs,
        tower=bias_free_tower,
    )
    # Trained numbers rather than initial ones: sharp distributions, another scale on each level.
    nn.init.normal_(head.predictor.bbox_pred.weight, std=0.4)
    nn.init.normal_(head.predictor.bbox_pred.bias)
    head.predictor.scales.data = torch.tensor([0.5, 1.0, 1.25, 1.5, 2.0])
    return head


def random_maps(channels: int = 8, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(images, channels, *size, generator=generator) for size in SIZES]


def test_decodes_by_hand() -> None:
    """Bins 0, 1, 2; scales 1 and 2. The same logits on both levels.

    Left: all alike, 1. Top: bin 2 alone, 2. Right: ln 3 for bin 1, none for bin 2: 3/4 of a
    stride, and with its logits doubled 9/10. Bottom: bin 0 alone, 0.
    """
    predictor = GFLPredictor(num_classes=1, in_channels=1, num_levels=2, reg_max=2)
    nn.init.zeros_(predictor.bbox_pred.weight)
    never = -1000.0
    sides = [[0.0, 0, 0], [never, never, 0], [0, math.log(3), never], [0, never, never]]
    predictor.bbox_pred.bias.data = torch.tensor(sides).flatten()
    predictor.scales.data = torch.tensor([1.0, 2.0])
    sizes = [(1, 2), (1, 1)]
    grid = make_grid(sizes, [8, 16], 0.0, device=torch.device("cpu"), dtype=torch.float32)
    maps = [torch.randn(1, 1, *size) for size in sizes]
    class_maps = [torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0]]]])]
    predictions = predictor(class_maps, maps, grid)
    # Reference points (0, 0), (8, 0) and, with stride 16, (0, 0).
    want = [[-8, -16, 6, 0], [0, -16, 14, 0], [-16, -32, 14.4, 0]]
    torch.testing.assert_close(predictions.boxes, torch.tensor([want]))
    assert predictions.logits.tolist() == [[[1], [2], [3]]]
    assert predictions.quality is None
    assert predictions.locations.tolist() == [[0, 0], [8, 0], [0, 0]]
    assert predictions.priors.tolist() == [
        [-32, -32, 32, 32],
        [-24, -32, 40, 32],
        [-64, -64, 64, 64],
    ]
    assert predictions.level_sizes == (2, 1)
    logits = torch.tensor(sides)
    assert torch.equal(box_distribution(predictions)[0], torch.stack([logits, logits, 2 * logits]))


def test_rows_follow_the_maps() -> None:
    """Row start(level) + i * width + j is what the convolutions say at (i, j) of that level."""
    head, maps = make_head(), random_maps()
    predictions = head(maps)
    assert predictions.extras["box_distribution"].shape == (2, sum(predictions.level_sizes), 4, 17)
    start = 0
    for level, (x, (height, width)) in enumerate(zip(maps, SIZES, strict=True)):
        raw, logits = head.predictor.bbox_pred(x), head.cls_score(x, (height, width))
        for image, i, j in ((0, 0, 0), (1, height - 1, 0), (0, height // 2, width - 1)):
            row, stride = start + i * width + j, STRIDES[level]
            shares = (raw[image, :, i, j] * head.predictor.scales[level]).view(4, 17).softmax(-1)
            left, top, right, bottom = (stride * shares @ torch.arange(17.0)).unbind()
            at_x, at_y = j * stride, i * stride
            box = torch.stack((at_x - left, at_y - top, at_x + right, at_y + bottom))
            torch.testing.assert_close(predictions.boxes[image, row], box, rtol=0, atol=1e-2)
            torch.testing.assert_close(predictions.logits[image, row], logits[image, :, i, j])
        start += height * width


@pytest.mark.parametrize("kind", BOTH)
def test_names_and_facts(kind: Any) -> None:
    predictor = kind(num_classes=7, in_channels=16, num_levels=5, reg_max=8)
    assert (predictor.num_classes, predictor.class_outputs) == (7, 7)
    assert (predictor.class_kernel_size, predictor.class_bias) == (3, True)
    quality = {
        "reg_conf.0.weight": (64, 20),
        "reg_conf.0.bias": (64,),
        "reg_conf.2.weight": (1, 64),
        "reg_conf.2.bias": (1,),
    }
    assert {name: tuple(x.shape) for name, x in predictor.state_dict().items()} == {
        "scales": (5,),
        "bbox_pred.weight": (36, 16, 3, 3),
        "bbox_pred.bias": (36,),
        **(quality if kind is GFLv2Predictor else {}),
    }


def test_flat_names_load() -> None:
    """As the other hosts' predictors: what a head of Detectron2's kind names without a slot."""
    source, target = make_head(GFLv2Predictor), make_head(GFLv2Predictor)
    for parameter in source.predictor.parameters():
        nn.init.normal_(parameter)
    state = {
        name if name == "predictor.scales" else name.replace("predictor.", ""): value
        for name, value in source.state_dict().items()
    }
    target.load_state_dict(state)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_initial_values() -> None:
    torch.manual_seed(0)
    predictor = GFLv2Predictor(num_classes=3, in_channels=64, num_levels=5)
    assert predictor.scales.tolist() == [1] * 5
    for layer in (predictor.bbox_pred, predictor.reg_conf[0], predictor.reg_conf[2]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert not layer.bias.any()


# The quality that distributions tell.


def test_statistics_by_hand() -> None:
    """The layers get, side by side, the four greatest shares in order, and their mean."""
    quality = DistributionQuality()
    shares = torch.tensor([0.05, 0.4, 0.1, 0.2, 0.15, 0.1])
    sides = torch.stack([shares, shares.flip(0), shares.roll(2), torch.full((6,), 1 / 6)])
    seen: list[Tensor] = []
    quality[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    out = quality(sides.log()[None])
    best = [0.4, 0.2, 0.15, 0.1, 0.85 / 4]
    torch.testing.assert_close(seen[0], torch.tensor([best * 3 + [1 / 6] * 5]))
    hidden = (seen[0] @ quality[0].weight.T + quality[0].bias).clamp(min=0)
    torch.testing.assert_close(out, (hidden @ quality[2].weight.T + quality[2].bias)[:, 0])


def test_quality_of_each_row_and_the_joint_score() -> None:
    head = make_head(GFLv2Predictor)
    for layer in (head.predictor.reg_conf[0], head.predictor.reg_conf[2]):
        nn.init.normal_(layer.weight)
    predictions = head(random_maps())
    logits = box_distribution(predictions)
    assert predictions.quality is not None
    assert predictions.quality.shape == logits.shape[:2]
    assert predictions.quality.std() > 0.1
    for place in ((0, 3), (1, 250), (1, 310)):
        alone = head.predictor.reg_conf(logits[place])
        torch.testing.assert_close(predictions.quality[place], alone)
    joint = predictions.logits.sigmoid() * predictions.quality.sigmoid()[..., None]
    assert torch.equal(product_score(predictions), joint)


def test_quality_teaches_the_distributions() -> None:
    """The shares are not detached: a loss of the score reaches the box's convolution."""
    head = make_head(GFLv2Predictor)
    quality = head(random_maps()).quality
    gradients = torch.autograd.grad(
        quality.square().sum(), [head.predictor.bbox_pred.weight, head.predictor.scales]
    )
    assert all(gradient.any() for gradient in gradients)


def test_quality_by_differences() -> None:
    quality = DistributionQuality(topk=2, hidden_channels=5).double()
    for parameter in quality.parameters():
        nn.init.normal_(parameter)
    logits = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quality, logits)


# Precision.


def floats(predictions: DensePredictions) -> dict[str, Tensor]:
    values = {k: v for k, v in predictions._asdict().items() if isinstance(v, Tensor)}
    return {**values, "box_distribution": box_distribution(predictions)}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_boxes_alone(kind: Any, dtype: torch.dtype) -> None:
    """From maps that half precision holds exactly, boxes are those of a float32 run.

    Sides at P7 reach a thousand pixels; a mean that is computed in half precision would move them
    by pixels.
    """
    head = make_head(kind)
    maps = [x.to(dtype).float() for x in random_maps()]
    want = floats(head(maps))
    with torch.autocast("cpu", dtype):
        got = floats(head([x.to(dtype) for x in maps]))
        assert head.predictor.bbox_pred(maps[0]).dtype == dtype  # autocast is on out here
    assert {x.dtype for x in got.values()} == {torch.float32}
    sides = (want["boxes"] - want["locations"].repeat(1, 2)).abs()
    assert sides[:, -2:].max() > 1000
    for name, value in want.items():
        if name not in ("logits", "quality"):  # the class convolution does run under autocast
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-3)
    distances = box_distribution(head(maps)).to(dtype).softmax(-1) @ torch.arange(17, dtype=dtype)
    coarse = distances.float() * want["strides"][:, None]
    assert (coarse - sides).abs().max() > 0.5  # what half precision would have cost


@pytest.mark.parametrize("kind", BOTH)
def test_float64_goes_through_whole(kind: Any) -> None:
    head = make_head(kind, channels=32, convs=1)
    maps = random_maps(32)
    single = floats(head(maps))
    double = floats(head.double()([x.double() for x in maps]))
    assert {x.dtype for x in double.values()} == {torch.float64}
    for name, value in double.items():
        torch.testing.assert_close(single[name].double(), value, rtol=1e-4, atol=1e-2)
    assert not torch.equal(double["boxes"].float().double(), double["boxes"])


@pytest.mark.parametrize("kind", BOTH)
def test_every_parameter_gets_a_gradient(kind: Any) -> None:
    head = make_head(kind, channels=32, convs=1)
    predictions = head(random_maps(32))
    sums = [predictions.logits.sum(), predictions.boxes.square().sum()]
    if predictions.quality is not None:
        sums.append(predictions.quality.sum())
    torch.stack(sums).sum().backward()
    silent = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


# What cannot be built says what to type.


@pytest.mark.parametrize("kind", BOTH)
def test_no_bins_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"reg_max is 0; wanted .* such as 16"):
        make_head(kind, reg_max=0)


def test_other_levels_are_refused() -> None:
    head = make_head()
    head.predictor.scales = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"scales for 4 levels and got 5; set .*num_levels=5"):
        head(random_maps())


def test_too_few_bins_for_the_quality_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 greatest of 3 .* reg_max to 3 or more"):
        make_head(GFLv2Predictor, reg_max=2)(random_maps())
    with pytest.raises(ValueError, match=r"topk is 0; wanted .* such as 4"):
        DistributionQuality(topk=0)
