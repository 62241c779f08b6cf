# SPDX-License-Identifier: Apache-2.0
"""Detectron2's source: check and unpack it, and mend what newer libraries broke.

Detectron2 is not in the package index under its own name. What the index has is a snapshot of
2022, without the C++ sources; since then NumPy and Pillow removed names that it uses. Each function
here named ``patch_*`` mends one of these things, and raises `SourceError` where it does not find
what it mends: a source that looks different was not tried and must not pass without a word.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "PURE_REQUIREMENTS",
    "SourceError",
    "check_sha256",
    "make_pure",
    "patch_head",
    "patch_snapshot",
    "unpack",
]

PURE_REQUIREMENTS = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore>=0.1.5",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)
"""What Detectron2 imports. Of its upper limits only the one that its head has added since is kept;
black, which prettifies saved recipes, is left out."""

_STUB = '''\
"""Stands where Detectron2's compiled part would be: this installation has only its Python part.

Rotated boxes, Detectron2's own deformable convolutions and its fast COCO evaluation are missing.
Everything else works; COCO evaluation uses pycocotools.
"""

IS_STUB = True


def get_compiler_version():
    return "none: installed without the compiled part"


def get_cuda_version():
    return "none: installed without the compiled part"


def has_cuda():
    return False


def __getattr__(name):
    raise AttributeError(
        "detectron2._C." + name + " is missing: this Detectron2 was installed without its "
        "compiled part. Install it from GitHub, with a C++ compiler, to have it."
    )
'''

_PURE_SETUP = '''\
"""Package Detectron2's Python part: compiles no C++, and asks for no old versions."""

from setuptools import find_packages, setup

PROJECTS = {{
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}}

setup(
    name="detectron2",
    version="{version}+pure",
    url="https://github.com/facebookresearch/detectron2",
    description="Detectron2 without its compiled part",
    packages=find_packages(include=["detectron2", "detectron2.*"]) + list(PROJECTS),
    package_dir=PROJECTS,
    package_data={{"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]}},
    python_requires=">=3.10",
    install_requires={requirements!r},
)
'''


class SourceError(RuntimeError):
    """The source archive is not the one that was tried; the message says in what it differs."""


def check_sha256(file: Path, wanted: str) -> None:
    """Raise `SourceError` with both sums unless the file has the wanted one."""
    got = hashlib.sha256(file.read_bytes()).hexdigest()
    if got != wanted:
        raise SourceError(
            f"{file} is not the archive that was tried.\n"
            f"  SHA-256 wanted: {wanted}\n"
            f"  SHA-256 got:    {got}\n"
            "Nothing was installed. Delete the file and try again; if the sum stays wrong, "
            "the package index or something on the way to it hands out another file."
        )


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a tar archive below `target`; the one folder that it holds."""
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            # Refuses absolute names, "..", links that lead outside, and devices. Early releases
            # of Python 3.10 and 3.11 do not have it.
            if hasattr(tarfile, "data_filter"):
                tar.extraction_filter = tarfile.data_filter
            tar.extractall(target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise SourceError(f"{archive} cannot be unpacked: {error}") from error
    roots = [entry for entry in target.iterdir() if entry.is_dir()]
    if len(roots) != 1 or not (roots[0] / "detectron2" / "__init__.py").is_file():
        found = ", ".join(sorted(entry.name for entry in target.iterdir())) or "nothing"
        raise SourceError(
            f"{archive} should hold one folder with Detectron2's source; it holds: {found}"
        )
    return roots[0]


def patch_snapshot(root: Path) -> None:
    """All that the snapshot of 2022 needs on current NumPy, Pillow and setuptools."""
    for patch in _SNAPSHOT_PATCHES:
        patch(root)


def patch_head(root: Path) -> None:
    """All that the tested commit of 2026 needs."""
    patch_model_zoo(root)
    patch_requirements(root)


def make_pure(root: Path) -> None:
    """Replace the setup.py by one that compiles nothing and limits no version."""
    text = (root / "detectron2" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([0-9.]+)"$', text, re.MULTILINE)
    if match is None:
        raise SourceError(f"{root / 'detectron2/__init__.py'} does not state its version")
    _move_configs(root)
    setup = _PURE_SETUP.format(version=match[1], requirements=list(PURE_REQUIREMENTS))
    (root / "setup.py").write_text(setup, encoding="utf-8")


def patch_numpy_aliases(root: Path) -> None:
    """`np.bool`, `np.int` and the like were other names of Python's types, until NumPy 1.24."""
    alias = re.compile(r"\bnp\.(bool|int|float|object|str)\b")
    if not _substitute(root / "detectron2", alias, r"\1"):
        raise SourceError(f"No alias such as np.bool was found below {root / 'detectron2'}")


def patch_numpy_copy(root: Path) -> None:
    """Since NumPy 2, `copy=False` forbids a copy, and no longer means "if it can be avoided"."""
    _replace(
        root / "detectron2/layers/mask_ops.py",
        "np.array(mask, copy=False)",
        "np.asarray(mask)",
    )


def patch_pillow_linear(root: Path) -> None:
    """Pillow 10 knows `Image.LINEAR` by its other name only."""
    _replace(
        root / "detectron2/data/transforms/transform.py",
        "interp=Image.LINEAR,",
        "interp=Image.BILINEAR,",
    )


def patch_model_zoo(root: Path) -> None:
    """The recipes lie beside the module; setuptools 82 has no `pkg_resources` to ask for them."""
    path = root / "detectron2/model_zoo/model_zoo.py"
    _replace(path, "import pkg_resources\n", "")
    _replace(
        path,
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", '
        'os.path.join("configs", config_path)\n    )',
        "os.path.join(\n        os.path.dirname(os.path.abspath(__file__)), "
        '"configs", config_path\n    )',
    )


def patch_compiled_part(root: Path) -> None:
    """Put a stub in the place of the compiled part, which the snapshot imports everywhere."""
    path = root / "detectron2" / "_C.py"
    if path.exists():
        raise SourceError(f"{path} exists already: this is not the untouched source")
    path.write_text(_STUB, encoding="utf-8")


def patch_fast_evaluation(root: Path) -> None:
    """Without the compiled part `COCOEvaluator` takes pycocotools, as at Detectron2's head."""
    _replace(
        root / "detectron2/evaluation/fast_eval_api.py",
        "from detectron2 import _C\n",
        "from detectron2 import _C\n\n"
        'if getattr(_C, "IS_STUB", False):\n'
        '    raise ImportError("the fast COCO evaluation needs Detectron2\'s compiled part")\n',
    )
    path = root / "detectron2/evaluation/coco_evaluation.py"
    line = "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
    _replace(path, line, "")
    _replace(
        path,
        "from .evaluator import DatasetEvaluator\n",
        "from .evaluator import DatasetEvaluator\n\n"
        f"try:\n    {line}except ImportError:\n    COCOeval_opt = COCOeval\n",
    )
    _replace(
        path,
        "self._use_fast_impl = use_fast_impl\n",
        "self._use_fast_impl = use_fast_impl and COCOeval_opt is not COCOeval\n",
    )


def patch_caffe2(root: Path) -> None:
    """PyTorch has no caffe2 any more; what exports to it is optional, as at Detectron2's head."""
    _replace(
        root / "detectron2/export/__init__.py",
        "\nfrom .api import *\n",
        "\ntry:\n    from .api import *\nexcept ImportError:\n    pass\n",
    )


def patch_requirements(root: Path) -> None:
    """`iopath` may be newer than the head's setup.py allows, and `black` is never imported."""
    _replace(root / "setup.py", '"iopath>=0.1.7,<0.1.10"', '"iopath>=0.1.7"')
    _replace(root / "setup.py", '        "black",\n', "")


_SNAPSHOT_PATCHES: tuple[Callable[[Path], None], ...] = (
    patch_numpy_aliases,
    patch_numpy_copy,
    patch_pillow_linear,
    patch_model_zoo,
    patch_compiled_part,
    patch_fast_evaluation,
    patch_caffe2,
)


def _move_configs(root: Path) -> None:
    """Detectron2's own setup.py links `configs` into the model zoo; the snapshot has it there."""
    inside = root / "detectron2" / "model_zoo" / "configs"
    if inside.is_dir() and not inside.is_symlink():
        return
    if not (root / "configs").is_dir():
        raise SourceError(f"Neither {inside} nor {root / 'configs'} holds the model zoo's recipes")
    inside.unlink(missing_ok=True)
    (root / "configs").rename(inside)


def _replace(path: Path, old: str, new: str) -> None:
    """Replace the one occurrence of `old`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SourceError(f"{path} is missing: this is not the source that was tried") from None
    if text.count(old) != 1:
        raise SourceError(
            f"{path} should contain this once, and contains it {text.count(old)} times:\n{old}"
        )
    path.write_text(text.replace(old, new), encoding="utf-8")


def _substitute(folder: Path, pattern: re.Pattern[str], new: str) -> int:
    """Replace the pattern in all Python files below `folder`; how often it was found."""
    total = 0
    for path in sorted(folder.rglob("*.py")):
        text, count = pattern.subn(new, path.read_text(encoding="utf-8"))
        if count:
            path.write_text(text, encoding="utf-8")
        total += count
    return total
