# SPDX-License-Identifier: Apache-2.0
"""ATSS's predictor by hand and by loops; its recipe; what it says about wrong input."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fcos_assigner_cost import Recorder
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from util import excite, loss_sum, make_instances, random_input, tiny_model, without_gradient

from d2_decouple.config import get_config
from d2_decouple.layers.points import make_grid
from d2_decouple.layers.tower import bias_free_tower
from d2_decouple.modeling import ATSSAssigner, ATSSPredictor, DenseHead, SharedContext
from d2_decouple.modeling.head import prior_bias
from d2_decouple.structures import DensePredictions

STRIDES = [8, 16, 32, 64, 128]
SIZES = [(13, 17), (7, 9), (4, 5), (2, 3), (1, 2)]
SCALES = torch.tensor([0.5, 1.0, 1.25, 1.5, 2.0])


def make_head(channels: int = 8, convs: int = 0) -> DenseHead:
    head = DenseHead(
        context=SharedContext(channels=channels),
        predictor=ATSSPredictor(num_classes=3, in_channels=channels, num_levels=len(STRIDES)),
        strides=STRIDES,
        offset=0.0,
        cls_conv_dims=[channels] * convs,
        box_conv_dims=[channels] * convs,
        tower=bias_free_tower,
    )
    for part in (head.predictor.bbox_pred, head.predictor.ctrness):
        nn.init.normal_(part.weight, std=0.2)
        nn.init.normal_(part.bias)
    head.predictor.scales.data = SCALES.clone()
    return head


def random_maps(channels: int = 8, images: int = 2) -> list[Tensor]:
    return [torch.randn(images, channels, *size) for size in SIZES]


def floats(predictions: DensePredictions) -> dict[str, Tensor]:
    return {name: x for name, x in predictions._asdict().items() if torch.is_tensor(x)}


def test_decodes_by_hand() -> None:
    """Outputs (0.5, -1, 1, 2), scales 1 and 2. The anchor of cell (1, 0) of the first level is
    64 pixels long and centred on (8, 0); the other level's is 128 long, centred on (0, 0).

    Outputs count in tenths of the anchor's sides, and in fifths of their logarithms.
    """
    predictor = ATSSPredictor(num_classes=1, in_channels=1, num_levels=2)
    nn.init.zeros_(predictor.bbox_pred.weight)
    predictor.bbox_pred.bias.data = torch.tensor([0.5, -1.0, 1.0, 2.0])
    predictor.scales.data = torch.tensor([1.0, 2.0])
    grid = make_grid([(1, 2), (1, 1)], [8, 16], 0, device=torch.device("cpu"), dtype=torch.float32)
    maps = [torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 1)]
    found = predictor([x.clone() for x in maps], maps, grid)
    assert found.priors.tolist() == [[-32, -32, 32, 32], [-24, -32, 40, 32], [-64, -64, 64, 64]]
    x, y, width, height = 8 + 0.05 * 64, -0.1 * 64, 64 * math.exp(0.2), 64 * math.exp(0.4)
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    assert found.boxes[0, 1].tolist() == pytest.approx(box, rel=1e-5)
    x, y, width, height = 0.1 * 128, -0.2 * 128, 128 * math.exp(0.4), 128 * math.exp(0.8)
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    assert found.boxes[0, 2].tolist() == pytest.approx(box, rel=1e-5)
    torch.testing.assert_close(found.logits[0, :, 0], torch.cat([x.flatten() for x in maps]))


def test_rows_follow_the_maps() -> None:
    """Each row from its own cell of the raw maps, by loops."""
    head, maps = make_head(), [x.double() for x in random_maps()]
    head = head.double()
    with torch.no_grad():
        found = head(maps)
        raw = [
            [F.conv2d(x, conv.weight, conv.bias, padding=1).tolist() for x in maps]
            for conv in (head.predictor.bbox_pred, head.predictor.ctrness, head.cls_score)
        ]
    assert found.level_sizes == tuple(height * width for height, width in SIZES)
    for image in range(2):
        row = 0
        for level, ((height, width), stride) in enumerate(zip(SIZES, STRIDES, strict=True)):
            boxes, quality, logits = (maps_of[level][image] for maps_of in raw)
            for i in range(height):
                for j in range(width):
                    dx, dy, dw, dh = (SCALES[level].item() * boxes[k][i][j] for k in range(4))
                    side = 8 * stride
                    x, y = stride * j + 0.1 * dx * side, stride * i + 0.1 * dy * side
                    w, h = side * math.exp(0.2 * dw), side * math.exp(0.2 * dh)
                    want = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                    assert found.boxes[image, row].tolist() == pytest.approx(want, abs=1e-9)
                    assert found.locations[row].tolist() == [stride * j, stride * i]
                    assert found.strides[row] == stride
                    assert found.quality is not None
                    assert found.quality[image, row].item() == pytest.approx(quality[0][i][j])
                    want = [logits[k][i][j] for k in range(3)]
                    assert found.logits[image, row].tolist() == pytest.approx(want)
                    row += 1
        assert row == found.logits.shape[1]


@pytest.mark.parametrize("sign", [1, -1])
def test_sides_stay_finite(sign: int) -> None:
    """At most 1000 / 16 times the anchor's, at least 16 / 1000 times."""
    head = make_head()
    nn.init.constant_(head.predictor.bbox_pred.bias, sign * 1e4)
    nn.init.zeros_(head.predictor.bbox_pred.weight)
    boxes = head(random_maps()).boxes
    sides = (boxes[..., 2] - boxes[..., 0]) / (8 * head(random_maps()).strides)
    torch.testing.assert_close(
        sides, torch.full_like(sides, (1000 / 16) ** sign), rtol=0.05, atol=0
    )


def test_initial_values_and_names() -> None:
    predictor = tiny_model("atss_R_50_FPN_1x").head.predictor
    assert {name for name, _ in predictor.named_parameters()} == {
        *("bbox_pred.weight", "bbox_pred.bias", "ctrness.weight", "ctrness.bias", "scales"),
    }
    assert predictor.scales.tolist() == [1] * 5
    for conv, outputs in ((predictor.bbox_pred, 4), (predictor.ctrness, 1)):
        assert conv.weight.shape == (outputs, 64, 3, 3)
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not conv.bias.any()


def test_scale_of_each_level_learns_from_its_level() -> None:
    head = make_head()
    predictions = head(random_maps())
    for level, boxes in enumerate(predictions.boxes.split(list(predictions.level_sizes), 1)):
        (grad,) = torch.autograd.grad(
            boxes.square().sum(), head.predictor.scales, retain_graph=True
        )
        assert grad.nonzero().flatten().tolist() == [level]


@pytest.mark.parametrize("levels", [4, 6])
def test_other_numbers_of_levels_are_named(levels: int) -> None:
    predictor = ATSSPredictor(num_classes=3, in_channels=8, num_levels=levels)
    head = make_head()
    head.predictor = predictor
    with pytest.raises(ValueError, match=rf"{levels} levels and got 5.*predictor\.num_levels=5"):
        head(random_maps())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_predictor_alone(dtype: torch.dtype) -> None:
    """Without towers it reads float32 maps: every number is a float32 run's."""
    head, maps = make_head(), random_maps()
    want = floats(head(maps))
    with torch.autocast("cpu", dtype):
        got = floats(head(maps))
        assert head.predictor.bbox_pred(maps[0]).dtype == dtype  # autocast is on out here
    assert {x.dtype for x in got.values()} == {torch.float32}
    for name in ("boxes", "quality", "locations", "strides", "priors"):
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-3)
    assert (want["boxes"].to(dtype).float() - want["boxes"]).abs().max() > 0.1


def test_float64_goes_through_whole() -> None:
    predictions = make_head().double()([x.double() for x in random_maps()])
    assert {x.dtype for x in floats(predictions).values()} == {torch.float64}


def test_nothing_waits_for_the_device() -> None:
    """A tensor made from Python numbers on a GPU waits for all before it; pretended here."""
    grid = make_grid(SIZES, STRIDES, 0, device=torch.device("cpu"), dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            with torch.device("cuda"):
                predictor = ATSSPredictor(num_classes=3, in_channels=8, num_levels=5)
                maps = [torch.zeros(1, 8, *size) for size in SIZES]
                there = grid._replace(
                    locations=torch.zeros(grid.locations.shape),
                    strides=torch.zeros(grid.strides.shape),
                )
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch cannot pretend CUDA tensors: {error}")
        with Recorder() as recorder, torch.no_grad():
            predictions = predictor([x[:, :3] for x in maps], maps, there)
    assert predictions.boxes.device.type == "cuda"
    assert recorder.waits == []


# --- the recipe ---------------------------------------------------------------------------------


def test_parts_of_the_recipe() -> None:
    model = get_config("atss_R_50_FPN_1x").model
    assert model.head.offset == 0  # anchors are centred on the corners of cells
    assert model.head.tower is bias_free_tower
    assert not model.backbone.bottom_up.stages.stride_in_1x1
    assert (model.assigner.topk, model.losses.loss_box_reg.weight) == (9, 2.0)
    assert model.selection.nms.test_nms_thresh == 0.6
    head = tiny_model("atss_R_50_FPN_1x").head
    assert head.cls_score.bias.tolist() == pytest.approx([prior_bias()] * 3)
    convs = [x for x in (*head.cls_subnet, *head.bbox_subnet) if isinstance(x, nn.Conv2d)]
    assert convs
    assert all(conv.bias is None for conv in convs)


@pytest.mark.parametrize(
    "batch",
    [
        [((64, 96), 3), ((64, 96), 0)],
        [((33, 47), 0), ((101, 67), 4), ((1, 1), 0)],
        [((64, 64), 0), ((40, 64), 0)],
    ],
)
def test_every_batch_trains_and_is_detected_in(batch: Any) -> None:
    model = tiny_model("atss_R_50_FPN_1x")
    for prepare in (lambda model: model, excite):
        prepare(model).zero_grad()
        losses = model([random_input(size, objects) for size, objects in batch])
        assert set(losses) == {"loss_cls", "loss_box_reg", "loss_quality"}
        assert all(torch.isfinite(loss) for loss in losses.values())
        loss_sum(losses).backward()
        assert without_gradient(model) == []
    with torch.no_grad():
        results = model.eval()([random_input(size, 0) for size, _ in batch])
    assert sum(len(result["instances"]) for result in results) > 0
    for (size, _), result in zip(batch, results, strict=True):
        boxes = result["instances"].pred_boxes.tensor
        assert ((boxes >= 0) & (boxes <= torch.tensor([size[1], size[0]]).repeat(2))).all()


def test_losses_by_hand() -> None:
    """Focal and centerness losses over the positives, GIoU over their centerness, doubled."""
    model = excite(tiny_model("atss_R_50_FPN_1x"), gain=0.5)
    inputs = [random_input((96, 128), 5), random_input((96, 128), 0)]
    _, features, predictions = model.predict(inputs)
    targets = model.assigner(features, predictions, [x["instances"] for x in inputs])
    losses = model(inputs)
    positive = (targets.labels >= 0) & (targets.labels < 3)
    count = max(int(positive[0].sum()), 1) + 1  # the image without objects counts one
    assert count > 3
    assert targets.cls_normalizer.item() == count
    quality = F.binary_cross_entropy_with_logits(
        predictions.quality[positive], targets.quality[positive], reduction="sum"
    )
    torch.testing.assert_close(losses["loss_quality"], quality / count)
    total = 0.0
    for box, truth, weight in zip(
        *(predictions.boxes[positive].tolist(), targets.boxes[positive].tolist()),
        targets.quality[positive].tolist(),
        strict=True,
    ):
        common = max(min(box[2], truth[2]) - max(box[0], truth[0]), 0) * max(
            min(box[3], truth[3]) - max(box[1], truth[1]), 0
        )
        union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (box, truth)) - common
        hull = (max(box[2], truth[2]) - min(box[0], truth[0])) * (
            max(box[3], truth[3]) - min(box[1], truth[1])
        )
        total += weight * (2 - common / union - union / hull)
    want = 2 * total / max(targets.quality.sum().item(), 1)
    assert losses["loss_box_reg"].item() == pytest.approx(want, rel=1e-4)


def test_nine_anchors_a_cell_are_refused() -> None:
    predictions = make_head()(random_maps(images=1))
    features = [torch.zeros(1, 0, height, width + 1) for height, width in SIZES]
    with pytest.raises(ValueError, match=r"exactly one prediction per cell"):
        ATSSAssigner(num_classes=3)(features, predictions, [make_instances((96, 128), [], [])])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"topk": 0}, r"topk is 0; wanted are cells of each level, such as 9"),
        ({"topk": -1}, r"topk is -1"),
        ({"size_divisor": 0}, r"size_divisor is 0; wanted are pixels"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATSSAssigner(num_classes=3, **wrong)
