# SPDX-License-Identifier: Apache-2.0
"""Augmentations that see the boxes: crops that keep objects, albumentations, torchvision's v2.

Detectron2's own augmentations (``T.ResizeShortestEdge``, ``T.RandomFlip``, ``T.RandomCrop``, ...)
and those of this file stand side by side in ``dataloader.train.mapper.augmentations``, and are
applied in that order. Those of this file need :class:`BoxAwareMapper`: Detectron2's mapper moves
boxes one by one and after the picture, so nothing that it calls can look at them or drop one.

All randomness comes from numpy's global generator, so that a resumed training repeats it.
"""

import copy
import random
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..config import ConfigError
from .images import read_pixels

__all__ = ["Albumentations", "BoxAwareMapper", "RandomCropKeepingObjects", "TorchvisionV2"]

_INSTALL = "pip install 'albumentations>=2.0,<2.1'"

Moved = tuple[np.ndarray, np.ndarray, np.ndarray]


class BoxAwareMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` for boxes, which hands them to the augmentations.

    Every augmentation gets the picture and all boxes of the image together, those that others
    have emptied included. What is left without an area is dropped at the end, with its class.
    With Detectron2's own augmentations the results are those of ``DatasetMapper``, but for images
    of 16 bits and transparent ones: they are read as for inference (:mod:`.images`), where
    Detectron2 would turn the former white.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments of ``DatasetMapper``; masks, keypoints and proposals are not moved here."""
        super().__init__(*args, **kwargs)
        for name in ("use_instance_mask", "use_keypoint", "proposal_topk"):
            if getattr(self, name):
                raise ConfigError(
                    f"BoxAwareMapper moves boxes only, got {name}={getattr(self, name)}; use "
                    "detectron2.data.DatasetMapper, with Detectron2's own augmentations"
                )
        if self.image_format not in ("BGR", "RGB"):
            raise ConfigError(f"image_format must be 'BGR' or 'RGB', got {self.image_format!r}")
        for augmentation in self.augmentations.augs:
            order = getattr(augmentation, "image_format", self.image_format)
            if order != self.image_format:
                raise ConfigError(
                    f"{type(augmentation).__name__} expects {order} images, but the mapper reads "
                    f"{self.image_format}; write image_format={self.image_format!r} in it"
                )

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Detectron2's dataset dict -> the same with ``image`` (C, H, W), and in training with
        ``instances`` (``gt_boxes`` as xyxy pixels of that image, ``gt_classes``), without crowds.
        """
        record = copy.deepcopy(dataset_dict)
        image = read_pixels(record["file_name"], self.image_format)
        detection_utils.check_image_size(record, image)
        annotated = "annotations" in record and self.is_train
        objects = [item for item in record.pop("annotations", []) if not item.get("iscrowd", 0)]
        boxes = [
            BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in objects
        ]
        seen = T.AugInput(image, boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4))
        self.augmentations(seen)
        size = seen.image.shape[:2]
        record["image"] = torch.as_tensor(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
        if annotated:
            moved = [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": item["category_id"]}
                for box, item in zip(_clip(seen.boxes, size), objects, strict=True)
            ]
            instances = detection_utils.annotations_to_instances(moved, size)
            record["instances"] = detection_utils.filter_empty_instances(instances)
        return record


class RandomCropKeepingObjects(T.Augmentation):
    """``T.RandomCrop`` that never cuts all objects away, nor leaves slivers of them as objects.

    Detectron2's crop keeps the label of whatever is left of a box, even one pixel. Here an
    object of which less is visible is no object any more. A window without any object is drawn
    anew, and after enough failures the image stays whole; an image without objects is cropped.
    """

    def __init__(
        self,
        *,
        crop_type: str,
        crop_size: tuple[float, float],
        min_visible: float = 0.3,
        attempts: int = 20,
    ) -> None:
        """
        Args:
            crop_type: as in ``T.RandomCrop``: ``"relative_range"``, ``"absolute"``, ...
            crop_size: as in ``T.RandomCrop``.
            min_visible: share of a box's area that must stay visible.
            attempts: windows that are tried.
        """
        super().__init__()
        if not 0 <= min_visible <= 1 or attempts < 1:
            raise ConfigError(
                "wanted min_visible from 0 to 1 and at least one of attempts, got "
                f"min_visible={min_visible}, attempts={attempts}"
            )
        self.crop = T.RandomCrop(crop_type, crop_size)
        self.crop_type, self.crop_size = crop_type, crop_size
        self.min_visible, self.attempts = min_visible, attempts

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None) -> T.Transform:
        """Draw the window for an (H, W, C) image with (M, 4) xyxy boxes."""
        objects = _require_boxes(self, boxes)
        objects = objects[_has_area(_clip(objects, image.shape[:2]))]
        for _ in range(self.attempts):
            window = _Window(self.crop.get_transform(image), self.min_visible)
            if not len(objects) or _has_area(window.apply_box(objects)).any():
                return window
        return T.NoOpTransform()


class _Window(T.CropTransform):
    """A crop that empties boxes of which too little is visible."""

    def __init__(self, crop: T.CropTransform, min_visible: float) -> None:
        super().__init__(crop.x0, crop.y0, crop.w, crop.h)
        self.min_visible = min_visible

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        moved = super().apply_box(box)
        visible = _clip(moved, (self.h, self.w))
        # At least a trace, so that a box beside the window is emptied whatever the limit is.
        least = np.maximum(self.min_visible * _area(moved), np.finfo(np.float64).tiny)
        return np.where((_area(visible) >= least)[:, None], visible, 0.0)


class _Pipeline(T.Augmentation):
    """Transforms of another library, which move the picture and all its boxes in one call."""

    def __init__(self, transforms: Sequence[Any], image_format: str) -> None:
        super().__init__()
        if image_format not in ("BGR", "RGB"):
            raise ConfigError(f"image_format must be 'BGR' or 'RGB', got {image_format!r}")
        for transform in transforms:
            if not callable(transform):
                raise ConfigError(
                    f"{type(self).__name__}.transforms must hold transforms, got {transform!r}; "
                    "in a config write them as L(NAME)(...)"
                )
        self.transforms, self.image_format = list(transforms), image_format

    def move(self, image: np.ndarray, boxes: np.ndarray, seed: int) -> Moved:
        """RGB pixels (H, W, 3) and (M, 4) xyxy boxes inside the image, each with an area ->
        both after the transforms, and which of the M boxes those are that are left.
        """
        raise NotImplementedError

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        """Change the picture and the boxes of ``aug_input`` in place."""
        boxes = _require_boxes(self, aug_input.boxes)
        if aug_input.sem_seg is not None:
            raise TypeError(f"{type(self).__name__} moves boxes, but there is a sem_seg as well")
        flip = -1 if self.image_format == "BGR" else 1
        inside = _clip(boxes, aug_input.image.shape[:2])
        (real,) = _has_area(inside).nonzero()
        seed = int(np.random.randint(2**31))
        rgb = np.array(aug_input.image[..., ::flip], order="C")  # theirs to write into
        image, found, left = self.move(rgb, inside[real], seed)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != rgb.shape[2]:
            raise TypeError(
                f"{type(self).__name__} must give uint8 pixels (H, W, {rgb.shape[2]}), got "
                f"{image.dtype} {image.shape}; leave normalisation and conversion to the "
                "detector, which has pixel_mean and pixel_std"
            )
        moved = np.zeros_like(boxes)
        moved[real[left]] = found
        aug_input.image, aug_input.boxes = np.ascontiguousarray(image[..., ::flip]), moved
        return _InPlace()


class _InPlace(T.Transform):
    """What a mapper gets that would move the boxes a second time."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        raise TypeError("the picture and its boxes were moved already: take those of the AugInput")

    apply_coords = apply_segmentation = apply_image


class Albumentations(_Pipeline):
    """Transforms of albumentations (2.0), those that move boxes and those that do not.

    ``L(Albumentations)(transforms=[L(A.GaussNoise)(p=0.3), L(A.Affine)(rotate=(-10, 10))])``
    """

    def __init__(
        self, *, transforms: Sequence[Any], image_format: str = "BGR", min_visibility: float = 0.0
    ) -> None:
        """
        Args:
            transforms: of albumentations, applied one after the other.
            image_format: the mapper's; the transforms get RGB in any case.
            min_visibility: share of a box's area, after the transforms, that must lie inside
                the image for the box to stay.
        """
        library = _albumentations()
        super().__init__(transforms, image_format)
        self.min_visibility = min_visibility
        boxes = library.BboxParams(
            format="pascal_voc",
            label_fields=["index"],
            min_visibility=min_visibility,
            clip=True,  # rounding in its relative coordinates can leave the image by a hair
        )
        with warnings.catch_warnings():  # that colours alone do not move the boxes
            warnings.filterwarnings("ignore", "Got processor for bboxes", UserWarning)
            self._compose = library.Compose(self.transforms, bbox_params=boxes)

    def move(self, image: np.ndarray, boxes: np.ndarray, seed: int) -> Moved:
        """See the base class."""
        # With set_random_seed each transform would draw the same numbers as its neighbours:
        # those with one probability would be applied all or none.
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        moved = self._compose(image=image, bboxes=boxes, index=np.arange(len(boxes)))
        found = np.asarray(moved["bboxes"], dtype=np.float64).reshape(-1, 4)
        return moved["image"], found, np.asarray(moved["index"], dtype=np.int64)


def _albumentations() -> Any:
    try:
        library = import_module("albumentations")
    except ImportError as error:
        raise ImportError(f"Albumentations needs a package: {_INSTALL}") from error
    if not library.__version__.startswith("2.0."):
        raise ImportError(
            f"Albumentations works with albumentations 2.0.x, got {library.__version__} "
            "(AlbumentationsX has the same import name and another interface); "
            f"uninstall that and type: {_INSTALL}"
        )
    return library


class TorchvisionV2(_Pipeline):
    """Transforms of ``torchvision.transforms.v2``, those that move boxes and those that do not.

    ``L(TorchvisionV2)(transforms=[L(v2.RandomIoUCrop)(), L(v2.SanitizeBoundingBoxes)()])``
    """

    def __init__(self, *, transforms: Sequence[Any], image_format: str = "BGR") -> None:
        """
        Args:
            transforms: of torchvision's v2, applied one after the other to a dict of an
                ``Image``, its ``BoundingBoxes`` and ``labels``.
            image_format: the mapper's; the transforms get RGB in any case.
        """
        super().__init__(transforms, image_format)
        self._compose = v2.Compose(self.transforms)

    def move(self, image: np.ndarray, boxes: np.ndarray, seed: int) -> Moved:
        """See the base class."""
        sample = {
            "image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)),
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes).float(), format="XYXY", canvas_size=image.shape[:2]
            ),
            "labels": torch.arange(len(boxes)),
        }
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            moved = self._compose(sample)
        found, left = moved["boxes"], moved["labels"]
        if not isinstance(found, tv_tensors.BoundingBoxes) or len(found) != len(left):
            raise TypeError(
                "TorchvisionV2 wants BoundingBoxes back, as many as labels, got "
                f"{type(found).__name__} {tuple(found.shape)} and {len(left)} labels"
            )
        corners = v2.functional.convert_bounding_box_format(
            found, new_format=tv_tensors.BoundingBoxFormat.XYXY
        )
        pixels = moved["image"].permute(1, 2, 0).numpy()
        return pixels, corners.double().numpy(), left.numpy()


def _require_boxes(augmentation: T.Augmentation, boxes: np.ndarray | None) -> np.ndarray:
    if boxes is None:
        raise TypeError(
            f"{type(augmentation).__name__} needs the boxes, which Detectron2's DatasetMapper "
            "does not hand over; write in the config: dataloader.train.mapper._target_ = "
            "BoxAwareMapper (from d2_decouple.data.augmentation import BoxAwareMapper)"
        )
    return boxes


def _clip(boxes: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(M, 4) xyxy boxes cut to an image of ``size`` (H, W)."""
    height, width = size
    return np.clip(boxes, 0, np.array([width, height, width, height]))


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1)


def _has_area(boxes: np.ndarray) -> np.ndarray:
    return _area(boxes) > 0
