# SPDX-License-Identifier: Apache-2.0
"""Whatever is changed in a file of weights: weights, or an error of ours."""

import codecs
import collections
import os
import pickle

import numpy as np
import pytest
import torch
from cases_of_checkpoints import Calls, Made, samples
from fuzzing import PROFILE, Log, answer, changed, changes, folder_with, repeated
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from util import TORCH

from d2_decouple.checkpoint import Checkpointer, CheckpointError, foreign
from d2_decouple.checkpoint.files import read_torch_file
from d2_decouple.checkpoint.foreign import check_torch_file, read_arrays

TEXT = "a" * 1000
CONTENT = bytes(1000)
PAIRS = [(str(i), i) for i in range(30)]

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


@pytest.mark.parametrize(
    "content",
    [
        [Made(1000, CONTENT) for _ in range(10)],
        [Calls(codecs.encode, TEXT, "latin1") for _ in range(4)],
        [Calls(collections.OrderedDict, PAIRS) for _ in range(40)],
    ],
    ids=["arrays", "texts", "dicts"],
)
def test_what_is_copied_again_and_again_is_counted(tmp_path, monkeypatch, content):
    """With 500 bytes to spare; the file is as long as its text, and has twice that room."""
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps({"a": content}, protocol=2))
    read_arrays(str(file))
    monkeypatch.setattr(foreign, "_SPARE", 500)
    with pytest.raises(pickle.UnpicklingError, match="MiB more than the file has"):
        read_arrays(str(file))


# torch 2.4 itself refuses the last three: sets, complex numbers and bytes.
LIMIT = 3 if TORCH < (2, 5) else None


@pytest.mark.parametrize("new", [True, False], ids=["new", "old"])
def test_all_that_torch_reads_of_a_training_passes_the_rehearsal(tmp_path, new):
    state = collections.OrderedDict(weight=torch.arange(6.0).reshape(3, 2))
    state._metadata = collections.OrderedDict(a={"version": 1})
    content = {
        "model": state,
        "parameter": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "things": [torch.Size([1, 2]), torch.device("cpu"), torch.float16, {1, 2}, 2j, b"\xe9"][
            :LIMIT
        ],
        "counts": collections.Counter("aab"),
        "optimizer": {0: {"momentum_buffer": torch.zeros(3)}, "lambdas": [None, 0.5, 2**70]},
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    found = read_torch_file(str(tmp_path / "a.pth"))
    assert torch.equal(found["model"]["weight"], state["weight"])
    assert found["model"]._metadata == state._metadata
    assert torch.equal(found["parameter"], content["parameter"])
    assert found["things"] == content["things"]
    assert found["counts"] == {"a": 2, "b": 1}
    assert found["optimizer"]["lambdas"] == [None, 0.5, 2**70]


ENTRIES = b"(" + b"".join(b"K" + bytes([i]) + b"N" for i in range(200)) + b"u"
ORDERED = b"ccollections\nOrderedDict\n)R"


@pytest.mark.parametrize(
    ("once", "again"),
    [
        (ORDERED + ENTRIES, b"cbuiltins\nset\nh\0\x85R"),  # of what was made, and filled then
        (b"}" + ENTRIES, ORDERED + b"h\0b"),  # as the attributes of another one
        (b"]" + ENTRIES.replace(b"u", b"e"), b"cbuiltins\nset\nh\0\x85R"),
    ],
    ids=["items", "state", "list"],
)
def test_what_is_copied_of_a_container_is_counted(monkeypatch, once, again):
    """200 entries of 100 bytes (of the list 400), once or four times, in less than 1 kB."""
    monkeypatch.setattr(foreign, "_CALL", 0)
    monkeypatch.setattr(foreign, "_SPARE", 50_000)
    for times in (1, 4):
        content = b"\x80\x02](" + once + b"q\0" + again * times + b"e."
        assert len(content) < 1000
        rehearsal = foreign._Rehearsal(content)
        if times == 1:
            assert len(rehearsal.load()) == 2
            continue
        with pytest.raises(pickle.UnpicklingError, match="more than the file has"):
            rehearsal.load()


def test_calls_that_are_given_nothing_take_room_too(monkeypatch):
    monkeypatch.setattr(foreign, "_SPARE", 3000)
    content = b"\x80\x02](" + ORDERED * 4 + b"e."  # 4000 bytes; twice the file's are less than 300
    with pytest.raises(pickle.UnpicklingError, match="more than the file has"):
        foreign._Rehearsal(content).load()


def test_a_new_object_is_a_call_in_the_rehearsal():
    """torch makes parameters in this way, too: of a class, without its function of that name."""
    made = foreign._Rehearsal(b"\x80\x02ctorch.nn.parameter\nParameter\n(K\x01t\x81.").load()
    assert isinstance(made, foreign._Nothing)


@pytest.mark.parametrize(
    "content",
    [
        [Calls(codecs.encode, TEXT, "latin1") for _ in range(4)],
        [Calls(collections.Counter, dict(PAIRS)) for _ in range(4)],
        [Calls(set, list(range(30))) for _ in range(4)],
    ],
    ids=["texts", "counters", "sets"],
)
def test_what_a_checkpoint_calls_is_counted(tmp_path, monkeypatch, content):
    file = str(tmp_path / "a.pth")
    torch.save({"model": {}, "more": content}, file)
    check_torch_file(file)
    monkeypatch.setattr(foreign, "_CALL", 0)
    monkeypatch.setattr(foreign, "_SPARE", 500)
    with pytest.raises(pickle.UnpicklingError, match="MiB more than the file has"):
        check_torch_file(file)


def test_a_pickle_that_doubles_itself_is_copied_once(tmp_path):
    value = [0]
    for _ in range(60):
        value = [value, value]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": value}, protocol=2))
    found = read_arrays(str(tmp_path / "a.pkl"))["a"]
    assert found[0] is found[1]
