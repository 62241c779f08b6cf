# SPDX-License-Identifier: Apache-2.0
"""Faults of a dataset before the first iteration: ``python -m d2_decouple.data.checks DIR``.

Prints a table of each split and what is wrong with it, and draws the sizes of the boxes. The exit
status is 1 if something would stop a training or silently spoil it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from .box_sizes import LEVELS, Objects, class_table, collect_objects, draw_box_sizes
from .datasets import register_bccd, require_dataset
from .findings import Finding, Split, check_classes, check_records
from .folders import register_folder
from .image_checks import check_images
from .loader import DataError
from .records import Source

__all__ = ["Report", "Split", "check_datasets", "main"]

_FINEST_STRIDE = 8  # pixels of the network's input between two cells of P3


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        splits: the sets that could be read, training sets first.
        findings: of all kinds, in the order in which they were looked for.
    """

    splits: list[Split]
    findings: list[Finding]

    @property
    def faults(self) -> list[str]:
        """Lines on what stops a training, or would silently spoil it."""
        return [finding.line() for finding in self.findings if finding.stops]

    @property
    def warnings(self) -> list[str]:
        """Lines on what a training survives."""
        return [finding.line() for finding in self.findings if not finding.stops]

    def details(self) -> list[str]:
        """All lines, with every place named."""
        return [finding.line(len(finding.places)) for finding in self.findings]


def check_datasets(
    train: Sequence[str],
    test: Sequence[str],
    *,
    num_classes: int | None,
    decode: bool,
    limit: int | None = 5000,
) -> Report:
    """Check registered datasets, of this package or of Detectron2.

    Args:
        train: names of the training sets.
        test: names of the test sets.
        num_classes: that the model predicts; None for as many as the metadata name.
        decode: read all pixels instead of the headers alone; finds files that are cut off or
            damaged, and images that are byte for byte in both kinds of sets.
        limit: images that are opened at most, spread evenly; of the others only the existence is
            checked. None for all.
    """
    findings: list[Finding] = []
    splits: list[Split] = []
    for role, names in (("training", train), ("test", test)):
        for name in names:
            split, found = _load(role, name)
            findings += found
            if split is not None:
                splits.append(split)
    for split in splits:
        findings += check_records(split, num_classes)
    findings += check_classes(splits)
    findings += check_images(splits, decode=decode, limit=limit)
    return Report(splits, findings)


def _load(role: str, name: str) -> tuple[Split | None, list[Finding]]:
    try:
        require_dataset(name)
        source = DatasetCatalog[name]
        # As annotated: a set of this package would cut and drop boxes, and hide them from us.
        records = source.read() if isinstance(source, Source) else source()
    except (OSError, ValueError, KeyError, AssertionError) as error:
        return None, [Finding(f"{role} set {name!r} cannot be read: {error}", stops=True)]
    if not records:
        return None, [Finding(f"{role} set {name!r} has no images", stops=True)]
    classes = tuple(MetadataCatalog.get(name).get("thing_classes") or ())
    return Split(role, name, classes, records), []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 if there are faults that stop a training."""
    args = _parse_arguments(arguments)
    register_bccd()
    try:
        train, test, title = _named_sets(args)
    except (DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = check_datasets(train, test, num_classes=None, decode=not args.quick, limit=None)
    output = Path(args.output)
    lines = [*_tables(report, args.short_side, args.max_size), *_verdict(report)]
    print("\n".join(lines))
    if report.splits:
        objects = [
            collect_objects(split.records, short_side=args.short_side, max_size=args.max_size)
            for split in report.splits
        ]
        picture = output / f"{title}_box_sizes.png"
        draw_box_sizes(
            Objects(*(np.concatenate(parts) for parts in zip(*objects, strict=True))),
            _class_names(report.splits[0]),
            picture,
            short_side=args.short_side,
            max_size=args.max_size,
        )
        print(f"sizes of the boxes: {picture}")
    if report.findings:
        output.mkdir(parents=True, exist_ok=True)
        complete = output / f"{title}_findings.txt"
        complete.write_text("\n".join(report.details()) + "\n", encoding="utf-8")
        print(f"with all files named: {complete}")
    return 1 if report.faults else 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.data.checks", description=(__doc__ or "").split("\n\n")[1]
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", nargs="?", metavar="DIR", help="a folder in VOC or COCO layout")
    what.add_argument(
        "--dataset",
        nargs="+",
        metavar="NAME",
        help="registered sets instead: the first is for training, the others are for the test",
    )
    parser.add_argument("--quick", action="store_true", help="read images' headers, not pixels")
    parser.add_argument("--output", default="output/checks", metavar="DIR", help="for the picture")
    parser.add_argument("--short-side", type=int, default=800, help="of the recipe (%(default)s)")
    parser.add_argument("--max-size", type=int, default=1333, help="of the recipe (%(default)s)")
    return parser.parse_args(arguments)


def _named_sets(args: argparse.Namespace) -> tuple[list[str], list[str], str]:
    """Names of training and test sets, and a name for files about them."""
    if args.dataset:
        for name in args.dataset:
            try:
                require_dataset(name)
            except ValueError as error:
                raise DataError(str(error)) from error
        return args.dataset[:1], args.dataset[1:], args.dataset[0]
    found = register_folder(args.folder)
    print("\n".join(found.notes), end="\n\n")
    return [found.train], [found.test], found.train.removesuffix("_train")


def _tables(report: Report, short_side: int, max_size: int) -> Iterator[str]:
    for split in report.splits:
        sizes = Counter((x.get("width"), x.get("height")) for x in split.records)
        common = [f"{count} of {w}x{h}" for (w, h), count in sizes.most_common(3)]
        rest = len(split.records) - sum(count for _, count in sizes.most_common(3))
        negatives = sum(not record.get("annotations") for record in split.records)
        yield (
            f"{split.role} set {split.name!r}: {len(split.records)} images, {negatives} of them "
            f"without objects; {', '.join([*common, *([f'{rest} others'] if rest else [])])}"
        )
        objects = collect_objects(split.records, short_side=short_side, max_size=max_size)
        yield class_table(objects, _class_names(split)) + "\n"
        thin = ~objects.crowd & (objects.resized.min(axis=1, initial=np.inf) < _FINEST_STRIDE)
        files = [split.records[index]["file_name"] for index in objects.images[thin]]
        if files:
            yield (
                Finding(
                    f"objects less than {_FINEST_STRIDE} pixels wide or high at short side "
                    f"{short_side}, which may fall between two cells of {LEVELS[0]}",
                    stops=False,
                    places=files,
                ).line()
                + "\n"
            )


def _class_names(split: Split) -> tuple[str, ...]:
    ids = [item["category_id"] for x in split.records for item in x.get("annotations", ())]
    count = max([len(split.classes), *(label + 1 for label in ids)])
    return (*split.classes, *(f"id {index}" for index in range(len(split.classes), count)))


def _verdict(report: Report) -> Iterator[str]:
    for title, lines in (
        ("faults that stop a training", report.faults),
        ("warnings", report.warnings),
    ):
        yield f"{title}: {len(lines) or 'none'}"
        yield from (f"  {line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
