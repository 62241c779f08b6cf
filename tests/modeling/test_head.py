# SPDX-License-Identifier: Apache-2.0
"""The head builds itself from its slots' facts, and says what does not fit together."""

import inspect
import re

import pytest
import torch
from detectron2.config import instantiate
from standins import PointAligner
from torch import nn
from util import WIDTH, excite, random_input, tiny, tiny_model

from d2_decouple.config import get_config
from d2_decouple.modeling import TSCODE, ClassPredictor, DenseHead, FCOSPredictor, SharedContext
from d2_decouple.modeling.head import flatten_maps, prior_bias

STRIDES = (8, 16)


def make_head(**changes):
    arguments = {
        "context": SharedContext(channels=WIDTH),
        "predictor": FCOSPredictor(num_classes=3, in_channels=32),
        "strides": STRIDES,
        "offset": 0.5,
        "cls_conv_dims": [96, 48],
        "box_conv_dims": [32],
        "norm": "",
    }
    return DenseHead(**{**arguments, **changes})


def maps(*sizes, channels=WIDTH):
    return [torch.randn(2, channels, *size) for size in sizes]


def test_prior_bias_is_the_logit_of_one_percent():
    assert prior_bias() == pytest.approx(-4.59512)
    assert torch.tensor(prior_bias(0.2)).sigmoid().item() == pytest.approx(0.2)


def test_flatten_maps_puts_a_cells_anchors_side_by_side():
    """Channel a * dims + d of cell (y, x) is row (y * W + x) * A + a, column d."""
    first = torch.arange(2 * 6 * 2 * 2.0).view(2, 6, 2, 2)
    second = -torch.ones(2, 6, 1, 1)
    flat = flatten_maps([first, second], 3)
    assert flat.shape == (2, (4 + 1) * 2, 3)
    assert flat[1, (1 * 2 + 0) * 2 + 1].tolist() == first[1, 3:, 1, 0].tolist()
    assert torch.all(flat[:, 8:] == -1)


def test_towers_and_class_predictor_follow_the_facts():
    head = make_head()
    convs = [part for part in head.cls_subnet if isinstance(part, nn.Conv2d)]
    assert [(x.in_channels, x.out_channels) for x in convs] == [(WIDTH, 96), (96, 48)]
    assert head.bbox_subnet[0].out_channels == 32
    assert head.cls_score.weight.shape == (3, 48, 3, 3)
    assert torch.all(head.cls_score.bias == prior_bias())
    assert torch.all(make_head(prior_prob=0.1).cls_score.bias == prior_bias(0.1))


def test_empty_towers_hand_the_context_on():
    predictor = FCOSPredictor(num_classes=3, in_channels=WIDTH)
    head = make_head(cls_conv_dims=[], box_conv_dims=[], predictor=predictor)
    assert head.cls_score.in_channels == WIDTH
    assert head(maps((4, 6), (2, 3))).boxes.shape == (2, 30, 4)


def test_towers_are_shared_over_levels_but_not_over_tasks():
    head = excite(make_head())
    same = torch.randn(1, WIDTH, 4, 4)
    predictions = head([same, same])
    torch.testing.assert_close(predictions.logits[:, :16], predictions.logits[:, 16:])
    distances = (predictions.boxes - predictions.locations.repeat(1, 2)).abs()
    torch.testing.assert_close(2 * distances[:, :16], distances[:, 16:])
    assert not set(head.cls_subnet.parameters()) & set(head.bbox_subnet.parameters())


@pytest.mark.parametrize(
    ("offset", "first", "last"), [(0.0, (0, 0), (16, 0)), (0.5, (4, 4), (24, 8))]
)
def test_offset_places_the_cells(offset, first, last):
    predictions = make_head(offset=offset)(maps((2, 4), (1, 2)))
    assert tuple(predictions.locations[0].tolist()) == first
    assert tuple(predictions.locations[-1].tolist()) == last
    assert predictions.strides.tolist() == [8] * 8 + [16] * 2
    assert predictions.level_sizes == (8, 2)


def test_offset_has_no_default():
    assert inspect.signature(DenseHead).parameters["offset"].default is inspect.Parameter.empty


@pytest.mark.parametrize("name", ["fcos_R_50_FPN_1x", "fcos_R_50_FPN_1x_d2", "fcos_R_18_FPN_bccd"])
def test_recipes_of_fcos_stand_in_the_middle_of_cells(name):
    assert get_config(name).model.head.offset == 0.5


def test_finer_maps_in_front_are_the_contexts_business():
    head = make_head(context=TSCODE(channels=WIDTH), cls_conv_dims=[32])
    predictions = head(maps((8, 10), (4, 5), (2, 3)))
    assert predictions.level_sizes == (20, 6)


def test_levels_that_the_context_loses_are_noticed():
    """A map too few or too many must not silently shift levels against strides."""
    for sizes in [((4, 4),), ((8, 8), (4, 4), (2, 2))]:
        with pytest.raises(ValueError):  # noqa: PT011 - whatever words, it must not go on
            make_head()(maps(*sizes))


def test_wrong_strides_name_both_and_the_key():
    cfg = tiny(get_config("fcos_R_50_FPN_1x"))
    cfg.model.head.strides = [4, 8, 16, 32, 64]
    with pytest.raises(ValueError, match=r"\(8, 16, 32, 64, 128\)") as error:
        instantiate(cfg.model)
    message = str(error.value)
    assert "(4, 8, 16, 32, 64)" in message
    assert "model.head.strides=[8, 16, 32, 64, 128]" in message


def test_too_few_levels_name_both():
    cfg = tiny(get_config("fcos_R_50_FPN_1x"))
    cfg.model.head_in_features = ["p4", "p5", "p6", "p7"]
    with pytest.raises(ValueError, match=r"\(16, 32, 64, 128\).*model\.head\.strides"):
        instantiate(cfg.model)


def test_wrong_channels_name_both():
    cfg = tiny(get_config("fcos_R_50_FPN_1x"))
    cfg.model.head.context.channels = 32
    with pytest.raises(ValueError, match=r"'p3': 64.*SharedContext expects 32.*out_channels"):
        instantiate(cfg.model)


def test_unknown_level_names_the_known_ones():
    cfg = tiny(get_config("fcos_R_50_FPN_1x"))
    cfg.model.head_in_features = ["p3", "p4", "p5", "p6", "p8"]
    with pytest.raises(ValueError, match="p8") as error:
        instantiate(cfg.model)
    assert "p7" in str(error.value)


def test_wrong_predictor_channels_name_both_and_the_key():
    message = r"ends with 32 channels, FCOSPredictor expects 64; set predictor\.in_channels=32"
    with pytest.raises(ValueError, match=message):
        make_head(predictor=FCOSPredictor(num_classes=3, in_channels=64))


def test_aligner_beside_half_resolution_says_why():
    with pytest.raises(ValueError, match=r"PointAligner samples both tasks.*TSCODE.*1/2"):
        make_head(
            context=TSCODE(channels=WIDTH),
            aligner=PointAligner(channels=WIDTH, num_levels=2),
        )


def test_class_maps_of_another_size_are_refused():
    predictor = ClassPredictor(WIDTH, 3, 1)
    with pytest.raises(ValueError, match=r"\(2, 3\) cells, its level \(4, 5\).*cls_stride"):
        predictor(maps((2, 3))[0], (4, 5))


def test_tower_must_be_callable():
    with pytest.raises(TypeError, match=r"tower must be callable.*'conv_tower'"):
        make_head(tower="conv_tower")


def test_tower_is_a_slot():
    built = []

    def tower(*, in_channels, conv_dims, norm):
        built.append((in_channels, conv_dims, norm))
        return nn.Conv2d(in_channels, conv_dims[-1], 1)

    head = make_head(tower=tower, norm="GN")
    assert built == [(WIDTH, [96, 48], "GN"), (WIDTH, [32], "GN")]
    assert head(maps((4, 4), (2, 2))).logits.shape == (2, 20, 3)


def test_head_sees_the_same_in_training_and_evaluation():
    model = excite(tiny_model())
    inputs = [random_input((64, 64), 0)]
    with torch.no_grad():
        training = model.train().predict(inputs)[2]
        evaluation = model.eval().predict(inputs)[2]
    assert torch.equal(training.boxes, evaluation.boxes)
    assert torch.equal(training.logits, evaluation.logits)


def test_parameter_names_are_flat_in_the_towers():
    names = {name for name, _ in make_head(norm="GN", cls_conv_dims=[64, 64]).named_parameters()}
    flat = [name for name in names if name.startswith("cls_subnet.")]
    assert sorted(flat) == sorted(
        f"cls_subnet.{i}.{kind}" for i in (0, 1, 3, 4) for kind in ("weight", "bias")
    )
    assert not [name for name in names if re.match(r"(context|aligner)\.", name)]
