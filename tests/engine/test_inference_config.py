# SPDX-License-Identifier: Apache-2.0
"""Configs of every kind can be used for inference, and none can run foreign code."""

from pathlib import Path

import pytest
import yaml
from detectron2.config import LazyConfig
from detectron2.data import transforms as T

from d2_decouple.config import ConfigError, config_names, find_config, get_config
from d2_decouple.engine.inference_config import inference_config, yacs_config


def saved(cfg, folder: Path) -> Path:
    """A config as Detectron2's training leaves it."""
    path = folder / "config.yaml"
    LazyConfig.save(cfg, str(path))
    return path


def edited(path: Path, edit) -> Path:
    content = yaml.unsafe_load(path.read_text())
    edit(content)
    path.write_text(yaml.dump(content))
    return path


@pytest.fixture
def training(tmp_path):
    return saved(get_config("fcos_R_18_FPN_bccd"), tmp_path)


@pytest.mark.parametrize("name", config_names())
def test_every_recipe_says_how_images_are_shown_to_it(name):
    config = inference_config(name)
    (resize,) = config.augmentations
    assert isinstance(resize, T.ResizeShortestEdge)
    assert config.image_format in ("BGR", "RGB")
    assert config.dataset


@pytest.mark.parametrize("name", config_names())
def test_every_recipe_can_be_read_back_from_a_training(name, tmp_path):
    """All that it calls is allowed; the library's parts are in their places."""
    cfg = get_config(name)
    order = inference_config(saved(cfg, tmp_path)).image_format
    assert order == cfg.dataloader.train.mapper.image_format == cfg.model.get("input_format", order)


def test_number_of_classes_and_threshold_are_set(training):
    config = inference_config(training, ["model.head.offset=0.25"], score_thresh=0.125)
    model = config.model(7)
    assert model.num_classes == model.head.predictor.num_classes == 7
    assert model.selection.candidates.test_score_thresh == 0.125
    assert model.head.offset == 0.25
    assert config.model(None).num_classes == 7


def test_yacs_configs_are_read_with_their_own_sizes():
    path = find_config("fcos_R_18_FPN_bccd.yaml")
    config = inference_config(path, ["INPUT.MAX_SIZE_TEST", "333"], score_thresh=0.125)
    (resize,) = config.augmentations
    assert resize.max_size == 333
    model = config.model(2)
    assert model.num_classes == 2
    assert model.selection.candidates.test_score_thresh == 0.125
    with pytest.raises(ConfigError, match=r"pairs, KEY VALUE; got 'INPUT\.MAX_SIZE_TEST'"):
        yacs_config(path, ["INPUT.MAX_SIZE_TEST"])
    with pytest.raises(ConfigError, match="NOTHING"):
        yacs_config(path, ["MODEL.NOTHING", "1"])


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.os.system",  # modules that others import are no way around
        "torch.hub.load",
        "torch.load",
        "detectron2.config.LazyConfig.load",
        "d2_decouple.config.get_config",
        "builtins.eval",
        "torch.no_such_name",
    ],
)
@pytest.mark.parametrize("where", ["model", "augmentation"])
def test_a_saved_config_that_calls_something_else_is_refused(training, target, where):
    def edit(content):
        call = {"_target_": target, "command": "exit 1"}
        if where == "model":
            content["model"]["backbone"]["top_block"] = call
        else:
            content["dataloader"]["test"]["mapper"]["augmentations"].append(call)

    with pytest.raises(ConfigError, match=r"which is not called") as raised:
        inference_config(edited(training, edit), ["model.num_classes=2"])
    assert target in str(raised.value)
    assert ("model.backbone.top_block" if where == "model" else "augmentations.1") in str(
        raised.value
    )
    assert "LazyConfig (.py)" in str(raised.value)


def test_values_and_tags_that_run_code_are_refused(training, tmp_path):
    text = training.read_text()
    score = "!!python/name:d2_decouple.modeling.selection.product_score"
    assert score in text
    training.write_text(text.replace(score, "!!python/name:os.system"))
    with pytest.raises(ConfigError, match=r"model\.selection\.score .* is os\.system"):
        inference_config(training)
    training.write_text(text + "\nother: {call: !!python/name:os.system ''}\n")
    assert inference_config(training).image_format == "BGR"  # nothing is built of that part
    proof = tmp_path / "proof"
    training.write_text(f"model: {{a: !!python/object/apply:os.mkdir ['{proof}']}}")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read.*python/object/apply"):
        inference_config(training)
    assert not proof.exists()


def test_the_base_of_a_yacs_config_runs_no_code(tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "child.yaml"
    path.write_text("_BASE_: base.yaml\nMODEL: {}\n")
    text = f"MODEL: {{WEIGHTS: !!python/object/apply:os.makedirs ['{proof}']}}"
    (tmp_path / "base.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=r"child\.yaml or its _BASE_ .*python/object/apply"
    ) as raised:
        inference_config(path)
    assert "base.yaml" in str(raised.value)
    assert not proof.exists()
    (tmp_path / "base.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet}\nVERSION: 2")
    assert inference_config(path).image_format == "BGR"


def test_a_yacs_config_names_shipped_recipes_unless_the_user_types_another(tmp_path):
    own, path = tmp_path / "own.py", tmp_path / "config.yaml"
    own.write_text(find_config("fcos_R_18_FPN_bccd").read_text())
    text = "MODEL: {{META_ARCHITECTURE: OneStageDetector, DECOUPLE: {{{}}}}}\n"
    path.write_text(text.format(f"MODEL_FILE: {own}"))
    with pytest.raises(ConfigError, match=r"own\.py': .*add MODEL\.DECOUPLE\.MODEL_FILE and its"):
        inference_config(path)
    found = inference_config(path, ["MODEL.DECOUPLE.MODEL_FILE", "fcos_R_50_FPN_1x"])
    assert found.image_format == "BGR"
    (tmp_path / "child.yaml").write_text("_BASE_: config.yaml\nMODEL: {}\n")
    with pytest.raises(ConfigError, match=r"child\.yaml has MODEL\.DECOUPLE\.MODEL_FILE"):
        inference_config(tmp_path / "child.yaml")

    path.write_text(
        text.format("MODEL_FILE: fcos_R_18_FPN_bccd, OVERRIDES: ['model.num_classes=5']")
    )
    assert inference_config(path).model(None).num_classes == 5
    path.write_text(
        text.format("MODEL_FILE: fcos_R_18_FPN_bccd, OVERRIDES: ['model._target_=torch.nn.ReLU']")
    )
    with pytest.raises(ConfigError, match=r"config\.yaml has 'model\._target_=torch\.nn\.ReLU'"):
        inference_config(path)
    inference_config(path, ["MODEL.DECOUPLE.OVERRIDES", "['model.num_classes=2']"])


def test_what_is_no_config_is_named(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("a: 1")
    with pytest.raises(ConfigError, match=r"other\.yaml is no config: wanted"):
        inference_config(path)
    path.write_text("model: {b: [}")
    with pytest.raises(ConfigError, match=r"other\.yaml cannot be read"):
        inference_config(path)
    recipe = tmp_path / "half.py"
    recipe.write_text("train = dict(a=1)")
    with pytest.raises(ConfigError, match="has no model"):
        inference_config(recipe)
    recipe.write_text("model = dict(a=1)")
    with pytest.raises(ConfigError, match=r"has no dataloader\.test\.mapper"):
        inference_config(recipe)
