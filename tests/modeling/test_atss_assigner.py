# SPDX-License-Identifier: Apache-2.0
"""ATSS's assignment: by hand, its parts, and what it may not cost."""

from statistics import mean, stdev
from typing import Any

import pytest
import torch
from atss_loops import STRIDES, K, assign, predictions_of, pyramid_sizes, random_scene
from detectron2.structures import Boxes, Instances
from test_fcos_assigner_cost import MEMORY_SCRIPT, Recorder
from torch._subclasses.fake_tensor import FakeTensorMode
from util import TORCH, growth_in_child, make_instances

from d2_decouple.modeling import ATSSAssigner
from d2_decouple.modeling.atss import adaptive_thresholds, best_claim

SIZE = (32, 32)


def labels_of(
    boxes: list[list[float]], sizes: list[tuple[int, int]], topk: int = 9, **geometry: Any
) -> list[int]:
    """Class, which is the box's number, or K, of each cell of an image of 32 x 32 pixels."""
    truth = [make_instances(SIZE, boxes, list(range(len(boxes))))]
    strides = STRIDES[: len(sizes)]
    targets = assign(ATSSAssigner(num_classes=K, topk=topk), sizes, strides, truth, **geometry)
    labels = targets.labels[0].tolist()
    index = targets.extras["gt_index"][0].tolist()
    assert index == [-1 if label == K else label for label in labels]
    return labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hand_worked_image(dtype: torch.dtype) -> None:
    """4 x 4 cells of 8 pixels and 2 x 2 of 16, two candidates each; a box around (17, 16).

    Nearest on the first level are (16, 16) and (24, 16), at 1 and 7 pixels; on the second
    (16, 16), and (16, 0) at 16.03, where (0, 16) is 17 away. The box has 58 * 60 = 3480 square
    pixels. Anchors of the first level have 64 * 64: that of (16, 16) holds the whole box, so its
    overlap is 3480 / 4096, that of (24, 16) all but 4 columns, so 3240 / 4336. Anchors of the
    second have 128 * 128 and hold the box: 3480 / 16384 each. Their mean is 0.50541, the standard
    deviation 0.34091, the sum 0.84632, and only 3480 / 4096 = 0.84961 is greater: row 10.
    Distances of (16, 16) are 28, 30, 30, 30.
    """
    box = [-12.0, -14.0, 46.0, 46.0]
    truth = [make_instances(SIZE, [box], [2])]
    assigner = ATSSAssigner(num_classes=K, topk=2)
    targets = assign(assigner, [(4, 4), (2, 2)], [8, 16], truth, dtype=dtype)
    assert targets.extras["iou_thresholds"].tolist() == pytest.approx([0.84632], abs=2e-6)
    assert targets.labels.tolist() == [[2 if k == 10 else K for k in range(20)]]
    assert targets.extras["gt_index"].tolist() == [[0 if k == 10 else -1 for k in range(20)]]
    assert targets.boxes[0].tolist() == [box if k == 10 else [0.0] * 4 for k in range(20)]
    center = (28 / 30) ** 0.5
    for got in (targets.quality, targets.box_weights):
        assert got is not None
        assert got[0].tolist() == pytest.approx([center if k == 10 else 0 for k in range(20)])
    assert targets.cls_normalizer.item() == targets.box_normalizer.item() == 1
    floats = (targets.boxes, targets.cls_weights, targets.box_weights, targets.quality)
    floats = (*floats, targets.cls_normalizer, targets.box_normalizer)
    assert {x.dtype for x in floats if x is not None} == {dtype}


@pytest.mark.parametrize(("left", "positive"), [(0.0, False), (1 / 128, False), (1 / 64, True)])
def test_reference_point_lies_inside_by_a_hundredth_of_a_pixel(left: float, positive: bool) -> None:
    for sides in ([left, 9, 9, 9], [9, left, 9, 9], [9, 9, left, 9], [9, 9, 9, left]):
        box = [-sides[0], -sides[1], sides[2], sides[3]]
        assert labels_of([box], [(1, 1)]) == [0 if positive else K], sides


def test_the_better_overlap_wins_and_the_first_of_equals() -> None:
    """One cell at (0, 0), whose anchor has sides of 64 pixels."""

    def winner(*boxes: list[float]) -> int:
        return labels_of(list(boxes), [(1, 1)])[0]

    whole, half, quarter = ([-32.0, -32.0, x, y] for x, y in [(32, 32), (32, 1), (1, 1)])
    assert winner(half, whole, quarter) == 1
    assert winner(whole, half) == 0
    assert winner(quarter, half) == 1
    assert winner(half, half, half) == 0
    mirrored = ([-32.0, -32.0, 32.0, 16.0], [-32.0, -16.0, 32.0, 32.0], [-16.0, -32.0, 32.0, 32.0])
    for first in range(3):
        assert winner(*mirrored[first:], *mirrored[:first]) == 0
    assert winner(quarter, *mirrored) == 1
    # The better one does not claim the cell: it does not hold its reference point.
    assert winner([1.0, -32.0, 64.0, 32.0], quarter) == 1


def test_one_candidate_is_its_own_threshold() -> None:
    """However badly its anchor fits."""
    assert labels_of([[-1.0, -1.0, 1.0, 1.0]], [(1, 1)]) == [0]
    assert labels_of([[-900.0, -900.0, 900.0, 900.0]], [(1, 1)]) == [0]


def test_boxes_without_area_and_beside_the_image_learn_nothing() -> None:
    sizes = pyramid_sizes(*SIZE)
    for box in (
        [8.0, 8, 8, 8],
        [3.0, 3, 3, 20],
        [2.0, 2, 5, 5],
        [500.0, 0, 600, 32],
        [-90, 0, -9, 9],
    ):
        assert set(labels_of([list(map(float, box))], sizes)) == {K}, box


@pytest.mark.parametrize("images", [1, 3])
def test_no_objects(images: int) -> None:
    truth = [make_instances(SIZE, [], []) for _ in range(images)]
    targets = assign(ATSSAssigner(num_classes=K), [(4, 4), (2, 2)], [8, 16], truth)
    assert targets.labels.tolist() == [[K] * 20] * images
    assert (targets.extras["gt_index"] == -1).all()
    assert targets.extras["iou_thresholds"].shape == (0,)
    assert not targets.boxes.any()
    assert not targets.box_weights.any()
    assert targets.cls_normalizer.item() == images  # each counts one at least
    assert targets.box_normalizer.item() == 1


def test_images_do_not_mix() -> None:
    """A batch gives what its images give alone; images without objects lie in between."""
    sizes = pyramid_sizes(96, 128)
    boxes = random_scene(3).images[0][1] or [[3.0, 3.0, 40.0, 50.0]]
    truth = [make_instances((96, 128), boxes[:n], [0] * len(boxes[:n])) for n in (0, 3, 0, 1, 9, 0)]
    assigner = ATSSAssigner(num_classes=K)
    together = assign(assigner, sizes, STRIDES, truth)
    for image, alone in enumerate(assign(assigner, sizes, STRIDES, [x]) for x in truth):
        for name in ("labels", "boxes", "cls_weights", "box_weights", "quality"):
            assert torch.equal(getattr(together, name)[image], getattr(alone, name)[0]), name
        assert torch.equal(together.extras["gt_index"][image], alone.extras["gt_index"][0])


def test_normalizers() -> None:
    """Positives of each image, or one; the sum of centerness, or one."""
    big = [-12.0, -14.0, 46.0, 46.0]
    for counts in ((1, 0), (2, 1), (3, 0)):
        truth = []
        for count in counts:  # so far apart that each has cells of its own
            boxes = [[big[0] + 96 * k, big[1], big[2] + 96 * k, big[3]] for k in range(count)]
            truth.append(make_instances((32, 320), boxes, [0] * count))
        targets = assign(ATSSAssigner(num_classes=K), pyramid_sizes(32, 320), STRIDES, truth)
        positives = (targets.labels == 0).sum(1).tolist()
        assert [n > 0 for n in positives] == [n > 0 for n in counts]
        assert targets.cls_normalizer.item() == sum(max(n, 1) for n in positives)
        center = targets.quality.sum().item()
        assert targets.box_normalizer.item() == pytest.approx(max(center, 1))


# --- parts --------------------------------------------------------------------------------------


def test_thresholds_are_mean_and_unbiased_deviation_of_those_that_exist() -> None:
    overlaps = torch.rand(5, 7, dtype=torch.float64)
    exists = torch.arange(7) < torch.tensor([[7], [4], [2], [1], [0]])
    found = adaptive_thresholds(torch.where(exists, overlaps, 0), exists)
    for row, count in enumerate((7, 4, 2)):
        values = overlaps[row, :count].tolist()
        assert found[row].item() == pytest.approx(mean(values) + stdev(values))
    assert found[3] == overlaps[3, 0]
    assert found[4] == 0


def test_best_claims() -> None:
    """Two boxes, six predictions: only what is claimed counts, and the last wins nothing."""
    index = torch.tensor([[0, 1, 2, 6], [2, 1, 3, 0]])
    values = torch.tensor([[0.5, 0.2, 0.3, 0.9], [0.3, 0.4, 0.0, 0.7]])
    claim = torch.tensor([[True, True, True, False], [True, True, True, False]])
    assert best_claim(index, values, claim, 6).tolist() == [0, 1, 0, 1, 2, 2]
    assert best_claim(index[:0], values[:0], claim[:0], 6).tolist() == [0] * 6


# --- cost ---------------------------------------------------------------------------------------


def scene(boxes: int, images: int = 1) -> tuple[list[torch.Tensor], Any, list[Instances]]:
    sizes = pyramid_sizes(96, 128)
    corner = torch.rand(boxes, 2) * 90
    found = torch.cat((corner, corner + 2 + 60 * torch.rand(boxes, 2)), -1)
    one = make_instances((96, 128), found.tolist(), [0] * boxes)
    features = [torch.zeros(images, 0, *size) for size in sizes]
    return features, predictions_of(sizes, STRIDES, images, dtype=torch.float32), [one] * images


def test_asks_the_device_for_nothing() -> None:
    arguments = scene(30, 2)
    with Recorder() as recorder:
        targets = ATSSAssigner(num_classes=K)(*arguments)
    assert len(recorder.names) > 20
    assert recorder.waits == []
    assert (targets.labels == 0).any()


def test_work_does_not_loop_over_boxes_or_images() -> None:
    counts = []
    for boxes, images in ((2, 1), (50, 1), (50, 8)):
        arguments = scene(boxes, images)
        with Recorder() as recorder:
            ATSSAssigner(num_classes=K)(*arguments)
        counts.append(len(recorder.names))
    assert counts[0] == counts[1]
    assert counts[2] <= counts[1] + 7  # one to number the boxes of each further image


@pytest.mark.skipif(TORCH < (2, 6), reason="fake tensors of older torch make no lists")
def test_sends_nothing_to_the_device_while_waiting_for_it() -> None:
    """Here on pretended CUDA tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        features, predictions, _ = scene(0, 2)
        try:
            moved = {
                name: torch.zeros(x.shape, device="cuda")
                for name, x in predictions._asdict().items()
                if torch.is_tensor(x)
            }
            truth = [
                Instances(
                    (96, 128),
                    gt_boxes=Boxes(torch.zeros(count, 4, device="cuda")),
                    gt_classes=torch.zeros(count, dtype=torch.int64, device="cuda"),
                )
                for count in (5, 0)
            ]
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch cannot pretend CUDA tensors: {error}")
        with Recorder() as recorder:
            targets = ATSSAssigner(num_classes=K)(features, predictions._replace(**moved), truth)
    assert targets.labels.device.type == "cuda"
    assert recorder.waits == []


def test_memory_of_many_boxes() -> None:
    """1,000 boxes on 800 x 1344: boxes times cells would be 341 MiB for four float32 numbers."""
    script = MEMORY_SCRIPT.replace("FCOSAssigner", "ATSSAssigner")
    assert script != MEMORY_SCRIPT
    growth = growth_in_child(script)
    assert list(growth) == ["1", "10", "100", "1000"]
    assert max(growth.values()) < 128, growth
