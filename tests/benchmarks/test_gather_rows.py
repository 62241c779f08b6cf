# SPDX-License-Identifier: Apache-2.0
"""The benchmark's rows of the gather operator: fair on a small image, with the agreed targets."""

import pytest
import torch
from torch import Tensor

from d2_decouple.benchmarks import gather
from d2_decouple.benchmarks.gather_references import by_embedding_bag, by_sparse_matrix
from d2_decouple.layers.point_gather import dynamic_point_gather

# "ours takes at most so much of the reference's time": speed-ups as they were agreed.
SPEED_UPS = {
    "pdnet_gather_forward": 6,
    "pdnet_gather_forward_backward": 7,
    "pdnet_gather_forward_scattered": 4,
    "pdnet_gather_forward_backward_scattered": 5,
    "pdnet_gather_forward_vs_sparse": 2,
    "pdnet_gather_forward_vs_clone": 2,
    "pdnet_gather_forward_vs_embedding_bag": 1,
    "salt_gather_forward_backward": 1.5,
    "salt_gather_forward_backward_cuda": 1,
    "pdnet_gather_forward_cuda": 3,
    "pdnet_gather_forward_bfloat16_cuda": 3,
}
SAME_NUMBERS = [
    name for name, row in gather.ROWS.items() if row.device == "cpu" and "clone" not in name
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels; the smaller has one column, and most of its points lie partly outside."""
    monkeypatch.setattr(gather, "_SIZES", ((9, 7), (4, 1)))
    monkeypatch.setattr(gather, "_CLASSES", 5)
    monkeypatch.setattr(gather, "_CHANNELS", 6)


@pytest.mark.parametrize(("name", "speed_up"), SPEED_UPS.items())
def test_targets_are_the_agreed_ones(name: str, speed_up: float) -> None:
    assert gather.ROWS[name].target == pytest.approx(1 / speed_up)


def test_memory_has_targets_too() -> None:
    assert gather.ROWS["salt_gather_forward_backward"].peak_target == 1
    assert gather.ROWS["pdnet_gather_forward_cuda"].floor_target == 1.5


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", SAME_NUMBERS)
def test_both_sides_compute_the_same_numbers(name: str) -> None:
    row = gather.ROWS[name]
    ours, reference = list(row.ours()()), list(row.reference()())
    if name.startswith("salt"):  # offsets are (y, x) in one dimension
        reference = [
            offsets.unflatten(1, (-1, 2)).flip(2) if points.dim() == 5 else offsets
            for points, offsets in zip(ours, reference, strict=True)
        ]
    levels = len(gather._SIZES)
    assert len(ours) == (2 * levels if "backward" in name else levels) + name.startswith("salt")
    for one, other in zip(ours, reference, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.usefixtures("small")
def test_each_side_has_the_layout_that_its_row_states() -> None:
    def levels(planes: bool) -> list[tuple[Tensor, Tensor]]:
        return gather._levels(6, scattered=False, planes=planes, device="cpu", dtype=torch.float32)

    for (maps, points), (planes, plain_points) in zip(levels(False), levels(True), strict=True):
        assert maps.is_contiguous(memory_format=torch.channels_last)
        assert points.permute(0, 3, 4, 1, 2).is_contiguous()
        assert planes.is_contiguous()
        assert plain_points.is_contiguous()
        assert torch.equal(maps, planes)
        assert torch.equal(points, plain_points)
    assert "ours channels-last, theirs contiguous" in gather.ROWS["pdnet_gather_forward"].setting


def test_points_lie_where_their_row_says() -> None:
    generator = torch.Generator().manual_seed(0)
    near = gather._random_points((40, 30), False, generator)
    y, x = torch.meshgrid(torch.arange(40), torch.arange(30), indexing="ij")
    away = (near - torch.stack((x, y))).abs()
    assert 1.99 < away.max() <= 2
    scattered = gather._random_points((40, 30), True, generator)
    for axis, size in ((0, 30), (1, 40)):
        along = scattered[:, :, axis]
        assert -0.5 <= along.min() < -0.4
        assert size - 0.6 < along.max() <= size - 0.5


@pytest.mark.parametrize(
    ("backward", "dtype", "megabytes"),
    [
        (False, torch.float32, 73.3),
        (True, torch.float32, 73.3 + 139.4),
        (False, torch.bfloat16, 37.5),
        (True, torch.bfloat16, 37.5 + 71.3),
    ],
)
def test_least_bytes_are_those_of_the_paper_sheet(
    backward: bool, dtype: torch.dtype, megabytes: float
) -> None:
    """22,400 cells of 720 channels and 80 results, 18 coordinates always in float32."""
    assert gather._least_bytes(backward, dtype) / 1e6 == pytest.approx(megabytes, abs=0.1)


@pytest.mark.parametrize("collect", [by_sparse_matrix, by_embedding_bag])
def test_references_read_zero_outside(collect: gather.Gather) -> None:
    """Among and beyond the cells, and far outside."""
    maps = torch.randn(1, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    maps = maps.contiguous(memory_format=torch.channels_last)
    along = torch.tensor([-30.0, -1.5, -1.0, -0.5, 0.0, 0.25, 3.0, 3.5, 4.0, 4.75, 5.0, 99.0])
    y, x = torch.meshgrid(along, along, indexing="ij")
    points = torch.stack((x, y)).expand(1, 2, 2, *x.shape)
    want = dynamic_point_gather(maps, points, "sum")
    torch.testing.assert_close(collect(maps, points), want)
