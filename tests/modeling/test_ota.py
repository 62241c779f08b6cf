# SPDX-License-Identifier: Apache-2.0
"""OTA as a host: by hand, what it may not cost, and on batches of every kind."""

import math

import pytest
import torch
from test_ddod import BATCHES, features, instances
from test_fcos_assigner_cost import Recorder
from util import excite, growth_in_child, loss_sum, random_input, tiny_model, without_gradient

from d2_decouple.config import get_config
from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling import geometric_mean_score
from d2_decouple.modeling.ota import (
    OTAAssigner,
    Transport,
    claimed_by_plan,
    dynamic_k,
    transport_plan,
)
from d2_decouple.structures import DensePredictions

K = 2
RECIPES = ("ota_R_50_FPN_1x", "tscode_ota_R_50_FPN_1x")
SIZES, STRIDES = ((8, 8), (4, 4)), (8, 16)  # 64 x 64 pixels
ROW, BOX = ((1, 4),), [4.0, -4.0, 20.0, 4.0]  # inside lie x = 8 and x = 16: rows 1 and 2


def predict(images=1, sizes=SIZES, strides=STRIDES, dtype=torch.float32):
    """All logits are 0, so a class costs log(2) / 16 and none three times that, of each class."""
    grid = make_grid(sizes, strides, 0.0, device=torch.device("cpu"), dtype=dtype)
    boxes = squares(grid.locations, 2 * grid.strides)
    count = len(grid.locations)
    return DensePredictions(
        logits=torch.zeros(images, count, K, dtype=dtype),
        boxes=boxes.repeat(images, 1, 1),
        quality=torch.zeros(images, count, dtype=dtype),
        locations=grid.locations,
        strides=grid.strides,
        priors=boxes,
        level_sizes=grid.level_sizes,
        extras={},
    )


def noise(images=1, dtype=torch.float32):
    """Predictions that differ between locations."""
    blank = predict(images, dtype=dtype)
    sides = blank.strides[:, None] * (0.5 + 3 * torch.rand(images, *blank.strides.shape, 2))
    boxes = torch.cat((blank.locations - sides / 2, blank.locations + sides / 2), -1)
    return blank._replace(logits=torch.randn_like(blank.logits), boxes=boxes.to(dtype))


def scene(count, size=(64, 64)):
    corner = torch.rand(count, 2) * 40
    boxes = torch.cat((corner, corner + 2 + 20 * torch.rand(count, 2)), 1).tolist()
    return instances(boxes, torch.randint(K, (count,)).tolist(), size)


def assign(predictions, truth, sizes=SIZES, **options):
    return OTAAssigner(num_classes=K, **options)(features(sizes, len(truth)), predictions, truth)


def row_predictions(second):
    """Four cells; row 1 predicts the object exactly, row 2 the box ``second``."""
    predictions = predict(sizes=ROW, strides=(8,))
    predictions.boxes[0, 1], predictions.boxes[0, 2] = torch.tensor(BOX), torch.tensor(second)
    return predictions


def test_hand_worked_plan():
    """An object over the cells 1 and 2 of four, predicted exactly at 1 and by half (IoU 1/2) at 2.

    It supplies floor(1 + 1/2) = 1 label, the background 3. Its cost at 2 is 1.5 log 2 higher than
    at 1, the background's is the same everywhere. Each cell gets one label, so at 1 the object
    gives p and at 2 the rest, 1 - p, and the logit of p is half of 1.5 log(2) / 0.1 = 15 log 2:
    p = 1 / (1 + 2 ** -7.5) = 0.9945. The background gives 1 - p, p, and one to each other cell.
    So cell 1 learns the object. The cells outside of it are far below in the plan: zero.
    """
    predictions = row_predictions([4.0, -4.0, 12.0, 4.0])
    truth, size = [instances([BOX], [1], (8, 32))], {"sizes": ROW, "size_divisor": 8}
    targets = assign(predictions, truth, **size)
    assert targets.labels.tolist() == [[K, 1, K, K]]
    assert targets.extras["supplies"].tolist() == [1]
    assert targets.extras["gt_index"].tolist() == [[-1, 0, -1, -1]]
    assert targets.box_weights.tolist() == targets.quality.tolist() == [[0, 1, 0, 0]]
    assert targets.cls_normalizer == targets.box_normalizer == 1
    assert torch.equal(targets.boxes[0, 1], torch.tensor(BOX))
    costs = torch.tensor([[math.log(2) / 4, math.log(2) / 4 + 1.5 * math.log(2)]])
    problem = Transport(
        candidates=torch.tensor([[1, 2]]),
        costs=costs,
        supplies=torch.ones(1),
        image_index=torch.zeros(1, dtype=torch.int64),
        background=torch.full((1, 4), math.log(2) * 3 / 8),
        valid=torch.ones(1, 4, dtype=torch.bool),
    )
    # The 50 iterations of a training come to 0.991.
    labels, background = transport_plan(problem, eps=0.1, iterations=1000)
    p = 1 / (1 + 2**-7.5)
    torch.testing.assert_close(labels.exp(), torch.tensor([[p, 1 - p]]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        background.exp(), torch.tensor([[1, 1 - p, p, 1]]), rtol=1e-4, atol=1e-5
    )
    # Two exact boxes: the object has two labels, and gives one to each cell.
    targets = assign(row_predictions(BOX), truth, **size)
    assert targets.extras["supplies"].tolist() == [2]
    assert targets.labels.tolist() == [[K, 1, 1, K]]


def test_class_decides_by_hand():
    """Both boxes fit by half, so there is one label; row 2 is sure of the class, and gets it."""
    predictions = row_predictions([4.0, -4.0, 12.0, 4.0])
    predictions.boxes[0, 1] = predictions.boxes[0, 2]
    predictions.logits[0, 2, 1] = 3.0
    truth = [instances([BOX], [1], (8, 32))]
    targets = assign(predictions, truth, sizes=ROW, size_divisor=8)
    assert targets.labels.tolist() == [[K, K, 1, K]]
    torch.testing.assert_close(targets.quality, torch.tensor([[0, 0, 0.5, 0]]))
    assert targets.box_weights.tolist() == [[0, 0, 1, 0]]


def test_dynamic_k_by_hand():
    """0.9 + 0.8 + 0.7 = 2.4, of two 1.7; 0.3 gives one all the same; no candidate, no label."""
    overlaps = torch.tensor([[0.9, 0.1, 0.7, 0.8], [0.3, 0.9, 0.9, 0.9], [0.9] * 4])
    exists = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert dynamic_k(overlaps, exists, 20).tolist() == [2, 1, 0]
    assert dynamic_k(overlaps, exists, 2).tolist() == [1, 1, 0]
    assert dynamic_k(overlaps[:0], exists[:0], 20).tolist() == []


def test_never_outside_of_the_central_region():
    """Nor outside of the image: the second one ends at 32 pixels, and its rest is ignored."""
    predictions, truth = noise(2), [scene(30), scene(30, (32, 32))]
    targets = assign(predictions, truth, radius=1.5)
    positive = (targets.labels >= 0) & (targets.labels < K)
    boxes = targets.boxes
    distances = torch.cat((predictions.locations - boxes[..., :2], boxes[..., 2:]), -1)
    distances[..., 2:] -= predictions.locations
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    steps = (predictions.locations - middle).abs().amax(-1) / predictions.strides
    assert (distances.amin(-1)[positive] > 0).all()
    assert (steps[positive] < 1.5).all()
    ignored = (predictions.locations >= 32).any(-1)
    assert torch.equal(targets.labels[1] == -1, ignored)
    assert (targets.labels[0] >= 0).all()
    assert targets.cls_normalizer == positive.sum()
    assert positive[1].any()


def test_objects_without_a_location_and_too_many():
    """A box between the cells learns nothing; of equal boxes the first counts, supplies or not."""
    gap, box = [9.0, 9.0, 11.0, 11.0], [4.0, 4.0, 30.0, 30.0]
    targets = assign(predict(), [instances([gap], [0], (64, 64))])
    assert (targets.labels == K).all()
    assert targets.extras["supplies"].tolist() == [0]
    targets = assign(predict(), [instances([gap, box], [0, 1], (64, 64))])
    assert set(targets.extras["gt_index"].flatten().tolist()) == {-1, 1}
    targets = assign(predict(), [instances([box] * 200, [1] * 200, (64, 64))])
    assert set(targets.extras["gt_index"].flatten().tolist()) == {-1, 0}
    assert torch.isfinite(targets.cls_normalizer)


def test_each_object_gets_what_it_likes_best():
    """Measured in shares of the most: even the poorest plan gives an object one location."""
    problem = Transport(
        candidates=torch.tensor([[0, 1, 2], [1, 2, 4]]),
        costs=torch.zeros(2, 3),
        supplies=torch.ones(2),
        image_index=torch.zeros(2, dtype=torch.int64),
        background=torch.zeros(1, 4),
        valid=torch.ones(1, 4, dtype=torch.bool),
    )
    labels = torch.tensor([[0.01, 0.02, 0.005], [0.1, 0.3, 9.0]]).log()
    labels[1, 2] = -torch.inf
    background = torch.tensor([[0.99, 0.88, 0.6, 1.0]]).log()
    # Shares: 1/2, 1, 1/4; 1/3, 1; of the background the plan itself.
    assert claimed_by_plan(problem, labels, background).tolist() == [[2, 0, 1, 2]]


def test_two_images_equal_each_alone():
    predictions, truth = noise(2), [scene(6), scene(3)]
    both = assign(predictions, truth)
    for image, objects in enumerate(truth):
        fields = {
            name: getattr(predictions, name)[image : image + 1]
            for name in ("logits", "boxes", "quality")
        }
        alone = assign(predictions._replace(**fields), [objects])
        for name in ("labels", "boxes", "quality", "box_weights"):
            assert torch.equal(getattr(both, name)[image], getattr(alone, name)[0])
        assert torch.equal(both.extras["gt_index"][image], alone.extras["gt_index"][0])


def test_asks_the_device_for_nothing_and_does_not_loop_over_boxes():
    counts = []
    for count in (2, 60):
        predictions, truth = noise(2), [scene(count), scene(0)]
        with Recorder() as recorder:
            assign(predictions, truth)
        assert recorder.waits == []
        counts.append(len(recorder.names))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_every_batch(name, batch):
    model = tiny_model(name)
    for _ in range(2):
        model.zero_grad()
        losses = model([random_input(size, objects) for size, objects in BATCHES[batch]])
        assert list(losses) == ["loss_cls", "loss_box_reg", "loss_quality"]
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        loss_sum(losses).backward()
        assert without_gradient(model) == []
        excite(model, gain=0.5)


def test_float32_under_autocast():
    model = excite(tiny_model(RECIPES[0]), gain=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([random_input((64, 96), 2)])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_what_the_recipes_say():
    for name in RECIPES:
        model = get_config(name).model
        assert (model.head.offset, model.backbone.top_block.in_feature) == (0.0, "res5")
        assert (model.losses.loss_box_reg.weight, model.losses.loss_quality.weight) == (2.0, 0.5)
        assert model.selection.score is geometric_mean_score


def test_bad_arguments():
    for name in ("radius", "box_cost", "eps"):
        for value in (0, math.inf, math.nan):
            with pytest.raises(ValueError, match=rf"assigner\.{name} is {value}; .*positive"):
                OTAAssigner(num_classes=K, **{name: value})
    for name in ("topk", "iterations", "size_divisor"):
        with pytest.raises(ValueError, match=rf"assigner\.{name} is 0; .*from 1, such as"):
            OTAAssigner(num_classes=K, **{name: 0})
    with pytest.raises(ValueError, match="exactly one prediction per cell"):
        assign(predict(), [scene(1)], sizes=((8, 8), (4, 5)))


MEMORY_SCRIPT = """
import json, resource, sys
sys.path[:0] = sys.argv[1:]
import torch
from test_ota import assign, instances, predict

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
predictions = predict(1, sizes=sizes, strides=[8, 16, 32, 64, 128])
base, growth = peak(), {}
for count in (1, 1000):
    corner = torch.rand(count, 2) * torch.tensor([1300.0, 760.0])
    boxes = torch.cat((corner, corner + 1 + torch.rand(count, 2) * 600), -1)
    truth = instances(boxes.tolist(), [0] * count, (800, 1333))
    assign(predictions, [truth], sizes=sizes)
    growth[count] = peak() - base
print(json.dumps(growth))
"""


def test_memory_of_many_boxes():
    """1,000 boxes on 800x1333; the whole plan in float32 would be 86 MiB in each of its copies."""
    growth = growth_in_child(MEMORY_SCRIPT)
    assert list(growth) == ["1", "1000"]
    assert growth["1000"] < 256, growth  # MiB
