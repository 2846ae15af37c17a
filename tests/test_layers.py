"""Sections 1 to 3 and 5.1: layers, shapes, and the networks made of them."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convolutional_neural_networks import (GROWTH, LeNet5, SimpleCNN, SmallVGG, conv2d_by_hand,
                                           conv_output_size, layer_table, receptive_field,
                                           standardize)


@pytest.mark.parametrize("kernel_size", [1, 3, (2, 5)])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
def test_conv2d_by_hand_equals_pytorch(kernel_size, stride):
    x = torch.randn(2, 3, 11, 14)
    kernel_size = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    weight, bias = torch.randn(4, 3, *kernel_size), torch.randn(4)
    for padding, dilation in itertools.product([0, 2, (1, 3)], [1, 2, (2, 1)]):
        settings = {"stride": stride, "padding": padding, "dilation": dilation}
        expected = F.conv2d(x, weight, bias, **settings)
        assert torch.allclose(conv2d_by_hand(x, weight, bias, **settings), expected, atol=1e-4)
        without = F.conv2d(x, weight, **settings)
        assert torch.allclose(conv2d_by_hand(x, weight, **settings), without, atol=1e-4)


def test_conv_output_size_equals_pytorch():
    for size, kernel, stride, padding, dilation in itertools.product(
            [7, 12, 28], [1, 2, 5], [1, 2, 3], [0, 1, 2], [1, 2]):
        if size + 2 * padding < dilation * (kernel - 1) + 1:
            continue
        output = F.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), None, stride,
                          padding, dilation)
        assert output.shape[2] == conv_output_size(size, kernel, stride, padding, dilation)


def test_receptive_field_equals_what_gradients_reach():
    for layers in ([(3, 1)], [(5, 1), (2, 2)], [(3, 2), (3, 1), (2, 2)], [(7, 2), (3, 2), (3, 1)]):
        net = nn.Sequential(*(nn.Conv1d(1, 1, k, s) for k, s in layers))
        for parameter in net.parameters():
            nn.init.ones_(parameter)
        x = torch.zeros(1, 1, 64, requires_grad=True)
        net(x)[0, 0, 1].backward()
        assert (x.grad != 0).sum() == receptive_field(layers)


def test_standardize_gives_mean_0_and_deviation_1(digits):
    x = standardize(digits.train_images)
    assert x.dtype == torch.float32 and x.shape == digits.train_images.shape
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
    grey = standardize(torch.full((1, 3, 2, 2), 128, dtype=torch.uint8))
    assert torch.allclose(grey[0, :, 0, 0], torch.tensor([0.0428, 0.0812, 0.2120]), atol=1e-3)


@pytest.mark.parametrize("bad", [torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8),
                                 torch.zeros(1, 2, 4, 4, dtype=torch.uint8)])
def test_standardize_refuses_what_it_cannot_scale(bad):
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 1 or 3, H, W\]"):
        standardize(bad)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    assert count(SimpleCNN()) == 28_938
    assert count(SimpleCNN(in_channels=3, image_size=32)) == 34_538
    assert count(LeNet5()) == 61_706


def test_networks_give_raw_logits():
    for model, shape in ((SimpleCNN(7), (2, 1, 28, 28)), (SimpleCNN(7, 3, 32), (2, 3, 32, 32)),
                         (SmallVGG(7), (2, 3, 32, 32)), (LeNet5(7), (2, 1, 28, 28)), (LeNet5(7), (2, 1, 32, 32)),
                         (LeNet5(7, 3), (2, 3, 32, 32))):
        logits = model(torch.randn(shape))
        assert logits.shape == (2, 7) and (logits < 0).any()
    framed = LeNet5().eval()
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(framed(x), framed(F.pad(x, (2, 2, 2, 2))))


@pytest.mark.parametrize(("model", "shape", "expected"), [
    (SimpleCNN(), (2, 3, 28, 28), "[N, 1, 28, 28]"),
    (SimpleCNN(), (2, 1, 32, 32), "[N, 1, 28, 28]"),
    (SimpleCNN(), (1, 28, 28), "[N, 1, 28, 28]"),
    (SimpleCNN(10, 3, 32), (2, 1, 32, 32), "[N, 3, 32, 32]"),
    (SmallVGG(), (2, 1, 32, 32), "[N, 3, 32, 32]"),
    (SmallVGG(), (2, 3, 28, 28), "[N, 3, 32, 32]"),
    (LeNet5(), (2, 1, 30, 30), "[N, 1, 28, 28] or [N, 1, 32, 32]"),
    (LeNet5(), (2, 3, 32, 32), "[N, 1, 28, 28] or [N, 1, 32, 32]"),
])
def test_networks_name_the_shape_that_they_expect(model, shape, expected):
    with pytest.raises(ValueError, match=re.escape(f"expected {expected}, got {list(shape)}")):
        model(torch.zeros(shape))


def test_simple_cnn_refuses_sizes_that_do_not_halve_twice():
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        SimpleCNN(image_size=30)


def test_layer_table_lists_every_layer_and_changes_nothing():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines = layer_table(model, (1, 8, 8)).splitlines()
    assert [line.split()[0] for line in lines] == ["Conv2d", "BatchNorm2d", "Flatten", "Linear", "total"]
    assert "[4, 6, 6]" in lines[0] and lines[-1].endswith(f"{count(model):,}")
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_small_vgg_is_3x3_stacks_with_what_was_asked_for():
    kinds = [type(layer) for layer in SmallVGG().modules()]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == kinds.count(nn.ReLU) == 6
    assert all(layer.kernel_size == (3, 3) for layer in SmallVGG().modules() if isinstance(layer, nn.Conv2d))
    plain = SmallVGG(channels=(4, 8), batch_norm=False)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())
    assert plain(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert plain.features[0].bias is not None and SmallVGG().features[0].bias is None


def test_growth_ends_in_small_vgg_and_each_step_differs():
    models = [make() for make in GROWTH.values()]
    assert str(models[-1]) == str(SmallVGG())
    assert len({str(model) for model in models}) == len(models)
    assert all(model(torch.zeros(1, 3, 32, 32)).shape == (1, 10) for model in models)
