# SPDX-License-Identifier: Apache-2.0
"""Numbers chosen from the data: each rule on data made for it, and what is typed wins."""

import os
import types

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from omegaconf import OmegaConf

from d2_decouple.config import ConfigError, get_config
from d2_decouple.engine.defaults import memory_limit, use_defaults
from d2_decouple.engine.methods import SIZES

GIB = 2**30
SHORT = "dataloader.{}.mapper.augmentations.0.short_edge_length"
LONG = "dataloader.{}.mapper.augmentations.0.max_size"


@pytest.fixture
def chosen(monkeypatch):
    """Chooses for images of one size with one box each; the config, and the lines by name."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))

    def choose(
        *overrides,
        images=100,
        width=640,
        height=480,
        box=(100, 100),
        crowd=0,
        recipe="fcos_R_18_FPN_bccd",
        size="s",
        memory=64 * GIB,
        processes=1,
    ):
        item = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": crowd}
        boxes = [] if box is None else [{**item, "bbox": [0, 0, *box]}]
        record = {"file_name": "a", "width": width, "height": height, "annotations": boxes}
        DatasetCatalog.data["made_up"] = lambda: [dict(record) for _ in range(images)]
        cfg = get_config(recipe)
        lines = use_defaults(
            cfg,
            "made_up",
            SIZES[size],
            ["train.device=cpu", *overrides],
            processes=processes,
            memory=(memory, "of the test's"),
        )
        assert lines[0].startswith("chosen for these data")
        return cfg, dict(line.strip().split(": ", 1) for line in lines[1:])

    return choose


def get(cfg, key):
    return OmegaConf.select(cfg, key)


def input_sizes(cfg):
    return [get(cfg, key.format(role)) for role in ("train", "test") for key in (SHORT, LONG)]


def test_an_ordinary_set_gets_the_networks_own_numbers(chosen):
    cfg, lines = chosen()
    # The box is 100 pixels of 480, so 50 of 240: far above 16.
    assert input_sizes(cfg) == [240, 400, 240, 400]
    assert "measure 50 pixels and more" in lines["short side of the images"]
    assert cfg.dataloader.train.total_batch_size == 4
    assert cfg.optimizer.lr == 0.01
    # 25 steps an epoch, 36 epochs are 900, above 800.
    assert cfg.train.max_iter == 900
    assert "100 images with 100 objects, each 36 times" in lines["iterations"]
    assert cfg.train.eval_period == cfg.train.checkpointer.period == 90
    assert cfg.train.early_stopping.patience == 5
    assert cfg.train.seed == 1
    assert cfg.lr_multiplier.warmup_length == pytest.approx(0.1)
    assert set(lines) == {
        *("short side of the images", "long side at most", "batch", "learning rate"),
        *("iterations", "warm-up", "evaluation", "early stopping", "weights"),
    }
    for line in lines.values():
        assert "; " in line
        assert "(" in line  # the key


@pytest.mark.parametrize(
    ("box", "short"),
    [
        ((32, 32), 240),  # 16 pixels at 240: just enough
        ((28, 28), 288),  # 14 there; 240 * 16 / 14 = 274.3, in steps of 16
        ((7, 112), 288),  # the same area
        ((18, 18), 432),  # 9 there; 426.7
        ((4, 4), 480),  # no more than twice the network's own
        (None, 240),
    ],
)
def test_small_boxes_want_larger_images(chosen, box, short):
    cfg, lines = chosen(box=box)
    assert input_sizes(cfg)[0] == input_sizes(cfg)[2] == short
    assert ("tenth of the boxes measure less" in lines["short side of the images"]) == (short > 240)


@pytest.mark.parametrize(
    ("sides", "limit"),
    [((480, 480), 400), ((1000, 500), 480), ((500, 1000), 480), ((2000, 500), 720)],
)
def test_long_images_may_be_long(chosen, sides, limit):
    """Five thirds of the short side at least, three times at most."""
    cfg, _ = chosen(width=sides[0], height=sides[1], box=(250, 250))
    assert input_sizes(cfg)[1] == limit


def test_crowds_do_not_count(chosen):
    cfg, lines = chosen(box=(4, 4), crowd=1)
    assert input_sizes(cfg)[0] == 240
    assert "no boxes to look at" in lines["short side of the images"]


def test_tiny_boxes_are_sought_on_finer_levels(chosen):
    cfg, lines = chosen(box=(6, 6))  # at short side 480 still 6 pixels
    assert list(cfg.model.head.strides) == [4, 8, 16, 32, 64]
    assert "less than 6.0 pixels" in lines["levels"]
    cfg, lines = chosen(box=(8, 8))
    assert "levels" not in lines
    assert list(cfg.model.head.strides) == [8, 16, 32, 64, 128]
    cfg, lines = chosen(box=(6, 6), recipe="tscode_fcos_R_18_FPN_bccd")
    assert "this model cannot use P2" in lines["levels"]
    cfg, lines = chosen(box=(6, 6), recipe="decoupled_rcnn_R_18_FPN_bccd")
    assert "levels" not in lines  # two stages use P2 anyway


@pytest.mark.parametrize(
    ("room", "batch"),
    # 240 x 320 pixels of 2400 bytes are 0.172 GiB, beside 1 GiB.
    [(0.2, 1), (0.4, 2), (0.6, 2), (0.7, 4), (60, 4), (-0.5, 1)],
)
def test_the_batch_fits_the_memory_and_the_rate_the_batch(chosen, room, batch):
    cfg, lines = chosen(memory=int((1 + room) * GIB))
    assert cfg.dataloader.train.total_batch_size == batch
    assert cfg.optimizer.lr == pytest.approx(0.01 * batch / 4)
    assert "an image takes up to 0.17 GiB" in lines["batch"]
    assert ("if it fails" in lines["batch"]) == (room < 0.17)


def test_finer_levels_need_more_memory(chosen):
    # 480 x 640 pixels: 0.69 GiB, and twice that with P2.
    assert "1.37 GiB" in chosen(box=(6, 6))[1]["batch"]
    assert "0.69 GiB" in chosen(box=(8, 8))[1]["batch"]


def test_long_images_need_the_memory_of_their_resized_size(chosen):
    # 2000 x 500 becomes 720 x 180, since the long side is limited: 0.29 GiB.
    assert "0.29 GiB" in chosen(width=2000, height=500, box=(250, 250))[1]["batch"]


def test_the_batch_is_no_larger_than_the_set_and_shared_by_processes(chosen):
    cfg, lines = chosen(images=3)
    assert cfg.dataloader.train.total_batch_size == 2
    assert "there are 3 training images" in lines["batch"]
    cfg, lines = chosen(processes=2)
    assert cfg.dataloader.train.total_batch_size == 8
    assert cfg.optimizer.lr == pytest.approx(0.02)
    assert "in each of 2 processes" in lines["batch"]
    assert chosen(images=1)[0].dataloader.train.total_batch_size == 1


def test_large_networks_get_small_batches_without_a_gpu(chosen):
    cfg, lines = chosen(recipe="gfl_R_50_FPN_1x", size="m")
    assert cfg.dataloader.train.total_batch_size == 2
    assert "--size s is made for that" in lines["batch"]
    assert cfg.optimizer.lr == pytest.approx(0.01 * 2 / 16)
    assert input_sizes(cfg) == [640, 1072, 640, 1072]
    cfg, _ = chosen("train.device=cuda", recipe="gfl_R_50_FPN_1x", size="m")
    assert cfg.dataloader.train.total_batch_size == 8


@pytest.mark.parametrize(
    ("images", "length", "reason"),
    [
        (10, 300, "each 100 times and no oftener"),  # 3 steps an epoch
        (40, 800, "the least that this network learns from, 80 epochs"),
        (400, 3600, "each 36 times"),
    ],
)
def test_the_length_follows_the_number_of_images(chosen, images, length, reason):
    cfg, lines = chosen(images=images)
    assert cfg.train.max_iter == length
    assert reason in lines["iterations"]


def test_the_schedule_warms_up_and_falls(chosen):
    cfg, lines = chosen(images=4000)
    assert cfg.train.max_iter == 36000
    assert cfg.train.eval_period == 3600
    factor = instantiate(cfg.lr_multiplier)
    assert factor(0.0) == pytest.approx(0.01)
    assert factor(500 / 36000) == factor(0.79) == 1.0
    assert factor(0.5 * 500 / 36000) == pytest.approx(0.505)
    assert factor(0.81) == pytest.approx(0.1)
    assert "500 iterations" in lines["warm-up"]


def test_what_is_typed_wins_and_the_rest_follows_it(chosen):
    cfg, lines = chosen(
        f"{SHORT.format('train')}=320",
        "dataloader.train.total_batch_size=8",
        "train.max_iter=50",
    )
    assert input_sizes(cfg) == [240, 544, 320, 544]  # the typed ones are applied later
    assert "320 pixels; typed" in lines["short side of the images"]
    assert "8 images; typed" in lines["batch"]
    assert cfg.optimizer.lr == pytest.approx(0.02)
    assert "50; typed" in lines["iterations"]
    assert cfg.lr_multiplier.warmup_length == pytest.approx(0.1)
    assert cfg.train.eval_period == 13  # an epoch
    cfg, lines = chosen("optimizer.lr=1", "train.eval_period=0", "train.seed=7")
    assert "typed" in lines["learning rate"]
    assert cfg.optimizer.lr == 0.01
    assert cfg.train.seed == 1
    assert cfg.train.early_stopping.patience == 0
    cfg, lines = chosen("lr_multiplier.warmup_length=0.2")
    assert cfg.lr_multiplier == get_config("fcos_R_18_FPN_bccd").lr_multiplier
    assert lines["schedule"].startswith("the recipe's; typed")
    cfg, lines = chosen("model.head.strides=[8,16,32,64,128]", box=(4, 4))
    assert "levels" not in lines


def test_several_typed_sizes_count_as_their_largest(chosen):
    cfg, lines = chosen(f"{SHORT.format('train')}=[200,320]")
    assert input_sizes(cfg)[2:] == [320, 544]
    assert "[200, 320] pixels; typed" in lines["short side of the images"]


@pytest.mark.parametrize(
    "override",
    [
        f"{SHORT.format('train')}=0",
        f"{LONG.format('train')}=wide",
        "dataloader.train.total_batch_size=2.5",
        "train.max_iter=abc",
        "train.max_iter=true",
    ],
)
def test_a_number_that_is_none_is_named(chosen, override):
    key, value = override.split("=")
    with pytest.raises(ConfigError, match=f"(?i){key} is .*{value}.*whole number.*{key}=[0-9]"):
        chosen(override)


def test_weights_are_announced_and_without_them_nothing_stays_frozen(chosen):
    cfg, lines = chosen(recipe="gfl_R_50_FPN_1x", size="m")
    assert "torchvision://resnet50" in lines["weights"]
    assert "fetched once" in lines["weights"]
    assert cfg.model.backbone.bottom_up.freeze_at == 2
    cfg, lines = chosen("train.init_checkpoint=mine.pth", recipe="gfl_R_50_FPN_1x", size="m")
    assert lines["weights"].startswith("mine.pth; typed")
    cfg, lines = chosen("train.init_checkpoint=", recipe="gfl_R_50_FPN_1x", size="m")
    assert lines["weights"].startswith("none; typed")
    assert cfg.model.backbone.bottom_up.freeze_at == 0
    assert cfg.model.backbone.bottom_up.stages.norm == "BN"
    assert chosen()[1]["weights"].startswith("none; this network learns from scratch")


def test_the_memory_is_what_the_machine_has(monkeypatch):
    ours, where = memory_limit("cpu", 1)
    assert GIB / 8 < ours <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert where.startswith("of this machine's ")
    assert memory_limit("cpu", 2)[0] == ours // 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = types.SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert memory_limit("cuda", 2) == (int(0.85 * 80 * GIB), "of the GPU's 80 GiB")


@pytest.mark.parametrize(("text", "limit"), [("1073741824\n", GIB // 2), ("max\n", None)])
def test_a_containers_limit_counts(monkeypatch, tmp_path, text, limit):
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr("d2_decouple.engine.defaults._CGROUP", tmp_path)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert memory_limit("cpu", 1)[0] == (limit or whole)
