"""Preparations and sections 1 to 3: convolutions, shapes, small tools, SimpleCNN, and looking inside."""

import inspect
import itertools
import math
import re
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

import convolutional_neural_networks as tutorial
from convolutional_neural_networks import (SimpleCNN, best_device, centre_of_mass, conv2d_by_hand,
                                           conv_output_size, convolve_with_loops, count_parameters,
                                           draw_numbers, evaluating, layer_table, plot_images,
                                           plot_network, draw_receptive_field, random_shift,
                                           receptive_field, recording, seeded, show_error,
                                           small_network, standardize)
from weights import PUBLIC


@pytest.fixture(autouse=True)
def no_windows(monkeypatch):
    """No test may show a figure; all are closed afterwards."""
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("a figure was shown"))
    yield
    plt.close("all")


# ------------------------------------------------------------------------------------ defaults


PREPARE = {"prepare": standardize}
MODEL_FILE = {"model_file": "pictures.pt", "preprocess": None}
DEFAULTS = {
    "plot_images": {"titles": (), "columns": 8, "width": 8.0, "title": ""},
    "draw_numbers": {"title": "", "frame": None},
    "conv_output_size": {"stride": 1, "padding": 0, "dilation": 1},
    "conv2d_by_hand": {"bias": None, "stride": 1, "padding": 0, "dilation": 1},
    "random_shift": {"pixels": 2, "padding_mode": "constant"},
    "small_network": {"outputs": 10, "dropout": 0.0, "batch_norm": False},
    "SimpleCNN": {"num_classes": 10, "in_channels": 1, "image_size": 28},
    "random_affine": {"degrees": 10.0, "scale": 0.1, "pixels": 2.0},
    "shift_and_flip": {"pixels": 2},
    "train_epoch": {"schedule": None, "augment": None, "label_smoothing": 0.0,
                    "precision": "float32"} | PREPARE,
    "predict_logits": {"batch_size": 500} | PREPARE,
    "evaluate": {"batch_size": 500} | PREPARE,
    "train_model": {
        "batch_size": 64, "learning_rate": 0.003, "weight_decay": 0.01, "one_cycle": True,
        "label_smoothing": 0.0, "validation": 0.1, "augment": None, "seed": 0, "precision": "float32",
        "channels_last": True, "checkpoint": None, "on_epoch": tutorial.print_epoch} | PREPARE,
    "choose_speed": {"batch_size": 64, "rounds": 4} | PREPARE,
    "run": {"seed": 0, "device": "cpu"},
    "LeNet5": {"num_classes": 10, "in_channels": 1},
    "SmallVGG": {"num_classes": 10, "in_channels": 3, "batch_norm": True, "channels": (32, 64, 128),
                 "dropout": 0.0, "activation": nn.SiLU, "convolution": nn.Conv2d},
    "draw_flow": {"highlighted": (), "title": ""},
    "ResidualBlock": {"stride": 1, "downsample": None, "residual": True},
    "DepthwiseSeparable": {"kernel_size": 3, "stride": 1, "padding": None, "bias": True},
    "new_head": {"seed": 0},
    "train_tail": {"epochs": 30, "head_rate": 0.01, "body_rate": 0.001, "seed": 0},
    "load_picture": {"size": 256},
    "split_by_class": {"share": 0.2, "seed": 0},
    "train_on_folder": {"backbone": None, "epochs": 30, "seed": 0, "device": None} | MODEL_FILE,
    "predict": MODEL_FILE,
    "plot_filters": {"titles": (), "title": ""},
    "saliency_map": {"labels": None}, "class_activation_map": {"labels": None},
    "grad_cam": {"labels": None, "layer": None}}


def is_bare(ax):
    """Whether an axes shows no frame and no ticks."""
    return not ax.get_frame_on() and not any(len(ticks) for ticks in (ax.get_xticks(), ax.get_yticks()))


def defaults_of(name):
    parameters = inspect.signature(getattr(tutorial, name)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize("name", DEFAULTS)
def test_who_leaves_arguments_out_gets_what_the_results_were_measured_with(name):
    """Who changes a default changes results: measure again (tests/benchmark.py), and say it in the text."""
    assert defaults_of(name) == DEFAULTS[name]


def test_no_definition_with_defaults_is_missing_above():
    assert set(DEFAULTS) == {name for name in PUBLIC if defaults_of(name)}


# ------------------------------------------------------------------------------- preparations


def test_best_device_is_the_accelerator_or_else_the_cpu(monkeypatch):
    found = torch.device("cuda", 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    assert best_device() == torch.device("cuda", 0)
    found = None
    assert best_device() == torch.device("cpu")


def draws(*numbers):
    with seeded(*numbers):
        return torch.rand(4)


def test_seeded_repeats_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    assert torch.equal(draws(5, 1), draws(5, 1))
    with pytest.raises(KeyError), seeded(5):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_seeded_leaves_the_generators_of_all_accelerators_alone_too(kind, monkeypatch):
    forked = []

    @contextmanager
    def note(devices, device_type):
        forked.append((list(devices), device_type))
        yield

    found = None if kind == "cpu" else torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "device_count",      # fails without an accelerator in torch 2.7
                        lambda: 2 if found else pytest.fail("there is nothing to count"))
    monkeypatch.setattr(torch.random, "fork_rng", note)
    with seeded(5):
        pass
    assert forked == [([0, 1] if found else [], kind)]


def test_seeded_tells_all_combinations_of_numbers_apart():
    for combinations in (range(50), itertools.product(range(7), repeat=2)):
        combinations = [n if isinstance(n, tuple) else (n,) for n in combinations]
        first = {draws(*numbers)[0].item() for numbers in combinations}
        assert len(first) == len(combinations)


# ---------------------------------------------------------------------- 1.2 receptive fields


@pytest.mark.parametrize("layers", [
    [(3, 1)], [(5, 1), (2, 2)], [(3, 2), (3, 1), (2, 2)], [(7, 2), (3, 2), (3, 1)],
    [(3, 1, 1), (3, 1, 2), (3, 1, 4)], [(3, 2, 2), (2, 1, 3)], [(3, 1, 3), (3, 2), (3, 1, 2)], []])
def test_receptive_field_is_as_wide_as_what_gradients_reach(layers):
    x = torch.zeros(1, 1, 128, requires_grad=True)
    output = x * 1
    for kernel_size, stride, *dilation in layers:
        output = F.conv1d(output, torch.ones(1, 1, kernel_size), None, stride, 0, *dilation)
    output[0, 0, 1].backward()
    reached = x.grad[0, 0].nonzero()
    assert reached.max() - reached.min() + 1 == receptive_field(layers)


@pytest.mark.parametrize(("stride", "cells"), [(1, [7, 5, 3, 1]), (2, [15, 7, 3, 1])])
def test_the_drawing_of_a_receptive_field_has_as_many_cells_as_are_read(stride, cells):
    _, ax = plt.subplots()
    draw_receptive_field(ax, [(3, stride)] * 3)
    for level, count in enumerate(cells):
        row = [patch for patch in ax.patches if abs(patch.get_y() - (level - 0.3)) < 1e-6]
        assert len(row) == count
        assert {patch.get_width() for patch in row} == {stride ** level}
        left, right = min(p.get_x() for p in row), max(p.get_x() + p.get_width() for p in row)
        assert left == -right, "each level is centred below the top unit"
    assert cells[0] == receptive_field([(3, stride)] * 3)
    assert {round(patch.get_height(), 6) for patch in ax.patches} == {0.6}
    assert ax.get_xlim() == (-8, 8) and ax.get_ylim() == (-0.5, 3.5) and not len(ax.get_xticks())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["input", "layer 1", "layer 2", "layer 3"]
    assert ax.get_yticks().tolist() == [0, 1, 2, 3]


# -------------------------------------------------------------------------- 2.1 convolutions


def test_conv_output_size_counts_the_places_where_the_kernel_fits():
    checked = 0
    for size, kernel, stride, padding, dilation in itertools.product(
            [5, 7, 12, 28], [1, 2, 5], [1, 2, 3], [0, 1, 2], [1, 2]):
        padded, last_cell = size + 2 * padding, dilation * (kernel - 1)
        places = [left for left in range(0, padded, stride) if left + last_cell < padded]
        if places:
            assert conv_output_size(size, kernel, stride, padding, dilation) == len(places)
            checked += 1
    assert checked > 150


def test_conv_output_size_equals_pytorch():
    for kernel, stride, padding, dilation in itertools.product([2, 3], [1, 2, 3], [0, 1], [1, 2]):
        x = torch.zeros(1, 1, 13)
        size = conv_output_size(13, kernel, stride, padding, dilation)
        assert F.conv1d(x, torch.zeros(1, 1, kernel), None, stride, padding, dilation).shape[2] == size
        assert F.max_pool1d(x, kernel, stride, padding, dilation).shape[2] == size


def test_a_convolution_in_numbers():
    """Four sums that can be done in the head: the kernel is not flipped."""
    image = torch.tensor([[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]])
    kernel = torch.tensor([[[1.0, 10], [100, 1000]]])
    expected = [[1 + 20 + 400 + 5000, 2 + 30 + 500 + 6000], [4 + 50 + 700 + 8000, 5 + 60 + 800 + 9000]]
    assert convolve_with_loops(image, kernel).tolist() == expected
    assert conv2d_by_hand(image[None], kernel[None])[0, 0].tolist() == expected


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 2, 5), (4, 5, 2), (2, 7, 9)])
def test_convolve_with_loops_equals_pytorch(shape):
    image, kernel = torch.randn(shape[0], 7, 9), torch.randn(shape)
    expected = F.conv2d(image[None], kernel[None])[0, 0]
    assert torch.allclose(convolve_with_loops(image, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (2, 5), (4, 1)])
@pytest.mark.parametrize("stride", [1, 2, (1, 3), (3, 2)])
def test_conv2d_by_hand_equals_pytorch(kernel_size, stride):
    x = torch.randn(2, 3, 11, 14, dtype=torch.float64)
    weight = torch.randn(4, 3, *kernel_size, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    for padding, dilation in itertools.product([0, 2, (1, 3)], [1, 2, (2, 1), (1, 2)]):
        settings = {"stride": stride, "padding": padding, "dilation": dilation}
        expected = F.conv2d(x, weight, bias, **settings)
        assert torch.allclose(conv2d_by_hand(x, weight, bias, **settings), expected)
        without = F.conv2d(x, weight, **settings)
        assert torch.allclose(conv2d_by_hand(x, weight, **settings), without)


def test_conv2d_by_hand_can_be_trained_and_takes_an_empty_batch():
    x, weight = torch.randn(2, 3, 6, 7), torch.randn(4, 3, 3, 2, requires_grad=True)
    (ours,) = torch.autograd.grad(conv2d_by_hand(x, weight, None, 2, 1).square().sum(), weight)
    (theirs,) = torch.autograd.grad(F.conv2d(x, weight, None, 2, 1).square().sum(), weight)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert conv2d_by_hand(torch.zeros(0, 1, 4, 4), torch.zeros(1, 1, 3, 3)).shape == (0, 1, 2, 2)


def test_the_drawing_of_a_matrix_has_each_number_in_its_place():
    _, ax = plt.subplots()
    values = torch.tensor([[1.0, -2.5, -0.0], [4, 5, 6]])
    draw_numbers(ax, values, "a title", frame=(1, 0, 1, 2))
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts == {(0.5, 1.5): "1", (1.5, 1.5): "-2.5", (2.5, 1.5): "0",  # the upper row
                     (0.5, 0.5): "4", (1.5, 0.5): "5", (2.5, 0.5): "6"}
    mesh = ax.collections[0].get_array().reshape(2, 3)
    assert np.array_equal(mesh[::-1], values.numpy()), "the colours belong to the numbers"
    assert ax.collections[0].get_clim() == (-12, 12), "twice the largest: the numbers stay readable"
    assert ax.get_title() == "a title" and ax.get_aspect() == 1 and is_bare(ax)
    (frame,) = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert not frame.get_fill() and (frame.get_xy(), frame.get_width(), frame.get_height()) == ((0, 0), 2, 1)


def test_the_drawing_of_small_numbers_is_pale_and_has_no_frame_unless_asked_for():
    _, ax = plt.subplots()
    draw_numbers(ax, torch.tensor([[0.5, 0.0]]))
    assert ax.collections[0].get_clim() == (-2, 2) and not ax.patches


# ------------------------------------------------------------------ 2.4 shifts and their centre


@pytest.mark.parametrize("padding_mode", ["constant", "reflect"])
def test_random_shift_moves_each_image_by_its_own_draw(padding_mode):
    pixels, count = 2, 400
    images = torch.randint(0, 256, (count, 3, 9, 12), dtype=torch.uint8)
    moved = random_shift(images, pixels, padding_mode)
    assert moved.dtype == torch.uint8 and moved.shape == images.shape
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (pixels, pixels), (pixels, pixels)), padding_mode)
    counts = dict.fromkeys(itertools.product(range(5), repeat=2), 0)
    for big, result in zip(padded, moved.numpy()):
        found = [(y, x) for y, x in counts if np.array_equal(big[:, y:y + 9, x:x + 12], result)]
        assert len(found) == 1, "not one of the 25 shifted copies"
        counts[found[0]] += 1
    assert min(counts.values()) >= 3 and max(counts.values()) <= 40  # 16 expected, deviation 4


def test_random_shift_by_zero_and_of_one_and_of_no_image():
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(random_shift(images, 0), images)
    assert random_shift(images[:1], 3).shape == (1, 1, 8, 8)
    assert random_shift(images[:0], 3).shape == (0, 1, 8, 8)


def test_random_shift_returns_a_copy():
    images = torch.full((2, 1, 6, 6), 7, dtype=torch.uint8)
    random_shift(images, 0).zero_()
    assert (images == 7).all()


def test_centre_of_mass_is_the_mean_place_of_the_brightness():
    images = torch.zeros(3, 1, 10, 20, dtype=torch.uint8)
    images[0, 0, 3, 17] = 200                                    # one pixel
    images[1, 0, 2, 4], images[1, 0, 6, 8] = 50, 150             # weights 1/4 and 3/4
    images[2] = 255                                              # even: the middle
    expected = torch.tensor([[3, 17], [5, 7], [4.5, 9.5]])
    assert torch.allclose(centre_of_mass(images), expected)
    assert torch.allclose(centre_of_mass(images / 255), expected)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_small_network_consists_of_what_was_asked_for(batch_norm):
    model = small_network(outputs=2, dropout=0.25, batch_norm=batch_norm)
    without_norm = (16 * 25 + 16) + (32 * 16 * 25 + 32) + (512 * 2 + 2)
    assert count_parameters(model) == without_norm + batch_norm * 2 * (16 + 32)
    (dropout,) = [layer for layer in model if isinstance(layer, nn.Dropout)]
    assert dropout.p == 0.25
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 2)


# ------------------------------------------------------------------ 3.2 standardize and SimpleCNN


def test_standardize_subtracts_the_mean_and_divides_by_the_deviation():
    """The usual constants of MNIST and of CIFAR-10, for pixels from 0 to 1."""
    for mean, deviation in (([0.1307], [0.3081]),
                            ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])):
        images = torch.randint(0, 256, (2, len(mean), 4, 5), dtype=torch.uint8)
        before = images.clone()
        x = standardize(images)
        assert x.dtype == torch.float32 and x.shape == images.shape
        for channel, (m, s) in enumerate(zip(mean, deviation)):
            expected = (images[:, channel].double() / 255 - m) / s
            assert torch.allclose(x[:, channel].double(), expected, atol=1e-5)
        assert torch.equal(images, before)


def test_standardised_digits_have_mean_0_and_deviation_1(digits):
    x = standardize(digits.train_images)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02


@pytest.mark.parametrize("bad", [
    torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8),
    torch.zeros(1, 2, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 4, 4, dtype=torch.int64)])
def test_standardize_names_what_it_expected_and_what_it_got(bad):
    with pytest.raises(ValueError, match=re.escape("expected uint8 [N, 1 or 3, H, W]")) as error:
        standardize(bad)
    assert str(error.value).endswith(f"{bad.dtype} {list(bad.shape)}")


@pytest.mark.parametrize(("classes", "channels", "size"), [(10, 1, 28), (7, 3, 32), (2, 4, 64), (3, 1, 4)])
def test_simple_cnn_has_the_layers_that_the_text_says(classes, channels, size):
    model = SimpleCNN(classes, channels, size)
    weights = (16 * channels * 25 + 16) + (32 * 16 * 25 + 32)
    weights += classes * 32 * (size // 4) ** 2 + classes
    assert count_parameters(model) == weights
    x = torch.randn(2, channels, size, size)
    first, second = model.conv_block1[0], model.conv_block2[0]
    y = F.max_pool2d(F.conv2d(x, first.weight, first.bias, padding=2).relu(), 2)
    y = F.max_pool2d(F.conv2d(y, second.weight, second.bias, padding=2).relu(), 2)
    expected = y.reshape(2, -1) @ model.fc.weight.T + model.fc.bias  # raw scores: no softmax
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_parameter_counts_of_simple_cnn():
    assert count_parameters(SimpleCNN()) == 28_938
    assert count_parameters(SimpleCNN(in_channels=3, image_size=32)) == 34_538


@pytest.mark.parametrize(("model", "shape", "expected"), [
    (SimpleCNN(), (2, 3, 28, 28), "[N, 1, 28, 28]"),
    (SimpleCNN(), (2, 1, 32, 32), "[N, 1, 28, 28]"),
    (SimpleCNN(), (1, 28, 28), "[N, 1, 28, 28]"),
    (SimpleCNN(), (2, 1, 28, 32), "[N, 1, 28, 28]"),
    (SimpleCNN(10, 3, 32), (2, 1, 32, 32), "[N, 3, 32, 32]")])
def test_simple_cnn_names_the_shape_that_it_expects(model, shape, expected):
    with pytest.raises(ValueError, match=re.escape(f"expected {expected}, got {list(shape)}")):
        model(torch.zeros(shape))


@pytest.mark.parametrize("size", [30, 29, 2, 0, -4])
def test_simple_cnn_refuses_sizes_that_do_not_halve_twice(size):
    with pytest.raises(ValueError, match=f"multiple of 4, got {size}"):
        SimpleCNN(image_size=size)


# --------------------------------------------------------------------------- 3.3 looking inside


def test_recording_keeps_what_was_put_out_though_a_later_layer_works_in_place():
    x = torch.randn(2, 1, 6, 6)
    conv, relu = nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True)
    model = nn.Sequential(conv, relu, nn.Hardtanh(0, 0.1, inplace=True))
    expected = F.conv2d(x, conv.weight, conv.bias)
    with recording(model.children()) as outputs:
        result = model(x)
    assert list(outputs) == list(model.children())               # in the order of their computation
    assert torch.equal(outputs[conv], expected)
    assert torch.equal(outputs[relu], expected.clamp(min=0))
    assert torch.equal(result, expected.clamp(0, 0.1)), "recording must not change the result"


def test_gradients_with_respect_to_what_was_recorded():
    """The gradient of Σ(max(x, 0)²) is 2·max(x, 0), also behind a layer that works in place."""
    conv = nn.Conv2d(1, 3, 3)
    model = nn.Sequential(conv, nn.ReLU(inplace=True))
    with recording([conv]) as outputs:
        loss = model(torch.randn(2, 1, 6, 6)).square().sum()
    (gradient,) = torch.autograd.grad(loss, outputs[conv])
    assert torch.allclose(gradient, 2 * outputs[conv].relu())


def test_recording_ends_also_after_an_error():
    model = SimpleCNN()
    with pytest.raises(ValueError, match="SimpleCNN"), recording(model.modules()):
        model(torch.zeros(1, 1, 5, 5))
    with recording(model.modules()) as outputs:
        model(torch.zeros(1, 1, 28, 28))
    count = len(outputs)
    assert count == len(list(model.modules()))
    kept = outputs[model.fc].clone()
    model(torch.ones(1, 1, 28, 28))                              # is not recorded any more
    assert not any(module._forward_hooks for module in model.modules())
    assert len(outputs) == count and torch.equal(outputs[model.fc], kept)


def test_of_a_module_that_is_used_twice_the_last_output_counts():
    twice, other = nn.Linear(4, 4), nn.Tanh()
    model = nn.Sequential(twice, other, twice)
    x = torch.randn(2, 4)
    with recording([twice, other]) as outputs:
        result = model(x)
    assert torch.equal(outputs[twice], result)
    assert list(outputs) == [other, twice], "in the order in which they finished"


def test_recording_passes_over_outputs_that_are_no_tensors():
    class Pair(nn.Module):
        def forward(self, x):
            return x, 2 * x

    pair = Pair()
    with recording([pair]) as outputs:
        first, second = pair(torch.ones(2))
    assert outputs == {} and first.tolist() == [1, 1] and second.tolist() == [2, 2]


def test_evaluating_gives_each_module_its_own_mode_back():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Dropout(0.5), nn.ReLU()))
    model.train()
    model[1].eval()                                              # frozen, as in fine-tuning
    model[2][0].eval()
    modes = [module.training for module in model.modules()]
    assert set(modes) == {True, False}
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_layer_table_lists_every_layer_with_its_shape_and_parameters():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
                          nn.Linear(4 * 6 * 7, 2))
    model[0].requires_grad_(False)                               # frozen parameters count too
    rows = [re.split(r" {2,}", line.strip()) for line in layer_table(model, (1, 8, 9)).splitlines()]
    assert rows[1:] == [["Conv2d", "[4, 6, 7]", "40"], ["BatchNorm2d", "[4, 6, 7]", "8"],
                        ["ReLU", "[4, 6, 7]", "0"], ["Flatten", "[168]", "0"],
                        ["Linear", "[2]", "338"], ["total", "386"]]


def test_layer_table_changes_nothing():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "[4, 6, 6]" in layer_table(model, (1, 8, 8))          # the image gets the model's dtype
    assert model.training and model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.modules())


# ------------------------------------------------------------------------------------ pictures


def test_every_plot_returns_a_figure_as_it_says():
    plots = [value for name, value in vars(tutorial).items() if name.startswith("plot_")]
    assert len(plots) >= 6
    wrong = [f.__name__ for f in plots if inspect.signature(f).return_annotation is not Figure]
    assert not wrong, f"these return no figure; others that draw on axes are called draw_…: {wrong}"


def test_plot_images_draws_all_kinds_and_grey_ones_on_one_scale():
    images = [torch.full((5, 4), 0.25), torch.full((1, 5, 4), 3.0), torch.full((1, 1, 5, 4), -1.0),
              torch.rand(3, 5, 4)]
    figure = plot_images(images, ["a", "b"], columns=3, title="all")
    assert isinstance(figure, Figure) and figure.get_suptitle() == "all"
    assert len(figure.axes) == 6                                 # two rows of three
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "", "", "", ""]
    drawn = [ax.images[0] for ax in figure.axes if ax.images]
    assert [picture.get_array().shape for picture in drawn] == [(5, 4)] * 3 + [(5, 4, 3)]
    assert all(picture.get_clim() == (-1, 3) for picture in drawn[:3])
    assert np.allclose(drawn[3].get_array(), images[3].permute(1, 2, 0))
    assert all(is_bare(ax) for ax in figure.axes)
    own = plot_images([torch.rand(5, 4)], vmin=0, vmax=7, cmap="viridis").axes[0].images[0]
    assert own.get_clim() == (0, 7) and own.get_cmap().name == "viridis"


@pytest.mark.parametrize(("count", "columns", "rows"), [(7, 3, 3), (6, 3, 2), (2, 3, 1)])
def test_plot_images_is_as_high_as_its_rows(count, columns, rows):
    """And a quarter of an inch for the titles of each row, and a bit more for that of the whole."""
    figure = plot_images([torch.rand(3, 20, 30)] + (count - 1) * [torch.rand(5, 4)], columns=columns, width=6)
    panel = 6 / min(columns, count)                              # their proportions are those of the first
    assert figure.get_size_inches().tolist() == pytest.approx([6, rows * (panel * 20 / 30 + 0.25) + 0.3])


def test_plot_network_draws_the_image_and_what_each_layer_makes_of_it():
    model = nn.Sequential(SimpleCNN(), nn.Dropout(0.9)).train()
    image = torch.randn(1, 1, 28, 28)
    figure = plot_network(model, image, {"block 1": model[0].conv_block1, "out": model}, "the title")
    assert isinstance(figure, Figure) and figure.get_suptitle() == "the title"
    assert [ax.get_title() for ax in figure.axes] == ["image\n1×28×28", "block 1\n16×14×14", "out\n10"]
    first, maps, bars = figure.axes
    shown = np.asarray(first.images[0].get_array())              # from 0 to 1
    assert np.allclose(shown * np.ptp(image[0, 0].numpy()) + image.min().item(), image[0, 0], atol=1e-5)
    tiled = np.asarray(maps.images[0].get_array())
    assert tiled.shape == (4 * 15 + 1, 2 * 15 + 1)               # eight maps, two columns
    assert np.isnan(tiled[::15]).all() and np.isnan(tiled[:, ::15]).all(), "white gaps"
    scales = [(np.nanmin(tile), np.nanmax(tile)) for rows in np.split(tiled[1:], 4)
              for tile in np.split(rows[:, 1:], 2, axis=1)]
    assert np.allclose(scales, [(0, 1)] * 8, atol=1e-4), "each map has a scale of its own"
    with torch.no_grad():
        logits = model.eval()(image)[0]                          # without dropout
    assert np.allclose([bar.get_width() for bar in bars.patches], logits, atol=1e-6)
    assert bars.get_yticks().tolist() == list(range(10)) and bars.yaxis_inverted()  # 0 is at the top
    assert is_bare(maps) and maps.images[0].get_cmap().name == "viridis"
    assert not any(len(ticks) for ticks in (first.get_xticks(), first.get_yticks()))
    assert len(bars.get_xticks()) > 1, "bars need a scale: are the logits small?"


# --------------------------------------------------------------------------------- 3.6 errors


def test_show_error_prints_the_first_line_and_runs_the_remedy(capsys):
    def wrong():
        raise RuntimeError("what went wrong\nand more of it")

    called = []
    show_error("1. A mistake", wrong, "the cause", remedy=lambda: called.append("remedy"))
    assert capsys.readouterr().out == "1. A mistake\n  message: what went wrong\n  cause:   the cause\n\n"
    assert called == ["remedy"]


def test_show_error_cuts_long_messages(capsys):
    show_error("1.", lambda: int("x" * 200), "long", remedy=lambda: None)
    message = capsys.readouterr().out.splitlines()[1].removeprefix("  message: ")
    assert len(message) == 100


def test_show_error_does_not_hide_what_was_not_meant():
    with pytest.raises(AssertionError, match="2. No mistake: this was expected to fail"):
        show_error("2. No mistake", lambda: None, "none", remedy=lambda: None)
    with pytest.raises(KeyError):                                # an error of another kind
        show_error("3.", lambda: {}["a"], "none", remedy=lambda: None)
    with pytest.raises(ZeroDivisionError):                       # a remedy that does not work
        show_error("4.", lambda: int("a"), "none", remedy=lambda: 1 / 0)


def test_undecided_networks_start_at_the_logarithm_of_the_number_of_classes(digits):
    """What 3.4 says about the first loss, for other numbers of classes too."""
    for classes in (2, 10, 100):
        logits = SimpleCNN(classes)(standardize(digits.train_images[:100]))
        loss = F.cross_entropy(logits, torch.arange(100) % classes).item()
        assert loss == pytest.approx(math.log(classes), abs=0.15)
