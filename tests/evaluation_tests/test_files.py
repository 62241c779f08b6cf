# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all."""

import os

import pytest

from d2_decouple.evaluation.files import write_text


def test_nothing_is_written_through_a_link(tmp_path):
    """Its temporary file has the process's number in its name, which others can guess."""
    other = tmp_path / "other.txt"
    other.write_text("mine")
    (tmp_path / f".a.txt.{os.getpid()}").symlink_to(other)
    write_text(tmp_path / "a.txt", "\u00e9\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "\u00e9\n"
    assert other.read_text() == "mine"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.txt", "other.txt"]


def test_the_old_file_stays_where_the_new_one_cannot_be_written(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "half a character: \ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [x.name for x in tmp_path.iterdir()] == ["a.txt"]
