# SPDX-License-Identifier: Apache-2.0
"""Loading and saving of weights."""

from .checkpointer import Checkpointer
from .errors import CheckpointError, DamagedCheckpointError

__all__ = ["CheckpointError", "Checkpointer", "DamagedCheckpointError"]
