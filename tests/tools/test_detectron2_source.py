# SPDX-License-Identifier: Apache-2.0
"""Detectron2's source: every patch on the text that it mends, and archives that are wrong.

Set D2D_DETECTRON2_ARCHIVE to a downloaded pb1-detectron2-0.6.tar.gz to try the real one as well.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from helpers_of_tools import (
    HEAD_SETUP,
    SNAPSHOT,
    install_detectron2,
    source,
    write_archive,
    write_tree,
)

ARCHIVE = Path(os.environ.get("D2D_DETECTRON2_ARCHIVE", "not given"))


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "snapshot", SNAPSHOT)


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


def test_evaluation_falls_back(snapshot: Path) -> None:
    """The two patched modules, run among stand-ins for all that they import."""
    source.patch_compiled_part(snapshot)
    source.patch_fast_evaluation(snapshot)
    stand_ins = {
        "pycocotools/__init__.py": "",
        "pycocotools/cocoeval.py": "class COCOeval: pass\n",
        "detectron2/evaluation/__init__.py": "",
        "detectron2/evaluation/evaluator.py": "class DatasetEvaluator: pass\n",
    }
    write_tree(snapshot, stand_ins)
    code = (
        "from detectron2.evaluation import coco_evaluation as module\n"
        "assert module.COCOeval_opt is module.COCOeval\n"
        "assert module.COCOEvaluator(use_fast_impl=True)._use_fast_impl is False\n"
        "import detectron2.evaluation.fast_eval_api\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=snapshot, capture_output=True, text=True, timeout=60
    )
    last = done.stderr.splitlines()[-1]
    assert last == "ImportError: the fast COCO evaluation needs Detectron2's compiled part"


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


def test_configs_beside_the_package_move_into_it(tmp_path: Path) -> None:
    """In the repository they lie outside, where only Detectron2's own setup.py finds them."""
    files = {name: text for name, text in SNAPSHOT.items() if "configs" not in name}
    root = write_tree(tmp_path, {**files, "configs/Base.yaml": "VERSION: 2\n"})
    source.make_pure(root)
    assert (root / "detectron2/model_zoo/configs/Base.yaml").is_file()
    shutil.rmtree(root / "detectron2/model_zoo/configs")
    with pytest.raises(source.SourceError, match="recipes"):
        source.make_pure(root)
