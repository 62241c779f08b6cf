# SPDX-License-Identifier: Apache-2.0
"""A recipe on a folder of one's own: data sets, classes, evaluator; and what came out best."""

from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from ..checkpoint import CheckpointError
from ..checkpoint.checkpointer import BEST
from ..checkpoint.files import read_torch_file
from ..config import ConfigError
from ..data import FolderDataset
from ..evaluation import BoxEvaluator

__all__ = ["BestCheckpoint", "best_checkpoint", "use_folder", "use_folder_yacs"]

# Where models keep their number of classes: ours and Detectron2's dense ones, two-stage ones.
_NUM_CLASSES = ("num_classes", "roi_heads.num_classes")


def use_folder(cfg: DictConfig, folder: FolderDataset) -> None:
    """Make a LazyConfig train on a folder, in place. Images without objects are trained on, too.

    Raises:
        ConfigError: a model without a known place for its number of classes.
    """
    data = cfg.dataloader
    data.train.dataset.names, data.test.dataset.names = folder.train, folder.test
    data.train.dataset.filter_empty = False
    data.evaluator = L(BoxEvaluator)(
        dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}"
    )
    for key in _NUM_CLASSES:
        *parents, name = key.split(".")
        node = cfg.model
        for parent in parents:
            node = node.get(parent, {})
        if name in node:
            node[name] = len(folder.classes)
            return
    raise ConfigError(
        f"this recipe's model has neither of {', '.join(_NUM_CLASSES)}, so --dataset cannot tell "
        f"it that there are {len(folder.classes)} classes; set that in the config and name the "
        "data sets there: dataloader.train.dataset.names, dataloader.test.dataset.names"
    )


def use_folder_yacs(cfg: CfgNode, folder: FolderDataset) -> None:
    """The same for a yacs config, in place."""
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (folder.train,), (folder.test,)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.MODEL.DECOUPLE.NUM_CLASSES = len(folder.classes)
    # Detectron2's own architectures have their own keys.
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(folder.classes)


class BestCheckpoint(NamedTuple):
    """The best checkpoint of a training.

    Attributes:
        file: where it lies.
        ap: of the test images.
        iterations: done when it was saved.
        last_iterations: done when the training ended.
    """

    file: Path
    ap: float
    iterations: int
    last_iterations: int


def best_checkpoint(output_dir: str) -> BestCheckpoint | None:
    """The best checkpoint in the output folder of a finished training; None if there is none."""
    file = Path(output_dir) / f"{BEST}.pth"
    last = Path(output_dir) / "model_final.pth"
    if not (file.is_file() and last.is_file()):
        return None
    best, final = (read_torch_file(str(path)) for path in (file, last))
    if "best" not in best or "iteration" not in final:
        raise CheckpointError(f"{file} or {last} is no checkpoint of this package; delete it")
    ap = float(best["best"]["bbox/AP"])
    return BestCheckpoint(file, ap, best["iteration"] + 1, final["iteration"] + 1)
