"""Training that loses nothing: checkpoints, interruptions of all kinds, and stopping early."""

import multiprocessing
import os
import random
import signal
import sys
import time
from functools import partial

import pytest
import torch
from torch import nn

import convolutional_neural_networks as tutorial
from convolutional_neural_networks import (
    EarlyStopping, LeNet5, SimpleCNN, SmallVGG, load_checkpoint, random_shift, save_checkpoint, save_whole,
    shift_and_flip, train_model)
from data import colour_digits, load_bundled_digits

KILLS = int(os.environ.get("KILLS", "3"))  # KILLS=20 python -m pytest tests/test_resume.py -k killed
QUIET = dict(batch_size=50, on_epoch=None)


def few_digits():
    digits = load_bundled_digits().first(300, 50)
    return digits.train_images, digits.train_labels


def few_colour_digits():
    digits = colour_digits(load_bundled_digits().first(300, 50))
    return digits.train_images, digits.train_labels


def fresh(make=LeNet5):
    torch.manual_seed(0)
    return make()


def small_vgg():
    """With BatchNorm, and much dropout."""
    return SmallVGG(channels=(4, 8), dropout=0.3)


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


class Interrupted(Exception):
    """What an augmentation raises in these tests."""


def interrupted_after(steps, augment):
    """`augment`, which raises after so many calls; the first call is train_model's for its recipe."""
    left = iter(range(1 + steps))

    def until_then(images):
        if next(left, None) is None:
            raise Interrupted
        return augment(images)

    return until_then


def stop_after(epoch):
    return lambda row: row["epoch"] == epoch


# ------------------------------------------------------------------------------ stopped and resumed


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("make", "load", "augment"), [
    (LeNet5, few_digits, random_shift), (small_vgg, few_colour_digits, shift_and_flip)])
def test_interrupted_and_resumed_ends_with_the_same_bits(make, load, augment, channels_last, tmp_path):
    """Interrupted in the middle of the second and of the third epoch, stopped after the fourth."""
    settings, (images, labels) = QUIET | dict(epochs=5, channels_last=channels_last), load()
    whole, path = fresh(make), tmp_path / "run.checkpoint"
    history = train_model(whole, images, labels, augment=augment, **settings)
    for steps in (8, 9):                                         # 6 an epoch
        with pytest.raises(Interrupted):
            train_model(fresh(make), images, labels, augment=interrupted_after(steps, augment),
                        checkpoint=path, **settings)
        torch.rand(7)                                            # whatever has been drawn between
    stopped = train_model(fresh(make), images, labels, augment=augment, checkpoint=path,
                          **settings | {"on_epoch": stop_after(4)})
    assert [row["epoch"] for row in stopped] == [1, 2, 3, 4]
    resumed = fresh(make)
    again = train_model(resumed, images, labels, augment=augment, checkpoint=path, **settings)
    assert torch.equal(weights(whole), weights(resumed))
    assert without_seconds(history) == without_seconds(again)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_finished_training_takes_no_step(tmp_path):
    settings = QUIET | dict(epochs=2, checkpoint=tmp_path / "c")
    done, again = fresh(), fresh()
    history = train_model(done, *few_digits(), augment=random_shift, **settings)
    written = (tmp_path / "c").stat().st_mtime_ns
    loaded = train_model(again, *few_digits(), augment=interrupted_after(0, random_shift), **settings)
    assert loaded == history and torch.equal(weights(again), weights(done))
    assert (tmp_path / "c").stat().st_mtime_ns == written


def test_at_a_constant_rate_more_epochs_go_on(tmp_path):
    settings = QUIET | dict(one_cycle=False, augment=random_shift)
    whole, longer = fresh(), fresh()
    train_model(whole, *few_digits(), epochs=4, **settings)
    short = train_model(fresh(), *few_digits(), epochs=2, checkpoint=tmp_path / "c", **settings)
    history = train_model(longer, *few_digits(), epochs=4, checkpoint=tmp_path / "c", **settings)
    assert history[:2] == short and len(history) == 4
    assert torch.equal(weights(whole), weights(longer))


@pytest.mark.parametrize("one_cycle", [True, False])
@pytest.mark.parametrize(("images", "epochs"), [(40, 1), (40, 2), (90, 1), (40, 3), (140, 1), (90, 2)])
def test_trainings_of_one_to_four_steps_are_resumed_too(images, epochs, one_cycle, tmp_path):
    """With batches of 50: so few that a schedule has hardly room to rise and fall."""
    settings = QUIET | dict(epochs=epochs, one_cycle=one_cycle, augment=shift_and_flip)
    images, labels = (part[:images] for part in few_colour_digits())
    whole, resumed = fresh(small_vgg), fresh(small_vgg)
    history = train_model(whole, images, labels, **settings)
    assert len(history) == epochs and not torch.equal(weights(whole), weights(fresh(small_vgg)))
    for last in range(1, epochs + 1):                            # a new start for each epoch
        again = train_model(resumed, images, labels, checkpoint=tmp_path / "c",
                            **settings | {"on_epoch": stop_after(last)})
        resumed = fresh(small_vgg) if last < epochs else resumed
    assert without_seconds(again) == without_seconds(history)
    assert torch.equal(weights(whole), weights(resumed))


# --------------------------------------------------------------------------------------------- killed


def train_in_a_process(path, result, epochs):
    """Train; if nobody kills this process, save the weights. A constant rate, so `epochs` may differ."""
    torch.set_num_threads(1)
    model = fresh(small_vgg)
    train_model(model, *few_colour_digits(), epochs=epochs, batch_size=25, augment=shift_and_flip,
                one_cycle=False, checkpoint=path, on_epoch=None)
    torch.save(model.state_dict(), result)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGKILL nor fork")
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server's, before Python 3.11.9
    server = multiprocessing.get_context("forkserver")  # imports this file once, and forks all processes
    server.set_forkserver_preload([__name__])
    path, results = tmp_path / "killed.checkpoint", [tmp_path / "killed.pt", tmp_path / "whole.pt"]
    draw, written = random.Random(1), None
    for _ in range(KILLS):
        process = server.Process(target=train_in_a_process, args=(path, results[0], 10**6))
        process.start()
        while not path.exists() or path.stat().st_mtime_ns == written:  # until it has come further
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2))                         # some epochs of about 0.04 s
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert {file.name for file in tmp_path.iterdir()} <= {path.name, path.name + ".tmp"}
        written, saved = path.stat().st_mtime_ns, torch.load(path, weights_only=True)
    epochs = len(saved["history"]) + 2
    for checkpoint, result in ((path, results[0]), (None, results[1])):
        process = server.Process(target=train_in_a_process, args=(checkpoint, result, epochs))
        process.start()
        process.join()
        assert process.exitcode == 0
    killed, whole = (torch.load(result, weights_only=True) for result in results)
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, *(file.name for file in results)}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    import resource

    path, limits = tmp_path / "c", resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = QUIET | dict(epochs=3, augment=random_shift, checkpoint=path)
    epoch_1 = []

    def fill_the_disk(row):
        epoch_1.append(path.read_bytes())
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError):
            train_model(fresh(), *few_digits(), **settings | {"on_epoch": fill_the_disk})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(epoch_1[0]) > 100_000 and [path.read_bytes()] == epoch_1
    assert [file.name for file in tmp_path.iterdir()] == ["c"]
    whole, resumed = fresh(), fresh()
    train_model(whole, *few_digits(), **settings | {"checkpoint": None})
    train_model(resumed, *few_digits(), **settings)
    assert torch.equal(weights(whole), weights(resumed))


def test_nothing_appears_under_the_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    path, events, sync, replace = tmp_path / "file", [], os.fsync, os.replace
    save_whole({"old": 1}, path)

    def noted_sync(number):
        events.append(("sync", torch.load(path)))
        sync(number)

    monkeypatch.setattr(os, "fsync", noted_sync)
    save_whole({"new": 2}, path)
    assert events == [("sync", {"old": 1})] and torch.load(path) == {"new": 2}

    def no_rename(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="no"):
        save_whole({"newer": 3}, path)
    monkeypatch.setattr(os, "replace", replace)
    assert torch.load(path) == {"new": 2} and [file.name for file in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------- what is in the file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint of LeNet-5 after the first of two epochs."""
    path = tmp_path_factory.mktemp("checkpoint") / "c"
    train_model(fresh(), *few_digits(), epochs=2, checkpoint=path, **QUIET | {"on_epoch": stop_after(1)})
    return path.read_bytes()


def test_it_holds_tensors_and_plain_values_and_no_generator(checkpoint, tmp_path):
    """So it is safe to load, and what a Mac or a GPU has written can be resumed anywhere."""
    (tmp_path / "c").write_bytes(checkpoint)
    saved = torch.load(tmp_path / "c", weights_only=True)
    assert saved.keys() == {"recipe", "history", "model", "optimizer", "schedule"}
    types, todo = set(), [saved]
    while todo:
        value = todo.pop()
        types.add(type(value).__name__)
        todo += list(value.values()) if isinstance(value, dict) else []
        todo += list(value) if isinstance(value, (list, tuple)) else []
        if isinstance(value, torch.Tensor):
            assert value.dtype != torch.uint8                    # states of generators are bytes
    assert types <= {"dict", "OrderedDict", "list", "tuple", "str", "int", "float", "bool", "NoneType",
                     "Tensor"}
    assert all(isinstance(value, (str, int, float, bool, list, tuple)) for value in saved["recipe"].values())
    assert saved["model"].keys() == LeNet5().state_dict().keys()


def test_save_and_load_restore_all_parts(tmp_path):
    def parts(seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return {"model": model, "optimizer": optimizer,
                "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}

    mine, theirs = parts(0), parts(1)
    mine["model"](torch.ones(1, 3)).sum().backward()
    mine["optimizer"].step()
    mine["schedule"].step()
    history, recipe = [{"epoch": 1, "val_loss": float("nan")}], {"seed": 0, "images": [5, 1, 8, 8]}
    assert load_checkpoint(tmp_path / "c", recipe, **theirs) == []
    save_checkpoint(tmp_path / "c", recipe, history, **mine)
    assert str(load_checkpoint(str(tmp_path / "c"), recipe, **theirs)) == str(history)
    for name in mine:
        assert str(mine[name].state_dict()) == str(theirs[name].state_dict())
    assert theirs["optimizer"].param_groups[0]["lr"] == 0.05


# ------------------------------------------------------------------------- damaged and other checkpoints


def refusal(path, model=None, **settings):
    """Train from this checkpoint; return the ValueError's message, having seen that nothing has changed."""
    model, content = model or fresh(), path.read_bytes()
    before = weights(model)
    with pytest.raises(ValueError) as caught:
        train_model(model, *few_digits(), checkpoint=path, **QUIET | {"epochs": 2} | settings)
    assert path.read_bytes() == content and torch.equal(weights(model), before)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("damage", [
    lambda content: content[:len(content) // 2],
    lambda content: content[:-1],
    lambda content: content[len(content) // 2:],
    lambda content: b"",
    lambda content: b"no checkpoint",
    lambda content: content[:len(content) // 2] + bytes(200) + content[len(content) // 2 + 200:],
], ids=["first half", "last byte", "second half", "empty", "text", "zeros"])
def test_a_damaged_checkpoint_is_refused_and_kept(damage, checkpoint, tmp_path):
    (tmp_path / "c").write_bytes(damage(checkpoint))
    assert "is damaged" in refusal(tmp_path / "c")


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1:]


def test_a_flipped_bit_is_noticed_wherever_it_matters(checkpoint, tmp_path):
    """Zip checks what lies inside; of its own headers some bits mean nothing, such as the time."""
    path, refused = tmp_path / "c", 0
    path.write_bytes(checkpoint)
    recipe = torch.load(path)["recipe"]
    whole = fresh()
    history = load_checkpoint(path, recipe, model=whole)
    for place in range(0, len(checkpoint), len(checkpoint) // 100):
        path.write_bytes(flipped(checkpoint, place))
        model = fresh()
        try:
            assert load_checkpoint(path, recipe, model=model) == history
            assert torch.equal(weights(model), weights(whole))
        except ValueError as error:
            assert "is damaged" in str(error) and torch.equal(weights(model), weights(fresh()))
            refused += 1
    assert refused > 90


@pytest.mark.parametrize("content", [
    {"weights": torch.zeros(3)}, [1, 2], torch.zeros(3), {"recipe": 5}, {"recipe": None},
    {"recipe": [1]}, {"recipe": {"a": 1}}, nn.Linear(1, 1)], ids=lambda content: type(content).__name__)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(content, tmp_path):
    torch.save(content, tmp_path / "c")
    refusal(tmp_path / "c")


@pytest.mark.parametrize(("changes", "key", "theirs"), [
    ({"learning_rate": 0.1}, "learning_rate", "0.003"),
    ({"weight_decay": 0.1}, "weight_decay", "0.01"),
    ({"batch_size": 49}, "batch_size", "50"),
    ({"seed": 1}, "seed", "0"),
    ({"label_smoothing": 0.1}, "label_smoothing", "0.0"),
    ({"validation": 0.2}, "validation", "0.1"),
    ({"precision": "bfloat16"}, "precision", "float32"),
    ({"channels_last": False}, "channels_last", "True"),
    ({"epochs": 3}, "epochs, steps", "(2, 6)"),
    ({"one_cycle": False}, "epochs, steps", "(2, 6)"),
])
def test_another_recipe_is_named(changes, key, theirs, checkpoint, tmp_path):
    (tmp_path / "c").write_bytes(checkpoint)
    message = refusal(tmp_path / "c", **changes)
    assert f"another {key}: '{theirs}'" in message


def test_another_network_and_other_images_are_named(checkpoint, tmp_path):
    (tmp_path / "c").write_bytes(checkpoint)
    assert "another model" in refusal(tmp_path / "c", fresh(SimpleCNN))
    images, labels = few_digits()
    with pytest.raises(ValueError, match=r"another images: '\[300, 1, 28, 28\]'"):
        train_model(fresh(), images[:250], labels[:250], epochs=2, checkpoint=tmp_path / "c", **QUIET)


def unchanged(images):
    return images


def negative(images):
    return 255 - images


def mirrored(images):
    return images.flip(3)


def centred(images):
    return images.float() / 255 - 0.5


def scaled(images):
    return images.float() / 255


@pytest.mark.parametrize(("one", "other"), [
    ({"augment": unchanged}, {"augment": negative}),
    ({"augment": unchanged}, {"augment": random_shift}),
    ({"augment": unchanged}, {"augment": mirrored}),
    ({"augment": random_shift}, {"augment": partial(random_shift, pixels=1)}),
    ({"augment": random_shift}, {"augment": shift_and_flip}),
    ({"augment": random_shift}, {}),
    ({"prepare": scaled}, {"prepare": centred}),
    ({"prepare": scaled}, {}),
], ids=["negative", "random shift", "mirrored", "fewer pixels", "flipped", "none", "centred", "default"])
def test_another_augmentation_or_preparation_is_noticed(one, other, tmp_path):
    """Two lambdas, two partials, an edited function: what counts is what it does to images."""
    path = tmp_path / "c"
    settings = QUIET | dict(epochs=2, checkpoint=path) | one
    train_model(fresh(), *few_digits(), **settings | {"on_epoch": stop_after(1)})
    message = refusal(path, **other)
    assert "augment" in message and "prepare" in message
    train_model(fresh(), *few_digits(), **settings)              # the same one goes on


def test_a_function_that_does_the_same_goes_on(checkpoint, tmp_path):
    """Also if it is another one, as in a file that was moved or a notebook that was restarted."""
    (tmp_path / "c").write_bytes(checkpoint)
    history = train_model(fresh(), *few_digits(), epochs=2, checkpoint=tmp_path / "c", augment=unchanged,
                          prepare=lambda images: tutorial.standardize(images), **QUIET)
    assert [row["epoch"] for row in history] == [1, 2]


def test_a_checkpoint_needs_a_place(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "c"):
        with pytest.raises(OSError, match="checkpoint: expected a file in a folder that exists"):
            train_model(fresh(), *few_digits(), epochs=1, checkpoint=path, **QUIET)


# ------------------------------------------------------------------------------------ stopping early


def test_the_restored_weights_are_those_of_a_shorter_training():
    """At a constant rate, down to the last bit, with BatchNorm's statistics."""
    settings = QUIET | dict(learning_rate=0.02, one_cycle=False, validation=0.3)
    model, shorter = fresh(small_vgg), fresh(small_vgg)
    stopping = EarlyStopping(model, patience=3)
    history = train_model(model, *few_digits_in_colour(), epochs=60, **settings | {"on_epoch": stopping})
    losses = [row["val_loss"] for row in history]
    best = losses.index(min(losses)) + 1
    assert best == stopping.best_epoch and len(history) == best + 3 < 60
    at_the_end = weights(model)
    stopping.restore()
    train_model(shorter, *few_digits_in_colour(), epochs=best, **settings)
    assert torch.equal(weights(model), weights(shorter)) and not torch.equal(weights(model), at_the_end)


def few_digits_in_colour():
    images, labels = few_digits()
    return images.expand(-1, 3, -1, -1), labels
