# SPDX-License-Identifier: Apache-2.0
"""The one-stage detector: features -> head -> (assigner, losses) or selection."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..structures import DensePredictions, DenseTargets, foreground
from .head import DenseHead
from .terms import assigned_losses

__all__ = ["OneStageDetector"]

Term = Callable[[DensePredictions, DenseTargets], Tensor]


@META_ARCH_REGISTRY.register()
class OneStageDetector(DenseDetector):
    """Detectron2's dense detector with everything that papers change in slots.

    Preprocessing, ``forward`` and the scaling of results to the original image are inherited.

    Attributes:
        side_offset: what a side of the selection's boxes has beside x2 - x1, in pixels: 0, or 1
            where x2 and y2 are the last pixels inside (:mod:`.legacy`).
    """

    side_offset = 0.0

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: DenseHead,
        assigner: nn.Module,
        losses: Mapping[str, Term],
        selection: Callable[[DensePredictions, Sequence[tuple[int, int]]], list[Instances]],
        num_classes: int,
        head_in_features: Sequence[str],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
    ) -> None:
        """
        Args:
            backbone: Detectron2 backbone; its pyramid must have the head's strides and channels.
            head: features -> :class:`DensePredictions` (:class:`DenseHead`).
            assigner: ``(features, predictions, gt_instances) -> DenseTargets``.
            losses: logged name -> term; every value is added to the loss.
            selection: predictions -> detections.
            num_classes: K.
            head_in_features: names of the backbone's maps that the head gets, finest first.
            pixel_mean: subtracted from the input, per channel of ``input_format``.
            pixel_std: the input is divided by it.
            input_format: order of the input's channels, for pictures of it.
        """
        super().__init__(
            backbone,
            head,
            list(head_in_features),
            pixel_mean=list(pixel_mean),
            pixel_std=list(pixel_std),
        )
        for name, term in losses.items():
            if not callable(term):
                raise TypeError(f"losses.{name} must be callable, got {term!r}")
        head.check_pyramid(backbone.output_shape(), self.head_in_features)
        self.assigner = assigner
        self.losses, self.selection = dict(losses), selection
        self.num_classes, self.input_format = num_classes, input_format
        # Convolutions and GroupNorm on a CPU are a quarter faster on channels-last maps; one
        # channels-last weight makes every map behind it so.
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """The parts that ``cfg.MODEL.DECOUPLE`` names (the yacs door, :mod:`..config`)."""
        from ..config import instantiate_parts

        return instantiate_parts(cfg)

    def predict(
        self, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> tuple[ImageList, list[Tensor], DensePredictions]:
        """Padded images, the head's input maps and predictions of Detectron2's input dicts.

        Everything that explains a detection is drawn from these, without a second forward:
        ``forward_inference(*predict(inputs))`` are the detections, and their ``location_index``
        points into the predictions.
        """
        images = self.preprocess_image(batched_inputs)
        maps = self.backbone(images.tensor)
        features = [maps[name] for name in self.head_in_features]
        return images, features, self.head(features)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: DensePredictions,
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Assign, then evaluate the named terms."""
        targets, losses = assigned_losses(
            self.assigner, self.losses, features, predictions, gt_instances
        )
        self._log_positives(targets)  # last, since it waits for the device
        return losses

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: DensePredictions
    ) -> list[Instances]:
        """Detections of each image, in pixels of the resized image."""
        return self.selection(predictions, images.image_sizes)

    def _log_positives(self, targets: DenseTargets) -> None:
        try:
            storage = get_event_storage()
        except AssertionError:  # nobody records: a forward outside Detectron2's trainer
            return
        positive = foreground(targets.labels, self.num_classes).sum()
        storage.put_scalar("num_positives_per_image", positive.item() / len(targets.labels))
