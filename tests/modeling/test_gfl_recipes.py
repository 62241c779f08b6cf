# SPDX-License-Identifier: Apache-2.0
"""GFL's recipes: what the papers say of them, and that they take every batch."""

import pytest
import torch
from detectron2.config import instantiate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from util import WIDTH, excite, loss_sum, random_input, tiny, tiny_model, without_gradient

from d2_decouple.config import get_config
from d2_decouple.modeling import (
    BestLocations,
    GFLAssigner,
    GFLPredictor,
    GFLv2Predictor,
    HardNMS,
    class_score,
    clip_to_image,
    product_score,
)

RECIPES = {
    "gfl_R_50_FPN_1x": class_score,
    "gfl_R_50_FPN_2x_ms": class_score,
    "gfl_R_18_FPN_bccd": class_score,
    "gflv2_R_50_FPN_1x": product_score,
    "gflv2_R_18_FPN_bccd": product_score,
}
PARAMETERS = {  # of the head, 80 classes
    "gfl_R_50_FPN_1x": 5063833,
    "gflv2_R_50_FPN_1x": 5063833 + 20 * 64 + 64 + 64 + 1,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_of_the_head(name: str) -> None:
    with torch.device("meta"):
        model = instantiate(get_config(name).model)
    assert sum(parameter.numel() for parameter in model.head.parameters()) == PARAMETERS[name]


@torch.no_grad()
def test_gfl_costs_what_the_papers_host_costs() -> None:
    """Multiply-adds of the convolutions at 800 x 1280 (TSCODE's Table 1), without computing."""
    model = instantiate(get_config("gfl_R_50_FPN_1x").model).eval()
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        maps = model.backbone(torch.zeros(1, 3, 800, 1280))
        model.head([maps[name] for name in model.head_in_features])
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.aten.convolution] == 2 * 207582832640


def test_schedules() -> None:
    """12 and 24 epochs of 117,266 images, 16 a batch; a tenth after 8 and 11, or 16 and 22."""
    for name, epochs, drops in (
        ("gfl_R_50_FPN_1x", 12, (8, 11)),
        ("gflv2_R_50_FPN_1x", 12, (8, 11)),
        ("gfl_R_50_FPN_2x_ms", 24, (16, 22)),
    ):
        cfg = get_config(name)
        assert cfg.train.max_iter == pytest.approx(epochs * 117266 / 16, abs=1)
        assert cfg.optimizer.lr == 0.01
        assert cfg.dataloader.train.total_batch_size == 16
        factor = instantiate(cfg.lr_multiplier)
        for number, drop in enumerate(drops):
            before, after = (factor(drop / epochs + step) for step in (-1e-4, 1e-4))
            assert before == pytest.approx(0.1**number)
            assert after == pytest.approx(0.1 ** (number + 1))


def test_sizes_of_images() -> None:
    sizes = {name: get_config(name).dataloader.train.mapper.augmentations[0] for name in RECIPES}
    many = instantiate(sizes["gfl_R_50_FPN_2x_ms"])
    assert (many.short_edge_length, many.max_size, many.is_range) == ([480, 800], 1333, True)
    for name in PARAMETERS:
        one = instantiate(sizes[name])
        assert set(one.short_edge_length) == {800}
        assert one.max_size == 1333


@pytest.mark.parametrize("name", RECIPES)
def test_parts_of_the_recipes(name: str) -> None:
    """Among them: the score of the selection is the one that the assigner weighs with."""
    cfg = get_config(name)
    assert cfg.model.input_format == cfg.dataloader.train.mapper.image_format
    assert cfg.model.input_format == ("BGR" if "bccd" in name else "RGB")
    model = tiny_model(name)
    assert type(model.head.predictor) is (GFLv2Predictor if "v2" in name else GFLPredictor)
    assert model.head.predictor.bbox_pred.out_channels == 4 * 17
    assert model.head.offset == 0
    assert type(model.assigner) is GFLAssigner
    assert model.assigner.score is model.selection.score is RECIPES[name]
    assert model.selection.candidates == BestLocations(
        test_score_thresh=0.05, test_topk_candidates=1000
    )
    assert model.selection.nms == HardNMS(test_nms_thresh=0.6)
    assert model.selection.clip is clip_to_image
    assert model.selection.max_detections_per_image == 100
    weights = {key: term.weight for key, term in model.losses.items()}
    assert weights == {"loss_cls": 1, "loss_box_reg": 2, "loss_box_distribution": 0.25}
    assert model.losses["loss_cls"].beta == 2


BATCHES = {
    "half empty": [((64, 96), 3), ((64, 96), 0)],
    "odd sizes": [((33, 47), 0), ((101, 67), 4), ((1, 1), 0)],
    "no objects": [((64, 64), 0), ((40, 64), 0)],
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["gfl_R_50_FPN_1x", "gflv2_R_50_FPN_1x"])
def test_every_batch_trains(name: str, trained: bool) -> None:
    model = tiny_model(name)
    if trained:
        excite(model)
        model.head.cls_score.bias.data.zero_()
    for case, batch in BATCHES.items():
        model.zero_grad()
        losses = model([random_input(size, objects) for size, objects in batch])
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        assert (losses["loss_box_reg"] == 0) == (case == "no objects")
        loss_sum(losses).backward()
        assert without_gradient(model) == []
    model.eval()
    with torch.no_grad():
        found = [len(x["instances"]) for x in model([random_input((101, 67), 0)])]
    assert (min(found) > 0) == trained


@pytest.mark.parametrize("name", ["gfl_R_50_FPN_1x", "gflv2_R_50_FPN_1x"])
def test_autocast_trains_near_float32(name: str) -> None:
    """Towers in bfloat16; targets, losses and what they are made from in float32."""
    cfg = tiny(get_config(name))
    assert cfg.model.head.predictor.in_channels == WIDTH
    model = excite(instantiate(cfg.model), gain=0.5)
    inputs = [random_input((128, 128), 3), random_input((64, 96), 2)]
    want = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(inputs)
    for key, value in want.items():
        assert got[key].dtype == torch.float32
        assert got[key].item() == pytest.approx(value.item(), rel=0.1), key
