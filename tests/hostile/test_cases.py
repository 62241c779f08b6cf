# SPDX-License-Identifier: Apache-2.0
"""Each hostile file: the message, no program run, nothing outside opened, little memory."""

import importlib
import os
import re
import sys
from pathlib import Path

import cases_of_checkpoints
import cases_of_images
import pytest
from cases import CASES
from measuring import measured

from d2_decouple.data import DataError
from d2_decouple.data.foreign import read_limited

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

fuzz = importlib.import_module("fuzz")

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


def test_a_file_outside_is_seen_through_a_link_to_the_folder(tmp_path):
    """As where the folder for temporary files is a link."""
    (tmp_path / "real" / "outside").mkdir(parents=True)
    secret = tmp_path / "real" / "outside" / "secret.txt"
    secret.write_text("mine")
    (tmp_path / "link").symlink_to("real")
    answer = measured(secret.read_text, tmp_path / "link")
    assert (answer.kind, answer.text, answer.outside) == ("returned", "mine", str(secret))


def test_the_cases_leave_this_process_as_it_is(tmp_path):
    before = dict(os.environ)
    for name in ("image_postscript_for_a_jpeg", "checkpoint_that_calls"):
        (tmp_path / name).mkdir()
        CASES[name].make_in(tmp_path / name)
    assert dict(os.environ) == before


def test_a_file_without_a_size_is_not_read_to_its_end():
    with pytest.raises(DataError, match="/proc/self/status has more than the 0 bytes that its"):
        read_limited(Path("/proc/self/status"), 16)


@pytest.mark.parametrize(("statuses", "wanted"), [([0, 0], 0), ([1, 0], 1), ([-11, 0], 1)])
def test_a_kind_that_ends_by_a_signal_is_a_fault(monkeypatch, statuses, wanted):
    monkeypatch.setattr(fuzz, "fuzz", lambda kind, minutes: statuses.pop(0))
    assert fuzz.main(["voc", "checkpoints"]) == wanted
    assert not statuses  # the second is run all the same
