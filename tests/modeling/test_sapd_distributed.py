# SPDX-License-Identifier: Apache-2.0
"""SAPD: two processes with half the batch each learn what one learns from the whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from process_groups import PROCESSES, join
from torch.nn.parallel import DistributedDataParallel
from util import excite, loss_sum, make_instances, random_input, tiny_model

SIZE = (64, 64)
OBJECTS = {  # of each image; the first half of the images goes to the first process
    "ordinary": (3, 2, 4, 1),
    "one process without objects": (3, 2, 0, 0),
    "no objects": (0, 0, 0, 0),
    "next to no weight": None,
}
SOFT = 80000  # of 90,000 iterations: the phase that has all parts


def batch(case):
    torch.manual_seed(3)
    if OBJECTS[case] is not None:
        return [random_input(SIZE, objects) for objects in OBJECTS[case]]
    inputs = [random_input(SIZE, 0) for _ in range(4)]
    inputs[0]["instances"] = make_instances(SIZE, [[21, 21, 29, 27]], [1])
    return inputs


def fresh():
    torch.manual_seed(5)
    model = excite(tiny_model("sapd_R_50_FPN_1x_nobfp"), gain=0.3)
    for value in model.assigner.parameters():  # its logits shall differ
        torch.nn.init.normal_(value, std=0.02)
    return model.double()


def gradients(model, wrapped, inputs):
    model.zero_grad()
    with EventStorage(SOFT):
        losses = wrapped(inputs)
    loss_sum(losses).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return grads, {name: loss.detach() for name, loss in losses.items()}


def train_half(rank, folder):
    join(rank, folder)
    model = fresh()
    wrapped = DistributedDataParallel(model)
    results = {}
    for case in OBJECTS:
        inputs = batch(case)
        half = len(inputs) // PROCESSES
        own = inputs[rank * half : (rank + 1) * half]
        results[case] = gradients(model, wrapped, own)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Gradients and losses of each process, of every case."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(train_half, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", OBJECTS)
def test_two_processes_learn_what_one_learns(halves, case):
    model = fresh()
    whole, losses = gradients(model, model, batch(case))
    for half, _ in (results[case] for results in halves):
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
        mean = torch.stack([results[case][1][term] for results in halves]).mean()
        torch.testing.assert_close(mean, loss)
