# SPDX-License-Identifier: Apache-2.0
"""Arithmetic and small building blocks without knowledge of any paper."""
