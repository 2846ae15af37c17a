"""Answers to the exercises of the script, each with its proof. `test_2a_…` answers exercise 2a."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from convolutional_neural_networks import (InceptionBlock, ResidualBlock, SimpleCNN, SmallVGG, conv_output_size,
                                           feature_maps, new_head, occlusion_map, receptive_field, split_at)
from data.modules import activation_bytes
from data.options import with_error


def count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_0a_parameters_of_the_first_network():
    first = nn.Sequential(nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5), nn.Linear(32 * 4 * 4, 10))
    assert count(first) == (16 * 25 + 16) + (32 * 16 * 25 + 32) + (512 * 10 + 10) == 18_378


def test_0b_a_guess_gets_one_in_ten(digits):
    guesses = torch.randint(0, 10, digits.test_labels.shape)
    right = (guesses == digits.test_labels).float().mean().item()
    assert right == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / len(guesses)))


def test_1a_three_convolutions_of_stride_2_see_15_pixels():
    assert receptive_field([(3, 2)] * 3) == 1 + 2 * 1 + 2 * 2 + 2 * 4 == 15


def test_1b_a_linear_layer_has_78500_parameters_a_convolution_1000():
    assert count(nn.Linear(28 * 28, 100)) == 78_500 and count(nn.Conv2d(1, 100, 3)) == 1_000


def test_1c_shifts_by_multiples_of_four_pass_two_poolings():
    x = torch.rand(1, 1, 32, 32)
    pooled = F.max_pool2d(F.max_pool2d(x, 2), 2)
    for pixels in range(1, 9):
        moved = F.max_pool2d(F.max_pool2d(x.roll(pixels, 3), 2), 2)
        passes = any(torch.equal(moved, pooled.roll(steps, 3)) for steps in range(8))
        assert passes == (pixels % 4 == 0)


def test_2a_32_pixels_become_15():
    assert conv_output_size(32, kernel_size=5, stride=2, padding=1) == 15
    assert nn.Conv2d(1, 1, 5, stride=2, padding=1)(torch.zeros(1, 1, 32, 32)).shape[2] == 15


def test_2b_padding_2_keeps_the_size_at_dilation_2():
    assert conv_output_size(20, kernel_size=3, padding=2, dilation=2) == 20


def test_2c_a_kernel_for_diagonal_edges():
    diagonal = torch.tensor([[0.0, 1, 2], [-1, 0, 1], [-2, -1, 0]])
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    rising, falling = (columns > rows).float(), (columns + rows > 8).float()
    answers = [F.conv2d(image[None, None], diagonal[None, None]).abs().max() for image in (rising, falling)]
    assert answers[0] == 4 and answers[1] <= 2  # edges from upper left to lower right; hardly the others


def test_2d_dropout_of_a_quarter_multiplies_by_four_thirds():
    out = nn.Dropout(0.25)(torch.ones(1000))
    assert torch.allclose(out[out > 0], torch.tensor(4 / 3))


def test_3a_simple_cnn_for_26_letters_has_54042_parameters():
    assert count(SimpleCNN(num_classes=26)) == 28_938 + 16 * (32 * 7 * 7 + 1) == 54_042


def test_3b_the_first_loss_with_100_classes_is_ln_100():
    assert F.cross_entropy(torch.zeros(4, 100), torch.arange(4)).item() == pytest.approx(math.log(100), abs=1e-5)


def test_3c_behind_a_third_block_fc_sees_64_maps_of_4_by_4():
    model = SimpleCNN(in_channels=3, image_size=32)
    model.conv_block2.append(nn.Sequential(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)))
    model.fc = nn.Linear(64 * 4 * 4, 10)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_4a_the_standard_error_is_one_and_a_half_points():
    assert with_error(0.9, 400) == "90.00% ± 1.50%"


def test_4b_the_loss_is_ln_2():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert F.cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(math.log(2))


def test_4c_it_cannot_fall_below_3_63():
    certain = F.one_hot(torch.tensor([7]), 100).float()  # the best that softmax can give
    assert F.cross_entropy(certain, torch.tensor([7])).item() == pytest.approx(3.63, abs=0.01)


def test_5a_three_3x3_see_7_pixels_with_27_weights_in_place_of_49():
    assert receptive_field([(3, 1)] * 3) == receptive_field([(7, 1)]) == 7
    assert 3 * nn.Conv2d(1, 1, 3, bias=False).weight.numel() == 27 < 49


def test_5b_inception_3b_gives_480_channels():
    block = InceptionBlock(256, 128, 128, 192, 32, 96, 64)
    assert block(torch.zeros(1, 256, 8, 8)).shape[1] == 128 + 192 + 96 + 64 == 480


def test_5c_zero_scales_of_the_last_normalisation_pass_positive_maps_on():
    block, x = ResidualBlock(4, 4), torch.rand(2, 4, 8, 8)
    nn.init.zeros_(block.bn2.weight)
    assert torch.equal(block(x), x)


def test_6a_extraction_for_five_classes_trains_2565_parameters():
    _, head = split_at(new_head(resnet18(), 5), "fc")
    assert count(head) == 512 * 5 + 5 == 2_565


def test_6b_layer3_is_trained_too():
    frozen, tail = split_at(new_head(resnet18(), 5), "layer3")
    assert count(frozen) == 0 and tail(frozen(torch.zeros(1, 3, 64, 64))).shape == (1, 5)
    assert count(tail) > count(split_at(new_head(resnet18(), 5), "layer4")[1])


def test_7a_occlusion_runs_the_network_66_times():
    model, calls = SmallVGG(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    occlusion_map(model, torch.randn(1, 3, 32, 32))
    assert len(calls) == (32 // 4) ** 2 + 2 == 66  # each place; the label, and the probability as it is


def test_7b_a_logit_is_the_weighted_mean_of_the_last_maps():
    model, x = SmallVGG().eval(), torch.randn(2, 3, 32, 32)
    maps, linear = feature_maps(model, x, ["features"])["features"], model.classifier[-1]
    assert torch.allclose(maps.mean(dim=(2, 3)) @ linear.weight.T + linear.bias, model(x), atol=1e-5)


def test_8a_twice_the_batch_keeps_twice_the_bytes():
    small, large = (activation_bytes(SmallVGG(), torch.zeros(n, 3, 32, 32)) for n in (64, 128))
    assert large == pytest.approx(2 * small, rel=0.001)


def test_8b_one_cycle_starts_at_a_25th_of_the_highest_rate():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=100)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 25)


def test_8c_the_mean_of_two_gradients_is_the_gradient_of_the_whole():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(8, 5), torch.arange(8) % 3
    def gradient(part):
        return torch.autograd.grad(F.cross_entropy(model(x[part]), y[part]), model.weight)[0]
    halves = (gradient(slice(0, 4)) + gradient(slice(4, 8))) / 2
    assert torch.allclose(halves, gradient(slice(0, 8)), atol=1e-6)


def test_every_exercise_of_the_script_is_answered_here():
    import re

    import convolutional_neural_networks

    text = open(convolutional_neural_networks.__file__, encoding="utf-8").read()
    asked = {f"{section}{letter}" for section, questions in re.findall(
        r"\*Exercises (\d)\.\* (.*?)\n\n", text, re.S) for letter in re.findall(r"(?:^|\s)([a-d])\) ", questions)}
    answered = {name[5:7] for name in globals() if re.match(r"test_\d[a-d]_", name)}
    assert asked == answered and len(asked) >= 20
