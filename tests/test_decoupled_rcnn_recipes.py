# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN's recipes say what its fact sheet says, and both doors build the same."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import instantiate
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from util import WIDTH, loss_sum, random_input, tiny, without_gradient

from d2_decouple.checkpoint.backbones import fit_backbone
from d2_decouple.config import configs_root, find_config, get_config
from d2_decouple.engine.inference_config import yacs_config
from d2_decouple.evaluation.truth import read_ground_truth
from d2_decouple.modeling import (
    BoxBranch,
    ConvBoxBranch,
    DecoupledROIHeads,
    DecoupledRPN,
    HardNMS,
    LinearDecay,
    SharedBoxBranch,
    SoftNMS,
)
from d2_decouple.train import main

R_50, R_101 = (f"torchvision://resnet{depth}.IMAGENET1K_V1" for depth in (50, 101))
X_32, X_64 = (
    f"https://download.openmmlab.com/pretrain/third_party/resnext101_{name}.pth"
    for name in ("32x4d-a5af3160", "64x4d-ee2c6f71")
)
ONE_X, TWO_X = (87950, (58633, 80620)), (175899, (117266, 161241))
ONE_SIZE, SIZES = {800}, {640, 672, 704, 736, 768, 800}
CODE, PAPER = 0.001, 0.05  # least scores
WEIGHTS, ALIKE = [1.0, 0.5, 0.25], [1.0, 1.0, 1.0]
COCO = {  # recipe -> schedule, short sides in training, weights, lambda, stages' weights, score
    "decoupled_rcnn_R_50_FPN_1x": (ONE_X, ONE_SIZE, R_50, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_R_50_FPN_1x_paper": (ONE_X, ONE_SIZE, R_50, 0.5, ALIKE, PAPER),
    "decoupled_rcnn_R_50_FPN_1x_single": (ONE_X, ONE_SIZE, R_50, 0.5, [1.0], CODE),
    "decoupled_rcnn_R_50_FPN_1x_single_paper": (ONE_X, ONE_SIZE, R_50, 1.0, [1.0], PAPER),
    "decoupled_rcnn_R_50_FPN_1x_shared": (ONE_X, ONE_SIZE, R_50, 1.0, [1.0], PAPER),
    "decoupled_rcnn_R_50_FPN_1x_double": (ONE_X, ONE_SIZE, R_50, 0.5, [1.0], CODE),
    "decoupled_rcnn_R_50_FPN_1x_double_cascade": (ONE_X, ONE_SIZE, R_50, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_R_50_FPN_2x": (TWO_X, ONE_SIZE, R_50, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_R_101_FPN_1x": (ONE_X, ONE_SIZE, R_101, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_R_101_FPN_1x_single": (ONE_X, ONE_SIZE, R_101, 0.5, [1.0], CODE),
    "decoupled_rcnn_R_101_FPN_2x": (TWO_X, ONE_SIZE, R_101, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_R_101_FPN_2x_ms": (TWO_X, SIZES, R_101, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_X_101_32x4d_FPN_1x": (ONE_X, ONE_SIZE, X_32, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_X_101_32x4d_FPN_1x_single": (ONE_X, ONE_SIZE, X_32, 0.5, [1.0], CODE),
    "decoupled_rcnn_X_101_32x4d_FPN_2x": (TWO_X, ONE_SIZE, X_32, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_X_101_32x4d_FPN_2x_ms": (TWO_X, SIZES, X_32, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_X_101_64x4d_FPN_1x": (ONE_X, ONE_SIZE, X_64, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_X_101_64x4d_FPN_2x": (TWO_X, ONE_SIZE, X_64, 0.5, WEIGHTS, CODE),
    "decoupled_rcnn_X_101_64x4d_FPN_2x_ms": (TWO_X, SIZES, X_64, 0.5, WEIGHTS, CODE),
}
BASELINES = {
    "faster_rcnn_R_50_FPN_1x_d2": StandardROIHeads,
    "cascade_rcnn_R_50_FPN_1x_d2": CascadeROIHeads,
}
YAMLS = ("decoupled_rcnn_R_18_FPN_bccd", "decoupled_rcnn_R_50_FPN_1x")


@cache
def full_size(name):
    """A recipe's whole model, without memory for it."""
    with torch.device("meta"):
        return instantiate(get_config(name).model)


def check_schedule(cfg, max_iter, drops):
    """Warm-up of 500 iterations from a thousandth, a tenth after each drop."""
    assert cfg.train.max_iter == max_iter
    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0.0) == pytest.approx(0.001)
    assert multiplier(250 / max_iter) == pytest.approx(0.5005)
    assert multiplier(500 / max_iter) == 1
    for iteration, rate in zip(drops, (0.1, 0.01), strict=False):
        assert multiplier(iteration / max_iter) == pytest.approx(rate)
        assert multiplier((iteration - 1) / max_iter) == pytest.approx(10 * rate)


def check_sizes(cfg, expected):
    image = torch.zeros(600, 600, 3).numpy()
    resize = instantiate(cfg.dataloader.train.mapper.augmentations[0])
    assert {resize.get_transform(image).new_h for _ in range(100)} == expected
    resize = instantiate(cfg.dataloader.test.mapper.augmentations[0])
    assert resize.get_transform(image).new_h == 800
    for part in ("train", "test"):
        mapper = cfg.dataloader[part].mapper
        assert mapper.augmentations[0].max_size == 1333
        assert mapper.image_format == cfg.model.input_format == "RGB"


@pytest.mark.parametrize("name", [*COCO, *BASELINES])
def test_schedule_sizes_and_weights_on_coco(name):
    schedule, sizes, weights, *_ = COCO.get(name, (ONE_X, ONE_SIZE, R_50))
    cfg = get_config(name)
    check_schedule(cfg, *schedule)
    check_sizes(cfg, sizes)
    assert cfg.train.init_checkpoint == weights
    assert cfg.optimizer.lr == 0.02
    assert cfg.dataloader.train.total_batch_size == 16
    assert cfg.dataloader.train.dataset.names == "coco_2017_train"
    assert cfg.dataloader.test.dataset.names == "coco_2017_val"
    assert list(cfg.model.pixel_mean) == [123.675, 116.280, 103.530]
    assert list(cfg.model.pixel_std) == [58.395, 57.120, 57.375]


@pytest.mark.parametrize("name", COCO)
def test_lambda_stage_weights_and_scores(name):
    *_, box_loss_weight, stage_loss_weights, score = COCO[name]
    heads = full_size(name).roi_heads
    assert heads.box_loss_weight == box_loss_weight
    assert list(heads.stage_loss_weights) == stage_loss_weights
    assert len(heads.box_branches) == len(stage_loss_weights)
    assert heads.selection.test_score_thresh == score


@pytest.mark.parametrize("name", [*COCO, "decoupled_rcnn_R_101_FPN_voc"])
def test_what_all_recipes_have_in_common(name):
    model = full_size(name)
    rpn, heads = model.proposal_generator, model.roi_heads
    assert (type(model), type(rpn), type(heads)) == (
        GeneralizedRCNN,
        DecoupledRPN,
        DecoupledROIHeads,
    )
    assert (rpn.nms_thresh, rpn.nms_thresh_reg) == (0.7, 0.85)
    assert rpn.pre_nms_topk == {True: 2000, False: 1000}
    assert rpn.post_nms_topk == {True: 1000, False: 1000}
    assert rpn.post_nms_topk_reg == 1000
    assert (rpn.batch_size_per_image, rpn.positive_fraction) == (256, 0.5)
    assert (heads.batch_size_per_image, heads.positive_fraction) == (512, 0.25)
    assert heads.box_batch_size_per_image == 512
    assert heads.proposal_append_gt
    for matcher in (heads.proposal_matcher, heads.box_matcher):
        assert list(matcher.thresholds[1:-1]) == [0.5]
        assert list(matcher.labels) == [0, 1]
    assert heads.selection.max_detections_per_image == 100
    deviations = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
    for stage, branch in enumerate(heads.box_branches):
        expected = [1 / x for x in deviations[stage]]
        assert list(branch.transform.weights) == pytest.approx(expected)
        assert branch.num_classes == (None if stage else heads.num_classes)


KINDS = {  # of the regressors; all others are BoxBranch
    "decoupled_rcnn_R_50_FPN_1x_shared": SharedBoxBranch,
    "decoupled_rcnn_R_50_FPN_1x_double": ConvBoxBranch,
    "decoupled_rcnn_R_50_FPN_1x_double_cascade": ConvBoxBranch,
    "decoupled_rcnn_R_18_FPN_bccd_shared": SharedBoxBranch,
    "decoupled_rcnn_R_18_FPN_bccd_double": ConvBoxBranch,
}


@pytest.mark.parametrize("name", [*COCO, *KINDS])
def test_the_regressors_are_those_of_the_name(name):
    kinds = {type(branch) for branch in full_size(name).roi_heads.box_branches}
    assert kinds == {KINDS.get(name, BoxBranch)}


def test_the_double_heads_regions_are_larger_and_its_convolutions_the_papers():
    heads = full_size("decoupled_rcnn_R_50_FPN_1x_double_cascade").roi_heads
    for branch in heads.box_branches:
        assert (branch.roi_scale, branch.sees_all) == (1.3, True)
        assert len(branch.head) == 1 + 4 + 2  # widening, residual blocks, pooling
        assert sum(isinstance(x, nn.BatchNorm2d) for x in branch.head.modules()) == 3 + 4 * 3


PARAMETERS = {  # recipe -> of its heads with 80 classes, and with 20
    "decoupled_rcnn_R_50_FPN_1x": (56001945, 55694445),
    "decoupled_rcnn_R_50_FPN_1x_single": (28202385, 27894885),
    "decoupled_rcnn_R_50_FPN_1x_shared": (14306705, 13999205),
    "decoupled_rcnn_R_50_FPN_1x_double": (19894161, 19586661),
    "decoupled_rcnn_R_50_FPN_1x_double_cascade": (31077273, 30769773),
    "faster_rcnn_R_50_FPN_1x_d2": (14306705, 13999205),
}
ONE_TRUNK = 13895680


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_heads_have_the_parameters_of_the_fact_sheet(name):
    assert count(full_size(name).roi_heads) == PARAMETERS[name][0]
    with torch.device("meta"):
        fewer = instantiate(get_config(name, ["model.roi_heads.num_classes=20"]).model.roi_heads)
    assert count(fewer) == PARAMETERS[name][1]


def test_a_trunk_has_two_layers_of_1024():
    heads = full_size("decoupled_rcnn_R_50_FPN_1x").roi_heads
    trunks = [heads.class_branch.head, *(branch.head for branch in heads.box_branches)]
    assert [count(trunk) for trunk in trunks] == [ONE_TRUNK] * 4
    voc = full_size("decoupled_rcnn_R_101_FPN_voc").roi_heads
    assert count(voc) == PARAMETERS["decoupled_rcnn_R_50_FPN_1x"][1]
    single = full_size("decoupled_rcnn_R_101_FPN_voc_single").roi_heads
    assert count(single) == PARAMETERS["decoupled_rcnn_R_50_FPN_1x_single"][1]


def test_several_sizes_come_with_soft_nms():
    for name in COCO:
        nms = full_size(name).roi_heads.selection.nms
        if name.endswith("_ms"):
            decay = LinearDecay(test_nms_thresh=0.5)
            assert nms == SoftNMS(decay=decay, test_score_thresh=0.001, max_detections=100)
        else:
            assert nms == HardNMS(test_nms_thresh=0.5)
    cfg = get_config(
        "decoupled_rcnn_R_101_FPN_2x_ms",
        ["model.roi_heads.selection.max_detections_per_image=300"],
    )
    assert instantiate(cfg.model.roi_heads.selection).nms.max_detections == 300


@pytest.mark.parametrize(("kind", "depth", "groups"), [(X_32, 101, 32), (R_50, 50, 1)])
def test_weights_of_torchvisions_names_fit_the_backbone(kind, depth, groups):
    """The authors' ResNeXt has torchvision's names, strides and blocks."""
    model = full_size({X_32: "decoupled_rcnn_X_101_32x4d_FPN_1x"}.get(kind, YAMLS[1]))
    with torch.device("meta"):
        blocks = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[depth]
        theirs = torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck,
            blocks,
            groups=groups,
            width_per_group=4 if groups > 1 else 64,
        )
    state = {**theirs.state_dict(), "conv1.weight": torch.randn(64, 3, 7, 7)}
    mean, std = (
        torch.tensor(list(get_config(YAMLS[1]).model[x])) for x in ("pixel_mean", "pixel_std")
    )
    before = model.pixel_mean, model.pixel_std
    model.pixel_mean, model.pixel_std = mean, std
    try:
        fitted = fit_backbone({"model": state}, model)["model"]
    finally:
        model.pixel_mean, model.pixel_std = before
    wanted = {name for name in model.state_dict() if name.startswith("backbone.bottom_up.")}
    assert fitted.keys() == wanted
    torch.testing.assert_close(
        fitted["backbone.bottom_up.stem.conv1.weight"], state["conv1.weight"]
    )


@pytest.mark.parametrize(
    ("name", "groups", "width"),
    [("R_50_FPN_1x", 1, 64), ("X_101_32x4d_FPN_2x_ms", 32, 128), ("X_101_64x4d_FPN_2x", 64, 256)],
)
def test_blocks_and_what_is_frozen_of_the_backbone(name, groups, width):
    bottom_up = full_size(f"decoupled_rcnn_{name}").backbone.bottom_up
    block = bottom_up.res2[0]
    assert isinstance(block, BottleneckBlock)
    assert (block.conv2.groups, block.conv2.out_channels) == (groups, width)
    assert (bottom_up.res3[0].conv1.stride, bottom_up.res3[0].conv2.stride) == ((1, 1), (2, 2))
    learned = {name.split(".")[0] for name, x in bottom_up.named_parameters() if x.requires_grad}
    assert learned == {"res3", "res4", "res5"}


@pytest.mark.parametrize("name", ["decoupled_rcnn_R_50_FPN_1x", "decoupled_rcnn_R_101_FPN_voc"])
def test_everything_decays(name):
    cfg = get_config(name)
    cfg.optimizer.params.model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    groups = instantiate(cfg.optimizer).param_groups
    rate = 0.005 if name.endswith("voc") else 0.02
    assert {(x["lr"], x["weight_decay"], x["momentum"]) for x in groups} == {(rate, 1e-4, 0.9)}


# ---- Pascal VOC


@pytest.mark.parametrize(("name", "weights"), [("voc", WEIGHTS), ("voc_single", [1.0])])
def test_schedule_and_losses_on_voc(name, weights):
    cfg = get_config(f"decoupled_rcnn_R_101_FPN_{name}")
    check_schedule(cfg, 24826, (18620,))
    check_sizes(cfg, {800})
    assert cfg.optimizer.lr == 0.005
    assert cfg.dataloader.train.total_batch_size == 8
    assert cfg.train.init_checkpoint == R_101
    heads = full_size(f"decoupled_rcnn_R_101_FPN_{name}").roi_heads
    assert heads.num_classes == 20
    assert heads.box_loss_weight == (0.5 if len(weights) == 3 else 1.0)
    assert list(heads.stage_loss_weights) == weights
    assert heads.selection.test_score_thresh == PAPER


def write_voc(folder, split, images):
    """A split whose images have one chair each, ``images``: id -> whether that is difficult."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(images))
    for name, difficult in images.items():
        Image.new("RGB", (64, 48)).save(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename>"
            "<size><width>64</width><height>48</height></size><object><name>chair</name>"
            f"<difficult>{int(difficult)}</difficult><bndbox><xmin>11</xmin><ymin>11</ymin>"
            "<xmax>40</xmax><ymax>40</ymax></bndbox></object></annotation>"
        )


def test_voc_is_read_from_both_years_and_difficult_objects_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_voc(tmp_path / "VOC2007", "trainval", {"000001": False, "000002": True})
    write_voc(tmp_path / "VOC2007", "test", {"000003": False, "000004": True})
    write_voc(tmp_path / "VOC2012", "trainval", {"2008_000001": False})
    cfg = get_config("decoupled_rcnn_R_101_FPN_voc", ["dataloader.train.num_workers=0"])
    records = instantiate(cfg.dataloader.train.dataset)
    assert [record["image_id"] for record in records] == ["000001", "2008_000001"]
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert {len(item["instances"]) for item in batch} == {1}
    assert {int(item["instances"].gt_classes) for item in batch} == {8}
    truth = read_ground_truth(cfg.dataloader.test.dataset.names)
    assert truth.class_names[8] == "chair"
    assert truth.count_objects().sum() == 1
    assert [x.crowds.tolist() for x in truth.images.values()] == [[False], [True]]


# ---- beside other recipes


@pytest.mark.parametrize("name", BASELINES)
def test_the_baselines_are_detectron2s_and_all_else_is_equal(name):
    cfg, ours = get_config(name), get_config("decoupled_rcnn_R_50_FPN_1x")
    for part in ("dataloader", "optimizer", "lr_multiplier", "train"):
        assert OmegaConf.to_container(cfg[part]) == OmegaConf.to_container(ours[part])
    model = full_size(name)
    assert (type(model.proposal_generator), type(model.roi_heads)) == (RPN, BASELINES[name])
    shapes, expected = (
        {name: value.shape for name, value in m.backbone.state_dict().items()}
        for m in (model, full_size("decoupled_rcnn_R_50_FPN_1x"))
    )
    assert shapes == expected


@pytest.mark.parametrize("kind", ["", "_single", "_shared", "_double"])
def test_the_small_recipes_differ_from_faster_rcnns_in_the_model_only(kind):
    cfg, host = (
        get_config(f"decoupled_rcnn_R_18_FPN_bccd{kind}"),
        get_config("faster_rcnn_R_18_FPN_bccd_d2"),
    )
    for part in ("dataloader", "optimizer", "lr_multiplier", "train"):
        assert OmegaConf.to_container(cfg[part]) == OmegaConf.to_container(host[part])
    heads = instantiate(cfg.model).roi_heads
    assert heads.box_batch_size_per_image == heads.batch_size_per_image == 128
    assert heads.selection.test_score_thresh == 0.05
    assert heads.box_loss_weight == (1.0 if kind else 0.5)


# ---- the yacs door


def yacs_model(name, *overrides):
    cfg = yacs_config(find_config(f"{name}.yaml"), list(overrides))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def facts(thing, name=""):
    """All plain values of a module's parts and of the objects that these hold, by name."""
    if isinstance(thing, dict):
        items = thing.items()
    elif isinstance(thing, list | tuple):
        items = enumerate(thing)
    elif type(thing).__module__.startswith(("d2_decouple.", "detectron2.")):
        yield f"{name}.__class__", type(thing)
        items = vars(thing).items()
    else:
        if isinstance(thing, bool | int | float | str | None):
            yield name, thing
        return
    for key, value in items:
        if not isinstance(thing, dict) and str(key).startswith("_") and key != "_modules":
            continue
        yield from facts(value, f"{name}.{key}")


@pytest.mark.parametrize("name", YAMLS)
def test_the_yacs_door_builds_the_recipes_parts(name):
    model, lazy = yacs_model(name), full_size(name)
    assert type(model) is GeneralizedRCNN
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, lazy))
    assert shapes == expected
    for part in ("proposal_generator", "roi_heads"):
        found = dict(facts(getattr(model, part)))
        assert found == dict(facts(getattr(lazy, part)))
        assert len(found) > 40
    assert found[".selection.test_score_thresh"] == lazy.roi_heads.selection.test_score_thresh
    assert model.input_format == lazy.input_format


@pytest.mark.parametrize("name", YAMLS)
def test_the_yacs_doors_backbone_is_the_recipes(name):
    """Built by Detectron2 from yacs keys, but with the same strides, norms and frozen parts."""
    described = []
    for model in (yacs_model(name), full_size(name)):
        convs = [
            (where, x.stride, x.groups, type(x.norm), x.weight.requires_grad)
            for where, x in model.backbone.named_modules()
            if isinstance(x, nn.Conv2d)
        ]
        described.append(convs)
    assert described[0] == described[1]


def test_the_doors_values_reach_the_heads():
    values = ["MODEL.DECOUPLE.NUM_CLASSES", 7, "MODEL.DECOUPLE.SCORE_THRESH_TEST", 0.3]
    values += ["MODEL.DECOUPLE.NMS_THRESH_TEST", 0.4]
    values += ["MODEL.DECOUPLE.OVERRIDES", ["model.proposal_generator.nms_thresh_reg=0.9"]]
    model = yacs_model(YAMLS[0], *values)
    assert model.roi_heads.class_branch.cls_score.out_features == 8
    assert model.roi_heads.selection.test_score_thresh == 0.3
    assert model.roi_heads.selection.nms.test_nms_thresh == 0.4
    assert model.proposal_generator.nms_thresh_reg == 0.9


def test_the_yacs_recipe_trains_and_evaluates(tmp_path):
    options = ["OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "0"]
    options += ["DATASETS.TRAIN", "('bccd_mini_train',)", "DATASETS.TEST", "('bccd_mini_val',)"]
    options += ["INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"]
    config = ["--config-file", f"{YAMLS[0]}.yaml"]
    assert main([*config, *options, "SOLVER.MAX_ITER", "2"]) == 0
    weights = tmp_path / "model_final.pth"
    stored = torch.load(weights, weights_only=True)
    assert stored["classes"] == ["RBC", "WBC", "Platelets"]
    rows = (tmp_path / "metrics.json").read_text()
    for term in ("loss_cls", "loss_rpn_cls", *(f"loss_box_reg_stage{k}" for k in range(3))):
        assert f'"{term}"' in rows
    assert "bbox/AP50" in rows
    assert main([*config, "--eval-only", *options, "MODEL.WEIGHTS", str(weights)]) == 0


# ---- another backbone


def test_the_model_stands_on_a_backbone_of_ones_own():
    """The lines of the project's page, with a small transformer."""
    pytest.importorskip(
        "detectron2.modeling.backbone.vit", reason="this Detectron2 has no vision transformer"
    )
    pytest.importorskip("timm", reason="Detectron2's vision transformer needs timm")
    page = Path(configs_root().parent, "projects", "DecoupledRCNN", "README.md").read_text()
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "ViT" in x)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    cfg = names["cfg"]
    assert isinstance(cfg.model.backbone.out_channels, int)
    pyramid = cfg.model.backbone
    cfg.model.backbone = get_config("decoupled_rcnn_R_50_FPN_1x").model.backbone
    tiny(cfg)  # heads alone
    cfg.model.backbone = pyramid
    cfg.model.backbone.update(out_channels=WIDTH, square_pad=128)
    cfg.model.backbone.net.update(img_size=128, embed_dim=32, depth=2, num_heads=2)
    model = instantiate(cfg.model)
    with EventStorage():
        losses = model([random_input((64, 96), 3), random_input((128, 101), 0)])
    loss_sum(losses).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert without_gradient(model) == []
    model.eval()
    with torch.no_grad():
        (found,) = model([random_input((64, 96), 0)])
    assert len(found["instances"])
