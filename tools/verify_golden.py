# SPDX-License-Identifier: Apache-2.0
"""Compare this package with numbers from reference implementations: ``verify_golden.py DIR``.

DIR holds cases of two files each: ``NAME.json`` says what the case is (kind, configuration,
inputs, outputs with tolerances) and ``NAME.npz`` holds its arrays. An input is a stored array, a
literal value, or drawn from the case's seed by a rule; an output is an array or a literal value.

Every case runs in float32 and in float64. What comes out is a table with the largest deviation
of each output beside its tolerance, and the exit status: 0 if all are met, 1 otherwise. A case
that cannot be compared counts as failed: unknown kind, damaged file, output without counterpart.

To add a kind: write a function ``(case, dtype) -> {output name: tensor}`` that runs public parts
of the package and translates *their results* into the case's conventions, and enter it into
``ADAPTERS``, together with the outputs that are left out on purpose, and why.
"""

import argparse
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2_decouple.layers.points import boxes_to_distances, grid_locations, squares
from d2_decouple.modeling import FCOSAssigner
from d2_decouple.structures import DensePredictions, foreground

__all__ = ["ADAPTERS", "Adapter", "Case", "GoldenError", "load_case", "main"]


class GoldenError(ValueError):
    """A case that cannot be compared; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Case:
    """One case as its two files describe it."""

    path: Path
    kind: str
    seed: int
    config: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, Mapping[str, Any]]
    weight_entries: list[tuple[str, list[int], float, float]]
    arrays: Mapping[str, np.ndarray]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The input ``name``, in ``dtype`` if that is given."""
        return torch.as_tensor(self.array(name, self.inputs[name])).to(dtype=dtype)

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters by their names in the reference implementation."""
        return {
            name: torch.as_tensor(self._draw(name, shape, scale, offset)).to(dtype)
            for name, shape, scale, offset in self.weight_entries
        }

    def array(self, name: str, entry: Mapping[str, Any]) -> np.ndarray:
        """The numbers that an entry of ``inputs`` or ``outputs`` stands for."""
        if "value" in entry:
            return np.asarray(entry["value"])
        if "rule" in entry:
            _require(self.path, f"rule of {name!r}", entry["rule"], ("crc32-pcg64",))
            transform = entry.get("transform", "identity")
            _require(self.path, f"transform of {name!r}", transform, TRANSFORMS)
            drawn = self._draw(entry["name"], entry["shape"], entry["scale"], entry["offset"])
            return TRANSFORMS[transform](drawn)
        key = entry["npz"]
        _require(self.path.with_suffix(".npz"), f"array of {name!r}", key, self.arrays)
        if list(self.arrays[key].shape) != list(entry["shape"]):
            raise GoldenError(
                f"{self.path}: {name!r} shall have shape {entry['shape']}, the array {key!r} has "
                f"{list(self.arrays[key].shape)}"
            )
        return self.arrays[key]

    def _draw(self, name: str, shape: list[int], scale: float, offset: float) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(self.seed ^ zlib.crc32(name.encode())))
        return np.asarray(offset + scale * generator.standard_normal(shape))


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def _require(path: Path, what: str, got: str, known: Collection[str]) -> None:
    if got not in known:
        raise GoldenError(f"{path}: {what} is {got!r}; known are {sorted(known)}")


def load_case(path: Path) -> Case:
    """Read ``NAME.json`` and the ``NAME.npz`` beside it.

    Raises:
        GoldenError: one of them is missing or damaged.
    """
    header = _read_json(path)
    weights = header["weights"]
    if weights["entries"]:
        _require(path, "rule of the weights", weights["rule"], ("crc32-pcg64",))
    return Case(
        path=path,
        kind=header["kind"],
        seed=header["seed"],
        config=header["config"],
        inputs=header["inputs"],
        outputs=header["outputs"],
        weight_entries=weights["entries"],
        arrays=_read_arrays(path.with_suffix(".npz")),
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    class Section(dict[str, Any]):
        def __missing__(self, key: str) -> Any:
            raise GoldenError(f"{path}: no {key!r} where one is needed; there are {sorted(self)}")

    try:
        header = json.loads(path.read_text(encoding="utf-8"), object_hook=Section)
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: damaged or not readable: {error}") from error
    if not isinstance(header, Section):
        raise GoldenError(f"{path}: damaged, an object with the key 'kind' is wanted")
    return header


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise GoldenError(f"{path}: missing; {path.stem}.json needs it")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise GoldenError(f"{path}: damaged or not readable: {error}") from error


def fcos_targets(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """FCOS's labels, distances and centerness of every location.

    Locations lie at stride // 2 in their cell; the distances are counted in strides (in pixels
    without ``norm_on_bbox``) and are zero on background.
    """
    config = case.config
    sizes = [(height, width) for height, width in case.tensor("level_sizes").tolist()]
    gt_instances = _gt_instances(case)
    predictions = _blank_predictions(sizes, config, len(gt_instances), dtype)
    assigner = FCOSAssigner(
        num_classes=config["classes"],
        radius=_radius(config, gt_instances),
        size_ranges=config["regress_ranges"],
    )
    features = [torch.empty(len(gt_instances), 0, *size) for size in sizes]
    targets = assigner(features, predictions, gt_instances)

    positive = foreground(targets.labels, config["classes"])
    distances = boxes_to_distances(predictions.locations, targets.boxes)
    if config["norm_on_bbox"]:
        distances = distances / predictions.strides[:, None]
    return {
        "labels": targets.labels,
        "ltrb": torch.where(positive[..., None], distances, 0),
        "centerness": targets.quality,
        "num_positive": positive.sum(),
    }


def _gt_instances(case: Case) -> list[Instances]:
    """``gt_boxes/n`` and ``gt_labels/n`` of all images n (the assigner reads no image size)."""
    count = sum(name.startswith("gt_boxes/") for name in case.inputs)
    return [
        Instances(
            (0, 0),
            gt_boxes=Boxes(case.tensor(f"gt_boxes/{image}").reshape(-1, 4)),
            gt_classes=case.tensor(f"gt_labels/{image}").long(),
        )
        for image in range(count)
    ]


def _blank_predictions(
    sizes: list[tuple[int, int]], config: Mapping[str, Any], images: int, dtype: torch.dtype
) -> DensePredictions:
    """The geometry of the locations, with zeros where a network would have predicted."""
    levels = [
        grid_locations(size, stride, (stride // 2) / stride, dtype=dtype)
        for size, stride in zip(sizes, config["strides"], strict=True)
    ]
    locations = torch.cat(levels)
    strides = torch.cat(
        [locations.new_full((len(x),), s) for x, s in zip(levels, config["strides"], strict=True)]
    )
    return DensePredictions(
        logits=locations.new_zeros(images, len(locations), config["classes"]),
        boxes=locations.new_zeros(images, len(locations), 4),
        quality=None,
        locations=locations,
        strides=strides,
        priors=squares(locations, strides),
        level_sizes=tuple(len(x) for x in levels),
        extras={},
    )


def _radius(config: Mapping[str, Any], gt_instances: list[Instances]) -> float:
    """Of the central region, in strides; one that holds every box where there is none."""
    if config["center_sampling"]:
        return float(config["center_sample_radius"])
    boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances])
    sides = [0.0, *(boxes[:, 2:] - boxes[:, :2]).flatten().tolist()]
    return max(sides) / 2 / min(config["strides"]) + 1


class Adapter(NamedTuple):
    """How a kind is compared: what runs it, and why some of its outputs are left out."""

    run: Callable[[Case, torch.dtype], Mapping[str, Tensor]]
    not_compared: tuple[tuple[str, str], ...] = ()  # (pattern of output names, reason)

    def left_out(self, output: str) -> str | None:
        """Why an output is not compared; None if it is."""
        reasons = (why for pattern, why in self.not_compared if fnmatchcase(output, pattern))
        return next(reasons, None)


ADAPTERS: dict[str, Adapter] = {"fcos_targets": Adapter(fcos_targets)}


class Row(NamedTuple):
    """One line of the table: an output in one precision."""

    output: str
    deviation: float  # largest |got - want|
    share: float  # largest |got - want| / (atol + rtol * |want|)
    tolerance: str

    def __str__(self) -> str:
        verdict = "ok" if self.share <= 1 else "EXCEEDED"
        return (
            f"  {self.output:40} {self.deviation:10.3g}  {self.tolerance:20} {self.share:8.2%}  "
            f"{verdict}"
        )


HEADER = f"  {'output':40} {'deviation':>10}  {'tolerance':20} {'used':>8}"


def measure(label: str, got: np.ndarray, want: np.ndarray, tolerance: Mapping[str, float]) -> Row:
    """How far ``got`` is from ``want``, and which share of the tolerance that is.

    Two NaN agree, and two equal infinities; NaN is infinitely far from a number.
    """
    rtol, atol = tolerance["rtol"], tolerance["atol"]
    got, want = got.astype(np.float64), want.astype(np.float64)
    agree = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.where(agree, 0, np.abs(got - want))
        share = np.where(agree, 0, distance / (atol + rtol * np.abs(want)))
    allowed = f"{atol:.0e} + {rtol:.0e} |x|" if atol or rtol else "equal"
    worst = [np.nan_to_num(x, nan=np.inf, posinf=np.inf).max(initial=0) for x in (distance, share)]
    return Row(label, float(worst[0]), float(worst[1]), allowed)


def verify(case: Case) -> list[Row]:
    """Run a case in both precisions and compare every output that is not left out by name.

    Raises:
        GoldenError: an output has no counterpart, another shape, or none is compared at all.
    """
    adapter = ADAPTERS[case.kind]
    names = [name for name in case.outputs if adapter.left_out(name) is None]
    if not names:
        raise GoldenError(f"{case.path}: nothing to compare, its outputs are {list(case.outputs)}")
    rows = []
    for dtype in ("float32", "float64"):
        results = adapter.run(case, getattr(torch, dtype))
        for name in names:
            if name not in results:
                raise GoldenError(
                    f"{case.path}: the output {name!r} is not compared: the adapter of "
                    f"{case.kind!r} gives {sorted(results)}"
                )
            want = case.array(name, case.outputs[name])
            got = results[name].detach().cpu().numpy()
            if got.shape != want.shape:
                raise GoldenError(
                    f"{case.path}: {name!r} shall have shape {want.shape}, ours has {got.shape}"
                )
            rows.append(
                measure(f"{name} {dtype}", got, want, case.outputs[name]["tolerance"][dtype])
            )
    return rows


def report(case: Case) -> bool:
    """Print a case's table; True if every tolerance is met."""
    print(f"{case.path.stem} ({case.kind})")
    rows = verify(case)
    print(HEADER, *rows, sep="\n")
    for name in case.outputs:
        reason = ADAPTERS[case.kind].left_out(name)
        if reason is not None:
            print(f"  {name:40} not compared: {reason}")
    return all(row.share <= 1 for row in rows)


def verify_folder(folder: Path, only: str | None) -> bool:
    """Report on all cases of ``folder``, or on those of one kind; True if all are good.

    Raises:
        GoldenError: there is nothing to compare, or ``only`` is no kind.
    """
    if only is not None and only not in ADAPTERS:
        raise GoldenError(f"unknown kind {only!r}; known are {', '.join(sorted(ADAPTERS))}")
    if not folder.is_dir():
        raise GoldenError(f"{folder}: no such folder")
    good, seen = True, 0
    for path in sorted(folder.glob("*.json")):
        try:
            kind = _read_json(path)["kind"]
            if only is not None and kind != only:
                continue
            seen += 1
            if kind not in ADAPTERS:
                raise GoldenError(
                    f"{path}: unknown kind {kind!r}; known are {', '.join(sorted(ADAPTERS))}"
                )
            good &= report(load_case(path))
        except GoldenError as error:
            print(f"error: {error}", file=sys.stderr)
            good = False
    if not seen:
        wanted = f"case of kind {only!r}" if only else "case (NAME.json with NAME.npz)"
        raise GoldenError(f"{folder}: no {wanted} found")
    print(f"cases: {seen}; " + ("all within tolerance" if good else "FAILED, see above"))
    return good


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Compare this package with numbers from reference implementations.",
        epilog=f"Known kinds: {', '.join(sorted(ADAPTERS))}.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of NAME.json + NAME.npz")
    parser.add_argument("--only", metavar="KIND", help="look at the cases of this kind alone")
    options = parser.parse_args(arguments)
    try:
        good = verify_folder(options.folder, options.only)
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
