# SPDX-License-Identifier: Apache-2.0
"""What every test gets. This file's folder is importable, too: see ``util.py``."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Weights and images are drawn alike whichever tests ran before."""
    torch.manual_seed(0)
