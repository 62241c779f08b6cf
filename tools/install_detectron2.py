# SPDX-License-Identifier: Apache-2.0
"""Install Detectron2 into the environment whose Python runs this script.

    .venv/bin/python tools/install_detectron2.py

Detectron2 is not in the package index under its own name. Where GitHub can be reached, the commit
that this project was tested with is taken from there, and its C++ part is compiled if there is a
compiler. Elsewhere a snapshot of 2022 that somebody put into the index is taken: its SHA-256 is
checked, what newer libraries broke is mended, and its Python part alone is installed. Either is
enough for d2-decouple. torch must be there already.
"""

import require_python  # noqa: F401 - first: it stops a Python for which the rest is too new

# isort: split
import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from http.client import HTTPException
from importlib import metadata, util
from importlib.machinery import PathFinder
from pathlib import Path
from ssl import SSLError
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

from detectron2_source import (
    PURE_REQUIREMENTS,
    SourceError,
    check_sha256,
    make_pure,
    patch_head,
    patch_snapshot,
    unpack,
)
from pip_steps import StepError, Tools, explain_os_error, gist, last_lines

__all__ = ["main"]

GITHUB = "https://github.com/facebookresearch/detectron2"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
SNAPSHOT = "pb1-detectron2==0.6"
SNAPSHOT_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# pip 26 refuses the snapshot, since an extra of it names an archive outside the index.
DOWNLOADER = "pip<26"
BUILD_TOOLS = ("setuptools>=64,<82", "wheel")
REACH_SECONDS = 5
DOWNLOAD_SECONDS = 60


class Source(NamedTuple):
    """An unpacked source, patched, and whether its C++ part is there to be compiled."""

    root: Path
    origin: str
    compilable: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the script: 0 if Detectron2 is there and works."""
    args = _parse(arguments)
    if args.smoke:
        smoke()
        return 0
    tools = Tools(Path(sys.executable), Path(sys.prefix) / "install_detectron2.log")
    try:
        _check_interpreter(args.allow_system)
        install(args, tools)
    except (StepError, SourceError) as error:
        reason = str(error)
    except OSError as error:
        reason = explain_os_error(error, Path(sys.prefix))
    else:
        return 0
    print(f"Detectron2 was not installed. {reason}", file=sys.stderr)
    return 1


def install(args: argparse.Namespace, tools: Tools) -> None:
    """Fetch, mend, build, install and try; nothing if a Detectron2 that works is there."""
    found = "" if args.force else installed(tools)
    if found:
        print(f"Detectron2 is installed already: {found}")
        return
    _require_torch()
    _check_keep_source(args.keep_source)
    with tempfile.TemporaryDirectory(prefix="detectron2-") as name:
        scratch = Path(name)
        source = obtain(args, tools, scratch)
        print(f"Detectron2's source: {source.origin}", flush=True)
        _install_requirements(tools)
        wheel = build(source, tools, scratch)
        # Before the package: once that can be imported, this script has nothing to do any more.
        shutil.rmtree(args.keep_source, ignore_errors=True)
        shutil.copytree(source.root, args.keep_source, symlinks=True)
        options = ["--no-deps", "--force-reinstall"]
        tools.pip("install", *options, str(wheel), what="installing Detectron2")
    try:
        tools.run([str(tools.python), __file__, "--smoke"], what="trying Detectron2")
    except StepError:
        # If it stayed, the next call would take it for one that works.
        tools.pip("uninstall", "--yes", "detectron2", what="removing Detectron2")
        raise
    print(f"Detectron2 is installed: {installed(tools)}")
    print(f"Its own scripts: {args.keep_source / 'tools'}")


def installed(tools: Tools) -> str:
    """Version and place of the Detectron2 that can be imported, empty if there is none."""
    code = (
        "import detectron2, detectron2.structures, detectron2.evaluation; "
        "print('found', detectron2.__version__, 'in', detectron2.__path__[0])"
    )
    status, output = tools.attempt([str(tools.python), "-c", code])
    found = last_lines(output, 1)
    return found.removeprefix("found ") if status == 0 and found.startswith("found ") else ""


def obtain(args: argparse.Namespace, tools: Tools, scratch: Path) -> Source:
    """The source that the options ask for; "auto" is GitHub's if that can be reached."""
    if args.source in {"auto", "github"}:
        try:
            return from_github(scratch / "github")
        except (StepError, SourceError) as error:
            if args.source == "github":
                raise
            print(f"{error} Taking a snapshot from the package index instead.", flush=True)
    archive = args.archive or download_snapshot(tools, scratch / "download")
    return from_snapshot(archive, scratch / "snapshot")


def from_github(target: Path) -> Source:
    """The tested commit, downloaded; `StepError` if GitHub cannot be reached."""
    target.mkdir()
    archive = target / "archive.tar.gz"
    url = f"{GITHUB}/archive/{COMMIT}.tar.gz"
    try:
        # A host that does not answer must not hold up the rest as long as a slow one may.
        with urlopen(Request(GITHUB, method="HEAD"), timeout=REACH_SECONDS):
            pass
        with urlopen(url, timeout=DOWNLOAD_SECONDS) as answer, archive.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except (URLError, HTTPException, TimeoutError, ConnectionError, SSLError) as error:
        reason = getattr(error, "reason", error)
        raise StepError(f"GitHub cannot be reached ({reason}).") from error
    root = unpack(archive, target / "source")
    patch_head(root)
    return Source(root, f"GitHub, commit {COMMIT}", True)


def download_snapshot(tools: Tools, target: Path) -> Path:
    """The snapshot's archive from the package index, by name."""
    target.mkdir()
    _ensure_build_tools(tools)
    pip = [str(tools.python), "-m", "pip"]
    if int(metadata.version("pip").split(".")[0]) >= 26:
        older = target / "older"
        what = f"getting {DOWNLOADER} for one download"
        tools.pip("install", "--target", str(older), DOWNLOADER, what=what)
        pip = [str(tools.python), str(older / "pip")]
    wanted = target / "requirements.txt"
    # With the sum given, pip compares it before running anything that is in the archive.
    wanted.write_text(f"{SNAPSHOT} --hash=sha256:{SNAPSHOT_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-build-isolation", "--require-hashes", "--no-input"]
    tools.run(
        [*pip, "download", *options, "--dest", str(target), "--requirement", str(wanted)],
        what=f"downloading {SNAPSHOT} from the package index",
    )
    return next(target.glob("*.tar.gz"))


def from_snapshot(archive: Path, target: Path) -> Source:
    """The snapshot's source, mended, if the archive is the one that was tried."""
    if not archive.is_file():
        raise StepError(f"There is no file {archive}. Without --archive it is downloaded.")
    check_sha256(archive, SNAPSHOT_SHA256)
    root = unpack(archive, target)
    patch_snapshot(root)
    make_pure(root)
    return Source(root, f"{SNAPSHOT}, {archive.name} with the pinned SHA-256", False)


def build(source: Source, tools: Tools, scratch: Path) -> Path:
    """A wheel; with the compiled part if its sources and a compiler are there and it succeeds."""
    if source.compilable:
        wheel = _compiled_wheel(source, tools, scratch / "compiled")
        if wheel is not None:
            return wheel
        print("Going on without Detectron2's compiled part: nothing here needs it.", flush=True)
        make_pure(source.root)
    command = _wheel_command(source.root, tools, scratch / "pure")
    tools.run(command, what="packaging Detectron2")
    return next((scratch / "pure").glob("*.whl"))


def smoke() -> None:
    """Try what fails first without the compiled part or on newer libraries; raises if it does."""
    import torch
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.engine import default_argument_parser, default_setup
    from detectron2.evaluation import COCOEvaluator
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, BoxMode, Instances
    from detectron2.utils.collect_env import collect_env_info

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32 * 2**level] for level in range(5)]
    box = [8.0, 8.0, 40.0, 40.0]
    truth = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    image = {"file_name": "1.png", "image_id": 1, "height": 64, "width": 64}
    DatasetCatalog.register("smoke", lambda: [{**image, "annotations": [truth]}])
    MetadataCatalog.get("smoke").thing_classes = ["thing"]
    found = Instances((64, 64), pred_boxes=Boxes(torch.tensor([box])), scores=torch.ones(1))
    found.pred_classes = torch.zeros(1, dtype=torch.long)
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        default_setup(cfg, default_argument_parser().parse_args([]))
        evaluator = COCOEvaluator("smoke", output_dir=folder)
        evaluator.reset()
        evaluator.process([image], [{"instances": found}])
        average_precision = evaluator.evaluate()["bbox"]["AP"]
    if not average_precision > 99:
        raise RuntimeError(f"the evaluation gives a perfect detection an AP of {average_precision}")
    with torch.no_grad():
        build_model(cfg).eval()([{"image": torch.zeros(3, 64, 64)}])
    print(collect_env_info())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        choices=["auto", "github", "archive"],
        help="where it is taken from (default: auto, or archive where --archive is given)",
    )
    parser.add_argument("--archive", type=Path, help=f"a downloaded source archive of {SNAPSHOT}")
    parser.add_argument("--force", action="store_true", help="even if one is installed")
    parser.add_argument(
        "--keep-source",
        type=Path,
        default=Path(sys.prefix) / "share" / "detectron2-src",
        help="folder for the source with Detectron2's own tools/ (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-system", action="store_true", help="also outside a virtual environment"
    )
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.source = args.source or ("archive" if args.archive else "auto")
    if args.archive and args.source != "archive":
        parser.error(f"--archive goes with --source archive, not with --source {args.source}")
    # Commands run in another folder.
    args.keep_source = args.keep_source.absolute()
    return args


def _check_interpreter(allow_system: bool) -> None:
    conda = (Path(sys.prefix) / "conda-meta").is_dir() and Path(sys.prefix).parent.name == "envs"
    if sys.prefix == sys.base_prefix and not conda and not allow_system:
        raise StepError(
            f"{sys.executable} is not in a virtual environment, and the system's Python stays "
            "untouched. Make one with python3 tools/setup_env.py, or run this script with the "
            "Python of yours. If you mean it: --allow-system"
        )
    # By `util.find_spec`, setuptools could not be imported in this process any more.
    if PathFinder.find_spec("pip") is None:
        raise StepError(f"{sys.executable} has no pip. Type: {sys.executable} -m ensurepip")


def _require_torch() -> None:
    missing = [name for name in ("torch", "torchvision") if util.find_spec(name) is None]
    if missing:
        raise StepError(
            f"{' and '.join(missing)} not found. Install torch first: "
            f"{sys.executable} -m pip install torch torchvision"
        )


def _check_keep_source(folder: Path) -> None:
    """The folder is replaced, so it must be one that this script may have written."""
    if folder.exists() and not (folder / "detectron2" / "__init__.py").is_file():
        raise StepError(
            f"{folder} exists and does not hold Detectron2's source, so it is not overwritten. "
            "Name another folder by --keep-source."
        )


def _ensure_build_tools(tools: Tools) -> None:
    names = [re.split("[<>=]", requirement)[0] for requirement in BUILD_TOOLS]
    if any(util.find_spec(name) is None for name in names):
        tools.pip("install", *BUILD_TOOLS, what="installing setuptools and wheel")


def _install_requirements(tools: Tools) -> None:
    _ensure_build_tools(tools)
    # Two distributions bring cv2, and overwrite each other: none is added to one that works.
    status, _ = tools.attempt([str(tools.python), "-c", "import cv2"])
    opencv = ["opencv-python-headless"] if status else []
    what = "installing what Detectron2 needs"
    tools.pip("install", "--no-build-isolation", *PURE_REQUIREMENTS, *opencv, what=what)


def _compiled_wheel(source: Source, tools: Tools, target: Path) -> Path | None:
    """A wheel with the C++ part; None, and a printed reason, if there can be none."""
    compiler = os.environ.get("CXX", "cl" if os.name == "nt" else "c++")
    if shutil.which(compiler) is None:
        print(f"No C++ compiler: {compiler} is not on the path. CXX names another one.")
        return None
    print(f"Compiling Detectron2's C++ part with {compiler}: this takes minutes", flush=True)
    tools.attempt([str(tools.python), "-m", "pip", "install", "ninja"])  # only makes it faster
    status, output = tools.attempt(_wheel_command(source.root, tools, target))
    if status == 0:
        return next(target.glob("*.whl"))
    print(f"Compiling failed:\n{gist(output, 6)}\nEverything it said: {tools.log}")
    return None


def _wheel_command(root: Path, tools: Tools, target: Path) -> list[str]:
    """Build in a copy: what is kept of the source has no traces of building."""
    tree = target / "tree"
    shutil.copytree(root, tree, symlinks=True)
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(target)]
    return [str(tools.python), "-m", "pip", "wheel", *options, str(tree)]


if __name__ == "__main__":
    sys.exit(main())
