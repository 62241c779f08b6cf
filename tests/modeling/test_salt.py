# SPDX-License-Identifier: Apache-2.0
"""SALT's points and what is read at them: the fact sheet's numbers, loops, torchvision."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from salt_loops import box_points
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from d2_decouple.layers.points import grid_cells, make_grid
from d2_decouple.modeling.point_alignment import PointAlignment
from d2_decouple.modeling.salt import (
    SALT,
    AlignedPoints,
    SALTOptions,
    boundary_aware_points,
)

DTYPES = [torch.float32, torch.float64]
SIZES = [(7, 9), (2, 2), (1, 1), (1, 5)]
# The authors' tap of each of our points, and their fraction of each of ours.
TAPS = [3, 1, 5, 7, 0, 2, 4, 6, 8]
FRACTIONS = [0, 1, 2, 3, *(4 + 2 * i + axis for i in range(5) for axis in (1, 0))]


def by_loops(distances: Tensor, fractions: Tensor) -> Tensor:
    """(..., 9, 2) from our fractions, put into the authors' order, and points put into ours."""
    theirs = fractions[..., [FRACTIONS.index(i) for i in range(14)]]
    found = [
        [box_points(sides, scales)[tap][::-1] for tap in TAPS]
        for sides, scales in zip(
            distances.reshape(-1, 4).tolist(), theirs.reshape(-1, 14).tolist(), strict=True
        )
    ]
    return torch.tensor(found, dtype=distances.dtype).view(*distances.shape[:-1], 9, 2)


def random_points(size: tuple[int, int], images: int = 2, **kind: Any) -> Tensor:
    """(N, H, W, 9, 2) relative, up to a few cells out of the map."""
    share = torch.rand(images, *size, 9, 2, **kind)
    target = share * torch.tensor([size[1] + 3.0, size[0] + 3.0]) - 2
    cells = grid_cells(size, device=torch.device("cpu"), dtype=target.dtype)
    return (target - cells.view(*size, 1, 2)).to(share)


def deformed(feature: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    """torchvision's, in the authors' order: y before x, points by taps, less the kernel's grid."""
    taps = [TAPS.index(tap) for tap in range(9)]
    theirs = points[..., taps, :].flip(-1)  # (N, H, W, 9, 2), (y, x)
    grid = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2)).to(points)
    offsets = (theirs - grid).flatten(3).permute(0, 3, 1, 2)
    weight = weight.flatten(2)[..., taps].view_as(weight)
    return deform_conv2d(feature, offsets, weight, padding=1)


# --- points -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_golden_points_of_the_fact_sheet(dtype: torch.dtype) -> None:
    """Sides 1, 2, 3, 4 and fractions 1/20, 2/20, ... in the authors' order."""
    theirs = torch.arange(1, 15, dtype=dtype) / 20
    points = boundary_aware_points(torch.tensor([1, 2, 3, 4], dtype=dtype), theirs[FRACTIONS])
    by_taps = [points[TAPS.index(tap)].flip(-1).tolist() for tap in range(9)]
    wanted = [
        *((-0.5, 0.2), (-2, -0.6), (0.1, 0.6)),
        *((-1.7, -1), (0.7, 1.0), (-1.1, 3)),
        *((1.3, 1.4), (4, -0.2), (1.9, 1.8)),
    ]
    torch.testing.assert_close(torch.tensor(by_taps), torch.tensor(wanted), rtol=0, atol=1e-6)
    assert points.dtype == dtype


def test_points_by_loops() -> None:
    distances = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 5
    distances[0, 0, 0] = 0
    distances[0, 1, :, 2] = 0
    fractions = torch.rand(2, 3, 4, 14, dtype=torch.float64)
    points = boundary_aware_points(distances, fractions)
    torch.testing.assert_close(points, by_loops(distances, fractions))
    assert not points[0, 0, 0].any()  # all of them collapse


@pytest.mark.parametrize("num_points", [4, 5, 9, 16])
def test_any_number_of_points(num_points: int) -> None:
    """One on each side, in the order left, top, right, bottom; the others inside."""
    distances = torch.rand(50, 4, dtype=torch.float64) * 5
    points = boundary_aware_points(
        distances, torch.rand(50, 2 * num_points - 4, dtype=torch.float64)
    )
    assert points.shape == (50, num_points, 2)
    low, high = -distances[:, None, :2], distances[:, None, 2:]
    for point, (axis, edge) in enumerate([(0, low), (1, low), (0, high), (1, high)]):
        torch.testing.assert_close(points[:, point, axis], edge[:, 0, axis])
    assert (points >= low - 1e-9).all()
    assert (points <= high + 1e-9).all()
    inside = points[:, 4:]
    assert ((inside > low) & (inside < high)).all()


@pytest.mark.parametrize("class_points", ["product", "sum", "free", "box"])
def test_class_points_by_hand(class_points: str) -> None:
    """A cell whose box branch says (0.5, -2), and whose class branch says (ln 3, -1)."""
    aligner = SALT(
        channels=1, num_levels=1, norm="", options=SALTOptions(class_points=class_points)
    )
    feature = torch.ones(1, 1, 1, 1)
    if class_points != "box":
        nn.init.zeros_(aligner.vector_pred.weight)
        vector = torch.tensor([3.0]).log().item()
        aligner.vector_pred.bias.data = torch.tensor([vector, -1.0]).repeat(9)
    found = aligner._class_points(feature, torch.tensor([0.5, -2.0]).expand(1, 1, 1, 9, 2))
    wanted = {
        "product": [0.5 * 3, -2 / 2.718281828],
        "sum": [0.5 + 1.098612289, -3],
        "free": [1.098612289, -1],
        "box": [0.5, -2],
    }[class_points]
    torch.testing.assert_close(found, torch.tensor(wanted).expand(1, 1, 1, 9, 2))


# --- alignment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_is_torchvision_s_deformable_convolution(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Values and gradients of features, points and weight."""
    alignment = PointAlignment(channels=4, num_points=9, norm="").to(dtype)
    nn.init.normal_(alignment.conv.weight)
    assert alignment.conv.weight.shape == (4, 4, 3, 3)
    feature = torch.randn(2, 4, *size, dtype=dtype, requires_grad=True)
    points = random_points(size, dtype=dtype).requires_grad_()
    inputs = [feature, points, alignment.conv.weight]
    got, want = alignment(feature, points), deformed(*inputs).relu()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert (got > 0).any()
    upstream = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(want, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("num_points", "kernel"), [(4, (2, 2)), (6, (1, 6)), (9, (3, 3))])
def test_kernel_of_any_number_of_points(num_points: int, kernel: tuple[int, int]) -> None:
    """Each point has a weight of its own, in the order of the kernel's rows."""
    alignment = PointAlignment(channels=2, num_points=num_points, norm="")
    assert tuple(alignment.conv.kernel_size) == kernel
    alignment.conv.weight.data.zero_()
    alignment.conv.weight.data.flatten(2)[0, 0] = torch.arange(1.0, num_points + 1)
    points = torch.full((1, 1, 3, num_points, 2), 50.0)
    feature = torch.tensor([1.0, 2, 3]).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    for point in range(num_points):
        moved = points.clone()
        moved[..., point, :] = torch.tensor([1.0, 0])  # the cell to the right
        wanted = [2 * (point + 1.0), 3 * (point + 1), 0]
        torch.testing.assert_close(alignment(feature, moved)[0, 0, 0], torch.tensor(wanted))


@pytest.mark.parametrize("class_points", ["product", "sum", "free", "box"])
@pytest.mark.parametrize("use_skip", [True, False])
def test_whole_aligner_step_by_step(class_points: str, use_skip: bool) -> None:
    """Every convolution, norm and ReLU of the fact sheet's section 3, by torch's functions."""
    options = SALTOptions(class_points=class_points, use_skip=use_skip)
    aligner = SALT(channels=64, num_levels=2, options=options).double()
    for parameter in aligner.parameters():
        middle, spread = (0.0, 0.06) if parameter.dim() == 4 else (0.5, 0.5)
        nn.init.normal_(parameter, mean=middle, std=spread)
    state = aligner.state_dict()
    feature, cls, box = (torch.randn(2, 64, 5, 6, dtype=torch.float64) for _ in range(3))

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def activated(x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-5).relu()

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    def read(x: Tensor, points: Tensor, name: str) -> Tensor:
        return activated(deformed(x, points, state[f"{name}.conv.weight"]), f"{name}.norm")

    hidden = activated(conv(box, "coarse_subnet.0"), "coarse_subnet.1")
    distances = rows(conv(hidden, "coarse_pred").relu() * state["scales"][1])
    fractions = rows(conv(hidden, "fraction_pred").sigmoid())
    points = by_loops(distances, fractions)
    post = cls + feature if use_skip else cls
    moved = points
    if class_points != "box":
        vectors = activated(conv(post, "vector_subnet.0"), "vector_subnet.1")
        vectors = rows(conv(vectors, "vector_pred")).unflatten(-1, (9, 2))
        moved = {
            "product": vectors.exp() * points,
            "sum": vectors + points,
            "free": vectors,
        }[class_points]
    got_cls, got_box, extras = aligner(feature, cls, box, 1)
    assert (distances == 0).any()
    assert (distances > 0).any()
    torch.testing.assert_close(extras.distances, distances)
    torch.testing.assert_close(extras.fractions, fractions)
    torch.testing.assert_close(extras.box_points, points)
    torch.testing.assert_close(extras.class_points, moved)
    torch.testing.assert_close(got_box, read(box, points, "box_align"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_cls, read(post, moved, "cls_align"), rtol=1e-9, atol=1e-9)


def test_inputs_are_not_changed_in_place() -> None:
    aligner = SALT(channels=64, num_levels=1)
    maps = [torch.randn(1, 64, 4, 4) for _ in range(3)]
    before = [x.clone() for x in maps]
    aligner(*maps, 0)
    assert all(torch.equal(now, then) for now, then in zip(maps, before, strict=True))


# --- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_decode_by_hand(offset: float) -> None:
    """Cell (1, 0) of the second level, 16 pixels a cell: sides 1, 2, 3, 4."""
    aligner = SALT(channels=1, num_levels=2, norm="")
    sizes = [(2, 3), (1, 2)]
    grid = make_grid(sizes, [8, 16], offset, device=torch.device("cpu"), dtype=torch.float32)
    extras = []
    for size in sizes:
        distances = torch.arange(1.0, 5).expand(2, *size, 4)
        fractions = torch.full((2, *size, 14), 0.5)
        points = boundary_aware_points(distances, fractions)
        vectors = torch.tensor([3.0, -1.0]).expand_as(points)
        extras.append(AlignedPoints(distances, fractions, points, vectors))
    found = aligner.decode(extras, grid)
    assert found.keys() == {"coarse_boxes", "box_points", "class_points"}
    assert found["coarse_boxes"].shape == (2, 8, 4)
    assert found["box_points"].shape == found["class_points"].shape == (2, 8, 9, 2)
    x, y = 16 + 16 * offset, 16 * offset
    assert found["coarse_boxes"][1, 7].tolist() == [x - 16, y - 32, x + 48, y + 64]
    left, top, right, bottom, middle = found["box_points"][1, 7, :5].tolist()
    assert left == [x - 16, y + 16]
    assert top == [x + 16, y - 32]
    assert right == [x + 48, y + 16]
    assert bottom == [x + 16, y + 64]
    assert middle == [x + 16, y + 16]
    assert found["class_points"][1, 7].tolist() == [[x + 48, y - 16]] * 9
    x, y = 8 * (2 + offset), 8 * (1 + offset)  # the first level's last cell, 8 pixels
    assert found["coarse_boxes"][0, 5].tolist() == [x - 8, y - 16, x + 24, y + 32]


# --- how it begins ------------------------------------------------------------------------------


def test_it_begins_as_the_authors_does() -> None:
    """Weights of deviation 0.01, biases 0, norms and scales 1; so points stay near their cell."""
    aligner = SALT(channels=256, num_levels=5)
    for name, parameter in aligner.named_parameters():
        if parameter.dim() == 4:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.1), name
            assert abs(parameter.mean().item()) < 1e-3, name
        else:
            value = 0.0 if name.endswith("bias") else 1.0
            assert (parameter == value).all(), name
    convs = [x for x in aligner.modules() if isinstance(x, nn.Conv2d)]
    with_bias = [x.bias is not None for x in convs]
    assert sum(with_bias) == 5
    maps = [torch.randn(1, 256, 12, 12).relu() for _ in range(3)]
    with torch.no_grad():
        _, _, extras = aligner(*maps, 0)
    zero = (extras.distances == 0).float().mean().item()
    assert 0.05 < zero < 0.95
    assert extras.box_points.abs().max() < 2.5
    assert extras.fractions.mean().item() == pytest.approx(0.5, abs=0.15)
    assert torch.isfinite(extras.class_points).all()


def test_coarse_boxes_can_begin_with_sides() -> None:
    aligner = SALT(channels=64, num_levels=1, options=SALTOptions(coarse_bias=2.0))
    assert (aligner.coarse_pred.bias == 2).all()
    assert not aligner.fraction_pred.bias.any()
    with torch.no_grad():
        _, _, extras = aligner(*[torch.randn(1, 64, 6, 6) for _ in range(3)], 0)
    assert (extras.distances > 0).all()


def test_names_and_shapes_of_parameters() -> None:
    """One for one with the authors' (fact sheet, section 10), but for the scales of five levels."""
    found = {
        name: tuple(x.shape) for name, x in SALT(channels=64, num_levels=5).state_dict().items()
    }
    square, vector = (64, 64, 3, 3), (64,)
    wanted: dict[str, tuple[int, ...]] = {"scales": (5,)}
    for subnet in ("coarse_subnet", "vector_subnet"):
        wanted |= {f"{subnet}.0.weight": square, f"{subnet}.0.bias": vector}
        wanted |= {f"{subnet}.1.weight": vector, f"{subnet}.1.bias": vector}
    for name, outputs in (("coarse_pred", 4), ("fraction_pred", 14), ("vector_pred", 18)):
        wanted |= {f"{name}.weight": (outputs, 64, 3, 3), f"{name}.bias": (outputs,)}
    for name in ("box_align", "cls_align"):
        wanted |= {f"{name}.conv.weight": square}
        wanted |= {f"{name}.norm.weight": vector, f"{name}.norm.bias": vector}
    assert found == wanted


def test_variants_have_no_parameter_too_many() -> None:
    base = SALT(channels=64, num_levels=5).state_dict()
    for class_points in ("sum", "free"):
        options = SALTOptions(class_points=class_points, use_skip=False)
        assert SALT(channels=64, num_levels=5, options=options).state_dict().keys() == base.keys()
    own = SALT(channels=64, num_levels=5, options=SALTOptions(class_points="box")).state_dict()
    assert base.keys() - own.keys() == {x for x in base if x.startswith("vector_")}
    twelve = SALT(channels=64, num_levels=5, num_points=12)
    assert twelve.fraction_pred.out_channels == 20
    assert twelve.vector_pred.out_channels == 24
    assert twelve.cls_align.conv.weight.shape == (64, 64, 1, 12)
