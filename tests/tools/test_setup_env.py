# SPDX-License-Identifier: Apache-2.0
"""The set-up of the environment: when it has nothing to do, what it keeps, how it fails.

Nothing is downloaded, and the environment that the tests run in is not changed.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_of_tools import (
    ROOT,
    closed_address,
    environment,
    fake_program,
    only_index,
    pip_steps,
    run_tool,
)

ALL = ["venv", "build_tools", "torch", "detectron2", "package"]


def run_script(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_tool("setup_env.py", *arguments, **variables)


@pytest.fixture(scope="module")
def real_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty virtual environment with pip, made once; tests must not change it."""
    folder = tmp_path_factory.mktemp("real") / "venv"
    environment._make_venv(environment.Request(folder))
    return folder


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in for the checkout, whose files the stamp covers."""
    root = tmp_path / "checkout"
    (root / "tools").mkdir(parents=True)
    for name in environment.STAMPED_FILES:
        assert (ROOT / name).is_file(), name
        (root / name).write_text("as it was\n")
    monkeypatch.setattr(environment, "ROOT", root)
    return root


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace what the steps do by writing down their names."""
    done: list[str] = []

    def record(name: str) -> Callable[..., None]:
        return lambda *arguments: done.append(name)

    def make(request: environment.Request) -> None:
        request.venv.mkdir(exist_ok=True)
        (request.venv / environment.MARK).touch()
        (request.venv / environment.STAMP).unlink(missing_ok=True)
        done.append("venv")

    monkeypatch.setattr(environment, "_make_venv", make)
    for name in ("build_tools", "torch", "detectron2", "package"):
        monkeypatch.setattr(environment, f"_install_{name}", record(name))
    monkeypatch.setattr(environment, "_is_complete", lambda *arguments: True)
    return done


def set_up(request: environment.Request) -> None:
    environment.set_up(request, environment.Progress())


def test_second_call_has_nothing_to_do(
    tmp_path: Path, checkout: Path, actions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    request = environment.Request(tmp_path / "venv")
    set_up(request)
    assert actions == ALL
    capsys.readouterr()
    set_up(request)
    assert actions == ALL
    assert "is up to date" in capsys.readouterr().out


@pytest.mark.parametrize("name", environment.STAMPED_FILES)
def test_changed_files_are_noticed(
    name: str, tmp_path: Path, checkout: Path, actions: list[str]
) -> None:
    request = environment.Request(tmp_path / "venv")
    set_up(request)
    (checkout / name).write_text("as it is now\n")
    set_up(request)
    assert actions == ALL * 2


def test_changed_sources_of_the_operators_are_noticed(
    tmp_path: Path, checkout: Path, actions: list[str]
) -> None:
    kernel = checkout / "csrc" / "cpu" / "kernel.cpp"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("as it was\n")
    request = environment.Request(tmp_path / "venv")
    set_up(request)
    kernel.write_text("as it is now\n")
    set_up(request)
    set_up(request)
    assert actions == ALL * 2


def test_changed_wishes_are_noticed(tmp_path: Path, checkout: Path, actions: list[str]) -> None:
    wheel = tmp_path / "d2_decouple-1-py3-none-any.whl"
    wheel.write_bytes(b"first")
    first = environment.Request(tmp_path / "venv")
    wishes = [
        first,
        first._replace(torch="torch==2.4.1 torchvision==0.19.1"),
        first._replace(operators="1"),
        first._replace(wheel=wheel),
        first._replace(dev=True),
    ]
    for count, request in enumerate(wishes, start=1):
        set_up(request)
        assert actions == ALL * count, request
    set_up(first)  # the linters may stay
    assert actions == ALL * len(wishes)
    set_up(first._replace(wheel=wheel))
    wheel.write_bytes(b"second")
    set_up(first._replace(wheel=wheel))
    assert actions == ALL * (len(wishes) + 2)


def test_no_stamp_after_a_failure(
    tmp_path: Path, checkout: Path, actions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise pip_steps.StepError("for this test")

    request = environment.Request(tmp_path / "venv")
    set_up(request)
    (checkout / "setup.py").write_text("as it is now\n")
    with monkeypatch.context() as patch:
        patch.setattr(environment, "_install_package", fails)
        with pytest.raises(pip_steps.StepError):
            set_up(request)
    assert not (request.venv / environment.STAMP).exists()
    actions.clear()
    set_up(request)
    assert actions == ALL


def test_stamp_is_not_believed_blindly(
    tmp_path: Path, checkout: Path, actions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = environment.Request(tmp_path / "venv")
    set_up(request)
    monkeypatch.setattr(environment, "_is_complete", lambda *arguments: False)
    set_up(request)
    assert actions == ALL * 2, "a package has been removed"
    monkeypatch.setattr(environment, "_is_complete", lambda *arguments: True)
    (request.venv / environment.STAMP).write_text("{half")
    set_up(request)
    assert actions == ALL * 3, "the stamp is damaged"


def test_packages_are_found_without_importing_them() -> None:
    python = Path(sys.executable)
    assert environment._is_found(python, "torch", "torchvision", "detectron2")
    assert not environment._is_found(python, "torch", "no_such_package")
    assert not environment._is_found(python.with_name("no-python"), "sys")


def test_broken_environment_is_made_again_once(
    tmp_path: Path, checkout: Path, actions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = environment.Request(tmp_path / "venv")
    request.venv.mkdir()
    (request.venv / environment.MARK).touch()
    (request.venv / "half of torch").touch()

    def install_torch(*arguments: object) -> None:
        actions.append("torch")
        if (request.venv / "half of torch").exists():
            raise environment.BrokenEnvironmentError("torch does not work (for this test)")

    monkeypatch.setattr(environment, "_install_torch", install_torch)
    set_up(request)
    assert actions == [*ALL[:3], *ALL]
    (request.venv / environment.STAMP).unlink()
    (request.venv / environment.MARK).unlink()
    (request.venv / "half of torch").touch()
    monkeypatch.setattr(environment, "_make_venv", lambda request: None)
    with pytest.raises(environment.BrokenEnvironmentError):
        set_up(request)
    assert (request.venv / "half of torch").exists(), "not ours, so not deleted"


def test_damaged_torch_is_noticed(tmp_path: Path) -> None:
    python = fake_program(tmp_path / "python", "ImportError: libtorch_cpu.so: file too short")
    tools = pip_steps.Tools(python, tmp_path / "log")
    request = environment.Request(tmp_path / "venv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pip_steps.Tools, "pip", lambda self, *arguments, what: "")
        with pytest.raises(environment.BrokenEnvironmentError, match=r"file too short") as caught:
            environment._install_torch(request, tools, environment.Progress())
    assert f"Delete {request.venv}" in str(caught.value)


def test_stamp_is_readable_by_people(tmp_path: Path, checkout: Path, actions: list[str]) -> None:
    request = environment.Request(tmp_path / "venv", torch="torch==2.4.1")
    set_up(request)
    stamp = json.loads((request.venv / environment.STAMP).read_text())
    assert stamp["torch"] == "torch==2.4.1"
    assert stamp["package"] == str(checkout)


def test_venv_is_made_and_kept(real_venv: Path) -> None:
    request = environment.Request(real_venv)
    assert request.ours
    before = (real_venv / "pyvenv.cfg").stat().st_mtime_ns
    assert "has Python 3." in environment._make_venv(request)
    assert (real_venv / "pyvenv.cfg").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["no interpreter", "no pip", "only begun"])
def test_broken_venv(damage: str, real_venv: Path, tmp_path: Path) -> None:
    request = environment.Request(tmp_path / "venv")
    if damage == "only begun":
        (request.venv / "lib").mkdir(parents=True)
        (request.venv / environment.MARK).touch()
    else:
        shutil.copytree(real_venv, request.venv, symlinks=True)
    if damage == "no interpreter":
        for path in request.python.parent.glob("python*"):
            path.unlink()
    if damage == "no pip":
        for path in request.venv.glob("lib/python*/site-packages/pip"):
            shutil.rmtree(path)
    (request.venv / environment.MARK).rename(tmp_path / "mark")
    with pytest.raises(pip_steps.StepError, match="was not made here, so it is left alone"):
        environment._make_venv(request)
    (tmp_path / "mark").rename(request.venv / environment.MARK)
    assert "made with Python 3." in environment._make_venv(request)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("two years of work")
    done = run_script("--venv", tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path} is not a virtual environment" in done.stderr
    assert "--venv" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    done = run_script("--venv", tmp_path / "thesis.txt")
    assert done.returncode == 1
    assert "thesis.txt is a file" in done.stderr


def test_python_without_ensurepip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian ships it."""
    says = "The virtual environment was not created because ensurepip is not available."
    monkeypatch.setattr(sys, "executable", str(fake_program(tmp_path / "python3", says)))
    name = f"python3.{sys.version_info.minor}-venv"
    with pytest.raises(pip_steps.StepError, match=f"sudo apt install {name}"):
        environment._make_venv(environment.Request(tmp_path / "venv"))


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        pip_steps.Tools, "pip", lambda self, *arguments, what: calls.append(arguments) or ""
    )
    monkeypatch.setattr(pip_steps.Tools, "attempt", lambda self, command: (0, "torch 2"))
    monkeypatch.setattr(environment, "_is_complete", lambda *arguments: True)
    return calls


def test_torch_is_chosen_by_a_variable(
    tmp_path: Path, pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = pip_steps.Tools(Path(sys.executable), tmp_path / "log")
    monkeypatch.delenv("D2D_TORCH", raising=False)
    environment._install_torch(environment._parse([]), tools, environment.Progress())
    monkeypatch.setenv("D2D_TORCH", "torch==2.4.1 torchvision==0.19.1 --index-url 'a b'")
    environment._install_torch(environment._parse([]), tools, environment.Progress())
    assert pip_calls == [
        ("install", "torch", "torchvision"),
        ("install", "torch==2.4.1", "torchvision==0.19.1", "--index-url", "a b"),
    ]


def test_pip_of_others_is_not_replaced(tmp_path: Path, pip_calls: list[tuple[str, ...]]) -> None:
    tools = pip_steps.Tools(Path(sys.executable), tmp_path / "log")
    request = environment.Request(tmp_path)
    environment._install_build_tools(request, tools)
    (tmp_path / environment.MARK).touch()
    environment._install_build_tools(request, tools)
    assert [call[1] for call in pip_calls] == ["setuptools>=77,<82", "pip<26"]


def test_checkout_or_wheel(tmp_path: Path, pip_calls: list[tuple[str, ...]]) -> None:
    tools = pip_steps.Tools(Path(sys.executable), tmp_path / "log")
    request = environment.Request(tmp_path, dev=True)
    environment._install_package(request, tools)
    environment._install_package(request._replace(wheel=Path("a.whl"), dev=False), tools)
    assert pip_calls == [
        ("install", "--no-build-isolation", "--editable", f"{ROOT}[dev]"),
        ("install", "--no-deps", "--force-reinstall", "a.whl"),
        ("install", "a.whl"),
    ]


def test_operators_are_chosen_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("D2D_BUILD_EXT", raising=False)
    assert environment._parse([]).operators == "auto"
    monkeypatch.setenv("D2D_BUILD_EXT", "0")
    assert environment._parse([]).operators == "0"


def test_says_what_became_of_the_operators(
    tmp_path: Path, pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = pip_steps.Tools(Path(sys.executable), tmp_path / "log")
    request = environment.Request(tmp_path)
    assert "collect_env says why" in environment._install_package(request, tools), "no Python there"
    monkeypatch.setattr(environment, "_python_says", lambda python, code: "compiled for the CPU")
    assert environment._install_package(request, tools) == "operators: compiled for the CPU"


def test_wheel_that_is_not_there() -> None:
    done = run_script("--wheel", "no.whl")
    assert done.returncode == 2
    assert "there is no wheel no.whl" in done.stderr


def test_no_network(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    done = run_script("--venv", venv, **only_index(closed_address()))
    assert done.returncode == 1
    assert "[2/5] pip, setuptools, ninja ... failed" in done.stdout
    assert "installing pip, setuptools and ninja: no network" in done.stderr
    assert "the package index cannot be reached" in done.stderr
    assert "HTTPS_PROXY" in done.stderr
    assert "type the same command again" in done.stderr
    log = venv / environment.LOG
    assert f"full output: {log}" in done.stderr
    assert "Connection refused" in log.read_text()
    assert not (venv / environment.STAMP).exists()


def test_disk_full_in_our_own_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(request: environment.Request) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(environment, "_make_venv", full)
    assert environment.main(["--venv", str(tmp_path / "venv")]) == 1
    assert "the disk is full" in capsys.readouterr().err


def test_little_disk_is_said_before_torch(
    tmp_path: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools = pip_steps.Tools(Path(sys.executable), tmp_path / "log")
    monkeypatch.setattr(environment, "free_gib", lambda folder: 2.5)
    request = environment.Request(tmp_path / "venv")
    environment._install_torch(request, tools, environment.Progress())
    assert "only 2.5 GiB of disk are free: torch needs about 6 GiB" in capsys.readouterr().out
    assert pip_calls, "a build for the CPU fits"


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_script("--venv", tmp_path / "file" / "venv")
    assert done.returncode == 1
    assert "Not a directory" in done.stderr
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr


def test_failure_of_detectron2_names_both_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "Detectron2 was not installed. no network: the package index cannot be reached."
    python = fake_program(tmp_path / "venv/bin/python", says)
    tools = pip_steps.Tools(python, tmp_path / "venv" / environment.LOG)
    with pytest.raises(pip_steps.StepError, match=r"install_detectron2\.log"):
        environment._install_detectron2(tools, environment.Progress())
    assert says in capsys.readouterr().out
