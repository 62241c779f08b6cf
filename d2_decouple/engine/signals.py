# SPDX-License-Identifier: Apache-2.0
"""Being told to stop by a signal, and doing it when the state is whole."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN = 1.0  # seconds


class StopRequest:
    """The SIGTERM or SIGINT that this process got, if any.

    Attributes:
        number: of the signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._time = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first signal; one that comes later does what it always did.

        Not one at the same time: `timeout` and some job systems send theirs to a process and to
        its group. A signal that this process was started to ignore stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may
            return
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {
            number: handler
            for number, handler in handlers.items()
            if handler is not None and handler != signal.SIG_IGN
        }

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, frame: FrameType | None) -> None:
            if self.number is None:
                self.number, self._time = number, time.monotonic()
            elif time.monotonic() - self._time > _AGAIN:
                restore()
                signal.raise_signal(number)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()
