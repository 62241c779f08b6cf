# SPDX-License-Identifier: Apache-2.0
"""The comparison with reference numbers: the public cases, and that the tool can fail."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_tools import PUBLIC_CASES, TOOL, change_entry, load

# Made by the loops of ``tests/data/golden``: no reference implementation has them alone.
OWN_KINDS = {"deformable_points"}


@pytest.fixture(scope="module")
def golden() -> Any:
    return load(TOOL)


def test_public_cases(golden: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if not PUBLIC_CASES.is_dir():
        pytest.skip(f"no reference cases at {PUBLIC_CASES}; they are not part of a release")
    for kind in set(golden.ADAPTERS) - OWN_KINDS:
        assert golden.main([str(PUBLIC_CASES), "--only", kind]) == 0, capsys.readouterr()


# A small case, made by plain loops: two levels, an image with objects and one without.
LEVEL_SIZES = [(4, 5), (2, 3)]
STRIDES = [8, 16]
RANGES = [(-1, 12), (12, 1000)]
CLASSES = 3
BOXES = [[2.0, 3.0, 19.5, 24.0], [4.0, 4.0, 15.0, 13.0], [1.0, 0.5, 39.0, 31.0]]
LABELS = [2, 0, 1]

Location = tuple[float, float, int, tuple[int, int]]


def locations() -> Iterator[Location]:
    for (height, width), stride, limits in zip(LEVEL_SIZES, STRIDES, RANGES, strict=True):
        for i in range(height):
            for j in range(width):
                yield j * stride + stride // 2, i * stride + stride // 2, stride, limits


def distances(location: Location, box: list[float], radius: float) -> list[float] | None:
    """Left, top, right, bottom in pixels where the location is positive for the box."""
    x, y, stride, (low, high) = location
    x1, y1, x2, y2 = box
    sides = [x - x1, y - y1, x2 - x, y2 - y]
    central = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < radius * stride
    return sides if min(sides) > 0 and central and low <= max(sides) <= high else None


def targets_by_loops(norm_on_bbox: bool, radius: float) -> dict[str, np.ndarray]:
    labels, ltrb, centerness = [], [], []
    for location in locations():
        best, best_area = None, float("inf")
        for index, (x1, y1, x2, y2) in enumerate(BOXES):
            sides = distances(location, [x1, y1, x2, y2], radius)
            if sides is not None and (x2 - x1) * (y2 - y1) < best_area:
                best, best_area = (index, sides), (x2 - x1) * (y2 - y1)
        if best is None:
            labels.append(CLASSES)
            ltrb.append([0.0] * 4)
            centerness.append(0.0)
            continue
        left, top, right, bottom = best[1]
        labels.append(LABELS[best[0]])
        ltrb.append([side / (location[2] if norm_on_bbox else 1) for side in best[1]])
        across = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        centerness.append(across**0.5)
    count = len(labels)
    return {
        "labels": np.array([labels, [CLASSES] * count]),
        "ltrb": np.array([ltrb, [[0.0] * 4] * count]),
        "centerness": np.array([centerness, [0.0] * count]),
        "num_positive": np.array(sum(label < CLASSES for label in labels)),
    }


def write_case(folder: Path, center_sampling: bool = True, norm_on_bbox: bool = True) -> Path:
    """A right case of the kind ``fcos_targets``; returns the path of its json."""
    outputs = targets_by_loops(norm_on_bbox, 1.5 if center_sampling else float("inf"))
    tolerance = {"float32": {"rtol": 1e-5, "atol": 1e-5}, "float64": {"rtol": 1e-9, "atol": 1e-9}}
    exact = {dtype: {"rtol": 0.0, "atol": 0.0} for dtype in tolerance}
    entries = {
        name: {
            "npz": f"out/{name}",
            "shape": list(array.shape),
            "tolerance": exact if array.dtype.kind == "i" else tolerance,
        }
        for name, array in outputs.items()
    }
    entries["num_positive"] = {"value": int(outputs["num_positive"]), "tolerance": exact}
    header = {
        "kind": "fcos_targets",
        "seed": 1,
        "config": {
            "classes": CLASSES,
            "strides": STRIDES,
            "regress_ranges": RANGES,
            "center_sampling": center_sampling,
            "center_sample_radius": 1.5,
            "norm_on_bbox": norm_on_bbox,
        },
        "weights": {"rule": "crc32-pcg64", "entries": []},
        "inputs": {
            "level_sizes": {"value": LEVEL_SIZES},
            "gt_boxes/0": {"npz": "in/boxes", "shape": [3, 4]},
            "gt_labels/0": {"value": LABELS},
            "gt_boxes/1": {"value": []},
            "gt_labels/1": {"value": []},
        },
        "outputs": entries,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small_a.json"
    path.write_text(json.dumps(header), encoding="utf-8")
    arrays = {f"out/{name}": array for name, array in outputs.items() if array.ndim}
    np.savez(path.with_suffix(".npz"), **{"in/boxes": np.array(BOXES, np.float32)}, **arrays)
    return path


def change_json(path: Path, **changes: Any) -> None:
    for dotted, value in changes.items():
        change_entry(path, dotted.split("__"), value)


def change_arrays(path: Path, drop: str = "", **replaced: np.ndarray) -> None:
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = {name: stored[name] for name in stored.files if name != drop}
    arrays.update({name.replace("__", "/"): array for name, array in replaced.items()})
    np.savez(path.with_suffix(".npz"), **arrays)


@pytest.mark.parametrize("center_sampling", [True, False])
@pytest.mark.parametrize("norm_on_bbox", [True, False])
def test_right_case_passes(
    golden: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    center_sampling: bool,
    norm_on_bbox: bool,
) -> None:
    write_case(tmp_path, center_sampling, norm_on_bbox)
    assert golden.main([str(tmp_path), "--only", "fcos_targets"]) == 0
    table = capsys.readouterr().out
    for name in ("labels", "ltrb", "centerness", "num_positive"):
        assert f"{name} float32" in table
        assert f"{name} float64" in table


def test_small_case_has_something_to_tell() -> None:
    """Every box wins somewhere, both levels have positives, and ambiguous locations exist."""
    labels = targets_by_loops(True, 1.5)["labels"][0]
    assert set(labels) == {0, 1, 2, CLASSES}
    assert (labels[:20] < CLASSES).any()
    assert (labels[20:] < CLASSES).any()
    claims = [
        sum(distances(location, box, 1.5) is not None for box in BOXES) for location in locations()
    ]
    assert max(claims) >= 2


@pytest.mark.parametrize("output", ["labels", "ltrb", "centerness"])
def test_changed_number_fails(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    path = write_case(tmp_path)
    array = targets_by_loops(True, 1.5)[output]
    array[0].flat[-1] += 1 if output == "labels" else 1e-4
    change_arrays(path, **{f"out__{output}": array})
    assert golden.main([str(tmp_path)]) == 1
    exceeded = [x for x in capsys.readouterr().out.splitlines() if x.endswith("EXCEEDED")]
    assert [line.split()[:2] for line in exceeded] == [[output, "float32"], [output, "float64"]]


def test_tolerance_of_its_own_precision(golden: Any, tmp_path: Path) -> None:
    """1e-7 is less than float32 may deviate and more than float64 may."""
    path = write_case(tmp_path)
    change_arrays(path, out__ltrb=targets_by_loops(True, 1.5)["ltrb"] + 1e-7)
    rows = {row.output: row for row in golden.verify(golden.load_case(path))}
    assert rows["ltrb float32"].share < 1 < rows["ltrb float64"].share
    assert rows["ltrb float64"].deviation == pytest.approx(1e-7, rel=1e-3)


def test_nan_fails(golden: Any, tmp_path: Path) -> None:
    path = write_case(tmp_path)
    array = targets_by_loops(True, 1.5)["centerness"]
    array[1, 3] = np.nan
    change_arrays(path, out__centerness=array)
    assert golden.main([str(tmp_path)]) == 1


def test_scalar_output_is_compared(golden: Any, tmp_path: Path) -> None:
    path = write_case(tmp_path)
    count = int(targets_by_loops(True, 1.5)["num_positive"])
    change_json(path, outputs__num_positive__value=count + 1)
    assert golden.main([str(tmp_path)]) == 1


DAMAGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown kind": ({"kind": "fcos_dreams"}, ["'fcos_dreams'", "fcos_targets"]),
    "missing kind": ({"kind": None}, ["'kind'", "small_a.json"]),
    "missing setting": ({"config__strides": None}, ["'strides'", "small_a.json"]),
    "missing tolerance": ({"outputs__ltrb__tolerance__float64": None}, ["'float64'"]),
    "missing input": ({"inputs__gt_labels/1": None}, ["'gt_labels/1'"]),
    "unknown array": ({"outputs__ltrb__npz": "out/rtlb"}, ["'out/rtlb'", "'ltrb'", ".npz"]),
    "other shape": ({"outputs__ltrb__shape": [2, 4]}, ["'ltrb'", "[2, 4]", "[2, 26, 4]"]),
    "another output": (
        {"outputs__dreams": {"value": 1, "tolerance": {}}},
        ["'dreams'", "not compared", "centerness"],
    ),
    "output of other shape": ({"outputs__num_positive__value": [4]}, ["'num_positive'", "(1,)"]),
    "no outputs": ({"outputs": {}}, ["nothing to compare"]),
    "unknown rule": (
        {"inputs__level_sizes": {"rule": "dice", "name": "x", "shape": [2, 2]}},
        ["'dice'", "crc32-pcg64"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_case_fails(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    changes, named = DAMAGES[damage]
    change_json(write_case(tmp_path), **changes)
    assert golden.main([str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert all(part in message for part in named), message


def test_missing_array_and_file_fail(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_case(tmp_path)
    change_arrays(path, drop="out/ltrb")
    assert golden.main([str(tmp_path)]) == 1
    assert "'out/ltrb'" in capsys.readouterr().err
    path.with_suffix(".npz").unlink()
    assert golden.main([str(tmp_path)]) == 1
    assert "small_a.npz: missing" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_cut_off_file_fails(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path = write_case(tmp_path).with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-200])
    assert golden.main([str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"small_a{suffix}" in message
    assert "damaged" in message


def test_one_bad_case_does_not_hide_behind_good_ones(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path).rename(tmp_path / "good_z.json")
    (tmp_path / "small_a.npz").rename(tmp_path / "good_z.npz")
    change_json(write_case(tmp_path), kind="fcos_dreams")
    assert golden.main([str(tmp_path)]) == 1
    assert "good_z (fcos_targets)" in capsys.readouterr().out  # the others are still reported
    assert golden.main([str(tmp_path), "--only", "fcos_targets"]) == 0


def test_empty_folder_and_unknown_only_fail(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert golden.main([str(tmp_path)]) == 1
    assert "no case" in capsys.readouterr().err
    assert golden.main([str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    change_json(write_case(tmp_path), kind="fcos_dreams")
    assert golden.main([str(tmp_path), "--only", "fcos_targets"]) == 1
    assert "no case of kind 'fcos_targets'" in capsys.readouterr().err
    assert golden.main([str(tmp_path), "--only", "fcos_dreams"]) == 1
    message = capsys.readouterr().err
    assert "unknown kind 'fcos_dreams'" in message
    assert "fcos_targets" in message


def test_left_out_outputs_are_printed(
    golden: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_case(tmp_path)
    change_arrays(path, out__ltrb=np.full((2, 26, 4), 7.0))
    adapter = golden.ADAPTERS["fcos_targets"]
    lenient = adapter._replace(not_compared=(("lt*", "other unit"),))
    monkeypatch.setitem(golden.ADAPTERS, "fcos_targets", lenient)
    assert golden.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ltrb float32" not in out
    assert "not compared: other unit" in out
    careless = adapter._replace(not_compared=(("*", "no time"),))
    monkeypatch.setitem(golden.ADAPTERS, "fcos_targets", careless)
    assert golden.main([str(tmp_path)]) == 1


def test_generated_inputs_and_weights(golden: Any, tmp_path: Path) -> None:
    """The rule, with numbers of its own: crc32("feature/p3") = 0x5a1abd66."""
    path = write_case(tmp_path)
    rule = {"rule": "crc32-pcg64", "name": "feature/p3", "shape": [2, 3], "scale": 2.0}
    change_json(
        path,
        seed=20901,
        inputs__plain={**rule, "offset": 0.5},
        inputs__positive={**rule, "offset": 0.5, "transform": "relu"},
        inputs__share={**rule, "offset": 0.5, "transform": "sigmoid"},
        inputs__wrong={**rule, "offset": 0.5, "transform": "tanh"},
        weights={"rule": "crc32-pcg64", "entries": [["feature/p3", [2, 3], 2.0, 0.5]]},
    )
    case = golden.load_case(path)
    draws = np.random.Generator(np.random.PCG64(20901 ^ 0x5A1ABD66)).standard_normal((2, 3))
    want = torch.from_numpy(0.5 + 2.0 * draws)
    plain = case.tensor("plain", torch.float64)
    torch.testing.assert_close(plain, want, rtol=0, atol=0)
    assert torch.equal(case.weights(torch.float64)["feature/p3"], plain)
    assert case.weights(torch.float32)["feature/p3"].dtype == torch.float32
    assert torch.equal(case.tensor("positive"), want.clamp(min=0))
    torch.testing.assert_close(case.tensor("share"), want.sigmoid())
    with pytest.raises(golden.GoldenError, match=r"tanh.*identity"):
        case.tensor("wrong")


def test_exit_status_of_the_command(tmp_path: Path) -> None:
    path = write_case(tmp_path)
    change_arrays(path, out__ltrb=targets_by_loops(True, 1.5)["ltrb"] + 1)
    command = [sys.executable, str(TOOL), str(tmp_path), "--only", "fcos_targets"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "EXCEEDED" in done.stdout
