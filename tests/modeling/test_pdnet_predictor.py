# SPDX-License-Identifier: Apache-2.0
"""PDNet's predictor: against plain loops, against deformable convolution, with all switches off."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from pdnet_loops import Kinds, Level, predict
from pdnet_parts import (
    CHANNELS,
    DOUBLE,
    SIZES,
    STRIDES,
    K,
    Sizes,
    excited_head,
    grid_of,
    head_of,
    predictor_of,
    random_maps,
)
from torch import Tensor
from torchvision.ops import deform_conv2d
from util import tiny

from d2_decouple.config import get_config
from d2_decouple.modeling import (
    TSCODE,
    BoundaryPoints,
    GridOffsetPoints,
    PDNetPredictor,
    SemanticPoints,
)
from d2_decouple.structures import DensePredictions


def by_loops(
    predictor: PDNetPredictor, classes: list[Tensor], features: list[Tensor], kinds: Kinds
) -> list[list[dict[str, Any]]]:
    """What each cell of each image predicts, from the raw maps alone."""
    with torch.no_grad():
        raw = [(predictor.point_pred(x).numpy(), predictor.bbox_pred(x).numpy()) for x in features]
    return [
        predict(
            [
                Level(points[image], values[image], maps[image].numpy())
                for (points, values), maps in zip(raw, classes, strict=True)
            ],
            kinds,
            K,
        )
        for image in range(len(features[0]))
    ]


def check(
    predictions: DensePredictions, expected: list[list[dict[str, Any]]], bias: Tensor
) -> None:
    """All that is predicted, in pixels, where ``expected`` is in cells."""
    strides = predictions.strides[:, None]

    def rows(name: str) -> Tensor:
        return torch.tensor([[cell[name] for cell in image] for image in expected], dtype=DOUBLE)

    close = {"rtol": 0, "atol": 1e-9}
    extras = predictions.extras
    torch.testing.assert_close(extras["coarse_boxes"], rows("coarse") * strides, **close)
    torch.testing.assert_close(extras["boundary_points"], rows("sides") * strides[:, None], **close)
    torch.testing.assert_close(extras["class_points"], rows("semantic") * strides[:, None], **close)
    torch.testing.assert_close(extras["box_level_weights"], rows("weights"), **close)
    torch.testing.assert_close(predictions.boxes, rows("box") * strides, **close)
    torch.testing.assert_close(predictions.logits, rows("logits") + bias, **close)


SWITCHES = {
    "the paper's": Kinds(),
    "boxes alone": Kinds(cls="grid", num_points=1),
    "classes alone": Kinds(box="grid", box_levels=(0,)),
    "all off": Kinds(box="grid", cls="grid", num_points=1, box_levels=(0,)),
    "grid and offsets": Kinds(box="grid_offset", cls="grid_offset", num_points=3),
    "edge midpoints": Kinds(box="midpoints", num_points=1),
    "5 points": Kinds(num_points=5, box_levels=(0,)),
    "13 points": Kinds(num_points=13, box_levels=(-1,)),
    "16 points": Kinds(num_points=16, box_levels=(0, 1)),
    "three levels": Kinds(box_levels=(-1, 0, 1)),
    "two finer levels": Kinds(box_levels=(-2, -1, 0)),
    "own level first": Kinds(box_levels=(0, -1)),
    "one that is coarser": Kinds(box_levels=(1,)),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_equals_plain_loops(switch: str) -> None:
    kinds = SWITCHES[switch]
    predictor = predictor_of(kinds)
    features = random_maps(SIZES, CHANNELS)
    classes = random_maps(SIZES, predictor.class_outputs)
    predictions = predictor(classes, features, grid_of(SIZES))
    expected = by_loops(predictor, classes, features, kinds)
    check(predictions, expected, predictor.cls_score.bias.detach())
    if switch == "the paper's":
        boxes = torch.tensor([cell["coarse"] for cell in expected[0]])
        assert 5 < (boxes[:, 2:] < boxes[:, :2]).any(-1).sum() < len(boxes) - 5


@pytest.mark.parametrize("sizes", [[(7, 1), (4, 1), (2, 1)], [(1, 7), (1, 4)], [(1, 1)]], ids=str)
def test_maps_of_one_row_or_column(sizes: Sizes) -> None:
    predictor = predictor_of(Kinds())
    features = random_maps(sizes, CHANNELS, images=2)
    classes = random_maps(sizes, predictor.class_outputs, images=2)
    predictions = predictor(classes, features, grid_of(sizes))
    expected = by_loops(predictor, classes, features, Kinds())
    check(predictions, expected, predictor.cls_score.bias.detach())


def test_float32_equals_float64() -> None:
    predictor = predictor_of(Kinds())
    features = random_maps(SIZES, CHANNELS)
    classes = random_maps(SIZES, predictor.class_outputs)
    exact = predictor(classes, features, grid_of(SIZES))
    single = predictor.float()(
        [x.float() for x in classes],
        [x.float() for x in features],
        grid_of(SIZES, dtype=torch.float32),
    )
    assert {x.dtype for x in (single.boxes, single.logits, single.locations)} == {torch.float32}
    torch.testing.assert_close(single.boxes.double(), exact.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(single.logits.double(), exact.logits, rtol=1e-4, atol=1e-4)


def test_where_in_its_cell_a_point_lies_moves_everything_alike() -> None:
    """At offset 0.5 the same cells are read, and all pixels lie half a stride further.

    On one level: half a cell of another level is another number of pixels.
    """
    predictor = predictor_of(Kinds(box_levels=(0,)))
    features = random_maps(SIZES, CHANNELS)
    classes = random_maps(SIZES, predictor.class_outputs)
    corner, middle = (predictor(classes, features, grid_of(SIZES, x)) for x in (0.0, 0.5))
    shift = corner.strides[:, None] / 2
    torch.testing.assert_close(middle.logits, corner.logits)
    torch.testing.assert_close(middle.boxes, corner.boxes + shift)
    torch.testing.assert_close(middle.priors, corner.priors + shift)
    for name in ("boundary_points", "class_points"):
        shifted = corner.extras[name] + shift[:, None]
        torch.testing.assert_close(middle.extras[name], shifted)
    torch.testing.assert_close(middle.extras["coarse_boxes"], corner.extras["coarse_boxes"] + shift)


def test_logits_are_a_deformable_convolution() -> None:
    """A 1x1 convolution for each point, read there and summed, is one 3x3 deformable convolution
    of the tower's feature, whose cell (i, j) of the kernel lies at the point 3 * i + j.
    """
    head = excited_head(Kinds())
    features = [x.requires_grad_() for x in random_maps(SIZES, 64, images=2)]
    predictions = head(features)
    weight, bias = head.cls_score.weight, head.predictor.cls_score.bias
    kernel = weight.view(3, 3, K, 64).permute(2, 3, 0, 1)
    grid = grid_of(SIZES)
    points = predictions.extras["class_points"] / grid.strides[:, None, None]
    y, x = torch.meshgrid(torch.arange(-1.0, 2), torch.arange(-1.0, 2), indexing="ij")
    regular = grid.cells[:, None] + torch.stack((x, y), -1).view(9, 2).double()
    offsets = (points - regular).flip(-1).flatten(2).split(grid.level_sizes, 1)
    expected = []
    for level, size in enumerate(SIZES):
        offset = offsets[level].transpose(1, 2).unflatten(2, size)
        tower = head.cls_subnet(features[level])
        out = deform_conv2d(tower, offset, kernel, bias, padding=1)
        expected.append(out.flatten(2).transpose(1, 2))
    expected = torch.cat(expected, 1)
    torch.testing.assert_close(predictions.logits, expected, rtol=0, atol=1e-12)

    # And so are the gradients, where the points stay where they are.
    upstream = torch.randn_like(expected)
    leaves = [weight, bias, *head.cls_subnet.parameters()]
    ours, theirs = (
        torch.autograd.grad((x * upstream).sum(), leaves, retain_graph=True)
        for x in (predictions.logits, expected)
    )
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)


def test_all_off_is_the_plain_model() -> None:
    """One class map and one box, both read at the predicting cell."""
    head = excited_head(SWITCHES["all off"])
    features = random_maps(SIZES, 64, images=2)
    predictions = head(features)
    predictor = head.predictor
    assert predictor.point_pred.out_channels == 4
    assert head.cls_score.weight.shape == (K, 64, 1, 1)

    logits, coarse, boxes = [], [], []
    for feature, stride in zip(features, STRIDES, strict=True):
        cls, box = head.cls_subnet(feature), head.bbox_subnet(feature)
        height, width = feature.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        prior = torch.stack((x - 2, y - 2, x + 2, y + 2)).double()
        first = prior + F.conv2d(
            box, predictor.point_pred.weight, predictor.point_pred.bias, padding=1
        )
        second = first.detach() + F.conv2d(box, predictor.bbox_pred.weight)
        logits.append(F.conv2d(cls, head.cls_score.weight, predictor.cls_score.bias).flatten(2))
        coarse.append(first.flatten(2) * stride)
        boxes.append(second.flatten(2) * stride)
    pairs = {
        "logits": (predictions.logits, torch.cat(logits, 2).mT),
        "coarse": (predictions.extras["coarse_boxes"], torch.cat(coarse, 2).mT),
        "boxes": (predictions.boxes, torch.cat(boxes, 2).mT),
    }
    parameters = dict(head.named_parameters())
    for name, (got, want) in pairs.items():
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
        upstream = torch.randn_like(want)
        ours, plain = (
            torch.autograd.grad(
                (x * upstream).sum(),
                list(parameters.values()),
                retain_graph=True,
                materialize_grads=True,
            )
            for x in (got, want)
        )
        for parameter, mine, wanted in zip(parameters, ours, plain, strict=True):
            close = torch.allclose(mine, wanted, rtol=1e-9, atol=1e-9)
            assert close, f"{parameter} from {name}"


def test_class_maps_at_half_resolution() -> None:
    """A context rearranges its map before points are read: they are those of the own level."""
    context = TSCODE(channels=64)
    head = excited_head(Kinds(), context)
    assert head.cls_subnet[0].in_channels == 128
    sizes = [(12, 18), *SIZES]
    features = random_maps(sizes, 64)
    predictions = head(features)
    with torch.no_grad():
        cls, box = context(features)
        boxes = [head.bbox_subnet(x) for x in box]
        maps = [
            head.cls_score(head.cls_subnet(x), size) for x, size in zip(cls, SIZES, strict=True)
        ]
    expected = by_loops(head.predictor, maps, boxes, Kinds())
    check(predictions, expected, head.predictor.cls_score.bias.detach())


# How it starts, and what it is made of.


def test_starts_with_boxes_of_four_cells() -> None:
    """The cell in row 10 and column 20: rows 8 to 12, columns 18 to 22."""
    head = head_of(Kinds())
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    predictions = head([torch.randn(1, 64, *size) for size in sizes])
    coarse = predictions.extras["coarse_boxes"][0] / predictions.strides[:, None]
    box = coarse[10 * 24 + 20]
    torch.testing.assert_close(box, torch.tensor([18.0, 8.0, 22.0, 12.0]), rtol=0, atol=0.9)
    priors = predictions.priors / predictions.strides[:, None]
    assert priors[10 * 24 + 20].tolist() == [18, 8, 22, 12]
    assert priors[16 * 24 + 2 * 12 + 3].tolist() == [1, 0, 5, 4]  # row 2, column 3 of P4
    assert (coarse - priors).abs().mean() < 0.25
    torch.testing.assert_close(
        predictions.boxes[0], coarse * predictions.strides[:, None], rtol=0, atol=40
    )
    assert predictions.logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)


def test_image_larger_than_the_authors_grids() -> None:
    """2000 pixels: their grids end at 168 cells, which is 1344 pixels."""
    sizes = [(250, 10), (125, 5), (63, 3), (32, 2), (16, 1)]
    predictor = PDNetPredictor(
        num_classes=1,
        in_channels=1,
        class_points=SemanticPoints(num_points=1),
        box_points=BoundaryPoints(),
    )
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    predictions = predictor(maps, maps, grid_of(sizes, dtype=torch.float32))
    last = sizes[0][0] * sizes[0][1] - 1
    wanted = [56.0, 1976.0, 88.0, 2008.0]  # around (9, 249) * 8
    assert predictions.extras["coarse_boxes"][0, last].tolist() == wanted
    assert predictions.boxes[0, last].tolist() == wanted
    assert predictions.extras["class_points"][0, last, 0].tolist() == [72, 1992]


def test_coordinates_survive_autocast() -> None:
    """bfloat16 has steps of one cell from 128 on: the last column, 167, would be 168."""
    head = head_of(Kinds())
    sizes = [(2, 168), (1, 84), (1, 42), (1, 21), (1, 11)]
    features = [torch.zeros(1, 64, *size) for size in sizes]
    with torch.autocast("cpu", torch.bfloat16):
        predictions = head(features)
    extras = predictions.extras
    coordinates = [predictions.boxes, *extras.values(), predictions.locations, predictions.priors]
    assert {x.dtype for x in coordinates} == {torch.float32}
    assert torch.equal(extras["coarse_boxes"][0], predictions.priors)
    assert extras["boundary_points"][0, 167].tolist() == [
        [1320, 0],
        [1336, -16],
        [1352, 0],
        [1336, 16],
    ]
    assert extras["class_points"][0, 167, 4].tolist() == [1336, 0]


def test_facts_and_parameters() -> None:
    head = head_of(Kinds(), channels=256, classes=80)
    predictor = head.predictor
    assert (predictor.class_outputs, predictor.class_kernel_size) == (720, 1)
    assert predictor.class_bias is False
    assert sum(x.numel() for x in head.parameters()) == 4_986_482
    assert predictor.point_pred.weight.shape == (34, 256, 3, 3)
    assert predictor.bbox_pred.weight.shape == (4, 256, 1, 1)
    assert predictor.bbox_pred.bias is None
    assert head.cls_score.bias is None
    torch.testing.assert_close(
        predictor.cls_score.bias, torch.full((80,), -4.59512), rtol=0, atol=1e-5
    )
    for conv in (predictor.point_pred, predictor.bbox_pred, head.cls_score):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert predictor.point_pred.bias.eq(0).all()
    for tower in (head.cls_subnet, head.bbox_subnet):
        assert [tower[i].bias for i in (0, 3, 6, 9)] == [None] * 4


def test_the_heads_prior_is_that_of_the_votes() -> None:
    """Whoever sets the one number that every head has sets it for PDNet, too."""
    model = tiny(get_config("pdnet_R_50_FPN_1x"))
    model.model.head.prior_prob = 0.5
    assert instantiate(model.model).head.predictor.cls_score.bias.eq(0).all()


BAD: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "not four sides": (
        {"box_points": GridOffsetPoints(num_points=9)},
        ValueError,
        ["box_points", "9 points", "4", "side"],
    ),
    "no levels": ({"box_levels": ()}, ValueError, ["box_levels", "()", "[-1, 0]"]),
    "a level twice": ({"box_levels": (0, 0)}, ValueError, ["box_levels", "(0, 0)", "once"]),
    "one number": ({"box_levels": 0}, ValueError, ["box_levels is 0", "list"]),
    "half a level": ({"box_levels": [-0.5, 0]}, ValueError, ["[-0.5, 0]", "whole number"]),
    "a name for points": ({"box_points": "dynamic"}, TypeError, ["box_points", "'dynamic'"]),
    "a number for points": ({"class_points": 9}, TypeError, ["class_points", "9"]),
    "a class for points": ({"box_points": BoundaryPoints}, TypeError, ["box_points", "object"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    changes, error, named = BAD[case]
    arguments = {
        "num_classes": K,
        "in_channels": CHANNELS,
        "class_points": SemanticPoints(),
        "box_points": BoundaryPoints(),
    }
    with pytest.raises(error) as raised:
        PDNetPredictor(**{**arguments, **changes})
    assert all(part in str(raised.value) for part in named), raised.value
