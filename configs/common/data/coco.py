# SPDX-License-Identifier: Apache-2.0
"""COCO 2017 as the papers' hosts use it: short side 800, long side at most 1333, flipped or not."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from omegaconf import OmegaConf

from d2_decouple.data import TrainLoader
from d2_decouple.data.augmentation import BoxAwareMapper
from d2_decouple.evaluation import BoxEvaluator

dataloader = OmegaConf.create()

dataloader.train = L(TrainLoader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
    mapper=L(BoxAwareMapper)(
        is_train=True,
        augmentations=[
            L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333),
            L(T.RandomFlip)(prob=0.5, horizontal=True),
        ],
        image_format="BGR",
        use_instance_mask=False,
    ),
    total_batch_size=16,
    num_workers=4,
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
    mapper=L(BoxAwareMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(BoxEvaluator)(
    dataset_name="${..test.dataset.names}",
    output_dir="${train.output_dir}",
)
