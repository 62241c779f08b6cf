# SPDX-License-Identifier: Apache-2.0
"""Hostile files of weights, configs and archives."""

import codecs
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Call, case
from torch import nn

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.engine.inference_config import inference_config

DAMAGED = "DamagedCheckpointError"


class Calls:
    """Is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


def loading(file: Path, content: bytes | None = None) -> Call:
    if content is not None:
        file.write_bytes(content)
    return lambda: Checkpointer(nn.Linear(2, 3)).load(str(file))


def saved(folder: Path, content: Any, *, old: bool = False) -> Call:
    torch.save(content, folder / "a.pth", _use_new_zipfile_serialization=not old)
    return loading(folder / "a.pth")


def touch(folder: Path) -> Calls:
    return Calls(os.system, f"touch {folder.parent / 'outside/ran'}")


@case(r"a\.pth cannot be read as a checkpoint: .*it names (posix|nt)\.system", DAMAGED)
def checkpoint_that_calls(folder: Path) -> Call:
    return saved(folder, {"model": {}, "more": touch(folder)})


@case(r"a\.pth cannot be read as a checkpoint: .*it names (posix|nt)\.system", DAMAGED)
def checkpoint_of_old_that_calls(folder: Path) -> Call:
    return saved(folder, {"model": {}, "more": touch(folder)}, old=True)


@case(r"a\.pkl cannot be read as a checkpoint: .*(posix|nt)\.system is not an array", DAMAGED)
def pickle_that_calls(folder: Path) -> Call:
    return loading(folder / "a.pkl", pickle.dumps({"model": touch(folder)}, protocol=2))


@case(r"a\.pkl cannot be read as a checkpoint: .*an array of 'O', wanted numbers", DAMAGED)
def pickle_of_an_array_of_addresses(folder: Path) -> Call:
    # numpy takes the bytes for addresses of objects, and Python follows them.
    made = b"\x80\x02cnumpy\nndarray\n(K\x01\x85cnumpy\ndtype\nX\x01\0\0\0O\x85RC\x08AAAAAAAAtR."
    return loading(folder / "a.pkl", made)


@case(r"a\.pkl cannot be read as a checkpoint: .*a NoneType, wanted arrays by name", DAMAGED)
def pickle_of_object_67108863(folder: Path) -> Call:
    # 13 bytes: the object that follows has this number.
    return loading(folder / "a.pkl", b"\x80\x02Nr" + struct.pack("<I", 2**26 - 1) + b"N.")


class Made:
    """Is pickled as an array, whose numbers may be anything."""

    def __init__(self, count: int, numbers: Any) -> None:
        self.state = 1, (count,), np.dtype("u1"), False, numbers

    def __reduce__(self) -> Any:
        function, arguments, _ = np.zeros(0, "u1").__reduce__()
        return function, arguments, self.state


@case(r"a\.pkl cannot be read as a checkpoint: .*an array's numbers are a int", DAMAGED)
def pickle_of_2_gib_in_a_number(folder: Path) -> Call:
    # bytes(n) are n zeros.
    made = Made(2**31, 2**31)
    return loading(folder / "a.pkl", pickle.dumps({"weight": made}, protocol=2))


@case(r"a\.pkl cannot be read as a checkpoint: .*it holds a bytearray", DAMAGED)
def pickle_that_claims_a_bytearray_of_2_gib(folder: Path) -> Call:
    # 12 bytes: Python makes room for the length before it looks whether so much follows.
    return loading(folder / "a.pkl", b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b".")


@case(r"a\.pkl cannot be read as a checkpoint: .*it has no tensors", DAMAGED)
def pickle_of_nothing(folder: Path) -> Call:
    return loading(folder / "a.pkl", pickle.dumps({"blobs": {}}, protocol=2))


@case(r"a\.pth cannot be read as a checkpoint: .*bytearray, which is no part of weights", DAMAGED)
def checkpoint_that_asks_for_5_gib(folder: Path) -> Call:
    return saved(folder, {"model": {}, "more": Calls(bytearray, 5 * 2**30)})


@case(r"a\.pth cannot be read as a checkpoint: .*would take 1024 MiB more", DAMAGED)
def checkpoint_that_encodes_a_text_2000_times(folder: Path) -> Call:
    text = "a" * 2**20
    calls = [Calls(codecs.encode, text, "latin1") for _ in range(2000)]
    return saved(folder, {"model": {}, "more": calls})


@case(r"a\.pth cannot be read as a checkpoint: .*would take 1024 MiB more", DAMAGED)
def checkpoint_of_old_that_makes_300_sets_of_a_list(folder: Path) -> Call:
    numbers = list(range(100_000))
    calls = [Calls(set, numbers) for _ in range(300)]
    return saved(folder, {"model": {}, "more": calls}, old=True)


@case(r"a\.pth cannot be read as a checkpoint: .*bytearray, which is no part of weights", DAMAGED)
def checkpoint_in_capital_letters_that_asks_for_5_gib(folder: Path) -> Call:
    call = saved(folder, {"model": {}, "more": Calls(bytearray, 5 * 2**30)})
    # torch looks for data.pkl, and does not tell small letters from large ones.
    raw = (folder / "a.pth").read_bytes()
    (folder / "a.pth").write_bytes(raw.replace(b"data.pkl", b"DATA.PKL"))
    return call


@case(r"a\.pth cannot be read as a checkpoint: .*it was packed", DAMAGED)
def checkpoint_of_256_mib_in_260_kb(folder: Path) -> Call:
    call = saved(folder, {"model": {"weight": torch.zeros(2**26)}})
    with zipfile.ZipFile(folder / "a.pth") as whole:
        parts = [(entry.filename, whole.read(entry)) for entry in whole.infolist()]
    with zipfile.ZipFile(folder / "a.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts:
            packed.writestr(name, content)
    return call


@case(
    r"a\.pth cannot be read as a checkpoint: .*would take 4194304 MiB more than the file", DAMAGED
)
def checkpoint_of_one_number_as_4_tib(folder: Path) -> Call:
    return saved(folder, {"model": {"weight": torch.zeros(1).expand(2**20, 2**20)}})


@case(r"a\.pth cannot be read as a checkpoint: .*it is a tar archive", DAMAGED)
def checkpoint_in_a_tar_archive(folder: Path) -> Call:
    with tarfile.open(folder / "a.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return loading(folder / "a.pth")


@case(r"a\.pth cannot be read as a checkpoint: .*sparse", DAMAGED)
def checkpoint_without_numbers(folder: Path) -> Call:
    return saved(folder, {"model": {"weight": torch.zeros(2, 3).to_sparse()}})


@case(r"a\.safetensors cannot be read as a checkpoint", DAMAGED)
def safetensors_with_an_endless_header(folder: Path) -> Call:
    return loading(folder / "a.safetensors", struct.pack("<Q", 2**60) + b"{}")


@case(r"a\.pth cannot be read as a checkpoint: .*model has a int under 'weight'", DAMAGED)
def checkpoint_of_other_things(folder: Path) -> Call:
    return saved(folder, {"model": {"weight": 5}})


@case(r"model of this saved config is os\.system, which is not called", "ConfigError")
def saved_config_that_calls(folder: Path) -> Call:
    file = folder / "config.yaml"
    mark = folder.parent / "outside/ran"
    file.write_text(f"model: {{_target_: os.system, command: touch {mark}}}\n")
    return lambda: inference_config(file).model(None)


@case(r"config\.yaml cannot be read as a config: .*python/object/apply", "ConfigError")
def yacs_config_that_calls(folder: Path) -> Call:
    file = folder / "config.yaml"
    mark = folder.parent / "outside/ran"
    file.write_text(f"MODEL:\n  WEIGHTS: !!python/object/apply:os.system ['touch {mark}']\n")
    return lambda: inference_config(file)


def yacs_config(folder: Path, door: str) -> Call:
    file = folder / "config.yaml"
    file.write_text(f"MODEL: {{META_ARCHITECTURE: OneStageDetector, DECOUPLE: {{{door}}}}}\n")
    return lambda: inference_config(file).model(None)


@case(r"MODEL_FILE '.*recipe\.py': a file may name shipped recipes alone", "ConfigError")
def yacs_config_that_names_a_program(folder: Path) -> Call:
    mark = folder.parent / "outside/ran"
    (folder / "recipe.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    return yacs_config(folder, f"MODEL_FILE: {folder}/recipe.py")


@case(r"os\.system.* in MODEL\.DECOUPLE\.OVERRIDES, which is not called", "ConfigError")
def yacs_config_that_overrides_a_part(folder: Path) -> Call:
    command = f"model.backbone={{_target_: os.system, command: touch {folder.parent}/outside/ran}}"
    return yacs_config(folder, f"MODEL_FILE: fcos_R_18_FPN_bccd, OVERRIDES: ['{command}']")


@case(r"in MODEL\.DECOUPLE\.OVERRIDES, which is not called", "ConfigError")
def yacs_config_that_spells_it_in_pieces(folder: Path) -> Call:
    call = f"_tar${{oc.env:X,g}}et_: os.system, command: touch {folder.parent}/outside/ran"
    command = f'model.backbone="${{oc.decode:\\"{{{call}}}\\"}}"'
    return yacs_config(folder, f"MODEL_FILE: fcos_R_18_FPN_bccd, OVERRIDES: ['{command}']")


def samples() -> dict[str, bytes]:
    """Small files of weights of every kind that is read, by their names."""
    state = {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.zeros(3)}
    content = {"model": state, "iteration": 5, "classes": ["cat", "dog"]}
    found = {}
    for name, new in (("new.pth", True), ("old.pth", False)):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=new)
        found[name] = stream.getvalue()
    arrays = {name: value.numpy() for name, value in state.items()}
    found["zoo.pkl"] = pickle.dumps({"model": arrays, "__author__": "somebody"}, protocol=2)
    found["old.pkl"] = pickle.dumps({"blobs": {"a_w": arrays["weight"]}}, protocol=2)
    return found
