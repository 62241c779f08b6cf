# SPDX-License-Identifier: Apache-2.0
"""Regions of a batch in one piece: their boxes, matches, pooled features, and detections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..layers.boxes import clip_to_sizes, enlarged, overlaps
from ..structures import foreground

__all__ = [
    "RegionSelection",
    "Regions",
    "Samples",
    "draw_samples",
    "log_accuracy",
    "log_scalar",
    "match_regions",
    "pool_both",
    "pool_regions",
]

Size = tuple[int, int]


@dataclass(frozen=True)
class Regions:
    """S boxes of all images of a batch, image by image.

    Attributes:
        boxes: (S, 4) xyxy pixels of the padded input.
        image_index: (S,) which image each belongs to.
        sizes: (S, 2) height and width of that image, in pixels without padding.
    """

    boxes: Tensor
    image_index: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, boxes: Sequence[Tensor], image_sizes: Sequence[Size]) -> "Regions":
        """From the (S_i, 4) boxes and the (H, W) of each image."""
        counts = [len(x) for x in boxes]
        joined = torch.cat(list(boxes))
        device = joined.device
        index = torch.arange(len(counts), device=device)
        index = index.repeat_interleave(torch.tensor(counts, device=device))
        return cls(joined, index, torch.tensor(list(image_sizes), device=device)[index])

    @classmethod
    def of_proposals(cls, proposals: Sequence[Instances], dtype: torch.dtype) -> "Regions":
        """From the ``proposal_boxes`` of each image."""
        sizes = [x.image_size for x in proposals]
        return cls.of([x.proposal_boxes.tensor.to(dtype) for x in proposals], sizes)

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, dtype: torch.dtype) -> "Regions":
        """With boxes of this dtype."""
        return replace(self, boxes=self.boxes.to(dtype))

    @property
    def rois(self) -> Tensor:
        """(S, 5) boxes with the image's index in front, as pooling takes them."""
        return torch.cat((self.image_index[:, None].to(self.boxes.dtype), self.boxes), dim=1)

    def at(self, rows: Tensor) -> "Regions":
        """Those of the given rows (indices or a mask)."""
        return Regions(self.boxes[rows], self.image_index[rows], self.sizes[rows])

    def moved(self, boxes: Tensor) -> "Regions":
        """With other boxes (S, 4), cut to their images."""
        return replace(self, boxes=clip_to_sizes(boxes, self.sizes))

    def joined(self, other: "Regions") -> "Regions":
        """These, then the others."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Regions(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True)
class Samples:
    """Regions that a box branch is trained with.

    Attributes:
        regions: S of them; in each image positives come first.
        gt_classes: (S,) class of the matched object, K for none.
        gt_boxes: (S, 4) its box; anything where there is none.
        gt_index: (S,) its index in its image; anything where there is none.
    """

    regions: Regions
    gt_classes: Tensor
    gt_boxes: Tensor
    gt_index: Tensor

    def __len__(self) -> int:
        return len(self.regions)

    def to(self, dtype: torch.dtype) -> "Samples":
        """With boxes of this dtype."""
        return replace(self, regions=self.regions.to(dtype), gt_boxes=self.gt_boxes.to(dtype))

    def at(self, rows: Tensor) -> "Samples":
        """Those of the given rows (indices or a mask)."""
        return Samples(
            self.regions.at(rows), self.gt_classes[rows], self.gt_boxes[rows], self.gt_index[rows]
        )


def match_regions(
    regions: Regions,
    targets: Sequence[Instances],
    matcher: Callable[[Tensor], tuple[Tensor, Tensor]],
    num_classes: int,
) -> Samples:
    """Each region with the object that it overlaps most; order and number stay.

    Args:
        regions: of a batch.
        targets: ground truth of each image, with ``gt_boxes`` and ``gt_classes``.
        matcher: (M, S) overlaps -> index and label of each region; label 1 is a match.
        num_classes: K, the class of a region without a match.
    """
    dtype = regions.boxes.dtype
    classes = regions.image_index.new_full((len(regions),), num_classes)
    index, boxes = torch.zeros_like(classes), torch.zeros_like(regions.boxes)
    for image, target in enumerate(targets):
        if not len(target):
            continue
        rows = (regions.image_index == image).nonzero()[:, 0]
        gt_boxes = target.gt_boxes.tensor.to(dtype)
        found, label = matcher(overlaps(gt_boxes, regions.boxes[rows]))
        index[rows], boxes[rows] = found, gt_boxes[found]
        classes[rows] = torch.where(label == 1, target.gt_classes[found], num_classes)
    return Samples(regions, classes, boxes, index)


def pool_regions(
    pooler: ROIPooler, maps: Sequence[Tensor], regions: Regions, scale: float = 1.0
) -> Tensor:
    """(S, C, P, P) features of regions, by the aligned pooling of Detectron2's ``ROIPooler``.

    Its own call would round boxes to float32, and choose the level by the enlarged box.

    Args:
        pooler: P, the levels, and how a level is pooled.
        maps: (N, C, H, W) of each level that the pooler has, finest first.
        regions: of the batch.
        scale: regions are pooled so many times as wide and high; levels are those of the boxes.
    """
    seen = regions if scale == 1 else replace(regions, boxes=enlarged(regions.boxes, scale))
    rois = seen.rois
    pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], *pooler.output_size)
    levels = _levels(pooler, regions.boxes)
    for level, (feature, pool) in enumerate(zip(maps, pooler.level_poolers, strict=True)):
        rows = (levels == level).nonzero()[:, 0]
        pooled.index_put_((rows,), pool(feature, rois[rows]))
    return pooled


def pool_both(
    pooler: ROIPooler, maps: Sequence[Tensor], first: Regions, second: Regions
) -> tuple[Tensor, Tensor]:
    """:func:`pool_regions` of two sets, in one call and each region once.

    A pooling's backward fills and adds a gradient as large as the maps, so one is better than two.
    """
    # Equal regions get equal numbers.
    number = first.joined(second).rois.unique(dim=0, return_inverse=True)[1]
    place = torch.full_like(number, -1)
    place[number[: len(first)]] = torch.arange(len(first), device=number.device)
    place = place[number[len(first) :]]  # of each region of the second set in the first, or -1
    known, new = ((place >= 0).nonzero()[:, 0], (place < 0).nonzero()[:, 0])
    pooled = pool_regions(pooler, maps, first.joined(second.at(new)))
    mine, others = pooled.split([len(first), len(new)])
    found = torch.cat((mine.index_select(0, place[known]), others))
    return mine, found.index_select(0, torch.cat((known, new)).argsort())


def _levels(pooler: ROIPooler, boxes: Tensor) -> Tensor:
    """(S,) place of each box's level among the pooler's (FPN, Eq. 1)."""
    side = (boxes[:, 2:] - boxes[:, :2]).prod(-1).clamp(min=0).sqrt()
    # Added before rounding, as Detectron2 does, so that a side of next to 112 is on its level.
    level = pooler.canonical_level + (side / pooler.canonical_box_size + 1e-8).log2()
    return level.floor().clamp(pooler.min_level, pooler.max_level).long() - pooler.min_level


def draw_samples(samples: Samples, num_images: int, limit: int, num_classes: int) -> Samples:
    """At most ``limit`` of each image: positives, as many as there are, then others by chance."""
    rows, positive = [], foreground(samples.gt_classes, num_classes)
    for image in range(num_images):
        mine = samples.regions.image_index == image
        chosen = _some_of((mine & positive).nonzero()[:, 0], limit)
        rows += [chosen, _some_of((mine & ~positive).nonzero()[:, 0], limit - len(chosen))]
    return samples.at(torch.cat(rows))


def _some_of(rows: Tensor, limit: int) -> Tensor:
    """All rows, or ``limit`` of them by chance where there are more."""
    if len(rows) <= limit:
        return rows
    return rows[torch.randperm(len(rows), device=rows.device)[:limit]]


def log_accuracy(logits: Tensor, labels: Tensor, num_classes: int, ending: str = "") -> None:
    """Record the shares of regions, and of positives, whose likeliest class is right.

    They are ``roi_head/cls_accuracy`` and ``fg_cls_accuracy``, with an ``ending`` for the name.
    """
    if not len(labels):
        return
    right, positive = logits.argmax(-1) == labels, foreground(labels, num_classes)
    log_scalar(f"roi_head/cls_accuracy{ending}", right.float().mean())
    of_positives = (right & positive).sum() / positive.sum().clamp(min=1)
    log_scalar(f"roi_head/fg_cls_accuracy{ending}", of_positives)


def log_scalar(name: str, value: Tensor | float) -> None:
    """Record a number of this iteration with Detectron2's event storage."""
    get_event_storage().put_scalar(name, float(value))


class RegionSelection:
    """Scores and boxes of regions -> detections of each image, as Detectron2 ``Instances``."""

    def __init__(
        self,
        *,
        test_score_thresh: float,
        nms: Callable[[Instances], Instances],
        max_detections_per_image: int = 100,
        prune: bool = True,
    ) -> None:
        """
        Args:
            test_score_thresh: pairs of region and class with this score or less are dropped.
            nms: suppresses among one image's candidates, such as :class:`.selection.HardNMS`.
            max_detections_per_image: the best that are kept after suppression.
            prune: whether boxes are refined only where some class has a score above the
                threshold. No other region can give a detection, so only time is saved.
        """
        if not callable(nms):
            raise TypeError(f"selection.nms must be callable, such as HardNMS(...), got {nms!r}")
        self.test_score_thresh, self.nms = test_score_thresh, nms
        self.max_detections_per_image, self.prune = max_detections_per_image, prune

    def worth_refining(self, scores: Tensor) -> Tensor:
        """Indices of the regions whose scores (S, K) can give a detection."""
        if not self.prune:
            return torch.arange(len(scores), device=scores.device)
        return (scores > self.test_score_thresh).any(-1).nonzero()[:, 0]

    def propose(
        self,
        regions: Regions,
        boxes: Tensor,
        scores: Tensor,
        image_sizes: Sequence[Size],
        **fields: Tensor,
    ) -> list[Instances]:
        """Candidates of each image, before suppression.

        Args:
            regions: S of them.
            boxes: (S, 4), or (S, K, 4) where each class has its own; xyxy pixels.
            scores: (S, K).
            image_sizes: (H, W) of each image.
            fields: what else is known of each region, (S, ...), for the results.
        """
        row, label = (scores > self.test_score_thresh).nonzero(as_tuple=True)
        chosen = boxes[row] if boxes.dim() == 2 else boxes[row, label]
        image = regions.image_index[row]
        found = []
        for index, size in enumerate(image_sizes):
            mine = image == index
            found.append(
                Instances(
                    size,
                    pred_boxes=Boxes(chosen[mine]),
                    scores=scores[row[mine], label[mine]],
                    pred_classes=label[mine],
                    **{name: value[row[mine]] for name, value in fields.items()},
                )
            )
        return found

    def suppress(self, candidates: Instances) -> Instances:
        """Candidates of one image -> its detections, best first."""
        return self.nms(candidates)[: self.max_detections_per_image]
