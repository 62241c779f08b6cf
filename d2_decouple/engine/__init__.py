# SPDX-License-Identifier: Apache-2.0
"""What a launcher needs beyond Detectron2's own trainer."""

from .checks import check_data, check_recipe
from .errors import (
    EXPECTED_ERRORS,
    TrainingError,
    TrainingStoppedError,
    report_error,
    run_command,
)
from .recipe import Recipe, lazy_recipe, yacs_recipe
from .train import evaluate, set_up, train

__all__ = [
    "EXPECTED_ERRORS",
    "Recipe",
    "TrainingError",
    "TrainingStoppedError",
    "check_data",
    "check_recipe",
    "evaluate",
    "lazy_recipe",
    "report_error",
    "run_command",
    "set_up",
    "train",
    "yacs_recipe",
]
