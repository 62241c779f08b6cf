# SPDX-License-Identifier: Apache-2.0
"""SAPD's feature-selection network: what it reads, and who learns from what; odd batches."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from test_fcos_assigner import instances
from test_sapd_loops import CHANNELS, make_assigner, scene
from torch import Tensor
from util import excite, loss_sum, make_instances, random_input, tiny, tiny_model, without_gradient

from d2_decouple.config import get_config
from d2_decouple.modeling import (
    FeatureSelectionNet,
    FocalTerm,
    IoUTerm,
    LevelSelectionTerm,
    SAPDOptions,
)
from d2_decouple.modeling import feature_selection as net_file
from d2_decouple.structures import stack_ground_truth

NAMES = ["sapd_R_50_FPN_1x", "sapd_R_18_FPN_bccd"]
HARD, SOFT = 0, 70000  # iterations; of 90,000, or of 800
STRIDES = [torch.tensor(8.0, dtype=torch.float64), torch.tensor(16.0, dtype=torch.float64)]


def sees_the_middle(channels=1, levels=2):
    """A network whose logit of a level is the middle cell of that level's region."""
    net = FeatureSelectionNet(channels=channels, num_levels=levels, hidden_channels=levels)
    for name, value in net.double().named_parameters():
        value.data.zero_()
        if name.startswith("conv1.weight"):
            for level in range(levels):
                value.data[level, level * channels, 1, 1] = 1
        elif name.startswith("conv") and value.dim() == 4:
            value.data[range(levels), range(levels), 1, 1] = 1
        elif name == "fc.weight":
            value.data.copy_(torch.eye(levels))
    return net


def ramp(size: tuple[int, int], stride: int, image: int, power: int) -> Tensor:
    """A map whose cells hold their point's x in pixels to a power, and a thousand of the image."""
    x = (torch.arange(size[1], dtype=torch.float64) + 0.5) * stride
    return (x**power).expand(*size) + 1000 * image


def read(net, power, *boxes):
    """Logits for each box, all of image 1 of two."""
    features = [
        torch.stack([ramp(size, stride, image, power)[None] for image in range(2)])
        for size, stride in (((16, 20), 8), ((8, 10), 16))
    ]
    truth = stack_ground_truth([instances([], []), instances(list(boxes), [0] * len(boxes))])
    return net(features, STRIDES, truth)


def test_regions_are_the_objects_boxes():
    """On a map that holds x, the middle of the region holds the middle's x, whatever the level.

    So cells stand for their middles, boxes are pixels, and each image's objects read their image.
    """
    logits = read(sees_the_middle(), 1, [24.0, 24.0, 80.0, 64.0], [41.0, 10.0, 90.0, 90.0])
    wanted = torch.tensor([[1052.0, 1052.0], [1065.5, 1065.5]], dtype=torch.float64)
    torch.testing.assert_close(logits, wanted)


def test_a_region_s_cell_is_four_samples():
    """A box of 112 pixels has cells of 16; the middle one is (48, 64), read at x = 52 and 60.

    On P3 these are points of cells: 52^2 and 60^2. On P4, with points at 40, 56 and 72, they lie a
    quarter and three quarters between: 40^2 / 4 + 3 * 56^2 / 4, and 3 * 56^2 / 4 + 72^2 / 4.
    """
    logits = read(sees_the_middle(), 2, [0.0, 0.0, 112.0, 112.0])
    fine = (52**2 + 60**2) / 2
    coarse = ((40**2 + 3 * 56**2) / 4 + (3 * 56**2 + 72**2) / 4) / 2
    wanted = torch.tensor([[1000.0 + fine, 1000.0 + coarse]], dtype=torch.float64)
    torch.testing.assert_close(logits, wanted)


def test_layers_are_table_1():
    net = FeatureSelectionNet(channels=256, num_levels=5)
    assert sum(x.numel() for x in net.parameters()) == 4130821
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
    assert shapes["conv1.weight"] == (256, 1280, 3, 3)
    assert shapes["conv2.weight"] == shapes["conv3.weight"] == (256, 256, 3, 3)
    assert shapes["fc.weight"] == (5, 256)


def test_network_is_three_convolutions_of_all_levels_together():
    """The same as convolutions of the levels' regions, one behind the other as channels."""
    torch.manual_seed(0)
    net = FeatureSelectionNet(channels=3, num_levels=2, hidden_channels=4).double()
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.3)
    features = [torch.randn(1, 3, 16, 20).double(), torch.randn(1, 3, 8, 10).double()]
    truth = stack_ground_truth([instances([[5.0, 3.0, 90.0, 61.0], [1.0, 2.0, 9.0, 99.0]], [0, 0])])
    regions = []
    with pytest.MonkeyPatch.context() as patch:
        original = net_file.roi_align

        def record(*args, **kwargs):
            regions.append(original(*args, **kwargs))
            return regions[-1]

        patch.setattr(net_file, "roi_align", record)
        got = net(features, STRIDES, truth)
    x = torch.cat(regions, dim=1)
    assert x.shape == (2, 6, 7, 7)
    for conv in (net.conv1, net.conv2, net.conv3):
        x = conv(x).relu()
    torch.testing.assert_close(got, net.fc(x[:, :, 0, 0]))


def gradients(term, *, detach=True, **options):
    """Of an assigner's network, of maps, and of predictions, from one term."""
    features, predictions, truth = scene(0)
    features = [x.requires_grad_() for x in features]
    assigner = make_assigner(detach_level_weights=detach, **options)
    targets = assigner(features, predictions, truth)
    inputs = [*assigner.parameters(), *features, predictions.logits, predictions.boxes]
    found = torch.autograd.grad(term(predictions, targets), inputs, allow_unused=True)
    count = len(list(assigner.parameters()))
    return found[:count], found[count:-2], found[-2:]


def some(tensors):
    return [x is not None and bool(x.abs().sum() > 0) for x in tensors]


def test_the_network_learns_from_its_cross_entropy_alone():
    for term in (FocalTerm(), IoUTerm()):
        net, maps, _ = gradients(term)
        assert not any(some(net) + some(maps))
    net, maps, predictions = gradients(LevelSelectionTerm())
    assert all(some(net) + some(maps))
    assert not any(some(predictions))


def test_or_from_all_if_it_is_told_to():
    for term in (FocalTerm(), IoUTerm()):
        net, maps, _ = gradients(term, detach=False)
        assert all(some(net) + some(maps))
        assert not any(some(gradients(term, detach=False, soft_start=1.0)[0]))  # hard: it is 1


def test_weights_are_constants_for_predictions():
    features, predictions, truth = scene(0)
    targets = make_assigner()(features, predictions, truth)
    for name in ("box_weights", "cls_weights", "cls_normalizer", "boxes"):
        assert not getattr(targets, name).requires_grad
    assert targets.extras["level_logits"].requires_grad
    assert not targets.extras["level_weights"].requires_grad


TERMS = (FocalTerm(), IoUTerm())


def values(truth_scene, assigner, terms=TERMS):
    features, predictions, truth = truth_scene
    targets = assigner(features, predictions, truth)
    return torch.stack([term(predictions, targets) for term in terms])


def test_weights_of_one_are_the_baseline():
    """One level whose weight is renormalised to 1, and no soft points."""
    baseline = make_assigner(use_soft_weights=False, use_soft_levels=False)
    assert list(baseline.parameters()) == []
    ones = make_assigner(use_soft_weights=False, top_k=1, renormalize_levels=True)
    assert len(list(ones.parameters())) == 8
    for seed in range(2):
        a, b = scene(seed), scene(seed)
        torch.testing.assert_close(values(a, baseline), values(b, ones))


def test_trained_but_not_used():
    """The losses of soft points alone, and a network that learns."""
    points = make_assigner(use_soft_levels=False)
    both = make_assigner(use_soft_levels=False, select_train_only=True)
    a, b = scene(1), scene(1)
    torch.testing.assert_close(values(a, points), values(b, both))
    assert values(b, both, (LevelSelectionTerm(),)).item() > 0


def test_soft_levels_without_soft_points_weigh_all_cells_alike():
    features, predictions, truth = scene(0)
    targets = make_assigner(use_soft_weights=False)(features, predictions, truth)
    weights = targets.extras["level_weights"]
    assert set(targets.box_weights.unique().tolist()) <= {0.0, *weights.unique().tolist()}


BATCHES = {
    "ordinary": [((64, 96), 3), ((120, 160), 5)],
    "half empty": [((64, 96), 3), ((64, 96), 0)],
    "odd sizes": [((33, 47), 0), ((101, 67), 4), ((1, 1), 0)],
    "no objects": [((64, 64), 0), ((40, 64), 0)],
}


@pytest.mark.parametrize("name", NAMES)
def test_recipes_take_every_batch_in_the_soft_phase(name):
    """As those of all projects do, outside of a trainer: there it is the hard phase."""
    model = tiny_model(name)
    for batch in BATCHES.values():
        model.zero_grad()
        with EventStorage(SOFT):
            losses = model([random_input(size, objects) for size, objects in batch])
        assert list(losses) == ["loss_cls", "loss_box_reg", "loss_select"]
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        loss_sum(losses).backward()
        assert without_gradient(model) == []


@pytest.mark.parametrize("iteration", [HARD, SOFT])
def test_objects_of_one_pixel_and_of_more_than_the_image(iteration):
    model = excite(tiny_model("sapd_R_50_FPN_1x"), gain=0.5)
    item = random_input((64, 96), 0)
    boxes = [
        [10, 10, 11, 11],
        [0, 0, 1, 64],
        [63, 63, 64, 64],
        [-90, -90, 400, 400],
        [0, 0, 96, 64],
    ]
    item["instances"] = make_instances((64, 96), boxes, [0, 1, 2, 0, 1])
    with EventStorage(iteration):
        losses = model([item])
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    loss_sum(losses).backward()
    assert without_gradient(model) == []


def test_no_objects_in_double_precision_give_gradients_of_zero():
    assigner = make_assigner()
    features = [x.requires_grad_() for x in scene(0)[0]]
    predictions, nothing = scene(0)[1], [instances([], [])] * 3
    targets = assigner(features, predictions, nothing)
    assert targets.extras["level_logits"].shape == (0, 3)
    assert targets.extras["select_normalizer"] == targets.cls_normalizer == 1
    assert (targets.labels == 3).all()
    loss = LevelSelectionTerm()(predictions, targets) + FocalTerm()(predictions, targets)
    loss.backward()
    for value in (*assigner.parameters(), *features):
        assert (value.grad == 0).all()
    assert features[0].shape[1] == CHANNELS


def test_evaluation_does_not_know_the_network(monkeypatch):
    model = excite(tiny_model("sapd_R_50_FPN_1x")).eval()
    model.head.cls_score.bias.data.zero_()
    inputs = [random_input((64, 96), 0)]
    before = model(inputs)[0]["instances"]
    for value in model.assigner.parameters():
        value.data.fill_(float("nan"))
    monkeypatch.setattr(net_file, "roi_align", None)
    monkeypatch.setattr(FeatureSelectionNet, "forward", None)
    after = model(inputs)[0]["instances"]
    assert len(before) > 0
    assert torch.equal(before.pred_boxes.tensor, after.pred_boxes.tensor)
    assert torch.equal(before.scores, after.scores)
    assert all(name.startswith("assigner.feature_selection.") for name, _ in nets(model))


def nets(model):
    return [(n, p) for n, p in model.named_parameters() if n.startswith("assigner")]


def test_bfloat16_leaves_losses_in_float32():
    torch.manual_seed(0)
    cfg = tiny(get_config("sapd_R_18_FPN_bccd"))
    model = instantiate(cfg.model)
    inputs = [random_input((64, 96), 3), random_input((64, 64), 0)]
    for iteration in (HARD, SOFT):
        with EventStorage(iteration):
            exact = {term: loss.item() for term, loss in model(inputs).items()}
            with torch.autocast("cpu", torch.bfloat16):
                losses = model(inputs)
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        near = {term: loss.item() for term, loss in losses.items()}
        assert near["loss_select"] == pytest.approx(exact["loss_select"], rel=0.05)
        loss_sum(losses).backward()
        assert without_gradient(model) == []


def test_options_are_the_paper_s():
    assert get_config("sapd_R_50_FPN_1x").model.assigner.options.keys() == {"_target_"}
    assert SAPDOptions() == SAPDOptions(
        use_soft_weights=True,
        exponent=1.0,
        use_soft_levels=True,
        top_k=3,
        soft_start=0.5,
        shrink=0.2,
        positive_rule="center",
        ignore_scale=None,
        unselected="negative",
        detach_level_weights=True,
        renormalize_levels=False,
    )
