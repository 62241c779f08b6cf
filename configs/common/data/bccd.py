# SPDX-License-Identifier: Apache-2.0
"""Blood cells (BCCD, 364 microscope images, three classes), small enough for a CPU.

The images are looked for in $DETECTRON2_DATASETS/BCCD, or datasets/BCCD where that is not set:
`git clone https://github.com/Shenggan/BCCD_Dataset datasets` puts them there. The 60 images of
`bccd_mini_train` and `bccd_mini_val` come with a checkout.
"""

from d2_decouple.data import register_bccd

from .coco import dataloader

register_bccd()

dataloader.train.dataset.names = "bccd_train"
dataloader.test.dataset.names = "bccd_test"

# The images are 640 x 480: this is half their size, and a red cell is still 50 pixels wide.
for _mapper in (dataloader.train.mapper, dataloader.test.mapper):
    _mapper.augmentations[0].update(short_edge_length=240, max_size=400)

dataloader.train.total_batch_size = 4
dataloader.train.num_workers = 2
dataloader.test.num_workers = 2
