# SPDX-License-Identifier: Apache-2.0
"""How the suite shares the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import os, torch
def test_threads():
    print("wanted", os.environ["OMP_NUM_THREADS"], "and got", torch.get_num_threads())
"""


@pytest.mark.parametrize("given", [None, "3"])
def test_processes_of_the_suite_share_the_cores(tmp_path, given):
    path = tmp_path / "test_threads.py"
    path.write_text(CHECK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    for name in [name for name in environment if name.startswith(("OMP_", "PYTEST_"))]:
        del environment[name]
    if given:
        environment["OMP_NUM_THREADS"] = given
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-rP"]
    run = subprocess.run(
        [*command, "-n", "2", str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    share = max(1, os.cpu_count() // 2)
    # What the caller wants reaches torch, which may take less.
    line = f"wanted {given} and got " if given else f"wanted {share} and got {share}\n"
    assert line in run.stdout, run.stdout + run.stderr
