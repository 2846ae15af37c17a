"""Section 7: feature maps and explanations, against independent formulas."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from convolutional_neural_networks import (SimpleCNN, SmallVGG, class_activation_map, feature_maps, grad_cam,
                                           occlusion_map, saliency_map)
from data.modules import activation_bytes, share_and_hits

METHODS = [saliency_map, grad_cam, class_activation_map, partial(occlusion_map, patch=8, stride=8)]


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(3)
    return SmallVGG(channels=(8, 12, 16))


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def cam_by_autograd(model, module, images, labels):
    """Grad-CAM in other words: gradients through a forward hook with retain_grad, loops over images."""
    model, kept = copy.deepcopy(model).eval(), []
    named = dict(model.named_modules())
    named[module].register_forward_hook(lambda m, i, o: kept.append(o) or o.retain_grad())
    maps = []
    for image, label in zip(images, labels):
        kept.clear()
        model.zero_grad()
        model(image[None])[0, label].backward()
        weighted = sum(a * g.mean() for a, g in zip(kept[0][0], kept[0].grad[0]))
        large = F.interpolate(weighted.clamp(min=0)[None, None], image.shape[1:], mode="bilinear",
                              align_corners=False)[0, 0]
        maps.append(large / large.max() if large.max() > 0 else large)
    return torch.stack(maps).detach()


@pytest.mark.parametrize("layer", ["features.3", "features.10", "features.20"])
def test_grad_cam_equals_an_independent_version(vgg, images, layer):
    labels = torch.tensor([0, 3, 9, 3])
    ours = grad_cam(vgg, images, labels, layer)
    assert ours.shape == (4, 32, 32) and torch.allclose(ours, cam_by_autograd(vgg, layer, images, labels),
                                                        atol=1e-4)
    by_module = grad_cam(vgg, images, labels, dict(vgg.named_modules())[layer])
    assert torch.equal(ours, by_module)


def test_grad_cam_on_resnet18_layer3():
    torch.manual_seed(0)
    model, x = models.resnet18(num_classes=7), torch.randn(2, 3, 64, 64)
    labels = torch.tensor([6, 0])
    assert torch.allclose(grad_cam(model, x, labels, "layer3"),
                          cam_by_autograd(model, "layer3", x, labels), atol=1e-4)


def test_cam_equals_grad_cam_on_the_last_maps(vgg, images):
    labels = torch.tensor([1, 2, 3, 4])
    assert torch.allclose(class_activation_map(vgg, images, labels), grad_cam(vgg, images, labels), atol=1e-3)
    model = models.resnet18(num_classes=10).eval()
    x = torch.randn(2, 3, 96, 96)
    assert torch.allclose(class_activation_map(model, x), grad_cam(model, x, layer="layer4"), atol=1e-3)


def test_saliency_equals_one_image_at_a_time(vgg, images):
    labels = torch.tensor([5, 1, 1, 0])
    model = copy.deepcopy(vgg).eval()
    for image, label, ours in zip(images, labels, saliency_map(vgg, images, labels)):
        x = image[None].clone().requires_grad_()
        model(x)[0, label].backward()
        assert torch.allclose(ours, x.grad[0].abs().max(dim=0).values, atol=1e-6)


@pytest.mark.parametrize("patch, stride", [(8, 8), (8, 4), (6, 2)])
def test_occlusion_equals_its_definition(vgg, images, patch, stride):
    model, labels, cells = copy.deepcopy(vgg).eval(), torch.tensor([0, 1, 2, 3]), 32 // stride
    with torch.no_grad():
        whole = model(images).softmax(1)[range(4), labels]
        falls = torch.zeros(4, cells, cells)
        pixel = torch.arange(32) + 0.5
        for i, j in np.ndindex(cells, cells):  # grey is what lies within half a patch of the cell's centre
            rows, columns = ((pixel - (k + 0.5) * stride).abs() < patch / 2 for k in (i, j))
            covered = images.masked_fill(rows[:, None] & columns, 0)
            falls[:, i, j] = (whole - model(covered).softmax(1)[range(4), labels]).clamp(min=0)
    large = F.interpolate(falls[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]
    large = large / large.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    assert torch.allclose(occlusion_map(vgg, images, labels, patch=patch, stride=stride), large, atol=1e-3)


def test_default_labels_are_the_predicted_ones(vgg, images):
    predicted = copy.deepcopy(vgg).eval()(images).argmax(dim=1)
    for method in METHODS:
        assert torch.equal(method(vgg, images), method(vgg, images, predicted))


def test_maps_of_zeros_stay_zero(images):
    model = SmallVGG(channels=(4, 4))
    nn.init.zeros_(model.classifier[-1].weight)
    for method in METHODS:
        assert torch.equal(method(model, images), torch.zeros(4, 32, 32))


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_left_as_it_was(vgg, images, method):
    model = copy.deepcopy(vgg).train()
    model.features[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    given = images.clone()
    with torch.no_grad():
        in_no_grad = method(model, given)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(method(model, given.clone()), in_no_grad)
    assert torch.equal(method(model, given), in_no_grad) and torch.equal(given, images)
    with pytest.raises(ValueError):
        method(model, given, torch.tensor([0, 1, 2, 99]))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules()) and not given.requires_grad


def test_in_place_activations_behind_the_layer_do_no_harm(images):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=inplace), nn.Conv2d(6, 8, 3, stride=2),
                          nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
            for inplace in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    for layer in (None, "0", "2", "3"):
        assert torch.allclose(grad_cam(nets[0], images, layer=layer), grad_cam(nets[1], images, layer=layer))
    maps = [feature_maps(net, images, ["0", "2"]) for net in nets]
    assert all(torch.equal(maps[0][name], maps[1][name]) for name in ("0", "2"))


def test_frozen_models_and_their_default_layer(images):
    model = SmallVGG(channels=(4, 8)).requires_grad_(False)
    assert torch.equal(grad_cam(model, images), grad_cam(model, images, layer="features"))
    flat = grad_cam(model, images, layer="pool")  # 1×1: one constant for each image
    assert (flat.amax(dim=(1, 2)) == flat.amin(dim=(1, 2))).all()


@pytest.mark.parametrize("make", [models.mobilenet_v3_small, models.squeezenet1_1, models.densenet121])
def test_networks_of_other_families_work_too(make):
    torch.manual_seed(0)
    model, x = make(num_classes=6), torch.randn(2, 3, 64, 64)
    heat = grad_cam(model, x, torch.tensor([5, 0]))
    assert heat.shape == (2, 64, 64) and heat.min() >= 0 and heat.max() <= 1 and model.training
    assert saliency_map(model, x).shape == (2, 64, 64)


@pytest.mark.parametrize(("call", "message"), [
    (lambda m, x: grad_cam(m, x, layer="features.99"), "layer: the model has no 'features.99', but"),
    (lambda m, x: grad_cam(m, x, layer=nn.ReLU()), "layer: this ReLU is not a part of the model"),
    (lambda m, x: grad_cam(m, x, layer="classifier.2"), r"whose output is \[N, channels, h, w\]"),
    (lambda m, x: feature_maps(m, x, ["nowhere"]), "the model has no 'nowhere'"),
    (lambda m, x: saliency_map(m, x, torch.tensor([0, 1, 2, 10])), "labels: expected 0..9"),
    (lambda m, x: saliency_map(m, x, torch.tensor([0, 1])), r"labels: expected int64 \[4\]"),
    (lambda m, x: saliency_map(m, x, torch.zeros(4)), r"labels: expected int64 \[4\], got torch.float32"),
    (lambda m, x: grad_cam(m, x[0]), r"images: expected standardised float32 \[N, 3, H, W\]"),
    (lambda m, x: grad_cam(m, x[:, :1]), r"expected standardised float32 \[N, 3, H, W\].*\[4, 1, 32, 32\]"),
    (lambda m, x: grad_cam(m, x[:0]), r"N > 0, got torch.float32 \[0, 3, 32, 32\]"),
    (lambda m, x: grad_cam(m, (x * 9).byte()), "expected standardised float32"),
    (lambda m, x: occlusion_map(m, x[:, :, :30]), r"SmallVGG: expected \[N, 3, 32, 32\]"),
    (lambda m, x: class_activation_map(SimpleCNN(10, 3, 32), x), "ends in global average pooling"),
    (lambda m, x: class_activation_map(nn.Sequential(nn.Conv2d(3, 2, 32), nn.Flatten()), x), "larger than 1×1"),
    (lambda m, x: grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), x), "larger than 1×1"),
])
def test_wrong_input_is_refused_in_one_line(vgg, images, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(vgg, images)
    assert len(str(error.value).splitlines()) == 1


def test_share_and_hits_by_hand():
    maps, masks = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2, dtype=torch.bool)
    maps[0] = torch.tensor([[3.0, 1], [0, 0]])
    maps[1] = torch.tensor([[0.0, 1], [1, 2]])
    masks[0, 0, 0] = masks[1, 0, 1] = True
    assert share_and_hits(maps, masks) == pytest.approx(((0.75 + 0.25) / 2, 0.5))


def test_activation_bytes_grow_with_the_batch_and_count_exactly():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU())
    x = torch.rand(1, 1, 10, 10)
    assert activation_bytes(conv, x) == 4 * (100 + 4 * 64)  # the input, and what ReLU gives
    assert activation_bytes(conv, torch.rand(5, 1, 10, 10)) == 5 * 4 * (100 + 4 * 64)
