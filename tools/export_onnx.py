# SPDX-License-Identifier: Apache-2.0
"""A detector as an ONNX file; see ``python -m d2_decouple.export --help``."""

import sys

from d2_decouple.export.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
