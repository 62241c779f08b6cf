# SPDX-License-Identifier: Apache-2.0
import importlib.util
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from omegaconf import OmegaConf
from PIL import Image

from d2_decouple.data import (
    BCCD_CLASSES,
    coco_evaluator,
    ground_truth,
    load_voc,
    register_bccd,
    register_voc,
    require_dataset,
)

REPOSITORY = Path(__file__).resolve().parents[2]
MINI = REPOSITORY / "tests" / "data" / "bccd_mini"
CONFIGS = REPOSITORY / "configs" / "common" / "data"
CLASSES = ("cat", "dog")
WIDTH, HEIGHT = 60, 40


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    """Each test gets catalogs of its own, and no variable from outside."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    monkeypatch.setattr(MetadataCatalog, "data", dict(MetadataCatalog.data))
    for name in ("bccd_train", "bccd_test", "bccd_mini_train", "bccd_mini_val"):
        DatasetCatalog.data.pop(name, None)
        MetadataCatalog.data.pop(name, None)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)


def annotation(*objects, filename="a.jpg"):
    items = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2, difficult in objects
    )
    return (
        f"<annotation><filename>{filename}</filename><size><width>{WIDTH}</width>"
        f"<height>{HEIGHT}</height><depth>3</depth></size>{items}</annotation>"
    )


@pytest.fixture
def voc(tmp_path):
    """Two images; ``b`` is empty. The image files exist too."""
    root = tmp_path / "pets"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n\n")
    (root / "Annotations/a.xml").write_text(
        annotation(
            ("dog", 1, 1, WIDTH, HEIGHT, 0), ("cat", 0, 0, 20, 10, 0), ("cat", 31, 11, 50, 30, 1)
        )
    )
    (root / "Annotations/b.xml").write_text(annotation(filename="b.png"))
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / name)
    return root


def test_boxes_follow_the_voc_convention(voc):
    first, second = load_voc(voc, "train", CLASSES)
    assert {key: first[key] for key in ("file_name", "image_id", "height", "width")} == {
        "file_name": str(voc / "JPEGImages" / "a.jpg"),
        "image_id": "a",
        "height": HEIGHT,
        "width": WIDTH,
    }
    # Corners count from 1 and are inclusive: (1, 1, W, H) is the whole image.
    assert [item["bbox"] for item in first["annotations"]] == [
        [0, 0, WIDTH, HEIGHT],
        [0, 0, 20, 10],  # annotated from 0: clipped
        [30, 10, 50, 30],
    ]
    assert [item["category_id"] for item in first["annotations"]] == [1, 0, 0]
    assert [item["iscrowd"] for item in first["annotations"]] == [0, 0, 1]
    assert {item["bbox_mode"] for item in first["annotations"]} == {BoxMode.XYXY_ABS}
    assert second["annotations"] == []
    assert second["file_name"].endswith("b.png")


def test_split_lists_with_a_second_column(voc):
    (voc / "ImageSets/Main/dog_train.txt").write_text("a  1\nb -1\n")
    assert [record["image_id"] for record in load_voc(voc, "dog_train", CLASSES)] == ["a", "b"]


def test_ground_truth_leaves_crowds_out(voc):
    first, second = (ground_truth(record) for record in load_voc(voc, "train", CLASSES))
    assert first.image_size == (HEIGHT, WIDTH)
    assert first.gt_classes.tolist() == [1, 0]
    assert first.gt_boxes.tensor.tolist() == [[0, 0, WIDTH, HEIGHT], [0, 0, 20, 10]]
    assert len(second) == 0
    assert second.gt_boxes.tensor.shape == (0, 4)


def test_the_training_mapper_takes_difficult_objects_out(voc):
    record = load_voc(voc, "train", CLASSES)[0]
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    assert mapper(record)["instances"].gt_classes.tolist() == [1, 0]


def test_registering_reads_nothing_and_may_be_repeated(voc):
    register_voc("pets", "no/such/folder", "train", classes=CLASSES)
    register_voc("pets", "no/such/folder", "train", classes=list(CLASSES))
    assert MetadataCatalog.get("pets").thing_classes == list(CLASSES)
    assert MetadataCatalog.get("pets").evaluator_type == "coco"
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        DatasetCatalog.get("pets")


@pytest.mark.parametrize(
    ("split", "classes"), [("val", CLASSES), ("train", ("dog", "cat")), ("train", None)]
)
def test_a_name_cannot_become_another_set(voc, split, classes):
    register_voc("pets", voc, "train", classes=CLASSES)
    with pytest.raises(ValueError, match="'pets' is already registered") as caught:
        register_voc("pets", voc, split, classes=classes)
    wanted = "those annotated" if classes is None else ", ".join(classes)
    assert "split 'train', classes cat, dog" in str(caught.value)
    assert f"split {split!r}, classes {wanted}" in str(caught.value)
    assert "DatasetCatalog.remove('pets')" in str(caught.value)
    assert len(DatasetCatalog.get("pets")) == 2


def test_a_name_of_somebody_else_is_not_taken(voc):
    with pytest.raises(ValueError, match="'coco_2017_val' is already registered"):
        register_voc("coco_2017_val", voc, "train", classes=CLASSES)


def test_classes_are_read_from_all_splits(voc):
    (voc / "Annotations/only_in_val.xml").write_text(annotation(("bird", 1, 1, 9, 9, 0)))
    register_voc("pets", voc, "train")
    first = DatasetCatalog.get("pets")[0]
    assert MetadataCatalog.get("pets").thing_classes == ["bird", "cat", "dog"]
    assert [item["category_id"] for item in first["annotations"]] == [2, 1, 1]


def test_classes_cannot_be_read_where_nothing_is_annotated(voc):
    (voc / "Annotations/a.xml").write_text(annotation())
    register_voc("pets", voc, "train")
    with pytest.raises(ValueError, match=r"no object in .*Annotations: pass classes="):
        DatasetCatalog.get("pets")


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


def test_an_unknown_class_is_named(voc):
    with pytest.raises(ValueError, match="unknown class 'dog'") as caught:
        load_voc(voc, "train", ("cat", "cow"))
    assert str(voc / "Annotations" / "a.xml") in str(caught.value)
    assert "known classes: cat, cow" in str(caught.value)


def test_a_missing_split_names_those_there(voc):
    with pytest.raises(FileNotFoundError, match=r"no split 'val': .*val\.txt") as caught:
        load_voc(voc, "val", CLASSES)
    assert "splits found there: train" in str(caught.value)


def test_a_missing_annotation_is_named(voc):
    (voc / "Annotations/b.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.xml is missing, though its split lists b"):
        load_voc(voc, "train", CLASSES)


DOCTYPE = '<!DOCTYPE annotation [<!ENTITY c SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused(voc, encoding):
    text = annotation(("&c;", 1, 1, 9, 9, 0))
    header = f'<?xml version="1.0" encoding="{encoding}"?>'
    (voc / "Annotations/a.xml").write_text(header + DOCTYPE + text, encoding=encoding)
    with pytest.raises(ValueError, match=r"a\.xml: a DOCTYPE .* is not accepted"):
        load_voc(voc, "train", CLASSES)
    plain = header + annotation(("cat", 1, 1, 9, 9, 0))
    (voc / "Annotations/a.xml").write_text(plain, encoding=encoding)
    assert len(load_voc(voc, "train", CLASSES)[0]["annotations"]) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</annotation>", "", r"cannot read annotation .*a\.xml: "),
        ("<xmin>0</xmin>", "", r"a\.xml: <bndbox/xmin> is None, wanted a number"),
        ("<ymax>10</ymax>", "<ymax>ten</ymax>", r"a\.xml: <bndbox/ymax> is 'ten'"),
        (f"<width>{WIDTH}</width>", "", r"a\.xml: <size/width> is None"),
    ],
)
def test_a_broken_annotation_is_named(voc, old, new, message):
    file = voc / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_voc(voc, "train", CLASSES)


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
    evaluator = coco_evaluator(dataset_name=name, output_dir=str(output_dir), distributed=False)
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
    assert (tmp_path / "two" / "pets_coco_format.json").is_file()
    assert not (tmp_path / "one").exists()
    assert "json_file" not in MetadataCatalog.get("pets").as_dict()


def test_other_sets_are_left_to_detectron2(tmp_path):
    json_file = tmp_path / "given.json"
    json_file.write_text('{"images": [], "categories": [], "annotations": []}')
    register_coco_instances("others", {"thing_classes": ["cat"]}, str(json_file), str(tmp_path))
    coco_evaluator(dataset_name="others", output_dir=str(tmp_path / "out"), distributed=False)
    assert MetadataCatalog.get("others").json_file == str(json_file)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"unknown dataset 'otters'.*'others'"):
        coco_evaluator(dataset_name="otters", output_dir=str(tmp_path))


def test_mini_set():
    register_bccd()
    train, val = (DatasetCatalog.get(f"bccd_mini_{split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (48, 12)
    assert not {r["image_id"] for r in train} & {r["image_id"] for r in val}
    for records, numbers in ((train, (662, 51, 67)), (val, (168, 13, 17))):
        counts = Counter(item["category_id"] for r in records for item in r["annotations"])
        assert tuple(counts[index] for index in range(len(BCCD_CLASSES))) == numbers
    for record in train + val:
        with Image.open(record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
        boxes = np.array([item["bbox"] for item in record["annotations"]])
        assert (boxes[:, 2:] - boxes[:, :2] >= 8).all()
        assert (boxes >= 0).all()
        assert (boxes <= np.tile(image.size, 2)).all()


def test_mini_set_is_small_and_names_no_foreign_folder():
    files = [file for file in MINI.rglob("*") if file.is_file()]
    assert len(files) == 60 + 60 + 2 + 2
    assert sum(-(-file.stat().st_size // 4096) * 4096 for file in files) < 2_500_000
    assert "MIT License" in (MINI / "LICENSE").read_text()
    for file in (MINI / "Annotations").iterdir():
        assert "<path>" not in file.read_text()


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
    assert (tmp_path / "out" / "bccd_mini_val_coco_format.json").is_file()


def load_voc_record(image_id):
    records = load_voc(MINI, "val", BCCD_CLASSES)
    return next(record for record in records if record["image_id"] == image_id)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "make_bccd_mini", REPOSITORY / "tools" / "make_bccd_mini.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool_takes_the_path_out(tool):
    text = "<annotation>\n\t<filename>a</filename>\n\t<path>/x/y.jpg</path>\n\t<source>\n"
    assert tool.without_path(text) == "<annotation>\n\t<filename>a</filename>\n\t<source>\n"


def test_tool_recognises_a_shifted_field_and_only_that(tool):
    with Image.open(MINI / "JPEGImages" / "BloodImage_00366.jpg") as image:
        first, second = image.crop((0, 0, 560, 420)), image.crop((80, 60, 640, 480))
    with Image.open(MINI / "JPEGImages" / "BloodImage_00385.jpg") as image:
        other = image.crop((0, 0, 560, 420))
    peak = tool.correlation_peak(tool.phase(first), tool.phase(second))
    assert peak > tool.MIN_TWIN_PEAK
    assert tool.correlation_peak(tool.phase(first), tool.phase(other)) < tool.MIN_TWIN_PEAK


def test_tool_chooses_the_same_images_from_the_mini_set_itself(tool, tmp_path):
    (tmp_path / "LICENSE").write_text("licence")
    with pytest.raises(SystemExit, match="not empty; delete it first"):
        tool.write(MINI, tmp_path, {"train": [], "val": []})
    chosen = tool.choose(tool.candidates(MINI, "val"), 9, 3, avoid=())
    assert [candidate.image_id for candidate in chosen] == [
        record["image_id"] for record in load_voc(MINI, "val", BCCD_CLASSES)
    ]
    with pytest.raises(SystemExit, match="too few sound images"):
        tool.choose(tool.candidates(MINI, "val"), 10, 3, avoid=())
