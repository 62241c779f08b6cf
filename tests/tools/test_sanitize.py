# SPDX-License-Identifier: Apache-2.0
"""The run under sanitizers says what it lacks, and cannot pass where nothing is watched."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
from helpers_of_tools import TOOLS, fake_program

sys.path.append(str(TOOLS))
sanitize = importlib.import_module("sanitize")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.delenv("CXX", raising=False)
    try:
        return sanitize.sanitized_environment()
    except sanitize.SanitizeError as error:
        pytest.skip(str(error))


def test_planted_faults_are_reported(
    environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = sanitize.sanitizing_compiler(tmp_path)
    sanitize.check_planted_faults(tmp_path, compiler, environment)
    assert capsys.readouterr().out.count("Planted fault is reported") == len(sanitize.FAULTS) == 2


def test_sanitizers_that_see_nothing_are_an_error(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitize, "FLAGS", [])
    compiler = sanitize.sanitizing_compiler(tmp_path)
    with pytest.raises(sanitize.SanitizeError, match="the tests would prove nothing"):
        sanitize.check_planted_faults(tmp_path, compiler, environment)


def test_extension_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    """All tests of the kernels would be skipped, and pytest would be content."""
    sanitize.copy_package(tmp_path)
    with pytest.raises(sanitize.SanitizeError, match="The extension does not load"):
        sanitize.check_extension(tmp_path, {**os.environ, "PYTHONPATH": str(tmp_path)})


def test_copy_holds_the_tests_and_nothing_that_was_built(tmp_path: Path) -> None:
    sanitize.copy_package(tmp_path)
    assert all((tmp_path / test).is_file() for test in sanitize.TESTS)
    assert (tmp_path / "csrc" / "cpu" / "point_gather.cpp").is_file()
    assert not [*tmp_path.rglob("*.so"), *tmp_path.rglob("__pycache__")]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system is what is named")
def test_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++-99"))
    assert sanitize.main([]) == 2
    said = capsys.readouterr().err
    assert f"There is no {tmp_path / 'g++-99'}" in said
    assert "CXX=g++-12" in said


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system is what is named")
def test_compiler_without_sanitizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(fake_program(tmp_path / "g++", "libasan.so", status=0)))
    assert sanitize.main([]) == 2
    assert f"{tmp_path / 'g++'} has no libasan.so. Install" in capsys.readouterr().err
