# SPDX-License-Identifier: Apache-2.0
"""A recipe on a folder of one's own: data sets, number of classes and evaluator, nothing else."""

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from ..config import ConfigError
from ..data import FolderDataset
from ..evaluation import BoxEvaluator

__all__ = ["use_folder", "use_folder_yacs"]

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
