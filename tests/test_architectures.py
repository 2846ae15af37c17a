"""Sections 5.2 to 5.6: the blocks, and torchvision's networks traced."""

import pytest
import torch
from torch import nn
from torchvision.models import googlenet
from torchvision.models.resnet import BasicBlock

from convolutional_neural_networks import InceptionBlock, ResidualBlock, train_epoch
from data import colour_digits


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_inception_block_has_the_papers_parameters_and_shape():
    block = InceptionBlock(192, 64, 96, 128, 16, 32, 32)  # "3a": 159K parameters in the paper's table
    assert block(torch.zeros(2, 192, 28, 28)).shape == (2, 256, 28, 28)
    assert 159_000 <= count(block) <= 164_000
    by_hand = (192 * 64 + 64 + 192 * 96 + 96 + 96 * 128 * 9 + 128 + 192 * 16 + 16 + 16 * 32 * 25 + 32
               + 192 * 32 + 32)
    assert count(block) == by_hand


def test_inception_block_takes_torchvisions_arguments():
    theirs = googlenet(weights=None, init_weights=False).inception3a
    ours = InceptionBlock(in_channels=192, ch1x1=64, ch3x3red=96, ch3x3=128, ch5x5red=16, ch5x5=32,
                          pool_proj=32)
    x = torch.rand(1, 192, 9, 9)
    assert ours(x).shape == theirs(x).shape
    assert theirs.branch3[1].conv.kernel_size == (3, 3) and ours.branch3[1][0].kernel_size == (5, 5)


def test_inception_branches_stand_side_by_side():
    block, x = InceptionBlock(8, 2, 3, 4, 2, 3, 5), torch.rand(1, 8, 6, 6)
    parts = [block.branch1(x), block.branch2(x), block.branch3(x), block.branch4(x)]
    assert torch.equal(block(x), torch.cat(parts, dim=1)) and [p.shape[1] for p in parts] == [2, 4, 3, 5]


def weights_of(block):
    """Our parameters and statistics, in torchvision's names."""
    return {name: value for name, value in block.state_dict().items()}


@pytest.mark.parametrize(("inplanes", "planes", "stride"), [(8, 8, 1), (8, 16, 2), (8, 16, 1)])
def test_residual_block_equals_torchvisions(inplanes, planes, stride):
    ours = ResidualBlock(inplanes, planes, stride)
    theirs = BasicBlock(inplanes, planes, stride, ours.downsample and nn.Sequential(
        nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)))
    theirs.load_state_dict(weights_of(ours))
    x = torch.randn(4, inplanes, 10, 10)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-6)


def test_without_its_shortcut_nothing_is_added():
    block, x = ResidualBlock(4, 4, residual=False).eval(), torch.randn(2, 4, 8, 8)
    nn.init.zeros_(block.bn2.weight)
    assert not block(x).any()
    block.residual = True
    assert torch.equal(block(x), x.relu())  # f(x) = 0: the identity, then ReLU
    assert ResidualBlock(4, 8, residual=False).downsample is None


def test_the_loss_of_each_step_is_repeatable_and_falls(digits):
    colour, curves = colour_digits(digits.first(300, 50)), []
    for _ in range(2):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10))
        batches = torch.randint(300, (60, 64))
        curves.append(train_epoch(model, batches, colour.train_images, colour.train_labels,
                                  torch.optim.Adam(model.parameters(), 3e-3)))
    assert curves[0].shape == (60,) and (curves[0] == curves[1]).all()
    assert curves[0][-10:].mean() < curves[0][:10].mean() - 0.1
