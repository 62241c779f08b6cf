# SPDX-License-Identifier: Apache-2.0
"""One comparison of the benchmark."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

__all__ = ["Row", "Step"]

Step = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        ours: builds our side; the result is called to run it once.
        reference: builds the other side.
        reference_name: what it is.
        target: the ratio of times ours / reference that shall not be exceeded.
        setting: what both sides were given.
        device: "cpu" or "cuda": where both sides run.
        least_bytes: what our side must read and write, everything once. Then a copy that moves as
            many is timed too: the memory's floor under any implementation.
        floor_target: the ratio ours / floor that shall not be exceeded.
        peak_target: the ratio of peak memory ours / reference that shall not be exceeded.
        needs: a module of the reference that must be installed; the row is left out without it.
    """

    ours: Callable[[], Step]
    reference: Callable[[], Step]
    reference_name: str
    target: float
    setting: str
    device: str = "cpu"
    least_bytes: int | None = None
    floor_target: float | None = None
    peak_target: float | None = None
    needs: str | None = None

    @property
    def installed(self) -> bool:
        """Whether what the reference needs is there."""
        return self.needs is None or find_spec(self.needs) is not None
