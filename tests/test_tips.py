"""Section 8: early stopping, initialisation, memory, and what is saved and exported."""

import math
import os
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from convolutional_neural_networks import (EarlyStopping, LeNet5, SimpleCNN, SmallVGG, activation_bytes,
                                           evaluate, load_checkpoint, save_whole, train_model)


# ------------------------------------------------------------------------------ 8.1 early stopping


def epochs_until_it_stops(losses, patience, model=None):
    """How many rows it takes; and the object. The model's weight is the number of the epoch."""
    model = model or nn.Linear(1, 1)
    stopping = EarlyStopping(model, patience)
    for epoch, loss in enumerate(losses, 1):
        nn.init.constant_(model.weight, epoch)
        if stopping({"epoch": epoch, "val_loss": loss}):
            break
    return epoch, stopping


@pytest.mark.parametrize(("losses", "patience", "stops", "best"), [
    ([3, 2, 4, 4, 4, 1], 3, 5, 2),  # the third epoch without a lower loss is the last
    ([3, 2, 4, 4, 1, 5, 5, 5], 3, 8, 5),  # a lower loss starts the count anew
    ([3, 2, 2, 2, 2], 2, 4, 2),  # an equal loss is not lower: the first of them counts
    ([5, 4, 3, 2, 1], 1, 5, 5),  # it falls to the end
    ([1, 2], 1, 2, 1)])
def test_early_stopping_has_exactly_that_patience(losses, patience, stops, best):
    model = nn.Linear(1, 1)
    epoch, stopping = epochs_until_it_stops(losses, patience, model)
    assert epoch == stops and stopping.best_epoch == best and stopping.lowest == losses[best - 1]
    assert model.weight.item() == stops  # it is the caller who restores
    stopping.restore()
    assert model.weight.item() == best


def test_it_does_not_stop_while_the_loss_falls():
    stopping = EarlyStopping(nn.Linear(1, 1), patience=1)
    assert not any(stopping({"epoch": epoch, "val_loss": 1 / epoch}) for epoch in range(1, 50))


def test_without_validation_images_it_says_so():
    with pytest.raises(ValueError, match="expected validation images"):
        epochs_until_it_stops([math.nan], 2)


def test_restore_gives_the_bits_of_the_best_epoch(digits):
    """At a far too high rate the loss goes up and down; batch normalisation has statistics too."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                          nn.Linear(144, 10))
    stopping, seen, stopped = EarlyStopping(model, patience=2), {}, []

    def on_epoch(row):
        seen[row["epoch"]] = {name: value.clone() for name, value in model.state_dict().items()}
        stopped.append(stopping(row))
        return stopped[-1]

    images, labels = digits.train_images[:200], digits.train_labels[:200]
    history = train_model(model, images, labels, epochs=40, learning_rate=0.1, batch_size=32, one_cycle=False,
                          validation=0.3, on_epoch=on_epoch)
    losses = [row["val_loss"] for row in history]
    best = 1 + int(np.argmin(losses))
    assert len(history) == best + 2 < 40 and stopped == [False] * (best + 1) + [True]
    stopping.restore()
    assert stopping.best_epoch == best and stopping.lowest == min(losses)
    assert all(torch.equal(value, seen[best][name]) for name, value in model.state_dict().items())
    assert not all(torch.equal(value, seen[best + 2][name]) for name, value in model.state_dict().items())
    evaluate(model, images, labels)  # usable as it is


# ------------------------------------------------------------------------------ 8.2 initialisation


def spread_after_ten_layers(initialise):
    x = torch.randn(4, 64, 12, 12)
    for _ in range(10):
        conv = nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular", bias=False)
        initialise(conv.weight)
        with torch.no_grad():
            x = conv(x).relu()
    return x.std().item()


def test_only_kaiming_keeps_the_spread():
    def typical(initialise):
        return np.median([spread_after_ten_layers(initialise) for _ in range(3)])

    kaiming = typical(partial(nn.init.kaiming_normal_, nonlinearity="relu"))
    assert 0.5 < kaiming < 2  # it was 1
    by_hand = typical(partial(nn.init.normal_, std=(2 / (64 * 9)) ** 0.5))
    assert 0.5 < by_hand < 2  # √(2 / inputs), as the text says
    xavier = typical(nn.init.xavier_normal_)
    assert 0.5 < xavier / kaiming / 2 ** -5 < 2  # each layer lets half of the variance through
    small = typical(partial(nn.init.normal_, std=0.01))
    assert small < 1e-6  # hardly anything is left
    assert 0.5 < small / kaiming / (0.01 / (2 / (64 * 9)) ** 0.5) ** 10 < 2


def rates(schedule, optimizer, steps):
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_one_cycle_warms_up_and_cosine_starts_at_the_top_and_both_end_near_zero():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    one_cycle = rates(OneCycleLR(optimizer, max_lr=1.0, total_steps=100), optimizer, 100)
    assert one_cycle[0] == pytest.approx(1 / 25) and max(one_cycle) == pytest.approx(1)
    assert int(np.argmax(one_cycle)) == 29 and one_cycle[-1] < 1e-3  # 30% of the steps rise
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = rates(CosineAnnealingLR(optimizer, T_max=100), optimizer, 100)
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)])


# ------------------------------------------------------------------------------ 8.2 memory


@pytest.mark.parametrize("count", [1, 5])
def test_activation_bytes_are_exact(count):
    x = torch.rand(count, 1, 10, 10)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU())
    assert activation_bytes(conv, x) == count * 4 * (100 + 4 * 64)  # the input, and what ReLU gives
    more = nn.Sequential(*conv, nn.Flatten(), nn.Linear(256, 7))  # reads the same memory again
    assert activation_bytes(more, x) == count * 4 * (100 + 4 * 64)
    pooled = nn.Sequential(*conv, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 7))
    per_image = 4 * (100 + 4 * 64 + 4 * 16) + 8 * 4 * 16  # and which of four was the largest: int64
    assert activation_bytes(pooled, x) == count * per_image
    tanh = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Tanh())
    assert activation_bytes(tanh, torch.rand(count, 10)) == count * 4 * 10 * 3


def test_weights_are_not_activations_and_double_precision_takes_twice_as_much():
    wide = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1000))
    assert activation_bytes(wide, torch.rand(2, 1000)) == 2 * 4 * 2000
    assert activation_bytes(wide.double(), torch.rand(2, 1000).double()) == 2 * 8 * 2000


def test_memory_grows_image_for_image():
    model = SmallVGG(channels=(4, 8))
    kept = [activation_bytes(model, torch.zeros(count, 3, 16, 16)) for count in (2, 3, 4, 12)]
    per_image = kept[1] - kept[0]
    assert per_image > 0 and kept[2] == kept[1] + per_image and kept[3] == kept[0] + 10 * per_image
    fixed = kept[0] - 2 * per_image
    assert 0 <= fixed <= 4 * 4 * 2 * (4 + 8)  # batch normalisation's statistics, twice two a channel


def test_nothing_keeps_memory_for_a_backward_pass_that_cannot_be():
    with torch.no_grad():
        assert activation_bytes(SmallVGG(channels=(4,)), torch.zeros(2, 3, 8, 8)) == 0


# ------------------------------------------------------------------------------ 8.3 saving


NETWORKS = [SimpleCNN, lambda: LeNet5(7, 2), lambda: SmallVGG(channels=(4, 8))]
IMAGES = [(1, 28, 28), (2, 28, 28), (3, 20, 12)]
KINDS = ["SimpleCNN", "LeNet5", "SmallVGG"]


@pytest.mark.parametrize(("make", "shape"), list(zip(NETWORKS, IMAGES)), ids=KINDS)
def test_saved_weights_give_equal_logits(tmp_path, make, shape):
    model, x = make(), torch.randn(3, *shape)
    model(torch.randn(8, *shape))  # batch normalisation has seen something
    save_whole(model.state_dict(), tmp_path / "weights.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    restored = make()
    assert not torch.equal(restored.eval()(x), model.eval()(x))
    restored.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(restored.eval()(x), model.eval()(x))


def test_code_hidden_in_a_file_is_not_run(tmp_path):
    class Hidden:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    save_whole({"recipe": {}, "history": Hidden()}, tmp_path / "weights.pt")
    with pytest.raises(Exception, match="weights_only"):
        torch.load(tmp_path / "weights.pt")  # True is the default, says the text
    with pytest.raises(ValueError, match="is damaged, or is none"):
        load_checkpoint(tmp_path / "weights.pt", {})
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch, before, as_text):
    path = tmp_path / "weights.pt"
    if before:
        save_whole({"value": torch.ones(3)}, path)
        old = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_whole({"value": torch.zeros(300_000)}, str(path) if as_text else path)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"] * before
    assert not before or path.read_bytes() == old
    monkeypatch.undo()
    save_whole({"value": torch.zeros(5)}, path)
    assert torch.load(path)["value"].shape == (5,) and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_saved_leaves_the_old_file_whole(tmp_path):
    save_whole({"value": 1}, tmp_path / "weights.pt")
    with pytest.raises((AttributeError, TypeError)):
        save_whole({"value": (number for number in range(3))}, tmp_path / "weights.pt")
    assert torch.load(tmp_path / "weights.pt") == {"value": 1} and len(list(tmp_path.iterdir())) == 1


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "weights.pt", []

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    save_whole({"value": torch.ones(1000)}, path)
    assert synced == [(path.stat().st_size, False)]


# ------------------------------------------------------------------------------ 8.3 exporting


@pytest.mark.parametrize(("make", "shape"), list(zip(NETWORKS, IMAGES)), ids=KINDS)
def test_an_exported_network_takes_any_batch(tmp_path, make, shape):
    model = make().eval()
    free = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=free)
    torch.export.save(exported, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for count in (1, 2, 7, 100):
        x = torch.randn(count, *shape)
        with torch.no_grad():
            assert loaded(x).shape == model(x).shape and torch.allclose(loaded(x), model(x), atol=1e-5)
    with pytest.raises(Exception, match="shape|size|Guard"):
        loaded(torch.randn(2, *shape[:2], shape[2] + 4))  # only the batch is free
