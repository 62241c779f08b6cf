# SPDX-License-Identifier: Apache-2.0
"""Inference in three lines: a config, its weights, and images in any form."""

import logging
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import Tensor, nn

from ..checkpoint import Checkpointer, CheckpointError
from ..config import ConfigError
from ..data.images import ChannelOrder, as_rgb, read_rgb
from ..modeling import OneStageDetector, TestTimeAugmentation
from ..modeling.folding import cast_weights, fold_batch_norms
from .inference_config import inference_config
from .inspection import ImageLike, Inspection
from .looks import ordinary
from .resizing import resized, stretched

__all__ = ["Predictor", "torch_device"]

_logger = logging.getLogger(__name__)
_PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Behind these, coordinates are computed: the head's predictor and aligner stay float32.
_HALVED = ("backbone", "head.context", "head.cls_subnet", "head.bbox_subnet", "head.cls_score")


class Predictor(Inspection):
    """A detector that takes images as they come and answers in their own pixels.

    ::

        predictor = Predictor.from_config("fcos_R_50_FPN_1x", "model_final.pth")
        detections = predictor("photo.jpg")  # Detectron2's Instances
        names = [predictor.classes[index] for index in detections.pred_classes]

    Batch norms are folded into convolutions, maps are channels-last, and in half precision the
    weights are stored in it: the model is the predictor's own and cannot be trained any more.
    From predicted offsets to boxes everything is float32 in each precision. Beside detections it
    says how they were found: :class:`~d2_decouple.engine.inspection.Inspection`.

    Attributes:
        classes: names of the classes, by index.
        model: what is run; with test-time augmentation the detector is inside it.
        device: where it runs.
        precision: "float32", "bfloat16" or "float16".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        augmentations: Sequence[T.Augmentation],
        classes: Sequence[str] = (),
        image_format: str = "BGR",
        channels: ChannelOrder = "BGR",
        device: str | torch.device | None = None,
        precision: str = "float32",
        score_thresh: float | None = None,
        batch_size: int = 4,
        tta: bool | Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model: a Detectron2 detector; it is taken over and changed.
            augmentations: how images are resized for it.
            classes: names of its classes.
            image_format: order of the channels that it wants.
            channels: order of the channels of arrays given to the predictor, "BGR" or "RGB".
            device: by default a GPU if torch sees one, else the CPU.
            precision: "float32", "bfloat16", or "float16" (GPUs only).
            score_thresh: detections with this score or less are dropped.
            batch_size: images of a list that are computed together, as far as their sizes agree.
            tta: test-time augmentation: True, or arguments of
                :class:`~d2_decouple.modeling.TestTimeAugmentation`. Results then have
                ``variant_index`` in place of ``location_index``.
        """
        if channels not in ("BGR", "RGB"):
            raise ConfigError(f"channels must be 'BGR' or 'RGB', got {channels!r}")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number from 1, got {batch_size}")
        self.device = torch_device(device)
        self.precision, self._dtype = precision, _checked(precision, self.device)
        self.classes = tuple(classes)
        self._channels, self._image_format = channels, image_format
        self._score_thresh, self._batch_size = score_thresh, batch_size
        self._augmentations = T.AugmentationList(list(augmentations))
        model = _ready(model, self.device, self._dtype)
        self._resize = not tta  # test-time augmentation resizes by itself
        self.model = model if not tta else _augmented(model, tta, augmentations)

    @classmethod
    def from_config(
        cls,
        name_or_path: str | Path,
        weights: str | Path,
        overrides: Sequence[str] = (),
        *,
        classes: Sequence[str] = (),
        score_thresh: float | None = None,
        **options: Any,
    ) -> "Predictor":
        """Build the model of a config and load its weights.

        Args:
            name_or_path: a recipe's name, a LazyConfig (.py), a yacs config (.yaml), or the
                ``config.yaml`` that a training left in its output folder. Of the last, which can
                name any function, only parts of models and image transforms are called.
            weights: a checkpoint; averaged weights in it (EMA) are preferred. The number of
                classes follows the class names that are stored in it.
            overrides: ``key=value`` strings; for a yacs config ``KEY VALUE`` pairs.
            classes: names of the classes, if the checkpoint does not store them; by default those
                of the config's test set, if that is registered.
            score_thresh: detections with this score or less are dropped.
            options: ``device``, ``precision``, ``channels``, ``batch_size`` and ``tta``, as in the
                constructor.

        Raises:
            ConfigError: no such config, key, precision or device.
            CheckpointError: no such file, or some tensor of the model would stay random.
        """
        file = str(weights)
        if not file or ("://" not in file and not Path(file.partition("?")[0]).is_file()):
            raise CheckpointError(
                f"there are no weights {file!r}: give the checkpoint of a training, such as "
                "output/model_final.pth"
            )
        config = inference_config(name_or_path, overrides, score_thresh=score_thresh)
        reader = _BuildingCheckpointer(config.model, len(classes) or None)
        reader.load(file, checkpointables=[])
        names = tuple(reader.classes or classes or config.class_names())
        if reader.classes and classes and tuple(classes) != names:
            raise ConfigError(
                f"the checkpoint was trained on the classes {', '.join(names)}, given are "
                f"{', '.join(classes)}; leave classes out"
            )
        return cls(
            reader.model,
            augmentations=config.augmentations,
            image_format=config.image_format,
            classes=names,
            score_thresh=score_thresh,
            **options,
        )

    @overload
    def __call__(self, images: ImageLike) -> Instances: ...

    @overload
    def __call__(self, images: Iterable[ImageLike]) -> list[Instances]: ...

    def __call__(self, images: ImageLike | Iterable[ImageLike]) -> Instances | list[Instances]:
        """Detect objects.

        Images of a list are computed together only where they have one size after resizing:
        padding smaller ones would change what convolutions see at their borders and what group
        norm averages. So results do not depend on what else is in the list.

        Args:
            images: an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), see
                :func:`~d2_decouple.data.images.as_rgb`, the path of an image file, or a list of
                these. Arrays have the channel order that the predictor was told.

        Returns:
            For each image Detectron2 ``Instances`` on the CPU with ``pred_boxes`` (xyxy pixels of
            the image as it is displayed), ``scores``, ``pred_classes`` and ``location_index``,
            best first; one for an image, a list for a list.

        Raises:
            ImageError: an image cannot be used; the message names it.
        """
        if isinstance(images, np.ndarray | str | os.PathLike):
            return self._detect([self._input(images)])[0]
        if not isinstance(images, Iterable) or isinstance(images, Tensor):
            raise TypeError(
                "wanted a numpy array, a path, or a list of these; got "
                f"{type(images).__name__} (of a PIL image: numpy.asarray(image), with "
                "channels='RGB')"
            )
        remaining, results = iter(images), []
        while batch := [self._input(image) for image in islice(remaining, self._batch_size)]:
            results += self._detect(batch)
        return results

    def _rgb(self, image: ImageLike) -> np.ndarray:
        """(H, W, 3) RGB, uint8."""
        if isinstance(image, str | os.PathLike):
            return read_rgb(Path(image))
        return as_rgb(image, channels=self._channels)

    def _input(self, image: ImageLike) -> dict[str, Any]:
        """Detectron2's input dict of an image."""
        rgb = self._rgb(image)
        height, width = rgb.shape[:2]
        seen = stretched(rgb)
        if self._resize:
            seen = resized(seen, self._augmentations)
        planes = seen.transpose(2, 0, 1)
        if self._image_format == "BGR":
            planes = planes[::-1]
        tensor = torch.from_numpy(np.array(planes, order="C"))  # a copy: arrays may be read-only
        return {"image": tensor, "height": height, "width": width}

    def _detect(self, inputs: Sequence[dict[str, Any]]) -> list[Instances]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(inputs):
            groups.setdefault(tuple(item["image"].shape), []).append(index)
        found: dict[int, Instances] = {}
        for indices in groups.values():
            with torch.inference_mode(), self._autocast():
                outputs = self.model([inputs[index] for index in indices])
            found.update(
                (i, output["instances"]) for i, output in zip(indices, outputs, strict=True)
            )
        return [self._finished(found[index]) for index in range(len(inputs))]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def _finished(self, found: Instances) -> Instances:
        if self._score_thresh is not None:
            found = found[found.scores > self._score_thresh]
        found = found.to("cpu")
        plain = {name: ordinary(value) for name, value in found.get_fields().items()}
        return Instances(found.image_size, **plain)


class _BuildingCheckpointer(Checkpointer):
    """Builds the model when the file is read, since the file says how many classes there are."""

    def __init__(self, build: Callable[[int | None], nn.Module], num_classes: int | None) -> None:
        super().__init__(nn.Identity(), complete=True)
        self._build, self._num_classes = build, num_classes
        self.classes: list[str] = []

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = super()._load_file(filename)
        self.classes = [str(name) for name in loaded.get("classes") or []]
        self.model = self._build(len(self.classes) or self._num_classes).eval()
        return loaded


def torch_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: torch does not know it, or this machine does not have it.
    """
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known to torch; give cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(
            f"device is {device}, but torch sees {gpus or 'no'} GPU{'s' * (gpus > 1)}; "
            + (f"give cuda:0 to cuda:{gpus - 1}" if gpus else "give device='cpu'")
        )
    return device


def _checked(precision: str, device: torch.device) -> torch.dtype:
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
    if device.type == "cpu" and precision == "float16":
        raise ConfigError(
            "precision float16 is for GPUs: CPUs have no fast float16 convolutions, and torch's "
            "take about ten times as long as float32; give bfloat16 or float32"
        )
    if device.type == "cpu" and precision == "bfloat16" and not _cpu_has_bfloat16():
        _logger.warning(
            "This CPU has no bfloat16 instructions: bfloat16 will be slower than float32 here"
        )
    return _PRECISIONS[precision]


def _cpu_has_bfloat16() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN also accepts bfloat16 on CPUs that must convert it to float32 and back.
        flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        checks = [getattr(torch.cpu, flag) for flag in flags if hasattr(torch.cpu, flag)]
        if checks:
            return any(check() for check in checks)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _ready(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    model = model.eval().requires_grad_(False)
    fold_batch_norms(model)
    if dtype != torch.float32:
        ours = isinstance(model, OneStageDetector)
        cast_weights(model, dtype, parts=_HALVED if ours else ("backbone",))
    return model.to(device).to(memory_format=torch.channels_last)


def _augmented(
    model: Any, tta: bool | Mapping[str, Any], augmentations: Sequence[T.Augmentation]
) -> nn.Module:
    options = tta if isinstance(tta, Mapping) else {}
    try:
        return TestTimeAugmentation.around(model, augmentations, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tta={tta!r}: {error}") from error
