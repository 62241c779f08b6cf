# SPDX-License-Identifier: Apache-2.0
"""Recipes: found by name, overridden with care, saved, and opened through the yacs door."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from omegaconf import DictConfig, ListConfig
from torch import nn
from util import loss_sum, random_input, tiny, without_gradient

import d2_decouple
from d2_decouple import add_decouple_config, config_names, get_config
from d2_decouple.config import ConfigError, configs_root, find_config, text_override

ROOT = Path(__file__).resolve().parents[1]
BASE = "fcos_R_50_FPN_1x"
OURS = [  # the rest, Detectron2's own models, has tests of its own
    name for name in config_names() if name == "fcos_R_50_FPN_1x_d2" or not name.endswith("_d2")
]
PROJECTS = configs_root().parent / "projects"
YAMLS = sorted([*configs_root().glob("baselines/*.yaml"), *PROJECTS.glob("*/configs/*.yaml")])


def test_there_are_recipes():
    names = config_names()
    assert {BASE, "fcos_R_50_FPN_1x_d2", "fcos_R_18_FPN_bccd"} <= set(names)
    assert names == sorted(names)
    assert {path.stem for path in YAMLS} <= set(names)


def test_a_recipe_is_found_by_name_file_name_and_path(monkeypatch, tmp_path):
    path = find_config(BASE)
    monkeypatch.chdir(tmp_path)
    assert find_config(f"{BASE}.py") == find_config(path) == find_config(str(path)) == path
    assert find_config(f"{BASE}.yaml").suffix == ".yaml"
    assert get_config(str(path)) == get_config(BASE)


@pytest.mark.parametrize("name", ["fcos_R_50_FPN_2x", "fcos_R50_FPN_1x.py", "./fcos_R_50_FPN_1xx"])
def test_an_unknown_recipe_names_the_nearest(name):
    with pytest.raises(ConfigError) as error:
        get_config(name)
    assert name in str(error.value)
    assert f"'{BASE}'" in str(error.value)


def test_a_name_like_no_recipe_lists_them_all():
    with pytest.raises(ConfigError) as error:
        get_config("zzz")
    assert all(name in str(error.value) for name in config_names())


def test_a_yacs_file_is_not_a_lazy_config():
    with pytest.raises(ConfigError, match=r"fcos_R_50_FPN_1x\.yaml is a yacs config"):
        get_config(f"{BASE}.yaml")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.num_clases=3", ["num_clases", "in model", "'num_classes'"]),
        ("modle.num_classes=3", ["modle", "top of the config", "'model'"]),
        ("model.assigner.size_range=[[0,1]]", ["size_range", "'size_ranges'"]),
        ("model.selection.candidates.score_thresh=0.1", ["score_thresh", "'test_score_thresh'"]),
        ("model.num_classes.x=3", ["model.num_classes is 80", "no keys below"]),
        ("model.head.strides.7=3", ["model.head.strides", "list of 5", "0 to 4"]),
        ("model.head.strides.first=3", ["model.head.strides", "0 to 4"]),
        ("model.num_classes", ["model.num_classes", "key=value"]),
        ("model.losses.loss_clas.weight=2", ["loss_clas", "'loss_cls'"]),
        ("model.backbone.out_chanels=64", ["out_chanels", "'out_channels'"]),
        ("train.output_dir=run(1", ["train.output_dir=run(1"]),
        ("~model.num_classes=3", ["~model.num_classes=3"]),
        ("train.amp.enabled=no", ["train.amp.enabled=no", "true or false", "such as false"]),
        ("model.selection.max_detections_per_image=all", ["=all", "a number", "such as 100"]),
        ("model.losses.loss_box_reg.weight=off", ["weight=off", "a number, such as 1.0"]),
        ("model.num_classes='3'", ["model.num_classes='3'", "a number, such as 80"]),
    ],
)
def test_a_bad_override_names_what_to_type(override, named):
    with pytest.raises(ConfigError) as error:
        get_config(BASE, [override])
    for word in named:
        assert word in str(error.value)


def test_a_number_may_refer_to_what_is_still_to_come():
    cfg = get_config(BASE, ["model.losses.loss_box_reg.weight=${train.box_weight}"])
    cfg.train.box_weight = 2.0
    assert cfg.model.losses.loss_box_reg.weight == 2


def test_overrides_reach_the_model():
    overrides = [
        "model.num_classes=7",
        "model.head.strides.0=4",
        "model.selection.max_detections_per_image=5",  # parameters that the recipe does not name
        "model.assigner.size_ranges=[[0,10],[10,20],[20,30],[30,40],[40,50]]",
        "model.losses.loss_box_reg.weight=2",
        "train.output_dir=/somewhere/else",
        "dataloader.train.mapper.augmentations.0.max_size=900",
    ]
    cfg = get_config(BASE, overrides)
    assert cfg.model.head.strides == [4, 16, 32, 64, 128]
    assert cfg.train.output_dir == "/somewhere/else"
    assert cfg.dataloader.train.mapper.augmentations[0].max_size == 900
    cfg.model.head.strides[0] = 8
    model = instantiate(tiny(cfg, num_classes=7).model)
    assert model.head.predictor.num_classes == model.assigner.num_classes == 7
    assert model.selection.max_detections_per_image == 5
    assert model.losses["loss_box_reg"].weight == 2.0
    assert model.assigner.size_ranges[4] == (40, 50)
    loss_sum(model([random_input((64, 64), 2)])).backward()


@pytest.mark.parametrize(
    "text", ["plain", "it's", "a b,c=[1]{2}", "C:\\x\\", "\\'", "x\\\\'y'", '"', "", "0123", "null"]
)
def test_a_text_is_itself_as_an_override(text):
    cfg = get_config(BASE, [text_override("train.output_dir", text)])
    assert cfg.train.output_dir == text


def test_recipes_do_not_share_state():
    """One recipe imports another; changing what was loaded must not reach the next load."""
    first = get_config(BASE)
    first.model.num_classes = 5
    first.train.max_iter = 1
    assert get_config(BASE).model.num_classes == 80
    assert get_config("fcos_R_50_FPN_1x_d2").train.max_iter == 90000
    assert get_config(BASE).model.selection.candidates.test_score_thresh == 0.05
    assert get_config("fcos_R_50_FPN_1x_d2").model.selection.candidates.test_score_thresh == 0.2


@pytest.mark.parametrize("name", OURS)
def test_every_recipe_trains_a_step(name):
    cfg = tiny(get_config(name))
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= cfg.keys()
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    multiplier = instantiate(cfg.lr_multiplier)
    assert 0 < multiplier(0.0) < multiplier(0.5) == 1.0
    with EventStorage():  # two-stage detectors write into it
        losses = model([random_input((64, 96), 3), random_input((101, 67), 0)])
    loss_sum(losses).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert without_gradient(model) == []
    head = model.roi_heads if "roi_heads" in cfg.model else model.head
    before = {name: value.clone() for name, value in head.state_dict().items()}
    optimizer.step()
    after = head.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", OURS)
def test_every_recipe_can_be_saved_and_loaded(name, tmp_path):
    """Detectron2's launcher saves the config: no lambdas, nothing that only pickle can keep."""
    cfg = get_config(name)
    path = tmp_path / "config.yaml"
    LazyConfig.save(cfg, str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert "lambda" not in path.read_text()
    loaded = LazyConfig.load(str(path))
    model = instantiate(tiny(cfg).model)
    again = instantiate(tiny(loaded).model)
    # YAML sorts keys, so that parts are made in another order and drawn otherwise.
    again.load_state_dict(model.state_dict())
    inputs = [random_input((64, 64), 2)]
    losses = []
    for detector in (model, again):
        torch.manual_seed(0)  # proposals are sampled
        with EventStorage():
            losses.append(detector(inputs))
    assert losses[0] == losses[1]
    if "roi_heads" not in cfg.model:
        assert again.selection.score is model.selection.score


def yacs(path, *overrides):
    cfg = get_cfg()
    add_decouple_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(list(overrides))
    return cfg


def two_stages(name):
    return "roi_heads" in get_config(name).model


def shrinking(name):
    """Overrides that do in one line each what ``util.tiny`` does in Python."""
    if two_stages(name):
        heads = ["class_branch", *(f"box_branches.{stage}" for stage in range(3))]
        return [f"model.roi_heads.{head}.head.fc_dims=[64,64]" for head in heads]
    changes = ["model.head.cls_conv_dims=[64]", "model.head.box_conv_dims=[64]"]
    if get_config(name).model.backbone.out_channels == 256:
        changes += ["model.backbone.out_channels=64", "model.head.predictor.in_channels=64"]
        if name.startswith("tscode_"):
            changes.append("model.head.context.finer_channels=256")
    return changes


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_the_yacs_door_builds_the_recipe(path):
    cfg = yacs(path, "MODEL.DECOUPLE.OVERRIDES", shrinking(path.stem))
    model = build_model(cfg)
    lazy = instantiate(get_config(path.stem, shrinking(path.stem)).model)
    meta_architecture = GeneralizedRCNN if two_stages(path.stem) else d2_decouple.OneStageDetector
    assert type(model) is meta_architecture
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, lazy))
    assert shapes == expected
    assert torch.equal(model.pixel_mean, lazy.pixel_mean)
    assert torch.equal(model.pixel_std, lazy.pixel_std)
    assert model.input_format == lazy.input_format
    if not two_stages(path.stem):
        assert model.head_in_features == lazy.head_in_features
    model.train()
    with EventStorage():
        losses = model([random_input((64, 64), 2), random_input((64, 64), 0)])
    loss_sum(losses).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_without_its_line_the_door_stays_shut(path):
    with pytest.raises(KeyError, match=r"Non-existent config key: MODEL\.DECOUPLE"):
        get_cfg().merge_from_file(str(path))


def test_a_model_without_the_door_says_what_to_call():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "OneStageDetector"
    with pytest.raises(ConfigError, match="add_decouple_config"):
        build_model(cfg)


def test_an_empty_model_file_names_the_recipes():
    cfg = get_cfg()
    add_decouple_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "OneStageDetector"
    with pytest.raises(ConfigError, match=r"MODEL\.DECOUPLE\.MODEL_FILE is empty") as error:
        build_model(cfg)
    assert all(name in str(error.value) for name in config_names())


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("MODEL_FILE", "fcos_R_50_FPN_3x", "'fcos_R_50_FPN_1x'"),
        ("OVERRIDES", ["model.num_clases=3"], "'num_classes'"),
        ("OVERRIDES", ["num_classes=3"], "num_classes"),
    ],
)
def test_errors_behind_the_door_name_the_nearest(key, value, named):
    cfg = yacs(find_config(f"{BASE}.yaml"), f"MODEL.DECOUPLE.{key}", value)
    with pytest.raises(ConfigError, match=named):
        build_model(cfg)


def test_values_at_the_door_reach_the_model():
    values = ["MODEL.DECOUPLE.NUM_CLASSES", 7, "MODEL.DECOUPLE.SCORE_THRESH_TEST", 0.3]
    values += ["MODEL.DECOUPLE.NMS_THRESH_TEST", 0.4, "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]]
    values += ["INPUT.FORMAT", "RGB", "MODEL.DECOUPLE.OVERRIDES", shrinking(BASE)]
    model = build_model(yacs(find_config(f"{BASE}.yaml"), *values))
    assert model.num_classes == model.assigner.num_classes == 7
    assert model.head.cls_score.out_channels == 7
    assert model.selection.candidates.test_score_thresh == 0.3
    assert model.selection.nms.test_nms_thresh == 0.4
    assert model.pixel_mean.flatten().tolist() == [1, 2, 3]
    assert model.input_format == "RGB"


def test_slots_learn_the_length_of_a_yacs_training():
    """A slot whose behaviour depends on it (SAPD's phases) interpolates ``train.max_iter``."""
    overrides = [*shrinking(BASE), "model.selection.max_detections_per_image=${train.max_iter}"]
    values = ["SOLVER.MAX_ITER", 123, "MODEL.DECOUPLE.OVERRIDES", overrides]
    model = build_model(yacs(find_config(f"{BASE}.yaml"), *values))
    assert model.selection.max_detections_per_image == 123


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_both_doors_give_one_optimizer(path):
    """Rate, decay and momentum of a convolution's and of both kinds of norms' parameters."""
    cfg, lazy = yacs(path), get_config(path.stem)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.GroupNorm(32, 32), nn.BatchNorm2d(32))
    lazy.optimizer.params.model = model
    ours, theirs = instantiate(lazy.optimizer), build_optimizer(cfg, model)
    assert isinstance(ours, torch.optim.SGD)
    assert isinstance(theirs, torch.optim.SGD)
    assert by_parameter(theirs, model) == by_parameter(ours, model)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_both_doors_give_one_schedule(path):
    """Length, batch, weights, and the rate at every bend of warm-up and steps."""
    cfg, lazy = yacs(path), get_config(path.stem)
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    expected = build_lr_scheduler(cfg, optimizer)._multiplier
    multiplier = instantiate(lazy.lr_multiplier)
    iterations = [0, 1, cfg.SOLVER.WARMUP_ITERS // 2, cfg.SOLVER.WARMUP_ITERS]
    iterations += [step + i for step in cfg.SOLVER.STEPS for i in (-1, 0, 1)]
    for iteration in [*iterations, cfg.SOLVER.MAX_ITER - 1]:
        where = iteration / cfg.SOLVER.MAX_ITER
        assert multiplier(where) == pytest.approx(expected(where), rel=1e-6), iteration


def by_parameter(optimizer, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: group[key] for key in ("lr", "weight_decay", "momentum")}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
@pytest.mark.parametrize("training", [True, False])
def test_both_doors_give_one_image_size(path, training):
    cfg, lazy = yacs(path), get_config(path.stem)
    loader = lazy.dataloader.train if training else lazy.dataloader.test
    assert loader.mapper.image_format == cfg.INPUT.FORMAT
    names = cfg.DATASETS.TRAIN if training else cfg.DATASETS.TEST
    assert [loader.dataset.names] == list(names)
    ours = [instantiate(augmentation) for augmentation in loader.mapper.augmentations]
    theirs = build_augmentation(cfg, training)
    image = torch.zeros(480, 640, 3).numpy()
    for augmentation, expected in zip(ours, theirs, strict=True):
        assert type(augmentation) is type(expected)
    first, expected = (augmentations[0].get_transform(image) for augmentations in (ours, theirs))
    assert (first.new_h, first.new_w) == (expected.new_h, expected.new_w)


def test_all_recipes_are_listed_on_request():
    done = subprocess.run(
        [sys.executable, "-m", "d2_decouple.config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == config_names()


def test_importing_is_cheap():
    """Neither torch nor Detectron2, and still the public names are there."""
    code = (
        "import sys, d2_decouple\n"
        "d2_decouple.config_names(), d2_decouple.__version__, dir(d2_decouple)\n"
        "print(*{'torch', 'detectron2', 'omegaconf', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_an_unknown_public_name_lists_the_known():
    with pytest.raises(AttributeError, match=r"get_confg.*get_config"):
        d2_decouple.get_confg  # noqa: B018


def test_all_public_names_exist():
    assert all(hasattr(d2_decouple, name) for name in d2_decouple.__all__)


def callables_of(node):
    """Functions and classes that are stored anywhere in a config."""
    if isinstance(node, DictConfig):
        for key in node:
            if not isinstance(node[key], DictConfig | ListConfig) and callable(node[key]):
                yield node[key]
            yield from callables_of(node[key])
    elif isinstance(node, ListConfig):
        for item in node:
            yield from callables_of(item)


@pytest.mark.parametrize("name", config_names())
def test_recipes_say_nothing_about_the_device_inside_the_model(name):
    cfg = get_config(name)
    assert "device" not in cfg.model
    assert all(getattr(x, "__name__", "") != "<lambda>" for x in callables_of(cfg.model))
    if not torch.cuda.is_available():
        assert cfg.train.device == "cpu"
        assert not cfg.train.amp.enabled


class BackboneAndHead(nn.Module):
    """What the papers count: no preprocessing, no selection."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        maps = self.model.backbone(images)
        predictions = self.model.head([maps[name] for name in self.model.head_in_features])
        return predictions.logits, predictions.boxes, predictions.quality


@torch.no_grad()
def test_fcos_costs_what_the_papers_host_costs():
    """Multiply-adds of the convolutions at 800 x 1280, and the head's parameters, 80 classes."""
    model = instantiate(get_config(BASE).model).eval()
    assert sum(parameter.numel() for parameter in model.head.parameters()) == 4920661
    analysis = FlopCountAnalysis(BackboneAndHead(model), torch.zeros(1, 3, 800, 1280))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert analysis.by_operator()["conv"] == 199768148480
