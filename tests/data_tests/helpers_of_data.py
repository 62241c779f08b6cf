# SPDX-License-Identifier: Apache-2.0
"""Annotations in the formats of VOC and COCO, written by tests."""

import json

from PIL import Image

WIDTH, HEIGHT = 60, 40
CLASSES = ("cat", "dog")


def annotation(*objects, filename="a.jpg"):
    items = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2, difficult in objects
    )
    return (
        f"<annotation><filename>{filename}</filename><size><width>{WIDTH}</width>"
        f"<height>{HEIGHT}</height><depth>3</depth></size>{items}</annotation>"
    )


def coco_content():
    """Three images and ids that Detectron2's own loader or pycocotools would stumble over."""
    sizes = {"width": WIDTH, "height": HEIGHT}
    return {
        "images": [
            {"id": 7, "file_name": "sub/c.png", **sizes},
            {"id": 0, "file_name": "a.png", **sizes},
            {"id": 3, "file_name": "b.png", **sizes},
        ],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 90, "bbox": [0, 0, WIDTH, HEIGHT]},
            {"id": 1, "image_id": 0, "category_id": 0, "bbox": [0, 0, 20, 10.5], "area": 99},
            {"id": 5, "image_id": 7, "category_id": 0, "bbox": [30, 10, 20, 20], "iscrowd": 1},
            {"id": 6, "image_id": 7, "category_id": 90, "bbox": [5, 5, 20, 20], "ignore": 1},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 0, "name": "cat"}],
    }


def write_coco(json_file, content, image_root):
    """The file, and its images: all black."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(content if isinstance(content, str) else json.dumps(content))
    for image in content["images"] if isinstance(content, dict) else ():
        file = image_root / image["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(file)
