# SPDX-License-Identifier: Apache-2.0
"""What the tests of the installation share: the scripts as modules, made sources, no network."""

from __future__ import annotations

import importlib
import io
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
sys.path.append(str(TOOLS))

build_extension = importlib.import_module("build_extension")
environment = importlib.import_module("environment")
install_detectron2 = importlib.import_module("install_detectron2")
pip_steps = importlib.import_module("pip_steps")
require_python = importlib.import_module("require_python")
source = importlib.import_module("detectron2_source")

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


def run_tool(
    name: str, *arguments: str | Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts as a user does, with further environment variables."""
    return subprocess.run(
        [sys.executable, str(TOOLS / name), *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def fake_program(path: Path, says: str, status: int = 1) -> Path:
    """A program that prints and ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return path


def closed_address() -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def only_index(address: str) -> dict[str, str]:
    """Environment variables with which pip knows the package index at the address, no other."""
    return {
        "PIP_INDEX_URL": f"{address}/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "1",
        "PIP_NO_CACHE_DIR": "1",
    }
