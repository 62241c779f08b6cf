# SPDX-License-Identifier: Apache-2.0
"""What ``python -m d2_decouple.benchmark`` compares, a file for each part of the package."""
