"""Calls that are repeated, as in a notebook whose cells are run again: the same answers, and nothing left."""

import copy

import pytest
import torch

import convolutional_neural_networks as tutorial
from data import colour_digits, load_bundled_digits, load_resnet18, simulated_photo
from data.run import load_data, parse_options

DIGITS = load_bundled_digits().first(60, 30)
COLOUR = colour_digits(DIGITS)
INPUT, LABELS = tutorial.standardize(COLOUR.test_images[:3]), COLOUR.test_labels[:3]
BRIEFLY = dict(epochs=1, batch_size=20, on_epoch=None, augment=tutorial.shift_and_flip)


def small_vgg():
    return tutorial.SmallVGG(batch_norm=True, channels=(4, 8), dropout=0.3)


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def trained_copy(model):
    model = copy.deepcopy(model)
    history = tutorial.train_model(model, COLOUR.train_images, COLOUR.train_labels, **BRIEFLY)
    return torch.cat([weights(model), torch.tensor([history[0]["train_loss"]])])


def fresh_one(_):
    model, _, accuracy = tutorial.run(small_vgg, COLOUR, **BRIEFLY)
    return torch.cat([weights(model), torch.tensor([accuracy])])


def trained_tail(_):
    backbone, preprocess, _ = load_resnet18(offline=True)
    frozen, tail = tutorial.split_at(tutorial.new_head(backbone, 10), "fc")
    features = tutorial.run_frozen(frozen, COLOUR.train_images, preprocess)
    tutorial.train_tail(tail, features, COLOUR.train_labels, epochs=2)
    return tail(features).detach()


CALLS = {
    "predict_logits": lambda model: tutorial.predict_logits(model, COLOUR.test_images),
    "evaluate": lambda model: torch.tensor(tutorial.evaluate(model, COLOUR.test_images, COLOUR.test_labels)),
    "feature_maps": lambda model: tutorial.feature_maps(model, INPUT, ["features.3"])["features.3"],
    "saliency_map": lambda model: tutorial.saliency_map(model, INPUT, LABELS),
    "grad_cam": lambda model: tutorial.grad_cam(model, INPUT, LABELS),
    "class_activation_map": lambda model: tutorial.class_activation_map(model, INPUT, LABELS),
    "activation_bytes": lambda model: torch.tensor(tutorial.activation_bytes(model, INPUT)),
    "layer_table": lambda model: torch.tensor([*tutorial.layer_table(model, (3, 32, 32)).encode()]),
    "train_model": trained_copy,
    "run": fresh_one,
    "train_tail": trained_tail,
    "digit_from_photo": lambda _: tutorial.digit_from_photo(simulated_photo(DIGITS.test_images[3], seed=5)),
    "split_by_class": lambda _: torch.cat(tutorial.split_by_class(DIGITS.train_labels)),
    "load_data": lambda _: load_data(parse_options(["--quick"]))[2].train_images,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_again_gives_the_same_bits_and_leaves_nothing(name, tmp_path, monkeypatch):
    """Whatever was drawn between the calls. What might be left is a hook, a gradient, or a changed mode."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(2)
    model = small_vgg()
    tutorial.train_model(model, COLOUR.train_images, COLOUR.train_labels, **BRIEFLY)
    model.train().zero_grad()
    before, images = weights(model), INPUT.clone()
    first = CALLS[name](model)
    for _ in range(2):
        torch.rand(7)
        assert torch.equal(CALLS[name](model), first)
    assert first.numel() and torch.equal(weights(model), before) and torch.equal(INPUT, images)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not INPUT.requires_grad


def test_training_a_network_again_goes_on_with_its_weights():
    """A cell that is run twice trains twice as long; only a checkpoint tells it that it is done."""
    torch.manual_seed(2)
    model = tutorial.SimpleCNN()
    histories = [tutorial.train_model(model, DIGITS.train_images, DIGITS.train_labels, epochs=3,
                                      on_epoch=None) for _ in range(3)]
    assert [row["epoch"] for row in sum(histories, [])] == [1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert histories[2][0]["train_loss"] < histories[1][0]["train_loss"] < histories[0][0]["train_loss"] - 0.2
