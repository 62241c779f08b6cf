# SPDX-License-Identifier: Apache-2.0
"""COCO 2017 as in `coco`, read in the order that torchvision's weights were trained with."""

from .coco import dataloader

dataloader.train.mapper.image_format = "RGB"
