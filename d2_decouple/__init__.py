# SPDX-License-Identifier: Apache-2.0
"""Dense detectors on Detectron2 whose two tasks, classification and localisation, are decoupled.

Importing this package is cheap: it loads neither torch nor Detectron2. ``import
d2_decouple.modeling`` registers the meta-architectures with Detectron2.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY_NAMES = {
    "DensePredictions": "structures",
    "DenseTargets": "structures",
    "OneStageDetector": "modeling",
    "Predictor": "engine.predictor",
    "add_decouple_config": "config",
    "config_names": "config",
    "get_config": "config",
}

__all__ = ["__version__", *sorted(_LAZY_NAMES)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"{__name__}.{_LAZY_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_NAMES})
