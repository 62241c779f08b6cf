# SPDX-License-Identifier: Apache-2.0
"""Detections on your own images and videos; see ``python -m d2_decouple.demo --help``."""

import sys

from d2_decouple.demo import main

if __name__ == "__main__":
    sys.exit(main())
