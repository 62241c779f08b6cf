# SPDX-License-Identifier: Apache-2.0
"""Costs by slot: counted by hand on small modules, and adding up on the real ones."""

import time

import pytest
import torch
from torch import nn
from torchvision.ops import DeformConv2d
from util import make_instances, tiny_model

from d2_decouple.analysis import slot_costs
from d2_decouple.analysis.costs import WHOLE, slots_of

SIZE = (64, 96)


class Deformed(nn.Module):
    """A deformable convolution that bends nothing."""

    def __init__(self):
        super().__init__()
        self.conv = DeformConv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x, x.new_zeros(len(x), 18, *x.shape[-2:]))


class TwoParts(nn.Module):
    """Called like a detector; its second part runs twice and rests a while."""

    def __init__(self, second):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.second = second

    def forward(self, inputs):
        x = self.first(inputs[0]["image"][None])
        time.sleep(0.005)
        return self.second(self.second(x))


class Resting(nn.Conv2d):
    def forward(self, x):
        time.sleep(0.01)
        grown = torch.cat((x, x, x))  # alive in here alone
        return super().forward(grown[: len(x)])


def costs(model, **options):
    item = {"image": torch.zeros(3, 8, 8), "height": 8, "width": 8}
    return {cost.slot: cost for cost in slot_costs(model, item, repeats=2, **options)}


def test_counts_by_hand():
    found = costs(TwoParts(Resting(4, 4, 1, bias=False)))
    assert list(found) == ["first", "second", WHOLE]
    assert [cost.parameters for cost in found.values()] == [108, 16, 124]
    # 64 cells x 4 channels x (3 x 9), and twice 64 x 4 x 4
    assert [cost.multiply_adds for cost in found.values()] == [6912, 2048, 8960]


def test_times_are_of_the_parts():
    found = costs(TwoParts(Resting(4, 4, 1, bias=False)))
    assert found["second"].milliseconds >= 20
    assert found[WHOLE].milliseconds >= found["second"].milliseconds + 5
    assert found["first"].milliseconds < found[WHOLE].milliseconds - 20


def test_memory_is_of_what_is_alive():
    found = costs(TwoParts(Resting(4, 4, 1, bias=False)))
    map_ = 4 * 64 * 4 / 2**20  # MiB of a map of 4 channels, float32
    assert found["first"].peak_mib == pytest.approx(map_)
    # Three copies and the output, beside the input.
    assert found["second"].peak_mib == pytest.approx(4 * map_)
    # In the second run of it the first's output is alive, too, and the map before that.
    assert found[WHOLE].peak_mib == pytest.approx(6 * map_)


def test_deformable_convolutions_count_as_plain_ones():
    found = costs(TwoParts(Deformed()))
    assert found["second"].multiply_adds == 2 * 64 * 4 * 4 * 9


def test_shared_parameters_count_once():
    model = TwoParts(nn.Identity())
    model.second = model.first
    model.first = nn.Sequential(model.first)
    model.second = nn.Sequential(model.first[0], nn.Conv2d(4, 3, 1, bias=False))
    model.forward = lambda inputs: model.second(model.first[0](inputs[0]["image"][None])[:, :3])
    found = costs(model)
    assert found[WHOLE].parameters == 108 + 12
    assert found["second"].parameters == 12


def test_no_repeats():
    with pytest.raises(ValueError, match="repeats is 0; wanted a whole number from 1"):
        slot_costs(nn.Identity(), {}, repeats=0)


@pytest.mark.parametrize("name", ["fcos_R_18_FPN_bccd", "tscode_fcos_R_18_FPN_bccd"])
def test_slots_add_up(name):
    model = tiny_model(name).eval()
    item = {"image": torch.zeros(3, *SIZE), "height": SIZE[0], "width": SIZE[1]}
    truth = make_instances(SIZE, [[10, 10, 60, 50]], [1])
    found = {cost.slot: cost for cost in slot_costs(model, item, truth, repeats=1)}
    slots = [name for name in found if name not in (WHOLE, "assigner", "selection")]
    assert sum(found[x].multiply_adds for x in slots) == found[WHOLE].multiply_adds > 0
    assert sum(found[x].parameters for x in slots) == found[WHOLE].parameters
    assert found[WHOLE].parameters == sum(x.numel() for x in model.parameters())
    assert found["assigner"].milliseconds > 0
    assert found["selection"].milliseconds > 0
    has_context = name.startswith("tscode")
    assert (found["context"].multiply_adds > 0) == has_context
    assert "aligner" not in found
    assert set(slots_of(model)) >= set(slots)
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.head.modules())


def test_without_objects_known_the_assigner_does_not_run():
    model = tiny_model("fcos_R_18_FPN_bccd").eval()
    item = {"image": torch.zeros(3, *SIZE), "height": SIZE[0], "width": SIZE[1]}
    assert "assigner" not in {cost.slot for cost in slot_costs(model, item, repeats=1)}
    empty = make_instances(SIZE, [], [])
    assert "assigner" in {cost.slot for cost in slot_costs(model, item, empty, repeats=1)}
    assert not model.assigner.training
