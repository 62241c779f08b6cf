# SPDX-License-Identifier: Apache-2.0
"""A model made ready for inference computes the same."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from util import excite, random_input, tiny, tiny_resnet

from d2_decouple.config import get_config
from d2_decouple.layers.tower import conv_tower
from d2_decouple.modeling.folding import cast_weights, fold_batch_norms

NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d)


def with_statistics(model):
    """Norms as a training leaves them: with factors, summands, means and variances."""
    for module in model.modules():
        if isinstance(module, NORMS):
            for tensor, low, high in (
                (module.weight, 0.2, 2.0),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.05, 3.0),
            ):
                nn.init.uniform_(tensor, low, high)
    return model.eval()


def norms(model):
    return [module for module in model.modules() if isinstance(module, NORMS)]


@torch.no_grad()
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_folded_backbone_gives_the_same_maps(norm):
    model = with_statistics(tiny_resnet(norm=norm))
    image = torch.randn(2, 3, 64, 96)
    before = model(image)
    count = len(norms(model))
    assert fold_batch_norms(model) == count > 8
    assert norms(model) == []
    after = model(image)
    for name, expected in before.items():
        torch.testing.assert_close(
            after[name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
        )


@torch.no_grad()
def test_norms_behind_a_convolution_in_a_sequence_are_folded_and_group_norms_stay():
    tower = with_statistics(conv_tower(in_channels=4, conv_dims=[6, 5], norm="BN", bias=True))
    grouped = conv_tower(in_channels=4, conv_dims=[64], norm="GN").eval()
    image = torch.randn(1, 4, 9, 7)
    before, of_groups = tower(image), grouped(image)
    assert fold_batch_norms(tower) == 2
    torch.testing.assert_close(tower(image), before, rtol=1e-5, atol=1e-6)
    assert fold_batch_norms(grouped) == 0
    assert torch.equal(grouped(image), of_groups)


@torch.no_grad()
def test_what_is_not_one_factor_of_one_convolution_stays():
    shared = nn.Conv2d(4, 4, 1)
    branches = nn.ModuleList(nn.Sequential(shared, nn.BatchNorm2d(4)) for _ in range(2))
    active = nn.Sequential(Conv2d(4, 4, 1, activation=torch.relu), nn.BatchNorm2d(4))
    batch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    model = with_statistics_where_there_are(nn.ModuleList([*branches, active, batch]))
    image = torch.randn(2, 4, 5, 5)
    before = [branch(image) for branch in model]
    assert fold_batch_norms(model) == 0
    for branch, expected in zip(model, before, strict=True):
        assert torch.equal(branch(image), expected)


def with_statistics_where_there_are(model):
    for module in norms(model):
        if module.running_mean is not None:
            with_statistics(module)
    return model.eval()


def test_a_model_that_trains_is_refused():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        fold_batch_norms(tiny_resnet())


@torch.no_grad()
def test_cast_weights_give_what_autocast_gives():
    cfg = tiny(get_config("fcos_R_50_FPN_1x"))
    cfg.model.selection.candidates.test_score_thresh = 0.0
    model = excite(instantiate(cfg.model)).eval()
    inputs = [random_input((64, 96), 0)]
    with torch.autocast("cpu", torch.bfloat16):
        *_, expected = model.predict(inputs)
        cast_weights(model, torch.bfloat16, parts=["backbone", "head.cls_subnet"])
        *_, got = model.predict(inputs)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert types["head.cls_subnet.0.weight"] == torch.bfloat16
    assert types["head.cls_subnet.1.weight"] == torch.float32  # a norm's
    assert types["head.bbox_subnet.0.weight"] == torch.float32
    assert types["head.predictor.bbox_pred.weight"] == torch.float32
    assert types["backbone.fpn_lateral3.weight"] == torch.bfloat16
    # Frozen norms are still unfolded here: their factor meets weights that are rounded already.
    torch.testing.assert_close(got.logits, expected.logits, rtol=0.05, atol=0.1)
    assert got.boxes.dtype == torch.float32
