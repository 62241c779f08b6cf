# SPDX-License-Identifier: Apache-2.0
"""The benchmark's rows of Decoupled R-CNN on a small image, with a small network."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from detectron2.structures import Instances
from torch import Tensor
from util import tiny

from d2_decouple.benchmarks import decoupled_rcnn as rows
from d2_decouple.benchmarks.detectors import CLASSES, SizedRow, training_inputs
from d2_decouple.config import get_config

SIZE = (128, 160)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_SIZE", SIZE)
        patch.setattr(rows, "get_config", lambda name: tiny(get_config(name), num_classes=CLASSES))
        for name in ("_ours", "_theirs"):  # each is built once
            patch.setattr(rows, name, cache(getattr(rows, name)))
        yield


def sides(stages: int) -> tuple[Any, Any]:
    return rows._ours(stages), rows._theirs(stages)


@torch.no_grad()
def proposals(model: Any, truth: list[Instances] | None = None) -> list[Instances]:
    images = model.preprocess_image(training_inputs(SIZE))
    found: list[Instances] = model.proposal_generator(images, model.backbone(images.tensor), truth)[
        0
    ]
    return found


@pytest.mark.parametrize("stages", [1, 3])
def test_both_sides_propose_the_same_and_find_objects(stages: int) -> None:
    """The ratio is that of the RPNs and the ROI heads: backbones are the same."""
    ours, theirs = (proposals(model.eval())[0].proposal_boxes.tensor for model in sides(stages))
    torch.testing.assert_close(ours, theirs)
    row = rows.ROWS[f"decoupled_rcnn_{stages}_inference"]
    for side in (row.ours, row.reference):
        (found,) = side()()
        assert len(found["instances"]) > 0


@pytest.mark.parametrize("stages", [1, 3])
def test_as_many_proposals_seem_to_hold_an_object(stages: int) -> None:
    for model in sides(stages):
        for layer in rows._layers(model, "cls_score"):
            logits: list[Tensor] = []
            handle = layer.register_forward_hook(lambda *call, to=logits: to.append(call[2]))
            rows.inference(lambda model=model: model, SIZE)()
            handle.remove()
            best = logits[0].softmax(-1)[:, :-1].max(-1).values
            assert 0.1 < (best > 0.05).float().mean() < 0.2


@pytest.mark.parametrize("stages", [1, 3])
def test_training_changes_nothing_that_is_planted_and_learns_from_positives(stages: int) -> None:
    row = rows.ROWS[f"decoupled_rcnn_{stages}_train_step"]
    for side, model in zip((row.ours, row.reference), sides(stages), strict=True):
        before = [x.clone() for x in model.parameters()]
        side()()
        assert all(map(torch.equal, before, model.parameters()))
        layers = rows._layers(model, "bbox_pred")
        assert len(layers) == stages
        assert all(bool(layer.weight.grad.any()) for layer in layers)


def test_memory_that_the_roi_heads_save_is_counted_without_parameters() -> None:
    row = rows.ROWS["decoupled_rcnn_3_train_step"]
    assert isinstance(row, SizedRow)
    sizes = row.sizes()
    assert sizes.keys() > row.size_targets.keys()
    ours, theirs = sizes[rows._SAVED]
    assert ours > 0 < theirs


def test_a_storage_is_counted_once_and_a_parameter_never() -> None:
    features, weight = (torch.ones(2**18, requires_grad=True) for _ in range(2))  # 1 MiB each

    def run() -> Tensor:
        square = features * features
        return (square * weight).exp()  # the product itself is not needed

    assert rows._saved_mib(run, [weight]) == 3  # features, square and exponential
