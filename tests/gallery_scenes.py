# SPDX-License-Identifier: Apache-2.0
"""What the tests of the gallery have in common: tiny models of its recipes, and a scene."""

import numpy as np
import torch
from demo_runs import write_trained
from util import make_instances

from d2_decouple.engine.predictor import Predictor
from d2_decouple.evaluation import GroundTruth, ImageTruth
from d2_decouple.gallery_pictures import Scene, Shot

CLASSES = ("RBC", "WBC", "Platelets")


def write_gallery(folder, models):
    """For each model's recipe a tiny one of its name, and weights for blood cells."""
    files = write_trained(folder, [x.recipe for x in models])
    for recipe, weights in files.values():
        recipe.write_text(f"{recipe.read_text()}train = cfg.train\n")  # SAPD's model asks for it
        content = torch.load(weights, weights_only=True)
        torch.save({**content, "classes": list(CLASSES)}, weights)
    return files


def predictor_of(trained, model):
    return Predictor.from_config(*trained[model.recipe], device="cpu", channels="RGB")


def scene_of(found, size=(480, 640), limit=2):
    """An image of noise whose objects are the first detections, and a plain one."""
    generator = np.random.default_rng(0)
    noise = generator.integers(256, size=(*size, 3), dtype=np.uint8)
    boxes, labels = found.pred_boxes.tensor[:limit], found.pred_classes[:limit]
    truth = make_instances(size, boxes.tolist(), labels.tolist())
    shot = Shot(name="noise", pixels=noise, truth=truth, chosen=tuple(range(limit)))
    objects = ImageTruth(
        boxes.double().numpy(), labels.numpy(), np.zeros(limit, bool), np.ones(limit)
    )
    known = GroundTruth(class_names=CLASSES, dataset_ids=(0, 1, 2), images={"noise": objects})
    return Scene(dataset="", truth=known, shots=(shot,))
