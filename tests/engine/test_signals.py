# SPDX-License-Identifier: Apache-2.0
"""What a process does when it is told to stop."""

import os
import signal
import threading
import time

import pytest

from d2_decouple.engine import signals
from d2_decouple.engine.signals import StopRequest


def tell(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # Python runs handlers between two instructions


def test_the_first_signal_is_noted_and_its_repetition_is_the_same_one():
    """`timeout` sends SIGTERM to its command, and then to the group that the command is in."""
    request = StopRequest()
    with request.listening():
        assert request.number is None
        tell(signal.SIGTERM)
        tell(signal.SIGTERM)
        assert request.number == signal.SIGTERM


def test_a_second_signal_does_what_it_always_did(monkeypatch):
    monkeypatch.setattr(signals, "_AGAIN", 0.05)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        request = StopRequest()
        with request.listening():
            tell(signal.SIGTERM)
            time.sleep(0.1)
            with pytest.raises(KeyboardInterrupt):
                tell(signal.SIGINT)
        assert request.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_ignored():
    """A shell starts a command in the background of a script so; Ctrl-C is not for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        request = StopRequest()
        with request.listening():
            tell(signal.SIGINT)
            assert request.number is None
            tell(signal.SIGTERM)
            assert request.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_listens_to_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen():
        with StopRequest().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
