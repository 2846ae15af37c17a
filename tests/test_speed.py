"""The automatic choice of precision and memory format."""

import time

import pytest
import torch

from convolutional_neural_networks import SimpleCNN, evaluate, train_model
from data import speed
from data.speed import choose_speed


@pytest.fixture
def batch():
    return torch.randn(32, 1, 28, 28), torch.arange(32) % 10


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(speed, "CHOSEN", {})


def test_what_is_given_is_taken_without_measuring(batch, monkeypatch):
    monkeypatch.setattr(speed, "step_seconds", lambda *_: pytest.fail("measured"))
    assert choose_speed(SimpleCNN(), *batch, "bfloat16", False) == ("bfloat16", False)
    assert choose_speed(SimpleCNN(), *batch, "float32") == ("float32", True)


def test_it_takes_half_a_second_once_and_changes_nothing(batch, capsys):
    model = SimpleCNN().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choose_speed(SimpleCNN(image_size=8), torch.zeros(8, 1, 8, 8), torch.zeros(8).long())  # warms up
    capsys.readouterr()
    start = time.perf_counter()
    chosen = choose_speed(model, *batch)
    took = time.perf_counter() - start
    assert chosen[0] in ("float32", "bfloat16") and chosen[1] in (True, False) and took < 5  # 0.3 s if nothing else runs
    out = capsys.readouterr().out
    assert out.startswith(f"trains in {chosen[0]}") and len(out.splitlines()) == 1 and "images/s" in out
    assert choose_speed(SimpleCNN(), *batch) == chosen and not capsys.readouterr().out
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("times", "expected"), [
    ({("float32", True): 1.0, ("float32", False): 2.0, ("bfloat16", True): 0.5}, ("bfloat16", True)),
    ({("float32", True): 1.0, ("float32", False): 2.0, ("bfloat16", True): 0.8}, ("float32", True)),
    ({("float32", True): 1.0, ("float32", False): 0.8, ("bfloat16", True): 9.0}, ("float32", True)),
    ({("float32", True): 1.0, ("float32", False): 0.5, ("bfloat16", True): 9.0}, ("float32", False)),
])
def test_margins_decide(batch, monkeypatch, times, expected):
    def pretend(model, images, labels, precision):
        return times[precision, model.is_last]

    model = SimpleCNN(in_channels=3, image_size=28)
    monkeypatch.setattr(speed, "step_seconds", pretend)
    monkeypatch.setattr(speed.copy, "deepcopy", lambda _: Tagged())
    assert choose_speed(model, torch.zeros(8, 3, 28, 28), batch[1][:8], seconds=0, report=False) == expected


class Tagged(SimpleCNN):
    """A model that remembers which memory format it was given."""

    def __init__(self):
        super().__init__(in_channels=3)
        self.is_last = False

    def to(self, memory_format):
        self.is_last = memory_format == torch.channels_last
        return super().to(memory_format=memory_format)


def test_bfloat16_costs_no_accuracy_that_shows(digits):
    """On 500 images: five standard errors of a difference are about 10 points."""
    few, accuracies = digits.first(500, 500), []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = SimpleCNN()
        train_model(model, few, epochs=4, precision=precision, channels_last=True, progress=False)
        accuracies.append(evaluate(model, few.test_images, few.test_labels)[1])
    assert min(accuracies) > 0.75 and abs(accuracies[0] - accuracies[1]) < 0.06
