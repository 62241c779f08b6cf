# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.quickstart``: train, evaluate and look at a detector in minutes.

FCOS with ResNet-18 learns blood cells from the 48 training images that come with a checkout,
from scratch, on a CPU. The result is a demonstration that everything works, not a benchmark.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from .config import get_config
from .data import ground_truth
from .engine import check_recipe, lazy_recipe, run_command, set_up, train
from .engine.train import load_weights
from .visualization import compare, plot_curves

__all__ = ["draw_detections", "main"]

_RECIPE = "fcos_R_18_FPN_bccd"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.quickstart", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", default="output/quickstart", help="folder of the results")
    parser.add_argument("--iterations", type=_positive, default=500, help="length of the training")
    parser.add_argument("--pictures", type=int, default=12, help="validation images to draw")
    parser.add_argument(
        "--restart", action="store_true", help="forget an earlier training instead of going on"
    )
    args = parser.parse_args(arguments)
    return run_command(lambda: _quickstart(args))


def _forget(folder: Path) -> None:
    """Delete an earlier training's checkpoints; the rest is written anew, and nothing else goes."""
    for file in (*folder.glob("model_*.pth*"), folder / "last_checkpoint"):
        file.unlink(missing_ok=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1, got {text}")
    return value


def _quickstart(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if args.restart:
        _forget(output)
    cfg = get_config(
        _RECIPE,
        [
            "dataloader.train.dataset.names=bccd_mini_train",
            "dataloader.test.dataset.names=bccd_mini_val",
            f"train.max_iter={args.iterations}",
            "train.eval_period=100",
            "train.checkpointer.period=100",
        ],
    )
    cfg.train.output_dir = str(output)  # not as an override, whose grammar some names offend
    recipe = lazy_recipe(cfg)
    check_recipe(recipe, resume=True)
    set_up(recipe, argparse.Namespace(eval_only=False))
    # Going on from the last checkpoint makes a second call quick and an interrupted one cheap.
    results = train(recipe, resume=True)
    plot_curves(output / "metrics.json", output / "curves.png")

    model = recipe.model().eval()
    load_weights(recipe, model, resume=True)
    pictures = draw_detections(model, cfg, output / "pictures", limit=args.pictures)
    print(_table(results["bbox"]))
    print(f"log:      {output / 'log.txt'}")
    print(f"metrics:  {output / 'metrics.json'}")
    print(f"curves:   {output / 'curves.png'}")
    print(f"pictures: {len(pictures)} in {output / 'pictures'}")


def draw_detections(
    model: torch.nn.Module,
    cfg: Any,
    folder: Path,
    *,
    limit: int,
    score_thresh: float = 0.3,
) -> list[Path]:
    """Draw ground truth beside detections for the first test images of a LazyConfig.

    Args:
        model: in evaluation mode.
        cfg: names the test set and its loader.
        folder: where the pictures are written, one PNG per image.
        limit: how many.
        score_thresh: detections at or below it are not drawn.

    Returns:
        The files, in the order of the data set.
    """
    name = cfg.dataloader.test.dataset.names
    classes = MetadataCatalog.get(name).thing_classes
    records = {record["file_name"]: record for record in DatasetCatalog.get(name)}
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for inputs in instantiate(cfg.dataloader.test):
        if len(written) >= limit:
            break
        with torch.no_grad():
            detections = model(inputs)[0]["instances"].to("cpu")
        record = records[inputs[0]["file_name"]]
        image = cv2.cvtColor(cv2.imread(record["file_name"]), cv2.COLOR_BGR2RGB)
        picture = compare(
            image, ground_truth(record), detections, classes, score_thresh=score_thresh
        )
        path = folder / f"{Path(record['file_name']).stem}.png"
        cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        written.append(path)
    return written


def _table(metrics: dict[str, float]) -> str:
    return tabulate(
        [[f"{value:.1f}" for value in metrics.values()]], headers=list(metrics), tablefmt="pipe"
    )


if __name__ == "__main__":
    sys.exit(main())
