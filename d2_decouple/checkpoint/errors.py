# SPDX-License-Identifier: Apache-2.0
"""What everything here raises when weights cannot be used."""

from collections.abc import Iterable

__all__ = ["WEIGHTS_KEYS", "CheckpointError", "DamagedCheckpointError", "listed"]

#: Where a user sets the weights, for messages.
WEIGHTS_KEYS = "train.init_checkpoint (yacs: MODEL.WEIGHTS)"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or fetched, or that belongs to another model."""


class DamagedCheckpointError(CheckpointError):
    """A file that is no checkpoint, or only a part of one."""


def listed(names: Iterable[str], most: int) -> str:
    """The first names for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if names[most:] else ""
    return ", ".join(names[:most]) + more
