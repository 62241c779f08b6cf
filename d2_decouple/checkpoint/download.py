# SPDX-License-Identifier: Apache-2.0
"""Files from an address: fetched once, whole or not at all, and compared with their hash."""

import hashlib
import logging
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from .errors import WEIGHTS_KEYS, CheckpointError, DamagedCheckpointError

__all__ = ["Address", "cache_folder", "download", "parse_address", "sha256_of"]

_logger = logging.getLogger(__name__)

_SECONDS = 30  # without an answer
_PIN = re.compile(r"sha256=([0-9a-fA-F]{8,64})")
# What torchvision and mmdetection end their files' names with: the beginning of the SHA-256.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|pkl|pyth|safetensors)")


class Address(NamedTuple):
    """Where a file lies.

    Attributes:
        url: without a fragment.
        sha256: how its hash begins, in small letters; empty where nobody has said it.
    """

    url: str
    sha256: str = ""


def parse_address(source: str) -> Address:
    """Read ``https://host/file.pth#sha256=0123abcd...``.

    Without a pin, a name that ends in its hash (``resnet18-f37072fd.pth``) is one. An ending of
    digits alone is none: it is a date or a number of iterations.

    Raises:
        CheckpointError: a fragment that is no such pin.
    """
    url, _, pin = source.partition("#")
    if pin:
        match = _PIN.fullmatch(pin)
        if match is None:
            raise CheckpointError(
                f"{source} ends in #{pin}; wanted is #sha256= and 8 to 64 hexadecimal digits of "
                "the file's SHA-256, or nothing"
            )
        return Address(url, match[1].lower())
    match = _HASH_IN_NAME.search(urlsplit(url).path)
    return Address(url, match[1] if match and not match[1].isdigit() else "")


def cache_folder() -> Path:
    """Where Detectron2 keeps what it fetches: $FVCORE_CACHE, or ~/.torch/iopath_cache."""
    return Path(os.environ.get("FVCORE_CACHE") or "~/.torch/iopath_cache").expanduser()


def download(source: str, *, called: str = "") -> Path:
    """The path of the file at an address, below :func:`cache_folder` as Detectron2 has it.

    An address with a query ("?") has a file of its own, with a hash of the query in its name.

    It is fetched when it is not there. Its SHA-256 is then written beside it, and compared at
    every later call: a file that has changed since is not used.

    Args:
        source: as :func:`parse_address` reads it.
        called: the name that the user typed, for messages.

    Raises:
        DamagedCheckpointError: what lies there, or what came, has another hash.
        CheckpointError: it could not be fetched; the message says where to put it by hand.
        HTTPError: the server has no such file.
    """
    address = parse_address(source)
    file = _place(address.url)
    if not file.is_file():
        _refuse_folder(file, source)
        with _fetching(address.url, file, called or source):
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file):
                if not file.is_file():  # another process may have been faster
                    _fetch(address, file, called or source)
                    return file
    _check_kept(address, file)
    return file


def _place(url: str) -> Path:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or not parts.path.strip("/"):
        raise CheckpointError(
            f"{url} is no address of a file; wanted is https://HOST/FOLDER/FILE (or set "
            f"{WEIGHTS_KEYS} to a file)"
        )
    path = [part for part in unquote(parts.path).split("/") if part not in ("", ".", "..")]
    host = parts.netloc.rpartition("@")[2].replace(":", "_")
    file = cache_folder().joinpath(host, *path)
    if not parts.query:
        return file
    # Behind the same path another query may be another file; what it is read as, its suffix says.
    query = hashlib.sha256(parts.query.encode()).hexdigest()[:16]
    return file.with_name(f"{file.stem}.query-{query}{file.suffix}")


def _refuse_folder(file: Path, source: str) -> None:
    if file.is_dir():
        raise CheckpointError(
            f"{source} names a folder of files, not a file; type its whole address"
        )


def _note(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


@contextmanager
def _fetching(url: str, file: Path, called: str) -> Iterator[None]:
    """Say where the file belongs when the network or the disk fails in the block."""
    try:
        yield
    except HTTPError:
        raise
    except (OSError, HTTPException) as error:  # the latter: an answer that is no HTTP
        room = ""
        if file.parent.is_dir():
            free = shutil.disk_usage(file.parent).free / 2**20
            room = f"; {free:.0f} MiB are free in {file.parent}"
        raise CheckpointError(
            f"{called} could not be fetched ({str(error) or type(error).__name__}{room}); without "
            f"a network, bring the file {url} here and put it to {file}, or set {WEIGHTS_KEYS} to "
            "it, or to an empty string for random weights"
        ) from error


def _fetch(address: Address, file: Path, called: str) -> None:
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with open(unfinished, "wb") as output:
            _copy(address.url, output)
        found = sha256_of(unfinished)
        if not found.startswith(address.sha256):
            raise DamagedCheckpointError(
                f"{called} was fetched, and its SHA-256 begins with {found[:16]}; wanted is "
                f"{address.sha256}. It was thrown away: try again, or correct #sha256="
            )
        _note(file).write_text(found + "\n", encoding="ascii")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    _logger.info("%s is %s, SHA-256 %s", called, file, found)


def _copy(url: str, output: Any) -> None:
    """Everything that the server has; OSError where it breaks off."""
    request = urllib.request.Request(url, headers={"User-Agent": "d2-decouple"})
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        promised = answer.headers.get("Content-Length")
        shutil.copyfileobj(answer, output, 2**20)
    if promised is not None and output.tell() != int(promised):
        raise OSError(f"{output.tell()} of {promised} bytes came")


def _check_kept(address: Address, file: Path) -> None:
    found, note = sha256_of(file), _note(file)
    known = note.read_text(encoding="ascii", errors="replace").strip() if note.is_file() else ""
    for wanted, where in ((address.sha256, "the address says"), (known, f"{note.name} says")):
        if not found.startswith(wanted):
            raise DamagedCheckpointError(
                f"{file} has a SHA-256 that begins with {found[:16]}, {where} {wanted[:16]}: it "
                f"was changed or is another file; delete it and {note.name}, and it is fetched "
                "again"
            )
    if not known:  # brought here by hand, or by Detectron2
        try:
            note.write_text(found + "\n", encoding="ascii")
        except OSError as error:  # a cache that belongs to somebody else
            _logger.warning("%s cannot be written, so %s is not watched: %s", note, file, error)


def sha256_of(file: Path) -> str:
    """The file's SHA-256 in hexadecimal digits; it is not read whole into the memory."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Let one process at a time fetch a file, where the system can lock files."""
    lock = file.with_name(file.name + ".lock")
    try:
        import fcntl
    except ImportError:  # not a Unix: two may fetch it, and the last one's stays
        yield
        return
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
