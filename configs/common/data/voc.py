# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC as the papers use it: trained on trainval of 2007 and 2012, tested on test of 2007.

The images are looked for where Detectron2 looks: in VOC2007 and VOC2012 of $DETECTRON2_DATASETS, or
of datasets where that is not set. Detectron2's own sets (`voc_2007_test`, ...) do not say which
objects are difficult. These do, so that they are neither learned nor demanded, which is VOC's rule.
"""

from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from d2_decouple.data import register_voc

from .coco_rgb import dataloader

for _year, _split in ((2007, "trainval"), (2012, "trainval"), (2007, "test")):
    register_voc(
        f"pascal_voc_{_year}_{_split}",
        f"$DETECTRON2_DATASETS/VOC{_year}",
        _split,
        classes=CLASS_NAMES,
    )

dataloader.train.dataset.names = ["pascal_voc_2007_trainval", "pascal_voc_2012_trainval"]
dataloader.test.dataset.names = "pascal_voc_2007_test"
dataloader.train.total_batch_size = 8
