# SPDX-License-Identifier: Apache-2.0
"""Detectron2's installation: the patches, the checks, and what each failure says.

Nothing here changes the environment that the tests run in. Set D2D_DETECTRON2_ARCHIVE to a
downloaded pb1-detectron2-0.6.tar.gz to try the patches on the real source as well.
"""

from __future__ import annotations

import ast
import errno
import http.server
import importlib
import importlib.util
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SCRIPT = TOOLS / "install_detectron2.py"
sys.path.append(str(TOOLS))

install_detectron2 = importlib.import_module("install_detectron2")
source = importlib.import_module("detectron2_source")
pip_steps = importlib.import_module("pip_steps")

KEPT_SOURCE = Path(sys.prefix) / "share" / "detectron2-src"
ARCHIVE = Path(os.environ.get("D2D_DETECTRON2_ARCHIVE", "not given"))

# What the patches change, as the snapshot has it, among lines that must stay as they are.
SNAPSHOT = {
    "setup.py": "raise SystemExit('compiles')\n",
    "detectron2/__init__.py": '__version__ = "0.6"\n',
    "detectron2/structures/masks.py": (
        "a = x.astype(np.bool)\nb = np.bool_(x)\nc = np.float32(np.float(x))\n"
        "d = np.int64, np.int, np.object, np.str, np.integer\n"
    ),
    "detectron2/layers/mask_ops.py": "    mask = np.array(mask, copy=False)\n",
    "detectron2/data/transforms/transform.py": (
        "def __init__(self, src_rect, output_size, interp=Image.LINEAR, fill=0):\n"
    ),
    "detectron2/model_zoo/__init__.py": "",
    "detectron2/model_zoo/model_zoo.py": (
        "import os\nimport pkg_resources\nimport torch\n\n\n"
        "def get_config_file(config_path):\n"
        "    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )\n"
        "    return cfg_file\n"
    ),
    "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "detectron2/evaluation/fast_eval_api.py": (
        "from pycocotools.cocoeval import COCOeval\n\nfrom detectron2 import _C\n"
    ),
    "detectron2/evaluation/coco_evaluation.py": (
        "from pycocotools.cocoeval import COCOeval\n"
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "\nfrom .evaluator import DatasetEvaluator\n\n\n"
        "class COCOEvaluator(DatasetEvaluator):\n"
        "    def __init__(self, use_fast_impl=True):\n"
        "        self._use_fast_impl = use_fast_impl\n"
    ),
    "detectron2/export/__init__.py": (
        "# exports\nfrom .api import *\nfrom .flatten import TracingAdapter\n"
    ),
    "projects/PointRend/point_rend/__init__.py": "",
    "projects/DeepLab/deeplab/__init__.py": "",
    "projects/Panoptic-DeepLab/panoptic_deeplab/__init__.py": "",
    "tools/train_net.py": "",
}
HEAD_SETUP = (
    "raise SystemExit('this setup.py cannot compile')\n"
    'requirements = [\n        "iopath>=0.1.7,<0.1.10",\n        "black",\n]\n'
)


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def write_archive(file: Path, files: dict[str, str], folder: str = "detectron2-1") -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return file


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "snapshot", SNAPSHOT)


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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
    return {
        "https_proxy": nowhere,
        "HTTPS_PROXY": nowhere,
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
        **only_index(f"{nowhere}/simple"),
    }


def only_index(url: str) -> dict[str, str]:
    return {
        "PIP_INDEX_URL": url,
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "1",
        "PIP_NO_CACHE_DIR": "1",
    }


# --- patches ---------------------------------------------------------------------------------


def test_numpy_aliases(snapshot: Path) -> None:
    source.patch_numpy_aliases(snapshot)
    assert (snapshot / "detectron2/structures/masks.py").read_text() == (
        "a = x.astype(bool)\nb = np.bool_(x)\nc = np.float32(float(x))\n"
        "d = np.int64, int, object, str, np.integer\n"
    )


def test_numpy_copy(snapshot: Path) -> None:
    source.patch_numpy_copy(snapshot)
    text = (snapshot / "detectron2/layers/mask_ops.py").read_text()
    assert text == "    mask = np.asarray(mask)\n"


def test_pillow_linear(snapshot: Path) -> None:
    source.patch_pillow_linear(snapshot)
    text = (snapshot / "detectron2/data/transforms/transform.py").read_text()
    assert "interp=Image.BILINEAR, fill=0" in text


def test_model_zoo_needs_no_pkg_resources(snapshot: Path) -> None:
    source.patch_model_zoo(snapshot)
    path = snapshot / "detectron2/model_zoo/model_zoo.py"
    assert "pkg_resources" not in path.read_text()
    found = Path(load(path).get_config_file("Base.yaml"))
    assert found == snapshot / "detectron2/model_zoo/configs/Base.yaml"


def test_stub_says_what_is_missing(snapshot: Path) -> None:
    source.patch_compiled_part(snapshot)
    stub = load(snapshot / "detectron2" / "_C.py")
    for answer in (stub.get_compiler_version(), stub.get_cuda_version()):
        assert "without the compiled part" in answer
    assert stub.has_cuda() is False
    assert not hasattr(stub, "nms_rotated")
    with pytest.raises(AttributeError, match=r"_C\.box_iou_rotated is missing.*C\+\+ compiler"):
        stub.box_iou_rotated(1, 2)


def test_evaluation_falls_back(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two patched modules, run among stand-ins for all that they import."""
    source.patch_compiled_part(snapshot)
    source.patch_fast_evaluation(snapshot)
    stub = load(snapshot / "detectron2" / "_C.py")
    official = type("COCOeval", (), {})
    evaluator = type("DatasetEvaluator", (), {})
    for name, content in {
        "pycocotools.cocoeval": {"COCOeval": official},
        "detectron2": {"_C": stub},
        "detectron2.evaluation": {},
        "detectron2.evaluation.evaluator": {"DatasetEvaluator": evaluator},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["detectron2.evaluation"].__path__ = [str(snapshot / "detectron2/evaluation")]
    for name in ("fast_eval_api", "coco_evaluation"):
        monkeypatch.delitem(sys.modules, f"detectron2.evaluation.{name}", raising=False)

    with pytest.raises(ImportError, match="compiled part"):
        importlib.import_module("detectron2.evaluation.fast_eval_api")
    module = importlib.import_module("detectron2.evaluation.coco_evaluation")
    monkeypatch.delitem(sys.modules, "detectron2.evaluation.coco_evaluation")
    assert module.COCOeval_opt is official
    assert module.COCOEvaluator(use_fast_impl=True)._use_fast_impl is False


def test_export_without_caffe2(snapshot: Path) -> None:
    source.patch_caffe2(snapshot)
    tree = ast.parse((snapshot / "detectron2/export/__init__.py").read_text())
    assert [type(statement) for statement in tree.body] == [ast.Try, ast.ImportFrom]


def test_requirements_of_head(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"setup.py": HEAD_SETUP})
    source.patch_requirements(root)
    text = (root / "setup.py").read_text()
    assert '"iopath>=0.1.7",' in text
    assert "black" not in text


PATCHES = [
    "patch_numpy_aliases",
    "patch_numpy_copy",
    "patch_pillow_linear",
    "patch_model_zoo",
    "patch_compiled_part",
    "patch_fast_evaluation",
    "patch_caffe2",
    "patch_requirements",
]


@pytest.mark.parametrize("name", PATCHES)
def test_patch_that_finds_nothing_is_an_error(name: str, snapshot: Path) -> None:
    """Applied twice: the second time what it replaces is gone."""
    (snapshot / "setup.py").write_text(HEAD_SETUP)
    patch = getattr(source, name)
    patch(snapshot)
    with pytest.raises(
        source.SourceError, match=r"once, and contains it 0|No alias|exists already"
    ):
        patch(snapshot)


def test_every_patch_of_the_snapshot_is_applied_and_tested() -> None:
    applied = {patch.__name__ for patch in source._SNAPSHOT_PATCHES} | {"patch_requirements"}
    assert applied == set(PATCHES)


def test_patch_without_its_file(snapshot: Path) -> None:
    (snapshot / "detectron2/layers/mask_ops.py").unlink()
    with pytest.raises(source.SourceError, match=r"mask_ops\.py is missing"):
        source.patch_snapshot(snapshot)


def test_real_archive(tmp_path: Path) -> None:
    if not ARCHIVE.is_file():
        pytest.skip("D2D_DETECTRON2_ARCHIVE does not name a source archive")
    made = install_detectron2.from_snapshot(ARCHIVE, tmp_path)
    assert not made.compilable
    for path in (made.root / "detectron2").rglob("*.py"):
        text = path.read_text()
        ast.parse(text, str(path))
        assert "pkg_resources" not in text, path
        assert "Image.LINEAR" not in text, path
    for name in ("train_net.py", "lazyconfig_train_net.py"):
        assert (made.root / "tools" / name).is_file()


# --- archives --------------------------------------------------------------------------------


def test_unpack(tmp_path: Path) -> None:
    root = source.unpack(write_archive(tmp_path / "a.tar.gz", SNAPSHOT), tmp_path / "out")
    assert root == tmp_path / "out" / "detectron2-1"
    assert (root / "setup.py").read_text() == SNAPSHOT["setup.py"]


@pytest.mark.parametrize("name", ["../evil.py", "detectron2-1/../../evil.py"])
def test_unpack_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python's tarfile cannot refuse names that lead outside")
    archive = write_archive(tmp_path / "a.tar.gz", {name: "", **SNAPSHOT}, folder="")
    with pytest.raises(source.SourceError, match="outside the destination"):
        source.unpack(archive, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.py"))


def test_unpack_of_something_else(tmp_path: Path) -> None:
    other = write_archive(tmp_path / "other.tar.gz", {"README": "", "setup.py": ""}, "other-1")
    with pytest.raises(source.SourceError, match=r"other\.tar\.gz should hold.*it holds: other-1"):
        source.unpack(other, tmp_path / "a")
    page = tmp_path / "page.tar.gz"
    page.write_bytes(b"<html>Please log in</html>")
    with pytest.raises(source.SourceError, match=r"page\.tar\.gz cannot be unpacked"):
        source.unpack(page, tmp_path / "b")
    whole = write_archive(tmp_path / "cut.tar.gz", SNAPSHOT).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(source.SourceError, match=r"cut\.tar\.gz cannot be unpacked"):
        source.unpack(tmp_path / "cut.tar.gz", tmp_path / "c")


def test_wrong_hash_of_a_given_archive(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "pb1-detectron2-0.6.tar.gz", SNAPSHOT)
    kept = tmp_path / "kept"
    done = run_script("--archive", archive, "--force", "--keep-source", kept)
    assert done.returncode == 1
    assert "Nothing was installed" in done.stderr
    assert f"wanted: {install_detectron2.SNAPSHOT_SHA256}" in done.stderr
    got = importlib.import_module("hashlib").sha256(archive.read_bytes()).hexdigest()
    assert f"got:    {got}" in done.stderr
    assert not kept.exists()


def test_wrong_hash_of_a_download(
    tmp_path: Path, serve: Callable[[dict[str, bytes]], str], unreachable: dict[str, str]
) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", SNAPSHOT).read_bytes()
    name = "pb1-detectron2-0.6.tar.gz"
    page = f'<html><body><a href="/files/{name}">{name}</a></body></html>'.encode()
    url = serve({"/simple/pb1-detectron2/": page, f"/files/{name}": archive})
    variables = unreachable | only_index(f"{url}/simple")
    done = run_script("--force", "--keep-source", tmp_path / "kept", **variables)
    assert done.returncode == 1, done.stdout
    got = importlib.import_module("hashlib").sha256(archive).hexdigest()
    assert f"wanted: {install_detectron2.SNAPSHOT_SHA256}" in done.stderr
    assert f"got:    {got}" in done.stderr
    assert "nothing was installed" in done.stderr
    assert not (tmp_path / "kept").exists()


def test_archive_that_is_not_there(tmp_path: Path) -> None:
    done = run_script("--archive", tmp_path / "no.tar.gz", "--force")
    assert done.returncode == 1
    assert "There is no file" in done.stderr
    assert "no.tar.gz" in done.stderr


# --- where the source comes from -------------------------------------------------------------


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


# --- building --------------------------------------------------------------------------------


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


def test_configs_beside_the_package_move_into_it(tmp_path: Path) -> None:
    """In the repository they lie outside, where only Detectron2's own setup.py finds them."""
    files = {name: text for name, text in SNAPSHOT.items() if "configs" not in name}
    root = write_tree(tmp_path, {**files, "configs/Base.yaml": "VERSION: 2\n"})
    source.make_pure(root)
    assert (root / "detectron2/model_zoo/configs/Base.yaml").is_file()
    shutil.rmtree(root / "detectron2/model_zoo/configs")
    with pytest.raises(source.SourceError, match="recipes"):
        source.make_pure(root)


# --- refusals and failures -------------------------------------------------------------------


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


# --- the installed Detectron2 ----------------------------------------------------------------


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
