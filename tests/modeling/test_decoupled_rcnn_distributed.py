# SPDX-License-Identifier: Apache-2.0
"""Two processes with half the batch each learn what one process learns from the whole batch.

No sample is drawn by chance: each is larger than its candidates are many. Batch norms of branches
have the statistics of one process, so that is said of fully connected layers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from decoupled_rcnn_parts import (
    OBJECTS,
    anywhere,
    box_branches,
    features_of,
    heads_of,
    near,
    proposals_of,
    targets_of,
)
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from process_groups import PROCESSES, join
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from util import loss_sum, make_instances, random_input, tiny

from d2_decouple.config import get_config
from d2_decouple.modeling import DecoupledProposals

FULL, BARE, EMPTY = OBJECTS[0], OBJECTS[1], ([], [])
CASES: dict[str, list[Any]] = {  # of each image; the first half goes to the first process
    "ordinary": [FULL, BARE, BARE, FULL],
    "one process without objects": [FULL, BARE, EMPTY, EMPTY],
    "no objects": [EMPTY] * 4,
}
HEADS = {
    "three stages": lambda: box_branches(3),
    "shared": lambda: box_branches(3, kind="shared"),
}
MODEL = "whole model"
TOLERANCE = {MODEL: 2e-3} | dict.fromkeys(HEADS, 1e-5)


class FixedProposals(nn.Module):
    """ROI heads with features and proposals of their own for the images whose numbers they get."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.heads = heads_of(
            HEADS[kind](),
            batch_size_per_image=512,
            positive_fraction=1.0,
            box_batch_size_per_image=512,
        )
        self.maps = features_of(4)
        # Not as many for each image, nor for each branch.
        self.sets = [
            [torch.cat((near(FULL[0], 4 + 3 * i), anywhere(5 + 4 * j))) for i in range(4)]
            for j in range(2)
        ]

    def forward(self, images: list[int], objects: list[Any]) -> dict[str, Tensor]:
        proposals = DecoupledProposals(*([proposals_of(x[i]) for i in images] for x in self.sets))
        maps = {name: x[images] for name, x in self.maps.items()}
        return self.heads(None, maps, proposals, targets_of(objects))[1]


class WholeModel(nn.Module):
    """The detector with samples that have room for every anchor and every proposal."""

    def __init__(self) -> None:
        super().__init__()
        cfg = tiny(get_config("decoupled_rcnn_R_18_FPN_bccd")).model
        rpn, heads = cfg.proposal_generator, cfg.roi_heads
        cfg.backbone.bottom_up.norm = "FrozenBN"
        rpn.update(batch_size_per_image=100_000, positive_fraction=0.5, nms_thresh=0.5)
        # Few: one that a rounding error moves across a threshold must not matter to a thousandth.
        rpn.update(pre_nms_topk=(40, 40), post_nms_topk=(100, 100), nms_thresh_reg=0.6)
        heads.update(
            batch_size_per_image=2000, positive_fraction=0.5, box_batch_size_per_image=2000
        )
        self.model = instantiate(cfg)
        self.images = [random_input((64, 96), 0) for _ in range(4)]

    def forward(self, images: list[int], objects: list[Any]) -> dict[str, Tensor]:
        inputs = []
        for index, (boxes, classes) in zip(images, objects, strict=True):
            boxes = [[value * 0.6 for value in box] for box in boxes]
            instances = make_instances((64, 96), boxes, classes)
            inputs.append({**self.images[index], "instances": instances})
        return self.model(inputs)


def fresh(name: str) -> nn.Module:
    torch.manual_seed(5)
    return WholeModel() if name == MODEL else FixedProposals(name)


def gradients(model: nn.Module, wrapped: nn.Module, images: list[int], objects: list[Any]) -> Any:
    model.zero_grad()
    with EventStorage():
        losses = wrapped(images, objects)
    loss_sum(losses).backward()
    grads = {name: x.grad.clone() for name, x in model.named_parameters() if x.requires_grad}
    return grads, {name: loss.detach() for name, loss in losses.items()}


def train_half(rank: int, folder: str) -> None:
    join(rank, folder)
    results = {}
    own = [0, 1] if rank == 0 else [2, 3]
    for name in TOLERANCE:
        model = fresh(name)
        wrapped = DistributedDataParallel(model)
        for case, objects in CASES.items():
            mine = [objects[i] for i in own]
            results[name, case] = gradients(model, wrapped, own, mine)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gradients and losses of each process, of every model and case."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(train_half, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TOLERANCE)
def test_two_processes_learn_what_one_learns(halves: Any, name: str, case: str) -> None:
    model = fresh(name)
    whole, losses = gradients(model, model, [0, 1, 2, 3], CASES[case])
    tolerance = TOLERANCE[name]
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    assert largest > 1e-3
    for half, _ in (results[name, case] for results in halves):
        assert half.keys() == whole.keys()
        for parameter, gradient in whole.items():
            torch.testing.assert_close(
                half[parameter],
                gradient,
                rtol=0,
                atol=tolerance * max(gradient.abs().max().item(), 1e-6),
                msg=lambda text, parameter=parameter: f"{parameter}: {text}",
            )
    for term, loss in losses.items():
        mean = torch.stack([results[name, case][1][term] for results in halves]).mean()
        torch.testing.assert_close(mean, loss, rtol=tolerance, atol=1e-6)


def test_processes_have_unequal_shares() -> None:
    """What the tests above need: a mean of the processes' means would be another number."""
    model = fresh("three stages")
    counts = []
    for images in ([0, 1], [2, 3]):
        with EventStorage() as storage:
            model(images, [CASES["ordinary"][i] for i in images])
            counts.append(
                [storage.latest()[f"roi_head/num_positives_stage{k}"][0] for k in range(3)]
            )
    assert all(x != y and min(x, y) > 0 for x, y in zip(*counts, strict=True))
