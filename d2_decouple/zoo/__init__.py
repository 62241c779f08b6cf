# SPDX-License-Identifier: Apache-2.0
"""Every model by name: what it is, what it costs, what it reached, and the model itself."""

from .catalogue import Costs, Entry, Measured, ZooError, entries, entry
from .models import ZooModel, get, train, trained_weights

__all__ = [
    "Costs",
    "Entry",
    "Measured",
    "ZooError",
    "ZooModel",
    "entries",
    "entry",
    "get",
    "train",
    "trained_weights",
]
