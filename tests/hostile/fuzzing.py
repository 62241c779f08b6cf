# SPDX-License-Identifier: Apache-2.0
"""Files that are changed by chance, and what must hold of whatever reads them.

A few seconds of each kind are part of the suite. ``D2D_FUZZ_SECONDS`` asks for more, with other
draws each time: ``python tools/fuzz.py`` sets it.
"""

import builtins
import io
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SECONDS = int(os.environ.get("D2D_FUZZ_SECONDS", "0"))
SLOWEST = 1.0  # seconds of computing for one file of a few hundred bytes
PROFILE = settings(
    max_examples=1000 if SECONDS else 40,
    derandomize=not SECONDS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TOKENS = [
    b"",
    b"-1",
    b"0",
    b"nan",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 400,
    b"0x" + b"f" * 5000,
    b"2001-99-99",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    "\u202e\u00e9\u4e2d".encode(),
    b'"\\ud800"',
    b'"\\UFFFFFFFF"',
    b"../outside/secret",
    b"../outside/secret.png",
    b"x//outside/secret.png",
    b"b/../../outside/secret.png",
    b"/dev/zero",
    b"C:\\a.png",
    b"a" * 300,
    b"[" * 3000,
    b"<a>" * 3000,
    b"&x [*x]",
    b"*x",
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
    b"!!python/object/apply:os.getcwd []",
    b"!!bool x",
    b"!!timestamp x",
    b"null",
    b"[]",
    b"{}",
    b"true",
    b"1",
    b'"1"',
]
_WORD = re.compile(rb'"[^"]*"|[\w./-]+')

places = st.floats(0, 1, exclude_max=True)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), places, st.integers(0, 255)),
        st.tuples(st.just("cut"), places, st.none()),
        st.tuples(st.just("drop"), places, st.integers(1, 40)),
        st.tuples(st.just("twice"), places, st.integers(1, 80)),
        st.tuples(st.just("put"), places, st.sampled_from(TOKENS)),
        st.tuples(st.just("word"), places, st.sampled_from(TOKENS)),
        st.tuples(st.just("word"), places, st.sampled_from(TOKENS)),
    ),
    min_size=1,
    max_size=3,
)


def changed(content: bytes, how: list[tuple[str, float, Any]]) -> bytes:
    """The content with these changes, in their order; places are shares of its length."""
    for kind, share, what in how:
        place = int(share * len(content))
        if kind == "flip" and content:
            content = content[:place] + bytes([what]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "drop":
            content = content[:place] + content[place + what :]
        elif kind == "twice":
            content = content[: place + what] + content[place:]
        elif kind == "put":
            content = content[:place] + what + content[place:]
        elif kind == "word" and (words := [*_WORD.finditer(content)]):
            word = words[int(share * len(words))]
            content = content[: word.start()] + what + content[word.end() :]
    return content


class Log:
    """What happened to the files of one kind."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.slowest = 0.0


@contextmanager
def folder_with(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder with these files, and ``outside`` beside it with one that nothing may open."""
    base = Path(tempfile.mkdtemp(prefix="fuzz"))
    system_open = builtins.open

    def watched_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        assert "/outside/" not in os.path.realpath(str(file)), f"{file} was opened"
        return system_open(file, *args, **kwargs)

    try:
        for name, content in {**files, "../outside/secret.png": files["a.png"]}.items():
            file = Path(os.path.normpath(base / "folder" / name))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        # What pathlib calls, and what Pillow and others do.
        io.open = builtins.open = watched_open
        yield base / "folder"
    finally:
        io.open = builtins.open = system_open
        shutil.rmtree(base)


def answer(read: Callable[[], Any], errors: tuple[type[Exception], ...], log: Log) -> Any:
    """What was read, or None after an error of ours; any other error goes on."""
    refusal: Exception | None = None
    start = time.process_time()
    try:
        found = read()
        log.answers["read"] += 1
    except errors as caught:
        refusal, found = caught, None
        log.answers[type(caught).__name__] += 1
    # Ours have a sentence; the system's have a number.
    assert getattr(refusal, "errno", None) is None, repr(refusal)
    assert len(str(refusal)) < 50_000  # a name of 5000 letters may be said some times
    took = time.process_time() - start
    log.slowest = max(log.slowest, took)
    assert took < SLOWEST, f"{took:.1f} s"
    return found


def repeated(check: Callable[[], None], log: Log) -> None:
    """Run a property once, or as long as ``D2D_FUZZ_SECONDS`` says, and print what happened."""
    end = time.monotonic() + SECONDS
    check()
    while time.monotonic() < end:
        check()
    counts = ", ".join(f"{count} {name}" for name, count in log.answers.most_common())
    print(f"{sum(log.answers.values())} files: {counts}; slowest {log.slowest:.2f} s")


def check_records(records: list[dict[str, Any]], folder: Path, num_classes: int) -> None:
    """What everything behind a reader relies on."""
    assert records
    assert len({record["image_id"] for record in records}) == len(records)
    for record in records:
        file = Path(record["file_name"])
        assert file.resolve().is_relative_to(folder.resolve()), file
        assert file.is_file()
        assert isinstance(record["image_id"], int | str)
        for side in ("height", "width"):
            assert isinstance(record[side], int)
            assert 1 <= record[side] < 2**31
        for item in record["annotations"]:
            x1, y1, x2, y2 = item["bbox"]
            assert 0 <= x1 < x2 <= record["width"]
            assert 0 <= y1 < y2 <= record["height"]
            assert item["category_id"] in range(num_classes)
            assert item["iscrowd"] in (0, 1)
            assert np.float64(item.get("area", 1)) > 0
