# SPDX-License-Identifier: Apache-2.0
"""OTA's assignment against plain loops in float64."""

import math

import pytest
import torch
from test_ddod import features
from test_ota import SIZES, K, noise, scene

from d2_decouple.modeling.ota import OTAAssigner, transport_plan


def looped_plan(costs, supplies, eps, iterations):
    """Sinkhorn without logarithms: (M + 1, R) plan of one image; its last row is background."""
    weights = [[math.exp(-cost / eps) for cost in row] for row in costs]
    rows, columns = [1.0] * len(costs), [1.0] * len(costs[0])
    for _ in range(iterations):
        for j in range(len(columns)):
            columns[j] = 1 / sum(rows[i] * weights[i][j] for i in range(len(rows)))
        for i in range(len(rows)):
            given = sum(weights[i][j] * columns[j] for j in range(len(columns)))
            rows[i] = supplies[i] / given if given else 0.0
    return [
        [rows[i] * weights[i][j] * columns[j] for j in range(len(columns))]
        for i in range(len(rows))
    ]


def looped_costs(predictions, truth, image):
    """(M + 1, R) costs of one image, infinite outside, and what each row supplies."""
    logits, boxes = predictions.logits[image].tolist(), predictions.boxes[image].tolist()

    def focal(z, positive):
        p = 1 / (1 + math.exp(-z))
        return 0.25 * (1 - p) ** 2 * -math.log(p) if positive else 0.75 * p**2 * -math.log(1 - p)

    costs, supplies = [], []
    for box, label in zip(truth.gt_boxes.tensor.tolist(), truth.gt_classes.tolist(), strict=True):
        row, fits = [], []
        for j, (x, y) in enumerate(predictions.locations.tolist()):
            reach = 2.5 * predictions.strides[j].item()
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            near = max(abs(2 * x - box[0] - box[2]), abs(2 * y - box[1] - box[3])) < 2 * reach
            b = boxes[j]
            sides = [min(b[2 + i], box[2 + i]) - max(b[i], box[i]) for i in (0, 1)]
            common = max(sides[0], 0) * max(sides[1], 0)
            areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (b, box)]
            fit = common / (sum(areas) - common)
            cost = sum(focal(z, k == label) for k, z in enumerate(logits[j]))
            cost -= 1.5 * math.log(max(fit, torch.finfo(torch.float32).eps))
            row.append(cost if inside and near else math.inf)
            fits += [fit] if inside and near else []
        costs.append(row)
        supplies.append(max(int(sum(sorted(fits)[-20:])), 1) if fits else 0)
    costs.append([sum(focal(z, False) for z in of_cell) for of_cell in logits])
    return costs, [*supplies, len(logits) - sum(supplies)]


def test_against_plain_loops():
    """In float64: the plan and the labels of two images with five and one objects."""
    predictions, truth = noise(2, torch.float64), [scene(5), scene(1)]
    assigner = OTAAssigner(num_classes=K)
    targets = assigner(features(SIZES, 2), predictions, truth)
    found, chosen = [], {}

    def record(problem, **options):
        labels, background = transport_plan(problem, **options)
        dense = torch.zeros(len(labels), background.numel() + 1, dtype=torch.float64)
        dense.scatter_(1, problem.candidates, labels.exp())
        found.append((dense[:, :-1].unflatten(1, background.shape), background.exp()))
        return labels, background

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2_decouple.modeling.ota.transport_plan", record)
        assigner(features(SIZES, 2), predictions, truth)
    (labels, background), start = found[0], 0
    for image, objects in enumerate(truth):
        plan = torch.tensor(
            looped_plan(*looped_costs(predictions, objects, image), 0.1, 50), dtype=torch.float64
        )
        count = len(objects)
        own = torch.cat((labels[start : start + count, image], background[image : image + 1]))
        torch.testing.assert_close(own, plan, rtol=1e-8, atol=1e-12)
        start += count
        best = (plan / plan.amax(1, keepdim=True).clamp(min=1e-300)).argmax(0)
        chosen[image] = torch.where(best == count, -1, best)
    assert targets.extras["gt_index"].tolist() == [chosen[0].tolist(), chosen[1].tolist()]
    assert (targets.labels < K).sum() >= 4
