# SPDX-License-Identifier: Apache-2.0
"""What every test gets. This file's folder is importable, too: see ``util.py``."""

import logging

import pytest
import torch


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
