# SPDX-License-Identifier: Apache-2.0
"""Build step that puts the recipes inside the package; everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RECIPE_SUFFIXES = {".py", ".yaml"}


def recipe_files() -> list[Path]:
    """Recipes of the checkout, relative to it: `configs/**` and `projects/*/configs/**`."""
    folders = [ROOT / "configs", *sorted(ROOT.glob("projects/*/configs"))]
    found = (file for folder in folders for file in folder.rglob("*"))
    return sorted(file.relative_to(ROOT) for file in found if file.suffix in RECIPE_SUFFIXES)


class BuildWithRecipes(build_py):
    """Mirror `configs/` and `projects/*/configs/` below `d2_decouple/` in what is built.

    Recipes import each other by relative paths, so the tree keeps its shape. An editable
    install copies nothing: there the package finds the folders beside itself.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in ("configs", "projects"):
            # A recipe that has been removed must not live on in a kept build folder.
            shutil.rmtree(self._package_folder() / name, ignore_errors=True)
        for file in recipe_files():
            target = self._package_folder() / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        if self.editable_mode:
            return outputs
        return outputs + [str(self._package_folder() / file) for file in recipe_files()]

    def get_source_files(self) -> list[str]:
        return super().get_source_files() + [str(file) for file in recipe_files()]

    def _package_folder(self) -> Path:
        return Path(self.build_lib) / "d2_decouple"


setup(cmdclass={"build_py": BuildWithRecipes})
