# SPDX-License-Identifier: Apache-2.0
"""Cases of Decoupled R-CNN: two suppressions of one set of candidates; branches, stages, losses.

A case lists regions image by image: those of the class branch with positives first and ground
truth in front, then those of the box branch. Ours are in the order of sampling.
"""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from d2_decouple.checkpoint.convert_decoupled_rcnn import roi_heads_name
from d2_decouple.layers.boxes import BoxTransform, clip_to_sizes
from d2_decouple.modeling import (
    BoxBranch,
    ClassBranch,
    DecoupledROIHeads,
    DecoupledRPN,
    FCHead,
    HardNMS,
    RegionSelection,
)
from d2_decouple.modeling.decoupled_rpn import suppress_levels
from d2_decouple.modeling.regions import Regions, Samples

from .case import Case

__all__ = ["decoupled_proposals", "decoupled_rcnn_head"]

NO_PART = -100  # label of a region that a loss does not look at


def decoupled_proposals(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Which of the given candidates survive; and the proposals, from the head's raw outputs."""
    config = case.config
    boxes, scores = (case.tensor(f"candidates/{name}", dtype) for name in ("boxes", "scores"))
    counts = case.tensor("candidates/levels").long().bincount().tolist()
    kept = [suppress_levels(scores, boxes.split(counts), limit) for limit in config["nms_thr"]]
    results = {"keep_a/full": kept[0], "keep_b/full": kept[1]}
    only_a = len(set(kept[0].tolist()) - set(kept[1].tolist()))
    results["counts"] = torch.tensor([len(kept[0]), len(kept[1]), only_a])

    strides = config["strides"]
    anchors = [_anchors(config, case, level, dtype) for level in range(len(strides))]
    logits, deltas = (
        [case.tensor(f"{name}/{level}", dtype) for level in range(len(strides))]
        for name in ("logits", "deltas")
    )
    size = tuple(case.tensor("image_hw").tolist())
    found = _rpn(config).candidates(
        anchors,
        [x.permute(1, 2, 0).flatten()[None] for x in logits],
        [x.unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)[None] for x in deltas],
        [size],
    )
    ((found_logits, levels),) = found
    for name, limit in zip(("a", "b"), config["nms_thr"], strict=True):
        best = suppress_levels(found_logits, levels, limit)[: config["nms_post"]]
        columns = (torch.cat(levels)[best], found_logits[best].sigmoid()[:, None])
        results[f"proposals_{name}"] = torch.cat(columns, dim=1)
    return results


def _anchors(config: Mapping[str, Any], case: Case, level: int, dtype: torch.dtype) -> Tensor:
    """(A, 4) anchors of a level, the ratios fastest; Detectron2's are rounded to float32."""
    stride = config["strides"][level]
    height, width = case.tensor("level_sizes").tolist()[level]
    ratios = torch.tensor(config["ratios"], dtype=dtype)
    sides = config["anchor_scale"] * stride * torch.stack((1 / ratios, ratios), dim=-1).sqrt()
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    middle = (torch.stack((x, y), dim=-1) * stride).to(dtype)[:, :, None]
    return torch.cat((middle - sides / 2, middle + sides / 2), dim=-1).flatten(0, 2)


def _rpn(config: Mapping[str, Any]) -> DecoupledRPN:
    return DecoupledRPN(
        in_features=[],
        head=torch.nn.Identity(),
        anchor_generator=torch.nn.Identity(),
        anchor_matcher=Matcher([0.5], [0, 1]),
        box2box_transform=BoxTransform(),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(config["nms_pre"],) * 2,
        post_nms_topk=(config["nms_post"],) * 2,
        nms_thresh=config["nms_thr"][0],
        nms_thresh_reg=config["nms_thr"][1],
        min_box_size=config["min_bbox_size"],
    )


def decoupled_rcnn_head(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """A training pass with its gradients, a test pass, and the parts by themselves."""
    heads = _heads(case.config).to(dtype)
    weights = {roi_heads_name(name): value for name, value in case.weights(dtype).items()}
    heads.load_state_dict(weights)
    features = {name: case.tensor(f"feature/{name}", dtype) for name in ("p2", "p3", "p4", "p5")}
    with EventStorage():
        results = _training(case, heads, features)
    results["total"].backward()
    parameters = dict(heads.named_parameters())
    for name in case.outputs:
        if name.startswith("grad/"):
            gradient = parameters[roi_heads_name(name.removeprefix("grad/"))].grad
            assert gradient is not None
            results[name] = gradient
    with torch.no_grad():
        return {**results, **_parts(case, heads, dtype), **_test(case, heads, features)}


def _heads(config: Mapping[str, Any]) -> DecoupledROIHeads:
    def head() -> FCHead:
        return FCHead(
            in_channels=config["channels"],
            resolution=config["roi_size"],
            fc_dims=[config["fc_out_channels"]] * 2,
        )

    classes = config["classes"]
    branches = [
        BoxBranch(
            head=head(),
            transform=BoxTransform(weights=[1 / x for x in stds]),
            num_classes=None if stage else classes,
        )
        for stage, stds in enumerate(config["stage_stds"])
    ]
    return DecoupledROIHeads(
        num_classes=classes,
        batch_size_per_image=config["cls_sample"],
        positive_fraction=config["cls_pos_fraction"],
        proposal_matcher=Matcher([config["pos_iou"]], [0, 1]),
        box_matcher=Matcher([config["pos_iou"]], [0, 1]),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=ROIPooler(
            output_size=config["roi_size"],
            scales=[1 / stride for stride in config["featmap_strides"]],
            sampling_ratio=config["sampling_ratio"],
            pooler_type="ROIAlignV2" if config["aligned"] else "ROIAlign",
        ),
        class_branch=ClassBranch(head=head(), num_classes=classes),
        box_branches=branches,
        box_batch_size_per_image=config["reg_sample"],
        box_loss_weight=0.5,
        stage_loss_weights=config["stage_loss_weights"],
        selection=RegionSelection(
            test_score_thresh=config["score_thr"],
            nms=HardNMS(test_nms_thresh=config["nms_iou"]),
            max_detections_per_image=config["max_per_img"],
        ),
    )


def _images(case: Case) -> list[tuple[int, int]]:
    return [(height, width) for height, width in case.tensor("images_hw").tolist()]


def _targets(case: Case) -> list[Instances]:
    return [
        Instances(
            size,
            gt_boxes=Boxes(case.tensor(f"gt_boxes/{image}").reshape(-1, 4)),
            gt_classes=case.tensor(f"gt_labels/{image}").long(),
        )
        for image, size in enumerate(_images(case))
    ]


def _proposals(case: Case, kind: str) -> list[Instances]:
    found = []
    for image, size in enumerate(_images(case)):
        boxes = Boxes(case.tensor(f"proposals_{kind}/{image}"))
        logits = torch.zeros(len(boxes))
        found.append(Instances(size, proposal_boxes=boxes, objectness_logits=logits))
    return found


def _training(
    case: Case, heads: DecoupledROIHeads, features: dict[str, Tensor]
) -> dict[str, Tensor]:
    targets, proposals = _targets(case), _proposals(case, "cls")
    heads.train()
    drawn = heads.label_and_sample_proposals(proposals, targets)
    drawn = [
        _in_their_order(*item, heads.num_classes)
        for item in zip(drawn, proposals, targets, strict=True)
    ]
    dtype = features["p2"].dtype
    box_sample = heads.sample_boxes(_proposals(case, "reg"), targets).to(dtype)
    losses = heads.losses(features, drawn, box_sample, targets)
    results = {
        "total": torch.stack(list(losses.values())).sum(),
        "stage0/loss_cls": losses["loss_cls"],
    }
    for stage, weight in enumerate(case.config["stage_loss_weights"]):
        loss = losses[f"loss_box_reg_stage{stage}"]
        results[f"stage{stage}/loss_bbox"] = loss
        results[f"stage{stage}/loss_bbox_raw"] = loss / weight
    with torch.no_grad():
        return {**results, **_stages(heads, features, drawn, box_sample, targets)}


def _stages(
    heads: DecoupledROIHeads,
    features: dict[str, Tensor],
    drawn: list[Instances],
    box_sample: Samples,
    targets: list[Instances],
) -> dict[str, Tensor]:
    """What each stage sees, predicts, shall learn and hands on."""
    results: dict[str, Tensor] = {}
    maps, dtype = heads.maps(features), features["p2"].dtype
    class_regions = Regions.of_proposals(drawn, dtype)
    class_labels = torch.cat([x.gt_classes for x in drawn])
    for image, (item, target) in enumerate(zip(drawn, targets, strict=True)):
        positive = item.gt_classes < heads.num_classes
        results[f"stage0/pos_gt/cls/{image}"] = _rows_of(
            item.gt_boxes.tensor[positive], target.gt_boxes.tensor
        )
    for stage in range(len(heads.box_branches)):
        sample, name = box_sample, f"stage{stage}"
        learned = sample.gt_classes < heads.num_classes
        regions, labels = sample.regions, sample.gt_classes
        no_part = torch.full_like(class_labels, NO_PART)
        order = torch.arange(len(regions))
        if stage == 0:  # of each image the class branch's rows, then the box branch's
            regions = class_regions.joined(regions)
            labels = torch.cat((no_part, labels))
            order = regions.image_index.argsort(stable=True)
            of_classes = torch.cat((class_labels, torch.full_like(sample.gt_classes, NO_PART)))
            results["stage0/labels_cls"] = of_classes[order]
            results["stage0/label_weights"] = (of_classes[order] != NO_PART).to(dtype)
            results["stage0/n_cls"] = torch.tensor(len(class_labels))
            logits, _ = heads.class_branch(heads.pool(maps, regions.at(order)))
            results["stage0/cls_score"] = logits
        count = len(regions) if stage == 0 else 2 * len(regions)
        deltas = heads.run_stage(stage, maps, regions.at(order))
        change = heads.changes_in_training(stage, maps, class_regions, sample, sample.at(learned))
        transform = heads.box_branches[stage].transform
        wanted = torch.zeros(len(regions), 4, dtype=dtype)
        is_learned = torch.zeros(len(regions), dtype=torch.bool)
        is_learned[len(regions) - len(sample) :] = learned
        wanted[is_learned] = transform.get_deltas(
            sample.regions.boxes[learned], sample.gt_boxes[learned]
        )
        results |= {
            f"{name}/rois": regions.at(order).rois,
            f"{name}/bbox_pred": deltas,
            f"{name}/labels_reg": labels[order],
            f"{name}/bbox_targets": wanted[order],
            f"{name}/bbox_weights": is_learned[order].to(dtype)[:, None].repeat(1, 4),
            f"{name}/normalizer": torch.tensor(count),
            f"{name}/num_pos_reg": learned.sum(),
        }
        refined = heads.refined(stage, sample, change)
        for image in range(len(targets)):
            mine = sample.regions.image_index == image
            results[f"{name}/pos_gt/reg/{image}"] = sample.gt_index[mine & learned]
            results[f"{name}/refined/{image}"] = refined.boxes[mine]
        box_sample = heads.match_again(refined, targets, stage + 1)
    return results


def _in_their_order(
    drawn: Instances, proposals: Instances, target: Instances, num_classes: int
) -> Instances:
    """Positives first, of them ground truth first, then as the proposals are."""
    both = torch.cat((target.gt_boxes.tensor, proposals.proposal_boxes.tensor))
    place = _rows_of(drawn.proposal_boxes.tensor, both)
    background = drawn.gt_classes == num_classes
    return drawn[(place + len(both) * background).argsort()]


def _rows_of(boxes: Tensor, among: Tensor) -> Tensor:
    """The first row of ``among`` that equals each box."""
    return (boxes[:, None] == among).all(-1).int().argmax(1)


def _parts(case: Case, heads: DecoupledROIHeads, dtype: torch.dtype) -> dict[str, Tensor]:
    """Branches on given features, and the transform on given boxes."""
    pooled = case.tensor("roi_feature", dtype)
    results = {"forward/0/cls_score": heads.class_branch(pooled)[0]}
    boxes, deltas, wanted = (
        case.tensor(f"coder/{name}", dtype) for name in ("boxes", "deltas", "targets")
    )
    size = torch.tensor(_images(case)[:1]).expand(len(boxes), 2)
    for stage, branch in enumerate(heads.box_branches):
        results[f"forward/{stage}/bbox_pred"] = branch(pooled)
        moved = branch.transform.apply_deltas(deltas, boxes)
        results[f"coder/decoded/{stage}"] = clip_to_sizes(moved, size)
        results[f"coder/encoded/{stage}"] = branch.transform.get_deltas(boxes, wanted)
    return results


def _test(case: Case, heads: DecoupledROIHeads, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Boxes and scores of each proposal, and the detections."""
    heads.eval()
    dtype, scale = features["p2"].dtype, case.tensor("scale_factor")
    proposals = _proposals(case, "test")
    regions = Regions.of_proposals(proposals, dtype)
    maps = heads.maps(features)
    logits, _ = heads.class_branch(heads.pool(maps, regions))
    boxes = heads.refine(maps, regions, logits)[-1] / scale.to(dtype)
    results = {}
    for image, found in enumerate(heads.propose(features, proposals)):
        mine = regions.image_index == image
        results[f"test/boxes/{image}"] = boxes[mine]
        results[f"test/scores/{image}"] = logits[mine].softmax(-1)
        kept = heads.selection.suppress(found)
        # Detectron2's Boxes are float32 always; the same boxes before that:
        columns = (boxes[kept.proposal_index], kept.scores[:, None])
        results[f"test/det_boxes/{image}"] = torch.cat(columns, dim=1)
        results[f"test/det_labels/{image}"] = kept.pred_classes
    return results
