# SPDX-License-Identifier: Apache-2.0
"""The analysis as a script; see ``python -m d2_decouple.analyze --help``."""

import sys

from d2_decouple.analyze import main

if __name__ == "__main__":
    sys.exit(main())
