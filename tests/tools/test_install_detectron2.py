# SPDX-License-Identifier: Apache-2.0
"""Detectron2's installation: where it comes from, how it is built, what each failure says.

Nothing here changes the environment that the tests run in.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import http.server
import importlib.util
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_of_tools import (
    HEAD_SETUP,
    SNAPSHOT,
    closed_address,
    install_detectron2,
    only_index,
    pip_steps,
    run_tool,
    write_archive,
    write_tree,
)

KEPT_SOURCE = Path(sys.prefix) / "share" / "detectron2-src"


def run_script(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_tool("install_detectron2.py", *arguments, **variables)


@pytest.fixture
def tools(tmp_path: Path) -> pip_steps.Tools:
    (tmp_path / "log").mkdir()
    return pip_steps.Tools(Path(sys.executable), tmp_path / "log" / "all.log")


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, bytes]], str]]:
    """Make a web server that has these files and nothing else; its address."""
    servers = []

    def start(files: dict[str, bytes]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = files.get(self.path)
                self.send_response(404 if body is None else 200)
                kind = "application/gzip" if self.path.endswith(".gz") else "text/html"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body or b"")

            do_HEAD = do_GET  # noqa: N815 - the name that the server looks for

            def log_message(self, *arguments: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def unreachable() -> dict[str, str]:
    """Environment variables with which neither GitHub nor a package index can be reached."""
    address = closed_address()
    proxy = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), address)
    direct = dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1")
    return {**proxy, **direct, **only_index(address)}


def test_wrong_hash_of_a_given_archive(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "pb1-detectron2-0.6.tar.gz", SNAPSHOT)
    kept = tmp_path / "kept"
    done = run_script("--archive", archive, "--force", "--keep-source", kept)
    assert done.returncode == 1
    assert "Nothing was installed" in done.stderr
    assert f"wanted: {install_detectron2.SNAPSHOT_SHA256}" in done.stderr
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert f"got:    {got}" in done.stderr
    assert not kept.exists()


def test_wrong_hash_of_a_download(
    tmp_path: Path, serve: Callable[[dict[str, bytes]], str], unreachable: dict[str, str]
) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", SNAPSHOT).read_bytes()
    name = "pb1-detectron2-0.6.tar.gz"
    page = f'<html><body><a href="/files/{name}">{name}</a></body></html>'.encode()
    url = serve({"/simple/pb1-detectron2/": page, f"/files/{name}": archive})
    variables = unreachable | only_index(url)
    done = run_script("--force", "--keep-source", tmp_path / "kept", **variables)
    assert done.returncode == 1, done.stdout
    got = hashlib.sha256(archive).hexdigest()
    assert f"wanted: {install_detectron2.SNAPSHOT_SHA256}" in done.stderr
    assert f"got:    {got}" in done.stderr
    assert "nothing was installed" in done.stderr
    assert not (tmp_path / "kept").exists()


def test_archive_that_is_not_there(tmp_path: Path) -> None:
    done = run_script("--archive", tmp_path / "no.tar.gz", "--force")
    assert done.returncode == 1
    assert "There is no file" in done.stderr
    assert "no.tar.gz" in done.stderr


def test_no_network(tmp_path: Path, unreachable: dict[str, str]) -> None:
    done = run_script("--force", "--keep-source", tmp_path / "kept", **unreachable)
    assert done.returncode == 1
    assert "GitHub cannot be reached" in done.stdout
    assert "downloading pb1-detectron2==0.6 from the package index" in done.stderr
    assert "no network: the package index cannot be reached" in done.stderr
    assert "HTTPS_PROXY" in done.stderr
    assert "type the same command again" in done.stderr


def test_no_github_when_only_that_is_wanted(unreachable: dict[str, str]) -> None:
    done = run_script("--force", "--source", "github", **unreachable)
    assert done.returncode == 1
    assert "GitHub cannot be reached" in done.stderr
    assert "package index" not in done.stderr


def test_from_github(
    tmp_path: Path,
    serve: Callable[[dict[str, bytes]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = write_archive(tmp_path / "a.tar.gz", {**SNAPSHOT, "setup.py": HEAD_SETUP})
    commit = install_detectron2.COMMIT
    files = {"/d2": b"", f"/d2/archive/{commit}.tar.gz": head.read_bytes()}
    monkeypatch.setattr(install_detectron2, "GITHUB", serve(files) + "/d2")
    made = install_detectron2.from_github(tmp_path / "new")
    assert made.compilable
    assert commit in made.origin
    assert "pkg_resources" not in (made.root / "detectron2/model_zoo/model_zoo.py").read_text()
    assert "black" not in (made.root / "setup.py").read_text()


def test_github_that_answers_wrongly_or_not_at_all(
    tmp_path: Path,
    serve: Callable[[dict[str, bytes]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(install_detectron2, "GITHUB", serve({"/d2": b""}) + "/d2")
    with pytest.raises(pip_steps.StepError, match=r"GitHub cannot be reached \(Not Found\)"):
        install_detectron2.from_github(tmp_path / "a")
    monkeypatch.setattr(install_detectron2, "REACH_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/d2"
        monkeypatch.setattr(install_detectron2, "GITHUB", url)
        with pytest.raises(pip_steps.StepError, match=r"GitHub cannot be reached \(timed out\)"):
            install_detectron2.from_github(tmp_path / "b")


def test_auto_takes_the_snapshot_where_github_fails(
    tmp_path: Path,
    tools: pip_steps.Tools,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(target: Path) -> None:
        raise pip_steps.StepError("GitHub cannot be reached (for this test).")

    downloaded = write_archive(tmp_path / "a.tar.gz", SNAPSHOT)
    monkeypatch.setattr(install_detectron2, "from_github", fails)
    monkeypatch.setattr(install_detectron2, "download_snapshot", lambda *_: downloaded)
    monkeypatch.setattr(install_detectron2, "check_sha256", lambda *_: None)
    args = Namespace(source="auto", archive=None)
    made = install_detectron2.obtain(args, tools, tmp_path)
    assert "Taking a snapshot from the package index instead" in capsys.readouterr().out
    assert (made.root / "detectron2" / "_C.py").is_file()
    args.source = "github"
    with pytest.raises(pip_steps.StepError, match="for this test"):
        install_detectron2.obtain(args, tools, tmp_path)


@pytest.mark.parametrize(("version", "borrows"), [("25.3", False), ("26.3", True)])
def test_download_by_an_older_pip(
    version: str,
    borrows: bool,
    tmp_path: Path,
    tools: pip_steps.Tools,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The environment's own pip is not replaced, only set aside for this download."""
    commands: list[list[str]] = []

    def attempt(self: pip_steps.Tools, command: list[str]) -> tuple[int, str]:
        commands.append(command)
        (tmp_path / "new" / "pb1-detectron2-0.6.tar.gz").touch()
        return 0, ""

    monkeypatch.setattr(pip_steps.Tools, "attempt", attempt)
    monkeypatch.setattr(install_detectron2.metadata, "version", lambda name: version)
    found = install_detectron2.download_snapshot(tools, tmp_path / "new")
    assert found.name == "pb1-detectron2-0.6.tar.gz"
    download = commands.pop()
    assert "--require-hashes" in download
    older = str(tmp_path / "new" / "older")
    assert download[:3] == (
        [sys.executable, f"{older}/pip", "download"] if borrows else [sys.executable, "-m", "pip"]
    )
    assert len(commands) == borrows
    for command in commands:
        assert command[-3:] == ["--target", older, "pip<26"]


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_the_python_part_is_built(
    compiler: str,
    tmp_path: Path,
    tools: pip_steps.Tools,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The setup.py, which cannot compile, is tried only if there is a compiler, then replaced."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    root = write_tree(tmp_path / "head", {**SNAPSHOT, "setup.py": HEAD_SETUP})
    wheel = install_detectron2.build(
        install_detectron2.Source(root, "here", True), tools, tmp_path / "scratch"
    )
    said = capsys.readouterr().out
    if compiler == "false":
        assert "this setup.py cannot compile" in said
        assert str(tools.log) in said
    else:
        assert "No C++ compiler: no-such-compiler is not on the path" in said
    assert "nothing here needs it" in said
    assert wheel.name == "detectron2-0.6+pure-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "detectron2/model_zoo/configs/Base.yaml" in names
    assert "detectron2/projects/point_rend/__init__.py" in names
    assert not (root / "build").exists()


def test_installed_already() -> None:
    done = run_script()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Detectron2 is installed already: ")


def test_system_python_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    assert install_detectron2.main(["--force"]) == 1
    said = capsys.readouterr().err
    assert f"{sys.executable} is not in a virtual environment" in said
    assert "tools/setup_env.py" in said
    assert "--allow-system" in said


def test_torch_comes_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    assert install_detectron2.main(["--force"]) == 1
    said = capsys.readouterr().err
    assert "torch not found. Install torch first" in said
    assert "-m pip install torch torchvision" in said


def test_looking_for_pip_leaves_setuptools_importable() -> None:
    """Python's own finder asks setuptools, which then expects the standard library's distutils."""
    folder = Path(install_detectron2.__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import install_detectron2\n"
        "install_detectron2._check_interpreter(allow_system=True)\n"
        "import setuptools"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_keep_source_overwrites_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("two years of work")
    done = run_script("--force", "--keep-source", tmp_path)
    assert done.returncode == 1
    assert "does not hold Detectron2's source" in done.stderr
    assert "--keep-source" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "two years of work"


def test_disk_full_while_unpacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(install_detectron2, "obtain", full)
    assert install_detectron2.main(["--force", "--keep-source", str(tmp_path / "new")]) == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert f"GiB free at {sys.prefix}" in said


def test_archive_and_github_exclude_each_other() -> None:
    done = run_script("--archive", "a.tar.gz", "--source", "github")
    assert done.returncode == 2
    assert "--archive goes with --source archive" in done.stderr


def test_smoke() -> None:
    """Training's set-up, a forward pass and an evaluation work in this environment."""
    done = run_script("--smoke")
    assert done.returncode == 0, done.stderr
    assert "detectron2 " in done.stdout


def test_smoke_can_fail(tmp_path: Path) -> None:
    """The fault it was made for: a stub that is noticed only when the evaluation uses it."""
    package = KEPT_SOURCE / "detectron2"
    if not (package / "_C.py").is_file():
        pytest.skip(f"{KEPT_SOURCE} does not hold the snapshot without a compiled part")
    shutil.copytree(package, tmp_path / "detectron2", ignore=shutil.ignore_patterns("configs"))
    path = tmp_path / "detectron2/evaluation/fast_eval_api.py"
    path.write_text(path.read_text().replace('"IS_STUB", False', '"NO_STUB", False'))
    configs = "model_zoo/configs"
    (tmp_path / "detectron2" / configs).symlink_to(package / configs)
    done = run_script("--smoke", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "_C.InstanceAnnotation is missing" in done.stderr


def test_own_tools_of_detectron2_are_kept() -> None:
    if not KEPT_SOURCE.is_dir():
        pytest.skip(f"Detectron2 was not installed by tools/install_detectron2.py: {KEPT_SOURCE}")
    for name in ("train_net.py", "lazyconfig_train_net.py"):
        ast.parse((KEPT_SOURCE / "tools" / name).read_text())
