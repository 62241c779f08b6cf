# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation: one image seen at several sizes and mirrored, suppressed once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..data.images import read_pixels
from .detector import OneStageDetector
from .regions import RegionSelection
from .selection import Selection, clip_to_image

__all__ = ["TestTimeAugmentation"]

Size = tuple[int, int]

_PER_BOX = ("mask_on", "keypoint_on")  # what Detectron2's ROI heads predict beside boxes
_SCALES = (0.75, 1.0, 1.25)  # of the size that a detector is tested with


class TestTimeAugmentation(nn.Module):
    """A detector that looks at each image several times and answers once.

    It is called like the detector in evaluation mode. The candidates of all variants of an image
    (each size as it is, then mirrored) are brought back to the original image and go through the
    detector's own suppression together. Variants are computed one by one, so that memory is that
    of the largest; nothing is averaged, and the detector's thresholds and limits stay as they are.

    The results have ``variant_index`` (0 is the first size, 1 the same mirrored, and so on) in
    place of the detector's ``location_index``, which would have to say of which forward.

    Of two-stage detectors, those with :class:`.decoupled_rcnn.DecoupledROIHeads` can be used; each
    variant has proposals of its own. Masks and keypoints are not predicted.
    """

    __test__ = False  # the name begins like those that pytest collects

    def __init__(
        self,
        model: OneStageDetector | GeneralizedRCNN,
        *,
        short_edge_lengths: Sequence[int],
        max_size: int,
        flip: bool = True,
        output_shape: Callable[..., Size] = T.ResizeShortestEdge.get_output_shape,
    ) -> None:
        """
        Args:
            model: the detector; the ``selection`` of it, or of its ROI heads, must be a
                :class:`Selection` or :class:`RegionSelection`.
            short_edge_lengths: the short side that images get, in pixels, one for each variant.
            max_size: limit of the long side, in pixels.
            flip: whether each size is also seen mirrored left to right.
            output_shape: (H, W) of a resized image from height, width, short side and max_size.
        """
        super().__init__()
        selection = getattr(getattr(model, "roi_heads", model), "selection", None)
        known = isinstance(model, OneStageDetector | GeneralizedRCNN)
        if not known or not isinstance(selection, Selection | RegionSelection):
            got = type(model).__name__
            if known:
                got += f" whose selection is a {type(selection).__name__}"
            raise TypeError(
                "test-time augmentation merges candidates before suppression: it needs a "
                "OneStageDetector with a Selection, or a GeneralizedRCNN with DecoupledROIHeads, "
                f"got {got}"
            )
        if any(getattr(getattr(model, "roi_heads", None), name, False) for name in _PER_BOX):
            raise ValueError(
                "test-time augmentation gives boxes alone, and this model predicts masks or "
                "keypoints, too: leave train.tta (or tta) out"
            )
        sizes = [*short_edge_lengths, max_size]
        if len(sizes) < 2 or any(size < 1 for size in sizes):
            raise ValueError(
                "wanted at least one short_edge_lengths and a max_size, all positive, got "
                f"short_edge_lengths={list(short_edge_lengths)}, max_size={max_size}"
            )
        self.model, self.selection = model, selection
        self.side_offset = getattr(model, "side_offset", 0.0)
        self.input_format: Any = model.input_format or "BGR"
        self.short_edge_lengths, self.max_size = tuple(short_edge_lengths), max_size
        self.flip, self.output_shape = flip, output_shape

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: Detectron2's input dicts. ``image`` is (C, H, W) in the detector's
                ``input_format``, of any size, at best the original: the sizes are made of it.
                Where it is absent, ``file_name`` is read. Boxes are scaled to ``height`` and
                ``width``, by default the image's own.

        Returns:
            ``{"instances": ...}`` for each image: ``pred_boxes`` (xyxy pixels of the original),
            ``scores``, ``pred_classes``, ``variant_index``, best first.
        """
        if self.training:
            raise RuntimeError("test-time augmentation does not train: call .eval() first")
        return [{"instances": self._detect(item)} for item in batched_inputs]

    def _detect(self, item: Mapping[str, Any]) -> Instances:
        image = self._image_of(item)
        size = (int(item.get("height", image.shape[0])), int(item.get("width", image.shape[1])))
        found = [
            self._propose(variant, mirrored, size, index)
            for index, (variant, mirrored) in enumerate(self._variants(image))
        ]
        merged = self.selection.suppress(Instances.cat(found))
        boxes, offset = merged.pred_boxes.tensor, self.side_offset
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
        merged.pred_boxes = Boxes(clip_to_image(boxes, size))
        return merged[merged.pred_boxes.nonempty()]

    def _image_of(self, item: Mapping[str, Any]) -> np.ndarray:
        """(H, W, C) pixels of an input dict."""
        if "image" in item:
            return np.ascontiguousarray(item["image"].permute(1, 2, 0).cpu().numpy())
        if "file_name" in item:
            return read_pixels(item["file_name"], self.input_format)
        raise ValueError(f"an input needs 'image' or 'file_name', got only {sorted(item)}")

    @classmethod
    def around(
        cls,
        model: OneStageDetector | GeneralizedRCNN,
        augmentations: Sequence[T.Augmentation],
        **options: Any,
    ) -> "TestTimeAugmentation":
        """Sizes around the one that a detector is tested with, unless ``options`` say which.

        Args:
            model: as in the constructor.
            augmentations: those of its test images; a ``T.ResizeShortestEdge`` gives the size.
            options: arguments of the constructor; None stands for the default.
        """
        given = {name: value for name, value in options.items() if value is not None}
        resize = next((x for x in augmentations if isinstance(x, T.ResizeShortestEdge)), None)
        if resize is not None:
            length, limit = resize.short_edge_length[0], resize.max_size
            given.setdefault("short_edge_lengths", [round(x * length) for x in _SCALES])
            given.setdefault("max_size", round(max(_SCALES) * limit))
            given.setdefault("output_shape", resize.get_output_shape)
        return cls(model, **given).eval()

    def _variants(self, image: np.ndarray) -> Iterator[tuple[Tensor, bool]]:
        """The (C, H', W') images to look at, and whether each is mirrored."""
        height, width = image.shape[:2]
        for length in self.short_edge_lengths:
            # Not the augmentation's get_transform: it would draw from numpy's random numbers.
            new = self.output_shape(height, width, length, self.max_size)
            resized = T.ResizeTransform(height, width, *new).apply_image(image)
            pixels = torch.from_numpy(np.array(resized.transpose(2, 0, 1), order="C"))
            yield pixels, False
            if self.flip:
                yield pixels.flip(-1), True

    def _candidates(self, inputs: Sequence[Mapping[str, Any]]) -> list[Instances]:
        """Candidates of each image, in pixels of the image as it is given."""
        model: Any = self.model
        if isinstance(model, OneStageDetector):
            images, _, predictions = model.predict(inputs)
            return model.selection.propose(predictions, images.image_sizes)
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        return model.roi_heads.propose(features, proposals)

    def _propose(self, variant: Tensor, mirrored: bool, size: Size, index: int) -> Instances:
        """Candidates of one variant as boxes in the original image of ``size`` (H, W)."""
        (found,) = self._candidates([{"image": variant}])
        (height, width), boxes = found.image_size, found.pred_boxes.tensor
        if mirrored:
            left, top, right, bottom = boxes.unbind(-1)
            last = width - self.side_offset
            boxes = torch.stack((last - right, top, last - left, bottom), dim=-1)
        scale = boxes.new_tensor([size[1] / width, size[0] / height])
        return Instances(
            size,
            pred_boxes=Boxes(boxes * scale.repeat(2)),
            scores=found.scores,
            pred_classes=found.pred_classes,
            variant_index=torch.full_like(found.pred_classes, index),
        )
