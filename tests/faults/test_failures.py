# SPDX-License-Identifier: Apache-2.0
"""Disks, data and memory that fail in the middle of a training: a message, and nothing is lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil

import pytest
import torch
from helpers_of_faults import STEPS, at_forward, faults, tiny

from d2_decouple.checkpoint import CheckpointError
from d2_decouple.checkpoint.files import write_whole
from d2_decouple.engine import TrainingError
from d2_decouple.engine.failures import enough_disk, enough_memory
from d2_decouple.train import main


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A training in one piece, in a folder with the data that all tests here learn from."""
    folder = tmp_path_factory.mktemp("faults")
    torch.manual_seed(0)
    assert main(tiny(folder).arguments(folder / "whole")) == 0
    return folder


def resumed_is_unbroken(folder, output):
    assert main(tiny(folder).arguments(output, resume=True)) == 0
    one, two = (torch.load(x / "model_final.pth") for x in (folder / "whole", output))
    assert not faults.differences(one["model"], two["model"])
    assert sorted(faults.losses(output)) == list(range(STEPS))


def last(output):
    name = (output / "last_checkpoint").read_text()
    return torch.load(output / name, weights_only=True)["iteration"]


def test_images_that_vanish_stop_it_with_the_steps_before_saved(
    unbroken, tmp_path, monkeypatch, capsys
):
    images = unbroken / "data" / "JPEGImages"
    with monkeypatch.context() as patch:
        at_forward(patch, 3, lambda: images.rename(images.with_name("gone")))
        assert main(tiny(unbroken, "train.checkpointer.period=0").arguments(tmp_path)) == 1
    images.with_name("gone").rename(images)
    message = capsys.readouterr().err
    for part in (str(images), "3 iterations are saved: --resume goes on from there"):
        assert part in message
    assert last(tmp_path) == 2
    resumed_is_unbroken(unbroken, tmp_path)


@pytest.mark.parametrize(
    ("left", "named"),
    [
        (None, ["missing"]),
        (60, ["of the test set", "cannot be read", "data.checks DIR", "--resume"]),
    ],
    ids=["gone", "cut off"],
)
def test_a_test_image_that_fails_is_named_and_the_evaluation_comes_again(
    left, named, unbroken, tmp_path, monkeypatch, capsys
):
    image = unbroken / "data" / "JPEGImages" / "shapes_00011.png"
    whole = image.read_bytes()
    with monkeypatch.context() as patch:
        happens = image.unlink if left is None else lambda: image.write_bytes(whole[:left])
        at_forward(patch, STEPS, happens)
        assert main(tiny(unbroken).arguments(tmp_path)) == 1
    image.write_bytes(whole)
    message = capsys.readouterr().err
    for part in (*named, image.name):
        assert part in message
    assert not (tmp_path / "evaluation.json").exists()
    resumed_is_unbroken(unbroken, tmp_path)
    assert (tmp_path / "evaluation.json").is_file()


def test_a_batch_that_does_not_fit_is_halved_as_the_message_says(
    unbroken, tmp_path, monkeypatch, capsys
):
    def full():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0")

    with monkeypatch.context() as patch:
        seen = at_forward(patch, 0, lambda: None)
        assert main(tiny(unbroken).arguments(tmp_path / "seen")) == 0
        whole = [sorted(names) for names in seen]
    with monkeypatch.context() as patch:
        at_forward(patch, 3, full)
        assert main(tiny(unbroken).arguments(tmp_path / "out")) == 1
    message = capsys.readouterr().err.rsplit("error: ", 1)[1]
    for part in ("2 images of a batch in each of 1 process ", "CUDA out of memory", "--resume"):
        assert part in message
    typed = message.split("type ")[1].split(" (yacs")[0].split()
    assert typed == ["dataloader.train.total_batch_size=1", "train.accumulate=2"]
    assert last(tmp_path / "out") == 1
    with monkeypatch.context() as patch:
        seen = at_forward(patch, 0, lambda: None)
        assert main(tiny(unbroken).arguments(tmp_path / "out", *typed, resume=True)) == 0
    # The two steps that are left, as four batches of one image each.
    assert [sorted(seen[0] + seen[1]), sorted(seen[2] + seen[3])] == whole[2:]
    assert "come again" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("images", "accumulate", "named"),
    [
        (8, 1, ["total_batch_size=4 train.accumulate=2", "batches of half the size, and 2"]),
        (6, 3, ["total_batch_size=3 train.accumulate=6", "SOLVER.IMS_PER_BATCH 3"]),
        (3, 2, ["total_batch_size=1 train.accumulate=6", "one image at a time"]),
        (1, 4, ["train.amp.enabled=true", "max_size=800", "cannot be smaller"]),
    ],
)
def test_what_to_type_when_the_memory_is_full(images, accumulate, named):
    with pytest.raises(TrainingError) as stop, enough_memory(images, accumulate):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
    for part in (*named, f"{images} image", "--resume"):
        assert part in str(stop.value)


def test_the_batch_of_several_processes_is_counted_for_all_of_them(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 8)
    advice = r"8 processes.*total_batch_size=8 train\.accumulate=2"
    with pytest.raises(TrainingError, match=advice), enough_memory(2, 1):
        raise RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")


def test_other_errors_of_a_step_are_not_the_memorys():
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"), enough_memory(2, 1):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (errno.ENOSPC, ["MiB are free there", "make room"]),
        (errno.EDQUOT, ["make room"]),
        (errno.EROFS, ["cannot be written", "train.output_dir=FOLDER"]),
        (errno.EACCES, ["cannot be written", "train.output_dir=FOLDER"]),
    ],
)
def test_a_disk_that_takes_nothing_more_is_named(number, named, tmp_path):
    with pytest.raises(TrainingError) as stop, enough_disk(tmp_path, "train.output_dir=FOLDER"):
        raise OSError(number, os.strerror(number))
    for part in (*named, str(tmp_path), "--resume", "are whole"):
        assert part in str(stop.value)


def test_an_error_of_another_file_is_not_the_output_folders(tmp_path):
    other = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/image.jpg")
    for error in (other, OSError(errno.EIO, "Input/output error")):
        with pytest.raises(type(error), match=str(error.strerror)), enough_disk(tmp_path, ""):
            raise error
    gone = enough_disk(tmp_path / "gone", "type")
    with pytest.raises(TrainingError, match="cannot be written"), gone:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "metrics.json")


def test_a_folder_whose_name_begins_alike_is_another_one(tmp_path):
    for named in (str(tmp_path / "output2" / "a.jpg"), None, 7):
        (tmp_path / "output").mkdir(exist_ok=True)
        error = PermissionError(errno.EACCES, "Permission denied", named)
        ours = not isinstance(named, str)  # without a name it must be ours
        stopped = pytest.raises(TrainingError if ours else PermissionError)
        with stopped, enough_disk(tmp_path / "output", ""):
            raise error


def test_a_full_disk_elsewhere_is_named(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "temporary").mkdir()
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "temporary" / "a"))
    with pytest.raises(TrainingError) as stop, enough_disk(tmp_path / "output", ""):
        raise error
    assert f"a file in {tmp_path / 'temporary'} could not be written" in str(stop.value)


def test_files_that_may_not_grow_end_it_and_leave_what_was_saved(
    unbroken, tmp_path, monkeypatch, capsys
):
    """The system's limit of a file's size stands for a full disk: a checkpoint does not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        limit = (2**19, hard)
        at_forward(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        try:
            assert main(tiny(unbroken).arguments(tmp_path)) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err
    for part in ("model_0000002.pth could not be written", "MiB are free there", "--resume"):
        assert part in message
    assert faults.check_whole(tmp_path, 2) == 2
    assert not list(tmp_path.glob("*.tmp"))
    resumed_is_unbroken(unbroken, tmp_path)


def test_an_output_folder_that_vanishes_is_named(unbroken, tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        at_forward(patch, 3, lambda: shutil.rmtree(output))
        assert main(tiny(unbroken).arguments(output)) == 1
    message = capsys.readouterr().err
    for part in (str(output), "could not be written", "No such file or directory", "--resume"):
        assert part in message


def test_a_folder_below_a_file_is_no_place_for_a_checkpoint(tmp_path):
    """Root may write everywhere, but not below a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written.*Not a directory"):
        write_whole(tmp_path / "file" / "model.pth", lambda file: file.write(b"x"))
