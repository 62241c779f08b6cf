# SPDX-License-Identifier: Apache-2.0
"""The mapper that hands boxes to augmentations, and the crop that looks at them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from helpers_of_boxes import BOXES, HEIGHT, WIDTH, moved_together, record_of, seen
from PIL import Image
from torchvision.transforms import v2

from d2_decouple.config import ConfigError, get_config
from d2_decouple.data.augmentation import (
    Albumentations,
    BoxAwareMapper,
    RandomCropKeepingObjects,
    TorchvisionV2,
)
from d2_decouple.data.images import read_rgb


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    return record_of(tmp_path)


OWN = [
    T.RandomCrop("relative_range", (0.5, 0.5)),
    T.ResizeShortestEdge([30, 60], max_size=90),
    T.RandomFlip(prob=0.5),
    T.RandomBrightness(0.5, 1.5),
    T.RandomRotation([-10, 10]),
]


@pytest.mark.parametrize("is_train", [True, False])
def test_with_detectron2s_own_it_is_detectron2s_mapper(
    record: dict[str, Any], is_train: bool
) -> None:
    arguments: dict[str, Any] = {"augmentations": OWN, "image_format": "BGR"}
    theirs, ours = (kind(is_train, **arguments) for kind in (DatasetMapper, BoxAwareMapper))
    before = copy.deepcopy(record)
    for seed in range(8):
        np.random.seed(seed)
        want = theirs(record)
        np.random.seed(seed)
        found = ours(record)
        assert found.keys() == want.keys()
        assert torch.equal(found["image"], want["image"])
        if is_train:
            boxes = found["instances"].gt_boxes.tensor
            torch.testing.assert_close(boxes, want["instances"].gt_boxes.tensor)
            assert torch.equal(found["instances"].gt_classes, want["instances"].gt_classes)
            assert found["instances"].image_size == want["instances"].image_size
        else:
            assert "instances" not in found
    assert record == before


def test_images_without_objects_or_annotations(record: dict[str, Any]) -> None:
    mapper = BoxAwareMapper(
        True,
        augmentations=[
            TorchvisionV2(transforms=[v2.RandomHorizontalFlip(), v2.RandomIoUCrop()]),
            RandomCropKeepingObjects(crop_type="absolute", crop_size=(20, 20)),
        ],
        image_format="BGR",
    )
    empty = mapper({**record, "annotations": []})
    assert empty["image"].shape == (3, 20, 20)
    assert empty["instances"].gt_boxes.tensor.shape == (0, 4)
    assert len(empty["instances"]) == 0
    del record["annotations"]
    assert "instances" not in mapper(record)


@pytest.mark.parametrize("option", [{"use_instance_mask": True}, {"use_keypoint": True}])
def test_the_mapper_moves_boxes_only(option: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(option))}=True.*data\.DatasetMapper"):
        BoxAwareMapper(True, augmentations=[], image_format="BGR", **option)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_images_are_read_as_for_inference(tmp_path: Path, order: str) -> None:
    """Detectron2's own reader makes 16 bits white and shows what transparency hides."""
    deep = np.full((8, 10), 20000, np.uint16)
    clear = np.zeros((8, 10, 4), np.uint8)
    clear[:4] = (200, 100, 50, 255)
    for number, pixels in enumerate((deep, clear)):
        file = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(file)
        mapper = BoxAwareMapper(is_train=False, augmentations=[], image_format=order)
        found = mapper({"file_name": str(file), "height": 8, "width": 10})["image"]
        wanted = read_rgb(file) if order == "RGB" else read_rgb(file)[..., ::-1]
        assert (found.permute(1, 2, 0).numpy() == wanted).all()
    assert found[:, 7, 9].tolist() == [255, 255, 255]


def test_the_order_of_colours_is_checked() -> None:
    wrong = TorchvisionV2(transforms=[v2.Identity()])
    with pytest.raises(ConfigError, match=r"TorchvisionV2 expects BGR.*write image_format='RGB'"):
        BoxAwareMapper(True, augmentations=[wrong], image_format="RGB")


def test_crop_keeps_an_object_and_drops_slivers() -> None:
    """Every window shows an object; what is left of a box is a third of it, or nothing."""
    crop = RandomCropKeepingObjects(
        crop_type="absolute", crop_size=(20, 24), min_visible=1 / 3, attempts=500
    )
    whole = np.array(BOXES)
    areas = (whole[:, 2:] - whole[:, :2]).prod(1)
    dropped = 0
    for seed in range(60):
        np.random.seed(seed)
        sight = seen()
        (window,) = T.AugmentationList([crop])(sight).transforms
        assert sight.image.shape == (20, 24, 3)
        assert moved_together(sight, 0) >= 1
        visible = (sight.boxes[:, 2:] - sight.boxes[:, :2]).prod(1) / areas
        assert ((visible == 0) | (visible >= 1 / 3)).all()
        plain = T.CropTransform(window.x0, window.y0, 24, 20).apply_box(whole).clip(0, [24, 20] * 2)
        share = (plain[:, 2:] - plain[:, :2]).prod(1) / areas
        assert ((visible > 0) == (share >= 1 / 3)).all()
        dropped += int(((share > 0) & (visible == 0)).sum())
    assert dropped > 5


def test_crop_by_hand() -> None:
    """A window of everything but the left 14 columns: 6 of the first box's 16 columns stay."""

    class Fixed(T.RandomCrop):
        def get_transform(self, image: np.ndarray) -> T.Transform:
            return T.CropTransform(14, 0, 50, 48)

    for share, first in ((0.375, [0.0, 6.0, 6.0, 16.0]), (0.376, [0.0, 0.0, 0.0, 0.0])):
        crop = RandomCropKeepingObjects(
            crop_type="relative", crop_size=(1.0, 1.0), min_visible=share
        )
        crop.crop = Fixed("relative", (1.0, 1.0))
        sight = seen()
        crop(sight)
        assert sight.boxes.tolist() == [first, [16.0, 8.0, 26.0, 30.0], [30.0, 32.0, 46.0, 44.0]]


def test_crop_that_finds_nothing_leaves_the_image_whole() -> None:
    crop = RandomCropKeepingObjects(crop_type="absolute", crop_size=(4, 4), min_visible=1.0)
    sight = seen()
    crop(sight)
    assert sight.image.shape == (HEIGHT, WIDTH, 3)
    assert sight.boxes.tolist() == BOXES


@pytest.mark.parametrize("wrong", [{"min_visible": 1.5}, {"attempts": 0}])
def test_crop_with_impossible_numbers(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        RandomCropKeepingObjects(crop_type="absolute", crop_size=(4, 4), **wrong)


def test_in_a_recipe(record: dict[str, Any]) -> None:
    library = pytest.importorskip("albumentations")
    mapper = get_config("fcos_R_50_FPN_1x").dataloader.train.mapper
    mapper._target_ = BoxAwareMapper
    mapper.augmentations = [
        L(RandomCropKeepingObjects)(crop_type="relative_range", crop_size=(0.6, 0.6)),
        L(Albumentations)(
            transforms=[L(library.HueSaturationValue)(p=0.5), L(library.GaussNoise)(p=0.3)],
            image_format="${...image_format}",
        ),
        *mapper.augmentations,
    ]
    mapper.augmentations[2].short_edge_length = 64
    found = instantiate(mapper)(record)
    assert min(found["image"].shape[1:]) == 64
    assert 1 <= len(found["instances"]) <= 3
    height, width = found["instances"].image_size
    limits = torch.tensor([width, height, width, height])
    assert (found["instances"].gt_boxes.tensor <= limits).all()


@pytest.mark.parametrize("augmentation", OWN, ids=lambda x: type(x).__name__)
def test_detectron2s_own_draw_from_numpy_only(augmentation: T.Augmentation) -> None:
    """Else a resumed training would see other pictures."""

    def run(other_seed: int) -> bytes:
        np.random.seed(0)
        torch.manual_seed(other_seed)
        sight = seen()
        augmentation(sight)
        return sight.image.tobytes()

    assert run(0) == run(1)
