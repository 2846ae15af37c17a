"""Section 4: augmentation, the training loop, evaluation, recipes, and the table of results."""

import copy
import itertools
import math
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import convolutional_neural_networks as tutorial
from convolutional_neural_networks import (RECIPES, LeNet5, SimpleCNN, SmallVGG,
                                           count_parameters, evaluate, plot_confusion, plot_history,
                                           plot_mistakes, predict_logits, print_epoch, random_affine,
                                           random_shift, run, seeded, shift_and_flip, slide,
                                           smooth, standardize, train_epoch, train_model)
from data import colour_digits
from data.run import Results, with_error

QUIET = {"on_epoch": None}


@pytest.fixture
def few(digits):
    """400 digits to train with, 100 to test."""
    return digits.first(400, 100)


def weights_of(model):
    """All weights and statistics of a network, in one row."""
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


def tiny_network(dropout=0.0):
    """So small that a training takes no time; for 28×28 pixels."""
    return nn.Sequential(nn.Conv2d(1, 4, 7, stride=7), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
                         nn.Linear(64, 10))


class Probe(nn.Module):
    """Passes its input on, and notes for each call the mode, the dtype and the number of images."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, x.dtype, len(x)))
        return x


# -------------------------------------------------------------------------------- augmentation


def turned_dots(count, height, width, distance, **settings):
    """Dots `distance` pixels right of the middle, after `random_affine`: how far right, how far down."""
    images = torch.zeros(count, 1, height, width, dtype=torch.uint8)
    images[:, 0, height // 2, width // 2 + distance - 1:width // 2 + distance + 2] = 255
    masses = random_affine(images, **settings)[:, 0].double()
    total = masses.sum(dim=(1, 2))
    right = masses.sum(dim=1) @ (torch.arange(width).double() - width // 2) / total
    down = masses.sum(dim=2) @ (torch.arange(height).double() - height // 2) / total
    return right, down


def test_random_affine_turns_each_image_within_the_limit():
    right, down = turned_dots(400, 33, 33, 9, degrees=20, scale=0, pixels=0)
    assert torch.allclose(torch.hypot(right, down), torch.tensor(9.0).double(), atol=0.3)
    angles = torch.rad2deg(torch.atan2(down, right))
    assert angles.abs().max() < 20.5 and angles.min() < -18 and angles.max() > 18
    assert angles.std() == pytest.approx(40 / math.sqrt(12), rel=0.1)  # all angles equally likely


@pytest.mark.parametrize(("height", "width"), [(33, 65), (65, 33)])
def test_random_affine_turns_images_that_are_not_square_without_distortion(height, width):
    right, down = turned_dots(200, height, width, 9, degrees=45, scale=0, pixels=0)
    assert torch.allclose(torch.hypot(right, down), torch.tensor(9.0).double(), atol=0.5)


@pytest.mark.parametrize(("height", "width"), [(33, 33), (33, 65)])
def test_random_affine_shifts_each_image_within_the_limit(height, width):
    right, down = turned_dots(400, height, width, 9, degrees=0, scale=0, pixels=3)
    for shift in (right - 9, down):
        assert shift.abs().max() < 3.1 and shift.min() < -2.8 and shift.max() > 2.8
        assert shift.std() == pytest.approx(6 / math.sqrt(12), rel=0.1)
    assert abs(np.corrcoef(right, down)[0, 1]) < 0.2, "rows and columns have draws of their own"


def test_random_affine_scales_each_image_within_the_limit():
    right, down = turned_dots(400, 33, 33, 9, degrees=0, scale=0.2, pixels=0)
    assert down.abs().max() < 0.1
    assert 9 / 1.22 < right.min() < 9 / 1.18 and 9 / 0.82 < right.max() < 9 / 0.78


def test_each_draw_of_random_affine_does_one_thing(monkeypatch):
    """A recipe and a seed give the same images for ever: who changes the order changes all results."""
    draws = torch.full((4, 5), 0.5)                              # in the middle: nothing is changed
    draws[range(4), range(4)] = 1.0                              # of each image but the fifth, one is largest
    monkeypatch.setattr(torch, "rand", lambda *shape, device: draws if shape == (4, 5) else None)
    right, down = turned_dots(5, 33, 33, 9, degrees=90, scale=0.5, pixels=2)
    assert right.tolist() == pytest.approx([0, 6, 7, 9, 9], abs=0.1)   # turned, smaller, moved left
    assert down.tolist() == pytest.approx([-9, 0, 0, -2, 0], abs=0.1)  # turned, moved up


def test_random_affine_without_limits_to_use_changes_nothing():
    images = torch.randint(0, 256, (5, 3, 9, 14), dtype=torch.uint8)
    same = random_affine(images, degrees=0, scale=0, pixels=0)
    assert same.dtype == torch.uint8 and torch.equal(same, images)


def test_shift_and_flip_tosses_a_coin_and_draws_a_shift_for_each_image():
    images = torch.randint(0, 256, (400, 3, 8, 9), dtype=torch.uint8)
    changed = shift_and_flip(images, pixels=2)
    assert changed.dtype == torch.uint8 and changed.shape == images.shape
    flips, shifts = [], []
    for image, result in zip(images.numpy(), changed.numpy()):
        found = []
        for mirrored, (y, x) in itertools.product([False, True], itertools.product(range(5), repeat=2)):
            big = np.pad(image[:, :, ::-1] if mirrored else image, ((0, 0), (2, 2), (2, 2)), "reflect")
            if np.array_equal(big[:, y:y + 8, x:x + 9], result):
                found.append((mirrored, (y, x)))
        assert len(found) == 1, "neither a shifted copy nor a mirrored and shifted one"
        flips.append(found[0][0])
        shifts.append(found[0][1])
    assert 160 <= sum(flips) <= 240                              # 200 expected, deviation 10
    assert len(set(shifts)) == 25
    assert sum(a != b for a, b in zip(flips, flips[1:])) > 150, "one coin for many images"


# ------------------------------------------------------------------------------------ one epoch


def test_train_epoch_is_the_plain_loop(few):
    batches = [torch.tensor([3, 1, 4]), torch.arange(10, 30), torch.tensor([5, 9])]
    images, labels = few.train_images, few.train_labels
    ours = tiny_network(dropout=0.5)
    theirs = copy.deepcopy(ours)

    def optimizer_and_schedule(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    torch.manual_seed(7)
    theirs.train()
    optimizer, schedule = optimizer_and_schedule(theirs)
    expected = []
    for batch in batches:
        x = random_shift(images[batch], 1).float() / 100
        loss = F.cross_entropy(theirs(x), labels[batch], label_smoothing=0.2)
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    torch.manual_seed(7)
    losses = train_epoch(ours.eval(), iter(batches), images, labels, *optimizer_and_schedule(ours),
                         augment=partial(random_shift, pixels=1), prepare=lambda x: x.float() / 100,
                         label_smoothing=0.2)
    assert losses.shape == (3,) and losses.dtype == torch.float32 and not losses.requires_grad
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(weights_of(ours), weights_of(theirs), atol=1e-7)
    assert not ours.training, "dropout stays on if training mode does"


def test_train_epoch_needs_no_schedule_and_standardises_by_default(few):
    model = tiny_network()
    before = copy.deepcopy(model)
    losses = train_epoch(model, [torch.arange(20)], few.train_images, few.train_labels,
                         torch.optim.SGD(model.parameters(), lr=0.1))
    expected = F.cross_entropy(before(standardize(few.train_images[:20])), few.train_labels[:20])
    assert losses.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_evaluation_mode(few):
    model = tiny_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with pytest.raises(FloatingPointError, match="the loss is infinite or not a number"):
        train_epoch(model, torch.arange(40).split(10), few.train_images, few.train_labels, optimizer)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("precision", ["auto", "float16", None, torch.bfloat16])
def test_train_epoch_refuses_unknown_precisions_before_it_changes_anything(few, precision):
    model = tiny_network().eval()
    before = weights_of(model)
    with pytest.raises(ValueError, match="precision: expected 'float32' or 'bfloat16', got"):
        train_epoch(model, [torch.arange(9)], few.train_images, few.train_labels,
                    torch.optim.SGD(model.parameters(), lr=0.1), precision=precision)
    assert torch.equal(weights_of(model), before) and not model.training


@pytest.mark.parametrize(("precision", "expected"), [
    ("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_precision_is_that_of_the_layers_in_training_and_never_of_the_weights(few, precision, expected):
    probe = Probe()
    model = nn.Sequential(*tiny_network()[:2], probe, *tiny_network()[2:])
    history = train_model(model, few.train_images, few.train_labels, epochs=1, precision=precision, **QUIET)
    in_training = {dtype for training, dtype, _ in probe.seen if training}
    in_evaluation = {dtype for training, dtype, _ in probe.seen if not training}
    assert in_training == {expected} and in_evaluation == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert history[0]["train_loss"] == pytest.approx(math.log(10), abs=0.5)


# ----------------------------------------------------------------------------------- evaluation


def test_evaluate_equals_the_formulas_and_restores_the_modes(few):
    model = nn.Sequential(SimpleCNN(), nn.Dropout(0.5)).train()
    model[0].conv_block1.eval()
    loss, accuracy = evaluate(model, few.test_images, few.test_labels)
    assert model.training and model[1].training and not model[0].conv_block1[0].training
    with torch.no_grad():
        logits = model[0](standardize(few.test_images)).double()
    right = logits[torch.arange(100), few.test_labels]
    assert loss == pytest.approx((logits.exp().sum(dim=1).log() - right).mean().item(), abs=1e-5)
    hits = sum(int(np.argmax(row) == label) for row, label in zip(logits.numpy(), few.test_labels))
    assert accuracy == pytest.approx(hits / 100)
    assert type(loss) is float and type(accuracy) is float


def test_predictions_come_in_batches_and_in_order(digits):
    probe = Probe()
    model = nn.Sequential(probe, tiny_network(), nn.BatchNorm1d(10)).train()
    images = torch.cat([digits.test_images, digits.test_images[:1]])
    logits = predict_logits(model, images)
    assert probe.seen == [(False, torch.float32, n) for n in (500, 500, 1)]
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert model[2].num_batches_tracked == 0, "batch normalisation must not learn from test images"
    expected = model.eval()(standardize(images))
    assert torch.allclose(logits, expected, atol=1e-5)


def test_an_own_prepare_takes_the_place_of_standardize(few):
    model = tiny_network()
    loss, accuracy = evaluate(model, few.test_images, few.test_labels, lambda x: x.float() / 7)
    expected = F.cross_entropy(model(few.test_images / 7), few.test_labels).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    logits = predict_logits(model, few.test_images, prepare=lambda x: x.float() / 7)
    assert accuracy == pytest.approx((logits.argmax(dim=1) == few.test_labels).float().mean().item())


def test_on_no_images_nothing_is_known(few):
    loss, accuracy = evaluate(tiny_network(), few.test_images[:0], few.test_labels[:0])
    assert math.isnan(loss) and math.isnan(accuracy)


# ---------------------------------------------------------------------------- a whole training


def test_training_learns_and_reports_each_epoch(few):
    model, began = SimpleCNN(), time.perf_counter()
    history = train_model(model, few.train_images, few.train_labels, epochs=4, **QUIET)
    assert 0 < sum(row["seconds"] for row in history) < time.perf_counter() - began
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert all(list(row) == ["epoch", "train_loss", "val_loss", "val_accuracy", "seconds"] for row in history)
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    hits = 40 * history[-1]["val_accuracy"]                      # of the 40 images put aside
    assert hits == pytest.approx(round(hits), abs=1e-4) and hits > 20
    assert evaluate(model, few.test_images, few.test_labels)[1] > 0.6
    assert not model.training


class Witness:
    """A `prepare` that notes which images a model is trained on, and which it is evaluated on.

    The images are numbered: the pixels of image n are n.
    """

    def __init__(self, model):
        self.model, self.trained, self.evaluated = model.eval(), [[]], [[]]

    def __call__(self, images):
        numbers = images[:, 0, 0, 0].tolist()
        (self.trained if self.model.training else self.evaluated)[-1].extend(numbers)
        return images.float() / 255

    def next_epoch(self, row):
        """For `on_epoch`."""
        self.trained.append([])
        self.evaluated.append([])


def numbered_images(count):
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 28, 28)


def test_validation_images_are_put_aside_and_never_trained_on():
    model = tiny_network()
    witness = Witness(model)
    train_model(model, numbered_images(50), torch.arange(50) % 10, epochs=3, batch_size=16, seed=3,
                validation=0.25, prepare=witness, on_epoch=witness.next_epoch)
    trained, evaluated = witness.trained[:3], witness.evaluated[:3]
    held_out = set(evaluated[1])
    assert len(held_out) == len(evaluated[1]) == 12              # round(0.25 · 50)
    assert set(evaluated[2]) == held_out, "the same images in each epoch"
    for order in trained:
        assert sorted(order) == sorted(set(range(50)) - held_out), "each other image once in an epoch"
    assert trained[0] != trained[1] != trained[2] != trained[0], "another order in each epoch"
    assert trained[0] != sorted(trained[0])


def test_without_validation_all_images_are_trained_on():
    model = tiny_network()
    witness = Witness(model)
    history = train_model(model, numbered_images(50), torch.arange(50) % 10, epochs=2, batch_size=16,
                          validation=0, prepare=witness, on_epoch=witness.next_epoch)
    assert [sorted(order) for order in witness.trained[:2]] == [list(range(50))] * 2
    assert all(math.isnan(row["val_loss"]) and math.isnan(row["val_accuracy"]) for row in history)
    assert all(row["train_loss"] > 0 for row in history)


def test_validation_is_measured_after_the_epoch_and_without_augmentation():
    """All images are the same but for their label, so the loss can be computed beside it."""
    model, augmented = tiny_network(), []
    images, labels = torch.full((40, 1, 28, 28), 100, dtype=torch.uint8), torch.full((40,), 3)

    def augment(batch):
        augmented.append(len(batch))
        return batch

    history = train_model(model, images, labels, epochs=1, batch_size=9, validation=0.5,
                          augment=augment, label_smoothing=0.3, **QUIET)
    expected = F.cross_entropy(model(standardize(images)), labels).item()  # without smoothing
    assert history[0]["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert augmented[-3:] == [9, 9, 2]                           # before: a sample for the recipe


@pytest.mark.parametrize(("count", "batch_size", "trained"), [
    (33, 32, 32),                                                # 32 and 1: the 1 is left out
    (34, 32, 34), (32, 32, 32), (3, 1, 3), (1, 32, 1)])
def test_a_last_batch_of_a_single_image_is_left_out(count, batch_size, trained):
    model = tiny_network()
    witness = Witness(model)
    train_model(model, numbered_images(count), torch.arange(count) % 10, epochs=2, validation=0,
                batch_size=batch_size, prepare=witness, on_epoch=witness.next_epoch)
    for order in witness.trained[:2]:
        assert len(order) == len(set(order)) == trained


def test_batch_normalisation_of_single_pixels_survives_a_last_batch_of_a_single_image(few):
    """With maps of 1×1, batch normalisation has nothing to compute from one image."""
    model = nn.Sequential(nn.Conv2d(1, 8, 28), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
    history = train_model(model, few.train_images[:65], few.train_labels[:65], epochs=2,
                          batch_size=32, validation=0, **QUIET)
    assert len(history) == 2 and model[1].num_batches_tracked == 2 * 2  # 32 and 32, in two epochs


def train_briefly(few, seed=1, model=None, **settings):
    """Train a fresh network with dropout and augmentation; return its weights."""
    if model is None:
        torch.manual_seed(11)
        model = tiny_network(dropout=0.3)
    settings = {"epochs": 2, "augment": random_affine, "on_epoch": None} | settings
    train_model(model, few.train_images[:100], few.train_labels[:100], seed=seed, **settings)
    return weights_of(model)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(few):
    first = train_briefly(few, seed=1)
    assert torch.equal(train_briefly(few, seed=1), first)
    other = train_briefly(few, seed=2)
    assert (other - first).abs().mean() > 1e-3


def test_what_happens_between_epochs_does_not_change_a_training(few):
    """Randomness follows from seed and epoch, not from the generator's past."""
    assert torch.equal(train_briefly(few, on_epoch=lambda row: torch.manual_seed(row["epoch"]) and None),
                       train_briefly(few))


def test_the_global_generator_goes_on_as_if_nothing_had_happened(few):
    model = tiny_network(dropout=0.3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_briefly(few, model=model)
    assert torch.equal(torch.rand(3), expected)


def test_order_and_augmentation_do_not_draw_the_same_numbers(few, monkeypatch):
    """With the same seed, the first images of an epoch would be changed by what chose them."""
    seeds = []

    @contextmanager
    def watched_seeded(*numbers):
        with seeded(*numbers):
            seeds.append(torch.initial_seed())
            yield

    monkeypatch.setattr(tutorial, "seeded", watched_seeded)
    train_briefly(few, epochs=3)
    in_epochs = seeds[-6:]                                       # order and augmentation, three times
    assert len(set(in_epochs)) == 6


def test_four_networks_trained_in_a_row_are_four_different_ones(few):
    trained = []
    for _ in range(4):
        model = tiny_network()
        trained.append(train_briefly(few, model=model))
    for first, second in itertools.combinations(trained, 2):
        assert (first - second).abs().mean() > 1e-2


def test_a_training_of_a_single_step_takes_the_whole_rate(few):
    """The first step of Adam changes each weight by the learning rate, whatever its gradient."""
    torch.manual_seed(3)
    untrained = weights_of(tiny_network())

    def change(**settings):
        torch.manual_seed(3)
        return train_briefly(few, model=tiny_network(), epochs=1, batch_size=128, learning_rate=0.01,
                             augment=None, **settings) - untrained

    step = change(weight_decay=0.0)
    assert step.abs().max() == pytest.approx(0.01, rel=1e-2)
    assert step.abs().median() == pytest.approx(0.01, rel=1e-2)
    decayed = change(weight_decay=0.5) - step                    # AdamW: by rate · decay · weight
    assert torch.allclose(decayed, -0.01 * 0.5 * untrained, atol=1e-6)


def rates_of_a_training(monkeypatch, count, **settings):
    """Return the learning rate of each step, and train on so many images."""
    optimizers, rates = [], []

    class WatchedAdamW(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            optimizers.append(self)

    def note_the_rate(batch):
        if optimizers:                                           # not at the sample for the recipe
            rates.append(optimizers[0].param_groups[0]["lr"])
        return batch

    monkeypatch.setattr(tutorial, "AdamW", WatchedAdamW)
    train_model(tiny_network(), numbered_images(count), torch.arange(count) % 10, learning_rate=0.02,
                validation=0, augment=note_the_rate, on_epoch=None, **settings)
    return rates


@pytest.mark.parametrize(("count", "steps_per_epoch"), [
    (64, 2), (70, 3), (32, 1),
    (33, 1), (65, 2)])                                           # the last image is left out
def test_one_cycle_rises_to_the_rate_and_falls_to_nearly_nothing(monkeypatch, count, steps_per_epoch):
    rates = rates_of_a_training(monkeypatch, count, epochs=10, batch_size=32)
    assert len(rates) == 10 * steps_per_epoch
    assert rates[0] == pytest.approx(0.02 / 25)
    assert max(rates) == pytest.approx(0.02, rel=0.05)
    assert rates.index(max(rates)) / len(rates) == pytest.approx(0.3, abs=0.12)
    assert rates[-1] == pytest.approx(0.02 / 25 / 1e4), "the cycle is not at its end"


def test_a_cycle_of_two_steps_ends_with_nearly_nothing(monkeypatch):
    assert rates_of_a_training(monkeypatch, 64, epochs=1, batch_size=32)[1] == pytest.approx(0.02 / 25 / 1e4)


def test_the_optimiser_is_the_fast_one(monkeypatch):
    made = []

    def make(parameters, rate, **settings):
        made.append((rate, settings))
        return torch.optim.AdamW(parameters, rate, **settings)

    monkeypatch.setattr(tutorial, "AdamW", make)
    train_model(tiny_network(), numbered_images(20), torch.arange(20) % 10, epochs=1, learning_rate=0.02,
                weight_decay=0.3, **QUIET)
    assert made == [(0.02, {"weight_decay": 0.3, "fused": True})]


def test_one_image_is_enough_to_train_on():
    model = tiny_network()
    witness = Witness(model)
    train_model(model, numbered_images(10), torch.arange(10), epochs=1, validation=0.9, prepare=witness,
                on_epoch=witness.next_epoch)
    assert len(witness.trained[0]) == 1
    assert sorted(witness.trained[0] + witness.evaluated[0][-9:]) == list(range(10))


def test_without_one_cycle_the_rate_stays(monkeypatch):
    assert rates_of_a_training(monkeypatch, 64, epochs=3, batch_size=32, one_cycle=False) == [0.02] * 6


@pytest.mark.parametrize(("channels_last", "expected"), [
    (True, torch.channels_last), (1, torch.channels_last), (False, torch.contiguous_format),
    (0, torch.contiguous_format)])
def test_the_memory_format_is_what_was_asked_for(few, channels_last, expected):
    model = SimpleCNN().to(memory_format=torch.channels_last)
    train_model(model, few.train_images[:40], few.train_labels[:40], epochs=1,
                channels_last=channels_last, **QUIET)
    weight = model.conv_block2[0].weight                         # [32, 16, 5, 5]
    assert weight.is_contiguous(memory_format=expected)
    other = torch.contiguous_format if expected is torch.channels_last else torch.channels_last
    assert not weight.is_contiguous(memory_format=other)


def test_the_memory_format_does_not_change_what_is_learnt(few):
    weights = []
    for channels_last in (True, False):
        torch.manual_seed(2)
        model = SimpleCNN()
        train_model(model, few.train_images[:40], few.train_labels[:40], epochs=1,
                    learning_rate=1e-4, channels_last=channels_last, **QUIET)
        weights.append(model.conv_block2[0].weight.detach().clone())
    assert torch.allclose(*weights, atol=1e-5)


def test_an_empty_name_is_no_checkpoint_file(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_network()
    before = weights_of(model)
    with pytest.raises(OSError, match="checkpoint: expected a file in a folder that exists, got"):
        train_model(model, few.train_images, few.train_labels, epochs=1, checkpoint="", **QUIET)
    assert torch.equal(weights_of(model), before) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [32, 64])
def test_four_channels_and_other_sizes_work_with_a_prepare_of_ones_own(size):
    """Bright squares at the left or at the right, in the fourth channel only."""
    images = torch.randint(0, 50, (120, 4, size, size), dtype=torch.uint8)
    labels = torch.arange(120) % 2
    images[labels == 0, 3, :, :size // 2] += 150
    images[labels == 1, 3, :, size // 2:] += 150
    model = SmallVGG(num_classes=2, in_channels=4, channels=(8, 16))
    model.pool, model.classifier = nn.AdaptiveAvgPool2d((1, 2)), nn.Sequential(nn.Flatten(), nn.Linear(32, 2))

    def prepare(batch):
        return batch.float() / 64 - 1

    history = train_model(model, images[:100], labels[:100], epochs=4, prepare=prepare, batch_size=20,
                          learning_rate=1e-2, augment=random_shift, **QUIET)
    assert history[-1]["val_accuracy"] == 1.0
    assert evaluate(model, images[100:], labels[100:], prepare)[1] == 1.0


def test_four_channels_go_through_small_vgg_as_it_is():
    images = torch.randint(0, 256, (12, 4, 64, 64), dtype=torch.uint8)
    model = SmallVGG(in_channels=4)
    untrained = copy.deepcopy(model)
    history = train_model(model, images, torch.arange(12) % 10, epochs=1, batch_size=12, validation=0,
                          prepare=lambda batch: batch / 128 - 1, **QUIET)
    expected = F.cross_entropy(untrained(images / 128 - 1), torch.arange(12) % 10).item()
    assert history[0]["train_loss"] == pytest.approx(expected, abs=1e-3)


def test_data_that_do_not_fit_are_refused_before_training(few):
    model = SimpleCNN(num_classes=5)
    before = weights_of(model)
    labels = few.train_labels % 5
    labels[200] = 7                                              # the only one, in some later batch
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        train_model(model, few.train_images, labels, epochs=1)
    with pytest.raises(ValueError, match=r"expected \[N, 1, 28, 28\], got \[1, 1, 32, 32\]"):
        train_model(model, F.pad(few.train_images, (2, 2, 2, 2)), few.train_labels, epochs=1)
    assert torch.equal(weights_of(model), before)


# ------------------------------------------------------------------------------------- on_epoch


def test_on_epoch_gets_each_row_and_stops_when_it_returns_true(few):
    rows = []

    def on_epoch(row):
        rows.append(dict(row))
        return row["epoch"] == 2

    history = train_model(tiny_network(), few.train_images, few.train_labels, epochs=5, on_epoch=on_epoch)
    assert [row["epoch"] for row in history] == [1, 2]
    assert rows == history


def test_on_epoch_sees_the_network_as_it_is_after_that_epoch(few):
    model, losses = tiny_network(), []

    def on_epoch(row):
        assert not model.training
        losses.append(evaluate(model, few.train_images, few.train_labels)[0])

    train_model(model, few.train_images, few.train_labels, epochs=2, on_epoch=on_epoch)
    assert losses[-1] == pytest.approx(evaluate(model, few.train_images, few.train_labels)[0])
    assert losses[1] < losses[0]


def test_by_default_each_row_is_printed_on_a_line(few, capsys):
    history = train_model(tiny_network(), few.train_images, few.train_labels, epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1"], ["epoch", "2"]]
    assert f"{history[1]['val_accuracy']:.4g}" in lines[1].split()
    print_epoch({"epoch": 12, "val_loss": 0.123456})
    assert capsys.readouterr().out.split() == ["epoch", "12", "val_loss", "0.1235"]


# --------------------------------------------------------------------------------- RECIPES, run


BY_ONE = (random_shift, {"pixels": 1})
MEASURED = {  # epochs, learning rate, and what differs from the defaults
    "SimpleCNN on MNIST": (4, 6e-3, BY_ONE, {
        "batch_size": 128, "weight_decay": 0.05, "label_smoothing": 0.05, "validation": 0.02}),
    "SimpleCNN on 5,000 digits": (10, 5e-3, random_affine, {}),
    "LeNet-5 on MNIST": (4, 5e-3, BY_ONE, {"batch_size": 128}),
    "LeNet-5 on 5,000 digits": (14, 6e-3, random_affine, {}),
    "SimpleCNN on CIFAR-10": (3, 6e-3, shift_and_flip, {"batch_size": 128}),
    "SimpleCNN on colour digits": (6, 4e-3, random_shift, {}),
    "SmallVGG on CIFAR-10": (12, 6e-3, shift_and_flip, {
        "batch_size": 128, "weight_decay": 0.05, "label_smoothing": 0.1, "validation": 0.02}),
    "SmallVGG on colour digits": (4, 8e-3, random_shift, {})}


def test_recipes_are_those_with_which_the_readme_was_measured():
    """A changed recipe means: measure again (tests/benchmark.py), then change here and in the README."""
    recipes = {}
    for name, settings in RECIPES.items():
        others = dict(settings)
        epochs, rate, augment = (others.pop(key) for key in ("epochs", "learning_rate", "augment"))
        if isinstance(augment, partial):
            augment = augment.func, augment.keywords
        recipes[name] = epochs, rate, augment, others
    assert recipes == MEASURED


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_be_followed(name, digits):
    data = digits.first(140, 10)
    if "CIFAR" in name or "colour" in name:
        data = colour_digits(data)
    make = {"SimpleCNN": partial(SimpleCNN, in_channels=data.train_images.shape[1],
                                 image_size=data.train_images.shape[2]),
            "LeNet-5": LeNet5, "SmallVGG": SmallVGG}[name.partition(" on ")[0]]
    _, history, accuracy = run(make, data, **(RECIPES[name] | {"epochs": 1, "on_epoch": None}))
    assert len(history) == 1 and history[0]["train_loss"] < 5
    assert round(10 * accuracy) == pytest.approx(10 * accuracy), "not a share of ten images"


def test_run_trains_a_fresh_network_that_follows_from_the_seed(few):
    data = few.first(100)
    model, history, accuracy = run(tiny_network, data, seed=4, epochs=1, on_epoch=None)
    torch.manual_seed(99)
    again, _, _ = run(tiny_network, data, seed=4, epochs=1, on_epoch=None)
    other, _, _ = run(tiny_network, data, seed=5, epochs=1, on_epoch=None)
    assert torch.equal(weights_of(model), weights_of(again))
    assert (weights_of(model) - weights_of(other)).abs().mean() > 1e-2, "its weights and its order"
    assert accuracy == evaluate(model, few.test_images, few.test_labels)[1]
    assert len(history) == 1


def test_run_prepares_the_test_images_as_it_prepared_those_for_training(few):
    """Four channels: the default, `standardize`, would refuse them."""
    data = replace(few.first(40, 20), train_images=few.train_images[:40].repeat(1, 4, 1, 1),
                   test_images=few.test_images[:20].repeat(1, 4, 1, 1))

    def prepare(images):
        return images.float() / 128 - 1

    model, _, accuracy = run(partial(SmallVGG, in_channels=4), data, epochs=1, prepare=prepare,
                             on_epoch=None)
    assert accuracy == evaluate(model, data.test_images, data.test_labels, prepare)[1]


# -------------------------------------------------------------------------------- slide, pictures


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_slide_reads_at_each_place_what_the_network_reads_there_alone(channels, size):
    """Without biases what is black stays black, so images with black borders do not mix."""
    model = SimpleCNN(7, channels, size)
    for block in (model.conv_block1, model.conv_block2):
        nn.init.zeros_(block[0].bias)
    images = F.pad(torch.randn(3, channels, size - 16, size - 16), (8, 8, 8, 8))
    first, second, third = images[:, None].unbind()
    black = torch.zeros_like(first)
    upper, lower = torch.cat([first, second, black], dim=3), torch.cat([black, black, third], dim=3)
    page = torch.cat([upper, lower], dim=2)
    with torch.no_grad():
        logits = slide(model, page)
        step = size // 4                                         # places from one image to the next
        assert logits.shape == (1, 7, step + 1, 2 * step + 1)
        for image, row, column in ((first, 0, 0), (second, 0, step), (third, step, 2 * step)):
            assert torch.allclose(logits[:, :, row, column], model(image), atol=1e-5)
        shifted = slide(model, page.roll(8, dims=3))             # by 8 pixels: two places
        assert torch.allclose(shifted[:, :, 0, step + 2], model(second), atol=1e-5)


def test_smooth_is_a_moving_mean():
    values = torch.arange(12.0) ** 2
    expected = [sum(x ** 2 for x in range(i, i + 3)) / 3 for i in range(10)]
    assert np.allclose(smooth(values, 3), expected)
    assert np.allclose(smooth(values[:6], 3), values[:6]), "few values are left as they are"
    assert np.allclose(smooth(values, 1), values)


@pytest.fixture
def no_windows(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("a figure was shown"))
    yield
    plt.close("all")


def test_plot_history_draws_each_column(no_windows):
    history = [{"epoch": e, "train_loss": 3 / e, "val_loss": 2 / e, "val_accuracy": e / 10, "seconds": 1.0}
               for e in (1, 2, 3)]
    figure = plot_history(history)
    assert isinstance(figure, Figure)
    left, right = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines == {"training": [[1, 3], [2, 1.5], [3, 1]],
                     "validation": [[1, 2], [2, 1], [3, pytest.approx(2 / 3)]]}
    assert right.lines[0].get_xydata().tolist() == [[1, 0.1], [2, 0.2], [3, 0.3]]
    for ax, name in ((left, "loss"), (right, "validation accuracy")):
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", name) and ax.get_title().endswith("?")
        assert all(tick == round(tick) for tick in ax.get_xticks()), "an epoch and a half"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["training", "validation"]


def test_plot_confusion_counts_true_classes_in_rows(no_windows):
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    logits = F.one_hot(torch.tensor([0, 1, 1, 1, 0, 2]), 3).float()
    figure = plot_confusion(logits, labels, ("a", "b", "c"))
    ax = figure.axes[0]
    found = {text.get_position(): text.get_text() for text in ax.texts}  # (column, row)
    assert found == {(0, 0): "1", (1, 0): "2", (1, 1): "1", (0, 2): "1", (2, 2): "1"}
    assert ax.images[0].get_array().tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]
    assert isinstance(figure, Figure) and ax.get_ylabel() == "true class" and ax.get_xlabel() == "predicted"
    colours = {text.get_position(): text.get_color() for text in ax.texts}
    assert colours == {place: "grey" if place[0] == place[1] else "black" for place in found}
    assert ax.images[0].get_clim() == (0, 1.5 * 2 + 1), "the darkest colour would hide the number"
    for axis in (ax.xaxis, ax.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["a", "b", "c"]
        assert axis.get_ticklocs().tolist() == [0, 1, 2]


def test_plot_mistakes_begins_with_the_answer_that_was_surest_and_wrong(no_windows):
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 4, 4)
    labels = torch.zeros(12, dtype=torch.int64)
    logits = torch.stack([torch.arange(12.0), torch.full((12,), 5.0)], dim=1)  # 0 is least like a 0
    figure = plot_mistakes(images, logits, labels, ("no", "yes"))
    axes = [ax for ax in figure.axes if ax.images]
    assert [ax.images[0].get_array()[0, 0] for ax in axes] == list(range(10))
    assert axes[0].get_gridspec().get_geometry() == (2, 5) and figure.get_suptitle().startswith("True class least")
    assert axes[0].get_title() == f"no → yes ({1 / (1 + math.exp(-5)):.0%})"
    assert axes[9].get_title() == f"no → no ({1 / (1 + math.exp(-4)):.0%})"
    assert isinstance(figure, Figure)


# ---------------------------------------------------------------------------- counts and results


def test_count_parameters_counts_frozen_ones_too():
    model = SimpleCNN()
    model.conv_block1.requires_grad_(False)
    assert count_parameters(model) == 28_938
    assert count_parameters(nn.BatchNorm2d(7)) == 14, "running statistics are no parameters"


@pytest.mark.parametrize(("accuracy", "n", "expected"), [
    (0.975, 1000, "97.50% ± 0.49%"), (0.9, 400, "90.00% ± 1.50%"), (1.0, 10, "100.00% ± 0.00%")])
def test_standard_error_of_an_accuracy(accuracy, n, expected):
    assert with_error(accuracy, n) == expected


def test_results_keep_rows_and_print_them_with_their_error(few, capsys):
    results = Results()
    results.add("4.5", "a network", few, "test accuracy", torch.tensor(0.9), seconds=2.04)
    results.add("4.8", "photos", "60 photos", "accuracy", 0.5, n=25)
    results.add("4.3", "speed", few, "images per second", 12345.6)
    results.add("7.4", "not shown", few, "share of peaks on ink", 0.25, quiet=True)
    assert list(results) == [
        {"section": "4.5", "name": "a network", "data": few.name, "metric": "test accuracy",
         "value": pytest.approx(0.9), "seconds": 2.04},
        {"section": "4.8", "name": "photos", "data": "60 photos", "metric": "accuracy", "value": 0.5,
         "seconds": 0.0},
        {"section": "4.3", "name": "speed", "data": few.name, "metric": "images per second",
         "value": 12345.6, "seconds": 0.0},
        {"section": "7.4", "name": "not shown", "data": few.name, "metric": "share of peaks on ink",
         "value": 0.25, "seconds": 0.0}]
    assert all(type(row["value"]) is float for row in results)
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "a network test accuracy 90.00% ± 3.00% (2.0 s)",        # √(0.9 · 0.1 / 100)
        "photos accuracy 50.00% ± 10.00%",                       # √(0.5 · 0.5 / 25)
        "speed images per second 12,346"]


@pytest.mark.parametrize(("metric", "values", "told"), [
    ("test accuracy", [0.5, 0.6], "a tip test accuracy 55.0% ± 7.1% over 2 seeds"),
    ("test accuracy", [0.5], "a tip test accuracy 50.0% (one seed: spread unknown)"),
    ("points gained", [1.0, 2.0, 3.0], "a tip points gained 2.00 ± 1.00 over 3 seeds")])
def test_what_seeds_gave_is_kept_as_their_mean_and_told_with_its_spread(metric, values, told, few, capsys):
    results = Results()
    results.add_seeds("8.1", "a tip", few, metric, values, seconds=1.26)
    assert list(results) == [{"section": "8.1", "name": "a tip", "data": few.name, "metric": metric,
                              "value": pytest.approx(sum(values) / len(values)), "seconds": 1.26}]
    assert " ".join(capsys.readouterr().out.split()) == f"{told} (1.3 s each)"
