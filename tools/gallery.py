# SPDX-License-Identifier: Apache-2.0
"""The gallery as a script; see ``python -m d2_decouple.gallery --help``."""

import sys

from d2_decouple.gallery import main

if __name__ == "__main__":
    sys.exit(main())
