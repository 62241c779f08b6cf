# SPDX-License-Identifier: Apache-2.0
"""Image sizes of maskrcnn-benchmark: where it cuts, where it rounds, where Detectron2 differs."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T

from d2_decouple.config import get_config
from d2_decouple.data.legacy import LegacyResizeShortestEdge
from d2_decouple.engine.inference_config import inference_config

# (H, W) of an image, what it becomes with 800 and 1333, and what Detectron2 makes of it.
SIZES = [
    ((480, 640), (800, 1066), (800, 1067)),  # 1066.67
    ((500, 375), (1066, 800), (1067, 800)),  # upright
    ((427, 640), (800, 1199), (800, 1199)),  # 1199.06
    ((600, 600), (800, 800), (800, 800)),
    ((800, 1200), (800, 1200), (800, 1200)),  # as it is
    ((1, 1), (800, 800), (800, 800)),
    ((800, 1333), (800, 1333), (800, 1333)),  # just within the limit
    ((799, 1333), (799, 1333), (799, 1333)),  # just beyond
    ((801, 1333), (800, 1331), (800, 1331)),
    # The limit: the short side is rounded, and the long one is made of it.
    ((400, 1000), (533, 1332), (533, 1333)),  # 533.2, 1332.5
    ((1000, 400), (1332, 533), (1333, 533)),
    ((375, 1000), (500, 1333), (500, 1333)),  # 499.88, 1333.3
    ((13, 845), (21, 1365), (21, 1333)),  # 20.51: longer than the limit
    ((1001, 2666), (500, 1331), (501, 1333)),  # 500.5 is rounded to an even number
    ((1003, 2666), (502, 1334), (501, 1333)),  # and so is 501.5
    ((1, 3000), (1, 3000), (0, 1333)),  # 0.44: never nothing
]


@pytest.mark.parametrize(("size", "want", "detectron2s"), SIZES)
def test_sizes(size: tuple[int, int], want: tuple[int, int], detectron2s: tuple[int, int]) -> None:
    assert LegacyResizeShortestEdge.get_output_shape(*size, 800, 1333) == want
    assert T.ResizeShortestEdge.get_output_shape(*size, 800, 1333) == detectron2s


def test_the_image_and_its_boxes_get_that_size() -> None:
    image = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    seen = T.AugInput(image, boxes=np.array([[0.0, 0.0, 64.0, 48.0], [16.0, 12.0, 32.0, 24.0]]))
    transform = LegacyResizeShortestEdge(80, max_size=133)(seen)
    assert isinstance(transform, T.ResizeTransform)
    assert seen.image.shape == (80, 106, 3)
    np.testing.assert_allclose(seen.boxes, [[0, 0, 106, 80], [26.5, 20, 53, 40]])
    want = T.ResizeTransform(48, 64, 80, 106).apply_image(image)
    assert np.array_equal(seen.image, want)


@pytest.mark.parametrize(
    ("lengths", "style"), [((40, 90), "range"), ((40, 60, 90), "choice"), (70, "range")]
)
def test_lengths_are_drawn_as_detectron2_draws_them(lengths: object, style: str) -> None:
    """With the same numbers, so that a training differs in nothing else."""
    square, found = np.zeros((50, 50, 3), dtype=np.uint8), set()
    for seed in range(20):
        sizes = []
        for kind in (LegacyResizeShortestEdge, T.ResizeShortestEdge):
            np.random.seed(seed)
            transform = kind(lengths, max_size=100, sample_style=style).get_transform(square)
            sizes.append((transform.new_h, transform.new_w, np.random.random()))
        assert sizes[0] == sizes[1]
        found.add(sizes[0][0])
    allowed = {"choice": {40, 60, 90}, "range": {70} if lengths == 70 else set(range(40, 91))}
    assert found <= allowed[style]
    assert len(found) == (1 if lengths == 70 else 3) or len(found) > 8


def test_length_0_leaves_the_image_alone() -> None:
    transform = LegacyResizeShortestEdge(0).get_transform(np.zeros((5, 7, 3), dtype=np.uint8))
    assert isinstance(transform, T.NoOpTransform)


def test_without_a_limit() -> None:
    image = np.zeros((3, 100, 3), dtype=np.uint8)
    transform = LegacyResizeShortestEdge(10).get_transform(image)
    assert (transform.new_h, transform.new_w) == (10, 333)


def test_in_a_recipe() -> None:
    cfg = get_config("fcos_R_50_FPN_1x")
    node = cfg.dataloader.test.mapper.augmentations
    node[0]._target_ = LegacyResizeShortestEdge
    (resize,) = instantiate(node)
    assert type(resize) is LegacyResizeShortestEdge
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    assert resize.get_transform(image).new_w == 1066


def test_in_the_config_that_a_training_leaves(tmp_path: Path) -> None:
    """Detectron2 writes the name of what is called; inference calls only what it knows."""
    cfg = get_config("fcos_R_50_FPN_1x")
    cfg.dataloader.test.mapper.augmentations = [
        L(LegacyResizeShortestEdge)(short_edge_length=800, max_size=1333)
    ]
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    (resize,) = inference_config(tmp_path / "config.yaml").augmentations
    assert type(resize) is LegacyResizeShortestEdge
    assert (resize.short_edge_length, resize.max_size) == ((800, 800), 1333)
