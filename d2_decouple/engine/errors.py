# SPDX-License-Identifier: Apache-2.0
"""What a user can mend: a command prints the message alone, without a traceback."""

import os
import sys
import traceback
from collections.abc import Callable

from ..checkpoint import CheckpointError
from ..config import ConfigError
from ..data.loader import DataError
from ..evaluation import EvaluationError

__all__ = [
    "EXPECTED_ERRORS",
    "TrainingError",
    "TrainingStoppedError",
    "report_error",
    "run_command",
]


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


def run_command(work: Callable[[], int | None], *more: type[Exception]) -> int:
    """Do a command's work; an expected error, or one of ``more``, is reported.

    Returns:
        The exit status: what ``work`` returns, 0 for None, or the error's.
    """
    expected: tuple[type[Exception], ...] = (*EXPECTED_ERRORS, *more)
    try:
        return work() or 0
    except expected as error:
        return report_error(error)


def report_error(error: Exception) -> int:
    """Print an error's message, with ``D2D_TRACEBACK=1`` also where it arose; the exit status."""
    if os.environ.get("D2D_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return int(getattr(error, "exit_status", 1))
