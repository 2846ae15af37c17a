"""Training in several processes. `torchrun` starts the README's file once, and with it `work` below."""

import itertools
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn

from convolutional_neural_networks import (SimpleCNN, SmallVGG, load_checkpoint, train_distributed,
                                           train_model)
from data import load_bundled_digits
from processes import run_torchrun

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
PLAIN = dict(epochs=4, batch_size=20)
NOISY = dict(epochs=3, batch_size=12, on_epoch=None)             # with dropout; 91 of 101 images to train on

UNEVEN = dict(epochs=3, batch_size=12, validation=0, on_epoch=lambda row: row["epoch"] == 1)


def some_digits():
    """200 digits, without randomness in their training."""
    digits = load_bundled_digits()
    return digits.train_images[:200], digits.train_labels[:200]


def numbered_digits():
    """101 digits, an odd number. The first pixel of each is its number."""
    images, labels = (part[:101].clone() for part in some_digits())
    images[:, 0, 0, 0] = torch.arange(101)
    return images, labels


def fresh(make=SimpleCNN):
    torch.manual_seed(0)
    return make()


def dropout_first():
    """A network that drops pixels; `brightened` leaves no pixel 0, so the zeros show what was dropped."""
    return nn.Sequential(nn.Dropout(0.5), SimpleCNN())


def dropout_and_batch_norm():
    return SmallVGG(in_channels=1, channels=(4, 8), dropout=0.5)


def single_pixels():
    """Batch normalisation over maps of 1×1: it has nothing to compute from a single image."""
    return nn.Sequential(nn.Conv2d(1, 8, 28), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))


def brightened(images):
    return images.float() / 255 + 1


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def stop_after_two(row):
    return row["epoch"] == 2


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def shifted(images):
    return images.roll(torch.randint(3, ()).item(), dims=3)


def watched_training(train):
    """Train with dropout; return for each epoch the numbers of the images, and what dropout dropped."""
    model, epochs = fresh(dropout_first), []

    def note_numbers(module, inputs):
        if module.training:
            numbers.extend(((inputs[0][:, 0, 0, 0] - 1) * 255).round().int().tolist())

    def note_zeros(module, inputs, output):
        if module.training:
            zeros.append(output == 0)

    def next_epoch(row):
        epochs.append({"numbers": [*numbers], "zeros": torch.cat(zeros)})
        numbers.clear()
        zeros.clear()

    numbers, zeros = [], []
    model.register_forward_pre_hook(note_numbers)
    model[0].register_forward_hook(note_zeros)
    train(model, *numbered_digits(), prepare=brightened, **NOISY | {"on_epoch": next_epoch})
    return epochs


def refusal(**settings):
    """What train_distributed says to these settings."""
    try:
        train_distributed(fresh(), *some_digits(), **PLAIN | {"on_epoch": None} | settings)
    except ValueError as error:
        return str(error)


def work(folder):
    """In each of two processes: train in all ways that the tests ask about, and save what came out."""
    join = dist.init_process_group
    meeting_points = (folder / f"meeting-{number}" for number in itertools.count())

    def join_anew(backend, **settings):
        """Make a new group: torchrun's own meeting point serves reliably only once."""
        join(backend, init_method=next(meeting_points).as_uri(), rank=rank, world_size=2, **settings)

    rank, results = int(os.environ["RANK"]), {}
    dist.init_process_group = join_anew
    results["watched"] = watched_training(train_distributed)
    results["still joined"] = dist.is_initialized()

    whole = fresh()
    results["history"] = train_distributed(whole, *some_digits(), **PLAIN)  # the one that prints
    results["whole"] = weights(whole)
    train_distributed(fresh(), *some_digits(), **PLAIN | {"on_epoch": stop_after_two},
                      checkpoint=folder / "two.checkpoint")
    resumed = fresh()
    train_distributed(resumed, *some_digits(), **PLAIN | {"on_epoch": None},
                      checkpoint=folder / "one.checkpoint")
    results["resumed"] = weights(resumed)

    draws = []

    def augment(images):
        draws.append(torch.rand(()).item())
        return images

    whole, resumed = fresh(dropout_and_batch_norm), fresh(dropout_and_batch_norm)
    results["noisy history"] = train_distributed(whole, *numbered_digits(), augment=augment, **NOISY)
    results["draws"] = [*draws]
    results["noisy whole"] = weights(whole)
    path = folder / "noisy of two.checkpoint"
    train_distributed(resumed, *numbered_digits(), **NOISY | {"on_epoch": stop_after_two}, augment=augment,
                      checkpoint=path)
    results["noisy stopped"] = weights(resumed)
    if rank == 0:
        shutil.copy(path, folder / "noisy of two, stopped.checkpoint")
    train_distributed(resumed, *numbered_digits(), **NOISY, augment=augment, checkpoint=path)
    results["noisy resumed"] = weights(resumed)

    resumed = fresh(dropout_and_batch_norm)
    results["noisy history from one"] = train_distributed(
        resumed, *numbered_digits(), **NOISY, augment=shifted, checkpoint=folder / "noisy of one.checkpoint")
    results["noisy from one"] = weights(resumed)

    images, labels = some_digits()
    model = fresh(single_pixels)                                 # 13 for each, in batches of 6, 6 and 1
    history = train_distributed(model, images[:26], labels[:26], epochs=3, batch_size=12, validation=0,
                                on_epoch=None)
    results["last batch of one"] = history, weights(model)
    train_distributed(fresh(single_pixels), images[:27], labels[:27], **UNEVEN,
                      checkpoint=folder / "uneven.checkpoint")
    model = fresh(single_pixels)
    train_distributed(model, images[:8], labels[:8], epochs=1, batch_size=8, validation=0, on_epoch=None)
    results["one step"] = weights(model)

    results["odd batch_size"] = refusal(batch_size=21)
    results["precision auto"] = refusal(precision="auto")

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        for _ in range(2):
            train_distributed(fresh(), *some_digits(), epochs=1, on_epoch=None)
        results["own group"] = dist.is_initialized()
    except ValueError as error:
        results["own group"] = str(error)
    dist.destroy_process_group()
    torch.save(results, folder / f"rank{rank}.pt")

    def fail_in_process_1(images):
        if rank == 1 and len(images) == 10:
            raise OSError("this process fails, and the other one waits for it")
        return images

    train_distributed(fresh(), *some_digits(), **PLAIN | {"on_epoch": None}, augment=fail_in_process_1)
    torch.save({}, folder / f"rank{rank}-never.pt")


def run_two(folder):
    """Start the README's file, which trains, and then `work`, in two processes."""
    from test_readme import FOR_TORCHRUN

    train_model(fresh(), *some_digits(), **PLAIN | {"on_epoch": stop_after_two},
                checkpoint=folder / "one.checkpoint")
    train_model(fresh(dropout_and_batch_norm), *numbered_digits(), **NOISY | {"on_epoch": stop_after_two},
                augment=shifted, checkpoint=folder / "noisy of one.checkpoint")
    shutil.copy(folder / "noisy of one.checkpoint", folder / "noisy of one, stopped.checkpoint")
    (folder / "own file, naïve.py").write_text(FOR_TORCHRUN + STARTING_WORK, encoding="utf-8")
    done = run_torchrun("own file, naïve.py", folder=folder)
    files = [folder / f"rank{rank}.pt" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stderr
    return SimpleNamespace(done=done, folder=folder, ranks=[torch.load(file) for file in files])


STARTING_WORK = """
    import test_distributed
    from pathlib import Path
    if test_distributed.os.environ["RANK"] == "0":
        print("the README's file is through", flush=True)
    test_distributed.work(Path.cwd())
"""


@pytest.fixture(scope="module")
def two(made_once):
    """One run in two processes: what each saved, what they printed, and their folder."""
    return made_once("two", run_two)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a if a[name].is_floating_point())


def test_in_every_epoch_the_processes_share_the_order_of_one(two):
    """Also after dropout has drawn in both, with a number of images that is odd."""
    one = watched_training(train_model)
    parts = [rank["watched"] for rank in two.ranks]
    assert len(one) == len(parts[0]) == len(parts[1]) == 3
    for alone, first, second in zip(one, *parts):
        assert len(set(alone["numbers"])) == 91                  # the remainder is one image
        assert [*itertools.chain(*zip(first["numbers"], second["numbers"]))] == alone["numbers"][:90]
    assert len({tuple(epoch["numbers"]) for epoch in parts[0]}) == 3  # each epoch has its own order
    assert len({number for part in parts for epoch in part for number in epoch["numbers"]}) <= 91


def test_each_process_draws_its_own_dropout_and_augmentation(two):
    zeros = [[epoch["zeros"] for epoch in rank["watched"]] for rank in two.ranks]
    for first, second in zip(*zeros):
        assert 0.45 < first.float().mean() < 0.55 and 0.45 < second.float().mean() < 0.55
        assert 0.45 < (first == second).float().mean() < 0.55    # as two coins agree
    assert not torch.equal(zeros[0][0], zeros[0][1])             # and each epoch its own
    first, second = (set(rank["draws"]) for rank in two.ranks)
    assert len(first) > 20 and len(first & second) <= 1          # 1: on a sample before the training


def test_two_processes_end_with_equal_weights_nearly_those_of_one(two):
    one = fresh()
    before = weights(one)
    history = train_model(one, *some_digits(), **PLAIN | {"on_epoch": None})
    assert equal(two.ranks[0]["whole"], two.ranks[1]["whole"])
    assert difference(weights(one), two.ranks[0]["whole"]) < 1e-3
    assert difference(weights(one), before) > 0.02               # so 0.001 is little
    for mine, theirs in zip(history, two.ranks[0]["history"], strict=True):
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-3)


def test_with_batch_norm_the_processes_agree_on_all_that_counts(two):
    """If they saw different validation losses, one might stop early while the other waited for it."""
    losses = [[row["val_loss"] for row in rank["noisy history"]] for rank in two.ranks]
    assert losses[0] == losses[1]
    assert equal(two.ranks[0]["noisy whole"], two.ranks[1]["noisy whole"])


def test_one_process_goes_on_from_two_and_two_from_one(two, tmp_path):
    path, one = two.folder / "two.checkpoint", fresh()
    stopped = torch.load(path, weights_only=True)["history"]
    history = train_model(one, *some_digits(), **PLAIN | {"on_epoch": None},
                          checkpoint=shutil.copy(path, tmp_path))
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert len(stopped) == 2 and history[:2] == stopped          # it went on, and did not begin anew
    for resumed in (weights(one), *(rank["resumed"] for rank in two.ranks)):
        assert difference(resumed, two.ranks[0]["whole"]) < 1e-3


def test_two_processes_stopped_and_resumed_end_with_the_same_bits(two):
    assert equal(two.ranks[0]["noisy whole"], two.ranks[0]["noisy resumed"])


def resumed_by_one(path, folder, augment):
    """Train in this process, with dropout and batch normalisation, from a copy of this checkpoint."""
    model = fresh(dropout_and_batch_norm)
    history = train_model(model, *numbered_digits(), **NOISY, augment=augment,
                          checkpoint=shutil.copy(path, folder))
    return history, weights(model)


def seen_batches(state):
    """How many batches each layer of batch normalisation has seen."""
    return [int(value) for name, value in state.items() if name.endswith("num_batches_tracked")]


def test_with_dropout_and_batch_norm_one_goes_on_from_two(two, tmp_path):
    """With the weights and statistics of the two; what it draws follows from the seed and the epoch."""
    path, model = two.folder / "noisy of two, stopped.checkpoint", fresh(dropout_and_batch_norm)
    stopped = load_checkpoint(path, torch.load(path, weights_only=True)["recipe"], model=model)
    assert equal(weights(model), two.ranks[0]["noisy stopped"])
    history, ended = resumed_by_one(path, tmp_path, augment=None)
    assert history[:2] == stopped and [row["epoch"] for row in history] == [1, 2, 3]
    assert seen_batches(ended) == seen_batches(two.ranks[0]["noisy whole"]) == 4 * [3 * 8]
    assert equal(ended, resumed_by_one(path, tmp_path, augment=None)[1])
    assert 0 < difference(ended, two.ranks[0]["noisy whole"]) < difference(ended, weights(model))


def test_with_dropout_and_batch_norm_two_go_on_from_one(two, tmp_path):
    path = two.folder / "noisy of one, stopped.checkpoint"
    stopped = torch.load(path, weights_only=True)
    histories = [rank["noisy history from one"] for rank in two.ranks]
    assert [row["epoch"] for row in histories[0]] == [1, 2, 3]
    assert histories[0][:2] == histories[1][:2] == stopped["history"]
    assert equal(two.ranks[0]["noisy from one"], two.ranks[1]["noisy from one"])
    ended = resumed_by_one(path, tmp_path, augment=shifted)[1]   # nearly the same, as their noise differs
    assert seen_batches(ended) == seen_batches(two.ranks[0]["noisy from one"]) == 4 * [3 * 8]
    assert 0 < difference(ended, two.ranks[0]["noisy from one"]) < difference(ended, stopped["model"])


def test_a_last_batch_of_one_is_left_out_in_each_process(two):
    (history, first), (_, second) = (rank["last batch of one"] for rank in two.ranks)
    assert [row["epoch"] for row in history] == [1, 2, 3] and equal(first, second)
    assert first["1.num_batches_tracked"] == 3 * 2               # 6 and 6, in each of three epochs


def test_one_process_does_not_go_on_from_two_where_it_would_take_more_steps(two, tmp_path):
    """27 images in batches of 12: 3 steps for one process, 2 for each of two, whose last ones are single."""
    images, labels = some_digits()
    with pytest.raises(ValueError, match=r"another epochs, steps: '\(3, 2\)'"):
        train_model(fresh(single_pixels), images[:27], labels[:27], **UNEVEN,
                    checkpoint=shutil.copy(two.folder / "uneven.checkpoint", tmp_path))


def test_a_training_of_a_single_step_is_shared(two):
    first, second = (rank["one step"] for rank in two.ranks)
    assert equal(first, second) and first["1.num_batches_tracked"] == 1
    step = (first["3.weight"] - fresh(single_pixels).state_dict()["3.weight"]).abs()
    assert [step.min().item(), step.max().item()] == pytest.approx([0.003, 0.003], rel=0.02)  # Adam's first


def test_the_readmes_file_trains_in_two_processes_of_which_one_prints(two):
    readmes, rest = two.done.stdout.split("the README's file is through", 1)
    lines = [line.split()[:2] for line in readmes.splitlines() if line.startswith("epoch")]
    assert lines == [["epoch", "1"], ["epoch", "2"]]
    lines = [line.split()[:2] for line in rest.splitlines() if line.startswith("epoch")]
    assert lines == [["epoch", str(epoch)] for epoch in (1, 2, 3, 4)]


def test_what_cannot_be_shared_is_refused_in_all_processes(two):
    for rank in two.ranks:
        assert rank["odd batch_size"] == (
            "train_model: expected epochs >= 1, some images left to train on, and a batch_size that is a "
            "multiple of the number of processes (2)")
        assert rank["precision auto"] == "precision: expected 'float32' or 'bfloat16', got 'auto'"


def test_the_group_that_it_joined_is_left_at_the_end(two):
    assert [rank["still joined"] for rank in two.ranks] == [False, False]


def test_in_a_process_group_of_its_own_a_script_may_train_twice(two):
    """Joining through torchrun a second time may wait for ever, so there must be a way around it."""
    assert [rank["own group"] for rank in two.ranks] == [True, True]


def test_the_failure_of_one_process_ends_all(two):
    assert two.done.returncode != 0 and "this process fails" in two.done.stderr
    assert not [*two.folder.glob("*never*")]


def test_without_torchrun_it_says_how_to_start():
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node=2"):
        train_distributed(SimpleCNN(), *some_digits(), epochs=1)


def test_each_process_needs_a_gpu_of_its_own_where_there_are_any(monkeypatch):
    """Of two processes on a machine with one GPU the first takes it, and the second says what is wrong."""
    taken = []

    def take(device):
        taken.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="more processes than GPUs"):
        train_distributed(SimpleCNN(), *some_digits(), epochs=1)
    assert not taken and not dist.is_initialized()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(KeyboardInterrupt):
        train_distributed(SimpleCNN(), *some_digits(), epochs=1)
    assert taken == [torch.device("cuda", 0)]
