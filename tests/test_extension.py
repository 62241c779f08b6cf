# SPDX-License-Identifier: Apache-2.0
"""Whether the compiled operators are loaded, and the reason that is given where they are not."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from util import environment

from d2_decouple import extension
from d2_decouple.config import ConfigError

BUILD = "D2D_BUILD_EXT=1 pip install --no-build-isolation -e ."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a made-up extension and its record are looked for; at first there is neither."""
    monkeypatch.delenv("D2D_USE_EXT", raising=False)
    monkeypatch.setattr(extension, "MODULE", "made_up_operators")
    monkeypatch.setattr(extension, "RECORD", tmp_path / "_C_build.json")
    monkeypatch.delitem(sys.modules, "made_up_operators", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def make(folder: Path, source: str = "", **record: Any) -> None:
    (folder / "made_up_operators.py").write_text(source + "\n")
    (folder / "_C_build.json").write_text(json.dumps({"torch": torch.__version__, **record}))


def asked() -> extension.Status:
    """The status, without the answer that was kept."""
    return extension.status.__wrapped__()


def test_status_agrees_with_the_dispatcher() -> None:
    code = (
        "import torch\n"
        "from d2_decouple.extension import status\n"
        "loaded, cpu, cuda, reason = status()\n"
        "assert status() is status()\n"
        "print(loaded, cpu, cuda)\n"
        "print(hasattr(torch.ops.d2_decouple, 'point_gather'))\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "for key in 'CPU', 'CUDA':\n"
        "    print(loaded and has('d2_decouple::point_gather', key))\n"
        "print(reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told, *registered, reason = done.stdout.splitlines()
    assert told.split() == registered
    assert reason.startswith("compiled for the CPU") == (told.split()[0] == "True")


def test_nothing_was_built(folder: Path) -> None:
    (folder / "_C_build.json").write_text('{"torch": null, "missing": "no compiler"}')
    assert asked() == (False, False, False, asked().reason)
    assert asked().reason.startswith("not built (no compiler); to build it, type in a checkout: ")
    assert asked().reason.endswith(BUILD)


def test_nothing_was_built_and_nothing_tells_why(folder: Path) -> None:
    assert asked().loaded is False
    assert "not built (nothing tells how it was built (_C_build.json: " in asked().reason
    assert BUILD in asked().reason


def test_operators_of_another_place_are_not_taken(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable install of another checkout makes its modules known under the same name."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    make(elsewhere)
    monkeypatch.syspath_prepend(elsewhere)
    (folder / "_C_build.json").write_text('{"torch": null, "missing": "no compiler"}')
    assert asked().reason.startswith("not built (no compiler)")


def test_built_for_the_cpu(folder: Path) -> None:
    make(folder, cuda=None, missing="no CUDA: there is no nvcc on the path")
    reason = "compiled for the CPU; no CUDA: there is no nvcc on the path"
    assert asked() == (True, True, False, reason)


def test_built_for_cuda(folder: Path) -> None:
    make(folder, cuda="13.0", architectures="8.0;9.0+PTX", missing="")
    assert asked() == (True, True, True, "compiled for the CPU and CUDA 13.0 (8.0;9.0+PTX)")


@pytest.mark.parametrize(("value", "loaded"), [("0", False), ("1", True)])
def test_switched_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: str, loaded: bool
) -> None:
    make(folder, "" if loaded else "raise AssertionError('loaded')")
    monkeypatch.setenv("D2D_USE_EXT", value)
    assert asked().loaded == loaded
    if not loaded:
        assert asked().reason == "not loaded, because D2D_USE_EXT=0"


@pytest.mark.parametrize("value", ["no", "2"])
def test_unknown_wish(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("D2D_USE_EXT", value)
    with pytest.raises(ConfigError, match=rf"D2D_USE_EXT is '{value}'; wanted is 1 .* or 0"):
        asked()


@pytest.mark.parametrize("built_for", ["1.13.1", "2.3.0+cu121", None])
def test_built_for_another_torch(folder: Path, built_for: str | None) -> None:
    make(folder, "raise AssertionError('loaded')", torch=built_for)
    status = asked()
    assert status[:3] == (False, False, False)
    assert (
        f"was built for torch {built_for}, and this is torch {torch.__version__}" in status.reason
    )
    assert BUILD in status.reason


def test_patch_level_and_build_of_torch_do_not_matter(folder: Path) -> None:
    make(folder, torch=".".join([*torch.__version__.split(".")[:2], "99+other"]))
    assert asked().loaded


RECORDS = {
    "lost": (None, "_C_build.json"),
    "empty": ("", "_C_build.json: Expecting value"),
    "cut off": ('{"torch": "2.', "_C_build.json: Unterminated string"),
    "binary": (b"\xff\xfe\x00", "_C_build.json: 'utf-8' codec"),
    "list": ("[]", "_C_build.json has no version of torch"),
    "nameless": ('{"missing": "all"}', "_C_build.json has no version of torch"),
    "number": ('{"torch": 2.15}', "_C_build.json has no version of torch"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_record_that_cannot_be_read(folder: Path, case: str) -> None:
    content, reason = RECORDS[case]
    make(folder, "raise AssertionError('loaded')")
    (folder / "_C_build.json").unlink()
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "_C_build.json").write_bytes(data)
    status = asked()
    assert not status.loaded
    assert status.reason.startswith("not loaded, because nothing tells how it was built (")
    assert reason in status.reason
    assert BUILD in status.reason


def test_damaged_file_is_told_in_the_words_of_the_loader(folder: Path) -> None:
    make(folder)
    (folder / "made_up_operators.py").unlink()
    (folder / f"made_up_operators{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    with pytest.raises(ImportError) as caught:
        __import__("made_up_operators")
    status = asked()
    assert not status.loaded
    assert str(caught.value) in status.reason
    assert BUILD in status.reason


def test_torch_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    status = asked()
    assert not status.loaded
    assert status.reason.startswith("not loaded, because PyTorch cannot be imported: ")
