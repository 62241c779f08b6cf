# SPDX-License-Identifier: Apache-2.0
"""Two processes learn what one learns, of the hosts that bring normalisers of their own."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.config import instantiate
from process_groups import PROCESSES, join
from test_distributed import OBJECTS, batch, gradients
from torch.nn.parallel import DistributedDataParallel
from util import excite, tiny

from d2_decouple.config import get_config

CASES = [name for name in OBJECTS if name != "one positive in total"]
MODELS = ("autoassign_R_50_FPN_1x", "ddod_R_50_FPN_1x", "retinanet_R_50_FPN_1x")


def fresh(name):
    torch.manual_seed(5)
    return excite(instantiate(tiny(get_config(name)).model), gain=0.5).double()


def train_half(rank, folder):
    join(rank, folder)
    results = {}
    for name in MODELS:
        for case in CASES:
            model = fresh(name)
            wrapped = DistributedDataParallel(model)
            inputs = batch(case)
            half = len(inputs) // PROCESSES
            own = inputs[rank * half : (rank + 1) * half]
            results[name, case] = gradients(model, wrapped, own)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Gradients and losses of each process, of every model and case."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(train_half, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_learn_what_one_learns(halves, name, case):
    model = fresh(name)
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
