# SPDX-License-Identifier: Apache-2.0
"""Loading and saving of weights."""

from .checkpointer import Checkpointer, CheckpointError

__all__ = ["CheckpointError", "Checkpointer"]
