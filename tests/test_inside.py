"""Section 7: what networks look at, against independent formulas; and `slide` of section 4.7."""

import copy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from convolutional_neural_networks import (SimpleCNN, SmallVGG, as_heat, class_activation_map, class_scores,
                                           feature_maps, grad_cam, overlay, plot_filters,
                                           saliency_map, share_of_peaks_on, share_of_peaks_on_others,
                                           slide)

METHODS = [saliency_map, grad_cam, class_activation_map]
NAMES = ["saliency", "grad_cam", "cam"]
each_method = pytest.mark.parametrize("method", METHODS, ids=NAMES)


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(3)
    model = SmallVGG(channels=(8, 12, 16))
    nn.init.normal_(model.classifier[-1].weight, std=5)  # so that its probabilities differ, as after training
    return with_statistics(model)


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def with_statistics(model, side=32):
    """Let batch normalisation see something first, so that evaluation mode differs from training."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(3 * torch.randn(4, 3, side, side) + 1)
    return model


class HeadFirst(nn.Module):
    """Registers its layers in the wrong order, one ReLU for all, and a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 5)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 8, 3, stride=2)
        self.first = nn.Conv2d(3, 6, 3)
        self.unused = nn.Linear(8, 5)

    def forward(self, x):
        """Map `[N, 3, H, W]` to logits `[N, 5]`."""
        x = self.relu(self.second(self.relu(self.first(x))))
        return self.fc(x.mean(dim=(2, 3)))

    def in_order(self):
        """Return the same network in the usual form."""
        return nn.Sequential(self.first, nn.ReLU(), self.second, nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                             nn.Flatten(), self.fc)


class FunctionalEnd(nn.Module):
    """ReLU and pooling before the last layer are functions, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        """Map `[N, 3, H, W]` to logits `[N, 5]`."""
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).flatten(1))


# -------------------------------------------------------------------------------- the formulas


def enlarge(map_, size):
    """Bilinear, between the centres of cells, constant beyond the outermost: one axis, then the other."""
    values = np.asarray(map_, dtype=np.float64)
    for axis, new in enumerate(size):
        old = values.shape[axis]
        centres = (np.arange(new) + 0.5) * old / new - 0.5
        values = np.apply_along_axis(lambda line: np.interp(centres, np.arange(old), line), axis, values)
    return torch.from_numpy(values)


def heat_by_hand(maps, size):
    heats = [enlarge(map_.detach().clamp(min=0), size) for map_ in maps]
    return torch.stack([heat / heat.max() if heat.max() > 0 else heat for heat in heats]).float()


def cam_by_autograd(model, name, images, labels):
    """Grad-CAM in other words: `retain_grad` in a forward hook, and loops over images and channels."""
    model, kept, maps = copy.deepcopy(model).eval().requires_grad_(True), [], []
    model.get_submodule(name).register_forward_hook(lambda m, i, o: o.retain_grad() or kept.append(o))
    for image, label in zip(images, labels):
        kept.clear()
        model(image[None])[0, label].backward()
        (activations,), (gradients,) = kept[-1], kept[-1].grad
        maps.append(sum(a * g.mean() for a, g in zip(activations, gradients)))
    return heat_by_hand(maps, images.shape[2:])


@pytest.mark.parametrize("layer", ["features.3", "features.10", "features.20", "features.21", "features"])
def test_grad_cam_equals_an_independent_version(vgg, images, layer):
    labels = torch.tensor([0, 3, 9, 3])
    ours = grad_cam(vgg, images, labels, layer)
    assert ours.shape == (4, 32, 32) and ours.max() == 1
    assert torch.allclose(ours, cam_by_autograd(vgg, layer, images, labels), atol=1e-4)
    assert torch.equal(ours, grad_cam(vgg, images, labels, vgg.get_submodule(layer)))


@pytest.mark.parametrize(("make", "size", "layer", "name"), [
    (models.resnet18, (64, 96), None, "layer4"),
    (models.resnet18, (64, 64), "layer2.0.conv2", "layer2.0.conv2"),
    (models.mobilenet_v3_small, (64, 64), None, "features"),
    (models.mobilenet_v3_small, (64, 64), "features.3", "features.3")])
def test_grad_cam_on_torchvisions_networks(make, size, layer, name):
    model, x = make(num_classes=7), torch.randn(2, 3, *size)
    labels = torch.tensor([6, 0])
    ours, theirs = grad_cam(model, x, labels, layer), cam_by_autograd(model, name, x, labels)
    assert ours.shape == (2, *size) and model.training
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert np.corrcoef(ours.flatten(), theirs.flatten())[0, 1] > 0.9999


def test_cam_is_the_weighted_mean_of_the_last_maps(vgg, images):
    labels, kept = torch.tensor([1, 2, 3, 4]), []
    model = copy.deepcopy(vgg).eval()
    model.features.register_forward_hook(lambda m, i, o: kept.append(o))
    model(images)
    maps = [sum(w * channel for w, channel in zip(model.classifier[-1].weight[label], image))
            for label, image in zip(labels, kept[0])]
    assert torch.allclose(class_activation_map(vgg, images, labels), heat_by_hand(maps, (32, 32)), atol=1e-4)


@pytest.mark.parametrize("make", [
    lambda: SmallVGG(6, channels=(8, 12)), lambda: models.resnet18(num_classes=6),
    lambda: models.mobilenet_v2(num_classes=6), HeadFirst],
    ids=["SmallVGG", "resnet18", "mobilenet_v2", "HeadFirst"])
def test_cam_equals_grad_cam_on_the_last_maps(make):
    model, x = with_statistics(make(), 64), torch.randn(2, 3, 64, 64)
    assert torch.allclose(class_activation_map(model, x), grad_cam(model, x), atol=1e-3)


@pytest.mark.parametrize("make", [FunctionalEnd, lambda: models.densenet121(num_classes=5)],
                         ids=["FunctionalEnd", "densenet121"])
def test_cam_refuses_maps_that_a_functional_relu_changes(make):
    """A hook does not see it, so the maps would not give the logits: an error, and no wrong map."""
    with pytest.raises(ValueError, match="grad_cam takes any other"):
        class_activation_map(with_statistics(make(), 64), torch.randn(2, 3, 64, 64))


def test_saliency_equals_one_image_at_a_time(vgg, images):
    labels = torch.tensor([5, 1, 1, 0])
    model = copy.deepcopy(vgg).eval()
    for image, label, ours in zip(images, labels, saliency_map(vgg, images, labels)):
        x = image[None].clone().requires_grad_()
        model(x)[0, label].backward()
        assert torch.allclose(ours, x.grad[0].abs().max(dim=0).values, atol=1e-6)


def test_saliency_is_how_far_the_logit_moves_with_a_pixel(vgg, images):
    model, x = copy.deepcopy(vgg).double().eval(), images[:1].double()
    ours = saliency_map(model, x, torch.tensor([7]))
    with torch.no_grad():
        for row, column in ((0, 0), (15, 9), (31, 20)):
            slopes = []
            for channel in range(3):
                step = torch.zeros_like(x)
                step[0, channel, row, column] = 1e-6
                slopes.append((model(x + step)[0, 7] - model(x - step)[0, 7]) / 2e-6)
            assert ours[0, row, column] == pytest.approx(max(map(abs, slopes)).item(), rel=1e-4, abs=1e-7)


def test_saliency_finds_what_a_network_looks_at():
    """This network's second logit is the brightness of four pixels."""
    class Looker(nn.Module):
        def forward(self, x):
            seen = x[:, 0, 20:22, 8:10].mean(dim=(1, 2))
            return torch.stack([-seen, seen], dim=1)

    saliency = saliency_map(Looker(), torch.ones(1, 1, 32, 32))
    expected = torch.zeros(1, 32, 32)
    expected[0, 20:22, 8:10] = 0.25
    assert torch.equal(saliency, expected)


def test_default_labels_are_the_predicted_ones(vgg, images):
    predicted = copy.deepcopy(vgg).eval()(images).argmax(dim=1)
    for method in METHODS:
        assert torch.equal(method(vgg, images), method(vgg, images, predicted))
        assert not torch.equal(method(vgg, images), method(vgg, images, (predicted + 1) % 10))


def test_class_scores_are_the_logits_of_the_labels():
    logits = torch.tensor([[1.0, 5, 2], [9, 4, 3]])
    assert class_scores(logits, torch.tensor([2, 1])).tolist() == [2, 4]
    assert class_scores(logits, None).tolist() == [5, 9]


# -------------------------------------------------------------------------------- as_heat and others


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (2, 3), (30, 7)])
def test_as_heat_is_bilinear_without_what_is_negative(size):
    maps = torch.randn(5, 2, 3)
    maps[1] = -maps[1].abs()
    maps[2] *= 1e-30
    heat = as_heat(maps, size)
    assert torch.allclose(heat, heat_by_hand(maps, size), atol=1e-5)
    assert heat.shape == (5, *size) and not heat[1].any() and heat.min() >= 0
    assert heat.amax(dim=(1, 2)).tolist() == [1, 0, 1, 1, 1]


def test_as_heat_applies_relu_before_it_enlarges():
    heat = as_heat(torch.tensor([[[-1.0, 1.0]]]), (1, 4))[0, 0]  # centres at 1/4, 3/4 of the way
    assert heat.tolist() == pytest.approx([0, 0.25, 0.75, 1])


def test_overlay_by_hand():
    image = torch.full((3, 2, 2), 200, dtype=torch.uint8)
    image[0] = 50
    grey = (50 + 200 + 200) / 3 / 255
    heat = torch.tensor([[0.0, 1.0], [0.5, 0.0]], dtype=torch.float64)
    result = overlay(image, heat)
    assert result.shape == (3, 2, 2)
    assert result[:, 0, 0].tolist() == pytest.approx([grey] * 3)
    assert result[:, 0, 1].tolist() == pytest.approx([0.25 * grey + 0.75 * c for c in (1, 0.1, 0)])
    assert result[:, 1, 0].tolist() == pytest.approx([0.625 * grey + 0.375 * c for c in (1, 0.1, 0)])
    one_channel = overlay(torch.full((1, 4, 5), 255, dtype=torch.uint8), torch.zeros(4, 5))
    assert torch.allclose(one_channel, torch.ones(3, 4, 5))


def test_share_of_peaks_by_hand():
    maps, masks = torch.zeros(4, 2, 3), torch.zeros(4, 2, 3, dtype=torch.bool)
    for index, (row, column) in enumerate([(0, 0), (1, 2), (0, 1), (1, 0)]):
        maps[index, row, column] = 1 + index
    masks[0, 0, 0] = masks[1, 1, 2] = masks[2, 0, 1] = True  # the first three peaks
    masks[3] = True
    masks[3, 1, 0] = False  # everything but the peak
    assert share_of_peaks_on(masks, maps) == 0.75
    assert share_of_peaks_on(masks, maps - 9) == 0.75             # the highest, though all are negative
    assert share_of_peaks_on(~masks, maps) == 0.25


def test_share_of_peaks_on_others_by_hand():
    """Ten maps with peaks at ten places: on nine other masks, each peak lies on those that hold its place."""
    maps, masks = torch.eye(10).reshape(10, 2, 5), torch.zeros(10, 2, 5, dtype=torch.bool)
    masks[:, 0, 0] = True                                        # only the first map's peak is there
    assert share_of_peaks_on_others(masks, maps) == pytest.approx(0.1)
    its_own = torch.eye(10).reshape(10, 2, 5).bool()
    assert share_of_peaks_on(its_own, maps) == 1 and share_of_peaks_on_others(its_own, maps) == 0
    assert share_of_peaks_on_others(~its_own, maps) == 1


# -------------------------------------------------------------------------------- all of them


@each_method
def test_maps_of_zeros_stay_zero(images, method):
    model = SmallVGG(channels=(4, 4))
    nn.init.zeros_(model.classifier[-1].weight)
    assert torch.equal(method(model, images), torch.zeros(4, 32, 32))


def state_of_torch():
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.backends.cudnn.enabled,
            torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(), torch.get_rng_state().tolist())


@each_method
def test_everything_is_left_as_it_was(vgg, images, method):
    model = copy.deepcopy(vgg).train()
    model.features[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    given, torchs = images.clone().requires_grad_(), state_of_torch()
    heat = method(model, given)
    assert not heat.requires_grad and heat.isfinite().all()
    with torch.no_grad():
        assert torch.equal(method(model, given), heat) and not torch.is_grad_enabled()
    with pytest.raises(IndexError):
        method(model, given, torch.tensor([0, 1, 2, 99]))
    with pytest.raises(RuntimeError):
        method(model, given[:, :2])  # fails within the network
    assert state_of_torch() == torchs and torch.equal(given, images)
    assert given.grad is None and given.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in model.parameters())
    for module in model.modules():
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))


@each_method
def test_maps_in_inference_mode_are_the_same(vgg, images, method):
    labels = torch.tensor([3, 1, 4, 1])
    heat = method(vgg, images, labels)
    with torch.inference_mode():
        assert torch.equal(method(vgg, images.clone(), labels), heat)  # its images are made there too
        assert torch.equal(method(vgg, images, labels.clone()), heat)  # and its labels
        assert torch.is_inference_mode_enabled()
        assert method(vgg, images.clone()).shape == (4, 32, 32)


@each_method
def test_frozen_models_give_the_same_maps(vgg, images, method):
    frozen = copy.deepcopy(vgg).requires_grad_(False)
    assert torch.allclose(method(frozen, images), method(vgg, images), atol=1e-6)
    assert not any(p.requires_grad for p in frozen.parameters())


@each_method
def test_double_precision_is_kept(vgg, images, method):
    heat = method(copy.deepcopy(vgg).double(), images.double(), torch.tensor([1, 2, 3, 4]))
    assert torch.allclose(heat.float(), method(vgg, images, torch.tensor([1, 2, 3, 4])), atol=1e-3)
    if method in METHODS[:3]:
        assert heat.dtype == torch.float64


@each_method
def test_layers_may_be_registered_in_any_order_and_be_unused(method, images):
    model = HeadFirst()
    plain = model.in_order()
    assert torch.allclose(method(model, images), method(plain, images), atol=1e-5)


@each_method
def test_images_need_not_be_square(vgg, method):
    x, model = torch.randn(2, 3, 24, 40).double(), copy.deepcopy(vgg).double()
    heat = method(model, x)
    assert heat.shape == (2, 24, 40)
    assert torch.allclose(method(model, x[1:]), heat[1:], atol=1e-4)  # each image for itself


# -------------------------------------------------------------------------------- layers of Grad-CAM


def test_in_place_activations_behind_the_layer_do_no_harm(images):
    nets = [nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=inplace), nn.Conv2d(6, 8, 3, stride=2),
                          nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
            for inplace in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    for layer in (None, "0", "2", "3"):
        assert torch.equal(grad_cam(nets[0], images, layer=layer), grad_cam(nets[1], images, layer=layer))
    maps = [feature_maps(net, images, ["0", "2"]) for net in nets]
    assert all(torch.equal(maps[0][name], maps[1][name]) for name in ("0", "2"))
    assert maps[1]["0"].min() < 0


@pytest.mark.parametrize(("side", "last"), [(64, "layer4"), (33, "layer4"), (32, "layer3"), (16, "layer2")])
def test_the_default_layer_is_the_last_with_an_extent(side, last):
    model, x = models.resnet18(num_classes=4), torch.randn(2, 3, side, side)
    heat = grad_cam(model, x)
    assert torch.equal(heat, grad_cam(model, x, layer=last))
    others = {"layer1", "layer2", "layer3", "layer4"} - {last}
    assert not any(torch.allclose(heat, grad_cam(model, x, layer=layer), atol=1e-2) for layer in others)


def test_maps_that_are_one_cell_high_have_an_extent(images):
    model = nn.Sequential(nn.Conv2d(3, 4, (32, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 3))
    assert torch.equal(grad_cam(model, images), grad_cam(model, images, layer="1"))
    assert torch.allclose(class_activation_map(model, images), grad_cam(model, images), atol=1e-4)


def test_a_pooled_map_knows_no_place(vgg, images):
    model = copy.deepcopy(vgg).eval()                            # 1×1: one constant for each image
    with torch.no_grad():
        evidence = model(images) - model.classifier[-1].bias     # what the features say for each class
    assert evidence.max() > 0 > evidence.min()
    for labels in (evidence.argmax(dim=1), evidence.argmin(dim=1)):
        expected = (evidence[range(4), labels] > 0).float()[:, None, None].expand(-1, 32, 32)
        assert torch.allclose(grad_cam(vgg, images, labels, "pool"), expected, atol=1e-6)


def test_a_map_of_a_single_column_is_larger_than_one_pixel():
    model = nn.Sequential(nn.Conv2d(3, 4, (5, 8)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(2, 3, 8, 8)                                  # [2, 4, 4, 1] after the convolution
    assert torch.equal(grad_cam(model, x), grad_cam(model, x, layer="1"))
    assert torch.allclose(class_activation_map(model, x), grad_cam(model, x), atol=1e-5)


def test_a_module_that_is_used_twice_counts_as_its_last_use(images):
    model = HeadFirst()
    plain = model.in_order()
    ours, theirs = grad_cam(model, images, layer="relu"), grad_cam(plain, images, layer="3")
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.equal(feature_maps(model, images, ["relu"])["relu"], feature_maps(plain, images, ["3"])["3"])


@pytest.mark.parametrize("make", [models.squeezenet1_1, models.densenet121])
def test_networks_of_other_families_work_too(make):
    model, x = make(num_classes=6), torch.randn(2, 3, 64, 64)
    heat = grad_cam(model, x, torch.tensor([5, 0]))
    assert heat.shape == (2, 64, 64) and heat.min() >= 0 and heat.max() <= 1 and model.training
    assert saliency_map(model, x).shape == (2, 64, 64)


@pytest.mark.parametrize(("call", "kind", "message"), [
    (lambda m, x: grad_cam(m, x, layer="features.99"), AttributeError, "has no attribute `99`"),
    (lambda m, x: grad_cam(m, x, layer=nn.ReLU()), ValueError, "grad_cam: expected a layer with outputs"),
    (lambda m, x: grad_cam(m, x, layer="classifier.2"), ValueError, r"outputs \[N, channels, h, w\]"),
    (lambda m, x: grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), x), ValueError, "grad_cam: exp"),
    (lambda m, x: grad_cam(nn.Sequential(nn.Conv2d(3, 2, 32), nn.Flatten()), x), ValueError, "grad_cam: exp"),
    (lambda m, x: feature_maps(m, x, ["nowhere"]), AttributeError, "SmallVGG has no attribute `nowhere`"),
    (lambda m, x: grad_cam(m, (x * 9).byte()), RuntimeError, "only Tensors of floating point"),
    (lambda m, x: class_activation_map(SimpleCNN(10, 3, 32), x), ValueError, "ends in global average"),
    (lambda m, x: class_activation_map(models.squeezenet1_1(), x), ValueError, "grad_cam takes any other"),
    (lambda m, x: class_activation_map(nn.Flatten(), x), ValueError, "class_activation_map: expected"),
])
def test_wrong_input_is_refused_in_one_line(vgg, images, call, kind, message):
    with pytest.raises(kind, match=message) as error:
        call(vgg, images)
    assert len(str(error.value).splitlines()) == 1


def test_max_pooling_is_not_average_pooling(images):
    """CAM would look right here, and be wrong."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
                          nn.Linear(4, 3))
    with pytest.raises(ValueError, match="global average pooling"):
        class_activation_map(model, images)
    two_layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                               nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="one linear layer"):
        class_activation_map(two_layers, images)


# -------------------------------------------------------------------------------- maps and filters


def test_feature_maps_are_what_the_layers_give(vgg, images):
    model = copy.deepcopy(vgg).train()
    model.features[2].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    names = ["features.21", "features.0", "classifier", "classifier.2"]
    maps = feature_maps(model, images, names)
    assert list(maps) == names and not any(value.requires_grad for value in maps.values())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(maps["features.0"], model.features[0](images))
        assert torch.equal(maps["features.21"], model.features(images))
        assert torch.equal(maps["classifier"], model(images))
    assert torch.equal(maps["classifier.2"], maps["classifier"])


def drawn_images(figure):
    return [ax.get_images()[0] for ax in figure.axes if ax.get_images()]


def test_filters_with_one_channel_share_a_scale_around_zero():
    weight = nn.Parameter(torch.randn(11, 1, 5, 3))
    figure = plot_filters(weight, [f"kernel {i}" for i in range(11)], "kernels")
    shown = drawn_images(figure)
    assert len(shown) == 11 and len(figure.axes) == 16  # eight to a row
    for picture, kernel in zip(shown, weight.detach()):
        assert np.array_equal(picture.get_array(), kernel[0])
        assert picture.get_clim() == pytest.approx((-weight.abs().max().item(), weight.abs().max().item()))
        assert picture.get_cmap().name == "RdBu_r"  # red: positive
    assert [ax.get_title() for ax in figure.axes[:11]] == [f"kernel {i}" for i in range(11)]
    assert figure.get_suptitle() == "kernels"
    plt.close(figure)


def test_filters_with_three_channels_are_colours_on_their_own_scale():
    weight = torch.randn(4, 3, 7, 7) * torch.tensor([1e-3, 1.0, 50.0, 1.0])[:, None, None, None]
    weight[3] = 0
    figure = plot_filters(weight)
    shown = [picture.get_array() for picture in drawn_images(figure)]
    for kernel, pixels in zip(weight[:3], shown):
        expected = (0.5 + kernel / kernel.abs().max() / 2).permute(1, 2, 0)
        assert np.allclose(pixels, expected, atol=1e-6)
    assert np.array_equal(shown[3], np.full((7, 7, 3), 0.5))  # a kernel of zeros is grey
    plt.close(figure)


# -------------------------------------------------------------------------------- slide (section 4.7)


@pytest.mark.parametrize(("classes", "channels", "side"), [(10, 1, 28), (3, 1, 28), (37, 3, 16)])
def test_slide_equals_the_network_at_every_place(classes, channels, side):
    model = SimpleCNN(classes, channels, side)
    x = torch.randn(2, channels, side, side)
    with torch.no_grad():
        assert torch.allclose(slide(model, x)[:, :, 0, 0], model(x), atol=1e-4)
        wide = torch.randn(2, channels, side + 9, 2 * side + 4)
        logits, maps = slide(model, wide), model.conv_block2(model.conv_block1(wide))
        assert logits.shape == (2, classes, 3, side // 4 + 2)
        for row, column in np.ndindex(*logits.shape[2:]):
            window = maps[:, :, row:row + side // 4, column:column + side // 4].flatten(1)
            assert torch.allclose(logits[:, :, row, column], model.fc(window), atol=1e-4)
