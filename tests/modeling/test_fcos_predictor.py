# SPDX-License-Identifier: Apache-2.0
"""FCOS's predictor: decoding by hand, the order of predictions, and precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2_decouple.layers.points import make_grid
from d2_decouple.modeling import DenseHead, FCOSPredictor, SharedContext
from d2_decouple.structures import DensePredictions

STRIDES = [8, 16, 32, 64, 128]
SIZES = [(13, 17), (7, 9), (4, 5), (2, 3), (1, 2)]


def make_head(channels: int = 8, convs: int = 0, **changes: Any) -> DenseHead:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "context": SharedContext(channels=channels),
        "predictor": FCOSPredictor(num_classes=3, in_channels=channels),
        "strides": STRIDES,
        "offset": 0.5,
        "cls_conv_dims": [channels] * convs,
        "box_conv_dims": [channels] * convs,
    }
    head = DenseHead(**{**arguments, **changes})
    # Trained numbers rather than initial ones: distances of several cells, 500 pixels at P7.
    nn.init.normal_(head.predictor.bbox_pred.weight, std=0.3)
    nn.init.constant_(head.predictor.bbox_pred.bias, 3.0)
    return head


def random_maps(channels: int, sizes: list[tuple[int, int]], images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(images, channels, *size, generator=generator) for size in sizes]


def test_decodes_by_hand() -> None:
    """Every cell predicts (1, 2, 3, -1) strides; the ReLU makes the last 0."""
    predictor = FCOSPredictor(num_classes=2, in_channels=1)
    for part in (predictor.bbox_pred, predictor.ctrness):
        nn.init.zeros_(part.weight)
    predictor.bbox_pred.bias.data = torch.tensor([1.0, 2.0, 3.0, -1.0])
    predictor.ctrness.bias.data.fill_(-0.75)
    sizes = [(1, 2), (1, 1)]
    grid = make_grid(sizes, [8, 16], 0.5, device=torch.device("cpu"), dtype=torch.float32)
    maps = [torch.randn(1, 1, *size) for size in sizes]
    class_maps = [torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]), torch.tensor([[[[5.0]], [[6.0]]]])]
    predictions = predictor(class_maps, maps, grid)
    # Reference points (4, 4), (12, 4) and, with stride 16, (8, 8).
    want = [
        [4 - 8, 4 - 16, 4 + 24, 4],
        [12 - 8, 4 - 16, 12 + 24, 4],
        [8 - 16, 8 - 32, 8 + 48, 8],
    ]
    assert predictions.boxes.tolist() == [want]
    assert predictions.logits.tolist() == [[[1, 3], [2, 4], [5, 6]]]
    assert predictions.quality.tolist() == [[-0.75] * 3]
    assert predictions.locations.tolist() == [[4, 4], [12, 4], [8, 8]]
    assert predictions.strides.tolist() == [8, 8, 16]
    assert predictions.priors.tolist() == [[0, 0, 8, 8], [8, 0, 16, 8], [0, 0, 16, 16]]
    assert predictions.level_sizes == (2, 1)
    assert predictions.extras == {}


def test_rows_follow_the_maps() -> None:
    """Row start(level) + i * width + j is what the convolutions say at (i, j) of that level."""
    head = make_head()
    maps = random_maps(8, SIZES)
    predictions = head(maps)
    start = 0
    for x, (height, width), stride in zip(maps, SIZES, STRIDES, strict=True):
        distances = head.predictor.bbox_pred(x).relu() * stride
        center, logits = head.predictor.ctrness(x), head.cls_score(x, (height, width))
        for image, i, j in ((0, 0, 0), (1, height - 1, 0), (0, height // 2, width - 1)):
            row = start + i * width + j
            left, top, right, bottom = distances[image, :, i, j].unbind()
            at_x, at_y = (j + 0.5) * stride, (i + 0.5) * stride
            box = torch.stack((at_x - left, at_y - top, at_x + right, at_y + bottom))
            torch.testing.assert_close(predictions.boxes[image, row], box)
            torch.testing.assert_close(predictions.quality[image, row], center[image, 0, i, j])
            torch.testing.assert_close(predictions.logits[image, row], logits[image, :, i, j])
        start += height * width
    assert predictions.boxes.shape == (2, start, 4)


def test_distances_are_never_negative() -> None:
    head = make_head()
    nn.init.constant_(head.predictor.bbox_pred.bias, -0.5)
    predictions = head(random_maps(8, SIZES))
    assert (predictions.boxes[..., :2] <= predictions.locations).all()
    assert (predictions.boxes[..., 2:] >= predictions.locations).all()
    assert (predictions.boxes[..., 2:] > predictions.locations).any()


def test_facts_for_the_head() -> None:
    predictor = FCOSPredictor(num_classes=7, in_channels=16)
    assert (predictor.num_classes, predictor.class_outputs) == (7, 7)
    assert (predictor.class_kernel_size, predictor.class_bias) == (3, True)
    head = make_head(predictor=FCOSPredictor(num_classes=7, in_channels=8))
    assert head.cls_score.weight.shape == (7, 8, 3, 3)
    assert head.cls_score.bias is not None
    assert list(predictor.state_dict()) == [
        *("bbox_pred.weight", "bbox_pred.bias", "ctrness.weight", "ctrness.bias")
    ]


def test_initial_classes_are_rare_and_boxes_small() -> None:
    torch.manual_seed(0)
    predictor = FCOSPredictor(num_classes=3, in_channels=64)
    head = make_head(channels=64, predictor=predictor)
    assert head.cls_score.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
    assert head.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert predictor.ctrness.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert predictor.ctrness.bias.tolist() == [0]


def floats(predictions: DensePredictions) -> dict[str, Tensor]:
    values = {k: v for k, v in predictions._asdict().items() if isinstance(v, Tensor)}
    assert sorted(values) == ["boxes", "locations", "logits", "priors", "quality", "strides"]
    return values


def test_float64_goes_through_whole() -> None:
    head = make_head(channels=32, convs=1)
    maps = random_maps(32, SIZES)
    single = floats(head(maps))
    double = floats(head.double()([x.double() for x in maps]))
    assert {x.dtype for x in single.values()} == {torch.float32}
    assert {x.dtype for x in double.values()} == {torch.float64}
    for name, value in double.items():
        torch.testing.assert_close(single[name].double(), value, rtol=1e-4, atol=1e-3)
    # It is not float32 somewhere on the way.
    assert not torch.equal(double["boxes"].float().double(), double["boxes"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_predictor_alone(dtype: torch.dtype) -> None:
    """Without a tower the predictor reads the float32 maps: boxes equal a float32 run's.

    A test of types would not do: numbers that were 16 bits wide in between are off by pixels.
    """
    head, maps = make_head(), random_maps(8, SIZES)
    want = floats(head(maps))
    with torch.autocast("cpu", dtype):
        got = floats(head(maps))
        assert head.predictor.bbox_pred(maps[0]).dtype == dtype  # autocast is on out here
    assert {x.dtype for x in got.values()} == {torch.float32}
    for name in ("boxes", "quality", "locations", "strides", "priors"):
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-4)
    coarse = want["boxes"].to(dtype).float()
    assert (coarse - want["boxes"]).abs().max() > 0.1  # what 16 bits would have cost


def test_autocast_in_the_towers_reaches_the_predictor_as_float32() -> None:
    """With towers in bfloat16 the predictor computes in float32 from what they give."""
    head, maps = make_head(channels=32, convs=2), random_maps(32, SIZES)
    seen: list[Any] = []
    head.predictor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        got = floats(head(maps))
    class_maps, box_maps, grid = seen[0]
    assert {x.dtype for x in [*class_maps, *box_maps, grid.locations]} == {torch.float32}
    assert all(torch.equal(x.bfloat16().float(), x) for x in box_maps)  # they were bfloat16
    want = floats(head.predictor(class_maps, box_maps, grid))
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def test_half_maps_without_autocast() -> None:
    """A head converted to bfloat16 still gets its predictor's maps in float32."""
    head = make_head()
    head.context.bfloat16()
    head.cls_score.bfloat16()
    maps = random_maps(8, SIZES)
    got = floats(head([x.bfloat16() for x in maps]))
    assert {x.dtype for x in got.values()} == {torch.float32}
    want = floats(head.float()([x.bfloat16().float() for x in maps]))
    torch.testing.assert_close(got["boxes"], want["boxes"], rtol=0, atol=1e-4)


def test_every_parameter_gets_a_gradient() -> None:
    head = make_head(channels=32, convs=1)
    predictions = head(random_maps(32, SIZES))
    sums = [predictions.logits.sum(), predictions.boxes.square().sum(), predictions.quality.sum()]
    torch.stack(sums).sum().backward()
    silent = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
