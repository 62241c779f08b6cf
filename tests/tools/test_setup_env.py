# SPDX-License-Identifier: Apache-2.0
"""The set-up of the environment: what it keeps away, when it has nothing to do, how it fails.

Nothing is downloaded, and the environment that the tests run in is not changed.
"""

from __future__ import annotations

import ast
import errno
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
SCRIPT = TOOLS / "setup_env.py"
sys.path.append(str(TOOLS))

environment = importlib.import_module("environment")
pip_steps = importlib.import_module("pip_steps")
require_python = importlib.import_module("require_python")


def fake_program(path: Path, says: str, status: int = 1) -> Path:
    """A program that prints and ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return path


def run_script(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def no_network() -> dict[str, str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/simple"
    return {
        "PIP_INDEX_URL": url,
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "1",
        "PIP_NO_CACHE_DIR": "1",
    }


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
    for name in ("setup.py", "pyproject.toml", "tools/environment.py"):
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


ALL = ["venv", "build_tools", "torch", "detectron2", "package"]


# --- the stamp -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml", "tools/environment.py", "new"])
def test_changed_files_are_noticed(
    name: str, tmp_path: Path, checkout: Path, actions: list[str]
) -> None:
    request = environment.Request(tmp_path / "venv")
    set_up(request)
    (checkout / name.replace("new", "tools/new.py")).write_text("as it is now\n")
    set_up(request)
    assert actions == ALL * 2


def test_changed_wishes_are_noticed(tmp_path: Path, checkout: Path, actions: list[str]) -> None:
    wheel = tmp_path / "d2_decouple-1-py3-none-any.whl"
    wheel.write_bytes(b"first")
    first = environment.Request(tmp_path / "venv")
    wishes = [
        first,
        first._replace(torch="torch==2.4.1 torchvision==0.19.1"),
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


# --- the virtual environment -----------------------------------------------------------------


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


def test_what_the_user_set_does_not_leak(
    real_venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package goes into the environment although everything says otherwise."""
    venv = tmp_path / "venv"
    shutil.copytree(real_venv, venv, symlinks=True)
    wheel = tmp_path / "leaf-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("leaf.py", "")
        file.writestr(
            "leaf-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: leaf\nVersion: 1\n"
        )
        file.writestr(
            "leaf-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr("leaf-1.dist-info/RECORD", "")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "pip.py").write_text("raise SystemExit('the wrong pip')\n")
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nuser = true\n")
    for name, value in {
        "PIP_CONFIG_FILE": config,
        "PIP_NO_INDEX": "1",
        "PIP_PREFIX": tmp_path / "prefix",
        "PIP_REQUIRE_VIRTUALENV": "1",
        "PIP_TARGET": tmp_path / "target",
        "PIP_USER": "1",
        "PYTHONHOME": tmp_path / "home",
        "PYTHONPATH": tmp_path / "path",
        "PYTHONUSERBASE": tmp_path / "base",
    }.items():
        monkeypatch.setenv(name, str(value))
    request = environment.Request(venv)
    tools = pip_steps.Tools(request.python, venv / "log")
    tools.pip("install", str(wheel), what="installing leaf")
    assert len(list(venv.glob("lib/python*/site-packages/leaf.py"))) == 1
    assert not any((tmp_path / name).exists() for name in ("prefix", "target", "base"))


def test_what_says_how_to_reach_the_index_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {
        "PIP_INDEX_URL": "a",
        "HTTPS_PROXY": "b",
        "PIP_CERT": "c",
        "PIP_REQUIRE_VIRTUALENV": "1",
    }
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    assert kept.items() <= pip_steps.clean_environment(Path(sys.executable)).items()


# --- what is installed -----------------------------------------------------------------------


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


def test_wheel_that_is_not_there() -> None:
    done = run_script("--wheel", "no.whl")
    assert done.returncode == 2
    assert "there is no wheel no.whl" in done.stderr


# --- failures --------------------------------------------------------------------------------


def test_no_network(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    done = run_script("--venv", venv, **no_network())
    assert done.returncode == 1
    assert "[2/5] pip, setuptools, wheel ... failed" in done.stdout
    assert "installing pip, setuptools and wheel: no network" in done.stderr
    assert "the package index cannot be reached" in done.stderr
    assert "HTTPS_PROXY" in done.stderr
    assert "type the same command again" in done.stderr
    log = venv / environment.LOG
    assert f"full output: {log}" in done.stderr
    assert "Connection refused" in log.read_text()
    assert not (venv / environment.STAMP).exists()


PIP_SAYS = {
    "the disk is full": (
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    ),
    "certificate was refused": (
        "WARNING: Retrying after connection broken by 'SSLError(SSLCertVerificationError(1, "
        "'[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed'))'\n"
        "ERROR: No matching distribution found for torch"
    ),
    "no network": (
        "WARNING: Retrying after connection broken by 'NewConnectionError('Failed to establish a "
        "new connection: [Errno -3] Temporary failure in name resolution')'\n"
        "ERROR: No matching distribution found for torch"
    ),
    "the package index has no torch for Python 3": (
        "ERROR: Could not find a version that satisfies the requirement torch (from versions: "
        "none)\nERROR: No matching distribution found for torch"
    ),
    "compiling failed": "error: command '/usr/bin/gcc' failed with exit code 1",
    "ValueError: of a kind that nobody has seen": (
        "  error: subprocess-exited-with-error\n  ValueError: of a kind that nobody has seen\n"
        "  [end of output]\n" + "  note: This is likely not a problem with pip.\n" * 9
    ),
}


@pytest.mark.parametrize("reason", list(PIP_SAYS))
def test_failure_of_pip_is_explained(reason: str, tmp_path: Path) -> None:
    python = fake_program(tmp_path / "python", PIP_SAYS[reason])
    tools = pip_steps.Tools(python, tmp_path / "log")
    with pytest.raises(pip_steps.StepError, match=f"(?s)^installing torch: .*{reason}") as caught:
        tools.pip("install", "torch", what="installing torch")
    assert str(tools.log) in str(caught.value)
    assert PIP_SAYS[reason] in tools.log.read_text()


def test_disk_full_says_what_is_free_and_what_is_needed(tmp_path: Path) -> None:
    said = pip_steps.explain("OSError: [Errno 28] No space left on device", tmp_path)
    assert f"{pip_steps.free_gib(tmp_path):.1f} GiB free at {tmp_path}" in said
    assert "about 6 GiB with CUDA" in said
    for remedy in ("pip cache purge", "TMPDIR", "D2D_TORCH"):
        assert remedy in said


def test_early_trouble_that_a_retry_cured_is_not_the_reason() -> None:
    output = f"{PIP_SAYS['no network'].splitlines()[0]}\n" + "Downloading\n" * 50 + "ERROR: other"
    assert "no network" not in pip_steps.explain(output, Path())


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


# --- an older Python -------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["setup_env.py", "install_detectron2.py"])
def test_older_python_gets_a_message(script: str, tmp_path: Path) -> None:
    """The version is faked: what is tried is the order of imports and the message."""
    good = fake_program(tmp_path / "python3.12", "", status=0)
    fake_program(tmp_path / "python3.13", "a version manager's placeholder", status=127)
    code = (
        "import os, runpy, shutil, subprocess, sys; sys.version_info = (3, 8, 18, 'final', 0); "
        f"runpy.run_path({str(TOOLS / script)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": f"{tmp_path}", "PYTHONPATH": str(TOOLS)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Python 3.10 or newer is needed" in done.stderr
    assert f"{sys.executable} is Python 3.8.18" in done.stderr
    assert f"On your path there is: {good.name}\n" in done.stderr
    assert "make setup PYTHON=python3.12" in done.stderr
    assert "Traceback" not in done.stderr


def test_older_python_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "On your path there is none. Install one" in require_python.problem((3, 9, 18))
    assert require_python.problem((3, 10, 0)) == ""


@pytest.mark.parametrize("name", ["setup_env", "require_python", "install_detectron2"])
def test_older_python_can_parse(name: str) -> None:
    ast.parse((TOOLS / f"{name}.py").read_text(), feature_version=(3, 6))
    assert "from __future__ import annotations" not in (TOOLS / f"{name}.py").read_text()


# --- the Makefile ----------------------------------------------------------------------------


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", *arguments],
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_make_lists_its_targets() -> None:
    said = run_make().stdout
    for name in ("setup", "run", "test", "test-head", "lint", "benchmark", "wheel", "clean"):
        assert f"make {name} " in said


@pytest.mark.parametrize("name", ["run", "test", "lint", "benchmark", "wheel"])
def test_make_sets_up_first(name: str) -> None:
    commands = run_make("-n", name, "PYTHON=python3.99").stdout.splitlines()
    assert commands[0] == "python3.99 tools/setup_env.py --venv .venv --dev"
    assert all(command.startswith(".venv/bin/python ") for command in commands[1:])
    assert len(commands) > 1


def test_make_with_another_detectron2(tmp_path: Path) -> None:
    done = run_make("test-head", f"DETECTRON2={tmp_path}", "PYTHON=no-python")
    assert done.returncode != 0
    assert f"There is no Detectron2 in '{tmp_path}'" in done.stderr
    assert "make test-head DETECTRON2=DIR" in done.stderr
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").touch()
    commands = run_make("-n", "test-head", f"DETECTRON2={tmp_path}").stdout
    assert f'PYTHONPATH="{tmp_path}" .venv/bin/python -m pytest tests' in commands


def test_stamp_is_readable_by_people(tmp_path: Path, checkout: Path, actions: list[str]) -> None:
    request = environment.Request(tmp_path / "venv", torch="torch==2.4.1")
    set_up(request)
    stamp = json.loads((request.venv / environment.STAMP).read_text())
    assert stamp["torch"] == "torch==2.4.1"
    assert stamp["package"] == str(checkout)
