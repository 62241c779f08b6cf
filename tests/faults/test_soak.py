# SPDX-License-Identifier: Apache-2.0
"""The watch on long trainings: what grows is found, what does not is left alone."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers_of_faults import soak


def looks(grows=0.0, files=(9,), threads=(4,), count=40, step=100):
    """A look each ``step`` iterations; the memory grows by so many MiB in 1,000 iterations."""
    return [
        soak.Look(
            step * i,
            500 + (i % 2) + grows * step * i / 1000,
            files[min(i * len(files) // count, len(files) - 1)],
            threads[min(i * len(threads) // count, len(threads) - 1)],
        )
        for i in range(1, count + 1)
    ]


def test_a_flat_training_has_no_fault():
    verdict = soak.judge(looks())
    assert verdict.faults == ()
    assert abs(verdict.growth) < 0.1  # the teeth of a saw
    assert verdict.files == (9, 9)
    assert verdict.first == pytest.approx(500.5, abs=0.5)


def test_memory_that_grows_is_a_fault():
    verdict = soak.judge(looks(grows=3.0))
    assert verdict.growth == pytest.approx(3.0, abs=0.1)
    # From iteration 1,200 (three tenths of 4,000) to 4,000: 2.8 times 3 MiB.
    assert verdict.last - verdict.first == pytest.approx(8.4, abs=0.3)
    assert len(verdict.faults) == 1
    assert "grows by 3." in verdict.faults[0]
    assert soak.judge(looks(grows=0.7)).faults == ()


def test_what_grows_in_the_beginning_alone_is_none():
    seen = [x._replace(mebibytes=x.mebibytes - 300 * (x.iteration < 1000)) for x in looks()]
    assert soak.judge(seen).faults == ()


def test_the_line_of_least_squares_is_the_hand_worked_one():
    """Ten looks; the last eight count (from 3 of 10 on): memory 2 MiB an iteration plus 1."""
    seen = [soak.Look(i, 2.0 * i + 1, 1, 1) for i in range(1, 11)]
    verdict = soak.judge(seen)
    assert verdict.growth == pytest.approx(2000)
    assert (verdict.first, verdict.last) == pytest.approx((7.0, 21.0))


@pytest.mark.parametrize("name", ["files", "threads"])
def test_handles_and_threads_that_grow_are_a_fault(name):
    verdict = soak.judge(looks(**{name: tuple(range(9, 29))}))
    assert [fault.split()[0] for fault in verdict.faults] == [name]
    assert soak.judge(looks(**{name: (9, 12, 9)})).faults == ()  # for a moment


def test_too_few_looks_say_nothing():
    with pytest.raises(soak.RunError, match="more --iterations"):
        soak.judge(looks(count=8))
    with pytest.raises(soak.RunError, match="only 0 looks"):
        soak.judge([])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_look_counts_memory_handles_and_threads(tmp_path):
    run = SimpleNamespace(pid=os.getpid())
    before = soak.look(run, 7)
    # From the system itself: of the heap a part may be free already.
    block = mmap.mmap(-1, 32 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(32):
        block.write(bytes(2**20))
    with open(tmp_path / "file", "w"):
        after = soak.look(run, 8)
    assert (before.iteration, after.iteration) == (7, 8)
    assert after.mebibytes - before.mebibytes == pytest.approx(32, abs=6)
    assert after.files - before.files == 1
    assert after.threads >= 1
    assert len(block)
    alone = soak._family(os.getpid())  # and what other tests have started
    threads = soak.look(run, 9).threads
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert sorted(soak._family(os.getpid())) == sorted([*alone, child.pid])
        assert soak.look(run, 9).threads == threads + 1
    finally:
        child.kill()
        child.wait()
    assert soak.look(SimpleNamespace(pid=2**22 + 1), 9) is None


def test_a_row_says_it_all():
    verdict = soak.Verdict(0.25, 500.4, 501.6, (9, 12), (4, 4), ())
    assert soak.row("fcos", 5000, 4.26, verdict) == (
        "| fcos | 5000 | 4.3 | 500 | 502 | +0.25 | 9 to 12 | 4 to 4 | yes |"
    )
    assert "**no**" in soak.row("fcos", 5000, 4.26, verdict._replace(faults=("x",)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_hundred_iterations_are_flat(tmp_path, capsys):
    assert soak.main(["--iterations", "200", "--work", str(tmp_path)]) == 0
    assert "| fcos | 200 |" in capsys.readouterr().out


def test_a_method_that_grows_is_an_error_and_the_others_are_still_watched(monkeypatch, capsys):
    grown = {"gfl": 3.0}
    monkeypatch.setattr(soak, "watched", lambda folder, name, count: looks(grown.get(name, 0.0)))
    assert soak.main(["--method", "all"]) == 1
    said = capsys.readouterr()
    assert said.out.count("| yes |") == 7
    assert said.out.count("| **no** |") == 1
    assert "error: gfl: the memory grows by 3." in said.err
    grown.clear()
    assert soak.main(["--method", "gfl"]) == 0


def test_wrong_options_are_named(capsys):
    assert soak.main(["--method", "salty"]) == 1
    assert "did you mean 'salt'" in capsys.readouterr().err
    assert soak.main(["--iterations", "20"]) == 1
    assert "wanted 100 or more" in capsys.readouterr().err


def test_the_loader_is_measured():
    table = soak.loader_table([0], 4)
    assert table.startswith("| workers | images/s |")
    assert float(table.rsplit("|", 2)[1]) > 0
