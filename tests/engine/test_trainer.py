# SPDX-License-Identifier: Apache-2.0
"""The training loop on a model of one weight matrix: every number can be computed beside it."""

import copy
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from d2_decouple.checkpoint import CheckpointError
from d2_decouple.data.loader import DataError
from d2_decouple.engine import TrainingError, TrainingStoppedError
from d2_decouple.engine.hooks import Progress, forget_after
from d2_decouple.engine.trainer import Average, Trainer


class Model(nn.Module):
    """Two losses of a linear map; dropout shows whether random numbers are repeatable."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch):
        x = torch.stack([item["x"] for item in batch])
        y = self.norm(self.dropout(self.linear(x)))
        return {"loss_cls": y.square().mean() + y.mean(), "loss_box_reg": (y - 1).abs().mean()}


class Numbers:
    """Batch i is a function of i."""

    def __init__(self, bad=None):
        self.seed, self.bad = 7, bad

    def batches(self, start=0):
        number = start
        while True:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            if number == self.bad:
                x[1] = float("nan")
            yield [{"x": row, "image_id": f"image{number}-{i}"} for i, row in enumerate(x)]
            number += 1


def make(model=None, *, dropout=0.0, bad=None, lr=0.1, **options):
    torch.manual_seed(0)
    model = model or Model(dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Trainer(model=model, loader=Numbers(bad), optimizer=optimizer, **options)


def weights(trainer):
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_accumulated_gradients_are_the_mean_of_the_batches():
    trainer = make(accumulate=3)
    twin = copy.deepcopy(trainer.model).train()
    batches = [batch for batch, _ in zip(Numbers().batches(), range(3), strict=False)]
    for batch in batches:
        (sum(twin(batch).values()) / 3).backward()
    trainer.train(0, 1)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(twin.named_parameters())[name].grad)


def test_accumulation_resumes_at_its_own_batches():
    trainer = make(accumulate=2)
    trainer.train(0, 4)
    first = make(accumulate=2)
    first.train(0, 2)
    second = make(copy.deepcopy(first.model), accumulate=2)
    second.load_state_dict(first.state_dict())
    second.train(2, 4)
    assert equal(weights(trainer), weights(second))


def test_random_numbers_of_a_step_do_not_depend_on_the_steps_before():
    trainer = make(dropout=0.5)
    trainer.train(0, 3)
    first = make(dropout=0.5)
    first.train(0, 2)
    second = make(copy.deepcopy(first.model))
    second.load_state_dict(first.state_dict())
    torch.rand(17)  # another process has drawn other numbers
    second.train(2, 3)
    assert equal(weights(trainer), weights(second))


def test_gradients_are_clipped_together():
    trainer = make(max_grad_norm=0.01)
    trainer.train(0, 1)
    norms = torch.stack([p.grad.norm() for p in trainer.model.parameters()])
    assert norms.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert trainer.storage.history("grad_norm").latest() > 0.01


def test_the_average_follows_its_formula():
    model = Model()
    average = Average(model, decay=0.5)
    trainer = make(model, average=average)
    expected, values = None, []
    for step in range(4):
        trainer.train(step, step + 1)
        new = model.linear.weight.detach().clone()
        kept = min(0.5, (1 + step) / (10 + step))
        expected = new if expected is None else expected * kept + new * (1 - kept)
        values.append(new)
    torch.testing.assert_close(average.model.linear.weight, expected)
    assert not torch.equal(expected, values[-1])
    assert average.updates == 4
    assert average.model.norm.num_batches_tracked == 4  # a counter is no average
    mean = average.model.norm.running_mean
    assert not torch.equal(mean, model.norm.running_mean)
    assert average.state_dict().keys() == model.state_dict().keys()


def test_an_average_goes_on_after_resuming():
    model = Model()
    twin = copy.deepcopy(model)
    unbroken = make(twin, average=Average(twin, 0.9))
    unbroken.train(0, 5)

    first = make(model, average=Average(model, 0.9))
    first.train(0, 3)
    again = copy.deepcopy(model)
    second = make(again, average=Average(again, 0.9))
    second.average.load_state_dict(first.average.state_dict())
    second.load_state_dict(first.state_dict())
    second.train(3, 5)
    assert equal(unbroken.average.state_dict(), second.average.state_dict())


def test_a_moving_average_beside_the_buffers_goes_on():
    """Detectron2's dense heads keep one, of their positives."""
    first, second = make(), make()
    first.model.loss_normalizer = 221.5
    second.load_state_dict(first.state_dict())
    assert second.model.loss_normalizer == 221.5
    without = make()
    without.load_state_dict(make().state_dict())
    assert not hasattr(without.model, "loss_normalizer")


def test_another_number_of_images_is_said(caplog):
    first, second = make(), make()
    first._loader.images, second._loader.images = 100, 101
    state = first.state_dict()
    make().load_state_dict(state)  # its loader does not say how many there are
    first.load_state_dict(state)
    assert not caplog.text
    second.load_state_dict(state)
    assert "The training set had 100 images and has 101 now" in caplog.text


def test_batches_of_a_step_are_grouped_together():
    loader = Numbers()
    loader.step_batches = 1
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model=model, loader=loader, optimizer=optimizer, accumulate=3)
    assert loader.step_batches == 3


@pytest.mark.parametrize("decay", [0, 1, -1, 2])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(TrainingError, match=f"between 0 and 1, got {decay}"):
        Average(Model(), decay)


def test_bfloat16_stays_close_to_full_precision():
    full, mixed = make(), make(precision=torch.bfloat16)
    assert equal(weights(full), weights(mixed))
    full.train(0, 3)
    mixed.train(0, 3)
    for name, x in weights(mixed).items():
        if x.is_floating_point():
            assert x.dtype == torch.float32
            torch.testing.assert_close(x, weights(full)[name], rtol=0.05, atol=0.02)
    assert not equal(weights(full), weights(mixed))
    assert not mixed.state_dict()["scaler"]


def test_float16_scales_the_loss_and_remembers_by_how_much():
    trainer = make(precision=torch.float16)
    before = weights(trainer)
    trainer.train(0, 6)
    after = weights(trainer)
    assert not torch.equal(before["linear.weight"], after["linear.weight"])
    assert all(x.isfinite().all() for x in after.values())
    state = trainer.state_dict()
    state["scaler"]["scale"] = 128.0
    again = make(copy.deepcopy(trainer.model), precision=torch.float16)
    again.load_state_dict(state)
    assert again.state_dict()["scaler"]["scale"] == 128.0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(tmp_path):
    trainer = make(bad=2, lr=0.25, failures=tmp_path)
    with pytest.raises(TrainingError) as stop:
        trainer.train(0, 5)
    (file,) = tmp_path.iterdir()
    named = "loss_cls and loss_box_reg", "iteration 2", "rate 0.25", "image2-1", str(file)
    for part in (*named, "optimizer.lr", "max_grad_norm", "--resume"):
        assert part in str(stop.value)
    kept = torch.load(file, weights_only=True)
    assert kept["iteration"] == 2
    assert kept["batch"][1]["image_id"] == "image2-1"
    assert kept["batch"][1]["x"].isnan().all()
    assert not kept["batch"][0]["x"].isnan().any()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_full_disk_does_not_hide_the_loss(tmp_path):
    trainer = make(bad=0, failures=tmp_path / "missing")
    with pytest.raises(TrainingError, match=r"loss_cls.*could not be saved"):
        trainer.train(0, 1)


def test_metrics_forget_what_will_come_again(tmp_path):
    file = tmp_path / "metrics.json"
    rows = [{"iteration": i, "total_loss": float(i)} for i in range(5)]
    half = '{"iteration": 5, "total_'
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + half)
    forget_after(file, 3)
    assert [json.loads(line)["iteration"] for line in file.read_text().splitlines()] == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [file]
    forget_after(tmp_path / "none.json", 3)


def test_the_line_says_how_far_it_is(caplog, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    trainer = make()
    trainer.train(0, 3)
    progress = Progress(8, terminal=True)
    with trainer.storage, caplog.at_level("INFO", logger="d2_decouple"):
        trainer.storage.iter = 2
        trainer.storage.put_scalars(lr=0.1, time=2.0)
        progress.write()
    assert "eta 0:00:10" in capsys.readouterr().err  # at once
    assert Progress.make_room(caplog.records[0])
    assert capsys.readouterr().err.endswith("\r")  # what is logged begins a line
    progress.close()
    (line,) = [record.getMessage() for record in caplog.records]
    for part in ("iteration 3/8", "loss ", "cls ", "box_reg ", "lr 0.1", "2.000 s", "eta 0:00:10"):
        assert part in line
    bar = capsys.readouterr().err
    assert "3/8" in bar
    assert "eta 0:00:10" in bar


def resumed(first, **options):
    second = make(copy.deepcopy(first.model), **options)
    second.load_state_dict(first.state_dict())
    return second


# A lazy schedule is stretched to the length of the training, which the second one changes.
@pytest.mark.parametrize(("kind", "factors"), [("lazy", [0.1] * 3), ("yacs", [1, 0.1, 0.1])])
def test_a_lower_rate_counts_for_a_resumed_training(kind, factors, caplog):
    """As the message about a loss that is not finite says; momentum goes on."""

    def with_schedule(trainer):
        steps = MultiStepParamScheduler([1.0, 0.1], milestones=[3, 8])
        if kind == "yacs":
            steps = LRMultiplier(trainer.optimizer, steps, 8)
        trainer.register_hooks([hooks.LRScheduler(trainer.optimizer, steps)])
        return trainer

    first = with_schedule(make(lr=0.4))
    first.train(0, 2)
    rates = []
    for lr in (0.4, 0.02):
        trainer = with_schedule(make(copy.deepcopy(first.model), lr=lr))
        with caplog.at_level("INFO", logger="d2_decouple"):
            trainer.load_state_dict(first.state_dict())
        trainer.train(2, 5)
        rates.append([rate for rate, _ in trainer.storage.history("lr").values()])
    assert rates[0] == pytest.approx([0.4 * factor for factor in factors])
    assert rates[1] == pytest.approx([0.02 * factor for factor in factors])
    assert "is now 0.02; the checkpoint's was 0.4" in caplog.text


def test_another_trainings_state_is_named():
    first = make()
    first.train(0, 1)
    frozen = make(copy.deepcopy(first.model))
    del frozen.optimizer.param_groups[0]["params"][0]
    with pytest.raises(CheckpointError, match=r"does not fit this training.*init_checkpoint=FILE"):
        frozen.load_state_dict(first.state_dict())
    foreign = {"iteration": 3, "_trainer": {}}  # Detectron2's DefaultTrainer
    with pytest.raises(CheckpointError, match="does not fit this training"):
        make().load_state_dict(foreign)


def test_another_accumulation_is_said(caplog):
    first = make(accumulate=2)
    first.train(0, 2)
    resumed(first, accumulate=2)
    assert not caplog.records
    resumed(first, accumulate=3)
    assert "had 2 batches each, these have 3" in caplog.text


class Cusp(Model):
    """A loss of zero whose gradient is not a number."""

    def forward(self, batch):
        return {"loss_cls": (self.linear.weight * 0).abs().sum().sqrt()}


def test_gradients_that_are_not_finite_stop_before_the_update():
    trainer = make(Cusp(), max_grad_norm=1.0)
    before = weights(trainer)
    with pytest.raises(TrainingError) as stop:
        trainer.train(0, 1)
    for part in ("gradients", "iteration 0", "optimizer.lr", "--resume"):
        assert part in str(stop.value)
    assert equal(before, weights(trainer))


class Broken(Numbers):
    """The second process cannot load batch 2."""

    def batches(self, start=0):
        for number, batch in enumerate(super().batches(start), start):
            if number == 2 and dist.get_rank() == 1:
                raise DataError("image 7.jpg cannot be used")
            yield batch


class Slow(HookBase):
    """The first process saves for a while; the second one was told to stop."""

    def __init__(self, folder):
        self.file = folder / "saved"

    def after_step(self):
        if dist.get_rank() == 0 and self.trainer.stopping:
            time.sleep(1)
            self.file.write_text("whole")
        elif self.trainer.iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def in_one_of_two(rank, folder):
    torch.set_num_threads(1)
    address = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    trainer = make()
    trainer._loader = Broken()
    with pytest.raises(DataError, match=r"7\.jpg"):
        trainer.train(0, 5)
    assert trainer.iter == 2
    trainer = make()
    trainer.register_hooks([Slow(folder)])
    with pytest.raises(TrainingStoppedError, match=r"SIGTERM after [23] of 9"):
        trainer.train(0, 9)
    assert (folder / "saved").read_text() == "whole"
    dist.destroy_process_group()


def test_processes_stop_together(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=in_one_of_two, args=(r, tmp_path)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert ended == [0, 0]
