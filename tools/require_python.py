# SPDX-License-Identifier: Apache-2.0
"""Stop, and list the Pythons that would do, where this one is too old.

The scripts that are run first import this before all else. It avoids what Python 3.6 cannot parse.
"""

import os
import shutil
import subprocess
import sys

__all__ = ["newer_pythons", "problem"]

WANTED = (3, 10)


def problem(version: tuple) -> str:
    """Why a Python of that version cannot be used and what to type; empty if it can be."""
    if tuple(version[:2]) >= WANTED:
        return ""
    wanted, got = ".".join(map(str, WANTED)), ".".join(map(str, version[:3]))
    lines = [f"Python {wanted} or newer is needed; {sys.executable} is Python {got}."]
    found = newer_pythons()
    if found:
        lines.append(f"On your path there is: {', '.join(found)}")
        lines.append(f"Type: make setup PYTHON={found[-1]}")
        lines.append(f"or:   {found[-1]} tools/setup_env.py")
    else:
        lines.append(
            "On your path there is none. Install one with your system's package manager, or with "
            "conda, and type: make setup PYTHON=python3.12"
        )
    return "\n".join(lines)


def newer_pythons() -> list:
    """Names of the Pythons on the path that are new enough and start, oldest first."""
    names = [f"python{WANTED[0]}.{minor}" for minor in range(WANTED[1], 20)]
    return [name for name in names if shutil.which(name) and _starts(name)]


def _starts(name: str) -> bool:
    """Whether it runs: version managers put names on the path that only print an error."""
    with open(os.devnull, "w") as nowhere:
        return subprocess.call([name, "-c", ""], stdout=nowhere, stderr=nowhere) == 0


_PROBLEM = problem(tuple(sys.version_info))
if _PROBLEM:
    sys.exit(_PROBLEM)
