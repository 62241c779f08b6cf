# SPDX-License-Identifier: Apache-2.0
"""The authors' weights in our format; see ``python -m d2_decouple.checkpoint.convert --help``."""

import sys

from d2_decouple.checkpoint.convert import main

if __name__ == "__main__":
    sys.exit(main())
