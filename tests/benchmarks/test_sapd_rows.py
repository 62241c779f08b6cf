# SPDX-License-Identifier: Apache-2.0
"""The benchmark's SAPD rows on a small image."""

from typing import Any

import pytest
import torch
from detectron2.modeling.backbone import FPN
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import nn

from d2_decouple import benchmark
from d2_decouple.benchmarks import sapd
from d2_decouple.modeling import BFP, SAPDAssigner


@pytest.mark.parametrize("name", ["sapd_bfp_inference", "sapd_train_step"])
def test_both_sides_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sapd, "_SIZE", (128, 160))
    soft: list[bool] = []
    choose = SAPDAssigner.is_soft

    def watched(assigner: SAPDAssigner) -> bool:
        soft.append(choose(assigner))
        return soft[-1]

    monkeypatch.setattr(SAPDAssigner, "is_soft", watched)
    row = benchmark.ROWS[name]
    found = [side()() for side in (row.ours, row.reference)]
    if name.endswith("inference"):
        assert min(len(results[0]["instances"]) for results in found) > 20
    else:
        assert soft
        assert all(soft)


def test_the_sides_are_what_the_setting_says() -> None:
    """Detectron2's RetinaNet as it is, on the same ResNet, of which P6 is made."""
    theirs: Any = sapd._retinanet()
    assert type(theirs) is RetinaNet
    assert type(theirs.backbone) is FPN
    assert isinstance(theirs.head.cls_subnet[1], nn.ReLU)  # there is no norm
    assert theirs.head.cls_score.weight.shape == (9 * 80, 256, 3, 3)
    plain, balanced = (sapd._sapd(name) for name in (sapd._SAPD, sapd._BALANCED))
    assert [isinstance(x.backbone, BFP) for x in (plain, balanced)] == [False, True]
    shapes = [
        {key: x.shape for key, x in model.backbone.state_dict().items()}
        for model in (theirs, plain)
    ]
    assert shapes[0] == shapes[1]
    strides = [
        [conv.stride for conv in model.modules() if isinstance(conv, nn.Conv2d)][:53]
        for model in (theirs.backbone.bottom_up, plain.backbone.bottom_up)
    ]
    assert strides[0] == strides[1]


@torch.no_grad()
def test_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 of each level that has as many, and boxes that overlap.

    320 x 384 pixels are 1,920, 480, 120, 30 and 9 cells, each with four planted classes, and
    Detectron2's nine anchors.
    """
    image = {"image": torch.full((3, 320, 384), 120, dtype=torch.uint8)}
    ours: Any = sapd._sapd(sapd._SAPD).eval()
    images, _, predictions = ours.predict([image])
    (proposals,) = ours.selection.propose(predictions, images.image_sizes)
    assert len(proposals) == 1000 + 1000 + 480 + 120 + 36
    sides = (predictions.boxes[..., 2:] - predictions.boxes[..., :2])[0]
    assert (sides / predictions.strides[:, None]).median() == pytest.approx(4, abs=1)

    theirs: Any = sapd._retinanet().eval()
    kept: list[int] = []
    decode = theirs._decode_multi_level_predictions

    def counted(*arguments: Any) -> Any:
        found = decode(*arguments)
        kept.append(len(found))
        return found

    monkeypatch.setattr(theirs, "_decode_multi_level_predictions", counted)
    theirs([image])
    assert kept == [3 * 1000 + 1000 + 9 * 9 * 4]


def test_targets() -> None:
    targets = {name: row.target for name, row in sapd.ROWS.items()}
    assert targets == {"sapd_inference": 0.78, "sapd_bfp_inference": 0.85, "sapd_train_step": 0.85}
    assert ["BFP" in row.setting for row in sapd.ROWS.values()] == [False, True, False]
