# SPDX-License-Identifier: Apache-2.0
"""What a call does in a process of its own: its answer, its time, the memory that it took."""

import json
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MEMORY_MIB = 6144  # of addresses, beyond what the process has; a call that wants more fails
SECONDS = 240  # of wall time; a busy machine needs more than the call itself


class Answer(NamedTuple):
    """What came of a call.

    Attributes:
        kind: the name of the exception's class, "returned", or what ended the process.
        text: of the exception, or of what was returned.
        seconds: of computing.
        peak_mib: memory that was in use at most, beyond what was in use before.
        outside: a file of the folder ``outside`` that was opened or made, or empty.
    """

    kind: str
    text: str
    seconds: float
    peak_mib: float
    outside: str = ""


def measured(call: Callable[[], Any], base: Path) -> Answer:
    """Call in a copy of this process; needs Linux. ``base`` has the folder ``outside``."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            os.write(writer, json.dumps(_answer(call, base / "outside")).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], SECONDS)
    peak = _status("VmHWM", child)
    if not ready:
        os.kill(child, signal.SIGKILL)
    content = os.read(reader, 65_536)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if not ready:
        return Answer("stopped", f"after {SECONDS} s", SECONDS, peak - _status("VmRSS"))
    if not content:
        return Answer("died", f"of signal {status & 127}", 0.0, 0.0)
    return Answer(*json.loads(content))


def _answer(call: Callable[[], Any], outside: Path) -> Answer:
    opened: list[str] = []
    outside = outside.resolve()  # as the names below, whose links are looked through

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        # Of every opening in Python; a name is as it was given, so links are looked through.
        if event == "open" and isinstance(arguments[0], str | bytes):
            name = os.path.realpath(os.fsdecode(arguments[0]))
            opened.extend([name] * name.startswith(f"{outside}/"))

    sys.addaudithook(watch)
    present = {*outside.iterdir()}
    limit = int(_status("VmSize") * 2**20) + MEMORY_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before, start = _status("VmHWM"), time.process_time()
    try:
        kind, text = "returned", str(call())[:200]
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer
        kind, text = type(error).__name__, str(error)[:5000]
    seconds, peak = time.process_time() - start, _status("VmHWM") - before
    wrong = [*opened, *map(str, {*outside.iterdir()} - present)]
    return Answer(kind, text, seconds, peak, next(iter(wrong), ""))


def _status(name: str, process: int | str = "self") -> float:
    """MiB of a process; 0 for one that ended."""
    with open(f"/proc/{process}/status") as file:
        found = re.search(rf"{name}:\s+(\d+) kB", file.read())
    return int(found[1]) / 1024 if found else 0.0
