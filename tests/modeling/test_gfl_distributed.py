# SPDX-License-Identifier: Apache-2.0
"""GFL, SALT: two processes with half the batch each learn what one learns from the whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_groups import PROCESSES, join
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from util import excite, loss_sum, make_instances, random_input, tiny_model

SIZE = (64, 64)  # one size: padding would change what GroupNorm sees
OBJECTS: dict[str, tuple[int, ...] | None] = {  # the first half goes to the first process
    "ordinary": (3, 2, 4, 1),
    "one image without objects": (3, 0, 2, 1),
    "one process without objects": (3, 2, 0, 0),
    "no objects": (0, 0, 0, 0),
    "scores next to nothing": None,
}
MODELS = (
    "gfl_R_50_FPN_1x",
    "gflv2_R_50_FPN_1x",
    "salt_R_50_FPN_1x",
    "salt_fcos_R_50_FPN_1x",
)

Results = tuple[dict[str, Tensor], dict[str, Tensor]]


def batch(case: str) -> list[dict[str, Any]]:
    torch.manual_seed(3)
    objects = OBJECTS[case]
    if objects is not None:
        return [random_input(SIZE, count) for count in objects]
    inputs = [random_input(SIZE, 0) for _ in range(4)]
    inputs[0]["instances"] = make_instances(SIZE, [[12.5, 10.25, 40, 44]], [1])
    return inputs


def fresh(name: str, case: str) -> nn.Module:
    torch.manual_seed(5)
    model = excite(tiny_model(name), gain=0.5).double()
    # Many locations take part in the sum of weights, which is far from 1 for either case.
    model.head.cls_score.bias.data.fill_(-9.0 if OBJECTS[case] is None else -1.0)
    return model


def gradients(model: nn.Module, wrapped: nn.Module, inputs: list[dict[str, Any]]) -> Results:
    losses = wrapped(inputs)
    loss_sum(losses).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return grads, {name: loss.detach() for name, loss in losses.items()}


def train_half(rank: int, folder: str) -> None:
    join(rank, folder)
    results = {}
    for name in MODELS:
        for case in OBJECTS:
            model = fresh(name, case)
            inputs = batch(case)
            half = len(inputs) // PROCESSES
            own = inputs[rank * half : (rank + 1) * half]
            results[name, case] = gradients(model, DistributedDataParallel(model), own)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gradients and losses of each process, of every model and case."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(train_half, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", OBJECTS)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_learn_what_one_learns(halves: Any, name: str, case: str) -> None:
    model = fresh(name, case)
    whole, losses = gradients(model, model, batch(case))
    for half, _ in (results[name, case] for results in halves):
        assert half.keys() == whole.keys()
        for parameter, gradient in whole.items():
            torch.testing.assert_close(
                half[parameter],
                gradient,
                rtol=1e-6,
                atol=1e-6 * gradient.abs().max().item(),
                msg=lambda text, parameter=parameter: f"{parameter}: {text}",
            )
    for term, loss in losses.items():
        mean = torch.stack([results[name, case][1][term] for results in halves]).mean()
        torch.testing.assert_close(mean, loss)


def test_cases_are_what_they_are_called() -> None:
    """The sum of weights is far from 1, on both sides of it."""
    sums = {}
    for case in ("ordinary", "scores next to nothing"):
        model, inputs = fresh(MODELS[0], case), batch(case)
        _, features, predictions = model.predict(inputs)
        targets = model.assigner(features, predictions, [x["instances"] for x in inputs])
        sums[case] = targets.box_normalizer.item()
    assert sums["ordinary"] > 2
    assert 0 < sums["scores next to nothing"] < 0.5
