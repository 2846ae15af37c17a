# %% [markdown]
"""
# Convolutional neural networks, from one kernel to a trained network

Run it from top to bottom (`--help` lists the options), step through the notebook of the same name, or import what you
need. Images are `[N, C, H, W]` throughout: image, channel, row, column. An `assert`, a number or a picture beside it
bears out what is claimed of a run. `tests/test_exercises.py` answers the exercises.

What its networks reach: medians of three seeds (on MNIST five) by `python tests/benchmark.py speed --only mnist
recipes` on two cores of an AMD EPYC (Zen 5, AVX-512) with torch 2.15.0; SmallVGG in bfloat16, which is faster there:

| network | data | test accuracy | training |
|---|---|---|---|
| SimpleCNN | MNIST: 60,000 images, tested on 10,000 | 99.43% ± 0.08% | 28 s |
| LeNet-5 | the same | 99.32% ± 0.08% | 14 s |
| SimpleCNN | 5,000 bundled digits: 4,000 images, tested on 1,000 | 98.0% ± 0.4% | 3 s |
| LeNet-5 | the same | 98.0% ± 0.4% | 2 s |
| SmallVGG | CIFAR-10 (JPEG copy): 50,000 images, tested on 10,000 | 84.2% ± 0.4% | 137 s |

± is the standard error for so many test images; recipes were compared on the same, which flatters them a little. The
JPEG copy is CIFAR-10 after one pass through JPEG: near to it only.
"""
# %%
import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, models
from torchvision.transforms import v2
from tqdm import tqdm

from data import ImageData, colour_digits, load_photo, load_resnet18, resnet18_preprocessing
from data.augment import random_affine, random_shift, shift_and_flip
from data.checkpoints import Keeper, print_epoch
from data.modules import (activation_bytes, check_finite, check_images, check_labels, check_recipe,
                          check_shape, class_scores, count_parameters, differentiable, evaluating,
                          feature_layer, find_layer, joined_processes, layer_table, patch_places,
                          pooled_maps_and_linear, rank_and_world, recording, seeded, share_and_hits)
from data.options import (Results, load_data, parse_options, print_class_accuracies,
                          recipe_changes, start, write_results)
from data.pictures import predict, train_on_folder, write_as_files
from data.plots import (plot_architectures, plot_channels, plot_confusion, plot_curves,
                        plot_effects, plot_feature_maps, plot_filters, plot_history, plot_images,
                        plot_maps, plot_mistakes, plot_strip)
from data.speed import FORMATS, choose_speed

IN_NOTEBOOK = "ipykernel" in sys.modules
track = partial(tqdm, leave=False, disable=None)  # a progress bar, on a terminal only


def show_figure(figure: plt.Figure, name: str) -> None:
    """Save the figure as `name`.png and close it; a notebook shows it below the cell instead."""
    if not IN_NOTEBOOK:
        figure.savefig(options.output_dir / f"{name}.png")
        if options.show:
            plt.show()
        plt.close(figure)


options = parse_options([])  # the defaults; the next cell reads yours
# %%
if __name__ == "__main__":
    options = start(IN_NOTEBOOK)
    device = (options.device or torch.accelerator.current_accelerator(check_available=True)
              or torch.device("cpu"))
    print(f"torch {torch.__version__} on {device}")
    digits, mnist, photos = load_data(options)
    results = Results()  # everything that is measured below, for the table at the end

# %% [markdown]
"""
## 0 A classifier in 25 lines
Before any theory, the whole thing: 4,000 real handwritten digits from MNIST, two convolutions, a loop. In seconds it
gets about 96 of 100 new digits right. Every line is explained below: layers in 1 and 2, the network in 3, the loop in
4.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    pixels = digits.train_images.float() / 255                   # [4000, 1, 28, 28], from 0 to 1
    model = nn.Sequential(
        nn.Conv2d(in_channels=1, out_channels=16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(in_channels=16, out_channels=32, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)   # what changes the weights
    for epoch in range(3):                                       # three times through all images
        for batch in torch.randperm(len(pixels)).split(32):      # 32 images at a time, shuffled
            logits = model(pixels[batch])                        # [32, 10], one score a class
            loss = F.cross_entropy(logits, digits.train_labels[batch])
            optimizer.zero_grad()                                # else gradients add up
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        predictions = model(digits.test_images.float() / 255).argmax(dim=1)
    accuracy = (predictions == digits.test_labels).float().mean().item()
    print(f"{accuracy:.1%} of {len(predictions):,} digits that it has never seen")
    assert accuracy > 0.94

# %% [markdown]
"""
*Exercises 0.* a) How many parameters has this network? b) How many digits would a guess get right?

## 1 Why convolutions
### 1.1 What a convolutional network is
A convolutional neural network (CNN) looks for small patterns everywhere in a grid of numbers: an image (2-D), a sound
(1-D), a sentence with a column for each word. Its first layer finds edges, the next corners and strokes, later ones
parts and objects. Three ideas make that cheap: each output looks at a small neighbourhood (1.2), the same few weights
serve at every place (1.3), and neighbourhoods are summarised (1.4).

A convolution is a linear layer under two constraints. Push the columns of an identity matrix through it, as images, and
what comes out is the matrix that it stands for: mostly zeros, and the same nine values again in every row.
"""
# %%
if __name__ == "__main__":
    dense = nn.Linear(3 * 32 * 32, 16 * 32 * 32, device="meta")  # shapes only: it has 200 MB
    for layer in dense, nn.Conv2d(3, 16, kernel_size=3, padding=1):
        print(f"3×32×32 to 16×32×32: {count_parameters(layer):10,} parameters, {layer}")

    conv = nn.Conv2d(1, 1, kernel_size=3, bias=False).requires_grad_(False)
    identity = torch.eye(64).reshape(64, 1, 8, 8)                # 64 images of one bright pixel
    matrix = conv(identity).reshape(64, 36).T                    # [36 outputs, 64 inputs]
    image = torch.randn(1, 1, 8, 8)
    assert torch.allclose(matrix @ image.flatten(), conv(image).flatten(), atol=1e-6)
    print(f"as a matrix: {matrix.count_nonzero()} of {matrix.numel():,} entries are not zero, "
          f"with {len(matrix[matrix != 0].unique())} different values")
    show_figure(plot_images({"a 3×3 convolution of an 8×8 image as a matrix": matrix}, size=4,
                            cmap="RdBu_r", vmin=-0.5, vmax=0.5), "1_1_convolution_as_matrix")

    # In one dimension: a kernel shaped like a 440 Hz wave answers to that, not to its octave.
    turns = torch.tensor([[[440.0]], [[880]]]) * torch.arange(8000) / 16_000
    sounds = torch.sin(2 * math.pi * turns)                      # [2, 1, 8000]: half a second each
    tone_detector = nn.Conv1d(1, 1, kernel_size=400, bias=False)
    tone_detector.weight.data = sounds[:1, :, :400] / 200
    print("answers to 440 and 880 Hz:", *(f"{x.max():.2f}" for x in tone_detector(sounds)))

# %% [markdown]
"""
### 1.2 Local receptive fields
The receptive field of an output is the part of the input that it can see. Each layer adds `kernel_size - 1` steps to
its side, where a step is the product of the strides (how far kernels move, 2.1) before: strides make it grow fast.
"""
# %%
def receptive_field(layers: Sequence[tuple[int, int]]) -> int:
    """Return the side, in pixels, of what one output sees through (kernel size, stride) layers."""
    size, step = 1, 1
    for kernel_size, stride in layers:
        size += (kernel_size - 1) * step
        step *= stride
    return size
# %%
if __name__ == "__main__":
    stacks = {"two 3×3": [(3, 1)] * 2, "one 5×5": [(5, 1)], "four 3×3 of stride 2": [(3, 2)] * 4,
              "5×5 and 2×2 pooling, twice": [(5, 1), (2, 2)] * 2}
    for name, layers in stacks.items():
        print(f"{name:26} sees {receptive_field(layers):2} pixels along each axis")

# %% [markdown]
"""
### 1.3 Shared weights make it equivariant
With the same weights at every place, a shift of the input shifts the output along: whatever is learnt in one corner is
known in all. That is *equivariance*, and it has limits. At borders, zeros put around the image (padding) join in.
Behind a 2×2 pooling a step stands for two: a shift by two passes as a shift by one, a shift by one cannot.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    photo = load_photo().float().mean(dim=0)[None, None] / 255   # [1, 1, 600, 512], grey
    patch = photo[:, :, 170:234, 170:234]                        # the glasses
    conv = nn.Conv2d(1, 1, kernel_size=5, padding=2).requires_grad_(False)
    shifted = partial(torch.roll, dims=3)                        # by pixels, around the edge
    shift_then_conv, conv_then_shift = conv(shifted(patch, 6)), shifted(conv(patch), 6)
    difference = (shift_then_conv - conv_then_shift).abs()
    inner = (..., slice(8, -8), slice(8, -8))                    # away from the borders
    print(f"difference: inside {difference[inner].max():.1e}, at borders {difference.max():.2f}")
    assert difference[inner].max() < 1e-5 < difference.max()
    pooled, pooled_1, pooled_2 = (F.max_pool2d(conv(shifted(patch, s)), 2) for s in (0, 1, 2))
    assert torch.allclose(pooled_2[inner], shifted(pooled, 1)[inner], atol=1e-5)
    closest = min((pooled_1 - shifted(pooled, s))[inner].abs().max() for s in (0, 1))
    print(f"after 2×2 pooling: a shift by 2 pixels passes exactly, by 1 is off by {closest:.2f}")
    show_figure(plot_images({"photo": patch, "shifted by 6": shifted(patch, 6),
                             "shifted, convolved": shift_then_conv,
                             "convolved, shifted": conv_then_shift,
                             "their difference": difference}, size=1.9), "1_3_equivariance")

# %% [markdown]
"""
### 1.4 Pooling makes it a little invariant
Often only *whether* and *roughly where* matters. Pooling keeps one number for a neighbourhood: its maximum or mean. The
more is pooled, the less a shift by one pixel changes; the maximum of the whole map has even forgotten where it was.
"""
# %%
if __name__ == "__main__":
    sobel = torch.tensor([[[[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]]])  # answers to vertical edges
    sample = digits.test_images[:200].float() / 255
    here, there = (F.conv2d(x, sobel, padding=1) for x in (sample, shifted(sample, 1)))
    print("edges of digits; what a step of one pixel changes in the maximum over")
    for side in (1, 2, 4, 7, 14, 28):
        a, b = F.max_pool2d(here, side), F.max_pool2d(there, side)
        print(f"  {side:2} × {side:2}: {(b - a).norm() / a.norm():4.0%}")
    assert torch.equal(a, b)

# %% [markdown]
"""
*Exercises 1.* a) What side do three 3×3 convolutions of stride 2 see? b) 28×28 pixels to 100 outputs, or to 100 maps
by 3×3: how many parameters each? c) Which shifts pass exactly through two 2×2 poolings?

## 2 The layers
### 2.1 Convolution: `nn.Conv2d`
A kernel slides over the image; at each place it is multiplied with what lies under it, and the products are added up. A
layer has `out_channels` kernels, each as deep as the input (`in_channels`), so its weight is `[out, in, height, width]`
and each kernel gives one *feature map*. Its settings, each an int or a pair (rows, columns):

- `kernel_size`: the neighbourhood; `stride`: how far it moves, 2 halves the map; `dilation`: gaps between its cells;
- `padding`: zeros around the image; `"same"` keeps the size (stride 1 only);
- `groups`: split the channels into groups that do not see each other; `groups=in_channels`: a kernel sees one channel.

The output has ⌊(size + 2·padding − dilation·(kernel_size − 1) − 1) / stride⌋ + 1 rows, and likewise columns. The first
picture shows which pixels the first output reads (blue), which its neighbour (green), and which both (yellow).
"""
# %%
def conv_output_size(size: int, kernel_size: int, stride: int = 1, padding: int = 0,
                     dilation: int = 1) -> int:
    """Return the output size of a convolution or pooling along one dimension, in pixels."""
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def conv2d_by_hand(x: Tensor, weight: Tensor, bias: Tensor | None = None,
                   stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
                   dilation: int | tuple[int, int] = 1) -> Tensor:
    """Compute what `F.conv2d` computes (with one group), one kernel cell after the other.

    From x `[N, in_channels, H, W]`, weight `[out_channels, in_channels, kernel_h, kernel_w]` and
    bias `[out_channels]` to `[N, out_channels, H_out, W_out]`, sizes as `conv_output_size` says.
    """
    (stride_y, stride_x), (pad_y, pad_x), (gap_y, gap_x) = (
        setting if isinstance(setting, tuple) else (setting, setting)
        for setting in (stride, padding, dilation))
    kernel_h, kernel_w = weight.shape[2:]
    height = conv_output_size(x.shape[2], kernel_h, stride_y, pad_y, gap_y)
    width = conv_output_size(x.shape[3], kernel_w, stride_x, pad_x, gap_x)
    x = F.pad(x, (pad_x, pad_x, pad_y, pad_y))
    output = x.new_zeros(len(x), len(weight), height, width)
    for i in range(kernel_h):
        for j in range(kernel_w):  # what lies under cell (i, j), for all places at once
            under = x[:, :, i * gap_y::stride_y, j * gap_x::stride_x][:, :, :height, :width]
            output += torch.einsum("nchw,oc->nohw", under, weight[:, :, i, j])
    return output if bias is None else output + bias[:, None, None]
# %%
if __name__ == "__main__":
    x = torch.randn(2, 6, 13, 17)
    cases = list(product((1, (2, 3), 5), (1, 2, (3, 1)), (0, 1, (2, 4)), (1, 2, (1, 3))))
    for kernel_size, stride, padding, dilation in cases:
        conv = nn.Conv2d(6, 4, kernel_size, stride, padding, dilation)
        by_hand = conv2d_by_hand(x, conv.weight, conv.bias, stride, padding, dilation)
        assert conv(x).shape == by_hand.shape and torch.allclose(conv(x), by_hand, atol=1e-5)
    print(f"formula and hand-written convolution equal PyTorch's in {len(cases)} settings")

    # Mathematicians flip the kernel before it slides; deep learning does not: cross-correlation.
    slid = F.conv1d(torch.tensor([[[1.0, 2, 4, 8]]]), torch.tensor([[[1.0, 0, -1]]]))
    assert slid.flatten().tolist() == np.convolve([1, 2, 4, 8], [-1, 0, 1], mode="valid").tolist()

    for name, value in ("padding", "same"), ("stride", 2), ("groups", 2), ("groups", 6):
        conv = nn.Conv2d(6, 12, kernel_size=3, **{name: value})
        print(f"{name}={value}: {[*x.shape]} to {[*conv(x).shape]}, weight {[*conv.weight.shape]}")

    # Which pixels does an output read? The gradient knows: here for the first output and the next.
    pictures = {}
    for name, value in ("padding", 0), ("padding", 1), ("stride", 2), ("dilation", 2):
        dots = torch.zeros(1, 1, 7, 7, requires_grad=True)
        output = F.conv2d(dots, torch.ones(1, 1, 3, 3), **{name: value})
        read = [torch.autograd.grad(output[0, 0, 0, k], dots, retain_graph=True)[0] for k in (0, 1)]
        pictures[f"{name}={value}: 7×7 to {[*output.shape[2:]]}"] = read[0] + 2 * read[1]
    show_figure(plot_images(pictures, size=2, grid=True, cmap="viridis", vmin=0, vmax=3),
                "2_1_stride_padding_dilation")

    # Kernels need not be learnt: Sobel's (1968) takes what is left of a pixel from what is right.
    edges = F.conv2d(photo, torch.cat([sobel, sobel.mT]), padding=1)[0]  # [2, 600, 512]: two maps
    show_figure(plot_images({
        "photo": photo, "vertical edges": edges[0].abs(), "horizontal edges": edges[1].abs(),
        "strength of both": edges.norm(dim=0)}, size=2.3), "2_1_edges")

# %% [markdown]
"""
### 2.2 Activation: `nn.ReLU`
Convolutions are linear, and two linear maps in a row are only one; something that bends must stand between them. ReLU,
max(0, x), is the cheapest: it passes positive answers and sets all others to zero.
"""
# %%
if __name__ == "__main__":
    a, b = torch.randn(2, 1, 1, 16, 16)
    linear = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 1, 3, bias=False))
    bent = nn.Sequential(linear[0], nn.ReLU(), linear[1])
    assert torch.allclose(linear(a + b), linear(a) + linear(b), atol=1e-5)
    assert not torch.allclose(bent(a + b), bent(a) + bent(b), atol=1e-2)
    before = edges[0, 20:320, 100:400]
    after = before.relu()
    print(f"zeros: {(before == 0).float().mean():.0%}, then {(after == 0).float().mean():.0%}")
    show_figure(plot_images({"before ReLU: two signs": before, "after: the positive, red": after},
                            size=3, cmap="RdBu_r", vmin=-1.5, vmax=1.5), "2_2_relu")

# %% [markdown]
"""
### 2.3 Pooling: `nn.MaxPool2d`, `nn.AvgPool2d`
One number for each neighbourhood. The stride, if not given, is the kernel size: neighbourhoods do not overlap. The
maximum keeps a strong answer at full strength, the average dilutes it. Pooling has no parameters and takes none away
from convolutions; it saves work behind it, and parameters only where a linear layer reads the whole map.
"""
# %%
if __name__ == "__main__":
    feature_map = edges[0].abs()[None, None, 40:104, 200:264]    # the badge on the cap
    pools = {"maximum": nn.MaxPool2d(kernel_size=8), "average": nn.AvgPool2d(kernel_size=8)}
    assert pools["maximum"].stride == 8 and not list(pools["maximum"].parameters())
    maps = {"map": feature_map} | {name: pool(feature_map) for name, pool in pools.items()}
    assert (maps["maximum"] >= maps["average"]).all()
    show_figure(plot_images({f"{k} {[*x.shape]}, peak {x.max():.1f}": x for k, x in maps.items()},
                            size=2.4, vmin=0, vmax=feature_map.max()), "2_3_pooling")
    counts = [count_parameters(nn.Linear(32 * size * size, 10)) for size in (28, 14, 7)]
    print("parameters of a linear layer behind 32 maps of 28×28, 14×14 and 7×7 pixels:", *counts)

# %% [markdown]
"""
### 2.4 Flatten and `nn.Linear`: from maps to answers
Feature maps say what is where. `nn.Flatten` lays them out as one row of numbers and `nn.Linear` weighs them. The same
base serves any question: ten numbers and a cross-entropy make it a classifier, two numbers and a squared error a
regression. Here the latter learns where the centre of the ink is, on digits moved at random (MNIST has centred them
all).
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    base = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(),
                         nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(), nn.Flatten())
    classifier = nn.Sequential(base, nn.Linear(16 * 4 * 4, 10))  # 10 scores
    regressor = nn.Sequential(base, nn.Linear(16 * 4 * 4, 2))    # a row and a column
    print(*(f"{model(pixels[:64]).shape}" for model in (classifier, regressor)))
    optimizer = torch.optim.AdamW(regressor.parameters(), lr=3e-3)
    place = torch.arange(28) - 13.5                              # in pixels from the middle
    for step in range(151):
        batch = digits.train_images[torch.randint(len(pixels), (64,))]
        x = random_shift(batch, pixels=4) / 255                  # each image by its own draw
        centres = torch.stack([x.sum(dim=(1, 3)) @ place, x.sum(dim=(1, 2)) @ place], dim=1)
        centres /= x.sum(dim=(1, 2, 3))[:, None]                 # [64, 2]: mean row, mean column
        loss = F.mse_loss(regressor(x), centres)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}: off by {loss.sqrt():.2f} pixels along each axis")
    assert loss.sqrt() < 1

# %% [markdown]
"""
### 2.5 Batch normalisation: `nn.BatchNorm2d`
For each channel, over all images and pixels of the batch: subtract the mean, divide by the standard deviation, scale
and shift by two learnt numbers (Ioffe & Szegedy 2015). That allows larger learning rates (8.1). Four things to know:

- In training it uses the batch's own statistics and keeps a running average; after `eval()` it uses that average.
- So in training each image's output depends on the others in its batch. In evaluation it does not.
- The mean is subtracted, so a bias of the convolution before it would be lost: `bias=False`.
- The paper puts it before the activation, and so does ResNet. After the activation works too.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    conv, norm = nn.Conv2d(1, 4, kernel_size=5, bias=False), nn.BatchNorm2d(4)
    x = conv(pixels[:256]).detach().requires_grad_()             # [256, 4, 24, 24]
    normalised = norm(x)                                         # in training mode
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
    assert torch.allclose(normalised, (x - mean) / (variance + norm.eps).sqrt(), atol=1e-4)
    assert torch.allclose(norm.running_mean, 0.1 * mean.flatten())  # 0.9 · old + 0.1 · new
    assert torch.allclose(norm(x), norm(x + 3), atol=1e-4)       # a bias before it changes nothing

    show_figure(plot_channels({"four channels": x, "normalised": normalised}), "2_5_norm")
    for training in (True, False):
        norm.train(training)
        (gradient,) = torch.autograd.grad(norm(x)[0].square().sum(), x)  # of the first output
        others = gradient[1:].abs().mean().item()                        # by all other images
        print(f"training={training!s:5}: mean gradient of one output by other images: {others:.2g}")
        assert (others > 0) == training

# %% [markdown]
"""
### 2.6 Dropout: `nn.Dropout`, `nn.Dropout2d`
In training, set a random share of the numbers to zero and scale the rest up to the same sum on average: no unit can
rely on any other (Srivastava et al. 2014). `nn.Dropout` drops single numbers. In a map a dropped pixel's neighbours
tell the same, so `nn.Dropout2d` drops whole channels (Tompson et al. 2015). After `eval()` both do nothing.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    maps = F.conv2d(pixels[:1], torch.randn(6, 1, 5, 5), padding=2).relu()  # [1, 6, 28, 28]
    single, channel = nn.Dropout(0.5), nn.Dropout2d(0.5)
    rows = torch.cat([maps, single(maps), channel(maps)])        # [3, 6, 28, 28]
    assert torch.equal(rows[1], 2 * maps[0] * (rows[1] != 0))    # 1 / (1 - 0.5)
    assert torch.equal(single.eval()(maps), maps) and torch.equal(channel.eval()(maps), maps)
    titles = ["feature map"] * 6 + ["Dropout(0.5)"] * 6 + ["Dropout2d(0.5)"] * 6
    show_figure(plot_images(list(rows.flatten(0, 1)), titles, columns=6, size=1.3, vmin=0,
                            vmax=1.2 * maps.max()), "2_6_dropout")

# %% [markdown]
"""
*Exercises 2.* a) 32 pixels, kernel 5, stride 2, padding 1: what size comes out? b) Which padding keeps the size for
kernel 3, dilation 2? c) Give the edge filter a diagonal direction. d) What does `Dropout(0.25)` multiply by?

## 3 A basic network
### 3.1 The pattern
Most classifiers follow one pattern: INPUT → [CONV → ACT → POOL]×N → FLATTEN → [FC → ACT]×M → FC, where FC (fully
connected) is a linear layer. On the way maps shrink and channels grow: less *where*, more *what*. The last layer gives
one raw score a class, the *logits*; no softmax, since the loss will apply it (4.2). Pictures are stored as bytes, 0 to
255. Networks train best on numbers around zero, so from here on every image goes through `standardize` first, with the
mean and spread of MNIST's or CIFAR-10's pixels.

### 3.2 `SimpleCNN`
N = 2, M = 0: two blocks of a 5×5 convolution, ReLU and 2×2 max-pooling, of 16 and 32 channels, and a linear layer.
"""
# %%
# By channels: mean and standard deviation of MNIST's and of CIFAR-10's pixels, [2, C, 1, 1]
PIXELS = {len(values[0]): 255 * torch.tensor(values)[:, :, None, None] for values in (
    ([0.1307], [0.3081]), ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))}


def standardize(images: Tensor) -> Tensor:
    """Turn `uint8 [N, C, H, W]` into `float32` of about mean 0 and standard deviation 1.

    C is 1 (then with MNIST's constants) or 3 (CIFAR-10's); else a `ValueError`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in PIXELS:
        raise ValueError("standardize: expected uint8 [N, 1 or 3, H, W], "
                         f"got {images.dtype} {list(images.shape)}")
    mean, std = PIXELS[images.shape[1]].to(images.device)
    return (images - mean).div_(std)


class SimpleCNN(nn.Module):
    """Two convolution blocks and a linear layer; `image_size` is a multiple of 4 pixels."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"image_size: expected a multiple of 4, got {image_size}")
        self.image_shape = (in_channels, image_size, image_size)
        self.conv_block1 = nn.Sequential(
            nn.Conv2d(in_channels, 16, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.conv_block2 = nn.Sequential(
            nn.Conv2d(16, 32, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.fc = nn.Linear(32 * (image_size // 4) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `float32 [N, in_channels, image_size, image_size]` to logits `[N, num_classes]`."""
        check_shape(self, x, self.image_shape)                   # else a ValueError
        x = self.conv_block1(x)
        x = self.conv_block2(x)
        return self.fc(x.flatten(start_dim=1))

# %% [markdown]
"""
### 3.3 Layer by layer, and 3.4 checks before the first flight
The table shows shapes and parameters. Then three checks find most mistakes before any time is spent on training:

- What does it see? The gradient of one unit with respect to the input is zero outside its receptive field.
- Does it start undecided? Ten equal scores give a loss of ln 10 = 2.303. Much more, and it starts with strong opinions.
- Can it learn at all? It must be able to learn one small batch by heart. If not, the bug is in the code, not the data.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    model, seen = SimpleCNN(), []
    print(layer_table(model, (1, 28, 28)))
    colour_model = SimpleCNN(in_channels=3, image_size=32)
    assert (count_parameters(model), count_parameters(colour_model)) == (28_938, 34_538)

    noise = torch.randn(64, 1, 28, 28, requires_grad=True)
    for blocks, middle in (1, 7), (2, 3):
        maps = nn.Sequential(*list(model.children())[:blocks])(noise)
        (gradient,) = torch.autograd.grad(maps[:, :, middle, middle].sum(), noise)
        seen.append(gradient.abs().sum(dim=(0, 1)))
        side = int((seen[-1] > 0).any(dim=0).sum())
        assert side == receptive_field([(5, 1), (2, 2)] * blocks)
        print(f"the gradient reaches {side} × {side} pixels, as the arithmetic of 1.2 says")
    show_figure(plot_images(seen, ["seen by one unit of block 1", "of block 2"], size=2.6,
                            cmap="viridis"), "3_4_receptive_field")

    few, labels = standardize(digits.train_images[:64]), digits.train_labels[:64]
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(40):
        loss = F.cross_entropy(model(few), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"one batch of 64: first loss {losses[0]:.3f} (ln 10 is 2.303), last {losses[-1]:.4f}")
    assert abs(losses[0] - math.log(10)) < 0.3 and losses[-1] < 0.05

# %% [markdown]
"""
*Exercises 3.* a) SimpleCNN for 26 letters: how many parameters? b) With 100 classes, what first loss? c) Add a third
block, of 64 channels, for 32×32 pixels: what does `fc` see?

## 4 Training
### 4.1 Data and augmentation
`torchvision.datasets` gives pictures and labels by index; `torchvision.transforms.v2` resizes, crops, flips, rotates,
jitters colours, normalises. Random changes are *augmentation*: the network sees each picture in many versions and
learns that they mean the same. So use only changes that keep the label: both digits and photos may be shifted, turned
and scaled a little, but only photos flipped left to right (a mirrored 2 is no digit) or jittered in colour.

One trap: a v2 transform draws once for each call. Given a batch, it makes the same crop of every image in it. The
functions used below draw for each image of a batch: `random_shift`, `random_affine`, and for photos `shift_and_flip`.

Colour images are CIFAR-10, 60,000 photos of ten kinds, if it is on disk or can be had in reasonable time. Else colour
digits stand in: digits blended with patches of a photo. Where results appear, it says which.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    image, label = datasets.FakeData(9, (3, 32, 32), transform=v2.ToImage())[0]  # noise: no file
    print(f"an item of a dataset: {list(image.shape)} {image.dtype} and the label {label}")
    transforms = (v2.Identity(), v2.Resize(12), v2.RandomCrop(28, padding=6), v2.RandomRotation(25),
                  v2.RandomHorizontalFlip(p=1), v2.ColorJitter(brightness=0.5, hue=0.4))
    digit = digits.test_images[2]
    face = v2.functional.resize(load_photo()[:, 80:340, 130:390], [28, 28])
    changed = [transform(image) for image in (digit, face) for transform in transforms]
    show_figure(plot_images(changed, [type(transform).__name__ for transform in transforms],
                            columns=6, vmax=255), "4_1_transforms")
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])])
    print("v2.Normalize: 0 to 255 becomes", *(f"{x:.1f}" for x in normalize(digit).aminmax()))
    names = [photos.classes[label] for label in photos.train_labels[:16]]
    show_figure(plot_images(list(photos.train_images[:16]), names, size=1), "4_1_colour_images")
    batch = digits.test_images[2:3].repeat(8, 1, 1, 1)
    cropped, moved = v2.RandomCrop(28, padding=4)(batch), random_shift(batch, 4)
    assert (cropped == cropped[0]).all() and not (moved == moved[0]).all()  # the trap
    show_figure(plot_images([*cropped, *moved], ["RandomCrop"] * 8 + ["random_shift"] * 8, size=1),
                "4_1_one_draw_or_many")

# %% [markdown]
"""
### 4.2 The loss: `nn.CrossEntropyLoss`
It takes raw logits and integer labels, makes probabilities of the logits by softmax, and charges -log of the right
class's probability: nothing for certainty, ln 10 for a guess among ten, much for being sure and wrong. Label smoothing
asks for a little less than certainty, which keeps logits small. A softmax of your own before it is a common mistake:
with ten classes the loss then stays above 1.461, and it hardly pulls where it should most: on what is sure and wrong.
"""
# %%
if __name__ == "__main__":
    logits, label = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0])
    by_hand = -torch.log(logits.exp()[0, 0] / logits.exp().sum())
    assert torch.allclose(nn.CrossEntropyLoss()(logits, label), by_hand)
    smooth = 0.9 * by_hand + 0.1 * -logits.log_softmax(dim=1).mean()
    assert torch.allclose(nn.CrossEntropyLoss(label_smoothing=0.1)(logits, label), smooth)
    for ahead in (-5.0, 0.0, 20.0):
        logits = (ahead * F.one_hot(label, 10)).requires_grad_()
        losses = F.cross_entropy(logits, label), F.cross_entropy(logits.softmax(dim=1), label)
        pulls = [torch.autograd.grad(loss, logits)[0].norm() for loss in losses]
        print(f"right class ahead by {ahead:4}: loss {losses[0]:.4f}, gradient {pulls[0]:.4f}; "
              f"with a softmax before it {losses[1]:.4f}, {pulls[1]:.4f}")
    assert losses[1] >= -math.log(math.e / (math.e + 9)) - 1e-6  # 1.461

# %% [markdown]
"""
### 4.4 The loop
First the loop that you will find everywhere: `DataLoader` deals out shuffled batches, and each takes four steps:
predict, measure, differentiate, update. The test images are looked at once, at the end. A `DataLoader` reads, decodes
and transforms pictures one by one, in several processes if need be: use it for data that do not fit into memory. Small
data fit, as one tensor of bytes; then whole batches are indexed, augmented and standardised at once, much faster.

An accuracy p on n images is itself uncertain, with a standard error of √(p(1−p)/n): half a point for 97.5% of 1,000.
Networks closer than about three of these have not been told apart. `results.add` prints it, and keeps all for the end.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    model = SimpleCNN()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(standardize(digits.train_images), digits.train_labels),
                        batch_size=64, shuffle=True)
    model.train()
    for epoch in range(1 if options.quick else 2):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(standardize(digits.test_images)).argmax(dim=1) == digits.test_labels
    results.add("4.4", "the bare loop", digits, "test accuracy", right.float().mean().item())

    # Loading alone, without a network: pictures one by one, then all as one tensor
    usual = v2.Compose([v2.RandomCrop(28, padding=2), v2.ToImage(), normalize])
    pictures = [v2.functional.to_pil_image(image) for image in digits.train_images[:2000]]
    loader = DataLoader(pictures, 64, collate_fn=lambda batch: torch.stack([*map(usual, batch)]))
    in_memory = (standardize(random_shift(digits.train_images[batch]))
                 for batch in torch.randperm(2000).split(64))
    for name, batches in ("DataLoader", loader), ("in memory", in_memory):
        began = time.perf_counter()
        rate = sum(map(len, batches)) / (time.perf_counter() - began)
        results.add("4.4", name, digits, "images per second", rate)

# %% [markdown]
"""
`train_model` is the bare loop with what real work adds. Part of the training images is put aside for *validation*:
choices such as the number of epochs should be made on it, not on the test images. The learning rate climbs and then
falls to nothing within the run ("one cycle", Smith & Topin 2017). Two settings change the speed, and the result hardly:
`channels_last` stores the channels of a pixel side by side, which processors like, and bfloat16 numbers are half as
wide, which is faster where a processor has instructions for them. With `"auto"`, `choose_speed` times a few steps, and
leaves float32 only for what is 1.3 times faster. That choice can turn with the clock; recipes that are over in seconds
keep float32, so that the same seed gives the same numbers. `Keeper` holds the best weights and, with `checkpoint=`,
lets a stopped run go on where it was (8.3 proves it).
"""
# %%
def predict_logits(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Return logits `float32 [N, num_classes]` for `uint8` images, in evaluation mode."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():                     # then in its own mode again
        return torch.cat([model(standardize(batch.to(device))).float()
                          for batch in images.split(batch_size)])


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy (0..1).

    `images` are `uint8 [N, C, H, W]`, `labels` `int64 [N]`, N > 0; else a `ValueError`.
    """
    logits = predict_logits(model, images).to(labels.device)
    check_labels(labels, logits.shape[1], len(images))
    right = (logits.argmax(dim=1) == labels).float()
    return F.cross_entropy(logits, labels).item(), right.mean().item()


def train_epoch(model: nn.Module, batches: Sequence[Tensor], images: Tensor, labels: Tensor,
                optimizer: torch.optim.Optimizer,
                schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
                augment: Callable[[Tensor], Tensor] | None = None, label_smoothing: float = 0.0,
                precision: str = "float32") -> Tensor:
    """Train on each batch (indices into `images`) once; return the loss of each, `[steps]`.

    Of several processes (8.3) each takes every `world`-th image of a batch. A loss that is infinite
    or not a number (looked at every 10 steps) raises a `FloatingPointError`.
    """
    model.train()
    (rank, world), losses, device = rank_and_world(model), [], next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    for batch in batches:
        x = images.index_select(0, batch.to(device))             # images[batch], but faster
        x = augment(x) if augment else x
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(standardize(x[rank::world]))
            loss = F.cross_entropy(logits, labels[batch[rank::world]], reduction="sum",
                                   label_smoothing=label_smoothing) * (world / len(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        check_finite(losses, len(batches), optimizer)
        if schedule is not None:
            schedule.step()
    return torch.stack(losses).cpu()


def train_model(model: nn.Module, data: ImageData, *, epochs: int, batch_size: int = 64,
                learning_rate: float = 3e-3, weight_decay: float = 0.01, one_cycle: bool = True,
                label_smoothing: float = 0.0, augment: Callable[[Tensor], Tensor] | None = None,
                validation: float = 0.1, keep_best: bool = False, seed: int = 0,
                precision: str = "auto", channels_last: bool | str = "auto", progress: bool = True,
                checkpoint: str | Path | None = None) -> list[dict[str, float]]:
    """Train in place on `data.train_images`, on the model's device, and leave it in eval mode.

    AdamW (Loshchilov & Hutter 2019); the learning rate climbs to `learning_rate` in 30% of the
    steps and then falls to nothing (beta1 the other way), or stays constant if not `one_cycle`.

    Args:
        augment: changes a batch `uint8 [N, C, H, W]`, each image by its own draw.
        validation: share of the training images that is put aside.
        keep_best: end with the weights of the epoch that was best on validation, not the last.
        precision: "float32", "bfloat16" (autocast) or "auto"; channels_last: a bool or "auto".
        checkpoint: a file written after every epoch; the same call again goes on from there.

    Returns:
        For each epoch: epoch, train_loss, val_loss, val_accuracy, seconds (since the start).

    Raises:
        ValueError: a setting, the images, labels or checkpoint do not fit.
        FloatingPointError: as `train_epoch`; the model then has its best weights so far.
    """
    recipe = locals().copy()                                     # a checkpoint belongs to one
    start, device = time.perf_counter(), next(model.parameters()).device
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    count = math.ceil(validation * len(images))
    check_recipe(epochs, batch_size, precision, count, len(images))
    check_labels(labels, predict_logits(model, images[:1]).shape[1])
    keeper = Keeper(checkpoint, model, data, recipe)
    precision, channels_last = keeper.saved.get("speed") or choose_speed(
        model, standardize(images[:batch_size]), labels, precision, channels_last, progress)
    torch.manual_seed(seed)
    held_out, kept = torch.randperm(len(images), device=device).tensor_split([count])
    model.to(memory_format=FORMATS[channels_last])
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay,
                                  fused=True)
    steps = epochs * math.ceil(len(kept) / batch_size)
    schedule = (torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
                if one_cycle else None)
    history = keeper.restore(model, optimizer, schedule, report=progress)
    start -= history[-1]["seconds"] if history else 0
    with keeper.watching(model, epochs, keep_best):
        for epoch in range(len(history) + 1, epochs + 1):
            batches = kept[torch.randperm(len(kept), device=device)].split(batch_size)
            bar = track(batches, f"epoch {epoch}", disable=not progress or None)
            losses = train_epoch(model, bar, images, labels, optimizer, schedule, augment,
                                 label_smoothing, precision)
            val_loss, val_accuracy = evaluate(model, images[held_out], labels[held_out])
            history.append(dict(epoch=epoch, train_loss=losses.mean().item(), val_loss=val_loss,
                                val_accuracy=val_accuracy, seconds=time.perf_counter() - start))
            keeper.keep(model, optimizer, schedule, (precision, channels_last))
            print_epoch(history, epochs, report=progress)
    model.eval()
    return history


shift_by_one = partial(random_shift, pixels=1)
brief = partial(dict, precision="float32")                       # over in seconds: nothing to gain
RECIPES = {
    "SimpleCNN on MNIST": dict(epochs=6, batch_size=128, learning_rate=6e-3, weight_decay=0.05,
                               label_smoothing=0.05, validation=0.02, augment=shift_by_one),
    "SimpleCNN on 5,000 digits": brief(epochs=10, learning_rate=5e-3, augment=random_affine),
    "LeNet-5 on MNIST": dict(epochs=6, batch_size=128, learning_rate=5e-3, augment=shift_by_one),
    "LeNet-5 on 5,000 digits": brief(epochs=14, learning_rate=6e-3, augment=random_affine),
    "SimpleCNN on CIFAR-10": dict(epochs=3, learning_rate=4e-3, augment=shift_and_flip),
    "SimpleCNN on colour digits": brief(epochs=6, learning_rate=4e-3, augment=random_shift),
    "SmallVGG on CIFAR-10": dict(epochs=13, batch_size=128, learning_rate=8e-3, weight_decay=0.05,
                                 label_smoothing=0.1, validation=0.02, augment=shift_and_flip),
    "SmallVGG on colour digits": brief(epochs=5, learning_rate=8e-3, augment=random_shift)}

# %% [markdown]
"""
### 4.3 The optimiser, now that there is a loop
Plain gradient descent steps along the gradient of one batch. *Momentum* adds the earlier steps, fading. *Adam* (Kingma
& Ba 2015) divides each weight's step by the usual size of its gradient, so that one rate suits all layers. *AdamW*
keeps weight decay, a pull towards zero, out of that division. Below, each at a rate that suits it, from the same
weights on the same batches, one seed (Adam's curve lies under AdamW's: in so few steps weight decay does nothing to be
seen).

The *range test* (Smith 2017) finds a rate for your problem: let it grow with every step, and watch. A good rate lies
between where the loss falls fastest and where it turns up, as the recipe's does (dotted line).
"""
# %%
if __name__ == "__main__":
    batches = torch.randint(3500, (40 if options.quick else 150, 64))  # of 4,000 digits
    curves, train = {}, (digits.train_images, digits.train_labels)
    for name, make in {"SGD, momentum, rate 0.05": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
                       "Adam, rate 0.003": partial(torch.optim.Adam, lr=3e-3),
                       "AdamW, rate 0.003": partial(torch.optim.AdamW, lr=3e-3)}.items():
        model = seeded(SimpleCNN, options.seed).to(device)
        curves[name] = train_epoch(model, track(batches, name), *train, make(model.parameters()))
        _, accuracy = evaluate(model, *(part[3500:] for part in train))
        results.add("4.3", name, digits, "validation accuracy", accuracy, n=500)

    model = seeded(SimpleCNN, options.seed).to(device)
    rates = np.geomspace(1e-5, 0.3, len(batches))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rates[0])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, rates[1] / rates[0])
    losses = train_epoch(model, track(batches, "range test"), *train, optimizer, schedule)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.5))
    plot_curves(curves, left, smooth=10, ylabel="training loss")
    plot_curves({"": (rates, losses)}, right, smooth=5, xscale="log", ylim=(0, 4), ylabel="loss",
                xlabel="learning rate of AdamW, growing", title="between fastest fall and rise")
    right.axvline(RECIPES["SimpleCNN on 5,000 digits"]["learning_rate"], ls=":", color="black")
    show_figure(figure, "4_3_optimisers")

# %% [markdown]
"""
### 4.5 SimpleCNN on digits and on colour images
Three pictures to look at after every training: the *history* (does the validation loss still fall, or has it turned?
The training loss, a mean over the epoch and over augmented images, starts above it), the *confusion matrix* (which
classes are mistaken for which?) and the *worst mistakes*, which tell whether the network or the label is at fault. The
accuracy of each class tells whether one was given up for the others.
"""
# %%
if __name__ == "__main__":
    def run(section: str, make: Callable[[], nn.Module], data: ImageData, recipe: str,
            name: str | None = None, **changes) -> tuple[nn.Module, list[dict[str, float]]]:
        """Train a fresh network by one of the `RECIPES`, with changes; then test it, once."""
        model = seeded(make, options.seed).to(device)
        history = train_model(model, data, **RECIPES[recipe] | recipe_changes(options) | changes)
        _, right = evaluate(model, data.test_images, data.test_labels)
        results.add(section, name or recipe, data, "test accuracy", right, history[-1]["seconds"])
        return model, history

    mnist_name = "MNIST" if len(mnist.train_images) == 60_000 else "5,000 digits"
    simple_cnn, history = run("4.5", SimpleCNN, mnist, f"SimpleCNN on {mnist_name}")
    outcome = predict_logits(simple_cnn, mnist.test_images), mnist.test_labels, mnist.classes
    show_figure(plot_history(history, f"SimpleCNN on {mnist_name}"), "4_5_history")
    show_figure(plot_confusion(*outcome), "4_5_confusion")
    show_figure(plot_mistakes(mnist.test_images, *outcome), "4_5_mistakes")

    colour_name = "CIFAR-10" if photos.name.startswith("CIFAR-10") else "colour digits"
    colour_cnn, _ = run("4.5", partial(SimpleCNN, in_channels=3, image_size=32), photos,
                        f"SimpleCNN on {colour_name}")
    right = predict_logits(colour_cnn, photos.test_images).argmax(dim=1).cpu() == photos.test_labels
    print_class_accuracies(right, photos.test_labels, photos.classes)

# %% [markdown]
"""
### 4.6 Four bugs that do not crash
With each of these mistakes training runs, and nothing complains. Below, the same small network, data, seed and number
of steps, first right and then with one mistake each. (Without `zero_grad` gradients add up, step after step; without
`eval()` dropout stays on.)
"""
# %%
if __name__ == "__main__":
    def small_network(dropout: float = 0.0, norm: type[nn.Module] = nn.Identity) -> nn.Sequential:
        """Two strided convolutions and a linear layer, for quick experiments on digits."""
        return nn.Sequential(nn.Conv2d(1, 16, 5, stride=2), norm(16), nn.ReLU(),
                             nn.Conv2d(16, 32, 5, stride=2), norm(32), nn.ReLU(),
                             nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * 4 * 4, 10))

    for bug in "no bug", "softmax before loss", "no zero_grad", "raw 0-255 input", "forgotten eval":
        model = seeded(partial(small_network, dropout=0.5), options.seed)
        last = nn.Softmax(dim=1) if bug == "softmax before loss" else nn.Identity()
        prepare = Tensor.float if bug == "raw 0-255 input" else standardize
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for step in track(range(40 if options.quick else 200), bug):
            batch = torch.randint(len(digits.train_images), (64,))
            scores = last(model(prepare(digits.train_images[batch])))
            loss = F.cross_entropy(scores, digits.train_labels[batch])
            if bug != "no zero_grad":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.train(bug == "forgotten eval")                     # train(False) is eval()
        right = model(prepare(digits.test_images)).argmax(dim=1) == digits.test_labels
        results.add("4.6", bug, digits, "test accuracy", right.float().mean().item())

# %% [markdown]
"""
### 4.7 What the trained network can do
Convolutions carry a pattern along when it moves, but the linear layer at the end has learnt *where* to expect it: a
digit moved by four pixels is often not recognised. Augmentation widens what is: the network of 4.5 saw its digits
shifted (by up to 1 pixel on MNIST, 2 on the bundled digits, which were also turned and scaled).

A linear layer on 7×7 maps is a convolution whose 7×7 kernel fits in one place only. Read that way, it slides over an
image of any width, and the network reads a strip of digits in one pass, an answer every four pixels (two poolings).
Between digits the answers are nonsense, since no one taught it what a gap is. The title compares what it reads in the
strip with what it reads of each digit alone.
"""
# %%
def slide(model: SimpleCNN, images: Tensor) -> Tensor:
    """Return logits `[N, 10, H/4 - 6, W/4 - 6]` of a `SimpleCNN` at all places of larger images."""
    maps = model.conv_block2(model.conv_block1(standardize(images)))
    return F.conv2d(maps, model.fc.weight.view(10, 32, 7, 7), model.fc.bias)
# %%
if __name__ == "__main__":
    unshifted, _ = run("4.7", SimpleCNN, mnist, f"SimpleCNN on {mnist_name}",
                       name=f"SimpleCNN on {mnist_name}, no augmentation", augment=None)
    x, y, moves, curves = mnist.test_images[:500], mnist.test_labels[:500], range(-8, 9), {}
    for name, model in ("with augmentation", simple_cnn), ("without", unshifted):
        curves[name] = moves, [evaluate(model, F.pad(x, (move, -move)), y)[1] for move in moves]
    show_figure(plot_curves(curves, marker="o", ylabel="accuracy", ylim=(0, 1.02),
                            xlabel="shift to the right, pixels"), "4_7_accuracy_against_shift")

    model, five = copy.deepcopy(simple_cnn).cpu(), mnist.test_images[:5]
    strip = torch.cat(list(five), dim=2)[None]                   # [1, 1, 28, 140]
    with torch.no_grad():
        assert torch.allclose(slide(model, five)[:, :, 0, 0], model(standardize(five)), atol=1e-3)
        probabilities = slide(model, strip)[0, :, 0].softmax(dim=0)  # [10, 29]
        alone = model(standardize(five)).argmax(dim=1).tolist()
    title = f"alone read as {alone}, in the strip as {probabilities[:, ::7].argmax(0).tolist()}"
    show_figure(plot_strip(strip[0, 0], probabilities, range(14, 127, 4), title), "4_7_strip")

# %% [markdown]
"""
*Exercises 4.* a) 90% of 400 images: what standard error? b) The right class gets probability 1/2: what loss? c) With a
softmax before it and 100 classes: how low can it fall?

## 5 Famous networks
### 5.1 LeNet-5 (1998)
LeCun, Bottou, Bengio & Haffner's network read cheques for banks. What is called LeNet-5 today, and built below, has
61,706 parameters. The paper's had 60,000: its second convolution (C3) joined each map to only some of those before, its
subsampling averaged, with a trainable scale and bias, its activation was a scaled tanh, and its output compared the
last 84 numbers with drawn patterns (RBF units). It read the digits in a 32×32 frame; here a padding of 2 makes one. Its
test error on MNIST: 0.95% as the images are, 0.8% with distorted ones added. Ours are shifted, so 0.8% is to be beaten.
"""
# %%
class LeNet5(nn.Module):
    """LeNet-5 in its modern form (after LeCun et al. 1998): 61,706 parameters for one channel."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),   # C1, S2: 14×14
            nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2))            # C3, S4: 5×5
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.ReLU(),                    # C5
            nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes))              # F6, output

    def forward(self, x: Tensor) -> Tensor:
        """Map `float32 [N, in_channels, 28, 28]` or `[…, 32, 32]` to logits `[N, num_classes]`."""
        check_shape(self, x, (self.in_channels, 28, 28), (self.in_channels, 32, 32))
        if x.shape[-1] == 28:
            x = F.pad(x, (2, 2, 2, 2))                           # the 32×32 frame
        return self.classifier(self.features(x))
# %%
if __name__ == "__main__":
    lenet, _ = run("5.1", LeNet5, mnist, f"LeNet-5 on {mnist_name}")
    assert count_parameters(lenet) == 61_706
    print(f"test error {1 - results[-1]['value']:.2%}; the paper's, full MNIST: 0.95% and 0.8%")

# %% [markdown]
"""
### 5.2 AlexNet (2012)
Krizhevsky, Sutskever & Hinton won ImageNet's contest (1.2 million photos of 1,000 kinds) with LeNet's pattern made
large, on two GPUs, with dropout and augmented images against overfitting, and ReLU in place of tanh: a small network of
theirs reached the same training error several times sooner. Below, the same comparison on the data at hand (on colour
digits ReLU is sooner too, though by less), from the same weights on the same batches.
"""
# %%
if __name__ == "__main__":
    curves, colour = {}, (photos.train_images, photos.train_labels)
    batches = torch.randint(len(photos.train_images), (60 if options.quick else 300, 64))
    for name, activation in ("tanh", nn.Tanh), ("ReLU", nn.ReLU):
        model = seeded(partial(SimpleCNN, in_channels=3, image_size=32), options.seed).to(device)
        model.conv_block1[1] = model.conv_block2[1] = activation()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        curves[name] = train_epoch(model, track(batches, name), *colour, optimizer)
        results.add("5.2", name, photos, "last training loss", curves[name][-30:].mean())
    show_figure(plot_curves(curves, smooth=20, ylabel="training loss",
                            title=f"which falls sooner, on {colour_name}?"), "5_2_tanh_and_relu")

# %% [markdown]
"""
### 5.3 VGG (2014), and how SimpleCNN grows into it
Simonyan & Zisserman used nothing but 3×3 convolutions, many of them. Two in a row see as much as one 5×5, with
2·9 = 18 weights for each pair of channels in place of 25, multiplications in the same ratio, and one more ReLU between.
`SmallVGG` is that idea for 32×32 images: stages of two 3×3 convolutions, each with batch normalisation and ReLU, and
twice the channels from stage to stage. Its pooling stands right behind a stage's first convolution, so that all
that follows has a quarter of the work. In place of VGG's three linear layers (124 of VGG-16's 138 million parameters)
it takes the mean of each map (global average pooling; Lin et al. 2013) and has one linear layer.

`GROWTH` leads there from SimpleCNN: first the new architecture, then one thing at a time. Measured by `python
tests/benchmark.py growth --train-images 10000 --epochs 5`: test accuracy with 10,000 images of CIFAR-10 (JPEG copy),
constant rate but for the last, median of three seeds, lowest, highest, on the two cores of the table at the top. Steps
whose ranges overlap have not been told apart.

| SimpleCNN | 3×3 stacks | BatchNorm | width | dropout | schedule (one cycle) |
|---|---|---|---|---|---|
| 57.1% | 43.4% | 56.8% | 61.4% | 63.3% | 66.4% |
| 54.4 to 57.4 | 42.3 to 45.0 | 52.2 to 58.9 | 60.2 to 63.5 | 62.2 to 63.3 | 65.4 to 66.4 |

The new architecture alone is worse: without batch normalisation the deeper stack learns slowly. Below, the first four
on the data at hand, with 2,000 images, one cycle and one seed (with `--quick` 300, too few to compare).
"""
# %%
class SmallVGG(nn.Module):
    """Stages of two 3×3 convolutions for 32×32 images (after Simonyan & Zisserman 2014).

    `channels`: of each stage, which halves height and width; `dropout`: of the pooled features.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, batch_norm: bool = True,
                 channels: Sequence[int] = (32, 64, 128), dropout: float = 0.1) -> None:
        super().__init__()
        self.in_channels, layers, width = in_channels, [], in_channels
        for out_channels in channels:
            for pool in ([nn.MaxPool2d(2)], []):
                norm = [nn.BatchNorm2d(out_channels)] if batch_norm else []
                layers += [nn.Conv2d(width, out_channels, 3, padding=1, bias=not batch_norm),
                           *pool, *norm, nn.ReLU()]
                width = out_channels
        self.features, self.pool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout),
                                        nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map `float32 [N, in_channels, 32, 32]` to logits `[N, num_classes]`."""
        check_shape(self, x, (self.in_channels, 32, 32))
        return self.classifier(self.pool(self.features(x)))


GROWTH = {  # the new architecture, then one thing at a time
    "SimpleCNN": lambda: SimpleCNN(in_channels=3, image_size=32),
    "3×3 stacks": lambda: SmallVGG(channels=(16, 32, 64), batch_norm=False, dropout=0),
    "BatchNorm": lambda: SmallVGG(channels=(16, 32, 64), dropout=0),
    "width": lambda: SmallVGG(dropout=0), "dropout": SmallVGG}
# %%
if __name__ == "__main__":
    for number, size in (1, 5), (2, 3):
        side, count = receptive_field([(size, 1)] * number), number * 64 * 64 * size * size
        print(f"{number} of {size}×{size}, 64 channels: sees {side} pixels, {count:,} weights, "
              f"{count * 32 * 32 / 1e6:.0f} M multiply-adds at 32×32")
    print(layer_table(SmallVGG(), (3, 32, 32)))
    few = photos.first(300 if options.quick else 2000, 1000)
    for step in ("SimpleCNN", "3×3 stacks", "BatchNorm", "width"):
        run("5.3", GROWTH[step], few, "SmallVGG on colour digits", name=f"growth: {step}",
            learning_rate=2e-3, progress=False)
    small_vgg, _ = run("5.3", SmallVGG, photos, f"SmallVGG on {colour_name}")

# %% [markdown]
"""
### 5.4 GoogLeNet (2014)
Szegedy et al. let training choose between sizes: an Inception block has four branches, 1×1, 3×3, 5×5 and a pooling,
whose maps are stacked. By itself that would be costly. So a 1×1 convolution, which mixes the channels of each pixel,
first *reduces* their number. torchvision's version has a 3×3 where the paper has its 5×5 (kept since its weights were
trained so) and batch normalisation, which the paper lacks; this block is the paper's.
"""
# %%
class InceptionBlock(nn.Module):
    """The Inception block of GoogLeNet (Szegedy et al. 2014), with torchvision's argument names.

    `ch1x1`, `ch3x3`, `ch5x5` and `pool_proj` are what each branch gives, `ch3x3red` and `ch5x5red`
    the channels that 1×1 convolutions leave for the 3×3 and the 5×5.
    """

    def __init__(self, in_channels: int, ch1x1: int, ch3x3red: int, ch3x3: int, ch5x5red: int,
                 ch5x5: int, pool_proj: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, size: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.ReLU())

        self.branch1 = conv(in_channels, ch1x1, 1)
        self.branch2 = nn.Sequential(conv(in_channels, ch3x3red, 1), conv(ch3x3red, ch3x3, 3))
        self.branch3 = nn.Sequential(conv(in_channels, ch5x5red, 1), conv(ch5x5red, ch5x5, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), conv(in_channels, pool_proj, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to `[N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W]`."""
        return torch.cat([branch(x) for branch in self.children()], dim=1)
# %%
if __name__ == "__main__":
    block = InceptionBlock(192, 64, 96, 128, 16, 32, 32)         # the paper's first, "3a"
    print("Inception 3a: 192×28×28 to", list(block(torch.zeros(1, 192, 28, 28)).shape[1:]))
    for branch, direct in ((block.branch2, nn.Conv2d(192, 128, 3)),
                           (block.branch3, nn.Conv2d(192, 32, 5))):
        print(f"its {direct.kernel_size} branch: {count_parameters(branch):,} parameters, "
              f"without the 1×1 {count_parameters(direct):,}")

# %% [markdown]
"""
### 5.5 ResNet (2015)
He, Zhang, Ren & Sun saw plain networks get *worse on their own training images* when made deeper. So it is not
overfitting; nor, as their section 4.1 argues, vanishing gradients, for with batch normalisation neither signals nor
gradients vanish. Plain stacks are hard to optimise: to pass something on, a layer must learn the identity. A residual
block computes x + f(x), and passes x on from the start. Below, the deepest plain stack learns least of
all. With shortcuts, on colour digits, it learns more than the shallowest.
"""
# %%
class ResidualBlock(nn.Module):
    """ResNet's basic block (He et al. 2015): two 3×3 convolutions and a shortcut around them.

    `inplanes`, `planes`: channels in and out; `downsample`: on the shortcut, by default a 1×1
    convolution where the shape changes; `residual=False` leaves the shortcut out, for comparison.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1,
                 downsample: nn.Module | None = None, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        if residual and downsample is None and (stride != 1 or inplanes != planes):
            downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False),
                                       nn.BatchNorm2d(planes))
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, inplanes, H, W]` to `[N, planes, H / stride, W / stride]`."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(x))
        return y.relu()
# %%
if __name__ == "__main__":
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.5), sharey=True)
    batches = torch.randint(len(photos.train_images), (60 if options.quick else 150, 64))
    for ax, kind in zip(axes, ("plain", "residual")):
        curves = {}
        for blocks in (2, 8) if options.quick else (2, 6, 16):
            name = f"{2 * blocks + 2} layers"
            torch.manual_seed(options.seed)
            model = nn.Sequential(
                nn.Conv2d(3, 16, 4, stride=4), nn.BatchNorm2d(16), nn.ReLU(),
                *(ResidualBlock(16, 16, residual=kind == "residual") for _ in range(blocks)),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            curves[name] = losses = train_epoch(model, track(batches, name), *colour, optimizer)
            results.add("5.5", f"{kind}, {name}", photos, "last training loss", losses[-30:].mean())
        plot_curves(curves, ax, smooth=20, ylabel="training loss", title=f"{kind}, {colour_name}")
    show_figure(figure, "5_5_degradation")

# %% [markdown]
"""
### 5.6 All on one page
torchvision has these networks ready-made. On the `meta` device they have shapes and no numbers, so that even VGG-16
costs neither memory nor time, and one pass counts what they would compute (a multiplication and an addition are two
operations; only convolutions and matrix products count). The accuracies are those of torchvision's V1 weights: its own
training, but GoogLeNet's are ported. Years are the papers'; depths count the layers with weights. torchvision's AlexNet
is the slimmer one of Krizhevsky (2014), its GoogLeNet differs as in 5.4, its ResNet-50 strides in 3×3, not in 1×1. Look
at ResNet-50 and VGG-16: more accurate, with a quarter of the operations and a fifth of the parameters.
"""
# %%
if __name__ == "__main__":
    extra, points = {"GoogLeNet": {"aux_logits": False, "init_weights": False}}, {}
    for name, year, depth, expected in (                         # parameters expected
            ("LeNet5", 1998, 5, 61_706), ("AlexNet", 2012, 8, 61_100_840),
            ("VGG16", 2014, 16, 138_357_544), ("GoogLeNet", 2014, 22, 6_624_904),
            ("ResNet18", 2015, 18, 11_689_512), ("ResNet50", 2015, 50, 25_557_032)):
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = LeNet5() if name == "LeNet5" else models.get_model(name, **extra.get(name, {}))
            with recording(model.eval().modules()) as maps:
                model(torch.empty((1, 1, 28, 28) if name == "LeNet5" else (1, 3, 224, 224)))
        count, operations = count_parameters(model), counter.get_total_flops() / 1e9
        assert count == expected
        sizes = {x.shape[2]: "×".join(map(str, x.shape[1:])) for x in maps.values() if x.ndim == 4}
        print(f"{name:9} {year}, depth {depth:2}, {count / 1e6:6.2f} M parameters; the last map of "
              f"each size: {', '.join(sizes.values())}")
        results.add("5.6", name, "traced, not trained", "GFLOP", operations)
        if name != "LeNet5":                                     # that one never saw ImageNet
            meta = models.get_model_weights(name)["IMAGENET1K_V1"].meta
            points[f"{name} ({year})"] = operations, meta["_metrics"]["ImageNet-1K"]["acc@1"], count
    show_figure(plot_architectures(points), "5_6_architectures")

# %% [markdown]
"""
*Exercises 5.* a) Three 3×3 against one 7×7: field and weights? b) Inception 3b (128, 128, 192, 32, 96, 64): how many
channels? c) Which weights must be zero for a `ResidualBlock` to pass positive maps on unchanged?

## 6 Transfer learning
### 6.1 What it is, and when it pays
Early layers learn what many tasks need. Transfer learning takes a network that was trained on much data and keeps all
but its last layer, the *head*, which makes room for one with your classes. What then? That depends on how many labels
you have, and on how near your pictures are to those it was trained on:

| | few labels | many labels |
|---|---|---|
| **near task** | feature extraction: train the head only | fine-tuning: train the later layers too |
| **far task** | extraction from an earlier layer; expect little | fine-tune all of it, or train from scratch |

### 6.2 Getting a network and replacing its head
`torchvision.models` names its weights (`weights=ResNet18_Weights.DEFAULT`, which replaced `pretrained=True`). They have
their own preprocessing, `weights.transforms()`: prepare pictures in any other way and the accuracy drops without a
word. The head is called `fc` in ResNet, `classifier[-1]` in VGG, MobileNet and others, here on the `meta` device.
"""
# %%
if __name__ == "__main__":
    with torch.device("meta"):
        networks = resnet, vgg, mobilenet = [make(weights=None).eval() for make in (
            models.resnet18, models.vgg11, models.mobilenet_v3_small)]
        resnet.fc = nn.Linear(resnet.fc.in_features, 5)          # five classes of your own
        for model in (vgg, mobilenet):
            model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, 5)
        print("logits:", *(list(model(torch.empty(2, 3, 224, 224)).shape) for model in networks))
    backbone, preprocess, description = load_resnet18(options.data_dir, options.offline)
    backbone.to(device)
    print(description)

# %% [markdown]
"""
### 6.3 Feature extraction, and 6.4 fine-tuning
Whatever is frozen gives the same output for a picture in every epoch. So run the frozen part *once* and keep what comes
out: 512 numbers a picture if only the head is trained. The usual way pushes every picture through the frozen network in
every epoch, for the same result; what it can do and this cannot is to augment the pictures. Fine-tuning has the cut
earlier: here the last stage, `layer4`, is trained with the head, at a tenth of the head's learning rate, so
that good weights are not spoilt while the head is still wrong.

A trap: `requires_grad=False` does not freeze batch normalisation, whose running averages move in every forward pass in
training mode. So everything stays in evaluation mode here, and all statistics stay those of the large data set.
"""
# %%
def new_head(backbone: nn.Module, num_classes: int, seed: int = 0) -> nn.Module:
    """Return a copy of a torchvision ResNet with a fresh head `fc` for `num_classes`."""
    torch.manual_seed(seed)
    model = copy.deepcopy(backbone)
    model.fc = nn.Linear(model.fc.in_features, num_classes).to(model.fc.weight.device)
    return model


def split_at(model: nn.Module, first: str) -> tuple[nn.Module, nn.Module]:
    """Split a torchvision ResNet into what is frozen and what is trained, both in evaluation mode.

    `first` names the first child that is trained: "fc" (extraction), "layer4" (fine-tuning), or
    one before it; else a `ValueError`.
    """
    names, layers = zip(*model.eval().requires_grad_().named_children())
    if first not in names:
        raise ValueError(f"split_at: expected one of {list(names)}, got {first!r}")
    layers = [*layers[:-1], nn.Flatten(), layers[-1]]            # ResNet flattens before its head
    cut = names.index(first) + (first == "fc")
    return nn.Sequential(*layers[:cut]).requires_grad_(False), nn.Sequential(*layers[cut:])


def run_frozen(frozen: nn.Module, images: Tensor, preprocess: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what the frozen part gives for `uint8 [N, 3, H, W]`, on its device."""
    device = next(frozen.parameters(), images).device
    with torch.no_grad():
        return torch.cat([frozen(preprocess(x.to(device)))
                          for x in track(images.split(100), "frozen layers")])


def train_tail(tail: nn.Sequential, features: Tensor, labels: Tensor, *, epochs: int = 30,
               head_rate: float = 1e-2, body_rate: float = 1e-3, seed: int = 0) -> None:
    """Train the last layers, of which the very last is the head, on what `run_frozen` gave.

    `labels` are `int64 [N]`; the rates are those of the head and of the rest at the start.
    """
    torch.manual_seed(seed)
    check_labels(labels, tail[-1].out_features)
    optimizer = torch.optim.AdamW([{"params": tail[:-1].parameters(), "lr": body_rate},
                                   {"params": tail[-1].parameters(), "lr": head_rate}], fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    labels = labels.to(features.device)
    for epoch in track(range(epochs), "last layers"):
        for batch in torch.randperm(len(labels), device=labels.device).split(32):
            loss = F.cross_entropy(tail(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def tail_accuracy(tail: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Return the accuracy (0..1) of the last layers on what the frozen part gave."""
    with torch.no_grad():
        return (tail(features).argmax(dim=1).cpu() == labels).float().mean().item()
# %%
if __name__ == "__main__":
    target = colour_digits(digits)
    if backbone.fc.out_features == 1000:     # ImageNet's weights: made for 224 pixels; 96 save time
        target, preprocess = photos, resnet18_preprocessing(imagenet=True, image_size=96)
    target = target.first(*((500, 300) if options.quick else (1500, 1000)))
    few = target.first(50 if options.quick else 200)
    frozen, head = split_at(new_head(backbone, 10, options.seed), "fc")
    everything = nn.Sequential(*frozen, *copy.deepcopy(head))    # with the same first weights
    features = run_frozen(frozen, target.test_images, preprocess)
    began = time.perf_counter()
    train_tail(head, run_frozen(frozen, few.train_images, preprocess), few.train_labels, epochs=25)
    kept = tail_accuracy(head, features, target.test_labels)
    kept_time, began = time.perf_counter() - began, time.perf_counter()
    train_tail(everything, preprocess(few.train_images.to(device)), few.train_labels, epochs=25)
    usual = tail_accuracy(everything[-1], features, target.test_labels)
    usual_time = time.perf_counter() - began
    results.add("6.3", "25 epochs, on kept features", target, "test accuracy", kept, kept_time)
    results.add("6.3", "25 epochs, the usual way", target, "test accuracy", usual, usual_time)
    results.add("6.3", "kept features: speed-up", target, "ratio", usual_time / kept_time)
    assert abs(kept - usual) < 0.02

# %% [markdown]
"""
### 6.5 Three ways, side by side
The same ResNet-18 from scratch, with feature extraction and with fine-tuning, on the same labels, not augmented (with
`--quick` too briefly to compare). Dots are means over seeds, which draw other labels and another head; bars are
standard deviations (three seeds; from scratch, which is slow, at 200 labels only). The ± printed beside counts test
images only. The bundled weights come from letters, a task near to digits on purpose: they help most where labels are
few. From scratch means 48 to 90 steps, by which time nearly all labels are known by heart (a few are kept for
validation). More steps would still help: four times as many took 200 labels from 56% to 68%, in four times the time
(one seed, on the same two cores as the table at the top).
"""
# %%
if __name__ == "__main__":
    pictures = torch.cat([target.train_images, target.test_images])  # frozen parts run once for all
    features = {first: run_frozen(split_at(copy.deepcopy(backbone), first)[0], pictures, preprocess)
                for first in ("fc", "layer4")}

    def accuracy_of(first: str | None, count: int, seed: int) -> float:
        """Train one arm on `count` labels, other ones for each seed."""
        drawn = torch.arange(count) + 500 * seed % len(target.train_images)
        few = target.only(drawn)
        if first is None:
            model = seeded(partial(models.resnet18, num_classes=10), seed).to(device)
            train_model(model, few, epochs=2 if options.quick else max(6, 1600 // count),
                        batch_size=32, seed=seed, validation=0.04, progress=False,
                        precision="float32")
            return evaluate(model, target.test_images, target.test_labels)[1]
        _, tail = split_at(new_head(backbone, 10, seed), first)
        epochs = 25 if first == "fc" else 4 if options.quick else min(10, 3000 // count)
        train_tail(tail, features[first][drawn], few.train_labels, epochs=epochs, seed=seed)
        return tail_accuracy(tail, features[first][-len(target.test_labels):], target.test_labels)

    counts, curves = (200,) if options.quick else (50, 100, 200, 500), {}
    for name, first in (("from scratch", None), ("feature extraction", "fc"),
                        ("fine-tuning", "layer4")):
        rows = []
        for count in counts:
            began = time.perf_counter()
            seeds = 1 if options.quick or (first is None and count != 200) else 3
            accuracies = [accuracy_of(first, count, options.seed + seed)
                          for seed in track(range(seeds), f"{name}, {count} labels")]
            rows.append(results.add_seeds("6.5", f"{name}, {count} labels", target, "test accuracy",
                                          accuracies, (time.perf_counter() - began) / seeds))
        curves[name] = counts, *zip(*rows)                       # x, means, spreads
    title = f"bars: spread over seeds; {target.name.split(' of ')[1].split(' (')[0]}"
    show_figure(plot_curves(curves, marker="o", xlabel="labels", ylabel="test accuracy",
                            ylim=(0, 1), title=title), "6_5_transfer")

# %% [markdown]
"""
### 6.6 Your own pictures
Put them into one folder with a sub-folder for each class (or `train/` and `val/`, each with the same sub-folders), then

    from convolutional_neural_networks import predict, train_on_folder
    train_on_folder("my_pictures", "my_model.pt")
    predict(["new.jpg"], "my_model.pt")

Extraction comes first, then fine-tuning from there with small learning rates. With ImageNet weights (`python -m data`
fetches them once) a few dozen photos a class are often enough; of the bundled letters expect little on photos.
"""
# %%
if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:                # digits as if they were your files
        *files, new = write_as_files(digits.first(101), folder)
        new = new.rename(Path(folder) / "new.png")               # not one of those to train on
        scores = train_on_folder(folder, Path(folder) / "model.pt", seed=options.seed,
                                 data_dir=options.data_dir, offline=options.offline, device=device)
        predict([new], Path(folder) / "model.pt")
    results.add("6.6", "a folder of 100 pictures", "100 bundled digits as files",
                "validation accuracy", scores["fine-tuning"], n=20)

# %% [markdown]
"""
*Exercises 6.* a) Five classes by feature extraction: how many parameters are trained? b) Train `layer3` too.

## 7 What networks look at
### 7.1 First-layer filters, and 7.2 feature maps
The kernels of the first layer have the image's channels, and can be drawn. Before training they are noise; afterwards
some show stripes (which answer to edges) or spots: not all, after seconds of training. SimpleCNN's have one channel
and share one scale, red positive, blue negative. ResNet-18's have three and are drawn as colours, each stretched to its
own range, grey standing for zero. And every channel of every layer is a picture of where its pattern was found:
outlines of the image first, then coarse spots.
"""
# %%
def feature_maps(model: nn.Module, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return what the layers of these dotted names give for `float32 [N, C, H, W]`, by name."""
    found = {name: find_layer(model, name) for name in layers}   # else a ValueError
    with recording(found.values()) as outputs, evaluating(model), torch.no_grad():
        model(images)
    return {name: outputs[layer] for name, layer in found.items() if layer in outputs}
# %%
if __name__ == "__main__":
    fresh = seeded(SimpleCNN, options.seed).conv_block1[0].weight  # [16, 1, 5, 5]
    show_figure(plot_filters({"fresh": fresh, "trained": simple_cnn.conv_block1[0].weight}),
                "7_1_filters_simple_cnn")
    show_figure(plot_filters({"ResNet-18": backbone.conv1.weight[:32]}), "7_1_filters_resnet18")
    rows = [(image, feature_maps(model, standardize(image).to(device), layers))
            for model, image, layers in (
                (simple_cnn, mnist.test_images[:1], ["conv_block1", "conv_block2"]),
                (small_vgg, photos.test_images[:1], ["features.3", "features.10", "features.20"]))]
    show_figure(plot_feature_maps(rows), "7_2_feature_maps")

# %% [markdown]
"""
### 7.3 Where did it look?
Four ways to ask which pixels the score of a class rests on:

- **Saliency** (Simonyan et al. 2013): the gradient of the score with respect to each pixel. Sharp, but noisy.
- **CAM** (Zhou et al. 2016): where a network ends in global average pooling and one linear layer, a score, but for its
  bias, *is* a mean over places of the last maps weighted by that layer. Leave out the mean, and there is the map.
- **Grad-CAM** (Selvaraju et al. 2017): the same for any network; a map's weight is its mean gradient. Where CAM exists,
  that is CAM's weight divided by the number of places, and the two maps agree, as the cell below asserts.
- **Occlusion** (Zeiler & Fergus 2014): cover a patch, and see how far the probability falls. Slow; needs no gradients.

Which layer should Grad-CAM look at? Below, one image at every depth. Early maps know the place and little of the class;
late ones know the class, and the place only roughly; a 1×1 map knows nothing of the place, and the picture is one flat
colour. The usual choice, and the default, is the last map that still has an extent.
"""
# %%
def saliency_map(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return `[N, H, W]`: the largest absolute gradient over channels (Simonyan et al. 2013).

    `images` are standardised `float32 [N, C, H, W]` on the model's device; `labels` `int64 [N]`,
    by default the predicted classes. What does not fit raises a `ValueError`, here and below.
    """
    with differentiable(model, images) as images:
        scores, _ = class_scores(model, images, labels)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    return gradient.abs().amax(dim=1)


def as_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Rectify `[N, h, w]`, enlarge to `size`, divide each by its maximum, unless that is zero."""
    maps = F.interpolate(maps.relu()[:, None], tuple(size), mode="bilinear", align_corners=False)
    highest = maps.amax(dim=(2, 3), keepdim=True)
    return (maps / torch.where(highest > 0, highest, 1))[:, 0]


def grad_cam(model: nn.Module, images: Tensor, labels: Tensor | None = None,
             layer: nn.Module | str | None = None) -> Tensor:
    """Return Grad-CAM `[N, H, W]`, each map from 0 to 1, its maximum (Selvaraju et al. 2017).

    `layer` is a module of the model whose output is `[N, channels, h, w]`, or its dotted name; by
    default the last one whose output is larger than 1×1. The rest as for `saliency_map`.
    """
    with differentiable(model, images) as images:
        layer = feature_layer(model, images, layer)              # else a ValueError
        with recording([layer]) as outputs:
            scores, _ = class_scores(model, images, labels)
        (gradient,) = torch.autograd.grad(scores.sum(), outputs[layer])
    weights = gradient.mean(dim=(2, 3), keepdim=True)            # one for each channel
    return as_maps((weights * outputs[layer]).sum(dim=1).detach(), images.shape[2:])


def class_activation_map(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return CAM `[N, H, W]` (Zhou et al. 2016), rectified and scaled as Grad-CAM is.

    The model must end in global average pooling and one linear layer.
    """
    check_images(images, model)
    with torch.no_grad(), evaluating(model):
        last, linear = pooled_maps_and_linear(model, images)     # else a ValueError
        with recording([last]) as outputs:
            _, labels = class_scores(model, images, labels)
        maps = torch.einsum("nchw,nc->nhw", outputs[last], linear.weight[labels])
    return as_maps(maps, images.shape[2:])


def occlusion_map(model: nn.Module, images: Tensor, labels: Tensor | None = None,
                  patch: int = 8, stride: int = 4) -> Tensor:
    """Return `[N, H, W]`, scaled as Grad-CAM is: how far the probability falls under a grey patch.

    After Zeiler & Fergus (2014). Grey is 0, the mean of standardised images. The patch is centred
    on each cell of `stride` × `stride` pixels, and cut off at the border.
    """
    check_images(images, model)
    places = patch_places(images.shape[2:], patch, stride)       # where its rows and columns begin
    with torch.no_grad(), evaluating(model):
        _, labels = class_scores(model, images, labels)
        of_label, under = (torch.arange(len(labels), device=labels.device), labels), []
        for row, column in track([*product(*places)], "occlusion"):
            covered = images.clone()
            covered[:, :, max(row, 0):row + patch, max(column, 0):column + patch] = 0
            under.append(model(covered).softmax(dim=1)[of_label])
        falls = model(images).softmax(dim=1)[of_label] - torch.stack(under)  # [places, N]
    return as_maps(falls.T.reshape(len(images), *map(len, places)), images.shape[2:])
# %%
if __name__ == "__main__":
    finder = small_vgg if photos.test_masks is not None else run(
        "7.3", SmallVGG, colour_digits(digits), "SmallVGG on colour digits")[0]
    off_centre = replace(digits, test_images=random_shift(digits.test_images, pixels=5))
    located = colour_digits(off_centre).first(1, 50 if options.quick else 200)
    images, labels = standardize(located.test_images).to(device), located.test_labels.to(device)
    assert torch.allclose(grad_cam(finder, images, labels),
                          class_activation_map(finder, images, labels), atol=1e-3)

    pictures, titles = [located.test_images[3]], ["image"]
    layers = [*(f"features.{index}" for index in (0, 3, 6, 10, 13, 17, 20)), "pool"]
    for name, maps in feature_maps(finder, images[3:4], layers).items():
        pictures.append(grad_cam(finder, images[3:4], layer=name))
        titles.append(f"{name.replace('features.', 'layer ')}, {maps.shape[2]}×{maps.shape[3]}")
    show_figure(plot_maps(pictures, titles, 9, "Grad-CAM of an image at every depth"), "7_3_layers")

# %% [markdown]
"""
### 7.4 Held against a known answer
A map that convinces the eye may still be wrong: some methods draw much the same for a network with random weights
(Adebayo et al. 2018). On colour digits we know where the object is. So ask each method: how much of its map lies on the
digit's ink, and how often does its peak? A blind guess at a pixel would be right as often as the ink's share of the
area. But digits stand near the middle (though 7.3 has moved each by up to 5 pixels), and so do many maps. So each map
is also held against *another* image's mask: only what the first column has over the second was found in this image.

A method that explains what this network has learnt must lose that lead when the weights are random, the last two
columns. Occlusion does. Saliency keeps a part of it, and Grad-CAM on an early map most: their gradients and maps are
large where the image has contrast, whatever the weights. CAM and Grad-CAM at the last map, 4×4, have little lead to
lose, or none: too coarse, they find the middle. (Where a map is empty, no place speaks for the class.) And this tests
the place, not the reasons: what tells a 3 from an 8 is off the ink.
"""
# %%
if __name__ == "__main__":
    masks = located.test_masks.to(device)
    random_net = seeded(SmallVGG, options.seed).to(device)
    print(f"share of the map, and of its peaks, on the ink (chance {masks.float().mean():.0%}) of\n"
          f"{'':14}{'this image':>13}{'another':>13}{'random: this':>15}{'another':>13}")
    pictures, titles = [*located.test_images[:6], *masks[:6]], ["image"] * 6 + ["mask"] * 6
    for name, method in {"saliency": saliency_map, "CAM": class_activation_map,
                         "Grad-CAM": grad_cam, "occlusion": occlusion_map,
                         "16×16 Grad-CAM": partial(grad_cam, layer="features.6")}.items():
        both = [method(network, images, labels) for network in (finder, random_net)]
        found = [share_and_hits(maps, of) for maps in both for of in (masks, masks.roll(7, 0))]
        print(f"{name:14}" + "".join(f"{share:8.0%}{hits:5.0%}" for share, hits in found))
        results.add("7.4", name, located, "share of peaks on ink", found[0][1], quiet=True)
        pictures += list(as_maps(both[0][:6], masks.shape[1:]))
        titles += [name] * 6
    show_figure(plot_maps(pictures, titles, 6, "which maps lie on the digit's ink?"), "7_4_maps")

# %% [markdown]
"""
*Exercises 7.* a) How often does `occlusion_map` run the network for one 32×32 image? b) Compute a logit of SmallVGG
from its last maps alone.

## 8 Practical tips
### 8.1 Five tips, measured
Each tip is tried on and off with the same seeds, hence the same images and first weights (*paired*: what the seed does
to both cancels). The effect is the mean difference in test accuracy, the spread its standard deviation over seeds, the
standard error the spread divided by √seeds. What is below 2.5 spreads (5% chance with three seeds, by Student's t) is
grey: not shown to matter here, though it may with other data (with `--quick`, of one seed, all is grey). When a network
learns its 200 images by heart, the validation loss turns up, but the accuracy need not fall; and 40 validation images
are few to choose an epoch by.
"""
# %%
if __name__ == "__main__":
    count, short = (1, 5) if options.quick else (3, 15)          # seeds, and epochs
    seeds, gains = range(options.seed, options.seed + count), {}

    def train_small(seed: int, images: int = 500, norm: type[nn.Module] = nn.Identity,
                    **changes) -> tuple[float, list[dict[str, float]]]:
        """Train the small network of 4.6 on a few digits; return test accuracy and history."""
        model = seeded(partial(small_network, norm=norm), seed).to(device)
        settings = dict(epochs=short, batch_size=32, validation=0.2, precision="float32",
                        channels_last=True, progress=False, seed=seed) | changes
        history = train_model(model, digits.first(images), **settings)
        return evaluate(model, digits.test_images, digits.test_labels)[1], history

    many = {"images": 200, "epochs": 4 * short, "learning_rate": 5e-3, "one_cycle": False}
    tips = {"augmentation, 500 images": ({"epochs": 2 * short}, {"augment": random_affine}),
            "learning rate 0.003, not 0.0003": ({"learning_rate": 3e-4}, {"learning_rate": 3e-3}),
            "learning rate 0.003, not 0.03": ({"learning_rate": 3e-2}, {"learning_rate": 3e-3}),
            "BatchNorm, at learning rate 0.1": ({"learning_rate": 0.1}, {"norm": nn.BatchNorm2d}),
            f"best epoch of {4 * short}, 200 images": (many, {"keep_best": True})}
    for name, (without, tip) in tips.items():
        gains[name] = [100 * (train_small(s, **without | tip)[0] - train_small(s, **without)[0])
                       for s in track(seeds, name)]
        results.add_seeds("8.1", name, digits, "points gained", gains[name], beyond=2.5)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6))
    plot_effects(gains, left, beyond=2.5)
    _, history = train_small(options.seed, **many)
    plot_curves({name: ([row["epoch"] for row in history], [row[name] for row in history])
                 for name in ("train_loss", "val_loss")}, right, xlabel="epoch", ylabel="loss",
                title="200 images: learnt by heart")
    show_figure(figure, "8_1_tips")

# %% [markdown]
"""
### 8.2 What the other knobs are for
| knob | what for | start with |
|---|---|---|
| schedule | large steps first, small ones to settle | one cycle; cosine for long runs |
| weight decay | keeps weights small (in AdamW; Adam's own adds it to the gradient) | 0.01 to 0.05 |
| dropout | many parameters, few images; before the last linear layer | 0.1 to 0.5; less beside BatchNorm |
| label smoothing | keeps logits from growing without end | 0.1 |
| batch size | fills the processor; memory grows with it, as the cell below counts | 32 to 256; rate along with it |

### 8.3 Saving and resuming; several processors
`checkpoint=` writes all that training needs after every epoch: model, optimiser, schedule, random generators, history.
The same call goes on from there, on a CPU to the same bits, as the cell below proves. To keep only a finished model,
`torch.save(model.state_dict(), path)`, and load it with `weights_only=True`.

On several CPUs or GPUs each process takes a share of every batch, and gradients are averaged before each step. Save
this as a file of your own, and start it with `torchrun --nproc-per-node=2 FILE` (`torchrun --help` tells how to join
machines):

    from convolutional_neural_networks import SimpleCNN, train_distributed
    from data import load_mnist
    if __name__ == "__main__":
        train_distributed(SimpleCNN(), load_mnist(), epochs=3)
"""
# %%
def train_distributed(model: nn.Module, data: ImageData, *, epochs: int,
                      **settings) -> list[dict[str, float]]:
    """Call `train_model` in each process of `torchrun`, on PyTorch's DistributedDataParallel.

    Each takes its share of every batch, which all draw and augment from one seed; one prints, and
    writes the checkpoint (where all can read it). nccl connects GPUs, gloo processors. Batch
    normalisation sees the share only. Started in any other way: a `RuntimeError`.
    """
    settings = {"precision": "float32", "channels_last": True, "progress": True} | settings
    with joined_processes() as device:                           # else a RuntimeError
        settings["progress"] &= distributed.get_rank() == 0
        model.to(device, memory_format=FORMATS[bool(settings["channels_last"])])
        model = nn.parallel.DistributedDataParallel(model)
        return train_model(model, data, epochs=epochs, **settings)
# %%
if __name__ == "__main__":
    megabytes = [activation_bytes(SmallVGG(), torch.zeros(n, 3, 32, 32)) / 1e6 for n in (1, 16, 64)]
    print("MB kept for the backward pass, batches of 1, 16, 64:", *(f"{x:.1f}" for x in megabytes))

    def shift(images: Tensor) -> Tensor:
        """Shift; but in the second epoch stop training, once, as Ctrl-C would."""
        if file.exists() and stops:
            raise stops.pop()
        return random_shift(images)

    file, stops, ends = options.output_dir / "resumed.checkpoint", [KeyboardInterrupt()], []
    file.unlink(missing_ok=True)
    for checkpoint in (None, file, file):                        # undisturbed, stopped, resumed
        model = seeded(LeNet5, options.seed)                     # on the processor: exact anywhere
        try:
            train_model(model, digits.first(500), epochs=3, augment=shift, precision="float32",
                        seed=options.seed, checkpoint=checkpoint, progress=False)
        except KeyboardInterrupt as stop:
            print(stop)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    file.unlink()
    assert torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[1])
    results.add("8.3", "resumed against undisturbed", "500 bundled digits",
                "largest difference of a weight", (ends[0] - ends[2]).abs().max())

# %% [markdown]
"""
### 8.4 Where to start, and where to go next
| you have | start with |
|---|---|
| fewer than about 1,000 labels, photos | ImageNet weights, feature extraction (6.3), then fine-tuning |
| the same, far from photos (spectra, X-rays) | features of an earlier layer; augmentation that fits |
| 1,000 to 100,000 labels | fine-tuning; or a small network from scratch if images are small |
| only a CPU | frozen features run once; small images; bfloat16 where it is fast |

Always: look at the data, learn one batch by heart (3.4), keep validation apart, report the standard error. Next:
ConvNeXt (Liu et al. 2022), what became of ResNet; vision transformers (Dosovitskiy et al. 2021), the other way; U-Net
(Ronneberger et al. 2015), an answer at every pixel; torchvision's detection models, boxes around objects.

*Exercises 8.* a) A batch of 128, not 64: how many bytes more does SmallVGG keep? b) At which rate does one cycle start?
c) Average the gradients of two halves of a batch: what does it equal?

## What this run measured
The same table is written to `results.json` in the output directory, with the settings and versions of this run.
"""
# %%
if __name__ == "__main__":
    write_results(results, options, device)
