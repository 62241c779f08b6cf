# SPDX-License-Identifier: Apache-2.0
"""What is built from a checkout: nothing missing, nothing too much, usable from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers_of_building import ROOT, build, copy_checkout, is_source, source_files

from d2_decouple import __version__
from d2_decouple.config import config_names


def recipes() -> list[Path]:
    """Recipes of the checkout, relative to it."""
    folders = [ROOT / "configs", *ROOT.glob("projects/*/configs")]
    found = [file for folder in folders for file in folder.rglob("*.*") if is_source(file.name)]
    return sorted(file.relative_to(ROOT) for file in found if file.suffix in {".py", ".yaml"})


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean copy of the checkout, so that building leaves nothing behind in it."""
    monkeypatch.setenv("D2D_BUILD_EXT", "0")  # test_building.py is about the operators
    return copy_checkout(tmp_path / "tree")


def test_wheel_holds_the_package_and_every_recipe_and_nothing_else(tree: Path) -> None:
    wheel = build(tree, "wheel")

    assert wheel.name == f"d2_decouple-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        content = {name for name in archive.namelist() if ".dist-info/" not in name}
        for file in recipes():
            assert archive.read(f"d2_decouple/{file.as_posix()}") == (ROOT / file).read_bytes()
    modules = [file for file in source_files() if file.parts[0] == "d2_decouple"]
    assert content == {file.as_posix() for file in modules} | {
        f"d2_decouple/{file.as_posix()}" for file in recipes()
    } | {"d2_decouple/_C_build.json"}


def test_unpacked_wheel_loads_its_own_recipes_from_any_folder(tree: Path) -> None:
    site, elsewhere = tree.parent / "site", tree.parent / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(build(tree, "wheel")) as archive:
        archive.extractall(site)
    code = (
        "import d2_decouple.config as c\n"
        "for name in c.config_names():\n"
        "    assert c.get_config(name)\n"
        "    print(c.find_config(name))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        # A path that exists already, such as the one of Detectron2, stays behind the wheel's.
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])},
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert len(files) == len(config_names()) > 0
    assert all(site in file.parents for file in files), files


def test_source_archive_is_the_whole_checkout(tree: Path) -> None:
    with tarfile.open(build(tree, "sdist")) as archive:
        content = {Path(*Path(entry.name).parts[1:]) for entry in archive if entry.isfile()}
    missing = sorted(map(str, set(source_files()) - content))
    assert not missing, f"name these in MANIFEST.in, or in .gitignore: {missing}"


def test_recipe_that_was_removed_is_not_built_again(tree: Path) -> None:
    extra = tree / "configs" / "removed_later.py"
    extra.write_text("answer = 42\n")
    with zipfile.ZipFile(build(tree, "wheel")) as archive:
        assert "d2_decouple/configs/removed_later.py" in archive.namelist()

    extra.unlink()
    with zipfile.ZipFile(build(tree, "wheel")) as archive:
        assert "d2_decouple/configs/removed_later.py" not in archive.namelist()


def test_recipes_of_a_project_keep_their_place(tree: Path) -> None:
    configs = tree / "projects" / "Sample" / "configs"
    configs.mkdir(parents=True)
    (configs / "sample.yaml").write_text("VERSION: 2\n")
    (configs.parent / "README.md").write_text("Not for the wheel.\n")
    with zipfile.ZipFile(build(tree, "wheel")) as archive:
        found = [name for name in archive.namelist() if "Sample" in name]
    assert found == ["d2_decouple/projects/Sample/configs/sample.yaml"]


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install_copies_no_recipe(tree: Path, mode: str) -> None:
    # A copy would stay as it is when the recipe in the checkout is edited.
    before = set(tree.rglob("*.yaml"))
    build(tree, "editable", f"{{'editable_mode': '{mode}'}}")
    assert before
    assert set(tree.rglob("*.yaml")) == before


def test_building_does_not_import_the_package(tree: Path) -> None:
    with (tree / "d2_decouple" / "__init__.py").open("a") as file:
        file.write("\nimport no_such_module\n")
    assert f"-{__version__}-" in build(tree, "wheel").name


def test_importing_the_package_loads_neither_torch_nor_detectron2() -> None:
    code = "import sys, d2_decouple; print({'torch', 'detectron2'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
