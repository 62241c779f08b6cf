# SPDX-License-Identifier: Apache-2.0
"""Eight real images are learned by heart: the whole chain from image to AP does what it says."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage

from d2_decouple.config import get_config
from d2_decouple.data import BCCD_CLASSES
from d2_decouple.engine import lazy_recipe, train

RECIPES = {  # iterations
    "fcos_R_18_FPN_bccd": 110,
    "pdnet_R_18_FPN_bccd": 110,
    "tscode_atss_R_18_FPN_bccd": 110,
    "salt_R_18_FPN_bccd": 180,
    "sapd_R_18_FPN_bccd": 150,
    "decoupled_rcnn_R_18_FPN_bccd": 90,
}
PLATELETS = BCCD_CLASSES.index("Platelets")


def share_of_platelets(record):
    """The rare class, a tenth of all objects, which PDNet learns late: of eight images with nine
    of them it has not learned them after 230 iterations, which is more than a suite can wait.
    """
    classes = [annotation["category_id"] for annotation in record["annotations"]]
    return classes.count(PLATELETS) / len(classes)


@pytest.fixture
def eight_images():
    name = "overfit_eight"
    get_config("fcos_R_18_FPN_bccd")  # registers the mini set
    images = sorted(DatasetCatalog.get("bccd_mini_train"), key=share_of_platelets)
    DatasetCatalog.register(name, lambda: images[-8:])
    MetadataCatalog.get(name).set(thing_classes=list(BCCD_CLASSES), evaluator_type="coco")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_eight_images_are_overfitted(recipe, eight_images, tmp_path):
    cfg = get_config(
        recipe,
        [
            f"dataloader.train.dataset.names={eight_images}",
            f"dataloader.test.dataset.names={eight_images}",
            "dataloader.train.num_workers=0",
            "dataloader.test.num_workers=0",
            f"train.output_dir={tmp_path}",
            f"train.max_iter={RECIPES[recipe]}",
            "train.eval_period=0",
        ],
    )
    # Nothing that slows learning by heart: no flips, and an optimizer that needs no patience.
    cfg.dataloader.train.mapper.augmentations = cfg.dataloader.train.mapper.augmentations[:1]
    cfg.optimizer = L(torch.optim.AdamW)(params=cfg.optimizer.params, lr=1e-3)
    with EventStorage(0):
        metrics = train(lazy_recipe(cfg))["bbox"]
    assert metrics["AP50"] >= 90, metrics
