# SPDX-License-Identifier: Apache-2.0
"""What newcomers are likely to get wrong, each with the command and what must be printed.

In a command FOLDER is a sound folder with YOLO's labels, changed by the mistake's function where
it has one, and OUT a new folder for what is written.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.error import URLError

import pytest
import torch
from detectron2.config import instantiate
from PIL import Image
from util import tiny
from yolo_folders import data_yaml, yolo_shapes

from d2_decouple import demo, train
from d2_decouple.config import get_config
from d2_decouple.data import checks
from d2_decouple.data.shapes import make_shapes

TRAIN = ("train", "--dataset", "FOLDER", "--method", "fcos")
LAZY = ("train", "--dataset", "FOLDER", "--config-file", "fcos_R_18_FPN_bccd")
DEMO = ("demo", "--config-file", "fcos_R_18_FPN_bccd", "--output", "OUT/found")
COMMANDS = {"train": train.main, "demo": demo.main, "checks": checks.main}
QUICK = (
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=64",
    "train.output_dir=OUT",
)


def nothing(folder, out):
    """The folder is sound: the mistake is in the command."""


@dataclass(frozen=True)
class Mistake:
    """What is done wrong, how, and parts of what is then printed."""

    title: str
    command: tuple[str, ...]
    printed: tuple[str, ...]
    change: Callable = field(default=nothing)
    status: int = 1
    trains: bool = False  # it shows only after a step


def images_only(folder, out):
    shutil.rmtree(folder / "labels")
    (folder / "data.yaml").unlink()


def names(*values):
    return lambda folder, out: data_yaml(
        folder, train="images/train", val="images/val", names=list(values)
    )


def first_label(text):
    def write(folder, out):
        (folder / "labels" / "train" / "shapes_00000.txt").write_text(text)

    return write


def no_objects(folder, out):
    for file in folder.glob("labels/*/*.txt"):
        file.write_text("")


def one_image(folder, out):
    shutil.rmtree(folder / "images" / "val")
    for file in sorted((folder / "images" / "train").iterdir())[1:]:
        file.unlink()
    data_yaml(folder, train="images/train", names=["circle", "rectangle", "triangle"])


def empty_val(folder, out):
    for file in (folder / "images" / "val").iterdir():
        file.unlink()


def coco_with_lost_images(folder, out):
    shutil.rmtree(folder)
    make_shapes(folder, images=4, layout="coco")
    shutil.rmtree(folder / "train")


def voc_with_damaged_image(folder, out):
    shutil.rmtree(folder)
    make_shapes(folder, images=4)
    (folder / "JPEGImages" / "shapes_00001.png").write_bytes(b"no picture")


def mixed_case_class(folder, out):
    """VOC: the class of one object is written otherwise."""
    shutil.rmtree(folder)
    make_shapes(folder, images=8, negatives=0, difficult=0)
    file = folder / "Annotations" / "shapes_00000.xml"
    text = re.sub("<name>(.)", lambda found: f"<name>{found[1].upper()}", file.read_text(), count=1)
    file.write_text(text)


def transparent(folder, out):
    for file in folder.glob("images/*/*.png"):
        Image.open(file).convert("RGBA").save(file)


def earlier_training(folder, out):
    out.mkdir()
    (out / "last_checkpoint").write_text("model_final.pth")


def weights(name="fcos", **options):
    def write(folder, out):
        out.mkdir()
        overrides = [f"model.{key}={value}" for key, value in options.items()]
        model = instantiate(get_config(f"{name}_R_18_FPN_bccd", overrides).model)
        torch.save({"model": model.state_dict()}, out / "weights.pth")

    return write


def checkpoint_of_another_model(folder, out):
    out.mkdir()
    (out / "last_checkpoint").write_text("model_0000000.pth")
    state = {"encoder.weight": torch.zeros(3)}
    torch.save({"model": state, "iteration": 0, "trainer": {}}, out / "model_0000000.pth")


def a_file_as_output(folder, out):
    out.write_text("mine")


MISTAKES = [
    Mistake(
        "a misspelt path",
        ("train", "--dataset", "FOLDER_", "--method", "fcos"),
        ("no dataset folder", "FOLDER_", "correct the path"),
    ),
    Mistake(
        "data.yaml in the place of its folder",
        ("train", "--dataset", "FOLDER/data.yaml", "--method", "fcos"),
        ("data.yaml is a file", "wanted the folder", "such as FOLDER"),
    ),
    Mistake(
        "the folder around the data set",
        ("train", "--dataset", "FOLDER/..", "--method", "fcos"),
        ("is no dataset", "is FOLDER meant?"),
    ),
    Mistake(
        "images without labels",
        TRAIN,
        ("is no dataset", "there are images, and no annotations", "classes.txt", "Annotations"),
        images_only,
    ),
    Mistake(
        "a misspelt method",
        ("train", "--dataset", "FOLDER", "--method", "pdnt"),
        ("--method pdnt", "did you mean 'pdnet'"),
    ),
    Mistake("a misspelt size", (*TRAIN, "--size", "small"), ("--size small", "wanted s, m or l")),
    Mistake(
        "a host that the method does not stand on",
        ("train", "--dataset", "FOLDER", "--method", "salt", "--host", "pdnet"),
        ("--host pdnet", "type --host gflv2 or fcos or atss"),
    ),
    Mistake(
        "a host or a size without a method",
        ("train", "--dataset", "FOLDER", "--size", "m"),
        ("--size belongs to --method", "type --method fcos or"),
    ),
    Mistake(
        "a method and a recipe",
        (*TRAIN, "--config-file", "fcos_R_18_FPN_bccd"),
        ("both name a recipe", "leave one of them out"),
    ),
    Mistake("a method without data", ("train", "--method", "fcos"), ("type --dataset FOLDER",)),
    Mistake(
        "a misspelt recipe",
        ("train", "--dataset", "FOLDER", "--config-file", "fcos_R18_FPN_bccd"),
        ("no config 'fcos_R18_FPN_bccd'", "did you mean", "'fcos_R_18_FPN_bccd'"),
    ),
    Mistake(
        "a misspelt key",
        (*TRAIN, "train.max_iters=5"),
        ("no key 'max_iters' in train", "did you mean 'max_iter'"),
    ),
    Mistake(
        "a key with a blank in the place of =",
        (*TRAIN, "train.max_iter", "5"),
        ("'train.max_iter' has no value", "key=value"),
    ),
    Mistake(
        "an option behind key=value",
        (*TRAIN, "train.max_iter=5", "--resume"),
        ("--resume would be taken for an override", "options before key=value"),
    ),
    Mistake(
        "key=value for a yacs config",
        ("train", "--dataset", "FOLDER", "--config-file", "fcos_R_18_FPN_bccd.yaml", "a=1"),
        ("a yacs config is overridden by pairs, KEY VALUE",),
    ),
    Mistake(
        "a class named twice",
        TRAIN,
        ("data.yaml", "'circle'", "come more than once", "its own name"),
        names("circle", "circle", "triangle"),
    ),
    Mistake(
        "a class without a name",
        TRAIN,
        ("data.yaml", "class 1 has an empty name"),
        names("circle", "", "triangle"),
    ),
    Mistake(
        "a class written in two ways",
        ("checks", "FOLDER"),
        ("4 classes", "are nearly written alike", "correct the annotations"),
        mixed_case_class,
        status=0,
    ),
    Mistake(
        "labels that count classes from 1",
        TRAIN,
        ("shapes_00000.txt, line 1 has class 3", "do the labels count from 1?"),
        first_label("3 0.5 0.5 0.2 0.2\n"),
    ),
    Mistake(
        "labels in pixels",
        TRAIN,
        ("shapes_00000.txt, line 2 has 30", "shares of the image from 0 to 1", "are divided by"),
        first_label("0 0.5 0.5 0.2 0.2\n0 30 20 10 10\n"),
    ),
    Mistake(
        "labels with a score, as a detector writes them",
        TRAIN,
        ("line 1 has 6 numbers", "is the sixth a score? take it out"),
        first_label("0 0.5 0.5 0.2 0.2 0.9\n"),
    ),
    Mistake(
        "images that are not where the annotations say",
        TRAIN,
        ("instances_train.json", "first image 'shapes_00000.png'", "put the images there"),
        coco_with_lost_images,
    ),
    Mistake("nothing annotated", (*TRAIN, *QUICK), ("has no objects to learn from",), no_objects),
    Mistake("one image", TRAIN, ("1 images cannot be split", "wanted two or more"), one_image),
    Mistake("an empty val", TRAIN, ("images/val) has no images", "wanted at least one"), empty_val),
    Mistake(
        "a damaged image",
        (*TRAIN, *QUICK),
        ("shapes_00001.png", "cannot be opened", "d2_decouple.data.checks"),
        voc_with_damaged_image,
    ),
    Mistake(
        "images with transparency, which are no mistake",
        ("checks", "FOLDER"),
        ("faults that stop a training: none",),
        transparent,
        status=0,
    ),
    Mistake(
        "a rate that is far too high",
        (*LAZY, *QUICK, "optimizer.lr=1e15", "train.max_iter=9", "train.eval_period=0"),
        ("became infinite or NaN", "learning rate", "type optimizer.lr=0.001"),
        trains=True,
    ),
    Mistake(
        "a batch of none",
        (*TRAIN, "dataloader.train.total_batch_size=0"),
        ("total_batch_size is 0", "whole number from 1"),
    ),
    Mistake(
        "the wrong number of classes typed",
        (*TRAIN, *QUICK, "model.num_classes=80"),
        ("predicts 80 classes", "has 3 (circle, rectangle, triangle)", "model.num_classes=3"),
    ),
    Mistake(
        "weights of other classes evaluated",
        (*LAZY[:3], "--eval-only", *QUICK, "train.init_checkpoint=OUT/weights.pth"),
        ("head.cls_score.bias ((80,) in the file, (3,) here)",),
        weights(num_classes=80),
    ),
    Mistake(
        "weights of another method evaluated",
        (*LAZY[:3], "--eval-only", *QUICK, "train.init_checkpoint=OUT/weights.pth"),
        ("weights.pth", "tensors"),
        weights("pdnet"),
    ),
    Mistake(
        "evaluation without weights",
        (*LAZY[:3], "--eval-only", *QUICK),
        ("there are no weights to evaluate", "train.init_checkpoint=FILE"),
    ),
    Mistake(
        "a second training in the same folder",
        (*TRAIN, *QUICK),
        ("OUT holds an earlier training", "--resume to go on", "train.output_dir=FOLDER"),
        earlier_training,
    ),
    Mistake(
        "--resume with another method",
        (*LAZY[:3], "--resume", *QUICK),
        ("model_0000000.pth", "none of the 1 tensors", "encoder.weight"),
        checkpoint_of_another_model,
        trains=True,
    ),
    Mistake(
        "a file as output folder",
        (*TRAIN, *QUICK),
        ("the output folder OUT cannot be written", "train.output_dir=FOLDER"),
        a_file_as_output,
    ),
    Mistake(
        "pictures of a path that does not exist",
        (*DEMO, "--weights", "OUT/weights.pth", "--input", "FOLDER/imgs"),
        ("--input FOLDER/imgs", "there is no such file or folder"),
        weights(),
    ),
    Mistake(
        "pictures of a folder that only holds folders",
        (*DEMO, "--weights", "OUT/weights.pth", "--input", "FOLDER/images"),
        ("no image or video lies directly in this folder",),
        weights(),
    ),
    Mistake(
        "pictures with weights that do not exist",
        (*DEMO, "--weights", "OUT/model_best.pth", "--input", "FOLDER/images/val"),
        (
            "there are no weights 'OUT/model_best.pth'",
            "give the checkpoint of a training",
        ),
    ),
    Mistake(
        "pictures without weights",
        (*DEMO, "--input", "FOLDER"),
        ("the following arguments are required: --weights",),
        status=2,
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.title)
def test_the_mistake_is_explained(mistake, tmp_path, capsys, monkeypatch):
    folder = yolo_shapes(tmp_path / "parent" / "pets", images=6, size=(64, 80), negatives=0)
    shutil.rmtree(tmp_path / "parent" / "pets_voc")
    out = tmp_path / "out"
    mistake.change(folder, out)
    monkeypatch.chdir(tmp_path)
    if not mistake.trains:
        monkeypatch.setattr("d2_decouple.train.train", None)

    def filled(text):
        return text.replace("FOLDER", str(folder), 1).replace("OUT", str(out))

    command, *arguments = (filled(text) for text in mistake.command)
    try:
        status = COMMANDS[command](arguments)
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    printed = "".join(capsys.readouterr())
    assert status == mistake.status, printed
    assert "Traceback" not in printed
    for part in mistake.printed:
        wanted = part if "=FOLDER" in part or "--dataset FOLDER" in part else filled(part)
        assert wanted in printed
    if mistake.status:
        (line,) = [line for line in printed.splitlines() if "error: " in line]
        assert len(line) < 1000


def test_weights_that_cannot_be_fetched_say_what_to_do_instead(tmp_path, capsys, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr("d2_decouple.train.get_config", lambda name: tiny(get_config(name)))
    folder = yolo_shapes(tmp_path / "pets", images=4, size=(64, 80))
    quick = [text.replace("OUT", str(tmp_path / "out")) for text in QUICK]
    assert train.main(["--dataset", str(folder), "--method", "gfl", "--size", "m", *quick]) == 1
    printed = capsys.readouterr()
    # It is announced first, and what is then said works as typed: see test_defaults.
    assert "weights: torchvision://resnet50.IMAGENET1K_V1; trained on ImageNet" in printed.out
    for part in ("resnet50.IMAGENET1K_V1 could not be fetched", "no network", "random weights"):
        assert part in printed.err
