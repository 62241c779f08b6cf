# SPDX-License-Identifier: Apache-2.0
"""The balanced pyramid against plain loops; its place in a detector; sizes; names."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from golden_bfp_cases import LAYERS, balanced
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from util import BOTTOM_UP_CHANNELS, loss_sum, random_input, tiny, tiny_resnet, without_gradient

from d2_decouple.config import get_config
from d2_decouple.modeling import BFP, FPN, PAFPN, BalancedFeatures, LinearP6P7

C = 8
LEVELS = ["p3", "p4", "p5", "p6", "p7"]


def drawn(module: nn.Module) -> Any:
    """Biases that are not zero; in float64."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return module.double()


def make(kind: Any = BFP, **changes: Any) -> Any:
    """On one seed."""
    torch.manual_seed(2)
    arguments = {
        "in_features": ["res3", "res4", "res5"],
        "out_channels": C,
        "top_block": LastLevelP6P7(C, C, in_feature="p5"),
        **changes,
    }
    return drawn(kind(tiny_resnet(), **arguments))


def plain_twin(pyramid: BFP, **changes: Any) -> FPN:
    """The same without balance."""
    twin = make(FPN, **changes)
    state = pyramid.state_dict().items()
    twin.load_state_dict({k: v for k, v in state if not k.startswith("balance.")})
    return twin


def balance(level: int, channels: int = 3) -> BalancedFeatures:
    torch.manual_seed(3)
    return drawn(BalancedFeatures(channels=channels, refine_level=level))  # type: ignore[no-any-return]


def random_maps(sizes: Sequence[tuple[int, int]], channels: int = 3) -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randn(2, channels, *size, dtype=torch.float64) for size in sizes]


def by_loops(maps: Sequence[Tensor], module: BalancedFeatures) -> list[Tensor]:
    weights = {}
    for name, value in module.state_dict().items():
        layer, kind = name.split(".")
        layer = "conv_out" if layer == "out" else layer
        weights[f"refine.{layer}.conv.{kind}"] = value.numpy()
    assert len(weights) == 2 * len(LAYERS)
    level = module.refine_level
    images = [balanced([x[n].numpy() for x in maps], weights, level) for n in range(len(maps[0]))]
    return [torch.from_numpy(np.stack(x)) for x in zip(*images, strict=True)]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


SIZES = {
    "halves": [(8, 12), (4, 6), (2, 3), (1, 2)],
    "odd, rounded up": [(13, 9), (7, 5), (4, 3), (2, 2), (1, 1)],
    "odd, not rounded": [(11, 7), (4, 5), (3, 1), (1, 1)],
    "one column": [(9, 1), (5, 1), (3, 1)],
    "one cell": [(1, 1), (1, 1), (1, 1)],
}


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_plain_loops_give_the_same(sizes: str, level: int) -> None:
    module, maps = balance(level), random_maps(SIZES[sizes])
    before = copy.deepcopy(maps)
    found = module(maps)
    for x, want, given, kept in zip(found, by_loops(maps, module), maps, before, strict=True):
        close(x, want)
        assert torch.equal(given, kept)


@torch.no_grad()
def test_one_channel_by_hand() -> None:
    """Two cells of 0 and 2 below one of 4, refined at the finer level.

    The mean is ((0 + 4) / 2, (2 + 4) / 2) = (2, 3). With theta = 1 x, phi = ln(2) x, g = x the
    first cell's similarities are 4 ln 2 and 6 ln 2, shares 16 : 64, so it reads 0.2 * 2 + 0.8 * 3
    = 2.8; the second's are 6 ln 2 and 9 ln 2, shares 1 : 8, so it reads 26 / 9. The last
    convolution doubles and adds 1: 2 + 6.6 = 8.6 and 3 + 2 * 26 / 9 + 1 = 88 / 9. The finer level
    gets these, the coarser one the greater, 88 / 9.
    """
    module = BalancedFeatures(channels=1, refine_level=0).double()
    state = {"theta": (1.0, 0.0), "phi": (np.log(2.0), 0.0), "g": (1.0, 0.0), "out": (2.0, 1.0)}
    for name, (weight, bias) in state.items():
        layer = getattr(module, name)
        nn.init.constant_(layer.weight, weight)
        nn.init.constant_(layer.bias, bias)
    maps = [torch.tensor([[[[0.0, 2.0]]]]).double(), torch.tensor([[[[4.0]]]]).double()]
    fine, coarse = module(maps)
    close(fine.flatten(), torch.tensor([8.6, 2 + 88 / 9], dtype=torch.float64))
    close(coarse.flatten(), torch.tensor([4 + 88 / 9], dtype=torch.float64))


@torch.no_grad()
def test_last_convolution_of_zeros_is_not_the_identity() -> None:
    """The mean of all levels is added nevertheless."""
    module, maps = balance(1), random_maps([(4, 4), (2, 2), (1, 1)])
    nn.init.zeros_(module.out.weight)
    nn.init.zeros_(module.out.bias)
    pooled = maps[0].unflatten(-1, (2, 2)).amax(-1).unflatten(-2, (2, 2)).amax(-2)
    mean = (pooled + maps[1] + maps[2]) / 3
    fine, middle, coarse = module(maps)
    close(middle, maps[1] + mean)
    close(fine, maps[0] + mean.repeat_interleave(2, -1).repeat_interleave(2, -2))
    close(coarse, maps[2] + mean.amax((-2, -1), keepdim=True))


def test_a_new_block_draws_as_xavier() -> None:
    """Uniform within sqrt(6 / (C + C)) = 0.25 for C = 48; biases 0."""
    module = BalancedFeatures(channels=48, refine_level=0)
    for layer in (module.theta, module.phi, module.g, module.out):
        assert layer.weight.abs().max() <= 0.25
        assert layer.weight.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.05)
        assert not layer.bias.any()


def test_gradients_are_those_of_differences() -> None:
    module = balance(1)
    maps = [x[:1].requires_grad_() for x in random_maps([(5, 3), (3, 2), (1, 1)])]
    parameters = list(module.parameters())

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(inputs[: len(maps)]))

    assert torch.autograd.gradcheck(run, (*maps, *parameters))


def test_every_cell_hears_of_every_other() -> None:
    """Also across levels: the last cell of the finest level moves the first of the coarsest."""
    module, maps = balance(1), random_maps([(6, 6), (3, 3), (2, 2)])
    maps[0].requires_grad_()
    module(maps)[2][0, :, 0, 0].sum().backward()
    assert maps[0].grad is not None
    assert maps[0].grad[0, :, 4:, 4:].abs().max() > 0
    assert not maps[0].grad[1].any()  # another image


@torch.no_grad()
def test_bfloat16_is_close() -> None:
    module, maps = balance(1, channels=64).float(), random_maps([(8, 8), (4, 4), (2, 2)], 64)
    maps = [x.float() for x in maps]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = module([x.bfloat16() for x in maps])
    for x, want in zip(half, module(maps), strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.float(), want, rtol=0.05, atol=0.05)


# In a network.


@torch.no_grad()
def test_pyramid_is_balanced_behind_the_plain_one() -> None:
    pyramid, image = make(), torch.randn(2, 3, 64, 96).double()
    plain, found = plain_twin(pyramid)(image), pyramid(image)
    assert list(found) == list(plain)
    assert torch.equal(found["res2"], plain["res2"])
    assert pyramid.balance.refine_level == 1
    wanted = by_loops([plain[name] for name in LEVELS], pyramid.balance)
    for name, want in zip(LEVELS, wanted, strict=True):
        close(found[name], want)
        assert not torch.allclose(found[name], plain[name])


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 32), (160, 128)])
def test_some_levels_at_another_one(size: tuple[int, int]) -> None:
    """In any order; the others stay as they are. P6 of 160 x 128 is 3 x 2: an odd size."""
    options = {"balanced": ["p6", "p3", "p5"], "refine_level": "p6"}
    pyramid, image = make(**options), torch.randn(1, 3, *size).double()
    plain, found = plain_twin(pyramid)(image), pyramid(image)
    assert pyramid.balance.refine_level == 2
    for name in ("p4", "p7", "res2"):
        assert torch.equal(found[name], plain[name])
    chosen = ["p3", "p5", "p6"]
    wanted = by_loops([plain[name] for name in chosen], pyramid.balance)
    for name, want in zip(chosen, wanted, strict=True):
        close(found[name], want)


def test_names_shapes_and_paddings_are_the_plain_pyramids() -> None:
    pyramid = make(passed_on=("res2", "res4"))
    plain = plain_twin(pyramid, passed_on=("res2", "res4"))
    added = pyramid.state_dict().keys() - plain.state_dict().keys()
    layers = ("theta", "phi", "g", "out")
    assert added == {f"balance.{x}.{kind}" for x in layers for kind in ("weight", "bias")}
    assert pyramid.output_shape() == plain.output_shape()
    assert set(pyramid.output_shape()) == {*LEVELS, "res2", "res4"}
    assert pyramid.size_divisibility == plain.size_divisibility == 32
    # Older Detectron2s have no padding_constraints.
    constraints = [getattr(x, "padding_constraints", None) for x in (pyramid, plain)]
    assert constraints[0] == constraints[1]


@torch.no_grad()
def test_other_pyramids() -> None:
    """Without P6 and P7, with a P6 of maxima, and with PANet's second path below it."""
    image = torch.randn(1, 3, 64, 64).double()
    pooled = make(top_block=LastLevelMaxPool())(image)
    assert set(pooled) == {"p3", "p4", "p5", "p6", "res2"}
    bare = make(top_block=None, passed_on=())(image)
    assert set(bare) == {"p3", "p4", "p5"}

    class Both(BFP, PAFPN):
        """PANet's pyramid, balanced."""

    both = make(Both, top_block=LinearP6P7(C, C, in_feature="p5"))
    below = make(PAFPN, top_block=LinearP6P7(C, C, in_feature="p5"))
    state = both.state_dict().items()
    below.load_state_dict({k: v for k, v in state if not k.startswith("balance.")})
    maps = below(image)
    wanted = by_loops([maps[name] for name in LEVELS], both.balance)
    for name, want in zip(LEVELS, wanted, strict=True):
        close(both(image)[name], want)


@pytest.mark.parametrize("host", ["fcos", "atss", "retinanet"])
def test_every_parameter_of_a_detector_gets_a_gradient(host: str) -> None:
    """With objects, without any, and of an odd size; the recipe changes by one line."""
    cfg = tiny(get_config(f"{host}_R_50_FPN_1x"))
    cfg.model.backbone._target_ = BFP
    model = instantiate(cfg.model)
    for sizes in ([((64, 96), 3), ((33, 47), 0)], [((64, 64), 0)]):
        model.zero_grad()
        losses = model([random_input(*size) for size in sizes])
        assert all(torch.isfinite(x) for x in losses.values())
        loss_sum(losses).backward()
        assert without_gradient(model) == []
    with torch.no_grad():
        model.eval()([random_input((33, 47), 0)])


def test_size_and_cost_of_the_fact_sheet() -> None:
    """1280 x 800 pixels are 160 x 100 cells of P3 and 80 x 50 of P4.

    Four convolutions 256 x 256 at 4,000 cells are 4 * 65,536 * 4,000 = 1,048,576,000 products;
    two products of matrices 4,000 x 4,000 x 256 are 8,192,000,000. One product is two FLOPs.
    """
    with torch.device("meta"):
        module = BalancedFeatures(channels=256, refine_level=1)
        sizes = [(100, 160), (50, 80), (25, 40), (13, 20), (7, 10)]
        maps = [torch.zeros(1, 256, *size) for size in sizes]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(maps)
    assert sum(x.numel() for x in module.parameters()) == 263168
    counts = {str(name): count / 2 for name, count in counter.get_flop_counts()["Global"].items()}
    assert counts.pop("aten.convolution") == 1_048_576_000
    assert sum(counts.values()) == 8_192_000_000


# Mistakes are named.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine_level": "p2"}, r"at 'p2': balanced are \['p3', .*backbone\.refine_level"),
        ({"balanced": ["p3", "p5"]}, r"at 'p4': balanced are \['p3', 'p5'\]"),
        ({"balanced": ["res2", "p3"]}, r"\['res2', 'p3'\], but .*\['p3', .*backbone\.balanced"),
        ({"balanced": []}, r"balanced is \[\], but the pyramid has"),
    ],
)
def test_levels_that_are_not_there(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_maps_of_other_channels_or_too_few() -> None:
    module = balance(1)
    maps = random_maps([(4, 4), (2, 2)])
    other = torch.zeros(2, BOTTOM_UP_CHANNELS[0], 2, 2).double()
    with pytest.raises(ValueError, match=r"maps of \[3, 16\] channels.*with 3 each"):
        module([maps[0], other])
    with pytest.raises(ValueError, match=r"maps of \[3\].*more than 1 of them \(refine_level\)"):
        module(maps[:1])
