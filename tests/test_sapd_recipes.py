# SPDX-License-Identifier: Apache-2.0
"""SAPD's recipes: the paper's rows, schedules and backbones, and its integers."""

from functools import cache

import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from omegaconf import OmegaConf
from test_tscode_numbers import SIZE, FlopCounter, Raw, live_norms, measured
from util import loss_sum, random_input, tiny, tiny_model, without_gradient

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.config import add_decouple_config, door_recipe, find_config, get_config
from d2_decouple.evaluation.small_data import Run
from d2_decouple.layers.deform import DeformBottleneckBlock
from d2_decouple.layers.losses import generalized_iou_loss, iou_loss, linear_iou_loss
from d2_decouple.modeling import BFP, FPN, FeatureSelectionNet, SAPDOptions

__all__ = ["live_norms"]  # a fixture, which counts frozen norms as another implementation does

ROWS = {  # of Table 2, and on small data: suffix -> soft points, soft levels, BFP
    "_baseline": (False, False, False),
    "_sw": (True, False, False),
    "_nobfp": (True, True, False),
    "_bfp": (False, False, True),
    "": (True, True, True),
}
TABLE_6 = {  # backbone -> depth, groups, weights, stride in the 1x1
    "R_50": (50, 1, "MSRA/R-50", True),
    "R_101": (101, 1, "MSRA/R-101", True),
    "X_101_64x4d": (101, 64, "FAIR/X-101-64x4d", False),
    "R_50_DCN": (50, 1, "MSRA/R-50", True),
    "R_101_DCN": (101, 1, "MSRA/R-101", True),
    "X_101_64x4d_DCN": (101, 64, "FAIR/X-101-64x4d", False),
}
ALL = [
    *(f"sapd_R_50_FPN_1x{row}" for row in ROWS),
    *(f"sapd_R_18_FPN_bccd{row}" for row in ROWS if row != "_bfp"),
    *(f"sapd_{backbone}_FPN_2x_ms" for backbone in TABLE_6),
]


def plain(node):
    return OmegaConf.to_container(node, resolve=False)


@cache
def full_size(name):
    with torch.device("meta"):
        return instantiate(get_config(name).model)


@pytest.mark.parametrize("name", [x for x in ALL if "2x" not in x])
def test_rows_are_switches(name):
    """Nothing but the switches and BFP differs; without levels to select there is no network."""
    suffix = name.removeprefix("sapd_").removeprefix("R_50_FPN_1x").removeprefix("R_18_FPN_bccd")
    points, levels, balanced = ROWS[suffix]
    model = full_size(name)
    assert model.assigner.options == SAPDOptions(use_soft_weights=points, use_soft_levels=levels)
    assert type(model.backbone) is (BFP if balanced else FPN)
    assert isinstance(model.assigner.feature_selection, FeatureSelectionNet) == levels
    assert ("loss_select" in model.losses) == levels
    whole, row = (plain(get_config(x).model) for x in (name.removesuffix(suffix), name))
    for one in (whole, row):
        del one["assigner"]["options"], one["backbone"]["_target_"]
        one["losses"].pop("loss_select", None)
    assert row == whole
    for key in ("dataloader", "optimizer", "lr_multiplier", "train"):
        assert plain(get_config(name)[key]) == plain(get_config(name.removesuffix(suffix))[key])


@pytest.mark.parametrize("name", ALL)
def test_what_all_of_them_say(name):
    cfg = get_config(name)
    model = full_size(name)
    assert model.head.offset == 0.5  # a cell stands for its middle
    assert model.head.predictor.unit == 4.0
    assert model.backbone.top_block.in_feature == "res5"
    assert model.backbone.top_block.p6.in_channels == (512 if "bccd" in name else 2048)
    assert cfg.model.selection.nms.test_nms_thresh == 0.5
    assert cfg.model.selection.candidates.test_score_thresh == 0.05
    assert cfg.model.selection.candidates.test_topk_candidates == 1000
    assert model.assigner.max_iter == cfg.train.max_iter
    assert model.losses["loss_box_reg"].loss is model.assigner.box_loss is iou_loss
    if "loss_select" in model.losses:
        assert model.losses["loss_select"].weight == 0.1
    focal = model.losses["loss_cls"]
    assert (focal.alpha, focal.gamma) == (model.assigner.alpha, model.assigner.gamma) == (0.25, 2.0)


@pytest.mark.parametrize("name", ["sapd_R_50_FPN_1x", "sapd_R_18_FPN_bccd"])
def test_head_begins_as_the_paper_says(name):
    """Weights N(0, 0.01); biases 0, 0.1 of boxes and -ln 99 of classes; small data: a norm."""
    head = instantiate(get_config(name).model.head)
    kinds = {type(part).__name__ for part in head.cls_subnet}
    assert kinds == {"Conv2d", "ReLU"} | ({"GroupNorm"} if "bccd" in name else set())
    assert [type(x).__name__ for x in head.bbox_subnet].count("Conv2d") == 4
    for conv in (*head.cls_subnet, *head.bbox_subnet, head.cls_score, head.predictor.bbox_pred):
        if isinstance(conv, torch.nn.Conv2d):
            assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.cls_score.bias.tolist() == pytest.approx([-4.59512] * len(head.cls_score.bias))
    assert head.predictor.bbox_pred.bias.tolist() == pytest.approx([0.1] * 4)
    assert head.cls_subnet[0].bias.count_nonzero() == 0


@pytest.mark.parametrize("name", [x for x in ALL if "bccd" not in x])
def test_schedule_sizes_and_weights_on_coco(name):
    cfg = get_config(name)
    times = 2 if "2x" in name else 1
    assert cfg.train.max_iter == 90000 * times
    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0.0) == pytest.approx(0.001)
    for iteration, rate in zip((500, 60000 * times, 80000 * times), (1.0, 0.1, 0.01), strict=True):
        assert multiplier(iteration / cfg.train.max_iter) == pytest.approx(rate)
        assert iteration == 500 or multiplier((iteration - 1) / cfg.train.max_iter) > rate
    resize = instantiate(cfg.dataloader.train.mapper.augmentations[0])
    image = torch.zeros(600, 600, 3).numpy()
    sizes = {resize.get_transform(image).new_h for _ in range(300)}
    assert sizes == {800} if times == 1 else len(sizes) > 80
    assert min(sizes) >= 640
    assert max(sizes) <= 800
    assert cfg.dataloader.train.mapper.augmentations[0].max_size == 1333
    assert cfg.dataloader.train.mapper.image_format == cfg.model.input_format == "BGR"
    assert cfg.dataloader.train.total_batch_size == 16
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.optimizer.momentum) == (
        0.01,
        1e-4,
        0.9,
    )
    if times == 1:
        assert cfg.train.init_checkpoint == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


@pytest.mark.parametrize("backbone", TABLE_6)
def test_backbones_of_table_6(backbone):
    depth, groups, weights, stride_in_1x1 = TABLE_6[backbone]
    name = f"sapd_{backbone}_FPN_2x_ms"
    assert get_config(name).train.init_checkpoint.endswith(f"ImageNetPretrained/{weights}.pkl")
    model = full_size(name)
    assert model.assigner.options == SAPDOptions()
    assert isinstance(model.backbone, BFP)
    bottom_up = model.backbone.bottom_up
    assert len(bottom_up.res4) == {50: 6, 101: 23}[depth]
    block = bottom_up.res3[0]
    strides = (block.conv1.stride[0], block.conv2.stride[0])
    assert strides == ((2, 1) if stride_in_1x1 else (1, 2))
    assert block.conv2.groups == groups
    for stage in ("res2", "res3", "res4", "res5"):
        deformed = isinstance(getattr(bottom_up, stage)[0], DeformBottleneckBlock)
        assert deformed == ("DCN" in backbone and stage != "res2")
        if deformed:  # two numbers of each of nine places: the first version
            assert getattr(bottom_up, stage)[-1].conv2_offset.out_channels == 18
    if "DCN" in backbone:
        plain_keys = full_size(name.replace("_DCN", "")).state_dict().keys()
        assert plain_keys <= model.state_dict().keys()


MACS = {  # of convolutions at 800 x 1280, of the fact sheet
    "sapd_R_50_FPN_1x_baseline": 200792483840,
    "sapd_R_50_FPN_1x_sw": 200792483840,
    "sapd_R_50_FPN_1x_nobfp": 200792483840,
    "sapd_R_50_FPN_1x_bfp": 201841059840,
    "sapd_R_50_FPN_1x": 201841059840,
}


def five_convolutions(model):
    model.head.update(cls_conv_dims=[256] * 5, box_conv_dims=[256] * 5)


def strides_of_torchvision(model):
    model.backbone.bottom_up.stages.stride_in_1x1 = False


@pytest.mark.parametrize("name", MACS)
def test_multiply_adds_and_parameters(name):
    found = measured(name)
    assert (found.conv, found.parameters) == (MACS[name], 4914260)
    model = full_size(name)
    net = model.assigner.feature_selection
    assert sum(x.numel() for x in model.assigner.parameters()) == (0 if net is None else 4130821)
    if isinstance(model.backbone, BFP):
        assert sum(x.numel() for x in model.backbone.balance.parameters()) == 263168


def test_multiply_adds_of_what_else_the_sheet_has():
    name = "sapd_R_50_FPN_1x_nobfp"
    found = measured(name, five_convolutions)
    assert (found.conv, found.parameters) == (225954375680, 6094420)
    assert measured(name, strides_of_torchvision).conv == 205511075840
    assert measured(name, five_convolutions, strides_of_torchvision).conv == 230672967680
    assert measured("sapd_R_50_FPN_1x", strides_of_torchvision).conv == 206559651840
    assert SIZE == (800, 1280)


def test_counts_as_fvcore():
    detector = instantiate(tiny(get_config("sapd_R_50_FPN_1x_nobfp")).model).eval()
    x = torch.zeros(1, 3, 64, 96)
    with torch.no_grad():
        analysis = FlopCountAnalysis(Raw(detector), x)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        with FlopCounter() as counter:
            Raw(detector)(x)
    assert counter.flops["conv"] == analysis.by_operator()["conv"]


@pytest.mark.parametrize("row", [x for x in ROWS if x != "_bfp"])
def test_small_data_rows_belong_into_the_table(row):
    cfg = Run(recipe=f"sapd_R_18_FPN_bccd{row}", seed=1).config()
    theirs = get_config("fcos_R_18_FPN_bccd")
    for key in ("dataloader", "optimizer", "lr_multiplier"):
        assert plain(cfg[key]) == plain(theirs[key])
    assert cfg.model.head.norm == theirs.model.head.norm == "GN"
    assert cfg.model.num_classes == 3


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("exponent=0.5", "exponent", 0.5),
        ("top_k=2", "top_k", 2),
        ("soft_start=0", "soft_start", 0),
        ("shrink=0.3", "shrink", 0.3),
        ("positive_rule=cell", "positive_rule", "cell"),
        ("ignore_scale=0.5", "ignore_scale", 0.5),
        ("unselected=ignore_class", "unselected", "ignore_class"),
        ("unselected=ignore_all", "unselected", "ignore_all"),
        ("detach_level_weights=False", "detach_level_weights", False),
        ("renormalize_levels=True", "renormalize_levels", True),
    ],
)
def test_what_the_paper_compares_can_be_typed(override, name, value):
    cfg = get_config("sapd_R_50_FPN_1x_nobfp", [f"model.assigner.options.{override}"])
    model = instantiate(tiny(cfg).model)
    assert getattr(model.assigner.options, name) == value
    with EventStorage(80000):
        loss_sum(model([random_input((64, 96), 2)])).backward()
    assert without_gradient(model) == []


def test_other_parts_can_be_typed():
    cfg = get_config(
        "sapd_R_50_FPN_1x_nobfp",
        [
            *("train.max_iter=100", "model.losses.loss_select.weight=0.2"),
            *("model.head.predictor.unit=8", "model.assigner.options.use_soft_levels=False"),
            "model.assigner.options.select_train_only=True",
        ],
    )
    model = instantiate(tiny(cfg).model)
    assert model.assigner.max_iter == 100
    assert model.losses["loss_select"].weight == 0.2
    assert model.head.predictor.unit == 8
    assert list(model([random_input((64, 96), 2)])) == ["loss_cls", "loss_box_reg", "loss_select"]


@pytest.mark.parametrize("loss", [linear_iou_loss, generalized_iou_loss])
def test_the_term_follows_the_assigner_s_loss_of_boxes(loss):
    cfg = tiny(get_config("sapd_R_50_FPN_1x_nobfp"))
    cfg.model.assigner.box_loss = loss
    model = instantiate(cfg.model)
    assert model.losses["loss_box_reg"].loss is loss
    assert torch.isfinite(loss_sum(model([random_input((64, 96), 2)])))


def yacs(name):
    cfg = get_cfg()
    add_decouple_config(cfg)
    cfg.merge_from_file(str(find_config(name).with_suffix(".yaml")))
    return cfg


@pytest.mark.parametrize("name", ["sapd_R_50_FPN_1x", "sapd_R_18_FPN_bccd"])
def test_the_yacs_door_gives_the_recipe(name):
    """The same slots, the same solver, and the length of the training that the solver says."""
    cfg, lazy = yacs(name), get_config(name)
    assert plain(door_recipe(cfg).model) == plain(lazy.model)
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.optimizer.lr == cfg.SOLVER.BASE_LR
    assert (cfg.SOLVER.BIAS_LR_FACTOR, cfg.SOLVER.WEIGHT_DECAY_NORM) == (1.0, 1e-4)
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS in (None, 1e-4)
    cfg.SOLVER.MAX_ITER = 50
    recipe = door_recipe(cfg)
    with torch.device("meta"):
        assert instantiate(recipe.model).assigner.max_iter == 50


def test_network_is_saved_and_loaded(tmp_path):
    """And weights without it load into a model that has it: it begins anew."""
    torch.manual_seed(1)
    saved = tiny_model("sapd_R_50_FPN_1x_nobfp")
    Checkpointer(saved, str(tmp_path)).save("model")
    torch.manual_seed(2)
    loaded = tiny_model("sapd_R_50_FPN_1x_nobfp")
    Checkpointer(loaded, str(tmp_path)).load(str(tmp_path / "model.pth"))
    for (name, a), (other, b) in zip(
        saved.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b), name
    names = {name for name in saved.state_dict() if name.startswith("assigner")}
    layers = ("conv1", "conv2", "conv3", "fc")
    assert names == {
        f"assigner.feature_selection.{layer}.{kind}"
        for layer in layers
        for kind in ("weight", "bias")
    }
    baseline = tiny_model("sapd_R_50_FPN_1x_baseline").state_dict()
    assert set(saved.state_dict()) - names == set(baseline)
