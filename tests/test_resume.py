"""Training that loses nothing: checkpoints, interruption, losses that are not finite, several processes."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from convolutional_neural_networks import LeNet5, SimpleCNN, random_shift, train_distributed, train_model
from make_notebook import ROOT

KILLS = int(os.environ.get("KILLS", "3"))  # KILLS=20 python -m pytest tests/test_resume.py -k killed
FIXED = dict(batch_size=50, precision="float32", channels_last=False, progress=False)
CHILD = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from convolutional_neural_networks import SmallVGG, shift_and_flip, train_model
from data import colour_digits, load_bundled_digits
colour = colour_digits(load_bundled_digits().first(200, 50))
torch.manual_seed(4)
model = SmallVGG(channels=(4, 8))
print("ready", flush=True)
train_model(model, colour, epochs={epochs}, batch_size=20, augment=shift_and_flip, precision="float32",
            channels_last=True, checkpoint={path!r}, progress=False)
torch.save(model.state_dict(), {result!r})
"""


@pytest.fixture
def few(digits):
    """300 digits to train with, 50 to test."""
    return digits.first(300, 50)


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def fresh(make=LeNet5):
    torch.manual_seed(0)
    return make()


class Stop:
    """An augmentation that raises after so many batches."""

    def __init__(self, steps, error=KeyboardInterrupt):
        self.steps, self.error = steps, error

    def __call__(self, images):
        self.steps -= 1
        if self.steps < 0:
            raise self.error
        return random_shift(images)


@pytest.mark.parametrize("channels_last", [False, True])
def test_stopped_and_resumed_ends_with_the_same_bits(few, tmp_path, channels_last):
    settings = FIXED | dict(epochs=4, channels_last=channels_last)
    whole, parts, path = fresh(), fresh(), tmp_path / "run.checkpoint"
    history = train_model(whole, few, augment=Stop(999), **settings)
    for steps in (7, 9):  # stopped in the second and in the third epoch
        with pytest.raises(KeyboardInterrupt, match=r"stopped after \d of 4 epochs; .*run.checkpoint keeps"):
            train_model(fresh(), few, augment=Stop(steps), checkpoint=path, **settings)
    resumed = train_model(parts, few, augment=Stop(999), checkpoint=path, **settings)
    assert torch.equal(weights(whole), weights(parts))
    keys = ("epoch", "train_loss", "val_loss", "val_accuracy")
    assert [[row[k] for k in keys] for row in history] == [[row[k] for k in keys] for row in resumed]
    again = fresh()
    assert train_model(again, few, augment=Stop(0), checkpoint=path, **settings) == resumed  # no step is taken
    assert torch.equal(weights(again), weights(whole)) and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_stopped_before_anything_is_kept(few, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="stopped after 0 of 2 epochs; nothing is kept yet"):
        train_model(fresh(), few, epochs=2, augment=Stop(1), checkpoint=tmp_path / "c", **FIXED)
    with pytest.raises(KeyboardInterrupt, match="with checkpoint=PATH a later call could go on"):
        train_model(fresh(), few, epochs=2, augment=Stop(1), **FIXED)
    assert not list(tmp_path.iterdir())


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    def start(name):
        code = CHILD.format(root=str(ROOT), path=str(tmp_path / f"{name}.checkpoint"),
                            result=str(tmp_path / f"{name}.pt"), epochs=10 * KILLS + 10)
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    assert start("whole").wait() == 0
    draw, path = random.Random(1), tmp_path / "killed.checkpoint"
    for _ in range(KILLS):
        process, before = start("killed"), path.exists() and path.stat().st_mtime_ns
        assert process.stdout.readline() == "ready\n"
        began = time.perf_counter()
        while not path.exists() or path.stat().st_mtime_ns == before:  # until it has come one epoch further
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 3) * (time.perf_counter() - began))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start("killed").wait() == 0
    whole, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert {file.suffix for file in tmp_path.iterdir()} == {".checkpoint", ".pt"}  # nothing half-written


def checkpoint_of(few, path):
    train_model(fresh(), few, epochs=1, checkpoint=path, **FIXED)
    return path.read_bytes()


@pytest.mark.parametrize("damage", [
    lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"no checkpoint",
    lambda b: b[:len(b) // 2] + bytes(x ^ 255 for x in b[len(b) // 2:][:200]) + b[len(b) // 2 + 200:]])
def test_a_damaged_checkpoint_is_refused_and_kept(few, tmp_path, damage):
    path = tmp_path / "c"
    damaged = damage(checkpoint_of(few, path))
    path.write_bytes(damaged)
    model = fresh()
    before = weights(model)
    with pytest.raises(ValueError, match="checkpoint: .* is damaged, or is none of train_model's"):
        train_model(model, few, epochs=1, checkpoint=path, **FIXED)
    assert path.read_bytes() == damaged and torch.equal(weights(model), before)


def test_a_file_of_torch_that_is_no_checkpoint_is_refused(few, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "c")
    with pytest.raises(ValueError, match="none of train_model's"):
        train_model(fresh(), few, epochs=1, checkpoint=tmp_path / "c", **FIXED)


def test_a_checkpoint_of_another_run_is_refused_and_kept(few, tmp_path):
    path = tmp_path / "c"
    whole = checkpoint_of(few, path)
    other = dataclasses.replace(few, train_images=255 - few.train_images)
    for what, model, data, changes in (("model", fresh(SimpleCNN), few, {}), ("data", fresh(), other, {}),
                                       (r"recipe \(learning_rate\): this is 0.1", fresh(), few, {"learning_rate": 0.1}),
                                       (r"recipe \(augment\)", fresh(), few, {"augment": random_shift})):
        with pytest.raises(ValueError, match=f"checkpoint: .* is of another {what}"):
            train_model(model, data, epochs=1, checkpoint=path, **FIXED | changes)
    assert path.read_bytes() == whole


def test_a_checkpoint_needs_a_place(few, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "c"):
        with pytest.raises(OSError, match="checkpoint: expected a file in a folder that exists"):
            train_model(fresh(), few, epochs=1, checkpoint=path, **FIXED)


def test_a_loss_that_is_not_finite_stops_training_with_the_best_weights(few):
    good, model = fresh(), fresh()
    train_model(good, few, epochs=1, learning_rate=1e-3, one_cycle=False, **FIXED | {"batch_size": 20})

    def poison(images):
        nonlocal steps
        steps += 1
        if steps == 20:  # the second epoch; 270 images make 14 steps an epoch
            model.classifier[-1].weight.data[0, 0] = float("nan")
        return images

    steps = 0
    with pytest.raises(FloatingPointError, match=r"loss is nan after 10 steps .*learning rate 0.001: too high"):
        train_model(model, few, epochs=3, learning_rate=1e-3, one_cycle=False, augment=poison,
                    **FIXED | {"batch_size": 20})
    assert torch.equal(weights(model), weights(good)) and steps == 24


def test_the_best_epoch_is_kept_if_asked_for(few):
    settings = FIXED | dict(epochs=8, learning_rate=2e-2, one_cycle=False, validation=0.3)
    best, last = fresh(), fresh()
    history = train_model(best, few, keep_best=True, **settings)
    assert train_model(last, few, **settings)[-1]["val_loss"] == history[-1]["val_loss"]
    scores = [(row["val_accuracy"], -row["val_loss"]) for row in history]
    number = scores.index(max(scores)) + 1
    assert number < 8  # or the test would show nothing
    assert not torch.equal(weights(best), weights(last))


DISTRIBUTED = """
import sys, torch
sys.path.insert(0, {root!r})
from convolutional_neural_networks import SimpleCNN, random_shift, train_distributed
from data import load_bundled_digits
torch.manual_seed(0)
model = SimpleCNN()
digits = load_bundled_digits().first({images}, 50)
history = train_distributed(model, digits, epochs={epochs}, batch_size=41, augment=random_shift,
                            channels_last=False, progress=True, checkpoint={checkpoint!r})
if torch.distributed.is_initialized():
    raise SystemExit("the process group was left behind")
import os
if os.environ["RANK"] == "0":
    torch.save(model.state_dict(), {result!r})
"""


def torchrun(code, tmp_path, processes):
    (tmp_path / "own.py").write_text(code)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         "own.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})


def test_two_processes_end_with_the_weights_of_one(digits, tmp_path):
    """50 steps with a batch of odd size, the last one of each epoch smaller."""
    done = torchrun(DISTRIBUTED.format(root=str(ROOT), images=1130, epochs=2, checkpoint=str(tmp_path / "c"),
                                       result=str(tmp_path / "two.pt")), tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch  1:") == 1  # one of the two prints
    one = fresh(SimpleCNN)
    history = train_model(one, digits.first(1130, 50), epochs=2, batch_size=41, augment=random_shift,
                          precision="float32", channels_last=False, progress=False)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert len(history) == 2 and (tmp_path / "c").exists()
    for name, value in one.state_dict().items():
        assert (value - two[name]).abs().max() < 1e-4, name


def test_a_failure_of_one_process_ends_all(tmp_path):
    code = DISTRIBUTED.format(root=str(ROOT), images=500, epochs=50, checkpoint=None, result="never.pt")
    code = code.replace("history =", "import os\nif os.environ['RANK'] == '1':\n"
                                     "    raise ValueError('this one fails')\nhistory =")
    done = torchrun(code, tmp_path, 2)
    assert done.returncode != 0 and "this one fails" in done.stderr and not (tmp_path / "never.pt").exists()


def test_distributed_training_says_how_it_is_started(few):
    with pytest.raises(RuntimeError, match="start your file by torchrun --nproc-per-node=2 FILE"):
        train_distributed(SimpleCNN(), few, epochs=1)
