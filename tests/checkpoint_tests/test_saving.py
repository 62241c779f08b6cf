# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints: whole files or none, whatever happens meanwhile."""

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from d2_decouple.checkpoint import Checkpointer, CheckpointError, DamagedCheckpointError
from d2_decouple.checkpoint.files import write_whole
from d2_decouple.engine.trainer import Average


class Model(nn.Module):
    """A backbone and a class layer; a checkpoint of it is 4 MB, so that saving takes a while."""

    def __init__(self, classes=3):
        super().__init__()
        self.backbone = nn.Linear(1000, 1000)
        self.cls_score = nn.Linear(2, classes)


class Counter:
    """Stands for a trainer."""

    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def save_for_ever(folder, start):
    torch.set_num_threads(1)
    model, counter = Model(), Counter()
    checkpointer = Checkpointer(model, folder, counter=counter)
    for count in range(start, start + 100000):
        counter.count = count
        with torch.no_grad():
            model.backbone.weight.fill_(count)
        checkpointer.save(f"model_{count % 3:07d}")


def test_killed_while_saving_ten_times_it_can_always_be_resumed(tmp_path):
    random.seed(0)
    reached, unfinished, kills = 0, 0, 0
    while kills < 10 or unfinished < 3:  # on a busy machine most kills fall between two files
        kills += 1
        assert kills <= 60
        before = reached
        process = multiprocessing.get_context("fork").Process(
            target=save_for_ever, args=(str(tmp_path), reached + 1)
        )
        process.start()
        deadline = time.monotonic() + 60
        tag = tmp_path / "last_checkpoint"
        begun = time.time()
        while not tag.is_file() or tag.stat().st_mtime < begun:  # until this process has saved
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        unfinished += bool(list(tmp_path.glob("*.tmp")))  # killed in the middle of writing

        model, counter = Model(), Counter()
        Checkpointer(model, str(tmp_path), counter=counter).resume_or_load("", resume=True)
        reached = counter.count
        assert reached > before
        assert (model.backbone.weight == reached).all()


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    model = Model()
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_final")
    old = (tmp_path / "model_final.pth").read_bytes()
    model.backbone.weight.data.fill_(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # no file may be longer
    try:
        with pytest.raises(CheckpointError) as error:
            checkpointer.save("model_final")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for part in (str(tmp_path / "model_final.pth"), "could not be written", "MiB", "--resume"):
        assert part in str(error.value)
    assert (tmp_path / "model_final.pth").read_bytes() == old
    assert not list(tmp_path.glob("*.tmp"))
    checkpointer.save("model_final")
    assert (tmp_path / "model_final.pth").read_bytes() != old


def saved(folder, *counts):
    counter = Counter()
    checkpointer = Checkpointer(Model(), str(folder), counter=counter)
    for number, count in enumerate(counts):
        counter.count = count
        checkpointer.save(f"model_{number:07d}")
    return sorted(folder.glob("*.pth"))


def test_a_file_cut_in_half_is_passed_over(tmp_path, caplog):
    *_, older, newest = saved(tmp_path, 10, 20, 30)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    counter = Counter()
    Checkpointer(Model(), str(tmp_path), counter=counter).resume_or_load("")
    assert counter.count == 20
    assert f"{newest} cannot be read as a checkpoint" in caplog.text
    assert older.is_file()
    assert newest.is_file()  # nothing is deleted


def test_without_a_whole_file_all_are_named(tmp_path):
    files = saved(tmp_path, 1, 2)
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError) as error:
        Checkpointer(Model(), str(tmp_path)).resume_or_load("")
    assert "nothing to resume from" in str(error.value)
    for file in files:
        assert str(file) in str(error.value)


def test_a_file_cut_in_half_is_named_when_it_is_loaded(tmp_path):
    (file,) = saved(tmp_path, 1)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DamagedCheckpointError, match=f"{file} cannot be read as a checkpoint"):
        Checkpointer(Model()).load(str(file))


def test_the_best_is_not_what_a_training_goes_on_from(tmp_path):
    checkpointer = Checkpointer(Model(), str(tmp_path))
    checkpointer.save("model_best", last=False)
    assert not checkpointer.has_checkpoint()
    saved(tmp_path, 5)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000000.pth")


def test_weights_alone_are_not_gone_on_from(tmp_path):
    Checkpointer(Model(), str(tmp_path)).save("model_final")
    with pytest.raises(CheckpointError) as error:
        Checkpointer(Model(), str(tmp_path), counter=Counter()).resume_or_load("")
    for part in (str(tmp_path), "not the state of a training", "train.init_checkpoint=FILE"):
        assert part in str(error.value)


def test_another_model_does_not_go_on(tmp_path):
    saved(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"cls_score.*\(3,\) in the file, \(4,\) here"):
        Checkpointer(Model(4), str(tmp_path), counter=Counter()).resume_or_load("")


def with_classes(folder, classes, **options):
    return Checkpointer(Model(len(classes)), str(folder), extras={"classes": classes}, **options)


@pytest.mark.parametrize("classes", [["cat", "dog"], ["dog", "cat", "cow"], ["a", "b", "c"]])
def test_other_classes_keep_all_but_the_class_layer(classes, tmp_path, caplog):
    first = with_classes(tmp_path, ["cat", "dog", "cow"])
    first.save("model_final")
    second = with_classes(tmp_path / "new", classes)
    fresh = second.model.cls_score.weight.clone()
    with caplog.at_level("INFO", logger="d2_decouple"):
        second.load(str(tmp_path / "model_final.pth"))
    assert torch.equal(second.model.backbone.weight, first.model.backbone.weight)
    assert torch.equal(second.model.cls_score.weight, fresh)
    (line,) = [x.getMessage() for x in caplog.records if "Loaded" in x.getMessage()]
    for part in ("Loaded 2 of 4", "cls_score.weight", "cat, dog, cow", ", ".join(classes)):
        assert part in line


def test_the_same_classes_keep_everything(tmp_path, caplog):
    first = with_classes(tmp_path, ["cat", "dog"])
    first.save("model_final")
    second = with_classes(tmp_path / "new", ["cat", "dog"])
    with caplog.at_level("INFO", logger="d2_decouple"):
        second.load(str(tmp_path / "model_final.pth"))
    assert torch.equal(second.model.cls_score.weight, first.model.cls_score.weight)
    assert "Loaded 4 of 4 tensors" in caplog.text


@pytest.mark.parametrize("options", [{"complete": True}, {}])
def test_other_classes_are_refused_in_evaluation_and_when_going_on(options, tmp_path):
    with_classes(tmp_path, ["cat", "dog"]).save("model_final")
    second = with_classes(tmp_path, ["dog", "cat"], **options)
    with pytest.raises(CheckpointError) as error:
        second.resume_or_load("", resume=True)
    for part in ("cat, dog in the checkpoint", "dog, cat here", "train.init_checkpoint"):
        assert part in str(error.value)


def test_averaged_weights_are_taken_except_to_go_on(tmp_path, caplog):
    model = Model()
    average = Average(model, 0.5)
    average.update(model)
    model.backbone.weight.data.fill_(3)
    Checkpointer(model, str(tmp_path), ema=average).save("model_final")
    file = str(tmp_path / "model_final.pth")

    evaluated = Model()
    with caplog.at_level("INFO", logger="d2_decouple"):
        Checkpointer(evaluated, str(tmp_path), complete=True).resume_or_load("", resume=True)
    assert torch.equal(evaluated.backbone.weight, average.model.backbone.weight)
    assert "(averaged)" in caplog.text
    tuned = Model()
    Checkpointer(tuned, ema=Average(tuned, 0.5)).load(file, checkpointables=[])
    assert torch.equal(tuned.backbone.weight, average.model.backbone.weight)

    again = Model()
    average_again = Average(again, 0.5)
    Checkpointer(again, str(tmp_path), ema=average_again).resume_or_load("", resume=True)
    assert (again.backbone.weight == 3).all()
    assert torch.equal(average_again.model.backbone.weight, average.model.backbone.weight)


@pytest.mark.parametrize("content", [b"\xff\xfe\x80", b"", b"model_0000007.pth", b"\0" * 17])
def test_a_damaged_tag_is_passed_over(content, tmp_path, caplog):
    """Then the newest file is gone on from, and the log says so."""
    _, newest = saved(tmp_path, 10, 20)
    (tmp_path / "last_checkpoint").write_bytes(content)
    counter = Counter()
    checkpointer = Checkpointer(Model(), str(tmp_path), counter=counter)
    assert checkpointer.get_checkpoint_file() == str(newest)
    checkpointer.resume_or_load("")
    assert counter.count == 20
    warned = f"there is no such checkpoint: going on from the newest, {newest.name}"
    assert (warned in caplog.text) == bool(content)


def test_a_sound_tag_is_followed_without_a_word(tmp_path, caplog):
    older, _ = saved(tmp_path, 10, 20)
    (tmp_path / "last_checkpoint").write_text(older.name)
    counter = Counter()
    Checkpointer(Model(), str(tmp_path), counter=counter).resume_or_load("")
    assert counter.count == 10
    assert "no such checkpoint" not in caplog.text


def test_nothing_is_written_through_a_link_or_into_what_was_cut_off(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("mine")
    (tmp_path / "a.tmp").symlink_to(other)
    (tmp_path / "b.tmp").write_bytes(b"longer than what is written now")
    for name in ("a", "b"):
        write_whole(tmp_path / name, lambda file: file.write(b"new"))
        assert (tmp_path / name).read_bytes() == b"new"
        assert not (tmp_path / name).is_symlink()
    assert other.read_text() == "mine"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_link_that_comes_in_between_is_not_followed(tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("mine")

    def replaced(file, missing_ok=False):
        if not file.is_symlink():
            file.symlink_to(other)

    monkeypatch.setattr(Path, "unlink", replaced)
    with pytest.raises(CheckpointError, match="File exists"):
        write_whole(tmp_path / "a", lambda file: file.write(b"new"))
    assert other.read_text() == "mine"
