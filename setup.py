# SPDX-License-Identifier: Apache-2.0
"""Build steps that pyproject.toml has no words for: the recipes and the compiled operators."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
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


class BuildOperators(build_ext):
    """Let `tools/build_extension.py` compile what it can, and make a pure package of the rest.

    Whether there will be operators is known only after that: until then the package counts as a
    compiled one. PyTorch is not imported here, as most of what pip asks for does not need it.
    """

    def run(self) -> None:
        folders = [self._built(), *([ROOT / "d2_decouple"] if self.inplace else [])]
        script = str(ROOT / "tools" / "build_extension.py")
        into = [word for folder in folders for word in ("--into", str(folder))]
        sys.stdout.flush()
        done = subprocess.run([sys.executable, script, *into])
        if done.returncode:
            raise SystemExit(done.returncode)  # the script has said why
        if not any(self._built().glob("_C.*")):
            self.distribution.ext_modules = []
            self.extensions.clear()
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure = True

    def get_outputs(self) -> list[str]:
        return sorted(map(str, self._built().glob("_C*")))

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {file: str(ROOT / "d2_decouple" / Path(file).name) for file in self.get_outputs()}

    def _built(self) -> Path:
        return Path(self.build_lib).absolute() / "d2_decouple"


# Python without its global lock has no stable interface yet: its wheels fit one version.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    cmdclass={"build_py": BuildWithRecipes, "build_ext": BuildOperators},
    # The script knows the sources; MANIFEST.in names them for the source archive.
    ext_modules=[Extension("d2_decouple._C", sources=[], py_limited_api=STABLE_ABI)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
