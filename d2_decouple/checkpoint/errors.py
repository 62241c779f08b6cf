# SPDX-License-Identifier: Apache-2.0
"""What everything here raises when weights cannot be used."""

__all__ = ["WEIGHTS_KEYS", "CheckpointError", "DamagedCheckpointError"]

#: Where a user sets the weights, for messages.
WEIGHTS_KEYS = "train.init_checkpoint (yacs: MODEL.WEIGHTS)"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or fetched, or that belongs to another model."""


class DamagedCheckpointError(CheckpointError):
    """A file that is no checkpoint, or only a part of one."""
