# SPDX-License-Identifier: Apache-2.0
"""Each hostile file: the message, no program run, nothing outside opened, little memory."""

import re
import sys

import cases_of_checkpoints
import cases_of_images
import pytest
from cases import CASES
from measuring import measured

assert cases_of_checkpoints, cases_of_images  # enter their cases

MOST_MIB = 64
PIXEL = 20  # bytes; what an image that is decoded may take of them
# Their memory is that of a whole image, or what Python and torch need for the first file.
MORE = {"image_of_4000_x_4000_in_47_kb": PIXEL * 4000**2 / 2**20}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and fork")


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused(tmp_path, name):
    case = CASES[name]
    answer = measured(case.make_in(tmp_path), tmp_path)
    assert not answer.outside, f"{answer.outside} was opened, or made"
    assert answer.kind in case.errors, answer
    assert re.search(case.says, answer.text, re.DOTALL), answer.text
    assert answer.peak_mib < MORE.get(name, MOST_MIB), answer
    if answer.kind not in ("returned", "ConfigError") and name != "yolo_pipe_for_an_image":
        assert str(tmp_path) in answer.text  # the file is named
