# SPDX-License-Identifier: Apache-2.0
"""The training loader: batches depend on the data, the seed and their number alone."""

import ctypes
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image
from torch.utils.data._utils import signal_handling

from d2_decouple.config import ConfigError, get_config
from d2_decouple.data.loader import DataError, TrainLoader, _Examples, _outlive_signals

WIDE, TALL = (20, 10), (10, 20)


def records(count=7, sizes=(WIDE,)):
    return [
        {
            "file_name": f"{i}.jpg",
            "width": sizes[i % len(sizes)][0],
            "height": sizes[i % len(sizes)][1],
        }
        for i in range(count)
    ]


def draw(record):
    """A mapper whose answer shows every global random number that a transform may use."""
    return record["file_name"], random.random(), np.random.rand(), torch.rand(()).item()


def loader(**options):
    return TrainLoader(
        **{"dataset": records(), "mapper": draw, "total_batch_size": 3, "seed": 5, **options}
    )


def names(batches):
    return [example[0] for batch in batches for example in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_from_any_start_with_any_number_of_workers(workers):
    unbroken = list(islice(loader(), 9))
    assert list(islice(loader(num_workers=workers).batches(4), 5)) == unbroken[4:]


def test_another_seed_is_another_order_and_other_draws():
    one, two = (list(islice(loader(seed=seed), 7)) for seed in (1, 2))
    assert names(one) != names(two)
    assert not {x[2] for batch in one for x in batch} & {x[2] for batch in two for x in batch}


def test_an_epoch_has_every_image_once_in_a_new_order():
    order = names(islice(loader(total_batch_size=1), 21))
    epochs = [order[:7], order[7:14], order[14:]]
    assert all(sorted(epoch) == sorted(x["file_name"] for x in records()) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_one_image_is_augmented_anew_in_every_epoch():
    seen = [x for batch in islice(loader(total_batch_size=1), 21) for x in batch]
    assert len({x[1] for x in seen}) == len({x[2] for x in seen}) == len({x[3] for x in seen}) == 21


def test_wide_and_tall_images_are_in_batches_of_their_own():
    mixed = loader(dataset=records(8, (WIDE, TALL)), total_batch_size=2)
    for batch in islice(mixed, 12):
        assert len({int(name.removesuffix(".jpg")) % 2 for name, *_ in batch}) == 1
    alike = loader(
        dataset=records(8, (WIDE, TALL)), total_batch_size=8, aspect_ratio_grouping=False
    )
    assert len(set(names(islice(alike, 1)))) == 8


def test_repeat_factors_are_kept_on_average():
    often = loader(dataset=records(2), repeat_factors=[1.0, 2.5], total_batch_size=1)
    seen = names(islice(often, 700))
    assert seen.count("1.jpg") / seen.count("0.jpg") == pytest.approx(2.5, abs=0.2)


def test_two_processes_share_an_epoch(monkeypatch):
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        shares.append(set(names(islice(loader(dataset=records(8), total_batch_size=4), 2))))
    assert [len(share) for share in shares] == [4, 4]
    assert not shares[0] & shares[1]


def test_the_training_process_keeps_its_own_random_numbers():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = torch.rand(2), np.random.rand(2), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    list(islice(loader(), 3))
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(2) == expected[1]).all()
    assert random.random() == expected[2]


def fail(record):
    raise OSError("image file is truncated")


def bomb(record):
    raise Image.DecompressionBombError("exceeds limit of 178956970 pixels")


def test_an_image_that_is_far_too_large_is_named():
    with pytest.raises(DataError, match=r"\d\.jpg .*178956970 pixels"):
        next(iter(loader(mapper=bomb)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_loaded_is_named(workers):
    with pytest.raises(DataError, match=r"\d\.jpg .*image file is truncated.*data\.checks"):
        next(iter(loader(mapper=fail, num_workers=workers)))


def test_a_mapper_that_refuses_everything_is_named():
    with pytest.raises(DataError, match=r"refused 10 images in a row.*dataloader\.train\.mapper"):
        next(iter(loader(mapper=lambda record: None)))


def test_a_refused_image_is_replaced():
    def mapper(record):
        return None if record["file_name"] == "0.jpg" else (record["file_name"],)

    assert "0.jpg" not in names(islice(loader(mapper=mapper), 9))


def misconfigured(record):
    raise ConfigError("wrong mapper")


def test_a_wrong_config_is_not_blamed_on_the_image():
    with pytest.raises(ConfigError, match="wrong mapper"):
        next(iter(loader(mapper=misconfigured)))


def die(record):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_named():
    with pytest.raises(DataError, match=r"process that loads images died.*num_workers=0"):
        next(iter(loader(mapper=die, num_workers=1)))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError("end")])
def test_a_worker_that_dies_while_it_hands_a_batch_over_is_named(monkeypatch, error):
    def broken(_):
        raise error
        yield

    monkeypatch.setattr("d2_decouple.data.loader._started", broken)
    with pytest.raises(DataError, match=r"process that loads images died.*num_workers=0"):
        next(loader(num_workers=1).batches())
    with pytest.raises(type(error)):  # without such processes it is somebody else's
        next(loader(num_workers=0).batches())


def test_a_dead_worker_is_no_signal_that_breaks_into_a_step(monkeypatch):
    """torch's handler would raise in the middle of an update of the weights."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    batches = loader(num_workers=1).batches()
    next(batches)
    assert signal_handling._SIGCHLD_handler_set  # torch did try
    assert signal.getsignal(signal.SIGCHLD) is before
    batches.close()


def hang(record):
    """In a library that never returns to Python, where no handler of a signal runs."""
    lock = ctypes.CDLL(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(256)
    lock(mutex)
    lock(mutex)


def read_from_a_worker_that_hangs():
    batches = loader(mapper=hang, num_workers=1).batches()
    threading.Thread(target=next, args=(batches,), daemon=True).start()
    time.sleep(1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a mutex of glibc")
def test_a_worker_that_hangs_is_left_at_the_end(monkeypatch):
    monkeypatch.setattr("d2_decouple.data.loader._GRACE", 0.2)
    process = multiprocessing.get_context("fork").Process(target=read_from_a_worker_that_hangs)
    process.start()
    process.join(30)
    alive = process.is_alive()
    process.kill()
    assert not alive


def test_workers_may_be_started_anew_instead_of_forked():
    """As on Windows and macOS, where all that a worker needs is pickled."""
    cfg = get_config("fcos_R_18_FPN_bccd", ["dataloader.train.dataset.names=bccd_mini_train"])
    images = instantiate(cfg.dataloader.train)
    examples = _Examples(images._records, images._mapper, 1)
    needed = pickle.dumps((examples, _outlive_signals))
    here, there = (one[(5, 3)] for one in (examples, pickle.loads(needed)[0]))
    assert there["file_name"] == here["file_name"]
    assert torch.equal(there["image"], here["image"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dataset": []}, "no images"),
        ({"total_batch_size": 0}, r"total_batch_size is 0.*total_batch_size=1"),
        ({"repeat_factors": [1.0]}, "1 repeat factors for 7 images"),
    ],
)
def test_what_makes_no_batches_is_refused(options, named):
    with pytest.raises(DataError, match=named):
        loader(**options)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    with pytest.raises(DataError, match=r"total_batch_size is 3, and 2 processes.*=4"):
        loader()
