# SPDX-License-Identifier: Apache-2.0
"""Folders with YOLO's labels, written by tests."""

import xml.etree.ElementTree as ET
from pathlib import Path

import yaml
from PIL import Image

from d2_decouple.data.shapes import SHAPES, make_shapes


def pictures(folder, *names, size=(60, 40)):
    """Black images (width, height)."""
    for name in names:
        file = Path(folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(file)


def labels(folder, **lines):
    """Label files by name; the text is written as it is."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in lines.items():
        (Path(folder) / f"{name}.txt").write_text(text)


def data_yaml(folder, **content):
    """data.yaml with these keys."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "data.yaml").write_text(yaml.safe_dump(content))


def yolo_shapes(root, voc=None, **options):
    """The generated shapes with YOLO's labels, six decimals; ``voc`` is their folder with VOC's."""
    root = Path(root)
    voc = voc or make_shapes(root.with_name(root.name + "_voc"), difficult=0, **options)
    for split in ("train", "val"):
        for name in (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            (root / "images" / split).mkdir(parents=True, exist_ok=True)
            image = voc / "JPEGImages" / f"{name}.png"
            (root / "images" / split / image.name).write_bytes(image.read_bytes())
            labels(root / "labels" / split, **{name: _lines(voc / "Annotations" / f"{name}.xml")})
    data_yaml(root, train="images/train", val="images/val", names=list(SHAPES))
    return root


def _lines(xml):
    tree = ET.parse(xml)
    width, height = (int(tree.findtext(f"size/{x}")) for x in ("width", "height"))
    lines = []
    for item in tree.iterfind("object"):
        x1, y1, x2, y2 = (
            int(item.findtext(f"bndbox/{x}")) for x in ["xmin", "ymin", "xmax", "ymax"]
        )
        middle = ((x1 - 1 + x2) / 2 / width, (y1 - 1 + y2) / 2 / height)
        sides = ((x2 - x1 + 1) / width, (y2 - y1 + 1) / height)
        numbers = " ".join(f"{x:.6f}" for x in (*middle, *sides))
        lines.append(f"{SHAPES.index(item.findtext('name'))} {numbers}\n")
    return "".join(lines)
