# SPDX-License-Identifier: Apache-2.0
"""The launcher as a script; see ``python -m d2_decouple.train --help``."""

import sys

from d2_decouple.train import main

if __name__ == "__main__":
    sys.exit(main())
