"""The choice of number and memory format: `choose_speed` measures it, here on a clock that we advance."""

import inspect
from types import SimpleNamespace

import pytest
import torch

import convolutional_neural_networks as tutorial
from convolutional_neural_networks import SimpleCNN, SmallVGG, choose_speed, evaluate, train_model

LAST, NOT_LAST, BFLOAT16 = ("float32", True), ("float32", False), ("bfloat16", True)
CHOICES = (LAST, NOT_LAST, BFLOAT16)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.setattr(tutorial, "SPEEDS", {})


def batch():
    return torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8), torch.arange(64) % 10


def memory_format_is_last(model):
    """Read it from SimpleCNN's second convolution, `[32, 16, 5, 5]`."""
    return model.conv_block2[0].weight.is_contiguous(memory_format=torch.channels_last)


class Machine:
    """Stands in for `train_epoch` and for the clock: each step takes as long as we say.

    `speeds`: images a second of each choice. `disturbed`: the numbers of steps that take a minute more.
    `clock`: the one that goes on; any other stands still.
    """

    def __init__(self, monkeypatch, speeds, disturbed=(), clock="process_time"):
        self.speeds, self.disturbed, self.now, self.steps = speeds, disturbed, 5.0, []
        self.rates, self.threads = set(), set()
        monkeypatch.setattr(tutorial, "train_epoch", self.train_epoch)
        clocks = {"process_time": lambda: 0.0, "perf_counter": lambda: 0.0} | {clock: lambda: self.now}
        monkeypatch.setattr(tutorial, "time", SimpleNamespace(**clocks))

    def train_epoch(self, model, batches, images, labels, optimizer, *_, precision="float32", **__):
        for numbers in batches:
            choice = precision, memory_format_is_last(model)
            self.now += len(numbers) / self.speeds[choice] + 60 * (len(self.steps) in self.disturbed)
            self.steps.append((choice, len(numbers)))
            self.rates.add(optimizer.param_groups[0]["lr"])
            self.threads.add(torch.get_num_threads())
        return torch.zeros(len(batches))


def as_arguments(choice):
    return {"precision": choice[0], "channels_last": choice[1]}


def test_it_returns_arguments_of_train_model_and_changes_nothing(capsys):
    images, labels = batch()
    model = SmallVGG(in_channels=1, channels=(4, 8), dropout=0.5)
    model.features.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    chosen = choose_speed(model, images, labels, batch_size=16, rounds=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert chosen.keys() <= inspect.signature(train_model).parameters.keys()
    assert chosen in [as_arguments(choice) for choice in CHOICES]
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3 and out.count("<- chosen") == 1 and "images/s" in out
    assert len(train_model(model, images, labels, epochs=1, **chosen)) == 1


def test_the_answer_is_remembered_for_this_network_these_images_and_this_batch(monkeypatch, capsys):
    images, labels = batch()
    machine = Machine(monkeypatch, {LAST: 1000, NOT_LAST: 500, BFLOAT16: 3000})
    first = choose_speed(SimpleCNN(), images, labels)
    assert first == as_arguments(BFLOAT16) and len(tutorial.SPEEDS) == 1
    taken, _ = len(machine.steps), capsys.readouterr()
    assert choose_speed(SimpleCNN(), *batch()) == first          # another one of the same kind
    assert len(machine.steps) == taken and not capsys.readouterr().out
    for changes in ({"batch_size": 32}, {"model": SimpleCNN(num_classes=11)},
                    {"model": SimpleCNN(image_size=8), "images": images[:, :, :8, :8]}):
        arguments = {"model": SimpleCNN(), "images": images, "labels": labels} | changes
        choose_speed(**arguments)
        assert len(machine.steps) > taken
        taken = len(machine.steps)
    assert len(tutorial.SPEEDS) == 4


def test_all_take_turns_on_whole_batches(monkeypatch):
    """So what slows the machine down for a while slows all of them."""
    machine = Machine(monkeypatch, {LAST: 1000, NOT_LAST: 900, BFLOAT16: 1100})
    choose_speed(SimpleCNN(), *batch(), batch_size=48)
    whole = [choice for choice, count in machine.steps if count == 48]
    rounds = [whole[start:start + 3] for start in range(0, len(whole), 3)]
    assert len(rounds) == 4 and all(set(step) == set(CHOICES) for step in rounds)
    assert max(count for _, count in machine.steps) == 48


def test_rounds_of_few_images_come_first_and_no_weight_is_moved(monkeypatch, capsys):
    """One that does not count, two that do, and as many as were asked for with whole batches."""
    machine = Machine(monkeypatch, {LAST: 1000, NOT_LAST: 1600, BFLOAT16: 1250})
    choose_speed(SimpleCNN(), *batch(), rounds=5)
    assert [count for _, count in machine.steps] == 3 * 3 * [8] + 5 * 3 * [64] and machine.rates == {0.0}
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "float32 channels_last 1,000 images/s", "float32 1,600 images/s <- chosen",
        "bfloat16 channels_last 1,250 images/s"]


def test_what_is_three_times_slower_is_not_tried_on_whole_batches(monkeypatch):
    machine = Machine(monkeypatch, {LAST: 1000, NOT_LAST: 320, BFLOAT16: 350})
    choose_speed(SimpleCNN(), *batch())
    assert {choice for choice, count in machine.steps if count == 64} == {LAST, BFLOAT16}


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_a_cpu_is_measured_with_one_thread_in_its_own_time(two_threads, monkeypatch):
    """So other programs do not count."""
    machine = Machine(monkeypatch, {LAST: 1000, NOT_LAST: 900, BFLOAT16: 3000})
    assert choose_speed(SimpleCNN(), *batch()) == as_arguments(BFLOAT16)
    assert machine.threads == {1} and torch.get_num_threads() == 2
    machine.speeds = {}                                          # the next step fails
    with pytest.raises(KeyError):
        choose_speed(SimpleCNN(num_classes=11), *batch())
    assert torch.get_num_threads() == 2


def test_an_accelerator_is_measured_by_the_clock_on_the_wall(two_threads, monkeypatch):
    machine = Machine(monkeypatch, {LAST: 1000, NOT_LAST: 900, BFLOAT16: 3000}, clock="perf_counter")
    images, labels = batch()
    assert choose_speed(SimpleCNN(), images.to("meta"), labels) == as_arguments(BFLOAT16)
    assert machine.threads == {2}


@pytest.mark.parametrize(("speeds", "expected"), [
    ({LAST: 1000, NOT_LAST: 600, BFLOAT16: 1250}, LAST),         # below 1.3, chance could turn it
    ({LAST: 1000, NOT_LAST: 1250, BFLOAT16: 200}, LAST),
    ({LAST: 1000, NOT_LAST: 600, BFLOAT16: 1350}, BFLOAT16),
    ({LAST: 1000, NOT_LAST: 1350, BFLOAT16: 200}, NOT_LAST),
    ({LAST: 1000, NOT_LAST: 1500, BFLOAT16: 2000}, BFLOAT16),
    ({LAST: 1000, NOT_LAST: 900, BFLOAT16: 20}, LAST),           # emulated bfloat16
    ({LAST: 100, NOT_LAST: 900, BFLOAT16: 800}, NOT_LAST)])
def test_margins_decide_and_the_first_slow_step_does_not(monkeypatch, speeds, expected):
    """The first steps of every process are slow: libraries are loaded, kernels chosen."""
    Machine(monkeypatch, speeds, disturbed=(0, 1, 2))
    assert choose_speed(SimpleCNN(), *batch()) == as_arguments(expected)


@pytest.mark.parametrize(("speeds", "expected"), [
    ({LAST: 1000, NOT_LAST: 600, BFLOAT16: 1200}, LAST),
    ({LAST: 1000, NOT_LAST: 600, BFLOAT16: 2000}, BFLOAT16)])
def test_one_slow_step_does_not_change_the_answer(monkeypatch, speeds, expected):
    """Whichever it is, even if it takes longer than all measurements were meant to take."""
    undisturbed = Machine(monkeypatch, speeds)
    choose_speed(SimpleCNN(), *batch())
    for number in range(len(undisturbed.steps)):
        machine = Machine(monkeypatch, speeds, disturbed=(number,))
        tutorial.SPEEDS.clear()
        chosen = choose_speed(SimpleCNN(), *batch())
        assert chosen == as_arguments(expected), f"turned by step {number}, of {machine.steps[number]}"


def test_what_is_far_slower_gets_no_whole_batch(monkeypatch, capsys):
    machine = Machine(monkeypatch, {LAST: 1000, NOT_LAST: 900, BFLOAT16: 20})
    choose_speed(SimpleCNN(), *batch())
    assert all(count <= 8 for choice, count in machine.steps if choice == BFLOAT16)
    assert machine.now < 30 and "far slower" in capsys.readouterr().out


def test_fewer_images_than_a_batch_are_enough(monkeypatch):
    machine = Machine(monkeypatch, {LAST: 1000, NOT_LAST: 900, BFLOAT16: 3000})
    images, labels = batch()
    assert choose_speed(SimpleCNN(), images[:5], labels[:5]) == as_arguments(BFLOAT16)
    assert {count for _, count in machine.steps} == {5}


def test_bfloat16_costs_no_accuracy_that_shows(digits):
    """On 500 images: five standard errors of a difference are about 10 points."""
    few, accuracies = digits.first(500, 500), []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = SimpleCNN()
        train_model(model, few.train_images, few.train_labels, epochs=4, precision=precision, on_epoch=None)
        accuracies.append(evaluate(model, few.test_images, few.test_labels)[1])
    assert min(accuracies) > 0.75 and abs(accuracies[0] - accuracies[1]) < 0.06
