# SPDX-License-Identifier: Apache-2.0
"""What SAPD's assignment may not cost: memory, loops over boxes, waiting for the device."""

import pytest
import torch
from test_fcos_assigner import instances, pyramid_sizes, random_boxes
from test_fcos_assigner_cost import Recorder
from test_sapd import STRIDES, make_assigner, predict
from test_sapd_loops import make_assigner as make_exact
from test_sapd_loops import scene
from util import growth_in_child

from d2_decouple.modeling import region_cells
from d2_decouple.modeling.matching import read_levels

SIZES = pyramid_sizes(256, 320, STRIDES)


def recorded(boxes, images=1, **options):
    assigner = make_assigner(**options)
    features = [torch.zeros(images, 2, *size) for size in SIZES]
    truth = [instances([[10.0, 10.0, 60.0, 60.0]] * boxes, [0] * boxes)] * images
    with Recorder() as recorder:
        assigner(features, predict(images), truth)
    return recorder


@pytest.mark.parametrize("options", [{}, {"unselected": "ignore_class", "ignore_scale": 0.5}])
def test_work_does_not_loop_over_boxes_or_images(options):
    counts = [len(recorded(*case, **options).names) for case in ((2, 1), (50, 1), (50, 4))]
    assert counts[0] == counts[1]
    assert counts[2] <= counts[1] + 3  # one to number the boxes of each further image


@pytest.mark.parametrize(("options", "waits"), [({}, 1), ({"ignore_scale": 0.5}, 2)])
def test_asks_the_device_for_the_number_of_pairs_alone(options, waits):
    assert recorded(20, **options).waits == ["_local_scalar_dense.default"] * waits


@pytest.mark.parametrize("pairs", [1, 7])
def test_pieces_change_nothing(pairs, monkeypatch):
    options = {"unselected": "ignore_class", "ignore_scale": 0.5, "soft_start": 1.0}
    features, predictions, truth = scene(0)
    truth = [one[:5] for one in truth]
    assigner = make_exact(**options)
    whole = assigner(features, predictions, truth)
    monkeypatch.setattr(region_cells, "_PAIRS", pairs)
    pieces = assigner(features, predictions, truth)
    assert torch.equal(pieces.labels, whole.labels)
    torch.testing.assert_close(pieces.cls_weights, whole.cls_weights)
    torch.testing.assert_close(pieces.box_weights, whole.box_weights)


def test_work_is_linear_in_pairs():
    """The cells in the regions, and not boxes times all cells."""
    predictions = predict()
    levels = read_levels(predictions, SIZES)
    boxes = random_boxes(torch.Generator().manual_seed(0), 256, 320)[:, :4]
    cells = region_cells.cells_by_point(boxes, levels)
    image_index = torch.zeros(len(boxes), dtype=torch.long)
    pairs = region_cells.RegionPairs(cells, levels, image_index, len(predictions.locations))
    found = torch.cat([piece.location for piece in pairs])
    assert len(pairs) == len(found) == int(cells.numbers().sum())
    low, high = (boxes[:, None, i : i + 2] for i in (0, 2))
    inside = ((predictions.locations >= low) & (predictions.locations <= high)).all(-1)
    assert len(found) == inside.sum()
    assert torch.equal(found.bincount(minlength=inside.shape[1]), inside.sum(0))


MEMORY_SCRIPT = """
import json, resource, sys
sys.path[:0] = sys.argv[1:]
import torch
from detectron2.structures import Boxes, Instances
from test_sapd import predict
from d2_decouple.modeling import FocalTerm, IoUTerm, LevelSelectionTerm, SAPDAssigner, SAPDOptions

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
predictions = predict(1, sizes=sizes)
leaves = [x.clone().requires_grad_() for x in (predictions.logits, predictions.boxes)]
predictions = predictions._replace(logits=leaves[0], boxes=leaves[1])
features = [torch.zeros(1, 16, *size) for size in sizes]
assigner = SAPDAssigner(
    num_classes=3, channels=16, num_levels=5, max_iter=9, hidden_channels=8,
    options=SAPDOptions(soft_start=0.0, unselected="ignore_class", ignore_scale=0.5),
)
base, growth = peak(), {}
for boxes in (1, 1000):
    corner = torch.rand(boxes, 2) * torch.tensor([1300.0, 760.0])
    truth = Instances((800, 1344), gt_classes=torch.zeros(boxes, dtype=torch.int64))
    truth.gt_boxes = Boxes(torch.cat((corner, corner + 1 + torch.rand(boxes, 2) * 400), -1))
    targets = assigner(features, predictions, [truth])
    terms = (FocalTerm(), IoUTerm(), LevelSelectionTerm())
    sum(term(predictions, targets) for term in terms).backward()
    growth[boxes] = peak() - base
print(json.dumps(growth))
"""


def test_memory_of_many_boxes():
    """1,000 boxes on 800x1344, losses and gradients included.

    The levels have few channels, for the time it takes; regions of 256 channels are 250 MB.
    """
    growth = growth_in_child(MEMORY_SCRIPT)
    assert list(growth) == ["1", "1000"]
    assert growth["1000"] < 256, growth  # MiB
