# SPDX-License-Identifier: Apache-2.0
"""Sets that the recipes name, their evaluation and their configs."""

import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from helpers_of_data import CLASSES, HEIGHT, WIDTH
from omegaconf import OmegaConf

from d2_decouple.data import (
    BCCD_CLASSES,
    ground_truth,
    load_voc,
    register_bccd,
    register_voc,
    require_dataset,
)
from d2_decouple.evaluation import BoxEvaluator

REPOSITORY = Path(__file__).resolve().parents[2]
MINI = REPOSITORY / "tests" / "data" / "bccd_mini"
CONFIGS = REPOSITORY / "configs" / "common" / "data"

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.mark.parametrize("variable", [None, "elsewhere"])
def test_a_missing_folder_says_where_and_what_to_type(tmp_path, monkeypatch, variable):
    monkeypatch.chdir(tmp_path)
    if variable:
        monkeypatch.setenv("DETECTRON2_DATASETS", variable)
    register_bccd()
    with pytest.raises(FileNotFoundError) as caught:
        DatasetCatalog.get("bccd_train")
    message = str(caught.value)
    assert str(tmp_path / (variable or "datasets") / "BCCD") in message
    assert f"DETECTRON2_DATASETS is {repr(variable) if variable else 'not set'}" in message
    assert "export DETECTRON2_DATASETS=" in message


def test_the_variable_is_read_when_the_images_are_asked_for(voc, monkeypatch):
    register_voc("pets", "$DETECTRON2_DATASETS/pets", "train", classes=CLASSES)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(voc.parent))
    assert len(DatasetCatalog.get("pets")) == 2


def test_an_unknown_dataset_names_the_nearest():
    register_bccd()
    require_dataset("bccd_mini_val")
    with pytest.raises(ValueError, match="unknown dataset 'bccd_mini_vla'") as caught:
        require_dataset("bccd_mini_vla")
    assert "'bccd_mini_val'" in str(caught.value)
    assert "register_voc('bccd_mini_vla', 'FOLDER', 'SPLIT'" in str(caught.value)


def predictions(record, boxes, classes, scores):
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor(classes)
    instances.scores = torch.tensor(scores)
    return {"instances": instances}


DOG = (1, [0, 0, WIDTH, HEIGHT], 0.5)  # class, box, score
CAT = (0, [0, 0, 20, 10], 0.5)
DIFFICULT_CAT = (0, [30, 10, 50, 30], 0.9)
WRONG_CAT = (0, [0, 20, 20, 40], 0.9)


def measure(name, output_dir, *detections):
    """AP of these detections on image ``a`` and none on ``b``."""
    evaluator = BoxEvaluator(dataset_name=name, output_dir=str(output_dir))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        found = detections if record["image_id"] == "a" else ()
        classes, boxes, scores = ([item[part] for item in found] for part in range(3))
        evaluator.process([record], [predictions(record, boxes, classes, scores)])
    return evaluator.evaluate()["bbox"]


def test_evaluation_neither_demands_nor_punishes_difficult_objects(voc, tmp_path):
    register_voc("pets", voc, "train", classes=CLASSES)
    assert measure("pets", tmp_path, DOG, CAT)["AP"] == pytest.approx(100)
    assert measure("pets", tmp_path, DOG, CAT, DIFFICULT_CAT)["AP"] == pytest.approx(100)
    # The same score where nothing is annotated is a false positive: half of the cats' precision.
    result = measure("pets", tmp_path, DOG, CAT, WRONG_CAT)
    assert result["AP-cat"] == pytest.approx(50)
    assert result["AP-dog"] == pytest.approx(100)


def test_evaluation_reads_the_annotations_as_they_are_now(voc, tmp_path):
    register_voc("pets", voc, "train", classes=CLASSES)
    assert measure("pets", tmp_path / "one", DOG, CAT)["AP-cat"] == pytest.approx(100)
    # In the same output folder: the cat that was difficult is demanded now, so one of two is
    # found. COCO samples recall at 101 points, of which 51 lie at or below a half.
    file = voc / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<difficult>1", "<difficult>0"))
    half = 100 * 51 / 101
    assert measure("pets", tmp_path / "one", DOG, CAT)["AP-cat"] == pytest.approx(half)
    # An output folder that is gone does not matter to the next evaluation.
    shutil.rmtree(tmp_path / "one")
    assert measure("pets", tmp_path / "two", DOG, CAT)["AP-cat"] == pytest.approx(half)
    assert not (tmp_path / "one").exists()
    assert "json_file" not in MetadataCatalog.get("pets").as_dict()


def test_coco_config():
    cfg = LazyConfig.load(str(CONFIGS / "coco.py"))
    loader = cfg.dataloader
    assert loader.train.dataset.names == "coco_2017_train"
    assert loader.evaluator.dataset_name == loader.test.dataset.names == "coco_2017_val"
    assert loader.train.total_batch_size == 16
    assert loader.train.mapper.use_instance_mask is False
    for mapper in (loader.train.mapper, loader.test.mapper):
        resize = mapper.augmentations[0]
        assert (resize.short_edge_length, resize.max_size) == (800, 1333)
        assert mapper.image_format == "BGR"


@pytest.fixture
def bccd_cfg(tmp_path, monkeypatch):
    """The BCCD data base as a recipe uses it, twice loaded, on a machine without BCCD."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "absent"))
    LazyConfig.load(str(CONFIGS / "bccd.py"))
    cfg = LazyConfig.load(str(CONFIGS / "bccd.py"))
    cfg.train = OmegaConf.create({"output_dir": str(tmp_path / "out")})
    return cfg


def test_bccd_config_names_the_full_set(bccd_cfg):
    loader = bccd_cfg.dataloader
    assert (loader.train.dataset.names, loader.test.dataset.names) == ("bccd_train", "bccd_test")
    with pytest.raises(FileNotFoundError, match=r"absent.BCCD"):
        instantiate(loader.train)


def test_bccd_config_gives_batches_and_measures(bccd_cfg, tmp_path):
    LazyConfig.save(bccd_cfg, str(tmp_path / "config.yaml"))
    cfg = LazyConfig.load(str(tmp_path / "config.yaml"))
    loader = cfg.dataloader
    loader.train.dataset.names = "bccd_mini_train"
    loader.test.dataset.names = "bccd_mini_val"
    assert (loader.train.num_workers, loader.test.num_workers) == (2, 2)
    loader.train.num_workers = loader.test.num_workers = 0  # no processes in a test
    batch = next(iter(instantiate(loader.train)))
    assert [tuple(item["image"].shape) for item in batch] == [(3, 240, 320)] * 4
    assert all(len(item["instances"]) for item in batch)
    test = instantiate(loader.test)
    assert len(test) == 12
    evaluator = instantiate(loader.evaluator)
    evaluator.reset()
    for (item,) in test:
        assert tuple(item["image"].shape) == (3, 240, 320)
        truth = ground_truth(load_voc_record(item["image_id"]))
        found = predictions(
            item, truth.gt_boxes.tensor.tolist(), truth.gt_classes.tolist(), [0.9] * len(truth)
        )
        evaluator.process([item], [found])
    result = evaluator.evaluate()["bbox"]
    assert result["AP"] == pytest.approx(100)
    assert {f"AP-{name}" for name in BCCD_CLASSES} <= result.keys()


def load_voc_record(image_id):
    records = load_voc(MINI, "val", BCCD_CLASSES)
    return next(record for record in records if record["image_id"] == image_id)
