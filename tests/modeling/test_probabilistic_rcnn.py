# SPDX-License-Identifier: Apache-2.0
"""Probabilistic two-stage detectors: any host in front, scores of both stages, two processes."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import decoupled_rcnn_parts as parts
import pytest
import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from process_groups import PROCESSES, join
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from util import BOTTOM_UP_CHANNELS, loss_sum, random_input, tiny, without_gradient

from d2_decouple.config import configs_root, get_config
from d2_decouple.modeling import (
    DecoupledProposals,
    DecoupledROIHeads,
    ProbabilisticROIHeads,
    TestTimeAugmentation,
)
from d2_decouple.modeling.dense_proposals import geometric_mean

RCNN = "decoupled_rcnn_R_18_FPN_bccd"


def load_base() -> Any:
    """The function of the recipes' base, as a recipe imports it."""
    path = configs_root() / "common" / "models" / "dense_rcnn.py"
    spec = importlib.util.spec_from_file_location("dense_rcnn", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dense_rcnn


def two_stages(host: str) -> Any:
    """A tiny one-stage detector in front of a tiny Decoupled R-CNN."""
    cfg = get_config(host)
    cfg.model = load_base()(cfg.model, get_config(RCNN).model)
    tiny(cfg)
    if cfg.model.backbone.top_block.in_feature == "res5":
        cfg.model.backbone.top_block.in_channels = BOTTOM_UP_CHANNELS[-1]
    for name in ("cls_conv_dims", "box_conv_dims"):
        cfg.model.proposal_generator.head[name] = [64]
    return instantiate(cfg.model)


HOSTS = [
    *("fcos", "atss", "gfl", "gflv2", "retinanet", "autoassign", "ddod", "pdnet", "salt"),
    *("tscode_fcos", "tscode_pdnet", "sapd_atss", "composed_dpe_pdnet"),
]


@pytest.mark.parametrize("host", HOSTS)
def test_any_host_proposes(host: str) -> None:
    model = two_stages(f"{host}_R_18_FPN_bccd")
    inputs = [random_input((64, 96), 3), random_input((64, 64), 0)]
    seen: list[Any] = []
    model.proposal_generator.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    for batch in (inputs, inputs[1:]):
        model.zero_grad()
        with EventStorage():
            losses = model(batch)
        assert all(loss.isfinite() for loss in losses.values())
        own = {"loss_cls", *(f"loss_box_reg_stage{k}" for k in range(3))}
        assert own < losses.keys()
        assert all(name.startswith("loss_rpn_") for name in losses.keys() - own)
        loss_sum(losses).backward()
        assert without_gradient(model) == []
        assert isinstance(seen[-1], DecoupledProposals)
        assert all(len(x) for x in (*seen[-1], *seen[-1].reg))
    results = model.eval()(inputs)
    assert type(seen[-1]) is list
    assert len(results) == 2


def test_bfloat16() -> None:
    """Proposals and losses stay in float32, and so do the maps that an assigner reads."""
    model = two_stages("fcos_R_18_FPN_bccd")
    seen: list[Any] = []
    maps: list[Tensor] = []
    model.proposal_generator.assigner.register_forward_hook(
        lambda _, args, out: maps.extend(args[0])
    )
    model.proposal_generator.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16), EventStorage():
        model([random_input((64, 96), 3)])
    ((proposals, losses),) = seen
    assert {x.dtype for x in (*losses.values(), *maps)} == {torch.float32}
    assert len(maps) == 5
    for item in (*proposals, *proposals.reg):
        assert item.objectness_logits.dtype == item.proposal_boxes.tensor.dtype == torch.float32


# --- scores of object and class -----------------------------------------------------------------


def roi_heads(monkeypatch: pytest.MonkeyPatch, threshold: float, **options: Any) -> Any:
    monkeypatch.setattr(parts, "DecoupledROIHeads", ProbabilisticROIHeads)
    torch.manual_seed(8)
    heads = parts.heads_of(**options).eval()
    heads.selection.test_score_thresh = threshold
    return heads


def proposed() -> tuple[dict[str, Tensor], list[Instances]]:
    torch.manual_seed(9)
    proposals = [parts.proposals_of(parts.anywhere(count)) for count in (12, 9)]
    for item in proposals:
        item.objectness_logits = torch.randn(len(item)) * 3
    return parts.features_of(), proposals


@torch.no_grad()
@pytest.mark.parametrize("kind", ["geometric mean", "product"])
def test_scores_by_a_plain_loop(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where regions are left out early: nothing that would be found gets lost."""
    combine = geometric_mean if kind == "geometric mean" else torch.mul
    features, proposals = proposed()
    heads = roi_heads(monkeypatch, -1.0, combine=combine, test_score_thresh=0.3)
    every = DecoupledROIHeads.propose(heads, features, proposals)
    found = heads.propose(features, proposals)
    first = [0, len(proposals[0])]
    for image, (item, all_of_it) in enumerate(zip(found, every, strict=True)):
        assert len(all_of_it) == parts.K * len(proposals[image])
        wanted = []
        for index, score, box in zip(
            all_of_it.proposal_index.tolist(),
            all_of_it.scores.tolist(),
            all_of_it.pred_boxes.tensor.tolist(),
            strict=True,
        ):
            logit = proposals[image].objectness_logits[index - first[image]].item()
            both = score / (1 + math.exp(-logit))
            both = math.sqrt(both) if kind == "geometric mean" else both
            if both > 0.3:
                wanted.append((both, box))
        assert 0 < len(wanted) < len(all_of_it)
        scores, boxes = zip(*wanted, strict=True)
        torch.testing.assert_close(item.scores, torch.tensor(scores))
        torch.testing.assert_close(item.pred_boxes.tensor, torch.tensor(boxes))
    heads.selection.test_score_thresh = 0.09 if kind == "geometric mean" else 0.3
    pruned = heads.propose(features, proposals)
    for item, other in zip(pruned, found, strict=True):
        torch.testing.assert_close(item.scores, other.scores)
        assert torch.equal(item.proposal_index, other.proposal_index)


def test_scores_want_objectness(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = roi_heads(monkeypatch, 0.1)
    features, proposals = proposed()
    proposals[1].remove("objectness_logits")
    with pytest.raises(ValueError, match=r"want proposals with objectness_logits.*DecoupledROI"):
        heads.propose(features, proposals)


def test_combine_must_be_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"roi_heads\.combine must be callable.*geometric_mean"):
        roi_heads(monkeypatch, 0.1, combine="sqrt")


def certain() -> Any:
    """Tiny ATSS in front, whose objectness is around a half."""
    model = two_stages("atss_R_18_FPN_bccd").eval()
    model.proposal_generator.head.cls_score.bias.data.zero_()
    return model


def test_augmented() -> None:
    """With one variant of the size itself the detections are the detector's."""
    model, item = certain(), random_input((64, 96), 0)
    plain = model([item])[0]["instances"]
    tta = TestTimeAugmentation(model, short_edge_lengths=[64], max_size=96, flip=False).eval()
    (found,) = tta([item])
    assert len(plain) > 5
    torch.testing.assert_close(found["instances"].scores, plain.scores)
    torch.testing.assert_close(found["instances"].pred_boxes.tensor, plain.pred_boxes.tensor)


def test_detections_come_from_both_stages() -> None:
    """A proposal that is no object gives no detection, whatever its class seems to be."""
    model, item = certain(), random_input((64, 96), 0)
    plain = model([item])[0]["instances"]
    assert len(plain)
    assert (plain.scores > 0.05).all()
    model.proposal_generator.head.cls_score.bias.data.fill_(-12)
    assert len(model([item])[0]["instances"]) == 0


# --- two processes ------------------------------------------------------------------------------

COUNTS = {"unequal": (3, 2, 0, 1), "no objects": (0, 0, 0, 0)}  # objects of each image


def fresh() -> nn.Module:
    """With samples that have room for every proposal, and few of these: one that a rounding error
    moves across a threshold must not matter to a thousandth.
    """
    torch.manual_seed(5)
    cfg = tiny(get_config("composed_fcos_decoupled_rcnn_R_18_FPN_bccd"))
    cfg.model.backbone.bottom_up.norm = "FrozenBN"
    generator, heads = cfg.model.proposal_generator, cfg.model.roi_heads
    generator.head.update(cls_conv_dims=[64], box_conv_dims=[64])
    generator.update(pre_nms_topk=(20, 20), nms_thresh=0.5, nms_thresh_reg=0.6)
    heads.update(batch_size_per_image=2000, box_batch_size_per_image=2000, positive_fraction=0.5)
    return instantiate(cfg.model)


def batch(case: str) -> list[Any]:
    torch.manual_seed(3)
    return [random_input((64, 64), count) for count in COUNTS[case]]


def gradients(model: nn.Module, wrapped: nn.Module, inputs: list[Any]) -> Any:
    with EventStorage():
        losses = wrapped(inputs)
    loss_sum(losses).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return grads, {name: loss.detach() for name, loss in losses.items()}


def train_half(rank: int, folder: str) -> None:
    join(rank, folder)
    results = {}
    for case in COUNTS:
        model = fresh()
        own = batch(case)[2 * rank : 2 * rank + 2]
        results[case] = gradients(model, DistributedDataParallel(model), own)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gradients and losses of each process, of every case."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(train_half, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", COUNTS)
def test_two_processes_learn_what_one_learns(halves: Any, case: str) -> None:
    model = fresh()
    whole, losses = gradients(model, model, batch(case))
    for half, _ in (results[case] for results in halves):
        assert half.keys() == whole.keys()
        for parameter, gradient in whole.items():
            atol = 2e-3 * max(gradient.abs().max().item(), 1e-6)
            torch.testing.assert_close(half[parameter], gradient, rtol=0, atol=atol)
    for term, loss in losses.items():
        mean = torch.stack([results[case][1][term] for results in halves]).mean()
        torch.testing.assert_close(mean, loss, rtol=2e-3, atol=1e-6)
