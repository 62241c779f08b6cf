# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of datasets."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers_of_data import HEIGHT, WIDTH, annotation
from PIL import Image


@pytest.fixture
def catalogs(monkeypatch):
    """Each test gets catalogs of its own, and no variable from outside."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    monkeypatch.setattr(MetadataCatalog, "data", dict(MetadataCatalog.data))
    for name in ("bccd_train", "bccd_test", "bccd_mini_train", "bccd_mini_val"):
        DatasetCatalog.data.pop(name, None)
        MetadataCatalog.data.pop(name, None)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)


@pytest.fixture
def voc(tmp_path):
    """Two images; ``b`` is empty. The image files exist too."""
    root = tmp_path / "pets"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n\n")
    (root / "Annotations/a.xml").write_text(
        annotation(
            ("dog", 1, 1, WIDTH, HEIGHT, 0), ("cat", 0, 0, 20, 10, 0), ("cat", 31, 11, 50, 30, 1)
        )
    )
    (root / "Annotations/b.xml").write_text(annotation(filename="b.png"))
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / name)
    return root
