# SPDX-License-Identifier: Apache-2.0
"""TSCODE: its equations against plain loops, shapes, what is shared, what it leaves alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compositions import recipe
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from standins import AnchorPredictor
from torch import Tensor, nn
from tscode_loops import Pyramid, copied, rearranged, semantics, strided
from util import WIDTH, excite, loss_sum, random_input, tiny, without_gradient

from d2_decouple.config import get_config
from d2_decouple.layers.strided import HalvingConv2d
from d2_decouple.modeling import TSCODE, DenseHead, FCOSPredictor, TSCODEOptions
from d2_decouple.modeling.head import prior_bias
from d2_decouple.modeling.tscode import RearrangedClassPredictor, blocks_to_cells

HOSTS = ["fcos", "atss", "gfl"]
STRIDES = (8, 16, 32, 64, 128)
# C2, P3 to P7: odd and even sizes, down to one cell.
SIZES = [(21, 18), (11, 9), (6, 5), (3, 3), (2, 2), (1, 1)]


def random_maps(channels: int, images: int = 1, sizes: Any = SIZES) -> list[Tensor]:
    return [torch.randn(images, channels, *size, dtype=torch.float64) for size in sizes]


def plain(channels: int = 2, **options: Any) -> TSCODE:
    """Without GroupNorm, which needs 32 channels; in float64, with weights that matter."""
    context = TSCODE(channels=channels, options=TSCODEOptions(down_norm="", **options))
    for parameter in context.parameters():
        nn.init.normal_(parameter, std=0.5)
    return context.double()


def tiny_host(host: str, *changes: Any, classes: int = 3) -> nn.Module:
    """A host's shrunken detector after the functions ``model -> None``, drawn from one seed."""
    cfg = tiny(get_config(f"{host}_R_50_FPN_1x"), num_classes=classes)
    for change in changes:
        change(cfg.model)
    torch.manual_seed(7)
    return instantiate(cfg.model)


def with_tscode(**options: Any) -> Any:
    """What a recipe says."""

    def change(model: Any) -> None:
        chosen = TSCODEOptions(**options)
        model.head.context = L(TSCODE)(channels=WIDTH, options=L(TSCODEOptions)(**options))
        if chosen.reads_finer:
            model.head_in_features = ["res2", *model.head_in_features]

    return change


# --- Eq. 4 --------------------------------------------------------------------------------------


def test_eq_4_by_hand() -> None:
    """Two classes, one cell, channels 0 to 7: (0, 1) above left, (2, 3) to its right, ..."""
    cells = blocks_to_cells(torch.arange(8.0).view(1, 8, 1, 1), (2, 2))
    assert cells[0].permute(1, 2, 0).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (5, 7), (1, 1)])
def test_eq_4_by_loops_and_by_a_permuted_pixel_shuffle(size: tuple[int, int]) -> None:
    half = [(side + 1) // 2 for side in size]
    x = torch.randn(2, 4 * 3, *half)
    found = blocks_to_cells(x, size)
    for image, maps in zip(found, x.tolist(), strict=True):
        assert image.tolist() == torch.tensor(rearranged(maps, 3, size)).tolist()
    class_major = x.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(found, F.pixel_shuffle(class_major, 2)[..., : size[0], : size[1]])
    assert not torch.equal(found, F.pixel_shuffle(x, 2)[..., : size[0], : size[1]])


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_rearranged_maps_lie_channels_last(memory: torch.memory_format) -> None:
    """As the head reads them next: its permutation is then a view."""
    x = torch.randn(2, 12, 3, 4).to(memory_format=memory)
    assert blocks_to_cells(x, (6, 8)).is_contiguous(memory_format=torch.channels_last)


def test_rearranged_predictor_wants_half_the_size() -> None:
    predictor = RearrangedClassPredictor(4, 12, 3, padding=1)
    x = torch.randn(1, 4, 3, 4)
    assert predictor(x).shape == (1, 3, 6, 8)
    assert torch.equal(predictor(x, (5, 7)), predictor(x)[..., :5, :7])
    for size in [(7, 8), (6, 9), (4, 8), (3, 4)]:
        with pytest.raises(ValueError, match=rf"\(3, 4\) cells, its level \({size[0]}.*half"):
            predictor(x, size)


# --- Eqs. 3 and 5 -------------------------------------------------------------------------------


def test_eqs_3_and_5_by_loops() -> None:
    context = plain()
    maps = random_maps(2)
    with torch.no_grad():
        found_classes, found_boxes = context(maps)
    low, *levels = (x[0].tolist() for x in maps)

    def down(conv: nn.Conv2d) -> Any:
        return lambda x: strided(x, conv.weight, conv.bias, relu=True)

    pyramid = Pyramid(low, levels, down(context.dpe_down[0]))
    top = strided(levels[-1], context.sce_top.weight, context.sce_top.bias, relu=False)
    wanted = semantics(levels, [down(context.sce_down[0])(x) for x in levels], top)
    for index in range(5):
        box = torch.tensor(pyramid.levels[index], dtype=torch.float64)
        box = box + torch.tensor(pyramid.detail(index), dtype=torch.float64)
        if index < 4:  # P7 has no coarser level
            coarse = copied(levels[index + 1], 2, maps[index + 1].shape[-2:])
            box = box + torch.tensor(coarse, dtype=torch.float64)
        torch.testing.assert_close(found_boxes[index][0], box)
        classes = torch.tensor(wanted[index], dtype=torch.float64)
        torch.testing.assert_close(found_classes[index][0], classes)


def test_downsampling_is_a_convolution_without_bias_a_norm_and_a_relu() -> None:
    context = TSCODE(channels=64)
    for part in (context.sce_down, context.dpe_down):
        conv, norm, relu = part
        assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (2, 2), (1, 1))
        assert conv.bias is None
        assert isinstance(norm, nn.GroupNorm)
        assert (norm.num_groups, norm.num_channels) == (32, 64)
        assert isinstance(relu, nn.ReLU)
        x = torch.randn(2, 64, 5, 6)
        want = F.conv2d(x, conv.weight, stride=2, padding=1)
        want = F.group_norm(want, 32, norm.weight, norm.bias, norm.eps).relu()
        torch.testing.assert_close(part(x), want)
    assert context.sce_top.bias is not None
    assert not context.sce_top.bias.any()


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (2, 2)])
def test_bfloat16_gradients_on_the_smallest_maps(size: tuple[int, int], kernel: int) -> None:
    """Some CPUs leave those of taps that lie in the padding as the memory was."""
    conv = HalvingConv2d(64, 64, kernel, stride=2, padding=kernel // 2)
    exact = nn.Conv2d(64, 64, kernel, stride=2, padding=kernel // 2)
    exact.load_state_dict(conv.state_dict())
    x = torch.randn(2, 64, *size).bfloat16().float().to(memory_format=torch.channels_last)
    torch.testing.assert_close(conv(x), exact(x))
    exact(x).square().sum().backward()
    for kind in (torch.float32, torch.bfloat16):  # what the memory was
        used = [torch.full((64, 64, kernel, kernel), torch.nan, dtype=kind) for _ in range(4)]
        del used
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    out.float().square().sum().backward()
    size_of_all = exact.weight.grad.abs().max()
    assert (conv.weight.grad - exact.weight.grad).abs().max() < 0.05 * size_of_all


def test_maps_are_not_changed_in_place() -> None:
    """The pyramid is read by others, too: by an assigner, by the next level."""
    maps = random_maps(64, images=2)
    before = [x.clone() for x in maps]
    context = TSCODE(channels=64).double()
    classes, boxes = context(maps)
    sum(x.sum() for x in [*classes, *boxes]).backward()
    assert all(torch.equal(now, then) for now, then in zip(maps, before, strict=True))


# --- shapes, sharing ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(800, 1344), (736, 992), (32, 32), (64, 96), (33, 1)])
def test_shapes_of_every_level(size: tuple[int, int]) -> None:
    padded = [-(-side // 32) * 32 for side in size]
    sizes = [(-(-padded[0] // s), -(-padded[1] // s)) for s in (4, *STRIDES)]
    context = plain(channels=2)
    head = DenseHead(
        context=context,
        predictor=FCOSPredictor(num_classes=3, in_channels=2),
        strides=STRIDES,
        offset=0.5,
        cls_conv_dims=[4, 4],
        box_conv_dims=[2],
        norm="",
    )
    shapes: list[Any] = []
    head.cls_score.register_forward_hook(lambda _, inputs, out: shapes.append(out.shape))
    maps = random_maps(2, images=2, sizes=sizes)
    with torch.no_grad():
        classes, boxes = context(maps)
        predictions = head.double()(maps)
    for level, cls, box in zip(sizes[1:], classes, boxes, strict=True):
        assert cls.shape == (2, 4, (level[0] + 1) // 2, (level[1] + 1) // 2)
        assert box.shape == (2, 2, *level)
    assert shapes == [(2, 3, *level) for level in sizes[1:]]
    assert predictions.level_sizes == tuple(height * width for height, width in sizes[1:])
    assert predictions.logits.shape[1] == predictions.boxes.shape[1] == len(predictions.strides)


def test_facts() -> None:
    both = TSCODE(channels=64)
    facts = ("in_channels", "cls_channels", "box_channels", "cls_stride", "finer_levels")
    assert [getattr(both, name) for name in facts] == [64, 128, 64, 2, 1]
    semantic = TSCODE(channels=64, options=TSCODEOptions(use_dpe=False))
    assert [getattr(semantic, name) for name in facts] == [64, 128, 64, 2, 0]
    detail = TSCODE(channels=64, options=TSCODEOptions(use_sce=False))
    assert [getattr(detail, name) for name in facts] == [64, 64, 64, 1, 1]


def test_one_convolution_for_all_levels_and_another_for_the_other_task() -> None:
    context = TSCODE(channels=64)
    used: dict[str, int] = {"sce_down": 0, "dpe_down": 0, "sce_top": 0}
    for name in used:

        def count(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            used[name] += 1

        getattr(context, name).register_forward_hook(count)
    context([x.float() for x in random_maps(64, images=2)])
    assert used == {"sce_down": 5, "dpe_down": 5, "sce_top": 1}
    convs = [x for x in context.modules() if isinstance(x, nn.Conv2d)]
    assert len(convs) == 3
    assert len({x.weight.data_ptr() for x in convs}) == 3


# --- beside the host ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_without_both_halves_it_is_the_host(host: str) -> None:
    model, expected = tiny_host(host, with_tscode(use_sce=False, use_dpe=False)), tiny_host(host)
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    inputs = [random_input((64, 96), 3), random_input((101, 67), 2)]
    losses, wanted = model(inputs), expected(inputs)
    assert {name: x.item() for name, x in losses.items()} == {
        n: x.item() for n, x in wanted.items()
    }
    for one, other in zip(model.predict(inputs)[2], expected.predict(inputs)[2], strict=True):
        assert not torch.is_tensor(one) or torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("half", ["use_sce", "use_dpe"])
def test_each_half_leaves_the_other_task_alone(host: str, half: str) -> None:
    """The host's weights, and its boxes under SCE, or its logits under DPE, to the last bit."""
    expected = excite(tiny_host(host))
    model = excite(tiny_host(host, with_tscode(**{half: False})))
    shared = {
        name: value
        for name, value in expected.state_dict().items()
        if half == "use_sce" or not name.startswith(("head.cls_subnet", "head.cls_score"))
    }
    assert not model.load_state_dict(shared, strict=False).unexpected_keys
    inputs = [random_input((64, 96), 0)]
    found, wanted = model.predict(inputs)[2], expected.predict(inputs)[2]
    assert torch.equal(found.logits, wanted.logits) == (half == "use_sce")
    assert torch.equal(found.boxes, wanted.boxes) == (half == "use_dpe")
    if wanted.quality is not None:  # centerness belongs to the box branch
        assert torch.equal(found.quality, wanted.quality) == (half == "use_dpe")


@pytest.mark.parametrize("host", HOSTS)
def test_each_task_learns_from_its_levels(host: str) -> None:
    """Boxes of P_l from P_{l-1}, P_l, P_{l+1}; classes from P_l, P_{l+1}; P3's boxes from C2."""
    model = excite(tiny_host(host, with_tscode()))
    with torch.no_grad():
        features = model.predict([random_input((256, 320), 0)])[1]
    features = [x.requires_grad_() for x in features]  # C2, P3, ..., P7
    predictions = model.head(features)

    def reached(values: Tensor) -> list[int]:
        grads = torch.autograd.grad(values.sum(), features, retain_graph=True, allow_unused=True)
        return [i for i, grad in enumerate(grads) if grad is not None and grad.any()]

    sizes = list(predictions.level_sizes)
    for name, expected in {
        "logits": [[1, 2], [2, 3], [3, 4], [4, 5], [5]],
        "boxes": [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5]],
        "quality": [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5]],
    }.items():
        values = getattr(predictions, name)
        if values is not None:
            assert [reached(level) for level in values.split(sizes, dim=1)] == expected, name


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("host", HOSTS)
def test_trains_with_every_kind_of_batch(host: str, classes: int) -> None:
    model = tiny_host(host, with_tscode(), classes=classes)
    for sizes in [[((64, 96), 3), ((33, 47), 0)], [((32, 32), 0)], [((1, 1), 0), ((101, 67), 5)]]:
        model.zero_grad()
        losses = model([random_input(*item, num_classes=classes) for item in sizes])
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        loss_sum(losses).backward()
        assert without_gradient(model) == []
    excite(model).eval()
    with torch.no_grad():
        (found,) = model([random_input((64, 96), 0)])
    assert len(found["instances"])
    assert found["instances"].pred_classes.max() < classes


@pytest.mark.parametrize("host", HOSTS)
def test_every_part_moves(host: str) -> None:
    """Not only a gradient, but one that is not zero."""
    model = excite(tiny_host(host, with_tscode()), gain=0.5)
    loss_sum(model([random_input((128, 160), 12), random_input((128, 160), 6)])).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []


# --- class maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3])
def test_all_four_blocks_start_with_the_prior(classes: int) -> None:
    predictor = tiny_host("fcos", with_tscode(), classes=classes).head.cls_score
    assert predictor.weight.shape == (4 * classes, WIDTH, 3, 3)
    assert predictor.bias.tolist() == pytest.approx([prior_bias()] * 4 * classes)
    assert predictor.weight.std().item() == pytest.approx(0.01, rel=0.1)


@torch.no_grad()
def test_nine_anchors_by_loops() -> None:
    """Logit (a, k) of cell (y, x) from the four-fold map, on levels of odd sizes."""

    def anchors(model: Any) -> None:
        model.head.predictor = L(AnchorPredictor)(num_classes=2, in_channels=WIDTH)

    model = excite(instantiate(recipe(with_tscode(), anchors)))
    conv = model.head.cls_score
    assert conv.out_channels == 4 * 9 * 2
    features: list[Tensor] = []
    conv.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    predictions = model.predict([random_input((32, 160), 0)])[2]
    rows = predictions.logits[0].tolist()
    assert len(rows) == sum(predictions.level_sizes)
    for (height, width), feature in zip(
        [(4, 20), (2, 10), (1, 5), (1, 3), (1, 2)], features, strict=True
    ):
        four = F.conv2d(feature, conv.weight, conv.bias, padding=1)[0].tolist()
        for y in range(height):
            for x in range(width):
                block = (2 * (y % 2) + x % 2) * 9 * 2
                for anchor in range(9):
                    channel = block + anchor * 2
                    want = [four[channel + k][y // 2][x // 2] for k in range(2)]
                    assert rows.pop(0) == pytest.approx(want, abs=1e-5)
    assert rows == []


@torch.no_grad()
def test_pdnet_collects_from_the_rearranged_map() -> None:
    """Its predictor under TSCODE does what it does with the class maps rearranged by hand."""
    cfg = tiny(get_config("pdnet_R_50_FPN_1x"))
    with_tscode()(cfg.model)
    head = excite(instantiate(cfg.model)).double().head
    assert head.cls_score.weight.shape == (4 * 9 * 3, WIDTH, 1, 1)
    assert head.cls_score.bias is None
    maps = random_maps(WIDTH, images=2)
    found = head(maps)
    classes, boxes = head.context(maps)
    four = [F.conv2d(head.cls_subnet(x), head.cls_score.weight) for x in classes]
    rearranged_maps = [
        torch.tensor([rearranged(x, 27, level.shape[-2:]) for x in one.tolist()]).double()
        for one, level in zip(four, maps[1:], strict=True)
    ]
    seen: list[Any] = []
    head.predictor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    head(maps)
    wanted = head.predictor(rearranged_maps, [head.bbox_subnet(x) for x in boxes], seen[0][2])
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.boxes, wanted.boxes)


# --- precision ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
def test_under_autocast_boxes_are_those_of_float32(host: str) -> None:
    """On the same maps, with whole half-precision towers, less than half a pixel apart."""
    model = tiny_host(host, with_tscode())
    nn.init.normal_(model.head.predictor.bbox_pred.bias, mean=1.0, std=0.3)
    inputs = [random_input((256, 320), 0)]
    _, features, want = model.predict(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.head(features)
    assert found.boxes.dtype == found.logits.dtype == torch.float32
    assert (found.boxes - want.boxes).abs().max() < 0.5
    assert (want.boxes.bfloat16().float() - want.boxes).abs().max() > 0.9  # in 16 bits
    torch.testing.assert_close(found.logits, want.logits, rtol=0, atol=0.05)
