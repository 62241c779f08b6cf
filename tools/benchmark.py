# SPDX-License-Identifier: Apache-2.0
"""The benchmark as a script; see ``python -m d2_decouple.benchmark --help``."""

import sys

from d2_decouple.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
