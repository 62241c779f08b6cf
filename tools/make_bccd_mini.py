# SPDX-License-Identifier: Apache-2.0
"""Choose the 60 images of ``tests/data/bccd_mini`` from a folder of the BCCD dataset.

    python tools/make_bccd_mini.py datasets/BCCD tests/data/bccd_mini

The target must be new or empty. The choice depends on the images and annotations alone and is the
same on each run. The written README.md says what was chosen and how; its numbers are the constants
below.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from d2_decouple.data import BCCD_CLASSES, load_voc

SPLITS = {"train": ("trainval", 36, 12), "val": ("test", 9, 3)}
"""Mini split: the split of BCCD it comes from, images with platelets, images without."""

MIN_SIDE = 8  # pixels: a box of which less is inside the image shows nothing
MAX_TWIN_IOU = 0.8  # two boxes of one class that overlap more are one cell annotated twice
MAX_STAIN = 250  # pixels of dyed tissue without a box; platelets have about 250 to 1400
STAIN_MARGIN = 8  # pixels around a box that still belong to its cell
MIN_TWIN_PEAK = 0.3  # correlation of overlapping fields; unrelated ones stay below 0.22

README = """<!-- SPDX-License-Identifier: Apache-2.0 -->
# BCCD mini: {total} images of blood cells

A small part of the BCCD dataset (https://github.com/Shenggan/BCCD_Dataset, MIT licence, see
LICENSE), for tests and for the first run after installation. Layout of Pascal VOC, three classes.
Numbers measured on it say whether training works; they are not comparable with results on BCCD,
because the images with the most complete annotations were chosen.

| split | images | {class_header} | comes from BCCD's |
| --- | ---: | {class_rule} | --- |
{rows}

How the images were chosen, by `tools/make_bccd_mini.py` (the same on each run):

1. Left out:
   an annotated size that is not the image's;
   a box with less than {min_side} pixels inside the image on a side (BCCD has two with no area);
   two boxes of one class with an IoU above {max_twin_iou};
   no red or no white cell;
   more than {max_stain} pixels in the violet of white cells and platelets with no box of those near
   (BCCD lacks boxes).
2. The rest are ordered by the share of cell-coloured pixels (darker than Otsu's threshold of the
   green channel) that no box covers, lowest first: many BCCD images have only some of their cells
   annotated.
3. From the top:
   {quotas}.
   An image of `train` that shows a part of the same field as one of `val` would be passed over (in
   BCCD two pairs of `trainval` and `test` overlap: 00386 and 00391, 00260 and 00227).

The images are BCCD's own files, byte for byte. In the annotations only the `<path>` element was
taken out, which named a folder on the annotators' machines.

Cells at the image's border and within clumps are not always annotated here either.
"""


class Candidate(NamedTuple):
    """An image that passed the checks, and what ranks it."""

    image_id: str
    counts: Counter[str]
    uncovered: float  # share of the cell-coloured pixels outside all boxes
    spectrum: np.ndarray  # phase of the Fourier transform, to recognise overlapping fields


def main() -> None:
    """Read the command line, choose, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, help="folder of BCCD, which holds Annotations")
    parser.add_argument("target", type=Path, help="folder to write, new or empty")
    arguments = parser.parse_args()

    val = choose(candidates(arguments.source, SPLITS["val"][0]), *SPLITS["val"][1:], avoid=())
    train_pool = candidates(arguments.source, SPLITS["train"][0])
    train = choose(train_pool, *SPLITS["train"][1:], avoid=val)
    write(arguments.source, arguments.target, {"train": train, "val": val})


def candidates(source: Path, split: str) -> list[Candidate]:
    """All images of a BCCD split with sound annotations, best covered by boxes first."""
    found = (_candidate(record) for record in load_voc(source, split, BCCD_CLASSES))
    return sorted(
        (candidate for candidate in found if candidate is not None),
        key=lambda candidate: (candidate.uncovered, candidate.image_id),
    )


def choose(
    pool: Sequence[Candidate], with_platelets: int, without: int, *, avoid: Sequence[Candidate]
) -> list[Candidate]:
    """The first of the pool that fill both quotas and overlap with no image of ``avoid``."""
    left = {True: with_platelets, False: without}
    chosen = []
    for candidate in pool:
        kind = candidate.counts["Platelets"] > 0
        if left[kind] and not any(overlap(candidate, other) for other in avoid):
            left[kind] -= 1
            chosen.append(candidate)
    if any(left.values()):
        raise SystemExit(f"too few sound images: {left} still wanted (platelets or not)")
    return sorted(chosen)


def overlap(first: Candidate, second: Candidate) -> bool:
    """Whether two images show a part of the same field, shifted (phase correlation)."""
    return correlation_peak(first.spectrum, second.spectrum) > MIN_TWIN_PEAK


def correlation_peak(first: np.ndarray, second: np.ndarray) -> float:
    """Highest value of the phase correlation of two phases; 1 for equal images."""
    return float(np.fft.irfft2(first * second.conj()).max())


def phase(image: Image.Image) -> np.ndarray:
    """Phase of the Fourier transform of the image, small, grey and faded out at its border."""
    gray = np.asarray(image.convert("L").resize((160, 120)), dtype=np.float64)
    faded = (gray - gray.mean()) * np.outer(np.hanning(120), np.hanning(160))
    transform = np.fft.rfft2(faded)
    return transform / np.maximum(np.abs(transform), 1e-9)


def write(source: Path, target: Path, splits: dict[str, list[Candidate]]) -> None:
    """Write images, annotations, split lists, licence and README into an empty ``target``."""
    if target.exists() and any(target.iterdir()):
        raise SystemExit(f"{target} is not empty; delete it first, or name another folder")
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (target / folder).mkdir(parents=True)
    for split, images in splits.items():
        listing = "".join(f"{image.image_id}\n" for image in images)
        (target / "ImageSets" / "Main" / f"{split}.txt").write_text(listing)
        for image in images:
            name = image.image_id
            annotation = (source / "Annotations" / f"{name}.xml").read_text()
            (target / "Annotations" / f"{name}.xml").write_text(without_path(annotation))
            shutil.copyfile(
                source / "JPEGImages" / f"{name}.jpg", target / "JPEGImages" / f"{name}.jpg"
            )
    shutil.copyfile(source / "LICENSE", target / "LICENSE")
    (target / "README.md").write_text(readme(splits))


def without_path(annotation: str) -> str:
    """The annotation without its ``<path>`` line, which names a folder of a foreign machine."""
    return re.sub(r"[ \t]*<path>.*?</path>\r?\n?", "", annotation, flags=re.DOTALL)


def readme(splits: dict[str, list[Candidate]]) -> str:
    """The README of the mini set, with its numbers."""
    rows, quotas = [], []
    for split, images in splits.items():
        counts = sum((image.counts for image in images), Counter[str]())
        origin, with_platelets, without = SPLITS[split]
        numbers = " | ".join(str(counts[name]) for name in BCCD_CLASSES)
        rows.append(f"| {split} | {len(images)} | {numbers} | `{origin}` |")
        quotas.append(f"{with_platelets} with platelets and {without} without for `{split}`")
    return README.format(
        total=sum(map(len, splits.values())),
        class_header=" | ".join(BCCD_CLASSES),
        class_rule=" | ".join("---:" for _ in BCCD_CLASSES),
        rows="\n".join(rows),
        quotas=",\n   ".join(quotas),
        min_side=MIN_SIDE,
        max_twin_iou=MAX_TWIN_IOU,
        max_stain=MAX_STAIN,
    )


def _candidate(record: dict[str, Any]) -> Candidate | None:
    classes = [BCCD_CLASSES[item["category_id"]] for item in record["annotations"]]
    boxes = np.array([item["bbox"] for item in record["annotations"]]).reshape(-1, 4)
    counts = Counter(classes)
    with Image.open(record["file_name"]) as file:
        image = file.convert("RGB")
    if image.size != (record["width"], record["height"]) or not counts["RBC"] * counts["WBC"]:
        return None
    inside = np.minimum(boxes, [*image.size, *image.size])
    if (inside[:, 2:] - inside[:, :2]).min() < MIN_SIDE or _has_twins(boxes, classes):
        return None
    rgb = np.asarray(image, dtype=np.int64)
    stained = [box for box, name in zip(boxes, classes, strict=True) if name != "RBC"]
    if (_stain(rgb) & ~_covered(rgb.shape[:2], stained, STAIN_MARGIN)).sum() > MAX_STAIN:
        return None
    cells = rgb[..., 1] <= _otsu(rgb[..., 1])
    uncovered = (cells & ~_covered(rgb.shape[:2], boxes, 0)).sum() / cells.sum()
    return Candidate(record["image_id"], counts, float(uncovered), phase(image))


def _has_twins(boxes: np.ndarray, classes: Sequence[str]) -> bool:
    upper = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    lower = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    common = np.prod(np.maximum(upper - lower, 0), axis=2)  # (M, M)
    area = np.diag(common)
    iou = common / (area[:, None] + area[None, :] - common)
    same = np.array([[a == b for b in classes] for a in classes]) & ~np.eye(len(boxes), dtype=bool)
    return bool((iou[same] > MAX_TWIN_IOU).any())


def _stain(rgb: np.ndarray) -> np.ndarray:
    """Where blue exceeds both red and green: nuclei and platelets, but no red cell."""
    return (rgb[..., 2] - rgb[..., 0] > 20) & (rgb[..., 2] - rgb[..., 1] > 20)


def _covered(size: tuple[int, ...], boxes: Iterable[np.ndarray], margin: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for x1, y1, x2, y2 in (box.astype(int) for box in boxes):
        mask[max(y1 - margin, 0) : y2 + margin, max(x1 - margin, 0) : x2 + margin] = True
    return mask


def _otsu(values: np.ndarray) -> int:
    """The threshold that separates the two classes of grey values best (Otsu, 1979)."""
    share = np.bincount(values.ravel(), minlength=256) / values.size
    below = np.cumsum(share)
    mean = np.cumsum(share * np.arange(256))
    spread = below * (1 - below)
    between = (mean[-1] * below - mean) ** 2 / np.where(spread > 1e-12, spread, np.inf)
    return int(between.argmax())


if __name__ == "__main__":
    main()
