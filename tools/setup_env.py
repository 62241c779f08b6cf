# SPDX-License-Identifier: Apache-2.0
"""Make the virtual environment with torch, Detectron2 and this package: see --help.

An older Python must still be able to read this file, so it holds nothing but the way to
`environment.py`.
"""

import sys

import require_python  # noqa: F401 - first: it stops a Python for which the next line is too new
from environment import main

if __name__ == "__main__":
    sys.exit(main())
