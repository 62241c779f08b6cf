# SPDX-License-Identifier: Apache-2.0
"""Write images of a labelled folder three times: as a VOC, a COCO and a YOLO folder.

    python tools/write_formats.py datasets/BCCD formats --images 100

The targets are ``formats/voc``, ``formats/coco`` and ``formats/yolo``, without splits. The images
come evenly from the whole folder, sorted by name. To see that the format makes no difference:
train on each of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from d2_decouple.data import DataError, register_folder

FORMATS = ("voc", "coco", "yolo")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, write the three folders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, help="folder in one of the three formats")
    parser.add_argument("target", type=Path, help="folder to write, new or empty")
    parser.add_argument("--images", type=int, default=100, help="how many (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        write_formats(arguments.source, arguments.target, arguments.images)
    except (DataError, FileNotFoundError) as error:
        sys.exit(f"write_formats: {error}")
    print(f"{arguments.images} images as {', '.join(FORMATS)} in {arguments.target}")


def write_formats(source: Path, target: Path, count: int) -> None:
    """Write ``count`` images of ``source`` below ``target`` in each format.

    Boxes that are written are those that training takes: cut at the image, none empty.

    Raises:
        DataError: ``source`` is no dataset or has fewer images, ``target`` is not empty, or two
            images have one name.
    """
    found = register_folder(source)
    records = [*DatasetCatalog.get(found.train), *DatasetCatalog.get(found.test)]
    records.sort(key=lambda record: Path(record["file_name"]).stem)
    if not 2 <= count <= len(records):
        raise DataError(
            f"{count} images were wanted of {source}, which has {len(records)} for training and "
            f"test: type --images with a number from 2 to {len(records)}"
        )
    chosen = [records[i * len(records) // count] for i in range(count)]
    if len({Path(record["file_name"]).stem for record in chosen}) < count:
        raise DataError(f"two images in {source} have one name: rename one of them")
    if target.exists() and any(target.iterdir()):
        raise DataError(f"{target} is not empty; delete it first, or name another folder")
    for name, images, write in (
        ("voc", "JPEGImages", _voc),
        ("coco", "images", _coco),
        ("yolo", "images", _yolo),
    ):
        (target / name / images).mkdir(parents=True)
        for record in chosen:
            shutil.copy(record["file_name"], target / name / images)
        write(target / name, chosen, found.classes)


def _voc(folder: Path, records: list[dict[str, Any]], classes: tuple[str, ...]) -> None:
    (folder / "Annotations").mkdir()
    for record in records:
        root = ET.Element("annotation")
        file = Path(record["file_name"])
        ET.SubElement(root, "filename").text = file.name
        size = ET.SubElement(root, "size")
        for key in ("width", "height"):
            ET.SubElement(size, key).text = str(record[key])
        for item in record["annotations"]:
            node = ET.SubElement(root, "object")
            ET.SubElement(node, "name").text = classes[item["category_id"]]
            box = ET.SubElement(node, "bndbox")
            # VOC counts pixels from 1 and both borders in.
            for key, value, shift in zip(
                ("xmin", "ymin", "xmax", "ymax"), item["bbox"], (1, 1, 0, 0), strict=True
            ):
                ET.SubElement(box, key).text = f"{value + shift:.15g}"
        ET.indent(root)
        ET.ElementTree(root).write(folder / "Annotations" / f"{file.stem}.xml")


def _coco(folder: Path, records: list[dict[str, Any]], classes: tuple[str, ...]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, record in enumerate(records, 1):
        file = Path(record["file_name"]).name
        images.append(
            {"id": number, "file_name": file, "width": record["width"], "height": record["height"]}
        )
        for item in record["annotations"]:
            x1, y1, x2, y2 = item["bbox"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": item["category_id"] + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def _yolo(folder: Path, records: list[dict[str, Any]], classes: tuple[str, ...]) -> None:
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for record in records:
        width, height = record["width"], record["height"]
        lines = []
        for item in record["annotations"]:
            x1, y1, x2, y2 = item["bbox"]
            numbers = (
                (x1 + x2) / 2 / width,
                (y1 + y2) / 2 / height,
                (x2 - x1) / width,
                (y2 - y1) / height,
            )
            lines.append(f"{item['category_id']} {' '.join(f'{x:.15g}' for x in numbers)}\n")
        stem = Path(record["file_name"]).stem
        (folder / "labels" / f"{stem}.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
