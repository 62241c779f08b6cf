# SPDX-License-Identifier: Apache-2.0
"""What every test gets. This file's folder is importable, too: see ``util.py``."""

import logging
import os

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if WORKERS > 1:
    # Processes with more threads than cores between them wait for one another: ten times as long.
    # Read when torch is imported, here and in what a test starts.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, str(max(1, CORES // WORKERS)))

import pytest  # noqa: E402
import torch  # noqa: E402

# A minute or more each, the longest first: begun last, one would keep the others waiting.
SLOW_FILES = (
    "test_overfit.py",
    "test_two_nodes.py",
    "test_resume.py",
    "test_tutorials.py",
    "test_launcher.py",
    "test_config.py",
    "test_zoo.py",
    "test_setup_env.py",
    "test_project_recipes.py",
    "test_inference_config.py",
    "test_readme.py",
    "test_soak.py",
)


def pytest_configure(config):
    """Under ``--dist loadfile`` files come in this order, not in that of their numbers of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Slow files come first, the others as they were."""
    rank = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def seeded():
    """Weights and images are drawn alike whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unlogged():
    """A training inside a test leaves no handlers behind; what is logged reaches ``caplog``."""
    names = ("d2_decouple", "detectron2", "fvcore")
    yield
    for logger in map(logging.getLogger, names):
        logger.propagate = True
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
