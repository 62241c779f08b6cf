# SPDX-License-Identifier: Apache-2.0
"""What a user can mend: a command prints the message alone, without a traceback."""

from ..checkpoint import CheckpointError
from ..config import ConfigError
from ..data.loader import DataError
from ..evaluation import EvaluationError

__all__ = ["EXPECTED_ERRORS", "TrainingError", "TrainingStoppedError"]


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says why, and what to type."""


class TrainingStoppedError(TrainingError):
    """A training that was asked to stop, and whose state is saved.

    Attributes:
        exit_status: of a command that ends by it: 128 + the signal's number, as shells have it.
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


EXPECTED_ERRORS = (
    ConfigError,
    CheckpointError,
    DataError,
    EvaluationError,
    TrainingError,
    FileNotFoundError,
)
"""Errors whose message is written for the user of a command."""
