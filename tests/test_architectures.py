"""Section 5: famous networks, against torchvision's and against formulas by hand."""

from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.resnet import BasicBlock

from benchmark import GROWTH
from convolutional_neural_networks import (DepthwiseSeparable, InceptionBlock, LeNet5, ResidualBlock,
                                           SimpleCNN, SmallVGG, deep_network, draw_flow, recording)


def count(model):
    return sum(p.numel() for p in model.parameters())


def of_type(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


# ----------------------------------------------------------------------------- 5.1 LeNet-5


@pytest.mark.parametrize(("classes", "channels"), [(10, 1), (10, 3), (37, 2)])
def test_lenet_has_the_parameters_of_its_modern_form(classes, channels):
    by_hand = ((25 * channels + 1) * 6 + (25 * 6 + 1) * 16 + (16 * 5 * 5 + 1) * 120 + (120 + 1) * 84
               + (84 + 1) * classes)
    assert count(LeNet5(classes, channels)) == by_hand
    assert count(LeNet5()) == 61_706


def test_lenet_reads_28_pixels_as_32_with_an_empty_frame():
    model, x = LeNet5(num_classes=7, in_channels=2), torch.randn(3, 2, 28, 28)
    framed = torch.zeros(3, 2, 32, 32)
    framed[:, :, 2:30, 2:30] = x
    assert model(x).shape == (3, 7) and torch.equal(model(x), model(framed))
    assert model.features(framed).shape == (3, 16, 5, 5)


@pytest.mark.parametrize("shape", [
    (1, 1, 27, 27), (1, 1, 28, 32), (1, 1, 32, 28), (1, 28, 28), (2, 1, 64, 64)])
def test_lenet_names_the_sizes_that_it_takes(shape):
    with pytest.raises(ValueError) as error:
        LeNet5()(torch.zeros(shape))
    for part in ("28, 28", "32, 32", str(list(shape))):
        assert part in str(error.value)


# ----------------------------------------------------------------------------- 5.3 SmallVGG


def vgg_parameters(in_channels=3, channels=(32, 64, 128), classes=10, batch_norm=True):
    """Kernels, then two numbers a channel for batch normalisation or one for a bias, then the head."""
    total, width = 0, in_channels
    for outputs in channels:
        total += 9 * width * outputs + 9 * outputs * outputs + 2 * outputs * (2 if batch_norm else 1)
        width = outputs
    return total + (width + 1) * classes


@pytest.mark.parametrize("settings", [
    {}, {"in_channels": 4}, {"batch_norm": False}, {"channels": (5,)}, {"channels": (4, 6, 8, 10)},
    {"in_channels": 1, "channels": (16, 32, 64), "batch_norm": False}])
def test_small_vgg_has_the_parameters_of_the_formula(settings):
    assert count(SmallVGG(**settings)) == vgg_parameters(**settings)
    assert count(SmallVGG(3, **settings)) == vgg_parameters(classes=3, **settings)


def test_the_default_small_vgg_has_288746_parameters():
    assert count(SmallVGG()) == 288_746


@pytest.mark.parametrize("height, width", [(8, 8), (9, 15), (32, 32), (8, 40), (64, 64)])
def test_small_vgg_takes_any_size_from_8_pixels_on(height, width):
    model = SmallVGG(6, in_channels=4, channels=(4, 8, 12))
    x = torch.randn(2, 4, height, width)
    assert model.features(x).shape == (2, 12, height // 8, width // 8) and model(x).shape == (2, 6)
    model.eval()
    by_hand = model.features(x).mean(dim=(2, 3)) @ model.classifier[-1].weight.T + model.classifier[-1].bias
    assert torch.allclose(model(x), by_hand, atol=1e-5)


def test_small_vgg_refuses_less_than_8_pixels():
    with pytest.raises(RuntimeError, match="too small"):
        SmallVGG().eval()(torch.zeros(1, 3, 7, 7))


def test_a_stage_is_two_convolutions_with_the_pooling_after_the_first():
    for activation, settings in ((nn.SiLU, {}), (nn.ReLU, {"activation": nn.ReLU})):
        kinds = [type(module) for module in SmallVGG(**settings).features]
        assert kinds == 3 * [nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d, activation,
                             nn.Conv2d, nn.BatchNorm2d, activation] + [nn.MaxPool2d]
    kinds = [type(module) for module in SmallVGG(batch_norm=False).features]
    assert kinds == 3 * [nn.Conv2d, nn.MaxPool2d, nn.SiLU, nn.Conv2d, nn.SiLU] + [nn.MaxPool2d]
    assert [m.out_channels for m in of_type(SmallVGG(), nn.Conv2d)] == [32, 32, 64, 64, 128, 128]


def test_convolutions_have_biases_only_where_no_batch_normalisation_follows():
    assert all(conv.bias is None for conv in of_type(SmallVGG(), nn.Conv2d))
    assert all(conv.bias is not None for conv in of_type(SmallVGG(batch_norm=False), nn.Conv2d))
    separable = of_type(SmallVGG(convolution=DepthwiseSeparable), DepthwiseSeparable)
    assert all(block.pointwise.bias is None for block in separable)
    separable = of_type(SmallVGG(convolution=DepthwiseSeparable, batch_norm=False), DepthwiseSeparable)
    assert all(block.pointwise.bias is not None for block in separable)


def test_another_convolution_replaces_all_but_the_first():
    model = SmallVGG(convolution=DepthwiseSeparable, channels=(4, 8, 12))
    first, *others = [model.features[7 * stage + place] for stage in range(3) for place in (0, 4)]
    assert type(first) is nn.Conv2d and (first.in_channels, first.groups) == (3, 1)
    assert [type(module) for module in others] == 5 * [DepthwiseSeparable]
    assert len(of_type(model, nn.Conv2d)) == 1 + 2 * 5
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_growth_changes_one_thing_at_a_time():
    built = {name: make() for name, make in GROWTH.items()}
    assert {name: count(model) for name, model in built.items()} == {
        "SimpleCNN": (25 * 3 + 1) * 16 + (25 * 16 + 1) * 32 + (32 * 8 * 8 + 1) * 10,
        "3×3 stacks": vgg_parameters(channels=(16, 32, 64), batch_norm=False),
        "BatchNorm": vgg_parameters(channels=(16, 32, 64)),
        "width": vgg_parameters(), "SiLU": vgg_parameters(), "maximum": vgg_parameters()}
    assert count(built["SimpleCNN"]) == 34_538 and isinstance(built["SimpleCNN"], SimpleCNN)
    activations = [{type(m) for m in model.features if type(m) in (nn.ReLU, nn.SiLU)}
                   for model in list(built.values())[1:]]
    assert activations == [{nn.ReLU}, {nn.ReLU}, {nn.ReLU}, {nn.SiLU}, {nn.SiLU}]
    last = [type(model.features[-1]) for model in list(built.values())[1:]]
    assert last == [nn.ReLU, nn.ReLU, nn.ReLU, nn.SiLU, nn.MaxPool2d]
    for model in built.values():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


# ----------------------------------------------------------------------------- 5.4 Inception


ARGUMENTS = {"in_channels": 192, "ch1x1": 64, "ch3x3red": 96, "ch3x3": 128, "ch5x5red": 16, "ch5x5": 32,
             "pool_proj": 32}  # 3a


@pytest.fixture(scope="module")
def googlenet():
    with torch.device("meta"):
        return models.googlenet(weights=None, init_weights=False, aux_logits=False)


def test_inception_3a_has_the_papers_channels_and_parameters():
    block = InceptionBlock(**ARGUMENTS)
    with torch.no_grad():
        assert block(torch.zeros(2, 192, 7, 9)).shape == (2, 256, 7, 9)
    by_hand = ((192 + 1) * 64 + (192 + 1) * 96 + (96 * 9 + 1) * 128 + (192 + 1) * 16 + (16 * 25 + 1) * 32
               + (192 + 1) * 32)
    assert count(block) == by_hand and 159_000 <= by_hand <= 164_000  # the paper's table says 159K
    sizes = [(conv.in_channels, conv.out_channels, conv.kernel_size[0]) for conv in of_type(block, nn.Conv2d)]
    assert sizes == [(192, 64, 1), (192, 96, 1), (96, 128, 3), (192, 16, 1), (16, 32, 5), (192, 32, 1)]


def test_the_reductions_save_what_the_text_says():
    block = InceptionBlock(**ARGUMENTS)
    assert count(block.branch2) / count(nn.Conv2d(192, 128, 3)) == pytest.approx(3 / 5, abs=0.03)
    assert count(block.branch3) / count(nn.Conv2d(192, 32, 5)) == pytest.approx(1 / 10, abs=0.01)


def test_every_block_of_torchvisions_googlenet_has_the_same_channels(googlenet):
    blocks = [module for name, module in googlenet.named_children() if name.startswith("inception")]
    assert len(blocks) == 9
    for theirs in blocks:
        one, three_reduced, three, five_reduced, five, projection = (
            module.conv.out_channels for module in theirs.modules() if hasattr(module, "conv"))
        with torch.device("meta"):
            width = theirs.branch1.conv.in_channels
            ours = InceptionBlock(width, one, three_reduced, three, five_reduced, five, projection).eval()
            x = torch.empty(1, width, 5, 5)
            assert ours(x).shape == theirs.eval()(x).shape


def test_the_branches_that_torchvision_shares_with_the_paper_are_equal():
    theirs = models.googlenet(weights=None, init_weights=False, aux_logits=False).inception3a.eval()
    ours = InceptionBlock(**ARGUMENTS)
    convolutions = of_type(theirs, nn.Conv2d)
    for mine, other in zip(of_type(ours, nn.Conv2d), convolutions):
        nn.init.zeros_(mine.bias)
        if mine.kernel_size == other.kernel_size:  # all but the 5×5, which is 3×3 in torchvision
            mine.weight.data = other.weight.data / 1.001 ** 0.5  # a fresh BatchNorm divides by this
    x = torch.randn(2, 192, 6, 6)
    reduction, five = of_type(ours.branch3, nn.Conv2d)
    with torch.no_grad():
        by_hand = F.conv2d(F.conv2d(x, reduction.weight).relu(), five.weight, padding=2).relu()
        ours, theirs = ours(x), theirs(x)
    shared = [*range(0, 64 + 128), *range(64 + 128 + 32, 256)]
    assert ours.shape == theirs.shape and torch.allclose(ours[:, shared], theirs[:, shared], atol=1e-5)
    assert torch.allclose(ours[:, 192:224], by_hand, atol=1e-5)   # where torchvision has a 3×3


# ----------------------------------------------------------------------------- 5.5 ResNet


def shortcut(inplanes, planes, stride):
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def assert_same_block(ours, theirs, inplanes):
    """Same outputs, statistics and gradients with the same weights, in both modes."""
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, inplanes, 9, 10)
    results = []
    for block in (ours, theirs):
        trained = block.train()(x)
        trained.square().sum().backward()
        results.append([trained, block.eval()(x), *block.state_dict().values(),
                        *(p.grad for p in block.parameters())])
    assert len(results[0]) == len(results[1])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results))


@pytest.mark.parametrize(("inplanes", "planes", "stride"), [(8, 8, 1), (8, 16, 2), (8, 16, 1), (8, 8, 2)])
def test_residual_block_equals_torchvisions(inplanes, planes, stride):
    changes = stride > 1 or inplanes != planes
    theirs = BasicBlock(inplanes, planes, stride, shortcut(inplanes, planes, stride) if changes else None)
    assert_same_block(ResidualBlock(inplanes, planes, stride), theirs, inplanes)


def test_a_given_downsample_is_used():
    ours = ResidualBlock(6, 6, downsample=shortcut(6, 6, 1))
    assert_same_block(ours, BasicBlock(6, 6, downsample=shortcut(6, 6, 1)), 6)
    ours = ResidualBlock(6, 4, 2, nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(6, 4, 1)))
    theirs = BasicBlock(6, 4, 2, nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(6, 4, 1)))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 8, 8)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert ours(x).shape == (2, 4, 4, 4)


def test_a_residual_block_adds_f_to_x():
    block, x = ResidualBlock(4, 4), torch.randn(2, 4, 8, 8)
    nn.init.zeros_(block.bn2.weight)
    assert torch.equal(block(x), x.relu())  # f(x) = 0: the identity, then ReLU
    nn.init.constant_(block.bn2.bias, 0.5)
    assert torch.allclose(block(x), (x + 0.5).relu())


def test_without_its_shortcut_nothing_is_added():
    block, x = ResidualBlock(4, 4, residual=False), torch.randn(2, 4, 8, 8)
    expected = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2, nn.ReLU())
    assert torch.equal(block.eval()(x), expected.eval()(x))
    nn.init.zeros_(block.bn2.weight)
    assert not block(x).any()
    assert not any("downsample" in name for name in ResidualBlock(4, 8, 2, residual=False).state_dict())
    assert ResidualBlock(4, 8, 2, residual=False)(x).shape == (2, 8, 4, 4)


@pytest.mark.parametrize("blocks", [1, 6])
def test_deep_networks_have_the_depth_of_their_labels(blocks):
    networks = []
    for residual in (True, False):
        torch.manual_seed(3)
        networks.append(deep_network(blocks, residual))
    for model in networks:
        assert len(of_type(model, (nn.Conv2d, nn.Linear))) == 2 * blocks + 2
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        assert model[:-3](torch.randn(2, 3, 32, 32)).shape == (2, 16, 8, 8)
        assert count(model) == 3 * 16 * 16 + 16 + 2 * 16 + blocks * 2 * (16 * 16 * 9 + 2 * 16) + 65 * 10
    residual, plain = networks
    assert [block.residual for block in of_type(residual, ResidualBlock)] == blocks * [True]
    assert [block.residual for block in of_type(plain, ResidualBlock)] == blocks * [False]
    assert all(torch.equal(a, b) for a, b in zip(residual.parameters(), plain.parameters()))


def test_gradients_vanish_in_neither_stack_but_only_shortcuts_keep_their_direction():
    norms, cosines = {}, {}
    for residual in (True, False):
        torch.manual_seed(1)
        model = deep_network(16, residual)
        with recording(model[3:19]) as outputs:
            loss = F.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.arange(16) % 10)
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        norms[residual] = (gradients[0].norm() / gradients[-1].norm()).item()
        cosines[residual] = F.cosine_similarity(gradients[9].flatten(1), gradients[-1].flatten(1)).mean()
    assert norms[False] > 1 and norms[True] > 1, norms
    assert abs(cosines[False]) < 0.1 < 0.3 < cosines[True], cosines


# ----------------------------------------------------------------------------- 5.6 one page


def flops(model, *shape):
    """As PyTorch counts them, without any numbers."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model().eval()(torch.empty(shape))
    return counter.get_total_flops()


def flops_by_hand(model, *shape):
    """Two for each multiplication of a convolution or matrix product; found from the output shapes."""
    with torch.device("meta"), torch.no_grad():
        network = model().eval()
        with recording(of_type(network, (nn.Conv2d, nn.Linear))) as outputs:
            network(torch.empty(shape))
    return sum(2 * output.numel() * layer.weight[0].numel() for layer, output in outputs.items())


def test_the_flops_of_a_convolution_are_those_of_the_formula():
    conv = partial(nn.Conv2d, 6, 8, kernel_size=(3, 5), stride=2, padding=1, groups=2)
    height, width = (20 + 2 - 3) // 2 + 1, (31 + 2 - 5) // 2 + 1
    assert flops(conv, 4, 6, 20, 31) == 2 * 4 * 8 * height * width * (6 // 2) * 3 * 5


def test_the_flops_of_lenet_by_hand():
    expected = 2 * (28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25 + 400 * 120 + 120 * 84 + 84 * 10)
    assert flops(LeNet5, 1, 1, 28, 28) == expected == 833_040


def test_the_flops_of_famous_networks_support_the_text():
    operations = {}
    for name in ("resnet18", "resnet50", "vgg16", "mobilenet_v2"):
        make = partial(models.get_model, name)
        operations[name] = flops(make, 1, 3, 224, 224)
        assert operations[name] == flops_by_hand(make, 1, 3, 224, 224)
    assert operations["resnet18"] / 1e9 == pytest.approx(3.63, rel=0.01)
    assert operations["resnet50"] / operations["vgg16"] == pytest.approx(1 / 4, abs=0.03)
    assert operations["vgg16"] / operations["mobilenet_v2"] == pytest.approx(50, rel=0.1)


@pytest.mark.parametrize(("name", "depth"), [
    ("alexnet", 8), ("vgg16", 16), ("resnet18", 18), ("resnet50", 50), ("mobilenet_v2", 53),
    ("convnext_tiny", 59)])
def test_depths_are_layers_with_weights_along_the_longest_path(name, depth):
    with torch.device("meta"):
        model = models.get_model(name)
    layers = [name for name, module in model.named_modules()
              if isinstance(module, (nn.Conv2d, nn.Linear)) and "downsample" not in name]
    assert len(layers) == depth


# ----------------------------------------------------------------------------- 5.7 separable


@pytest.mark.parametrize("settings", [
    {}, {"stride": 2}, {"kernel_size": 5, "padding": 2, "bias": False}, {"kernel_size": 5}])
def test_depthwise_separable_equals_its_composition(settings):
    block, x = DepthwiseSeparable(3, 5, **settings), torch.randn(4, 3, 9, 12)
    size, stride = settings.get("kernel_size", 3), settings.get("stride", 1)
    filtered = torch.cat([F.conv2d(x[:, c:c + 1], block.depthwise.weight[c:c + 1], stride=stride,
                                   padding=size // 2) for c in range(3)], dim=1)  # each on its own
    spread = (filtered.var(dim=(0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    positive = ((filtered - filtered.mean(dim=(0, 2, 3), keepdim=True)) / spread).clamp(min=0)
    mixed = torch.einsum("nchw,oc->nohw", positive, block.pointwise.weight[:, :, 0, 0])
    if block.pointwise.bias is not None:
        mixed = mixed + block.pointwise.bias[:, None, None]
    assert torch.allclose(block(x), mixed, atol=1e-5)
    bias = settings.get("bias", True)
    assert count(block) == 3 * size * size + 2 * 3 + 3 * 5 + 5 * bias


def test_a_separable_block_needs_an_eighth():
    plain = partial(nn.Conv2d, 128, 128, 3, padding=1, bias=False)
    separable = partial(DepthwiseSeparable, 128, 128, bias=False)
    assert count(separable()) == 128 * 9 + 2 * 128 + 128 * 128
    assert count(plain()) / count(separable()) == pytest.approx(8, abs=0.5)
    assert flops(separable, 1, 128, 16, 16) == 2 * 16 * 16 * (128 * 9 + 128 * 128)
    assert flops(plain, 1, 128, 16, 16) / flops(separable, 1, 128, 16, 16) == pytest.approx(8, abs=0.5)


# ----------------------------------------------------------------------------- a drawing


def test_draw_flow_draws_each_box_and_each_arrow():
    boxes = {"in": (0, 0), "left": (1, 2), "right": (3, 2), "out": (4.5, -1)}
    arrows = [("in", "left"), ("in", "right"), ("right", "out")]
    figure, ax = plt.subplots()
    draw_flow(ax, boxes, [("in", "left"), ("in", "right", "out")], highlighted=["right"], title="a flow")
    figure.canvas.draw()
    named = {text.get_text(): text for text in ax.texts if text.get_text()}
    assert {name: text.get_position() for name, text in named.items()} == boxes
    drawn = [(text.xyann, text.xy) for text in ax.texts if not text.get_text()]
    assert drawn == [(boxes[begin], boxes[end]) for begin, end in arrows]
    for text, (begin, end) in zip([text for text in ax.texts if not text.get_text()], arrows):
        assert (text.arrow_patch.patchA, text.arrow_patch.patchB) == (
            named[begin].get_bbox_patch(), named[end].get_bbox_patch()), "from edge to edge"
    colours = {name: to_hex(text.get_bbox_patch().get_facecolor()) for name, text in named.items()}
    assert colours["right"] not in {colours[name] for name in boxes if name != "right"}
    assert len(set(colours.values())) == 2
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert (left, right, bottom, top) == (0 - 1, 4.5 + 1, -1 - 0.5, 2 + 0.5)
    assert not ax.get_frame_on() and not len(ax.get_xticks())
    assert ax.get_title() == "a flow"
    plt.close(figure)
