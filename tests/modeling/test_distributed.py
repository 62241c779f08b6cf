# SPDX-License-Identifier: Apache-2.0
"""Two processes with half the batch each learn what one process learns from the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from compositions import CLASSES, COMPOSITIONS, compose
from detectron2.config import instantiate
from process_groups import PROCESSES, join
from torch.nn.parallel import DistributedDataParallel
from util import excite, loss_sum, make_instances, random_input, tiny

from d2_decouple.config import get_config

SIZE = (64, 64)  # one size: padding would change what GroupNorm sees
OBJECTS = {  # of each image; the first half of the images goes to the first process
    "ordinary": (3, 2, 4, 1),
    "one image without objects": (3, 0, 2, 1),
    "one process without objects": (3, 2, 0, 0),
    "no objects": (0, 0, 0, 0),
    "one positive in total": None,
}
# Without plug-ins, and those that bring sums, normalisers and modules of their own.
MODELS = (
    *("plain", "PDNet", "SALT", "SALT and SAPD"),
    *("tscode_fcos_R_50_FPN_1x", "tscode_atss_R_50_FPN_1x", "tscode_gfl_R_50_FPN_1x"),
    *("autoassign_R_50_FPN_1x", "ddod_R_50_FPN_1x", "ota_R_50_FPN_1x", "retinanet_R_50_FPN_1x"),
)


def batch(case):
    torch.manual_seed(3)
    if OBJECTS[case] is not None:
        return [random_input(SIZE, objects, CLASSES) for objects in OBJECTS[case]]
    inputs = [random_input(SIZE, 0) for _ in range(4)]
    # Ten pixels around the middle of one cell of P3; the neighbours' middles lie outside.
    inputs[0]["instances"] = make_instances(SIZE, [[15, 15, 25, 25]], [1])
    return inputs


def gradients(model, wrapped, inputs):
    model.zero_grad()
    losses = wrapped(inputs)
    loss_sum(losses).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return grads, {name: loss.detach() for name, loss in losses.items()}


def fresh(name):
    torch.manual_seed(5)
    if name in COMPOSITIONS:
        return compose(name).double()
    return excite(instantiate(tiny(get_config(name)).model), gain=0.5).double()


def train_half(rank, folder):
    join(rank, folder)
    results = {}
    for name in MODELS:
        for case in OBJECTS:
            model = fresh(name)  # DDOD counts the positives of a whole training
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


@pytest.mark.parametrize("case", OBJECTS)
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


def test_the_case_of_one_positive_has_one():
    model = fresh("plain")
    inputs = batch("one positive in total")
    _, features, predictions = model.predict(inputs)
    targets = model.assigner(features, predictions, [x["instances"] for x in inputs])
    assert (targets.labels < CLASSES).sum() == 1
    assert targets.cls_normalizer == 1
