# SPDX-License-Identifier: Apache-2.0
"""Transforms of albumentations and torchvision: pictures and boxes move together."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from helpers_of_boxes import BOXES, HEIGHT, WIDTH, moved_together, picture, record_of, seen
from torchvision.transforms import v2

from d2_decouple.config import ConfigError
from d2_decouple.data.augmentation import Albumentations, BoxAwareMapper, TorchvisionV2


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    return record_of(tmp_path)


def albumentations(**options: Any) -> Albumentations:
    """One that moves, colours and blurs; skipped where the optional package is missing."""
    library = pytest.importorskip("albumentations")
    return Albumentations(
        transforms=[
            library.HorizontalFlip(p=0.5),
            library.Affine(translate_px=(-30, 30), scale=(0.8, 1.2), p=0.9),
            library.RandomSizedBBoxSafeCrop(HEIGHT, WIDTH, p=0.3),
            library.RandomBrightnessContrast((-0.2, 0.2), (0, 0), p=0.5),
        ],
        **options,
    )


def torchvision(**options: Any) -> TorchvisionV2:
    return TorchvisionV2(
        transforms=[
            v2.RandomHorizontalFlip(0.5),
            v2.RandomAffine(0, translate=(0.5, 0.5), scale=(0.8, 1.2)),
            v2.ColorJitter(brightness=0.2),
            v2.SanitizeBoundingBoxes(min_size=4),
        ],
        **options,
    )


BOTH = pytest.mark.parametrize("make", [albumentations, torchvision])


@BOTH
def test_pictures_and_boxes_use_the_same_numbers(make: Callable[..., Any]) -> None:
    augmentation = make()
    counts = []
    for seed in range(40):
        np.random.seed(seed)
        sight = seen()
        augmentation(sight)
        counts.append(moved_together(sight, 1.5))
    assert max(counts) == 3
    assert min(counts) < 3  # some are shifted away


@BOTH
def test_numpys_seed_decides(make: Callable[..., Any]) -> None:
    first, second = make(), pickle.loads(pickle.dumps(make()))  # as a spawned worker gets it

    def run(augmentation: Any, seed: int) -> tuple[bytes, list[list[float]]]:
        np.random.seed(seed)
        sight = seen()
        augmentation(sight)
        return sight.image.tobytes(), sight.boxes.tolist()

    torch.manual_seed(0)
    want = [run(first, seed) for seed in range(10)]
    torch.manual_seed(1)  # neither torch's numbers nor earlier calls matter
    assert [run(second, seed) for seed in reversed(range(10))] == want[::-1]
    assert len({picture for picture, _ in want}) == 10
    state = torch.get_rng_state()
    run(first, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_transforms_of_one_probability_are_drawn_apart() -> None:
    """Two flips at one half each make four pictures, not two."""
    library = pytest.importorskip("albumentations")
    flips = Albumentations(transforms=[library.HorizontalFlip(p=0.5), library.VerticalFlip(p=0.5)])
    pictures = set()
    for seed in range(30):
        np.random.seed(seed)
        sight = seen()
        flips(sight)
        pictures.add(sight.image.tobytes())
    assert len(pictures) == 4


@BOTH
@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_transforms_get_rgb(make: Callable[..., Any], image_format: str) -> None:
    """A transform to grey weighs red by 0.299 and blue by 0.114, whatever the mapper's order."""
    kind: Any = TorchvisionV2
    grey: Any = v2.Grayscale(num_output_channels=3)
    if make is albumentations:
        library = pytest.importorskip("albumentations")
        kind, grey = Albumentations, library.ToGray(p=1)
    sight = seen()
    if image_format == "RGB":
        sight.image = sight.image[:, :, ::-1].copy()
    kind(transforms=[grey], image_format=image_format)(sight)
    values = [sight.image[int(y) + 1, int(x) + 1, 0] for x, y, _, _ in BOXES]
    assert values == pytest.approx([0.114 * 250, 0.587 * 250, 0.299 * 250], abs=1)
    np.testing.assert_allclose(sight.boxes, BOXES, atol=1e-4)


@BOTH
def test_dropped_boxes_take_their_class_along(
    make: Callable[..., Any], record: dict[str, Any]
) -> None:
    """The left 26 columns are cut off: the first object goes, the others keep their classes."""
    kind: Any = TorchvisionV2
    crop: Any = v2.Lambda(lambda x: x)
    if make is albumentations:
        library = pytest.importorskip("albumentations")
        kind, crop = Albumentations, library.Crop(26, 0, 64, 48)
    else:
        crop = v2.Compose([RightPart(), v2.SanitizeBoundingBoxes()])
    mapper = BoxAwareMapper(
        True, augmentations=[kind(transforms=[crop]), T.RandomFlip(prob=1.0)], image_format="BGR"
    )
    found = mapper(record)["instances"]
    assert found.gt_classes.tolist() == [11, 12]
    want = torch.tensor([[24.0, 8.0, 34.0, 30.0], [4.0, 32.0, 20.0, 44.0]])
    torch.testing.assert_close(found.gt_boxes.tensor, want, atol=1e-3, rtol=0)


class RightPart(v2.Transform):
    """A crop without random numbers."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.crop(inpt, 0, 26, 48, 38)

    _transform = transform  # its name before torchvision 0.21


def test_min_visibility() -> None:
    library = pytest.importorskip("albumentations")
    for share, stays in ((0.37, True), (0.38, False)):  # 6 of 16 columns
        sight = seen()
        Albumentations(transforms=[library.Crop(14, 0, 64, 48)], min_visibility=share)(sight)
        assert sight.boxes.any(axis=1).tolist() == [stays, True, True]


@BOTH
def test_boxes_outside_or_without_area_stay_in_line(make: Callable[..., Any]) -> None:
    """What an augmentation before has emptied or pushed out never reaches the other library."""
    np.random.seed(1)
    sight = seen()
    boxes = [[0.0] * 4, BOXES[0], [-20.0, -9.0, -5.0, -2.0], [-9.0, 6.0, 70.0, 60.0]]
    sight.boxes = np.array(boxes)
    make()(sight)
    assert sight.boxes.shape == (4, 4)
    assert not sight.boxes[[0, 2]].any()
    assert sight.boxes[[1, 3]].any()


@BOTH
def test_detectron2s_mapper_is_refused(make: Callable[..., Any], record: dict[str, Any]) -> None:
    mapper = DatasetMapper(True, augmentations=[make()], image_format="BGR")
    message = r"needs the boxes.*dataloader\.train\.mapper\._target_ = BoxAwareMapper"
    with pytest.raises(TypeError, match=message):
        mapper(record)


@BOTH
def test_boxes_are_never_moved_twice(make: Callable[..., Any]) -> None:
    transform = make()(seen())
    with pytest.raises(TypeError, match="were moved already"):
        transform.apply_box(np.array(BOXES))
    segmented = T.AugInput(picture(), boxes=np.array(BOXES), sem_seg=picture()[:, :, 0])
    with pytest.raises(TypeError, match="a sem_seg as well"):
        make()(segmented)


@BOTH
def test_normalisation_is_left_to_the_detector(make: Callable[..., Any]) -> None:
    kind: Any = TorchvisionV2
    wrong: Any = v2.ToDtype(torch.float32, scale=True)
    if make is albumentations:
        library = pytest.importorskip("albumentations")
        kind, wrong = Albumentations, library.Normalize()
    with pytest.raises(TypeError, match=r"uint8 pixels.*got float32.*pixel_mean"):
        kind(transforms=[wrong])(seen())


@BOTH
def test_wrong_arguments(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"'BGR' or 'RGB', got 'YUV'"):
        make(image_format="YUV")
    with pytest.raises(ConfigError, match=r"must hold transforms, got 'flip'; .*L\(NAME\)"):
        type(make())(transforms=["flip"])


def test_boxes_of_torchvision_must_come_back() -> None:
    with pytest.raises(TypeError, match=r"got Tensor \(3, 4\) and 3 labels"):
        TorchvisionV2(transforms=[v2.ToPureTensor()])(seen())


def test_a_missing_or_other_albumentations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(ImportError, match=r"pip install 'albumentations>=2\.0,<2\.1'"):
        Albumentations(transforms=[])
    other = ModuleType("albumentations")
    other.__version__ = "2.5.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "albumentations", other)
    with pytest.raises(ImportError, match=r"got 2\.5\.1 .*AlbumentationsX.*pip install"):
        Albumentations(transforms=[])
