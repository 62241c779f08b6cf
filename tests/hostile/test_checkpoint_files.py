# SPDX-License-Identifier: Apache-2.0
"""Whatever is changed in a file of weights: weights, or an error of ours."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch
from cases_of_checkpoints import Calls, samples
from fuzzing import PROFILE, Log, answer, changed, changes, folder_with, repeated
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from d2_decouple.checkpoint import Checkpointer, CheckpointError
from d2_decouple.checkpoint.foreign import read_arrays

things = st.recursive(
    st.one_of(
        st.none(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.just(torch.zeros(3, 2)),
        st.just(torch.zeros(0)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["model", "ema", "weight", "classes", 5]), inner),
    ),
    max_leaves=8,
)


def test_whatever_is_in_a_file_of_weights():
    files, log = samples(), Log()
    contents = st.one_of(
        st.tuples(st.sampled_from(sorted(files)), changes),
        st.tuples(
            st.just("made.pth"),
            st.dictionaries(st.sampled_from(["model", "ema", "classes", "state_dict"]), things),
        ),
    )

    @PROFILE
    @given(contents)
    def check(given_):
        name, what = given_
        raw = b"" if name == "made.pth" else changed(files[name], what)
        with folder_with({"a.png": b"", name: raw}) as folder:
            if name == "made.pth":
                torch.save(what, folder / name)
            model = nn.Linear(2, 3)
            checkpointer = Checkpointer(model, extras={"classes": ["cat", "dog"]})
            answer(lambda: checkpointer.load(str(folder / name)), (CheckpointError,), log)

    repeated(check, log)
    assert log.answers["read"]
    assert log.answers["DamagedCheckpointError"]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_of_numbers_are_read_as_numpy_reads_them(tmp_path, protocol):
    content = {
        "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        "other end": np.arange(3, dtype=">i4"),
        "bool": np.array([True, False]),
        "none": np.zeros((0, 4), np.uint8),
        "one": np.float64(0.25),
        "inside": [collections.OrderedDict(a=(1, "x", np.array(7)))],
    }
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_arrays(str(file))
    assert list(found) == list(content)
    for name in list(content)[:6]:
        assert found[name].dtype == content[name].dtype
        np.testing.assert_array_equal(found[name], content[name])
    assert found["inside"][0]["a"][:2] == (1, "x")
    assert found["inside"][0]["a"][2] == 7
    assert found["f4"].flags.writeable


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([{}], dtype=object), "an array of 'O8', wanted numbers"),
        (np.zeros(2, [("a", "O"), ("b", "f4")]), "an array of 'V12', wanted numbers"),
        (np.array(["ab"]), "an array of 'U2', wanted numbers"),
        (Calls(os.getcwd), r"getcwd is not an array"),
        (Calls(np.ndarray, (4,), "f4"), "'str' object is not callable"),
        (Calls(np.frombuffer, b"1234"), "frombuffer is not an array"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(tmp_path, value, message):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": value}, protocol=2))
    with pytest.raises((pickle.UnpicklingError, TypeError), match=message):
        read_arrays(str(tmp_path / "a.pkl"))


def test_a_pickle_that_doubles_itself_is_copied_once(tmp_path):
    value = [0]
    for _ in range(60):
        value = [value, value]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": value}, protocol=2))
    found = read_arrays(str(tmp_path / "a.pkl"))["a"]
    assert found[0] is found[1]
