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
    wanted = {os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]}
    assert torch.get_num_threads() <= max(map(int, wanted))
    print("wanted", *wanted)
"""


@pytest.mark.parametrize("given", [None, "3"])
def test_processes_of_the_suite_share_the_cores(tmp_path, given):
    path = tmp_path / "test_threads.py"
    path.write_text(CHECK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    for name in [name for name in environment if name.startswith(("OMP_", "MKL_", "PYTEST_"))]:
        del environment[name]
    if given:
        environment |= {"OMP_NUM_THREADS": given, "MKL_NUM_THREADS": given}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-rP"]
    run = subprocess.run(
        [*command, "-n", "2", str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # Not conftest's own number: a folder below this one has a module of that name, too.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = str(max(1, cores // 2))
    assert f"wanted {given or share}\n" in run.stdout, run.stdout + run.stderr
