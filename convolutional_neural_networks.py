# %% [markdown]
"""
# Convolutional neural networks, from one kernel to a trained network

**Whom this is for.** You know Python, and you have done one PyTorch quickstart. You need not know what a convolution
is.

**What you will have at the end.** Networks of your own that read handwritten digits and sort photos, pictures of what
they look at, and functions that you can lift into your own work. One of those networks was trained on single digits,
and yet it reads a strip of five:

![Five handwritten digits in a strip; below, how probable each digit is at every place](data/figures/strip.png)

**How to use it.** Run the script from top to bottom, or step through the notebook of the same name, which has the same
cells. Sections 0 to 4 build on each other. Sections 5 to 8 can be read in any order, but run all cells from the top:
later sections use networks that earlier ones have trained. What the text claims about a result is shown by an `assert`,
a number or a picture. A few claims come from other runs, and say so.

**How long it takes.** With the data that come with the project, a run takes two or three minutes on a laptop, or less
than one with the option `--quick`. With the full data sets MNIST and CIFAR-10 it takes five to eight minutes, or more
on a slow processor. A run first says how long it will take on your machine.

### Preparations
Run the next two cells, but you need not read them. They import what we need, define four helpers, and read the options.
"""
# %%
import copy
import io
import math
import os
import pickle
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, models
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm


def best_device() -> torch.device:
    """Return the accelerator of this machine (CUDA, MPS, …) or, where there is none, the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within this block random numbers follow from these; afterwards they go on as before it."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    devices = range(torch.accelerator.device_count() if kind else 0)
    with torch.random.fork_rng(devices, device_type=kind.type if kind else "cpu"):
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
        yield


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers the parameters of a network consist of, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def plot_images(images: Sequence[Tensor], titles: Sequence[str] = (), columns: int = 8,
                width: float = 8.0, title: str = "", **imshow) -> Figure:
    """Draw images in rows; those without colour share one scale.

    Args:
        images: each `[H, W]`, `[1, H, W]`, `[1, 1, H, W]`, or in colour `[3, H, W]`.
        titles: one for each image, or fewer. width: of the figure, in inches.
        imshow: settings for `Axes.imshow`, such as `cmap`, `vmin` and `vmax`.
    """
    arrays = [image.detach().cpu().squeeze().numpy() for image in images]
    grey = [array for array in arrays if array.ndim == 2]
    if grey:
        imshow = {"vmin": min(array.min() for array in grey),
                  "vmax": max(array.max() for array in grey)} | imshow
    columns = min(columns, len(arrays))
    rows = math.ceil(len(arrays) / columns)
    height = width / columns * images[0].shape[-2] / images[0].shape[-1]
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(width, rows * (height + 0.25) + 0.3))
    for index, ax in enumerate(axes.flat):
        ax.set(xticks=[], yticks=[], frame_on=False)
        if index < len(arrays):
            array = arrays[index]
            ax.imshow(array if array.ndim == 2 else array.transpose(1, 2, 0), **imshow)
        if index < len(titles):
            ax.set_title(titles[index])
    figure.suptitle(title, fontsize=10)
    return figure
# %%
if __name__ == "__main__":
    try:
        from data.run import load_data, print_expected_time, start_run
    except ModuleNotFoundError as error:
        if error.name not in ("data", "data.run"):
            raise
        raise ModuleNotFoundError(
            "The folder data/ of this project is missing beside this file: get the whole project, "
            "and start in its folder (README: On Colab or Kaggle).") from None
    options, results, show_figure = start_run()    # results: a table of all that is measured
    device = options.device or best_device()
    print(f"PyTorch {torch.__version__} on {device}")
    digits, mnist, colour = load_data(options)
    print_expected_time(options, device, mnist, colour)

    # These are all the places in which the option --quick makes something smaller.
    quick = options.quick
    SEEDS = 1 if quick else 3                      # how often a comparison is repeated
    STEPS = 30 if quick else 150                   # of training that is over in seconds
    EPOCHS = {"epochs": 2} if quick else {}        # in place of those in RECIPES (4.3)
    FOLDER = 3 if quick else 15                    # epochs in 6.6
    LONG = 12 if quick else 40                     # epochs in 2.6
    PHOTOS = 20 if quick else 200                  # simulated photos in 4.8
    DEPTHS = (2, 6) if quick else (2, 5, 13)       # residual blocks in 5.5
    FEW = 200 if quick else 2000                   # colour images in 5.7
    BRIEF = 3 if quick else 6                      # epochs in 5.7
    TARGET = (300, 200) if quick else (1500, 1000)  # training and test images in section 6
    LABELLED = 50 if quick else 200                # how many of them have labels in 6.3 and 6.4
    SCRATCH = {200: 2} if quick else {20: 24, 50: 20, 200: 12}  # labels in 6.5, and epochs
    FINE_TUNING = 4 if quick else 6                # epochs in 6.5
    MAPS = 25 if quick else 200                    # heat maps in 7.4
    SHORT = 3 if quick else 10                     # epochs in 8.1

# %% [markdown]
"""
## 0 A classifier in 25 lines
Let us begin with the whole thing. We take 4,000 images of handwritten digits from MNIST, a well-known, larger data set.
Each has 28×28 grey pixels and a *label*: the digit that it shows. The network below learns from them to tell which
digit an image shows. Then it is tested on 1,000 other images.

Images go through a network in groups, called *batches*. A batch is a tensor of shape `[N, C, H, W]`. N is the number of
images, C the number of channels (1 if grey, 3 in colour), H the height and W the width. One pass through all training
images is an *epoch*. You need not understand each line yet. Sections 1 and 2 explain the layers, section 3 the network,
section 4 the loop.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    train_pixels = digits.train_images.float() / 255             # [4000, 1, 28, 28], from 0 to 1
    first_model = nn.Sequential(
        nn.Conv2d(in_channels=1, out_channels=16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(in_channels=16, out_channels=32, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10))
    optimizer = AdamW(first_model.parameters(), lr=3e-3)         # changes weights; lr: how fast

    for epoch in range(3):                                       # three times through all images
        for batch in torch.randperm(len(train_pixels)).split(32):  # 32 images at a time, shuffled
            logits = first_model(train_pixels[batch])            # [32, 10], a score for each class
            loss = F.cross_entropy(logits, digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()                                      # gradients of the loss
            optimizer.step()

    with torch.no_grad():
        predictions = first_model(digits.test_images.float() / 255).argmax(dim=1)
    accuracy = (predictions == digits.test_labels).float().mean().item()
    print(f"{accuracy:.1%} of {len(predictions):,} new digits are read correctly")
    assert accuracy > 0.94
# %% [markdown]
"""
In a few seconds the network has learnt to read about 97 of 100 digits that it has never seen. Nobody told it what a
stroke or a curve is. It found out from examples, in three steps that repeat: compute a prediction, measure how wrong it
is (the *loss*), and change all weights a little so that the loss becomes smaller.

**To remember**
- A classifier maps an image to one score for each class; the highest score is its answer.
- Training repeats three steps: predict, measure the loss, change the weights.
- What counts is the accuracy on images that were not used in training.

**Exercises 0.** a) How many numbers does a batch of 32 such images hold? b) What accuracy would guessing reach?

<details><summary>Answers</summary>

a) 32·1·28·28 = 25,088.
```python
assert digits.train_images[:32].numel() == 32 * 1 * 28 * 28 == 25_088
```
b) About 10%: whatever the digit is, one guess in ten hits it.
```python
guesses = torch.randint(0, 10, digits.test_labels.shape)
assert abs((guesses == digits.test_labels).float().mean() - 0.1) < 0.04
```
</details>

## 1 Why convolutions
### 1.1 What a convolutional network is
An image is a grid of numbers: one for each pixel if it is grey, three if it has colours (red, green and blue). A
*convolutional neural network* (CNN) looks for small patterns everywhere in such a grid. Each pattern is described by a
small square of weights, called a *kernel*. At every place, each weight is multiplied by the pixel under it, and the
products are added up. This sum, the kernel's *response*, is high where the pattern occurs. The kernels of the first
layer respond to edges and spots. Later layers combine what earlier ones found into larger patterns: corners, textures,
parts of objects. (How much networks rely on shape and how much on texture is debated; see Geirhos et al. 2019.) The
grid need not be an image. A sound is a row of numbers, and a sentence is a row of words, each described by a column of
numbers. The same idea works for both.

Three ideas make such networks work. Each output looks at a small neighbourhood only (1.2). The same weights are used at
every place (1.3). Neighbourhoods are summarised on the way (1.4). What does that save? Let us compare a *fully
connected* layer, in which every output depends on every input, with a convolution. Both turn a colour image of 32×32
pixels into 16 grids of that size. (`padding=1` keeps the size, see 2.1. On the device `meta`, a layer has shapes but no
numbers. With numbers it would take 200 MB.)
"""
# %%
if __name__ == "__main__":
    fully_connected = nn.Linear(3 * 32 * 32, 16 * 32 * 32, device="meta")
    convolution = nn.Conv2d(3, 16, kernel_size=3, padding=1)
    print(f"fully connected layer: {count_parameters(fully_connected):10,} parameters")
    print(f"convolution:           {count_parameters(convolution):10,} parameters")
# %% [markdown]
"""
Fifty million against 448: 16 kernels with 3×3 weights for each colour, plus one number for each kernel. Yet a
convolution is a fully connected layer under two constraints: most of its weights are zero, and the others repeat. To
see this, we take images of 8×8 = 64 pixels, and write the convolution as a matrix. A 3×3 kernel fits at 6×6 = 36
places, so the matrix has 36 rows, one for each output pixel. It has 64 columns, one for each input pixel. A matrix
times a vector of zeros with a single 1 gives one column of the matrix. So we feed in 64 images, in each of which one
pixel is 1 and all others are 0. Each of them gives one column.
"""
# %%
if __name__ == "__main__":
    conv = nn.Conv2d(1, 1, kernel_size=3, bias=False).requires_grad_(False)  # nothing to train
    conv.weight[:] = torch.arange(1.0, 10).reshape(1, 1, 3, 3)   # nine weights: 1 to 9
    one_bright_pixel = torch.eye(64).reshape(64, 1, 8, 8)        # 64 images of 8×8 pixels
    matrix = conv(one_bright_pixel).reshape(64, 36).T            # [36 outputs, 64 inputs]

    image = torch.randn(1, 1, 8, 8)
    assert torch.allclose(matrix @ image.flatten(), conv(image).flatten(), atol=1e-4)

    figure, ax = plt.subplots(figsize=(7.2, 4))
    figure.colorbar(ax.imshow(matrix.numpy(), cmap="viridis"), label="weight", shrink=0.9)
    ax.set(title="A 3×3 convolution as a matrix: mostly zeros, and nine weights that repeat",
           xlabel="input pixel (8×8 = 64)", ylabel="output pixel (6×6 = 36)")
    show_figure(figure, "1_1_convolution_as_matrix")
# %% [markdown]
"""
Each row computes one output pixel from the nine input pixels under the kernel. The next row has the same nine weights,
one pixel further. After six rows the kernel starts a new line of the image, hence the jumps. So a convolution can do
less than a fully connected layer. Yet it suits images: neighbouring pixels belong together, and a pattern may appear
anywhere.

In one dimension it is the same, for example with sound. We make a kernel whose 400 weights have the shape of a tone of
440 Hz. It slides over two sounds: its own tone, and the tone one octave higher. We look at its strongest response to
each. (Dividing by 200, the sum of the 400 squared values, makes a perfect match give 1.)
"""
# %%
if __name__ == "__main__":
    times = torch.arange(8000) / 16_000                          # half a second at 16 kHz
    tone, octave = torch.sin(2 * math.pi * 440 * times), torch.sin(2 * math.pi * 880 * times)
    detector = nn.Conv1d(1, 1, kernel_size=400, bias=False).requires_grad_(False)
    detector.weight[:] = tone[:400] / 200
    # [None, None] adds two dimensions: a batch of one sound, and one channel
    print(f"response to 440 Hz: {detector(tone[None, None]).max():.2f}")
    print(f"response to 880 Hz: {detector(octave[None, None]).max():.2f}")
# %% [markdown]
"""
The kernel responds to its own tone and not at all to the octave above. (Exactly zero only because it covers whole
periods of both.) That is what a kernel is: a detector of one pattern. Here we chose its weights. In a network, training
finds them.

### 1.2 Local receptive fields
A *unit* is one number in a layer's output. Its *receptive field* is the part of the input that it depends on. A unit of
a 3×3 convolution sees 3×3 pixels. A second such layer sees 3×3 units of the first, and through them 5×5 pixels.

How large is the field of a whole stack? That depends on three numbers of each layer: the kernel size, the *stride* (how
far the kernel moves from one place to the next) and the *dilation* (how far apart its weights lie, normally 1). The
side of a field begins at one pixel. Each layer adds

    dilation · (kernel size − 1) · step

pixels. The *step* is the distance, in pixels, between neighbouring units of the layer's input: 1 for the first layer, 2
behind a layer of stride 2, 4 behind two such layers. So three 3×3 layers of stride 2 see 1 + 2·1 + 2·2 + 2·4 = 15
pixels.
"""
# %%
def receptive_field(layers: Sequence[tuple[int, ...]]) -> int:
    """Return the side, in pixels, of the square that one output depends on.

    Each layer is (kernel_size, stride) or (kernel_size, stride, dilation).
    """
    size, step = 1, 1                                            # step: between units, in pixels
    for layer in layers:
        kernel_size, stride = layer[:2]
        dilation = layer[2] if len(layer) == 3 else 1
        size += dilation * (kernel_size - 1) * step
        step *= stride
    return size


def draw_receptive_field(ax: Axes, layers: Sequence[tuple[int, int]]) -> None:
    """Draw in one dimension which cells of each (kernel_size, stride) layer the top unit needs."""
    for level in range(len(layers) + 1):                         # level 0 is the input
        count = receptive_field(layers[level:])                  # cells that the top unit needs
        step = math.prod(stride for _, stride in layers[:level])  # how wide a cell is, in pixels
        for index in range(count):
            ax.add_patch(Rectangle(((index - count / 2) * step, level - 0.3), step, 0.6,
                                   facecolor="C0", edgecolor="white"))
    ax.set(xlim=(-8, 8), ylim=(-0.5, len(layers) + 0.5), yticks=range(len(layers) + 1), xticks=[],
           yticklabels=["input", *(f"layer {number + 1}" for number in range(len(layers)))])
# %%
if __name__ == "__main__":
    stacks = {"three 3×3": [(3, 1)] * 3, "three 3×3 of stride 2": [(3, 2)] * 3}
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.2))
    for ax, (name, layers) in zip(axes, stacks.items()):
        draw_receptive_field(ax, layers)
        ax.set_title(f"{name}: the top unit sees {receptive_field(layers)} pixels")
    show_figure(figure, "1_2_receptive_fields")
# %% [markdown]
"""
Read the picture from the top: each row shows the units that the row above reads, down to the pixels. (A box is as wide
as the distance between neighbouring units, in pixels.) Three layers of stride 1 see 7 pixels. With stride 2 they see
15, because every layer doubles the width of a box. In 3.4 the gradients of a network will confirm this formula.

### 1.3 Shared weights: move the image, and the map moves along
A fully connected layer that has learnt to find an eye in the top left corner knows nothing about eyes anywhere else,
because every place has weights of its own. A convolution uses the same few weights at every place. So if you shift the
image by six pixels, its *feature map* (the grid of the kernel's responses) should shift by six pixels too. This
property is called *translation equivariance*. Let us test it with a part of a photo and a random kernel. Shifting and
then convolving should give the same map as convolving and then shifting. (`torch.roll` shifts in a circle: what leaves
on the right comes back in on the left.)
"""
# %%
if __name__ == "__main__":
    from data import load_photo

    photo = load_photo().float().mean(dim=0) / 255               # [600, 512], grey, from 0 to 1
    part = photo[None, None, 170:234, 170:234]                   # [1, 1, 64, 64]
    torch.manual_seed(options.seed)
    conv = nn.Conv2d(1, 1, kernel_size=5, padding=2).requires_grad_(False)

    shift_then_convolve = conv(torch.roll(part, 6, dims=3))
    convolve_then_shift = torch.roll(conv(part), 6, dims=3)
    difference = (shift_then_convolve - convolve_then_shift).abs()
    show_figure(plot_images(
        [shift_then_convolve, convolve_then_shift, difference],
        ["shifted, then convolved", "convolved, then shifted", "their difference (grey: zero)"],
        title="The order does not matter, except near the borders"), "1_3_equivariance")

    inside = difference[:, :, 8:-8, 8:-8]
    print(f"largest difference inside {inside.max():.0e}, at the borders {difference.max():.2f}")
    assert inside.max() < 1e-5
# %% [markdown]
"""
Inside, the two maps are equal up to rounding. They differ in narrow bands at both sides, and six pixels from the left,
where the old borders meet. There one order reads the zeros that were put around the image (*padding*), and the other
reads real pixels. Equivariance is one reason why a convolutional network gets by on fewer examples than a fully
connected one. A kernel that has learnt a pattern in one corner finds it everywhere. A linear layer at the end may still
depend on where the pattern lies (3.5).

### 1.4 Pooling: a summary of a neighbourhood
To tell that a photo shows a face, we need to know *whether* there are two eyes and *roughly* where, not in which pixel
each begins. *Pooling* keeps one number for each neighbourhood, for example its maximum. The exact position is lost.
After pooling over 2×2 pixels, the map has half as many positions along each axis. Shifting the image by two pixels
shifts the pooled map by one. And if the image moves by one pixel? There is no half position to move to.
"""
# %%
if __name__ == "__main__":
    pooled = F.max_pool2d(conv(part), kernel_size=2)             # [1, 1, 32, 32]
    pooled_after_1 = F.max_pool2d(conv(torch.roll(part, 1, dims=3)), kernel_size=2)
    pooled_after_2 = F.max_pool2d(conv(torch.roll(part, 2, dims=3)), kernel_size=2)
    difference_1 = (pooled_after_1 - pooled)[:, :, 4:-4, 4:-4].abs().max()
    difference_2 = (pooled_after_2 - torch.roll(pooled, 1, dims=3))[:, :, 4:-4, 4:-4].abs().max()
    print("largest difference from the pooled map")
    print(f"  image shifted by two pixels, pooled map by one:   {difference_2:.0e}")
    print(f"  image shifted by one pixel, pooled map as it was: {difference_1:.2f}")
    assert difference_2 < 1e-5
    assert difference_1 > 1e-5
# %% [markdown]
"""
A shift by two pixels moves the pooled map along exactly. A shift by one pixel changes its values. What does pooling
gain, then? *Invariance*: if the image moves a little, the summary changes less than the map. How much less? We find the
edges of 200 digits, before and after a move by one pixel, with a kernel that 2.1 explains. (`F.conv2d` takes its
weights as an argument.) Then we pool both edge maps with several sizes. The table divides the norm of their difference
by the norm of the unmoved map (norm: the root of the sum of squares).
"""
# %%
if __name__ == "__main__":
    sobel = torch.tensor([[[[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]]])  # responds to vertical edges
    sample = digits.test_images[:200].float() / 255
    edges_before = F.conv2d(sample, sobel, padding=1)
    edges_after = F.conv2d(torch.roll(sample, 1, dims=3), sobel, padding=1)

    print("pooled over   change by a shift of one pixel")
    for side in (1, 2, 4, 7, 14, 28):
        before, after = F.max_pool2d(edges_before, side), F.max_pool2d(edges_after, side)
        print(f"{side:4} × {side:2}      {(after - before).norm() / before.norm():4.0%}")
    assert torch.equal(after, before)                            # over the whole image: no change
# %% [markdown]
"""
Without pooling (1 × 1), after a shift by one pixel the difference is about as large as the map itself. The larger the
neighbourhood, the smaller the change. The maximum of the whole image keeps no position at all, so nothing changes.
Networks pool in small steps, and each step adds a little invariance. Invariance is never complete: 3.5 and 4.7 measure
what a shift costs a whole network.

**To remember**
- A convolution is a fully connected layer with most weights zero and the others shared.
- Shift the input, and the feature map shifts along: exactly at stride 1 and away from the borders.
- Pooling trades exact position for invariance to small shifts.

**Exercises 1.** a) How many pixels does a unit behind three 3×3 convolutions of dilation 1, 2 and 4 see along each
axis? b) After two 2×2 poolings, which shifts of the image move the map exactly?

<details><summary>Answers</summary>

a) 15: each layer adds 2 · dilation.
```python
assert receptive_field([(3, 1, 1), (3, 1, 2), (3, 1, 4)]) == 1 + 2 + 4 + 8 == 15
```
b) Multiples of four pixels.
```python
image = torch.rand(1, 1, 32, 32)
for shift in range(1, 9):
    moved = F.max_pool2d(F.max_pool2d(image.roll(shift, dims=3), 2), 2)
    pooled = F.max_pool2d(F.max_pool2d(image, 2), 2)
    assert any(torch.equal(moved, pooled.roll(i, dims=3)) for i in range(8)) == (shift % 4 == 0)
```
</details>

## 2 The layers
### 2.1 Convolution: `nn.Conv2d`
What exactly does a kernel compute? Let us work out one convolution in numbers. We take an image of 5×5 pixels that is
bright on the right, and a kernel of 3×3 weights. The kernel lies over one place of the image. Each weight is
multiplied by the pixel under it, and the nine products are added up. That sum is one pixel of the output.
"""
# %%
def draw_numbers(ax: Axes, values: Tensor, title: str = "",
                 frame: tuple[int, int, int, int] | None = None) -> None:
    """Draw a matrix `[H, W]` with its numbers, and a frame (row, column, height, width)."""
    limit = 2 * max(values.abs().max().item(), 1)
    ax.pcolormesh(values.flip(0).numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit,
                  edgecolors="white", linewidth=1.5)
    height, width = values.shape
    for row in range(height):
        for column in range(width):
            ax.text(column + 0.5, height - row - 0.5, f"{values[row, column] + 0:g}",
                    ha="center", va="center")                    # + 0 makes 0 of -0
    if frame is not None:
        row, column, high, wide = frame
        ax.add_patch(Rectangle((column, height - row - high), wide, high, fill=False, linewidth=2.5,
                               zorder=3))
    ax.set(aspect="equal", title=title, xticks=[], yticks=[], frame_on=False)
# %%
if __name__ == "__main__":
    image = torch.tensor([[0, 0, 1, 2, 2], [0, 0, 1, 2, 2], [0, 1, 2, 2, 2],
                          [0, 1, 2, 2, 2], [1, 2, 2, 2, 2.0]])
    kernel = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1.0]])
    output = F.conv2d(image[None, None], kernel[None, None])[0, 0]  # [3, 3]

    figure, axes = plt.subplots(2, 4, figsize=(8, 4.6))
    for column, panels in enumerate(axes):                       # the first place, and the next
        products = image[0:3, column:column + 3] * kernel
        draw_numbers(panels[0], image, "image", frame=(0, column, 3, 3))
        draw_numbers(panels[1], kernel, "× kernel")
        draw_numbers(panels[2], products, f"= products, sum {products.sum():g}")
        draw_numbers(panels[3], output, "output", frame=(0, column, 1, 1))
    figure.suptitle("One place, and the next: multiply, and add up", fontsize=10)
    show_figure(figure, "2_1_in_numbers")
# %% [markdown]
"""
In the upper row the kernel lies in the top left corner, and the sum is 5. In the lower row it has moved on by one
pixel. This kernel subtracts the left neighbours from the right ones. So it responds where the image becomes brighter
from left to right, and gives zero where nothing changes. In the animation a kernel slides over a handwritten digit.

![A 3×3 kernel slides over a digit; beside it the feature map fills up](data/figures/convolution.gif)

A colour image has three *channels*: red, green and blue. Then the kernel has three channels too, a slice of weights for
each. Each slice is multiplied by its own channel, and all products are added up to one number.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(1)
    colours = torch.randint(0, 4, (3, 4, 4)).float()             # [3, 4, 4]: three channels
    slices = torch.randint(-1, 2, (3, 2, 2)).float()             # [3, 2, 2]: one kernel
    total = F.conv2d(colours[None], slices[None])[0, 0]          # [3, 3]: one feature map

    figure, axes = plt.subplots(3, 4, figsize=(7.6, 6))
    for channel, name in enumerate(("red", "green", "blue")):
        products = colours[channel, :2, :2] * slices[channel]
        draw_numbers(axes[channel, 0], colours[channel], f"image: {name}", frame=(0, 0, 2, 2))
        draw_numbers(axes[channel, 1], slices[channel], "× kernel's slice")
        draw_numbers(axes[channel, 2], products, f"sum {products.sum():g}")
        axes[channel, 3].axis("off")
    draw_numbers(axes[1, 3], total, f"one map: -3 - 3 + 1 = {total[0, 0]:g}", frame=(0, 0, 1, 1))
    figure.suptitle("Three channels in, one kernel with three slices, one map out", fontsize=10)
    show_figure(figure, "2_1_channels")
# %% [markdown]
"""
A layer `nn.Conv2d` has `out_channels` kernels, and each gives one feature map. So its weight has the shape
`[out_channels, in_channels, height, width]`. Each kernel also has a *bias*, a number that is added to its whole map.
These are the settings. All but `groups` may be a number, or a pair for rows and columns.

- `kernel_size`: how large the kernels are;
- `stride`: how many pixels they move from one place to the next; 2 halves the size of the map;
- `padding`: how many rows and columns of zeros are put on each side; `"same"` keeps the size (at stride 1);
- `dilation`: the distance between neighbouring cells of the kernel, 1 if they touch;
- `groups`: into how many groups the channels are split; each group of outputs sees one group of inputs only.

How large is the output? A kernel covers *dilation · (kernel size − 1) + 1* pixels. From its first place it can move
*(size + 2 · padding − covered) // stride* times, where // rounds down. The output has one pixel more than that.

Below, the convolution is written twice. `convolve_with_loops` is the plainest form: two loops over the many places, and
a sum. That is slow. `conv2d_by_hand` loops over the few cells of the kernel instead. For each cell, `under_cell` holds
the pixels under that cell, at all places in all images. `einsum` multiplies them by the kernels' weights in this cell,
and sums over the input channels.
"""
# %%
def conv_output_size(size: int, kernel_size: int, stride: int = 1, padding: int = 0,
                     dilation: int = 1) -> int:
    """Return the output size of a convolution or pooling along one dimension, in pixels."""
    covered = dilation * (kernel_size - 1) + 1
    return (size + 2 * padding - covered) // stride + 1


def convolve_with_loops(image: Tensor, kernel: Tensor) -> Tensor:
    """Slide a kernel `[C, h, w]` over an image `[C, H, W]`: a map `[H - h + 1, W - w + 1]`."""
    _, height, width = kernel.shape
    output = torch.zeros(image.shape[1] - height + 1, image.shape[2] - width + 1)
    for row in range(output.shape[0]):
        for column in range(output.shape[1]):
            under_kernel = image[:, row:row + height, column:column + width]
            output[row, column] = (under_kernel * kernel).sum()
    return output


def as_pair(setting: int | tuple[int, int]) -> tuple[int, int]:
    """Return a setting for rows and columns as a pair."""
    return setting if isinstance(setting, tuple) else (setting, setting)


def conv2d_by_hand(x: Tensor, weight: Tensor, bias: Tensor | None = None,
                   stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
                   dilation: int | tuple[int, int] = 1) -> Tensor:
    """Compute what `F.conv2d` computes (with one group), for all places at once.

    From x `[N, in_channels, H, W]`, weight `[out_channels, in_channels, kernel_h, kernel_w]` and
    bias `[out_channels]` to `[N, out_channels, H_out, W_out]`, sizes as `conv_output_size` says.
    """
    stride_y, stride_x = as_pair(stride)
    padding_y, padding_x = as_pair(padding)
    dilation_y, dilation_x = as_pair(dilation)
    height = conv_output_size(x.shape[2], weight.shape[2], stride_y, padding_y, dilation_y)
    width = conv_output_size(x.shape[3], weight.shape[3], stride_x, padding_x, dilation_x)
    x = F.pad(x, (padding_x, padding_x, padding_y, padding_y))
    output = x.new_zeros(len(x), len(weight), height, width)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):                         # cell (i, j) of the kernel
            top, left = i * dilation_y, j * dilation_x
            under_cell = x[:, :, top:top + stride_y * height:stride_y,
                           left:left + stride_x * width:stride_x]  # [N, in_channels, H_out, W_out]
            # c, the input channels, are summed over; o are the output channels
            output += torch.einsum("nchw,oc->nohw", under_cell, weight[:, :, i, j])
    return output if bias is None else output + bias[:, None, None]
# %%
if __name__ == "__main__":
    assert torch.equal(convolve_with_loops(colours, slices), total)
    x = torch.randn(2, 6, 13, 17)                                # two images with 6 channels
    for kernel_size in (1, (2, 3), 5):
        for stride in (1, 2, (3, 1)):
            for padding in (0, 1, (2, 4)):
                for dilation in (1, 2, (1, 3)):
                    layer = nn.Conv2d(6, 4, kernel_size, stride, padding, dilation)
                    by_hand = conv2d_by_hand(x, layer.weight, layer.bias, stride, padding, dilation)
                    assert torch.allclose(layer(x), by_hand, atol=1e-5)
    print("formula and convolution by hand equal PyTorch's\n")

    print(f"input  {list(x.shape)}")
    for text, layer in (("padding='same'", nn.Conv2d(6, 12, kernel_size=3, padding="same")),
                        ("stride=2", nn.Conv2d(6, 12, kernel_size=3, stride=2)),
                        ("groups=2", nn.Conv2d(6, 12, kernel_size=3, groups=2)),
                        ("groups=6", nn.Conv2d(6, 12, kernel_size=3, groups=6))):
        print(f"{text:15} output {str(list(layer(x).shape)):16} weight {list(layer.weight.shape)}")

    # Mathematics and NumPy flip a kernel. PyTorch does not: it computes a cross-correlation.
    # With a flip, training would merely learn the flipped kernel.
    signal, weights = torch.tensor([1.0, 2, 4, 8]), torch.tensor([1.0, 0, -1])
    ours = F.conv1d(signal[None, None], weights[None, None])[0, 0]
    assert ours.tolist() == np.convolve(signal, weights.flip(0), mode="valid").tolist()
# %% [markdown]
"""
`padding="same"` keeps 13×17. Without padding (the last two lines) a 3×3 kernel loses two rows and columns: 11×15.
With stride 2 it visits every second of these places: 6×8. With two groups each kernel has only 3 input channels. With
six groups it has one, so every channel is filtered by itself; section 5.7 makes use of that.

Next, which pixels does one output read? The *gradient* can tell us: it says how much the output would change if a pixel
changed a little. Pixels that are not read have a gradient of zero. All weights are 1 here, so a pixel that is read has
the gradient 1. We add up the first output and twice its right neighbour. So the gradient is 1 where the first output
reads, 2 where its neighbour does, and 3 where both do.
"""
# %%
if __name__ == "__main__":
    colour_key = ListedColormap(["#eeeeee", "#4c9be8", "#f5c542", "#58b368"])
    figure, axes = plt.subplots(1, 4, figsize=(8, 3))
    for ax, (padding, stride, dilation) in zip(axes, ((0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 1, 2))):
        padded = torch.zeros(1, 1, 7 + 2 * padding, 7 + 2 * padding, requires_grad=True)
        output = F.conv2d(padded, torch.ones(1, 1, 3, 3), stride=stride, dilation=dilation)[0, 0]
        (read,) = torch.autograd.grad(output[0, 0] + 2 * output[0, 1], padded)
        read = read[0, 0].flip(0)                                # 1: first, 2: neighbour, 3: both
        ax.pcolormesh(read.numpy(), cmap=colour_key, vmin=-0.5, vmax=3.5, edgecolors="white")
        ax.add_patch(Rectangle((padding, padding), 7, 7, fill=False, linewidth=2, zorder=3))
        ax.set(aspect="equal", title=f"padding {padding}, stride {stride}, dilation {dilation}\n"
               f"7×7 to {len(output)}×{len(output)}", xticks=[], yticks=[], frame_on=False)
    figure.legend(handles=[Patch(color="#4c9be8", label="read by the first output"),
                           Patch(color="#f5c542", label="by its right neighbour"),
                           Patch(color="#58b368", label="by both"),
                           Patch(fill=False, linewidth=2, label="the image")],
                  loc="outside lower center", ncols=4)
    show_figure(figure, "2_1_stride_padding_dilation")
# %% [markdown]
"""
At stride 1, neighbouring outputs share two thirds of their pixels. At stride 2 they share a single column. With
dilation 2 they share none, since each reads the pixels in the gaps of the other.

Padding does more than keep the size: it makes border pixels count. Without it the kernel reads a corner pixel at one
place only, and a pixel in the middle at nine.
"""
# %%
if __name__ == "__main__":
    figure, axes = plt.subplots(1, 2, figsize=(6.6, 3.2))
    for ax, padding in zip(axes, (0, 1)):
        image = torch.zeros(1, 1, 6, 6, requires_grad=True)
        output = F.conv2d(image, torch.ones(1, 1, 3, 3), padding=padding)
        (times_read,) = torch.autograd.grad(output.sum(), image)
        draw_numbers(ax, times_read[0, 0], f"padding={padding}: how often each pixel is read")
    show_figure(figure, "2_1_border_pixels")
# %% [markdown]
"""
Each output that reads a pixel adds 1 to its gradient. With a padding of 1, a corner is read four times instead of once.

Now a real image. Long before networks, kernels were designed by hand. Sobel's two kernels (1968) compute how fast the
brightness changes from left to right and from top to bottom. Where the brightness changes fast, there is an edge. The
first kernel is the one that we worked out in numbers, the second is its transpose (`.mT`).
"""
# %%
if __name__ == "__main__":
    sobel_both = torch.cat([sobel, sobel.mT])                    # [2, 1, 3, 3]: two kernels
    edges = F.conv2d(photo[None, None], sobel_both, padding=1)[0]  # [2, 600, 512]: two maps
    show_figure(plot_images(
        [photo, edges[0].abs() / 4, edges[1].abs() / 4, edges.norm(dim=0) / 4],
        ["photo", "vertical edges", "horizontal edges", "strength of both"],
        title="What two kernels of nine weights find in a photo", vmin=0, vmax=1), "2_1_edges")
# %% [markdown]
"""
Must a kernel be designed? Suppose that we had only the photo and its first edge map. Which kernel leads from one to the
other? We start with nine random weights and let gradient descent change them until the output fits. Training a network
is the same, with more kernels.
"""
# %%
if __name__ == "__main__":
    source = photo[None, None, 100:228, 150:278]                 # [1, 1, 128, 128]: half a face
    target = F.conv2d(source, sobel)
    torch.manual_seed(options.seed)
    learnt = nn.Conv2d(1, 1, kernel_size=3, bias=False)
    optimizer = torch.optim.Adam(learnt.parameters(), lr=0.05)
    for step in range(601):
        loss = F.mse_loss(learnt(source), target)
        if step % 200 == 0:
            print(f"step {step:3}: mean squared error {loss.item():.6f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("learnt kernel:")
    for row in learnt.weight[0, 0].tolist():
        print("".join(f"{weight:8.2f}" for weight in row))
    assert torch.allclose(learnt.weight, sobel, atol=0.1)
# %% [markdown]
"""
The error falls to nearly zero, and the nine weights are nearly Sobel's. The network of section 0 found its kernels in
the same way. But nobody gave it pictures of edges: it found out by itself which patterns tell digits apart.

### 2.2 Activation: `nn.ReLU`
Without its bias, a convolution f is linear: f(a + b) = f(a) + f(b) for any two images a and b. Two convolutions in a
row, with biases or without, compute nothing that one linear layer could not. So a non-linear function has to stand
between them, the *activation*. The usual one is ReLU, max(0, x). It passes positive responses and sets negative ones to
zero.
"""
# %%
if __name__ == "__main__":
    conv1 = nn.Conv2d(1, 8, kernel_size=3, bias=False).requires_grad_(False)
    conv2 = nn.Conv2d(8, 1, kernel_size=3, bias=False).requires_grad_(False)
    a, b = torch.randn(1, 1, 16, 16), torch.randn(1, 1, 16, 16)
    for name, network in (("two convolutions", nn.Sequential(conv1, conv2)),
                          ("with ReLU between", nn.Sequential(conv1, nn.ReLU(), conv2))):
        difference = (network(a + b) - (network(a) + network(b))).abs().max()
        print(f"{name:18} f(a + b) differs from f(a) + f(b) by {difference:.0e}")

    before = edges[0, 20:320, 100:400]                           # dark to bright is positive
    after = before.relu()
    show_figure(plot_images(
        [before, after], ["before ReLU: edges of two signs", "after: the positive ones"],
        title=f"ReLU keeps the red responses; {(after == 0).float().mean():.0%} of the map is zero",
        width=6.8, cmap="RdBu_r", vmin=-1.5, vmax=1.5), "2_2_relu")
# %% [markdown]
"""
Without ReLU the two layers together are still linear: the difference is mere rounding. With ReLU they are not. In the
picture, edges from dark to bright are red, the opposite ones blue. After ReLU a unit says only how strongly it has
found the pattern of its kernel. The opposite edges are not lost for the network: another kernel can look for them.

### 2.3 Pooling: `nn.MaxPool2d`, `nn.AvgPool2d`
Pooling layers compute one number for each neighbourhood. By default their stride is the kernel size, so neighbourhoods
do not overlap. They have no parameters.
"""
# %%
if __name__ == "__main__":
    edge_map = edges[0].abs()[None, None, 40:104, 200:264]       # [1, 1, 64, 64]: half the badge
    maximum = nn.MaxPool2d(kernel_size=8)(edge_map)              # [1, 1, 8, 8]
    average = nn.AvgPool2d(kernel_size=8)(edge_map)              # [1, 1, 8, 8]
    show_figure(plot_images(
        [edge_map, maximum, average],
        [f"edges, largest {edge_map.max():.1f}", f"maximum of 8×8, largest {maximum.max():.1f}",
         f"average of 8×8, largest {average.max():.1f}"],
        title="The maximum keeps strong responses, the average dilutes them"), "2_3_pooling")
    for size in (28, 14, 7):
        layer = nn.Linear(32 * size * size, 10)
        print(f"linear layer on 32 maps of {size:2}×{size:2}: "
              f"{count_parameters(layer):8,} parameters")
# %% [markdown]
"""
The maximum tells whether the pattern occurs in the neighbourhood. The average tells how much of it there is, and a thin
line becomes faint. Pooling saves later convolutions time, but no weights. A fully connected layer at the end does need
fewer weights: each 2×2 pooling before it saves three quarters of them.

### 2.4 Flatten and `nn.Linear`: from maps to answers
Feature maps say what is where. To get an answer, `nn.Flatten` lays all their pixels out in one row, and `nn.Linear`
computes a weighted sum of them for each output. The same convolutions can serve different questions. A *classifier* of
digits has ten outputs, and the highest score wins. A *regressor* has outputs that should equal given numbers. As an
example of regression, let us train a network to find a digit. MNIST has centred all digits, so we shift them at random,
and ask for the centre of mass of the bright pixels. Its row and column are counted from the middle of the image. Rows
and columns run from 0 to 27, so the middle is 13.5.
"""
# %%
def random_shift(images: Tensor, pixels: int = 2, padding_mode: str = "constant") -> Tensor:
    """Shift each image `[N, C, H, W]` at random, by up to `pixels` along each axis.

    Pad it, and cut a window out at random. What moves in is black, or with the padding mode
    "reflect" the image's own mirrored border.
    """
    count, _, height, width = images.shape
    padded = v2.functional.pad(images, [pixels], padding_mode=padding_mode)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)    # [N, C, down, right, H, W]
    down, right = torch.randint(2 * pixels + 1, (2, count), device=images.device)
    return windows[torch.arange(count, device=images.device), :, down, right]


def centre_of_mass(images: Tensor) -> Tensor:
    """Return `[N, 2]`: the mean row and column of the brightness of `[N, 1, H, W]`, in pixels."""
    images = images[:, 0].float()
    rows = torch.arange(images.shape[1], device=images.device)
    columns = torch.arange(images.shape[2], device=images.device)
    row = (images.sum(dim=2) * rows).sum(dim=1) / images.sum(dim=(1, 2))
    column = (images.sum(dim=1) * columns).sum(dim=1) / images.sum(dim=(1, 2))
    return torch.stack([row, column], dim=1)


def small_network(outputs: int = 10, dropout: float = 0.0, batch_norm: bool = False) -> nn.Module:
    """Return two convolutions of stride 2 and a linear layer; 2.5 and 2.6 explain the options."""
    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()

    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=5, stride=2), norm(16), nn.ReLU(),          # [N, 16, 12, 12]
        nn.Conv2d(16, 32, kernel_size=5, stride=2), norm(32), nn.ReLU(),         # [N, 32, 4, 4]
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * 4 * 4, outputs))
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    classifier = small_network(outputs=10)                       # ten scores
    regressor = small_network(outputs=2)                         # a row and a column
    print("outputs for 64 images:", list(classifier(train_pixels[:64]).shape), "and",
          list(regressor(train_pixels[:64]).shape))
    optimizer = AdamW(regressor.parameters(), lr=3e-3)
    for step in range(201):
        batch = torch.randint(len(digits.train_images), (64,))   # 64 indices
        shifted = random_shift(digits.train_images[batch], pixels=4)  # each by its own shift
        loss = F.mse_loss(regressor(shifted / 255), centre_of_mass(shifted) - 13.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}: off by {loss.sqrt():.2f} pixels")

    shifted = random_shift(digits.test_images, pixels=4)         # digits that it has never seen
    truth = centre_of_mass(shifted) - 13.5
    with torch.no_grad():
        error = F.mse_loss(regressor(shifted / 255), truth).sqrt()
    print(f"test digits: off by {error:.2f} pixels; always answering the middle: "
          f"{truth.square().mean().sqrt():.2f}")
    assert error < 1
# %% [markdown]
"""
The untrained network is no better than always answering "the middle". After 200 steps it is off by about half a pixel
along each axis, on new digits too. Only the last layer and the loss differ from a classifier: the mean squared error
compares two numbers with two others.

### 2.5 Batch normalisation: `nn.BatchNorm2d`
A layer gets its numbers from the layers before it. Those layers change during training, and so does the size of the
numbers. *Batch normalisation* (Ioffe & Szegedy 2015) sets the mean and the spread of these numbers anew. It treats each
channel by itself: it subtracts the mean over all images and pixels of the batch, and divides by their standard
deviation. Then it multiplies by a learnt number (at first 1) and adds another (at first 0). So these two learnt numbers
are the new spread and mean, whatever the layers before do. Networks with it train more stably and at higher learning
rates; 8.1 measures one such case. (The paper's explanation is steadier inputs; Santurkar et al. 2018 dispute it.)
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    conv, norm = nn.Conv2d(1, 4, kernel_size=5, bias=False), nn.BatchNorm2d(4)
    x = conv(train_pixels[:256]).detach()                        # [256, 4, 24, 24]
    normalised = norm(x)                                         # a new layer is in training mode
    mean = x.mean(dim=(0, 2, 3), keepdim=True)                   # [1, 4, 1, 1]: for each channel
    std = x.std(dim=(0, 2, 3), keepdim=True)                     # [1, 4, 1, 1]
    assert torch.allclose(normalised, (x - mean) / std, atol=1e-2)

    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    for ax, maps, title in ((axes[0], x, "before: each channel has its own mean and spread"),
                            (axes[1], normalised, "after: mean 0 and standard deviation 1")):
        for channel in range(4):
            values = maps[:, channel].detach().flatten().numpy()
            ax.hist(values, bins=120, histtype="step", color=f"C{channel}",
                    label=f"channel {channel}")
            ax.errorbar(values.mean(), 1.5 * 1.8 ** channel, xerr=values.std(), fmt="o",
                        color=f"C{channel}", capsize=3, markersize=4)
        ax.set(title=title, xlabel="value", yscale="log", ylim=(1, None))
    axes[0].set(ylabel="number of pixels")
    axes[1].legend()
    show_figure(figure, "2_5_batch_norm")
# %% [markdown]
"""
The dots and bars at the bottom mark the mean and the standard deviation of each channel. On the left they differ, on
the right they agree. (The tall spike of each channel comes from the black background of the digits: there every pixel
has the same value.) Four things are good to know about batch normalisation:

- In training it uses the statistics of the batch, so the output for one image depends on the others. That adds noise,
  which works a little against overfitting (2.6).
- Meanwhile it keeps a running average of these statistics. After `model.eval()` it uses that average, so do not forget
  `eval()` before you predict.
- It subtracts the mean. That cancels any bias of the convolution before it; `bias=False` there saves some parameters.
- It may stand before the activation, as in the paper, or after it.

Does the output for the first image depend on the others? If so, its gradient with respect to them is not zero.
"""
# %%
if __name__ == "__main__":
    x.requires_grad_()
    for training in (False, True):
        norm.train(training)
        (gradient,) = torch.autograd.grad(norm(x)[0].sum(), x)           # of the first output
        by_others = gradient[1:].abs().mean().item()                     # for all other images
        print(f"training={training!s:5}  mean gradient with respect to the others: {by_others:.1e}")
        assert (by_others > 0) == training
    assert torch.allclose(norm(x + 3), norm(x), atol=1e-4)       # a bias changes nothing
# %% [markdown]
"""
In evaluation the output does not depend on the other images, in training it does. The last line of the cell adds 3 to
every input, as a bias would, and checks that the output stays the same.

### 2.6 Overfitting, and `nn.Dropout` against it
A network can memorise its training images, with everything that is accidental in them. This is called *overfitting*. We
notice it on other images: their loss stops falling and rises again, while the training loss goes on falling. (If both
losses stay high, the network is too small or not yet trained: *underfitting*.)

*Dropout* (Srivastava et al. 2014) works against it. In training it sets some of a layer's outputs to zero, chosen at
random. No unit can rely on any other one, so the network has to learn its answer in several ways. Let us train a small
network on only 300 digits, without dropout and with it, and watch the loss on 1,000 others.
"""
# %%
if __name__ == "__main__":
    few, few_labels = train_pixels[:300], digits.train_labels[:300]
    others = digits.test_images / 255
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True)
    for ax, dropout in zip(axes, (0.0, 0.6)):
        torch.manual_seed(options.seed)
        model = small_network(dropout=dropout)
        optimizer = AdamW(model.parameters(), lr=2e-3)
        train_losses, other_losses = [], []
        for epoch in range(LONG):
            model.train()
            for batch in torch.randperm(300).split(30):
                loss = F.cross_entropy(model(few[batch]), few_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()                                         # switches dropout off
            with torch.no_grad():
                train_losses.append(F.cross_entropy(model(few), few_labels).item())
                other_losses.append(F.cross_entropy(model(others), digits.test_labels).item())
        ax.plot(train_losses, label="300 training images")
        ax.plot(other_losses, label="1,000 other images")
        ax.set(xlabel="epoch", ylabel="loss", ylim=(0, 1.3), title=f"dropout {dropout}: lowest "
               f"{min(other_losses):.2f}, at the end {other_losses[-1]:.2f}")
    axes[0].legend()
    show_figure(figure, "2_6_overfitting")
# %% [markdown]
"""
On the left the training loss goes to zero, while the loss on other images rises from its lowest point: overfitting. On
the right, with dropout, the lowest point comes later and lies lower, and the curve rises less.

`nn.Dropout(0.5)` sets half of the numbers to zero and doubles the others, so that sums stay the same on average. In a
feature map a pixel's neighbours carry nearly the same information, so dropping single pixels removes little.
`nn.Dropout2d` drops whole channels instead (Tompson et al. 2015).
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    maps = F.conv2d(train_pixels[:1], torch.randn(6, 1, 5, 5), padding=2).relu()  # [1, 6, 28, 28]
    dropped = nn.Dropout(0.5)(maps)
    channels_dropped = nn.Dropout2d(0.5)(maps)
    assert torch.equal(dropped[dropped != 0], 2 * maps[dropped != 0])
    assert torch.equal(nn.Dropout(0.5).eval()(maps), maps)       # in evaluation it does nothing
    titles = ["feature map"] * 6 + ["Dropout"] * 6 + ["Dropout2d"] * 6
    show_figure(plot_images(
        [*maps[0], *dropped[0], *channels_dropped[0]], titles, columns=6, width=7,
        title="Dropout hits single pixels, Dropout2d whole channels"), "2_6_dropout")
# %% [markdown]
"""
In the second row the shapes can still be recognised. In the third some channels are gone altogether.

**To remember**
- A kernel is multiplied with what lies under it, and the products of all channels are added up.
- Between two linear layers there has to be a non-linear function; ReLU is the usual one.
- Batch normalisation and dropout behave differently in training and in evaluation: use `train()` and `eval()`.

**Exercises 2.** a) Image 32×32, kernel 5×5, stride 2, padding 1: how large is the output? b) Design a kernel that
responds to edges that run from top left to bottom right.

<details><summary>Answers</summary>

a) 15×15 pixels.
```python
assert conv_output_size(32, kernel_size=5, stride=2, padding=1) == 15
```
b) Positive weights above the diagonal, negative ones below it. To edges along the other diagonal it gives zero.
```python
diagonal = torch.tensor([[0.0, 1, 2], [-1, 0, 1], [-2, -1, 0]])[None, None]
rows, columns = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
falling, rising = (columns > rows).float()[None, None], (columns + rows > 8).float()[None, None]
assert F.conv2d(falling, diagonal).abs().max() == 4 and F.conv2d(rising, diagonal).abs().max() == 0
```
</details>

## 3 A basic network
### 3.1 The pattern
From LeNet (1998) to VGG (2014), most convolutional classifiers follow one pattern:

INPUT → [CONV → ACT → POOL] × N → FLATTEN → [FC → ACT] × M → FC

CONV is a convolution, ACT an activation, POOL a pooling, FC a fully connected layer. N and M say how often a part is
repeated. Larger networks have several CONV → ACT before a POOL. Later ones replace FLATTEN by an average over each
map (5.3). From layer to layer the maps become smaller and more numerous: less *where*, more *what*. The last layer
gives one raw score for each class. These scores are called *logits*. They become probabilities in the loss (4.2).

Images are stored as bytes from 0 to 255. Networks train best on numbers around zero. So from here on, every image goes
through `standardize` first. It subtracts the mean of MNIST's pixels and divides by their standard deviation; for images
with three channels it takes the constants of CIFAR-10, a data set of photos.

### 3.2 `SimpleCNN`
Our basic network has N = 2 blocks and M = 0. Each block is a 5×5 convolution with a padding of 2, ReLU, and 2×2
max-pooling. The first block has 16 channels, the second 32. One linear layer follows.
"""
# %%
def standardize(images: Tensor) -> Tensor:
    """Turn `uint8 [N, 1 or 3, H, W]` into `float32` of mean near 0, standard deviation near 1."""
    constants = {1: ([0.1307], [0.3081]),                        # grey: mean and std of MNIST
                 3: ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])}  # colour: of CIFAR-10
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in constants:
        raise ValueError(f"expected uint8 [N, 1 or 3, H, W], not {images.dtype} {[*images.shape]}")
    mean, std = 255 * torch.tensor(constants[images.shape[1]], device=images.device)  # [C] each
    return (images - mean[:, None, None]).div_(std[:, None, None])


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
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"SimpleCNN: expected [N, {', '.join(map(str, self.image_shape))}], "
                             f"got {list(x.shape)}")
        x = self.conv_block1(x)                                  # [N, 16, 14, 14] for 28×28 pixels
        x = self.conv_block2(x)                                  # [N, 32, 7, 7]
        return self.fc(x.flatten(start_dim=1))                   # [N, num_classes]
# %% [markdown]
"""
### 3.3 Layer by layer
How do we look inside a network while it runs? A *forward hook* is a function that PyTorch calls whenever a layer has
computed its output. Here is one that prints the shape.
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    model = SimpleCNN()
    one_digit = standardize(digits.test_images[4:5])             # [1, 1, 28, 28]

    def print_shape(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        print(f"{type(module).__name__}: {list(inputs[0].shape)} -> {list(output.shape)}")

    handles = [layer.register_forward_hook(print_shape) for layer in model.conv_block1]
    model(one_digit)
    for handle in handles:
        handle.remove()                                          # or it would go on printing
# %% [markdown]
"""
`recording` puts such a hook on the layers that we name, collects their outputs in a dictionary, and removes the hooks
at the end. (What a hook returns, unless it is `None`, replaces the output. Ours returns a copy: if the next layer
overwrites its input, what we collected is safe.)

`evaluating` switches a network to evaluation mode for a while, then back. With these two helpers we can draw what a
network makes of an image, and print a table of its layers.
"""
# %%
@contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Within this block collect {module: its output}, in the order in which modules finish."""
    outputs = {}

    def keep(module: nn.Module, inputs: tuple, output: object) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        outputs.pop(module, None)                                # used twice: the last counts
        outputs[module] = output
        return output.clone()                                    # this copy goes to the next layer

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this block the model is in evaluation mode; then each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def layer_table(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """Return a table of layers, output shapes and parameters, for one image `[C, H, W]`."""
    layers = [module for module in model.modules() if not list(module.children())]
    image = next(model.parameters()).new_zeros(1, *image_shape)
    with recording(layers) as outputs, evaluating(model), torch.no_grad():
        model(image)
    rows = [f"{type(layer).__name__:18} {str(list(output.shape[1:])):>14} "
            f"{count_parameters(layer):>10,}" for layer, output in outputs.items()]
    return "\n".join([f"{'layer':18} {'output shape':>14} {'parameters':>10}", *rows,
                      f"{'total':33} {count_parameters(model):>10,}"])


def plot_network(model: nn.Module, image: Tensor, layers: dict[str, nn.Module],
                 title: str) -> Figure:
    """Draw an image `[1, C, H, W]` and, from left to right, what the named layers make of it.

    Of feature maps up to eight are drawn, of vectors all numbers as bars.
    """
    with recording(layers.values()) as outputs, evaluating(model), torch.no_grad():
        model(image)
    figure, axes = plt.subplots(1, 1 + len(layers), figsize=(8, 2.9))
    picture = image[0].detach().cpu()                            # [1 or 3, H, W]
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    axes[0].imshow((picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)).numpy())
    axes[0].set(xticks=[], yticks=[], title=f"image\n{'×'.join(map(str, image.shape[1:]))}")
    for ax, (name, layer) in zip(axes[1:], layers.items()):
        output = outputs[layer][0].cpu()
        ax.set_title(f"{name}\n{'×'.join(map(str, output.shape))}")
        if output.ndim == 3:
            grid = make_grid(output[:8, None].float(), nrow=2, padding=1, normalize=True,
                             scale_each=True, pad_value=math.nan)
            ax.imshow(grid[0].numpy(), cmap="viridis")
            ax.set(xticks=[], yticks=[], frame_on=False)
        else:
            ax.barh(range(len(output)), output.numpy())
            ax.invert_yaxis()
            ax.set(yticks=range(len(output)))
    figure.suptitle(title, fontsize=10)
    return figure
# %%
if __name__ == "__main__":
    show_figure(plot_network(
        model, one_digit, {"convolution 1": model.conv_block1[0], "block 1": model.conv_block1,
                           "convolution 2": model.conv_block2[0], "block 2": model.conv_block2,
                           "fc: logits": model.fc},
        "SimpleCNN, untrained: 8 channels after each step, and ten logits"), "3_3_simple_cnn")
    print(layer_table(model, (1, 28, 28)))
    assert count_parameters(SimpleCNN()) == 28_938
    assert count_parameters(SimpleCNN(in_channels=3, image_size=32)) == 34_538
# %% [markdown]
"""
Each small square is one channel, on a scale of its own; the first eight are drawn. The titles count all maps and give
their size: from 16 maps of 28×28 pixels to 32 of 7×7. The ten bars are the logits. The network is not trained yet, so
they are small, and mean nothing. More than half of the parameters sit in the last layer: each of its ten outputs has
32·7·7 = 1,568 weights and a bias. For colour images of 32×32 pixels the network has 34,538 parameters.

### 3.4 Checks before training
Training takes time, and many mistakes can be found before it. Three checks are worth making with every new network.

*What does it see?* As in 2.1, the gradient tells which pixels a unit reads: outside its receptive field, the gradient
is zero. We compute it for the units at the middle place of each block. But ReLU and max-pooling can make it zero, too.
So we add up the gradients of 64 noisy copies of the digit: what is blocked in one copy passes in another. The result
should agree with the formula of 1.2, in which a 2×2 pooling is a layer with kernel size 2 and stride 2.
"""
# %%
if __name__ == "__main__":
    image = standardize(digits.test_images[4:5]).requires_grad_()
    noisy = image + torch.randn(64, 1, 28, 28)                   # the 64 gradients add up
    maps1 = model.conv_block1(noisy)                             # [64, 16, 14, 14]
    maps2 = model.conv_block2(maps1)                             # [64, 32, 7, 7]
    middle1, middle2 = maps1[:, :, 7, 7], maps2[:, :, 3, 3]      # the middle place, all channels

    figure, axes = plt.subplots(1, 2, figsize=(6.8, 3.6))
    for ax, number, units in zip(axes, (1, 2), (middle1, middle2)):
        (gradient,) = torch.autograd.grad(units.sum(), image, retain_graph=True)
        seen = (gradient[0, 0] != 0).numpy()                     # [28, 28]
        side = seen.any(axis=0).sum()
        assert side == receptive_field([(5, 1), (2, 2)] * number)
        ax.imshow(image[0, 0].detach().numpy())
        ax.imshow(seen, cmap="Reds", alpha=0.5 * seen, vmin=0, vmax=1.4)
        ax.set(xticks=[], yticks=[], title=f"block {number}: {side}×{side} pixels")
    figure.suptitle("What one unit in the middle of each block sees", fontsize=10)
    show_figure(figure, "3_4_receptive_field")
# %% [markdown]
"""
A unit of block 1 sees 6×6 pixels, one of block 2 sees 16×16, a good part of a digit. If a network's last units saw
only a corner of the object, you would know now. (Pixels in the middle of a field usually count most, so the
*effective* receptive field is smaller; Luo et al. 2016.)

*Does it start undecided?* An untrained network should give all ten classes about the same score. Then the loss is ln 10
= 2.303 (4.2 says why). A much larger loss means that the network is confidently wrong from the start, for example
because its input was not standardised.

*Can it learn at all?* Any network should be able to memorise a single batch. If it cannot, look for a bug in the code.
The learning rate or the data can be at fault too: pixels that are NaN, or the same image with two labels.
"""
# %%
if __name__ == "__main__":
    images, labels = standardize(digits.train_images[:64]), digits.train_labels[:64]
    optimizer = AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"first loss {losses[0]:.3f} (undecided: {math.log(10):.3f}), last loss {losses[-1]:.4f}")
    assert abs(losses[0] - math.log(10)) < 0.3
    assert losses[-1] < 0.05
# %% [markdown]
"""
Our network passes both. The first loss is close to ln 10, and after 40 steps on one batch it is nearly zero.

### 3.5 Is the convolution worth it?
A convolution needs fewer parameters. Does it also learn better? To be fair, we give a fully connected network about as
many parameters: 28,630, with one layer of 36 units between input and output. SimpleCNN has 28,938. Both are trained on
the same digits for 150 steps (with `--quick` 30). Then we test them twice: on the test images, and on the same images
shifted two pixels down and two to the right.
"""
# %%
if __name__ == "__main__":
    def dense_network() -> nn.Sequential:
        """One hidden layer of 36 units, and no convolution."""
        return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 36), nn.ReLU(), nn.Linear(36, 10))

    assert count_parameters(dense_network()) == 28_630
    shifted_digits = torch.roll(digits.test_images, shifts=(2, 2), dims=(2, 3))
    for name, make_network in (("fully connected", dense_network), ("SimpleCNN", SimpleCNN)):
        accuracies = {"centred digits": [], "shifted digits": []}
        for seed in range(SEEDS):
            torch.manual_seed(options.seed + seed)
            model = make_network()
            optimizer = AdamW(model.parameters(), lr=2e-3)
            for step in range(STEPS):
                batch = torch.randint(len(digits.train_images), (64,))
                logits = model(standardize(digits.train_images[batch]))
                loss = F.cross_entropy(logits, digits.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for which, images in zip(accuracies, (digits.test_images, shifted_digits)):
                with torch.no_grad():
                    correct = model(standardize(images)).argmax(dim=1) == digits.test_labels
                accuracies[which].append(correct.float().mean().item())
        for which, values in accuracies.items():
            results.add_seeds("3.5", f"{name}, {which}", digits, "test accuracy", values)  # prints
# %% [markdown]
"""
The convolutional network is more accurate, and its lead is far larger when the digits are shifted. (The ± is the
standard deviation over three training runs. They differ in their *seed*, the number from which all random draws
follow.) When a stroke moves by two pixels, it meets other weights in the fully connected network. In SimpleCNN it meets
the same kernels, and the poolings absorb a part of the shift. Its last layer is still tied to places, so SimpleCNN
loses accuracy too (4.7 shows what helps). But SimpleCNN does more work. It uses each kernel at every place, and so
needs 2.8 million multiplications for an image. The other network needs 28,584.

### 3.6 Errors that do crash
Everybody meets these errors. They are frightening only until one has seen them once. We provoke each on purpose, and
print the first line of PyTorch's message and its cause. The remedy is in the code.
"""
# %%
def show_error(name: str, wrong: Callable[[], object], cause: str,
               remedy: Callable[[], object]) -> None:
    """Run what fails and print the first line of its message; then run what works instead."""
    try:
        wrong()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        print(f"{name}\n  message: {str(error).splitlines()[0][:100]}\n  cause:   {cause}\n")
    else:
        raise AssertionError(f"{name}: this was expected to fail")
    remedy()
# %%
if __name__ == "__main__":
    def network_with(inputs: int) -> nn.Sequential:
        """Two blocks as in SimpleCNN, and a linear layer that is made for `inputs` numbers."""
        return nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                             nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                             nn.Flatten(), nn.Linear(inputs, 10))

    images = standardize(digits.train_images[:64])               # [64, 1, 28, 28]
    show_error("1. The wrong size of the linear layer",
               wrong=lambda: network_with(32 * 28 * 28)(images),
               cause="two poolings make 28 to 14 to 7, so it gets 32·7·7 = 1,568 numbers",
               remedy=lambda: network_with(32 * 7 * 7)(images))
    print(layer_table(network_with(1)[:-1], (1, 28, 28)), "\n")  # [:-1]: without its linear layer
# %% [markdown]
"""
This error is among the most frequent. In the message, mat1 is the batch, with 1,568 numbers for each of 64 images. mat2
is the weight of the linear layer, made for 25,088 inputs. You need not compute the right number yourself. Print
`layer_table` without the linear layer: the last shape holds 1,568 numbers.
"""
# %%
if __name__ == "__main__":
    model = network_with(32 * 7 * 7)
    logits, labels = model(images), digits.train_labels[:64]
    show_error("2. A batch dimension is missing", wrong=lambda: model(images[0]),
               cause="its 32 maps of 7×7 were taken for 32 images; pass [N, C, H, W], even for one",
               remedy=lambda: model(images[0].unsqueeze(0)))
    show_error("3. The images are bytes", wrong=lambda: model(digits.train_images[:64]),
               cause="pixels are uint8, weights are float32",
               remedy=lambda: model(standardize(digits.train_images[:64])))
    show_error("4. The labels are floats", wrong=lambda: F.cross_entropy(logits, labels.float()),
               cause="class numbers must be integers (int64, in PyTorch also called Long)",
               remedy=lambda: F.cross_entropy(logits, labels.float().long()))
    one_hot = F.one_hot(labels, num_classes=10)                  # [64, 10]: 1 at the class, else 0
    show_error("5. The labels are one-hot", wrong=lambda: F.cross_entropy(logits, one_hot),
               cause="one-hot labels would have to be floats; simpler: class numbers, by argmax",
               remedy=lambda: F.cross_entropy(logits, one_hot.argmax(dim=1)))
    show_error("6. Model and input differ in type", wrong=lambda: model(images.double()),
               cause="NumPy's floats are float64, a model's weights float32",
               remedy=lambda: model(images.double().float()))
    if device.type == "cpu":
        print("7. Model and input on two devices: there is no accelerator here to show it")
    else:
        show_error("7. Model and input are on two devices", wrong=lambda: model.to(device)(images),
                   cause="the model was moved, the images were not",
                   remedy=lambda: model.to(device)(images.to(device)))
# %% [markdown]
"""
In errors 2 to 7 the shape, the type or the place of a tensor is wrong. When you see such a message, print `x.shape`,
`x.dtype` and `x.device` of whatever you pass in.

**To remember**
- The pattern: convolution, activation and pooling, repeated; then flatten and linear layers; logits at the end.
- Before you train, check shapes, receptive fields and the first loss (near ln(number of classes)); memorise one batch.
- With as many parameters, a convolutional network reads digits better than a fully connected one, but computes more.

**Exercises 3.** a) How many parameters has a SimpleCNN for 26 letters? b) Add a third block with 64 channels to a
SimpleCNN for 32×32 pixels. How many inputs does `fc` need?

<details><summary>Answers</summary>

a) 54,042: sixteen more outputs with 1,568 weights and a bias each.
```python
assert count_parameters(SimpleCNN(num_classes=26)) == 28_938 + 16 * (32 * 7 * 7 + 1) == 54_042
```
b) 64·4·4 = 1,024.
```python
model = SimpleCNN(in_channels=3, image_size=32)
model.conv_block2.append(nn.Sequential(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)))
model.fc = nn.Linear(64 * 4 * 4, 10)
assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
```
</details>

## 4 Training
### 4.1 Data and augmentation
PyTorch keeps two tasks apart. A *dataset* gives one image and its label for an index; `torchvision.datasets` has the
common ones. A *transform* changes images, for example their size. `torchvision.transforms.v2` has many. Here are some,
applied to a digit and to a photo. (The first printed line shows an item of `FakeData`, which makes noise and needs no
file.)
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    image, label = datasets.FakeData(9, image_size=(3, 32, 32), transform=v2.ToImage())[0]
    print(f"one item of a dataset: image {list(image.shape)} {image.dtype}, label {label}")

    transforms = {"original": v2.Identity(), "Resize": v2.Resize(12),
                  "RandomCrop": v2.RandomCrop(28, padding=6),
                  "RandomRotation": v2.RandomRotation(25),
                  "HorizontalFlip": v2.RandomHorizontalFlip(p=1),
                  "ColorJitter": v2.ColorJitter(brightness=0.5, hue=0.4)}
    digit = digits.test_images[7]                                # [1, 28, 28]
    face = v2.functional.resize(load_photo()[:, 80:340, 130:390], [28, 28])  # [3, 28, 28]
    changed = [transform(image) for image in (digit, face) for transform in transforms.values()]
    show_figure(plot_images(changed, list(transforms), columns=6, vmax=255,
                            title="Transforms of a digit and of a photo"), "4_1_transforms")

    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])])
    low, high = normalize(digit).aminmax()
    print(f"bytes scaled to 0 to 1, then v2.Normalize: from {low:.1f} to {high:.1f}")
# %% [markdown]
"""
(`RandomCrop` with `padding` puts a frame of zeros around an image before it crops. So it shifts the image, too.) Look
at the last printed line. `v2.ToDtype` scales bytes to 0 to 1. `v2.Normalize` subtracts a mean and divides by a standard
deviation, here 0.5 and 0.25. So black becomes −2 and white 2. (Our `standardize` does the same with other numbers.)

Random transforms are used for *augmentation*: in every epoch the network sees each image in another version, and learns
that they all mean the same. So augment only with changes that keep the label. A digit may be shifted, turned and scaled
a little. It must not be mirrored, because a mirrored 7 is no digit. Photos of animals or cars may be mirrored, and
their colours may change too.

There is one trap. A transform of v2 draws its random values once per call. If you give it a whole batch, all images of
the batch get the same crop. Our own `random_shift` (2.4) draws anew for each image. We pass the same digit eight times.
"""
# %%
if __name__ == "__main__":
    eight_times = digits.test_images[7:8].repeat(8, 1, 1, 1)     # [8, 1, 28, 28]
    cropped = v2.RandomCrop(28, padding=4)(eight_times)
    shifted = random_shift(eight_times, pixels=4)
    assert all(torch.equal(image, cropped[0]) for image in cropped)
    assert not all(torch.equal(image, shifted[0]) for image in shifted)
    show_figure(plot_images(
        [*cropped, *shifted], ["RandomCrop"] * 8 + ["random_shift"] * 8,
        title="One draw for the batch, and one draw for each image"), "4_1_one_draw_or_many")
# %% [markdown]
"""
Two more augmentations draw for each image. `random_affine` turns, scales and shifts. For every pixel of the result,
`affine_grid` computes where in the original it comes from, and `grid_sample` reads the brightness there. (You can skip
its code.) `shift_and_flip` shifts each image and mirrors half of them, the usual choice for small photos.
"""
# %%
def random_affine(images: Tensor, degrees: float = 10.0, scale: float = 0.1,
                  pixels: float = 2.0) -> Tensor:
    """Turn, scale and shift each image `uint8 [N, C, H, W]` by its own random amounts.

    The arguments are the largest rotation, change of size (as a share) and shift along each axis.
    """
    count, _, height, width = images.shape
    draws = 2 * torch.rand(4, count, device=images.device) - 1   # each from -1 to 1
    angle = draws[0] * math.radians(degrees)
    zoom = 1 + draws[1] * scale
    right = draws[2] * 2 * pixels / width                        # in the grid's unit: -1 to 1 is 2
    down = draws[3] * 2 * pixels / height
    first_row = [zoom * angle.cos(), -zoom * angle.sin() * height / width, right]
    second_row = [zoom * angle.sin() * width / height, zoom * angle.cos(), down]
    matrices = torch.stack(first_row + second_row, dim=1).reshape(count, 2, 3)
    grid = F.affine_grid(matrices, images.shape, align_corners=False)  # [N, H, W, 2]
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def shift_and_flip(images: Tensor, pixels: int = 2) -> Tensor:
    """Mirror half of the images `uint8 [N, C, H, W]`, and shift each; mirrored borders move in."""
    heads = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5  # a coin for each image
    return random_shift(torch.where(heads, images.flip(3), images), pixels, padding_mode="reflect")
# %% [markdown]
"""
### 4.2 The loss: `nn.CrossEntropyLoss`
The loss measures how wrong an answer is. It turns the logits into probabilities with a *softmax*: exponentiate each,
and divide by their sum. The loss, called *cross-entropy* (also `F.cross_entropy`), is −ln of the probability of the
correct class. It is zero if the network is certain and right, and −ln 0.1 = ln 10 ≈ 2.303 if all ten classes are
equally probable. There is no limit to how large it becomes if the network is certain and wrong. Labels are given as
class numbers.

*Label smoothing* (Szegedy et al. 2016) asks for a little less than certainty. With a smoothing of 0.1, the loss is 0.9
times the −ln of the correct class, plus 0.1 times the mean −ln of all classes. With ten classes it is lowest if the
correct one gets the probability 0.9 + 0.1/10 = 0.91, and every other one 0.01. Finite logits can reach that, while
certainty would need infinite ones. But the loss can no longer reach zero.
"""
# %%
if __name__ == "__main__":
    logits, label = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0])
    probabilities = logits.exp() / logits.exp().sum()
    by_hand = -torch.log(probabilities[0, 0])
    assert torch.allclose(nn.CrossEntropyLoss()(logits, label), by_hand)
    print("probabilities:", *(f"{p:.2f}" for p in probabilities[0]), f"  loss: {by_hand:.3f}")

    loss_of_each_class = -probabilities.log()                    # if it were the correct one
    smooth_by_hand = 0.9 * by_hand + 0.1 * loss_of_each_class.mean()
    assert torch.allclose(nn.CrossEntropyLoss(label_smoothing=0.1)(logits, label), smooth_by_hand)
# %% [markdown]
"""
The loss is −ln 0.79 ≈ 0.24. A common mistake is to put a softmax before this loss, which contains one already. The
network still learns, so nobody notices. The table shows why it learns badly. The first column says how far the logit of
the correct class is ahead of the nine others, which are equal. A negative number means behind. "Gradient" is the length
of the gradient of the loss with respect to the logits.
"""
# %%
if __name__ == "__main__":
    print("correct class      right way          with a softmax before it")
    print("ahead by         loss   gradient        loss   gradient")
    for ahead in (-5.0, 0.0, 5.0, 20.0):
        logits = (ahead * F.one_hot(label, 10)).requires_grad_()
        right = F.cross_entropy(logits, label)
        wrong = F.cross_entropy(logits.softmax(dim=1), label)
        right_slope = torch.autograd.grad(right, logits)[0].norm()
        wrong_slope = torch.autograd.grad(wrong, logits)[0].norm()
        print(f"{ahead:8.0f}     {right:8.4f}   {right_slope:8.4f}    "
              f"{wrong:8.4f}   {wrong_slope:8.4f}")
    assert abs(wrong.item() + math.log(math.e / (math.e + 9))) < 1e-3  # softmax gives 1, 0, 0, …
# %% [markdown]
"""
Look at the first line: the network is nearly certain that the correct class is not the answer. The right loss answers
with a strong gradient. With two softmaxes the gradient nearly vanishes, just where it is needed most. And in the last
line, where everything is right, the loss with two softmaxes stays at 1.461 instead of zero.

### 4.3 The loop
This is the training loop that you will find everywhere. A `DataLoader` deals out the images in shuffled batches. Each
batch takes the three steps of section 0: predict, measure the loss, change the weights (by `backward` and `step`). The
test images are used once, at the end. Do so in your own work too, and make all choices with other images (see
*validation* below). (This tutorial tests more often, to show you results.)
"""
# %%
if __name__ == "__main__":
    torch.manual_seed(options.seed)
    model = SimpleCNN()
    optimizer = AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(standardize(digits.train_images), digits.train_labels),
                        batch_size=64, shuffle=True)
    model.train()
    for epoch in range(2):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()                                # or gradients would add up
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        predictions = model(standardize(digits.test_images)).argmax(dim=1)
    accuracy = (predictions == digits.test_labels).float().mean().item()
    results.add("4.3", "the bare loop", digits, "test accuracy", accuracy)
# %% [markdown]
"""
What does the ± mean? With other test images, an accuracy *p* on *n* images would have come out a little differently.
Its *standard error* is √(p(1−p)/n), for example 0.5 percentage points for 97.5% of 1,000 images. If two networks
differ by less than about three times the larger ±, treat it as a tie. The ± says nothing about a second training,
which would also come out differently. With "over 3 seeds", the ± is the spread (standard deviation) of three training
runs instead.

A `DataLoader` is made for more images than fit into memory. It loads and transforms them one by one, if need be in
several processes. Small images fit into memory as one tensor of bytes. Then indices pick a batch, and we can augment
and standardise it as a whole. All trainings below do so; the README's tables of speed compare this with the usual ways.
`train_epoch` is the loop again, for batches of indices. It adds four things:

- `augment` changes a batch of bytes at random, and `prepare` turns it into the numbers that the network takes;
- a *schedule* changes the learning rate after each step;
- label smoothing (4.2);
- a choice of number format. *bfloat16* numbers have half the bits of float32 numbers, and some processors calculate
  faster with them. With `autocast`, PyTorch uses them where their precision suffices.
"""
# %%
def train_epoch(model: nn.Module, batches: Iterable[Tensor], images: Tensor, labels: Tensor,
                optimizer: torch.optim.Optimizer, schedule: LRScheduler | None = None, *,
                augment: Callable | None = None, prepare: Callable = standardize,
                label_smoothing: float = 0.0, precision: str = "float32") -> Tensor:
    """Train on each batch of indices once; return losses `[steps]`, or raise FloatingPointError."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
    device, losses = next(model.parameters()).device, []
    model.train()
    for batch in batches:
        x, y = images[batch].to(device), labels[batch].to(device)
        if augment is not None:
            x = augment(x)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(model(prepare(x)), y, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.detach())
    model.eval()                                                 # ready to predict
    losses = torch.stack(losses).cpu()
    if not losses.isfinite().all():
        raise FloatingPointError("the loss is infinite or not a number: try a tenth of the rate")
    return losses


def predict_logits(model: nn.Module, images: Tensor, prepare: Callable = standardize,
                   batch_size: int = 500) -> Tensor:
    """Return logits `float32 [N, num_classes]` on the CPU for `uint8 [N, C, H, W]`."""
    device, batches = next(model.parameters()).device, images.split(batch_size)
    with evaluating(model), torch.no_grad():
        return torch.cat([model(prepare(x.to(device))).float().cpu() for x in batches])


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, prepare: Callable = standardize,
             batch_size: int = 500) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy (0 to 1) on `uint8 [N, C, H, W]`, `int64 [N]`."""
    logits, labels = predict_logits(model, images, prepare, batch_size), labels.cpu()
    correct = logits.argmax(dim=1) == labels
    return F.cross_entropy(logits, labels).item(), correct.float().mean().item()
# %% [markdown]
"""
`train_model` calls `train_epoch` once for each epoch, and adds what real projects need. You can read on without its
code: what matters is the list below.

- A share of the training images is put aside for *validation*. We use them for choices such as the number of epochs. If
  we used the test images for that, the test accuracy would look better than it is.
- *One cycle* (after Smith & Topin 2017): the learning rate rises to `learning_rate` during the first 30% of the steps,
  then it falls to nearly nothing (drawn in 8.2). The optimiser's momentum (4.4) moves the other way.
- All random draws of an epoch follow from the seed and the epoch's number, so they can be repeated exactly.
- After each epoch, `on_epoch` gets its losses and its accuracy (a row of the *history*). By default it prints them; if
  it returns `True`, training stops.
- `checkpoint`, and the lines with `rank` and `world`, are explained in 8.3. Skip them for now.
"""
# %%
def print_epoch(row: dict[str, float]) -> None:
    """Print a row of the history that `train_model` makes."""
    print("  ".join(f"{name} {value:<7.4g}" for name, value in row.items()))


def train_model(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int,
                batch_size: int = 64, learning_rate: float = 3e-3, weight_decay: float = 0.01,
                one_cycle: bool = True, label_smoothing: float = 0.0, validation: float = 0.1,
                augment: Callable | None = None, prepare: Callable = standardize,
                seed: int = 0, precision: str = "float32", channels_last: bool = True,
                checkpoint: str | Path | None = None,
                on_epoch: Callable | None = print_epoch) -> list[dict[str, float]]:
    """Train in place with AdamW on `uint8 [N, C, H, W]`, `int64 [N]`; return a row per epoch."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    rank, world = (0, 1) if bare is model else (dist.get_rank(), dist.get_world_size())
    aside, share = round(validation * len(images)), batch_size // world
    if epochs < 1 or share < 1 or batch_size % world or not 0 <= aside <= len(images) - world:
        raise ValueError("train_model: expected epochs >= 1, some images left to train on, and a "
                         f"batch_size that is a multiple of the number of processes ({world})")
    F.cross_entropy(predict_logits(bare, images[:1], prepare).expand(len(images), -1), labels.cpu())
    device = next(model.parameters()).device                     # line above: do the data fit?
    images, labels = images.to(device), labels.to(device)
    bare.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with seeded(seed):
        held_out, kept = torch.randperm(len(images)).tensor_split([aside])
        sample = images[:8].cpu() if augment is None else augment(images[:8].cpu())
    mine = len(kept) // world                                    # a last batch of one is left out:
    steps = math.ceil(mine / share) - (mine > share and mine % share == 1)
    optimizer = AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    schedule = OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps) \
        if one_cycle and epochs * steps > 1 else ConstantLR(optimizer, factor=1)
    parts = {"model": bare, "optimizer": optimizer, "schedule": schedule}
    recipe = {"model": str(bare), "images": list(images.shape), "batch_size": batch_size,
              "augment or prepare": f"{prepare(sample).flatten().cumsum(0).std():.3g} for a sample",
              "learning_rate": learning_rate, "weight_decay": weight_decay, "seed": seed,
              "label_smoothing": label_smoothing, "validation": validation, "precision": precision,
              "channels_last": channels_last, "epochs, steps": (epochs, steps) if one_cycle else 0}
    history = [] if checkpoint is None else load_checkpoint(checkpoint, recipe, **parts)
    for epoch in range(len(history) + 1, epochs + 1):
        began = time.perf_counter()
        with seeded(seed, epoch):                                # the same order in all processes
            order = kept[torch.randperm(len(kept))]
        batches = order[:mine * world][rank::world].split(share)[:steps]
        bar = tqdm(batches, f"epoch {epoch}", leave=False, disable=None if rank == 0 else True)
        with seeded(seed, epoch, 1 + rank):                      # augmentation and dropout
            loss = train_epoch(model, bar, images, labels, optimizer, schedule, precision=precision,
                               augment=augment, prepare=prepare, label_smoothing=label_smoothing)
        val_loss, val_accuracy = evaluate(model, images[held_out], labels[held_out], prepare)
        history.append({"epoch": epoch, "train_loss": loss.mean().item(), "val_loss": val_loss,
                        "val_accuracy": val_accuracy, "seconds": time.perf_counter() - began})
        if checkpoint is not None and rank == 0:
            save_checkpoint(checkpoint, recipe, history, **parts)
        if on_epoch is not None and on_epoch(history[-1]):
            break
    return history
# %% [markdown]
"""
Which number format and which order of the numbers in memory are fastest depends on the processor. (With
`channels_last`, the channels of a pixel lie side by side.) `choose_speed` tries them: all candidates take turns at
training steps, and the best time of each counts. float32 with `channels_last` stays unless another is 1.3 times as
fast. The answer is remembered for later calls. You can skip the code.

`RECIPES` are the arguments of `train_model` that this tutorial uses for each network and each kind of data. We found
them by trying. `settings_for`, below, adds to a recipe what `choose_speed` found. `run` trains a fresh network and
tests it once.
"""
# %%
SPEEDS: dict[str, dict[str, object]] = {}                        # what has been measured already


def choose_speed(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 64,
                 prepare: Callable = standardize, rounds: int = 4) -> dict[str, object]:
    """Return the fastest {"precision": …, "channels_last": …} for `train_model`, measured here.

    The images `uint8 [N, C, H, W]` and labels `int64 [N]` lie on the model's device. The model is
    not changed.
    """
    key = f"{model} {list(images.shape[1:])} {images.device} {batch_size}"
    if key in SPEEDS:
        return SPEEDS[key]
    plain = ("float32", True)                                    # precision, channels_last
    trials = {}
    for precision, last in (plain, ("float32", False), ("bfloat16", True)):
        twin = copy.deepcopy(model)
        twin.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        trials[precision, last] = twin, SGD(twin.parameters(), lr=0.0)
    on_cpu, threads = images.device.type == "cpu", torch.get_num_threads()
    clock = time.process_time if on_cpu else time.perf_counter

    def best_seconds(choices: Iterable, count: int, rounds: int) -> dict[tuple, float]:
        """Time steps on `count` images, the choices in turn; return the best time of each."""
        best = dict.fromkeys(choices, math.inf)
        for _ in range(rounds):
            for choice in best:
                twin, optimizer = trials[choice]
                began = clock()
                train_epoch(twin, [torch.arange(count)], images, labels, optimizer,
                            prepare=prepare, precision=choice[0])
                best[choice] = min(best[choice], clock() - began)
        return best

    few, many = min(8, len(images)), min(batch_size, len(images))
    try:
        if on_cpu:
            torch.set_num_threads(1)                             # or threads wait for each other
        with seeded(0):
            best_seconds(trials, few, 1)                         # the first step is always slow
            best = best_seconds(trials, few, 2)
            promising = [choice for choice in trials if best[choice] < 3 * min(best.values())]
            best = best_seconds(promising, many, rounds)
    finally:
        torch.set_num_threads(threads)
    chosen = min(best, key=best.get)
    if best.get(plain, math.inf) < 1.3 * best[chosen]:
        chosen = plain
    for choice in trials:
        rate = f"{many / best[choice]:,.0f} images/s" if choice in best else "far slower"
        order = "channels_last" if choice[1] else ""
        print(f"  {choice[0]:8}  {order:13} {rate:>16}  {'<- chosen' if choice == chosen else ''}")
    SPEEDS[key] = {"precision": chosen[0], "channels_last": chosen[1]}
    return SPEEDS[key]


RECIPES = {
    "SimpleCNN on MNIST": dict(
        epochs=4, batch_size=128, learning_rate=6e-3, weight_decay=0.05, label_smoothing=0.05,
        validation=0.02, augment=partial(random_shift, pixels=1)),
    "SimpleCNN on 5,000 digits": dict(epochs=10, learning_rate=5e-3, augment=random_affine),
    "LeNet-5 on MNIST": dict(
        epochs=4, batch_size=128, learning_rate=5e-3, augment=partial(random_shift, pixels=1)),
    "LeNet-5 on 5,000 digits": dict(epochs=14, learning_rate=6e-3, augment=random_affine),
    "SimpleCNN on CIFAR-10": dict(
        epochs=3, batch_size=128, learning_rate=6e-3, augment=shift_and_flip),
    "SimpleCNN on colour digits": dict(epochs=6, learning_rate=4e-3, augment=random_shift),
    "SmallVGG on CIFAR-10": dict(
        epochs=12, batch_size=128, learning_rate=6e-3, weight_decay=0.05, label_smoothing=0.1,
        validation=0.02, augment=shift_and_flip),
    "SmallVGG on colour digits": dict(epochs=4, learning_rate=8e-3, augment=random_shift)}


def run(make_network: Callable[[], nn.Module], data: Any, seed: int = 0,
        device: torch.device | str = "cpu", **settings) -> tuple[nn.Module, list[dict], float]:
    """Train a fresh network on `data`, with settings of `train_model`, and test it once.

    Returns the network, its history, and its accuracy on the test images (0 to 1).
    """
    with seeded(seed):
        model = make_network().to(device)
    history = train_model(model, data.train_images, data.train_labels, seed=seed, **settings)
    prepare = settings.get("prepare", standardize)
    _, accuracy = evaluate(model, data.test_images, data.test_labels, prepare)
    return model, history, accuracy
# %%
if __name__ == "__main__":
    def settings_for(recipe: str, model: nn.Module, data: Any) -> dict[str, Any]:
        """Return a recipe, with the answer of `choose_speed` or the option --precision.

        On the project's own data (`stand_in`), training keeps float32, to repeat exactly.
        """
        settings = RECIPES[recipe] | EPOCHS
        if data.stand_in:
            return settings
        if options.precision != "auto":
            return settings | {"precision": options.precision}
        return settings | choose_speed(model.to(device), data.train_images.to(device),
                                       data.train_labels.to(device), settings["batch_size"])

    digits_kind = "5,000 digits" if mnist.stand_in else "MNIST"
    colour_kind = "colour digits" if colour.stand_in else "CIFAR-10"
    print("SimpleCNN, batches of 128 digits:")
    chosen = choose_speed(SimpleCNN().to(device), digits.train_images.to(device),
                          digits.train_labels.to(device), batch_size=128)
# %% [markdown]
"""
The arrow marks what SimpleCNN uses on MNIST. Other networks are measured when their turn comes. (On a CPU the rates are
those of one thread, so training is faster than this.)

How fast could training be at best? A processor computes fastest when it multiplies large matrices. Small networks stay
below that rate. Their matrices are small, and ReLU and pooling compute so little with each number that they mostly wait
for memory. The README's tables of speed say which share of the highest rate each network reaches, and how little our
loop adds to the bare training step.

### 4.4 Optimisers
The *gradient* of the loss tells for each weight in which direction the loss rises. *Gradient descent* takes a small
step against it, and the learning rate says how small. A gradient computed on one batch is noisy, hence the name
*stochastic* gradient descent (SGD). *Momentum* adds a fading share of the earlier steps to each new one, so that the
noise averages out. *Adam* (Kingma & Ba 2015) has momentum too, and divides the step of each weight by the usual size of
its gradient. So layers with large and with small gradients can share one learning rate. *AdamW* (Loshchilov & Hutter
2019) adds *weight decay*, a steady pull of all weights towards zero.

We train the same network on the same batches with each. Both kinds of SGD get one rate, Adam and AdamW a smaller one.
"""
# %%
def smooth(values: Tensor, width: int) -> np.ndarray:
    """Return the mean of each `width` neighbouring values (fewer of them, if there are few)."""
    width = max(1, min(width, len(values) // 4))
    return np.convolve(values, np.ones(width) / width, mode="valid")
# %%
if __name__ == "__main__":
    train_images, train_labels = digits.train_images[:3500], digits.train_labels[:3500]
    val_images, val_labels = digits.train_images[3500:], digits.train_labels[3500:]
    with seeded(options.seed):
        batches = torch.randint(3500, (STEPS, 64))
    figure, ax = plt.subplots(figsize=(6.6, 2.8))
    for name, make_optimizer, style in (
            ("SGD, rate 0.05", partial(SGD, lr=0.05), "-"),
            ("SGD with momentum, rate 0.05", partial(SGD, lr=0.05, momentum=0.9), "-"),
            ("Adam, rate 0.003", partial(torch.optim.Adam, lr=3e-3), "-"),
            ("AdamW, rate 0.003", partial(AdamW, lr=3e-3), ":")):
        with seeded(options.seed):
            model = SimpleCNN().to(device)
        optimizer = make_optimizer(model.parameters())
        losses = train_epoch(model, batches, train_images, train_labels, optimizer)
        ax.plot(smooth(losses, 10), style, label=name)
        _, accuracy = evaluate(model, val_images, val_labels)
        results.add("4.4", name, digits, "validation accuracy", accuracy, n=500)
    ax.set(xlabel="step", ylabel="training loss",
           title="At these rates, plain SGD learns more slowly")
    ax.legend()
    show_figure(figure, "4_4_optimisers")
# %% [markdown]
"""
With momentum 0.9, steps that agree become up to 1 + 0.9 + 0.9² + … = 10 times as long, so this SGD moves farther.
Adam and AdamW lie on top of each other: in so few steps, weight decay has no visible effect. The validation
accuracies are too uncertain to rank the four.

How does one find a rate that suits? With a *range test* (Smith 2017): start with a tiny rate, let it grow with every
step, and watch the loss.
"""
# %%
if __name__ == "__main__":
    with seeded(options.seed):
        model = SimpleCNN().to(device)
    rates = np.geomspace(1e-5, 0.3, len(batches))
    optimizer = AdamW(model.parameters(), lr=rates[0])
    growing = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=rates[1] / rates[0])
    losses = smooth(train_epoch(model, batches, train_images, train_labels, optimizer, growing), 5)
    figure, ax = plt.subplots(figsize=(6.6, 2.8))
    ax.plot(rates[-len(losses):], losses)
    recipe = RECIPES[f"SimpleCNN on {digits_kind}"]
    ax.axvline(recipe["learning_rate"], linestyle=":", color="black", label="rate of our recipe")
    ax.set(xscale="log", ylim=(0, 4), xlabel="learning rate of AdamW, growing", ylabel="loss",
           title="Range test: choose before the loss rises")
    ax.legend()
    show_figure(figure, "4_4_range_test")
# %% [markdown]
"""
As a rule of thumb, take a tenth of the rate at which the last, steep rise begins. At the far right the loss is ln 10:
the network only guesses. The dotted line is the rate that 4.5 uses.

### 4.5 SimpleCNN on digits and on colour images
Now the real training. First the digits: MNIST with its 60,000 training images, or where it is not at hand the bundled
5,000 (3,600 to train, 400 for validation, 1,000 to test). Three pictures are worth a look afterwards. The first is the
*history*. If the validation loss keeps rising, the network overfits. (The training loss may lie above it, because of
augmentation and label smoothing. With a smoothing of 0.05 and ten classes, no training loss can fall below 0.28.) The
second is the *confusion matrix*: how often was each class taken for which? The third shows the images whose true class
got the lowest probability. They tell whether the network is at fault or the label.
"""
# %%
def plot_history(history: list[dict[str, float]]) -> Figure:
    """Draw losses and validation accuracy against epochs, from what `train_model` returns."""
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6))
    left.plot(epochs, [row["train_loss"] for row in history], "o-", label="training")
    left.plot(epochs, [row["val_loss"] for row in history], "o-", label="validation")
    left.set(xlabel="epoch", ylabel="loss", title="Does the validation loss still fall?")
    left.legend()
    right.plot(epochs, [row["val_accuracy"] for row in history], "o-", color="C1")
    right.set(xlabel="epoch", ylabel="validation accuracy", title="Does the accuracy still rise?")
    for ax in (left, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_confusion(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Draw how often each true class (row) was taken for each class (column)."""
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for label, prediction in zip(labels.tolist(), logits.argmax(dim=1).tolist()):
        counts[label, prediction] += 1
    mistakes = counts.clone().fill_diagonal_(0)
    figure, ax = plt.subplots(figsize=(6.6, 5))
    ax.imshow(mistakes.numpy(), cmap="Oranges", vmax=1.5 * mistakes.max().item() + 1)
    for row, column in counts.nonzero().tolist():
        ax.text(column, row, f"{counts[row, column]}", ha="center", va="center",
                color="grey" if row == column else "black")
    ax.set_xticks(range(len(classes)), classes, rotation=45 if max(map(len, classes)) > 2 else 0)
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="predicted", ylabel="true class", title="Which classes are mistaken for which?")
    return figure


def plot_mistakes(images: Tensor, logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Draw the ten images whose true class got the lowest probability, with what was predicted."""
    probabilities = logits.softmax(dim=1)                        # [N, classes]
    sureness, answers = probabilities.max(dim=1)                 # [N] each
    worst = probabilities[torch.arange(len(labels)), labels.cpu()].argsort()[:10]
    titles = [f"{classes[labels[i]]} → {classes[answers[i]]} ({sureness[i]:.0%})" for i in worst]
    return plot_images(list(images[worst]), titles, columns=5,
                       title="True class least probable first: true → predicted (its probability)")
# %%
if __name__ == "__main__":
    digit_settings = settings_for(f"SimpleCNN on {digits_kind}", SimpleCNN(), mnist)
    simple_cnn, history, accuracy = run(SimpleCNN, mnist, options.seed, device, **digit_settings)
    seconds = sum(row["seconds"] for row in history)
    results.add("4.5", f"SimpleCNN on {digits_kind}", mnist, "test accuracy", accuracy, seconds)

    logits = predict_logits(simple_cnn, mnist.test_images)
    show_figure(plot_history(history), "4_5_history")
    show_figure(plot_confusion(logits, mnist.test_labels, mnist.classes), "4_5_confusion")
    show_figure(plot_mistakes(mnist.test_images, logits, mnist.test_labels, mnist.classes),
                "4_5_mistakes")
# %% [markdown]
"""
If the curves end flat, that does not mean that the network has learnt all it can. The learning rate ends near zero,
which flattens any curve. In the confusion matrix nearly all counts lie on the diagonal (grey numbers). Mistakes are
coloured: the darker a field, the more often the class of its row was taken for the class of its column. Some of the
worst images would puzzle a human, too.

Besides digits we need colour images. They are CIFAR-10: 60,000 photos of 32×32 pixels in ten classes (Krizhevsky
2009). Where CIFAR-10 is not available, *colour digits* stand in: digits on patches of a photo. (Where *unverified
copy* is printed, no checksum could confirm the photos. Ours once went through JPEG.) The network is the same, made for
three channels and 32×32 pixels. The accuracy of each class shows which classes are hard.
"""
# %%
if __name__ == "__main__":
    print(colour.name)
    names = [colour.classes[label] for label in colour.train_labels[:16]]
    show_figure(plot_images(list(colour.train_images[:16]), names,
                            title="The first images and their classes"), "4_5_colour_images")
    simple_colour_cnn = partial(SimpleCNN, in_channels=3, image_size=32)
    settings = settings_for(f"SimpleCNN on {colour_kind}", simple_colour_cnn(), colour)
    model, history, accuracy = run(simple_colour_cnn, colour, options.seed, device, **settings)
    seconds = sum(row["seconds"] for row in history)
    results.add("4.5", f"SimpleCNN on {colour_kind}", colour, "test accuracy", accuracy, seconds)

    correct = predict_logits(model, colour.test_images).argmax(dim=1) == colour.test_labels
    print("\naccuracy of each class")
    for label, name in enumerate(colour.classes):
        of_class = correct[colour.test_labels == label].float()  # 1 if right, else 0
        p, n = of_class.mean().item(), len(of_class)
        print(f"  {name:12} {p:6.1%} ± {math.sqrt(p * (1 - p) / n):.1%}")
# %% [markdown]
"""
Photos are much harder for this small network. One reason is that backgrounds and objects vary. Besides, three epochs of
CIFAR-10 are probably too few. Not all photos are equally hard: in the notebook's run, 81% of the ships are right, but
only 47% of the cats. Section 5.3 builds a better network for photos.

### 4.6 Four bugs that do not crash
The most expensive mistakes are those that nobody notices: training runs, no error appears, and the result is poor. Here
are four of them, each in a single line of the loop.
"""
# %%
if __name__ == "__main__":
    for bug in ("no bug", "softmax before the loss", "no zero_grad", "input from 0 to 255",
                "no eval"):
        torch.manual_seed(options.seed)
        model = small_network(dropout=0.5)
        optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
        prepare = Tensor.float if bug == "input from 0 to 255" else standardize
        for step in range(STEPS):
            batch = torch.randint(len(digits.train_images), (64,))
            scores = model(prepare(digits.train_images[batch]))
            if bug == "softmax before the loss":
                scores = scores.softmax(dim=1)
            loss = F.cross_entropy(scores, digits.train_labels[batch])
            if bug != "no zero_grad":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if bug != "no eval":
            model.eval()
        correct = model(prepare(digits.test_images)).argmax(dim=1) == digits.test_labels
        results.add("4.6", bug, digits, "test accuracy", correct.float().mean().item())
# %% [markdown]
"""
Without `zero_grad` the network only guesses: old gradients add up, and the steps become far too large. A second softmax
and input from 0 to 255 cost less, but still much. Without `eval`, dropout stays active while we test. The weights are
those of "no bug", so any difference is due to dropout, and varies from call to call. If your accuracy is disappointing,
go through these four first.

### 4.7 What the trained network can do
*Does it tolerate shifts?* SimpleCNN's feature maps move along with a digit, but its linear layer has learnt where to
expect what. In training, augmentation shifted the digits (up to one pixel with full MNIST, up to two with the bundled
digits). To see what that is worth, we train the same network once more without augmentation. To save time, it gets half
as many epochs. (That may cost some tolerance, too.)
"""
# %%
if __name__ == "__main__":
    half = digit_settings["epochs"] // 2
    settings = digit_settings | {"augment": None, "epochs": half, "on_epoch": None}
    not_augmented, _, accuracy = run(SimpleCNN, mnist, options.seed, device, **settings)
    results.add("4.7", "SimpleCNN without augmentation", mnist, "test accuracy", accuracy)

    figure, ax = plt.subplots(figsize=(6.6, 2.8))
    images, labels, moves = mnist.test_images[:500], mnist.test_labels[:500], range(-8, 9)
    for name, model in (("trained with augmentation", simple_cnn), ("without", not_augmented)):
        # F.pad adds `move` black columns on the left, and cuts as many off on the right.
        accuracies = [evaluate(model, F.pad(images, (move, -move)), labels)[1] for move in moves]
        ax.plot(moves, accuracies, "o-", label=name)
    ax.set(xlabel="shift to the right, in pixels", ylabel="accuracy", ylim=(0, 1.02),
           title="The network trained with augmentation tolerates larger shifts")
    ax.legend()
    show_figure(figure, "4_7_accuracy_against_shift")
# %% [markdown]
"""
On centred digits the two networks are about equal, and shifts by one pixel hardly hurt them. From about three pixels
on, the augmented network is better. (In 3.5 SimpleCNN lost more accuracy. There the shift went along both axes, and the
training was shorter and had fewer images.)

*Can it read several digits?* Here is a surprise. The linear layer reads 7×7 maps. So it can be seen as a convolution
with a 7×7 kernel that fits at a single place. If the image is wider, the kernel fits at several places. So the network
that was trained on single digits can slide over a whole strip, in one pass. It gives an answer every four pixels,
because two poolings divide the width by four.
"""
# %%
def slide(model: SimpleCNN, images: Tensor) -> Tensor:
    """Apply a `SimpleCNN` at all places of larger images, every four pixels.

    From standardised `float32 [N, C, H, W]` to logits `[N, num_classes, (H - S) / 4 + 1, …]`, where
    S is the image size that the model was made for.
    """
    side = model.image_shape[1] // 4
    kernels = model.fc.weight.view(-1, 32, side, side)           # [num_classes, 32, S / 4, S / 4]
    maps = model.conv_block2(model.conv_block1(images))          # [N, 32, H / 4, W / 4]
    return F.conv2d(maps, kernels, model.fc.bias)
# %%
if __name__ == "__main__":
    model = copy.deepcopy(simple_cnn).cpu()
    five = mnist.test_images[:5]                                 # [5, 1, 28, 28]
    strip = torch.cat(list(five), dim=2)[None]                   # [1, 1, 28, 140]
    with torch.no_grad():
        alone = model(standardize(five))                         # [5, 10]
        assert torch.allclose(slide(model, standardize(five))[:, :, 0, 0], alone, atol=1e-3)
        logits = slide(model, standardize(strip))[0, :, 0]       # [10, 29]: one every four pixels
    probabilities = logits.softmax(dim=0)
    print("each digit alone:", *alone.argmax(dim=1).tolist())
    at_digits = probabilities[:, ::7]                            # every 7th answer: 28 pixels apart
    print("in the strip:    ", *at_digits.argmax(dim=0).tolist())

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4), sharex=True, height_ratios=[1, 1.5])
    top.imshow(strip[0, 0].numpy(), aspect="auto")
    top.set(yticks=[], title="A network that was trained on single digits reads a strip of five")
    shown = bottom.imshow(probabilities.numpy(), cmap="viridis", aspect="auto", vmin=0, vmax=1,
                          extent=(12, 128, 9.5, -0.5))
    for middle in range(14, 140, 28):
        bottom.axvline(middle, color="white", linestyle=":")
    bottom.set(xlabel="middle of the 28 pixels that are read (dotted: middles of the digits)",
               ylabel="class", yticks=range(10), xlim=(-0.5, 139.5))
    figure.colorbar(shown, ax=bottom, label="probability", pad=0.01)
    show_figure(figure, "4_7_strip")
# %% [markdown]
"""
At the dotted lines, the middles of the digits, the network reads each digit as it did before, alone. Its answers
between the digits mean nothing, because no training image ever showed halves of two digits.

*How sure is it of nonsense?* Let us show it letters, noise, and an empty image. A softmax turns any logits into
probabilities that sum to one. So the network must choose one of ten digits, even if there is none.
"""
# %%
if __name__ == "__main__":
    from data import printed_letters

    with seeded(options.seed):
        noise = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8)
    empty = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    for name, images in (("test digits", mnist.test_images[:500]), ("noise", noise),
                         ("letters", printed_letters()), ("an empty image", empty)):
        sureness, answers = predict_logits(simple_cnn, images).softmax(dim=1).max(dim=1)
        results.add("4.7", f"how sure of {name}", mnist, "mean probability", sureness.mean())
        print("    its first answers:", *answers[:8].tolist())
# %% [markdown]
"""
The network is surest of digits. (Label smoothing, if the recipe has it, keeps the network from being surer.) But it is
quite sure of letters and of noise too, and for noise it often names the same digit. It is less sure of the empty image.
(Ten equal scores would give 0.10.) The probability compares the ten classes with each other: *if this is a digit, it is
probably a 4*. It does not say whether the image is a digit at all. If your application may see other things, add a
class for them, with examples. Things unlike all your examples can still fool it.

### 4.8 Your own handwriting
Everybody tries this: write a digit, take a photo, and show it to the network. The network fails, even one with 99% on
the test images. The reason is mostly not the handwriting. The photo is large, dark on light, unevenly lit, and the
digit lies anywhere. The network has only seen images as MNIST makes them: light ink on black, fitted into 20×20
pixels, and placed by its centre of mass in the middle of 28×28. So we must treat a photo as MNIST treated its digits,
in three steps.

`ink_on_paper` computes how much each pixel differs from the paper, so the ink may be darker or lighter and of any
colour. The paper need not be evenly bright: we fit a smooth surface to it, leaving out the pixels that differ most.
`only_one_digit` finds the columns and rows that contain ink. It drops specks, and raises an error if there are several
digits. `frame_like_mnist` scales the digit, makes its strokes as bright as MNIST's, and places it. (None of this is
about networks. You can skip the code.)
"""
# %%
def open_picture(picture: str | Path | Image.Image | np.ndarray) -> Image.Image:
    """Return a file, a PIL image or an array `uint8 [H, W]` or `[H, W, 3]` as an RGB image.

    It is turned upright as its EXIF data say, transparent parts become white, and brightness of
    more than eight bits is scaled to them. A file that is no picture is an `OSError`.
    """
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    elif not isinstance(picture, Image.Image):
        with Image.open(picture) as file:
            return open_picture(file)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):                      # 16 or 32 bits
        values = np.asarray(picture, dtype=np.float64)
        values = (values - values.min()) / max(np.ptp(values), 1e-9)
        picture = Image.fromarray((255 * values).astype(np.uint8))
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def ink_on_paper(picture: str | Path | Image.Image | np.ndarray) -> Tensor:
    """Return how much each pixel differs from the paper, `float32 [H, W]` with 160 as longer side.

    If there is nothing on the paper: a `ValueError`.
    """
    picture = ImageOps.contain(open_picture(picture), (160, 160))
    pixels = np.asarray(picture.filter(ImageFilter.MedianFilter(3)), dtype=np.float64)
    height, width, _ = pixels.shape
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2).reshape(-1, 6)
    colours = pixels.reshape(-1, 3)                              # [pixels, 3]
    difference = np.linalg.norm(colours - np.median(colours, axis=0), axis=1)
    is_paper = difference <= np.median(difference) + 1           # a first guess
    for _ in range(6):                                           # fit the paper, drop what is ink
        coefficients, *_ = np.linalg.lstsq(terms[is_paper], colours[is_paper], rcond=None)
        difference = np.linalg.norm(colours - terms @ coefficients, axis=1)
        is_paper = difference <= 2 * np.median(difference) + 1
    noise = 4 * np.median(difference)
    if difference.max() < noise + 20:
        raise ValueError("digit_from_photo: nothing stands out from the paper in this picture")
    return torch.from_numpy((difference - noise).clip(min=0).reshape(height, width)).float()


def pieces(ink: Tensor) -> list[tuple[int, int]]:
    """Return where pieces of `[n]` begin and end that are parted by zeros; specks are left out."""
    filled = F.pad((ink > 0).int(), (1, 1))
    begins, ends = (filled.diff() == 1).nonzero()[:, 0], (filled.diff() == -1).nonzero()[:, 0]
    return [(begin, end) for begin, end in zip(begins.tolist(), ends.tolist())
            if ink[begin:end].sum() > 0.1 * ink.sum()]


def only_one_digit(ink: Tensor) -> Tensor:
    """Return the part of `float32 [H, W]` in which the digit lies; several are a `ValueError`."""
    ink = ink * (ink > 0.25 * ink.max())
    for _ in range(2):                                           # columns, rows, and once more
        columns = pieces(ink.sum(dim=0))
        ink = ink[:, columns[0][0]:columns[-1][1]]
        rows = pieces(ink.sum(dim=1))
        ink = ink[rows[0][0]:rows[-1][1]]
    for (_, end), (begin, _) in zip(columns, columns[1:]):       # a gap between tall pieces?
        beside = [ink[:, :end - columns[0][0]], ink[:, end - columns[0][0]:]]
        heights = [(part.sum(dim=1) > 0).sum().item() for part in beside]
        if begin - end > 0.08 * len(ink) and min(heights) > 0.5 * len(ink):
            raise ValueError("digit_from_photo: several digits side by side; cut the picture")
    gap = max((begin - end for (_, end), (begin, _) in zip(rows, rows[1:])), default=0)
    if gap > 0.06 * len(ink) and min(end - begin for begin, end in rows) > 0.33 * len(ink):
        raise ValueError("digit_from_photo: several digits above each other; cut the picture")
    return ink


def frame_like_mnist(ink: Tensor) -> Tensor:
    """Fit ink `float32 [H, W]` into a box of 20 pixels; centre it in `uint8 [1, 28, 28]`."""
    height = max(1, round(ink.shape[0] * 20 / max(ink.shape)))
    width = max(1, round(ink.shape[1] * 20 / max(ink.shape)))
    ink = (ink / ink[ink > 0].median()).clamp(max=1)             # even ink
    small = F.interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    brightest = small.flatten().topk(small.numel() // 10).values
    small = (small / brightest.mean()).clamp(max=1)
    row, column = centre_of_mass(small[None, None])[0].tolist()
    top, left = round(14 - row), round(14 - column)              # where MNIST has it
    frame = F.pad(small, (left, 28 - left - width, top, 28 - top - height))  # negative: cuts off
    return (255 * frame).round().to(torch.uint8)[None]


def digit_from_photo(picture: str | Path | Image.Image | np.ndarray) -> Tensor:
    """Turn a photo of one handwritten digit into `uint8 [1, 28, 28]`, as MNIST made its digits.

    The picture is a file, a PIL image or an array `uint8 [H, W]` or `[H, W, 3]`, of any size. An
    empty one, or several digits, is a `ValueError` (LeCun et al. 1998 describe the format).
    """
    return frame_like_mnist(only_one_digit(ink_on_paper(picture)))
# %% [markdown]
"""
We have no photo of your handwriting. So we simulate some: a test digit as a stroke of coloured ink, tilted, somewhere
on a sheet of paper, with uneven light, blur, noise and JPEG compression. How many of them does SimpleCNN read? We
compare three ways: the photo merely resized to 28×28, the same inverted, and prepared in these three steps.
"""
# %%
if __name__ == "__main__":
    from data import simulated_photo

    simulated = [simulated_photo(image, seed)
                 for seed, image in enumerate(mnist.test_images[:PHOTOS])]
    figure, axes = plt.subplots(4, 6, figsize=(8, 5.6))
    for column, photo_of_digit in zip(axes.T, simulated):
        ink = ink_on_paper(photo_of_digit)
        column[0].imshow(photo_of_digit)
        column[1].imshow(ink.numpy())
        column[2].imshow(only_one_digit(ink).numpy())
        column[3].imshow(digit_from_photo(photo_of_digit)[0].numpy())
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax, step in zip(axes[:, 0], ("photo", "ink on paper", "only the digit", "like MNIST")):
        ax.set_ylabel(step)
    figure.suptitle("From a (simulated) photo to what the network knows", fontsize=10)
    show_figure(figure, "4_8_steps")
# %%
if __name__ == "__main__":
    small = [np.array(photo_of_digit.convert("L").resize((28, 28))) for photo_of_digit in simulated]
    resized = torch.from_numpy(np.stack(small))[:, None]         # [N, 1, 28, 28]
    prepared = torch.zeros_like(resized)
    for index, photo_of_digit in enumerate(simulated):
        try:
            prepared[index] = digit_from_photo(photo_of_digit)
        except ValueError:                                       # stays black: counts as not read
            print(f"photo {index} could not be prepared")
    for name, images in (("merely resized", resized), ("resized and inverted", 255 - resized),
                         ("prepared", prepared),
                         ("the digits themselves", mnist.test_images[:PHOTOS])):
        _, accuracy = evaluate(simple_cnn, images, mnist.test_labels[:PHOTOS])
        results.add("4.8", name, f"{PHOTOS} simulated photos", "accuracy", accuracy, n=PHOTOS)
# %% [markdown]
"""
On merely resized photos the network does about as well as guessing. It reads more if they are inverted, but still only
a minority. It reads prepared photos about as well as the digits that they were made from. (A ± of 0.0% is not
certainty: the formula fails at 100%.) The network is the same all along; only its input has changed. Our own simulation
may be kind to our preparation. Real photos are harder, with lined paper, shadows, or a finger. But try it:

    image = digit_from_photo("my_digit.jpg")
    logits = predict_logits(simple_cnn, image[None])
    print(logits.argmax().item(), logits.softmax(dim=1).max().item())

**To remember**
- Augment with changes that keep the label, and draw them anew for each image.
- Cross-entropy takes raw logits and class numbers; every accuracy has a standard error.
- A network only knows images like those it was trained on. Prepare yours in the same way.

**Exercises 4.** a) An accuracy of 90% on 400 images: what is its standard error? b) The correct class gets the
probability 1/2. What is the loss?

<details><summary>Answers</summary>

a) 1.5 points.
```python
assert abs(math.sqrt(0.9 * 0.1 / 400) - 0.015) < 1e-9
```
b) ln 2 = 0.693.
```python
loss = F.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))     # two equal scores
assert abs(loss.item() - math.log(2)) < 1e-6
```
</details>

## 5 Famous networks
### 5.1 LeNet-5 (1998)
LeCun, Bottou, Bengio and Haffner built this network to read cheques for banks. It has two convolutions with pooling,
and then three linear layers. The paper numbers its layers: C1 and C3 are the convolutions, S2 and S4 the poolings, C5
and F6 are linear in our form. Below is the form that is called LeNet-5 today, with 61,706 parameters. The paper's own
network had 60,000. Most maps of its C3 read only some of the six maps before them. Its pooling averaged, with a
trainable scale and bias, and its activation was a scaled tanh (5.2). Its output layer differed, too: it measured how
far the 84 numbers of F6 are from a fixed pattern of each class. LeNet-5 reads images of 32×32 pixels, so we put a
frame of two pixels around MNIST's.
"""
# %%
class LeNet5(nn.Module):
    """LeNet-5 in its modern form (after LeCun et al. 1998), for 28×28 or 32×32 pixels."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),  # C1, S2
            nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2))         # C3, S4
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.ReLU(),                 # C5
            nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes))           # F6, output

    def forward(self, x: Tensor) -> Tensor:
        """Map `float32 [N, in_channels, 28 or 32, 28 or 32]` to logits `[N, num_classes]`."""
        if x.ndim != 4 or tuple(x.shape[2:]) not in ((28, 28), (32, 32)):
            raise ValueError("LeNet5: expected [N, C, 28, 28] or [N, C, 32, 32], "
                             f"got {list(x.shape)}")
        if x.shape[-1] == 28:
            x = F.pad(x, (2, 2, 2, 2))                           # [N, C, 32, 32]
        return self.classifier(self.features(x))                 # features: [N, 16, 5, 5]
# %%
if __name__ == "__main__":
    assert count_parameters(LeNet5()) == 61_706
    settings = settings_for(f"LeNet-5 on {digits_kind}", LeNet5(), mnist)
    lenet, history, accuracy = run(LeNet5, mnist, options.seed, device, **settings)
    seconds = sum(row["seconds"] for row in history)
    results.add("5.1", f"LeNet-5 on {digits_kind}", mnist, "test accuracy", accuracy, seconds)
    print(f"test error: {1 - accuracy:.2%}")

    show_figure(plot_network(
        lenet, standardize(mnist.test_images[4:5]).to(device),
        {"C1": lenet.features[1], "S2": lenet.features[2], "C3": lenet.features[4],
         "S4": lenet.features[5], "logits": lenet.classifier},
        "LeNet-5, trained: what it makes of one digit"), "5_1_lenet")
# %% [markdown]
"""
The paper reports a test error of 0.95% on full MNIST, and 0.8% with distorted images added to the training. Our
training images are shifted at random, and the bundled ones also turned and scaled. With full MNIST, expect an error
near these two figures. With the bundled images, only a fifteenth as many, 2 to 3% is normal. In the picture, the maps
of C1 (after ReLU) still look like the digit. Those of S4 are 5×5 pixels and no longer do. They say which parts of
strokes were found where, and that is enough for clear logits.

### 5.2 AlexNet (2012)
Krizhevsky, Sutskever and Hinton won the ImageNet contest (1.2 million photos in 1,000 classes) with LeNet's pattern
made large. Their AlexNet took two GPUs, and three ideas: dropout, augmented images, and ReLU in place of tanh. Tanh, an
S-curve from −1 to 1, is nearly flat for large inputs, so its gradient is tiny there. The paper shows a small network
that reaches the same training error several times sooner with ReLU. Here is a comparison in the same spirit: one
network on the colour images, with both activations, from the same weights and on the same batches.
"""
# %%
if __name__ == "__main__":
    with seeded(options.seed):
        batches = torch.randint(len(colour.train_images), (2 * STEPS, 64))
    figure, ax = plt.subplots(figsize=(6.6, 2.8))
    for name, activation in (("tanh", nn.Tanh()), ("ReLU", nn.ReLU())):
        with seeded(options.seed):
            model = SimpleCNN(in_channels=3, image_size=32).to(device)
        model.conv_block1[1], model.conv_block2[1] = activation, activation
        optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses = train_epoch(model, batches, colour.train_images, colour.train_labels, optimizer)
        ax.plot(smooth(losses, 20), label=name)
        results.add("5.2", name, colour, "last training loss", losses[-30:].mean())
    ax.set(xlabel="step", ylabel="training loss", title="Does ReLU learn faster than tanh?")
    ax.legend()
    show_figure(figure, "5_2_tanh_and_relu")
# %% [markdown]
"""
At first tanh is level or ahead. At the end ReLU is ahead: on photos by a little, on colour digits clearly. (So it was
with three seeds on both data sets.) The paper's effect is far larger. Its small network had four layers and a longer
training, and each activation had a rate of its own.

### 5.3 VGG (2014), and how SimpleCNN grows into it
Simonyan and Zisserman asked what depth is worth. They built networks of 11 to 19 layers from small convolutions,
nearly all of them 3×3. The deeper ones were better, until the gain levelled off at 19 layers. Why small? Two 3×3
convolutions in a row see as much as one 5×5. They have fewer weights, they take fewer multiplications, and there is
one more ReLU between them.
"""
# %%
if __name__ == "__main__":
    for name, count, size in (("one 5×5", 1, 5), ("two 3×3", 2, 3)):
        side = receptive_field([(size, 1)] * count)
        weights = count * 64 * 64 * size * size                  # 64 channels in and out
        print(f"{name}: sees {side}×{side} pixels, {weights:7,} weights, "
              f"{weights * 32 * 32 / 1e6:3.0f} million multiplications at 32×32")
# %% [markdown]
"""
The same field for 72% of the weights. `SmallVGG` is this idea for small images. It has three *stages* with 32, 64 and
128 channels, and each halves the size of the maps. A stage is two 3×3 convolutions, each with batch normalisation and
an activation. The activation is *SiLU* (Hendrycks & Gimpel 2016), x / (1 + e⁻ˣ), which is a ReLU without a sharp
bend. VGG pools at the end of a stage. We pool right after the first convolution, so the rest of the stage is four
times cheaper.

At the end VGG has three linear layers. They hold 124 million of VGG-16's 138 million parameters. Instead, we replace
each map by its mean (*global average pooling*; Lin et al. 2013), and one linear layer remains. So SmallVGG needs no
fixed image size. Before the mean, a max-pooling of stride 1 gives each pixel of the map the highest value among its
neighbours. So a single high value counts for more in the mean. The argument `convolution` will serve in 5.7.
"""
# %%
class SmallVGG(nn.Module):
    """Stages of two 3×3 convolutions (after Simonyan & Zisserman 2014), for 8×8 pixels or more.

    `channels`: of each stage, which halves height and width. `activation`: its class.
    `convolution`: makes all convolutions but the first; it takes the arguments of `nn.Conv2d`.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, batch_norm: bool = True,
                 channels: Sequence[int] = (32, 64, 128), dropout: float = 0.0,
                 activation: Callable[[], nn.Module] = nn.SiLU,
                 convolution: Callable[..., nn.Module] = nn.Conv2d) -> None:
        super().__init__()

        def conv_norm_act(make: Callable, inputs: int, outputs: int, pool: bool) -> list:
            layers = [make(inputs, outputs, kernel_size=3, padding=1, bias=not batch_norm)]
            if pool:
                layers.append(nn.MaxPool2d(2))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs))
            return [*layers, activation()]

        layers, width = [], in_channels
        for stage, outputs in enumerate(channels):
            first = nn.Conv2d if stage == 0 else convolution
            layers += conv_norm_act(first, width, outputs, pool=True)
            layers += conv_norm_act(convolution, outputs, outputs, pool=False)
            width = outputs
        self.features = nn.Sequential(*layers, nn.MaxPool2d(3, stride=1, padding=1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout),
                                        nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map `float32 [N, in_channels, H, W]` to logits `[N, num_classes]`."""
        x = self.features(x)                                     # [N, 128, H / 8, W / 8]
        return self.classifier(self.pool(x))                     # [N, num_classes]
# %%
if __name__ == "__main__":
    print(layer_table(SmallVGG(), (3, 32, 32)), "\n")
    settings = settings_for(f"SmallVGG on {colour_kind}", SmallVGG(), colour)
    small_vgg, history, accuracy = run(SmallVGG, colour, options.seed, device, **settings)
    seconds = sum(row["seconds"] for row in history)
    results.add("5.3", f"SmallVGG on {colour_kind}", colour, "test accuracy", accuracy, seconds)
# %% [markdown]
"""
Compare this with SimpleCNN in 4.5. SmallVGG takes far longer. On photos it is far ahead, on colour digits the two may
tie. SimpleCNN's recipe has only 3 epochs, so not all of the lead comes from the architecture. What did each step from
SimpleCNN to SmallVGG gain? The table shows it for five epochs on 10,000 images. The second column has stacks of 3×3
convolutions with a mean at the end. Each later column adds one change to those before it. "Width" means twice as many
channels, "maximum" the max-pooling before the mean.

| SimpleCNN | 3×3 stacks | BatchNorm | width | SiLU | maximum | schedule (one cycle) |
|---|---|---|---|---|---|---|
| 60.2% | 41.6% | 56.3% | 61.9% | 63.8% | 66.1% | 70.3% |
| 58.2 to 60.2 | 41.2 to 44.1 | 56.1 to 59.0 | 60.2 to 64.7 | 63.3 to 64.6 | 63.9 to 68.8 | 69.7 to 70.8 |

*Median test accuracy on CIFAR-10 (JPEG copy), below it the lowest and the highest of three seeds. Up to "width" the
activation is ReLU, and all but the last have a constant learning rate. `python tests/benchmark.py growth --train-images
10000 --epochs 5`; bfloat16 on an Intel Xeon with AMX, torch 2.14.1, torchvision 0.29.1, 2026-11-26.*

The 3×3 stacks alone are much worse: without batch normalisation they learn slowly. Batch normalisation makes up for
most of that. Width and the schedule probably help, too. For SiLU and the maximum the ranges overlap, so each could be
chance here.

### 5.4 GoogLeNet (2014)
Which kernel size is best? Szegedy et al. let training choose. Their *Inception block* has four branches side by
side: 1×1, 3×3 and 5×5 convolutions, and a pooling with a 1×1 after it. The maps of all four are stacked. On so many
stacked maps, the larger kernels of the next block would be expensive. So before each of them, a 1×1 convolution
*reduces* many channels to few. It sees a single pixel at a time, with all its channels.
"""
# %%
class InceptionBlock(nn.Module):
    """The Inception block of GoogLeNet (Szegedy et al. 2014), with torchvision's argument names.

    `ch1x1`, `ch3x3`, `ch5x5` and `pool_proj` are the channels that each branch gives; `ch3x3red`
    and `ch5x5red` those that 1×1 convolutions leave for the 3×3 and the 5×5.
    """

    def __init__(self, in_channels: int, ch1x1: int, ch3x3red: int, ch3x3: int, ch5x5red: int,
                 ch5x5: int, pool_proj: int) -> None:
        super().__init__()

        def conv_relu(inputs: int, outputs: int, size: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.ReLU())

        self.branch1 = conv_relu(in_channels, ch1x1, 1)
        self.branch2 = nn.Sequential(conv_relu(in_channels, ch3x3red, 1),
                                     conv_relu(ch3x3red, ch3x3, 3))
        self.branch3 = nn.Sequential(conv_relu(in_channels, ch5x5red, 1),
                                     conv_relu(ch5x5red, ch5x5, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1),
                                     conv_relu(in_channels, pool_proj, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to `[N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W]`."""
        branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]
        return torch.cat(branches, dim=1)


def draw_flow(ax: Axes, boxes: dict[str, tuple[float, float]], paths: Sequence[Sequence[str]],
              highlighted: Sequence[str] = (), title: str = "") -> None:
    """Draw named boxes at (x, y), some of them highlighted, and arrows along each path of names."""
    xs = [x for x, _ in boxes.values()]
    ys = [y for _, y in boxes.values()]
    ax.set(xlim=(min(xs) - 1, max(xs) + 1), ylim=(min(ys) - 0.5, max(ys) + 0.5), title=title,
           xticks=[], yticks=[], frame_on=False)
    texts = {}
    for name, (x, y) in boxes.items():
        fill = "#f5c542" if name in highlighted else "#d4e6f7"
        frame = {"boxstyle": "round,pad=0.4", "facecolor": fill, "edgecolor": "white"}
        texts[name] = ax.text(x, y, name, ha="center", va="center", bbox=frame)
    for path in paths:
        for begin, end in zip(path, path[1:]):                   # an arrow from edge to edge
            ax.annotate("", boxes[end], boxes[begin], arrowprops={
                "arrowstyle": "-|>", "color": "grey", "shrinkA": 2, "shrinkB": 2,
                "patchA": texts[begin].get_bbox_patch(), "patchB": texts[end].get_bbox_patch()})
# %%
if __name__ == "__main__":
    boxes = {"192 × 28×28": (3, 3), "1×1\nto 96": (2.3, 2), "1×1\nto 16": (4, 2),
             "max-pool 3×3": (6, 2), "1×1\nto 64": (0, 1), "3×3\nto 128": (2.3, 1),
             "5×5\nto 32": (4, 1), "1×1\nto 32": (6, 1), "256 × 28×28": (3, 0)}
    top, bottom = "192 × 28×28", "256 × 28×28"
    paths = [(top, "1×1\nto 64", bottom), (top, "1×1\nto 96", "3×3\nto 128", bottom),
             (top, "1×1\nto 16", "5×5\nto 32", bottom),
             (top, "max-pool 3×3", "1×1\nto 32", bottom)]
    figure, ax = plt.subplots(figsize=(7.2, 3.6))
    draw_flow(ax, boxes, paths, highlighted=["1×1\nto 96", "1×1\nto 16"],
              title="GoogLeNet's first Inception block (3a); yellow: the reductions")
    show_figure(figure, "5_4_inception")

    block = InceptionBlock(192, 64, 96, 128, 16, 32, 32)
    print("output:", list(block(torch.zeros(1, 192, 28, 28)).shape))
    for name, branch, direct in (("3×3", block.branch2, nn.Conv2d(192, 128, kernel_size=3)),
                                 ("5×5", block.branch3, nn.Conv2d(192, 32, kernel_size=5))):
        print(f"{name} branch: {count_parameters(branch):7,} parameters, "
              f"without the reduction {count_parameters(direct):7,}")
# %% [markdown]
"""
64 + 128 + 32 + 32 channels make 256. The reductions save two fifths of the parameters in one branch and nine tenths in
the other. (The block is the paper's. torchvision's version has a 3×3 where the paper has its 5×5, and adds batch
normalisation.)

### 5.5 ResNet (2015)
He, Zhang, Ren and Sun noticed something strange. When they made a network deeper, it became worse, even *on its own
training images*. So it was not overfitting. A deeper network could at least copy the shallower one, and let the extra
layers pass their input on unchanged. They suspected that plain layers find it hard to learn to change nothing. Their
remedy is a *shortcut*: a *residual block* computes x + f(x), followed by a ReLU. Here f is two convolutions. If f has
nothing to add, it only has to become zero.
"""
# %%
class ResidualBlock(nn.Module):
    """ResNet's basic block (He et al. 2015): two 3×3 convolutions and a shortcut around them.

    `inplanes`, `planes`: channels in and out. `downsample`: what stands on the shortcut; by default
    a 1×1 convolution where the shape changes. `residual=False` leaves the shortcut out.
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
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(x))
        return y.relu()


def deep_network(blocks: int, residual: bool) -> nn.Sequential:
    """Return a network for images `[N, 3, 32, 32]`, of `blocks` blocks with 16 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=4, stride=4),               # [N, 16, 8, 8], to save time
        nn.BatchNorm2d(16), nn.ReLU(),
        *(ResidualBlock(16, 16, residual=residual) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * 2 * 2, 10))
# %%
if __name__ == "__main__":
    boxes = {"x": (0, 0), "3×3": (1.5, 0), "BatchNorm, ReLU": (3.4, 0), " 3×3 ": (5.3, 0),
             "BatchNorm": (6.9, 0), "+": (8.4, 0), "ReLU": (9.6, 0), "shortcut": (4.2, 0.9)}
    paths = [list(boxes)[:-1], ("x", "shortcut", "+")]           # along the row, and around it
    figure, ax = plt.subplots(figsize=(8, 1.6))
    draw_flow(ax, boxes, paths, ["shortcut"], "A residual block computes x + f(x)")
    show_figure(figure, "5_5_residual_block")
# %% [markdown]
"""
Let us see the effect for ourselves. We train plain and residual stacks of several depths for the same number of steps,
all with batch normalisation, and watch the *training* loss.
"""
# %%
if __name__ == "__main__":
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    for ax, kind, residual in zip(axes, ("plain", "residual"), (False, True)):
        for blocks in DEPTHS:
            with seeded(options.seed):
                model = deep_network(blocks, residual=residual).to(device)
            losses = train_epoch(model, batches[:STEPS], colour.train_images, colour.train_labels,
                                 AdamW(model.parameters(), lr=3e-3))  # the batches of 5.2
            ax.plot(smooth(losses, 20), label=f"{2 * blocks + 2} layers")
            results.add("5.5", f"{kind}, {2 * blocks + 2} layers", colour, "last training loss",
                        losses[-30:].mean())
        ax.set(xlabel="step", ylabel="training loss", title=f"{kind} networks")
        ax.legend()
    figure.suptitle("Deeper plain networks learn worse; shortcuts prevent most of it", fontsize=10)
    show_figure(figure, "5_5_degradation")
# %% [markdown]
"""
Among the plain networks, each deeper one has learnt less after these 150 steps. (The curves are smoothed, so they end
earlier.) With shortcuts, depth does little harm. At 6 layers they make little difference. (This is one seed, and only
the beginning of a training. In the paper the deeper plain networks were still worse at the end.)

Do gradients *vanish*, that is, become tiny on their way back to the first layers? Many give this as the reason, but
section 4.1 of the paper argues that with batch normalisation they do not. For untrained stacks we compute the gradient
of the loss with respect to the output of every block. How large is it? And does it point in the same direction as the
gradient at the last block? The cosine of the angle between the two is 1 for the same direction, and 0 if they have
nothing in common.

On its way back, a gradient passes through every block. Before training, f turns it into a random direction. A shortcut
hands it on as it is (the derivative of x + f(x) is 1 + f′(x)), and f only adds its random part. So with shortcuts the
cosine should fall slowly from the last block to the first. Without them, the cosine should be near 0 at once.
"""
# %%
if __name__ == "__main__":
    images, labels = standardize(colour.train_images[:64]), colour.train_labels[:64]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    for kind, residual in (("plain", False), ("residual", True)):
        with seeded(options.seed):
            model = deep_network(blocks=16, residual=residual)
        with recording(model[3:19]) as outputs:                  # the 16 blocks
            loss = F.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, list(outputs.values()))  # 16 of [64, 16, 8, 8]
        norms = [gradient.norm().item() for gradient in gradients]
        similarities = [F.cosine_similarity(gradient.flatten(1), gradients[-1].flatten(1)).mean()
                        for gradient in gradients]
        left.plot(range(1, 17), norms, "o-", label=kind)
        right.plot(range(1, 17), similarities, "o-", label=kind)
    left.set(yscale="log", xlabel="block", ylabel="size of the gradient",
             title="In neither stack does the gradient vanish")
    right.set(xlabel="block", ylabel="cosine with the last block's",
              title="Shortcuts pass its direction on")
    left.legend()
    show_figure(figure, "5_5_gradients")
# %% [markdown]
"""
Read both pictures from right to left, as the gradient travels. Its size grows in both stacks, and far more in the plain
one. There the cosine is about zero already at block 15. In the residual stack the direction fades slowly, over ten
blocks and more. The picture shows what a shortcut does before training, not why plain stacks learn worse.

With shortcuts, the paper trained 152 layers on ImageNet and 1,202 on CIFAR-10. On test images, the 1,202 layers did
worse than 110; the authors suspected overfitting.

### 5.6 All on one page
torchvision has these networks ready-made. On the device `meta` even VGG-16 costs neither memory nor time. One pass
counts the *floating-point operations*: a multiplication and an addition are two, and only convolutions and matrix
products count. A *GFLOP* is a billion of them. *Top-1* means that the first answer is right. "Last map" is the shape of
the last feature maps. Two newer networks are listed too; 5.7 introduces them.
"""
# %%
if __name__ == "__main__":
    networks = (("AlexNet", 2012), ("VGG16", 2014), ("GoogLeNet", 2014), ("ResNet18", 2015),
                ("ResNet50", 2015), ("MobileNet_V2", 2018), ("ConvNeXt_Tiny", 2022))
    figure, ax = plt.subplots(figsize=(7, 3.8))
    print("network        year   last map   M parameters   GFLOP   top-1 on ImageNet")
    for name, year in networks:
        extra = {"aux_logits": False, "init_weights": False} if name == "GoogLeNet" else {}
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = models.get_model(name, **extra).eval()
            with recording(model.modules()) as outputs:
                model(torch.empty(1, 3, 224, 224))
        last_map = [x for x in outputs.values() if x.ndim == 4 and x.shape[2] > 1][-1]
        parameters, operations = count_parameters(model) / 1e6, counter.get_total_flops() / 1e9
        metrics = models.get_model_weights(name)["IMAGENET1K_V1"].meta["_metrics"]
        accuracy = metrics["ImageNet-1K"]["acc@1"]
        print(f"{name:14} {year}   {'×'.join(map(str, last_map.shape[1:])):9}"
              f"{parameters:12.2f} {operations:9.2f} {accuracy:10.1f}%")
        results.add("5.6", name, "traced, not trained", "GFLOP", operations, quiet=True)
        ax.scatter(operations, accuracy, s=5 * parameters, alpha=0.6)
        above = name == "GoogLeNet"                              # or labels would overlap
        ax.annotate(f"{name} ({year})", (operations, accuracy),
                    (0, 6 if above else -6 - 1.3 * parameters ** 0.5), ha="center",
                    va="bottom" if above else "top", textcoords="offset points")
    ax.set(xscale="log", xlim=(0.3, 120), ylim=(50, 86), ylabel="ImageNet accuracy in % (top-1)",
           xlabel="GFLOP for one image of 224×224", title="Accuracy against cost "
           "(area of a dot: parameters)")
    show_figure(figure, "5_6_architectures")
# %% [markdown]
"""
ResNet-50 is more accurate than VGG-16, with a quarter of the operations and a fifth of the parameters. MobileNetV2
reaches the accuracy of VGG-16 with a fiftieth of its operations. In the picture, up and to the left is better.

*The accuracies are those that torchvision states for its first weights (V1). They come from its own training, not from
the papers; only GoogLeNet's weights come from elsewhere. torchvision's AlexNet is the slimmer one of Krizhevsky (2014),
and its GoogLeNet differs as said in 5.4. ConvNeXt was trained with a newer, longer recipe. With such a recipe
torchvision's ResNet-50 reaches 80.9% (its V2 weights), so training explains a large part of ConvNeXt's lead.*

### 5.7 A block of today: depthwise separable convolution
A 3×3 convolution does two things at once: it looks at a neighbourhood, and it mixes channels. A *depthwise separable*
convolution does them one after the other. First each channel is filtered by a kernel of its own (the *depthwise*
convolution; this is what `groups=in_channels` is good for). Then a 1×1 convolution mixes the channels. MobileNet
(Howard et al. 2017) is built from such blocks.
"""
# %%
class DepthwiseSeparable(nn.Module):
    """A depthwise, then a 1×1 convolution (Howard et al. 2017), in place of an `nn.Conv2d`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1,
                 padding: int | None = None, bias: bool = True) -> None:
        super().__init__()
        if padding is None:
            padding = kernel_size // 2                           # keeps the size at stride 1
        self.depthwise = nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding,
                                   groups=in_channels, bias=False)
        self.norm = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to `[N, out_channels, H_out, W_out]`."""
        return self.pointwise(self.norm(self.depthwise(x)).relu())
# %%
if __name__ == "__main__":
    for name, block in (("plain 3×3", nn.Conv2d(128, 128, kernel_size=3, padding=1, bias=False)),
                        ("separable", DepthwiseSeparable(128, 128, bias=False))):
        with FlopCounterMode(display=False) as counter:
            block(torch.zeros(1, 128, 16, 16))
        print(f"{name}: {count_parameters(block):7,} parameters, "
              f"{counter.get_total_flops() / 2e6:5.1f} million multiply-adds at 16×16")
# %% [markdown]
"""
With 128 channels, the separable block needs an eighth of the weights and of the multiplications. What does that cost in
accuracy? We put both into a SmallVGG with half the channels, and train it briefly on few images.
"""
# %%
if __name__ == "__main__":
    some_colour = colour.first(FEW, 1000)
    for name, convolution in (("plain", nn.Conv2d), ("separable", DepthwiseSeparable)):
        network = partial(SmallVGG, channels=(16, 32, 64), convolution=convolution)
        accuracies, seconds = [], []
        for seed in range(options.seed, options.seed + SEEDS):
            _, history, accuracy = run(network, some_colour, seed, device, epochs=BRIEF,
                                       learning_rate=8e-3, augment=random_shift, on_epoch=None)
            accuracies.append(accuracy)
            seconds.append(min(row["seconds"] for row in history))
        results.add_seeds("5.7", f"{name} convolutions", some_colour, "test accuracy", accuracies)
        print(f"  {min(seconds):.2f} s for an epoch")
# %% [markdown]
"""
After equally many steps the separable network, which has far fewer parameters, is clearly behind. Look at the times,
too. The separable network needs far fewer multiplications, but its epoch is hardly shorter, if at all. One reason: a
depthwise convolution reads a number and uses it only nine times, so it tends to wait for memory (4.3). It pays on
phones, where space and energy are scarce, and in large networks, where the savings buy more channels.

Later networks went this way. *MobileNetV2* (`models.mobilenet_v2`, 2018) widens the channels before the depthwise
convolution and narrows them afterwards, with a shortcut between the narrow ends (the *inverted residual*). MobileNetV3
adds *squeeze-and-excitation* (Hu et al. 2018): from the means of all channels, a tiny network computes a factor for
each channel, and multiplies the channel by it. *ConvNeXt* (`models.convnext_tiny`, 2022) has depthwise kernels of 7×7.

**To remember**
- A stack of small kernels sees as much as one large kernel, with fewer weights; a 1×1 convolution mixes channels.
- Shortcuts make deep networks easier to train. Plain ones learn worse, though before training no gradient vanishes.
- Count parameters and operations, but measure the time: they need not agree.

**Exercises 5.** a) Which parameters can be set to zero so that a `ResidualBlock` passes positive maps on unchanged? b)
Write the squeeze-and-excitation of 5.7: average each map, then two 1×1 convolutions (first fewer channels, then all
again) with a ReLU between them, then a sigmoid. It gives factors from 0 to 1, by which the maps are multiplied.

<details><summary>Answers</summary>

a) For example weight and bias of the last batch normalisation. (Its bias is zero from the start.)
```python
block = ResidualBlock(4, 4)
nn.init.zeros_(block.bn2.weight)
x = torch.rand(2, 4, 8, 8)
assert torch.equal(block(x), x)
```
b) It equals torchvision's.
```python
class SqueezeExcitation(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.factors = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.factors(x)

from torchvision.ops import SqueezeExcitation as Theirs
ours, theirs = SqueezeExcitation(8, 2), Theirs(8, 2)
theirs.fc1, theirs.fc2 = ours.factors[1], ours.factors[3]
x = torch.randn(2, 8, 5, 5)
assert torch.allclose(ours(x), theirs(x), atol=1e-6)
```
</details>

## 6 Transfer learning
### 6.1 What it is, and what it saves
A network that was trained on very many images finds edges, colours, textures and parts of objects. Nearly every task
with images needs these. So why learn them again each time? *Transfer learning* takes such a network and replaces its
last linear layer, the *head*, by a new one for your classes. All before the head is kept, and is called the *backbone*.
(In the code, `backbone` still has its old head.) Transfer saves time and labels, because most of the network is already
trained. Section 6.5 measures both.

There are two variants. *Feature extraction* trains the new head only; the backbone is *frozen*, that is, its weights do
not change. *Fine-tuning* trains some or all of the backbone too. Which one fits? Two questions decide: how many labels
you have, and how near your images are to those that the backbone was trained on. The table gives rules of thumb.

| | few labels | many labels |
|---|---|---|
| **near task** | feature extraction is cheapest; fine-tuning with small rates may gain a little | fine-tuning |
| **far task** | drop the late layers, then add a head; expect little | fine-tune everything, or train from scratch |

### 6.2 Getting a network, and replacing its head
`torchvision.models` has networks with their weights. You name the weights that you want (before 2022 it was
`pretrained=True`). Weights come with their own preprocessing. Use it: with any other, accuracy may drop, and nobody
tells you. The usual lines are

    weights = models.ResNet18_Weights.DEFAULT
    backbone = models.resnet18(weights=weights)                  # downloads 45 MB, once
    preprocess = weights.transforms()

`load_resnet18` does that, and gives up if the download takes too long. Without an internet connection it uses weights
that come with this project. They were trained on printed letters, drawn on patches of the same photo as our colour
digits. With them we classify colour digits, which is a very near task.
"""
# %%
if __name__ == "__main__":
    from data import load_resnet18

    weights = models.ResNet18_Weights.DEFAULT
    backbone, preprocess, description = load_resnet18(options.data_dir, options.offline)
    backbone.to(device)
    print(description)
    if backbone.fc.out_features == 1000:                         # ImageNet has 1,000 classes
        torch.hub.set_dir(options.data_dir)                      # where the file is now
        usual = models.resnet18(weights=weights).to(device)
        assert torch.equal(usual.fc.weight, backbone.fc.weight)
# %% [markdown]
"""
Where is the head? In a ResNet it is called `fc`. In VGG, MobileNet, EfficientNet and others it is the last layer of
`classifier`. We replace it for five classes.
"""
# %%
if __name__ == "__main__":
    with torch.device("meta"):                                   # shapes only
        resnet, vgg, mobilenet = models.resnet18(), models.vgg11(), models.mobilenet_v3_small()
        resnet.fc = nn.Linear(resnet.fc.in_features, 5)
        vgg.classifier[-1] = nn.Linear(vgg.classifier[-1].in_features, 5)
        mobilenet.classifier[-1] = nn.Linear(mobilenet.classifier[-1].in_features, 5)
        for model in (resnet, vgg, mobilenet):
            logits = model.eval()(torch.empty(2, 3, 224, 224))
            print(f"{type(model).__name__:12} logits {list(logits.shape)}")
# %% [markdown]
"""
### 6.3 Feature extraction
The frozen backbone gives the same output for a picture in every epoch. So we can run it *once*, and keep what comes
out: the means of its 512 last maps, for each picture. Training the head then takes a moment. The usual way pushes every
picture through the backbone in every epoch. Its one advantage is that it can augment the pictures.

There is a trap. `requires_grad=False` freezes weights, but not the running statistics of batch normalisation. They move
with every forward pass in training mode, and the "frozen" features drift. So here everything stays in evaluation mode.

Five functions belong together. `new_head` copies a ResNet and gives it a fresh head. `split_at` cuts it into a frozen
part and a part to be trained. `run_frozen` computes the features. `train_tail` trains what comes after the cut, and
`tail_accuracy` tests it.
"""
# %%
def new_head(backbone: models.ResNet, num_classes: int, seed: int = 0) -> models.ResNet:
    """Return a copy of a torchvision ResNet with a fresh head `fc` for `num_classes`."""
    model = copy.deepcopy(backbone)
    with seeded(seed):
        model.fc = nn.Linear(model.fc.in_features, num_classes).to(model.fc.weight.device)
    return model


def split_at(model: models.ResNet, first: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Split a torchvision ResNet into what is frozen and what is trained, in evaluation mode.

    `first` names the first child that is trained: "fc" (feature extraction), "layer4"
    (fine-tuning), or one before it.
    """
    names = [name for name, _ in model.named_children()]
    if first not in names:
        raise ValueError(f"split_at: expected one of {names}, got {first!r}")
    layers = list(model.eval().requires_grad_(True).children())
    layers.insert(-1, nn.Flatten())                              # as ResNet does before its head
    cut = len(layers) - 1 if first == "fc" else names.index(first)  # Flatten has moved only "fc"
    return nn.Sequential(*layers[:cut]).requires_grad_(False), nn.Sequential(*layers[cut:])


def run_frozen(frozen: nn.Module, images: Tensor, preprocess: Callable) -> Tensor:
    """Return what the frozen part gives for `uint8 [N, 3, H, W]`, on its device."""
    device = next(frozen.parameters(), images).device            # or that of the images
    batches = tqdm(images.split(100), "frozen layers", leave=False, disable=None)
    with torch.no_grad():
        return torch.cat([frozen(preprocess(batch.to(device))) for batch in batches])


def train_tail(tail: nn.Sequential, features: Tensor, labels: Tensor, *, epochs: int = 30,
               head_rate: float = 1e-2, body_rate: float = 1e-3, seed: int = 0) -> None:
    """Train what comes after the cut, of which the last layer is the head.

    `features` are what `run_frozen` gave, `labels` `int64 [N]`. The learning rates of the head
    and of all before it fall to zero along a cosine (drawn in 8.2).
    """
    groups = [{"params": list(tail[:-1].parameters()), "lr": body_rate},
              {"params": list(tail[-1].parameters()), "lr": head_rate}]
    optimizer = AdamW([group for group in groups if group["params"]])
    schedule = CosineAnnealingLR(optimizer, epochs)
    labels = labels.to(features.device)
    with seeded(seed):
        for _ in tqdm(range(epochs), "last layers", leave=False, disable=None):
            for batch in torch.randperm(len(labels)).split(32):
                loss = F.cross_entropy(tail(features[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()


def tail_accuracy(tail: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Return the accuracy (0 to 1) of what comes after the cut."""
    with torch.no_grad():
        predictions = tail(features).argmax(dim=1)
    return (predictions.cpu() == labels.cpu()).float().mean().item()
# %%
if __name__ == "__main__":
    from data import colour_digits

    target = colour_digits(digits)                               # near to letters
    if backbone.fc.out_features == 1000:
        target = colour                                          # near to ImageNet's photos
        preprocess = weights.transforms(crop_size=96, resize_size=110)  # smaller than 224: faster
    target = target.first(*TARGET)
    some = target.first(LABELLED)                                # those that have labels
    print(f"{LABELLED} labels; images: {target.name}")
# %% [markdown]
"""
Do kept features give the same result as the usual way, and how much faster are they? Both train the same head for 25
epochs. The usual way feeds pictures to the uncut network `whole`. (Its frozen part does not change, so its head can be
tested on kept features.)
"""
# %%
if __name__ == "__main__":
    frozen, head = split_at(new_head(backbone, 10, options.seed), "fc")
    whole = nn.Sequential(*frozen, *copy.deepcopy(head))         # uncut; all but the head frozen
    test_features = run_frozen(frozen, target.test_images, preprocess)  # [1000, 512]

    began = time.perf_counter()
    features = run_frozen(frozen, some.train_images, preprocess)  # [200, 512]
    train_tail(head, features, some.train_labels, epochs=25)
    seconds_kept = time.perf_counter() - began
    accuracy_kept = tail_accuracy(head, test_features, target.test_labels)

    began = time.perf_counter()
    train_tail(whole, preprocess(some.train_images.to(device)), some.train_labels, epochs=25)
    seconds_usual = time.perf_counter() - began
    accuracy_usual = tail_accuracy(whole[-1], test_features, target.test_labels)

    results.add("6.3", "features kept", target, "test accuracy", accuracy_kept, seconds_kept)
    results.add("6.3", "the usual way", target, "test accuracy", accuracy_usual, seconds_usual)
    results.add("6.3", "keeping features", target, "times faster", seconds_usual / seconds_kept)
    assert abs(accuracy_kept - accuracy_usual) < 0.02
# %% [markdown]
"""
Both ways reach the same accuracy. Keeping the features takes a small part of the time, because the backbone runs once
instead of 25 times.

### 6.4 Fine-tuning
For fine-tuning we cut earlier. ResNet-18 has four stages of residual blocks. We train the last one, `layer4`, and the
head. Everything before stays frozen, and its output can again be kept. The backbone's layers get a tenth of the head's
learning rate. At first the new head is still wrong, and large steps would spoil good weights.
"""
# %%
if __name__ == "__main__":
    boxes = {"image": (0, 0), "conv1": (1.6, 0), "layer1": (3.2, 0), "layer2": (4.8, 0),
             "layer3": (6.4, 0), "layer4": (8, 0), "mean of maps": (10, 0), "fc (head)": (12, 0)}
    paths = [list(boxes)]                                        # one path through all boxes
    figure, axes = plt.subplots(2, 1, figsize=(8, 2))
    draw_flow(axes[0], boxes, paths, ["fc (head)"], "feature extraction (yellow is trained)")
    draw_flow(axes[1], boxes, paths, ["layer4", "fc (head)"], "fine-tuning")
    show_figure(figure, "6_4_frozen_and_trained")

    frozen, tail = split_at(new_head(backbone, 10, options.seed), "layer4")
    features = run_frozen(frozen, some.train_images, preprocess)
    train_tail(tail, features, some.train_labels, epochs=10)
    test_features = run_frozen(frozen, target.test_images, preprocess)
    accuracy = tail_accuracy(tail, test_features, target.test_labels)
    results.add("6.4", f"layer4 and head, {LABELLED} labels", target, "test accuracy", accuracy)
    print(f"trained: {count_parameters(tail):,} of "
          f"{count_parameters(frozen) + count_parameters(tail):,} parameters")
# %% [markdown]
"""
`layer4` holds most of the network's weights, so three quarters of all are trained. The accuracy is near to that of 6.3;
in the notebook's run they are a tie. Section 6.5 looks more closely.

### 6.5 From scratch, extraction and fine-tuning, side by side
Now the comparison that matters: ResNet-18 in three ways, each with epochs of its own, for several numbers of labels.
(The dictionary `SCRATCH` in the preparations says how many epochs training from scratch gets for each number.) Each
seed draws other images and another head. Training from scratch takes far longer, so it has one seed only. Its training
loss is printed: where it is near zero, more epochs may not help. Nothing is augmented.
"""
# %%
if __name__ == "__main__":
    kept, kept_test = {}, {}                                     # features before "fc", "layer4"
    for first in ("fc", "layer4"):                               # frozen parts run once for all
        frozen, _ = split_at(copy.deepcopy(backbone), first)
        kept[first] = run_frozen(frozen, target.train_images, preprocess)
        kept_test[first] = run_frozen(frozen, target.test_images, preprocess)

    def accuracy_of(way: str, count: int, seed: int) -> float:
        """Train in one of the three ways with `count` labels; return the test accuracy."""
        with seeded(seed, 1):
            drawn = torch.randperm(len(target.train_images))[:count]
        if way == "from scratch":
            _, history, accuracy = run(
                partial(models.resnet18, num_classes=10), target.only(drawn), seed, device,
                batch_size=32, epochs=SCRATCH[count], validation=0, on_epoch=None)
            print(f"  training loss at the end: {history[-1]['train_loss']:.3f}")
            return accuracy
        first, epochs = ("fc", 25) if way == "feature extraction" else ("layer4", FINE_TUNING)
        _, tail = split_at(new_head(backbone, 10, seed), first)
        train_tail(tail, kept[first][drawn], target.train_labels[drawn], epochs=epochs, seed=seed)
        return tail_accuracy(tail, kept_test[first], target.test_labels)
# %%
if __name__ == "__main__":
    figure, ax = plt.subplots(figsize=(6.6, 3.2))
    for way in ("from scratch", "feature extraction", "fine-tuning"):
        means, spreads = [], []
        for count in SCRATCH:
            seeds = range(options.seed, options.seed + SEEDS)
            began = time.perf_counter()
            if way == "from scratch":
                seeds = seeds[:1]                                # it takes so long
            accuracies = [accuracy_of(way, count, seed) for seed in seeds]
            seconds = (time.perf_counter() - began) / len(seeds)
            results.add_seeds("6.5", f"{way}, {count} labels", target, "test accuracy", accuracies,
                              seconds)
            means.append(np.mean(accuracies))
            spreads.append(np.std(accuracies, ddof=1) if len(accuracies) > 1 else 0)
        beside = 1.04 if way == "fine-tuning" else 1             # or two curves hide each other
        ax.errorbar([beside * count for count in SCRATCH], means, spreads, fmt="o-", capsize=3,
                    label=way)
    ax.set(xscale="log", xlabel="labelled images", ylabel="test accuracy", ylim=(0, 1),
           title="With few labels, transfer wins by far (bars: spread over seeds)")
    ax.set_xticks(list(SCRATCH), [str(count) for count in SCRATCH])
    ax.minorticks_off()
    ax.legend()
    show_figure(figure, "6_5_transfer")
# %% [markdown]
"""
With few labels the pretrained backbone is far ahead, in a fraction of the time. With 200 labels its lead is about half
as large. In our run, extraction and fine-tuning tie at every number of labels. Where the training loss from scratch is
still well above zero, more epochs might narrow the lead, and take more time.

(The seconds of transfer leave out the frozen layers, which ran once beforehand. The task of the bundled weights is very
near, so transfer looks better than it usually is. With ImageNet's weights, transfer sees 96×96 pixels, and training
from scratch 32×32. With `--quick` everything is too short to compare.)

### 6.6 Your own pictures
Put your pictures into one folder, with a sub-folder for each class. (Or into `train` and `val`, each with the same
sub-folders.) torchvision's `ImageFolder` finds them. `train_on_folder` first trains a new head, then fine-tunes the
same network with small learning rates, and saves it. All pictures are kept in memory, and they are not augmented. A
share of the pictures is put aside to measure the accuracy.

    train_on_folder("my_pictures", "my_model.pt")
    predict(["new.jpg"], "my_model.pt")

Without further arguments the backbone is torchvision's ResNet-18 with ImageNet weights, which suits photos. (Most of
the code below is about files. You can skip it.)
"""
# %%
def save_whole(contents: dict, path: str | Path) -> None:
    """Call `torch.save` so that the file appears whole, or stays as it was."""
    buffer, beside = io.BytesIO(), Path(f"{path}.tmp")
    torch.save(contents, buffer)
    try:
        with beside.open("wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())                              # now it is on the disk
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_picture(path: str | Path, size: int = 256) -> Tensor:
    """Return the middle square of a picture file as `uint8 [3, size, size]`."""
    picture = ImageOps.fit(open_picture(path), (size, size), Image.Resampling.BILINEAR)
    return v2.functional.pil_to_tensor(picture)


def read_folder(folder: str | Path) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Return `uint8 [N, 3, 256, 256]`, `int64 [N]`, class names and files; skip what is broken."""
    def is_visible(path: str) -> bool:
        """Return whether a file is not a hidden one, as systems put into folders."""
        return not Path(path).name.startswith(".")

    found = datasets.ImageFolder(folder, is_valid_file=is_visible)  # says what is missing
    images, labels, files, skipped = [], [], [], []
    for path, label in tqdm(found.samples, "reading pictures", leave=False, disable=None):
        try:
            images.append(load_picture(path))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            skipped.append(f"{path} ({error})")
        else:
            labels.append(label)
            files.append(path)
    if skipped:
        print(f"skipped {len(skipped)} of {len(found.samples)} files:", *skipped, sep="\n  ")
    if len(set(labels)) < 2 or len(set(labels)) < len(found.classes):
        raise ValueError(f"{folder}: expected at least two sub-folders with readable pictures")
    return torch.stack(images), torch.tensor(labels), found.classes, files


def split_by_class(labels: Tensor, share: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return indices to train and to validate with: a share of each class, at least one image."""
    with seeded(seed):
        order = torch.randperm(len(labels))
    train, held_out = [], []
    for label in labels.unique():
        of_class = order[labels[order] == label]
        count = max(1, round(share * len(of_class)))
        if count == len(of_class):
            raise ValueError("expected at least two pictures of each class, to train and to test")
        held_out.append(of_class[:count])
        train.append(of_class[count:])
    return torch.cat(train), torch.cat(held_out)


def train_on_folder(folder: str | Path, model_file: str | Path = "pictures.pt",
                    backbone: models.ResNet | None = None, preprocess: Callable | None = None,
                    *, epochs: int = 30, seed: int = 0,
                    device: torch.device | None = None) -> dict[str, float]:
    """Train ResNet-18 on a folder with one sub-folder of pictures for each class.

    Args:
        backbone, preprocess: a ResNet-18, and what makes its input of `uint8 [N, 3, 256, 256]`;
            by default torchvision's with ImageNet weights, which are downloaded once.

    Returns the validation accuracies (0 to 1), and writes `model_file` for `predict`.
    """
    folder, model_file = Path(folder), Path(model_file)
    if model_file.is_dir() or not model_file.absolute().parent.is_dir():
        raise OSError(f"model_file: expected a file in a folder that exists, got '{model_file}'")
    if (backbone is None) != (preprocess is None):
        raise ValueError("train_on_folder: expected a backbone and the preprocess that fits it")
    if (folder / "val").is_dir():
        images, labels, classes, files = read_folder(folder / "train")
        val_images, val_labels, val_classes, val_files = read_folder(folder / "val")
        if val_classes != classes:
            raise ValueError(f"{folder}: train has {classes}, but val has {val_classes}")
        train = torch.arange(len(labels))
        held_out = len(labels) + torch.arange(len(val_labels))
        images, labels = torch.cat([images, val_images]), torch.cat([labels, val_labels])
        files += val_files
    else:
        images, labels, classes, files = read_folder(folder)
        train, held_out = split_by_class(labels, seed=seed)
    print(f"{len(train)} pictures to train, {len(held_out)} to validate: {', '.join(classes)}")

    if backbone is None:
        backbone = models.resnet18(weights=models.ResNet18_Weights.DEFAULT)
        preprocess = models.ResNet18_Weights.DEFAULT.transforms()
    model = new_head(backbone.to(device or best_device()), len(classes), seed)
    scores = {}
    for name, first, rate in (("feature extraction", "fc", 1e-2), ("fine-tuning", "layer4", 1e-3)):
        frozen, tail = split_at(model, first)
        features = run_frozen(frozen, images, preprocess)
        train_tail(tail, features[train], labels[train], epochs=epochs, head_rate=rate,
                   body_rate=rate / 10, seed=seed)
        scores[name] = tail_accuracy(tail, features[held_out], labels[held_out])
        print(f"{name}: {scores[name]:.1%} of {len(held_out)} validation pictures are right")

    with torch.no_grad():
        sureness, answers = tail(features[held_out]).softmax(dim=1).cpu().max(dim=1)
    wrong = (answers != labels[held_out]).nonzero()[:, 0]
    for index in wrong[sureness[wrong].argsort(descending=True)][:5]:
        print(f"  mistake: {files[held_out[index]]} taken for {classes[answers[index]]} "
              f"({sureness[index]:.0%})")
    save_whole({"classes": classes, "state_dict": model.state_dict(),
                "sample": preprocess(images[:1]).cpu(), "sample_image": images[:1]}, model_file)
    return scores


def predict(files: Sequence[str | Path], model_file: str | Path = "pictures.pt",
            preprocess: Callable | None = None) -> list[list[tuple[str, float]]]:
    """Return, and print, the three most probable classes of each picture.

    `preprocess` is the one that the network was trained with.
    """
    try:
        saved = torch.load(model_file, map_location="cpu", weights_only=True)
        model = models.resnet18(num_classes=len(saved["classes"]))
        model.load_state_dict(saved["state_dict"])
        image, expected = saved["sample_image"], saved["sample"]
    except (RuntimeError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{model_file}: expected a file written by train_on_folder") from error
    preprocess = preprocess or models.ResNet18_Weights.DEFAULT.transforms()
    sample = preprocess(image)
    if sample.shape != expected.shape or not torch.allclose(sample, expected, atol=1e-3):
        raise ValueError("predict: expected the preprocess that this network was trained with")
    answers = []
    for file in [files] if isinstance(files, (str, Path)) else files:
        with torch.no_grad():
            probabilities = model.eval()(preprocess(load_picture(file)[None]))[0].softmax(dim=0)
        best = probabilities.topk(min(3, len(probabilities)))
        answers.append([(saved["classes"][index], value.item())
                        for value, index in zip(best.values, best.indices)])
        print(f"{file}: " + ", ".join(f"{name} ({value:.0%})" for name, value in answers[-1]))
    return answers
# %%
if __name__ == "__main__":
    from data import write_as_files

    with tempfile.TemporaryDirectory() as folder:                # digits as if they were your files
        new = write_as_files(digits.first(101), Path(folder) / "my pictures")[-1]
        new = new.rename(Path(folder) / "new.png")               # not one of those to train on
        train_on_folder(Path(folder) / "my pictures", Path(folder) / "my_model.pt", backbone,
                        preprocess, epochs=FOLDER, seed=options.seed, device=device)
        predict([new], Path(folder) / "my_model.pt", preprocess)
# %% [markdown]
"""
The last line is the answer for a new picture, `new.png`, which shows the digit 0. The two accuracies say little,
because one of twenty validation pictures is five points. If several of your pictures show the same object, keep them
together in `train` or in `val`. Otherwise the accuracy is too high. For photos use the ImageNet weights, not the
bundled letters.

**To remember**
- With few labels, begin with a pretrained network, and use the preprocessing that belongs to its weights.
- Without augmentation, frozen layers need to run once only. Keep batch normalisation in evaluation mode.
- When you fine-tune, give the backbone a smaller learning rate than the head.

**Exercises 6.** a) Five classes by feature extraction with ResNet-18: how many parameters are trained? b) Cut before
`layer3`. Which parameters change?

<details><summary>Answers</summary>

a) 2,565: five times 512 weights and a bias.
```python
_, head = split_at(new_head(models.resnet18(), 5), "fc")
assert count_parameters(head) == 5 * (512 + 1) == 2_565
```
b) Those of `layer3`, `layer4` and the head.
```python
model = new_head(models.resnet18(), 5)
frozen, tail = split_at(model, "layer3")
trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
assert trained == {"layer3", "layer4", "fc"}
```
</details>

## 7 What networks look at
### 7.1 First-layer filters
The kernels of the first layer have as many channels as the image. So they can be drawn as small images themselves. Here
are SimpleCNN's, before training and after it. Red weights are positive, blue ones negative.
"""
# %%
def plot_filters(weight: Tensor, titles: Sequence[str] = (), title: str = "") -> Figure:
    """Draw the kernels `[out_channels, 1 or 3, h, w]` of a first layer, eight to a row.

    Those with one channel share a scale from blue to red. Those with three are drawn as colours,
    each on a scale of its own; grey is zero.
    """
    weight = weight.detach().cpu()
    limit = weight.abs().max().item()
    if weight.shape[1] == 3:
        largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        weight = 0.5 + 0.5 * weight / largest
    return plot_images(list(weight), titles, title=title, cmap="RdBu_r", vmin=-limit, vmax=limit)
# %%
if __name__ == "__main__":
    with seeded(options.seed):
        untrained = SimpleCNN()
    both = torch.cat([untrained.conv_block1[0].weight, simple_cnn.conv_block1[0].weight.cpu()])
    show_figure(plot_filters(both, ["before"] * 8 + [""] * 8 + ["after"] * 8,
                             "SimpleCNN's kernels, before and after training"),
                "7_1_filters_simple_cnn")
    weights_of = "ImageNet" if backbone.fc.out_features == 1000 else "the bundled"
    kernels = backbone.conv1.weight.detach()                     # [64, 3, 7, 7]
    strongest = kernels.flatten(1).norm(dim=1).argsort(descending=True)[:16]
    show_figure(plot_filters(kernels[strongest], title="The 16 strongest kernels of ResNet-18 "
                             f"with {weights_of} weights"), "7_1_filters_resnet18")
# %% [markdown]
"""
Before training the kernels are noise. Afterwards some have larger weights. A few have a red and a blue side: these
respond to edges. After so short a training much of the noise is still there. ResNet-18's kernels are drawn in colours,
with grey for zero. These are the 16 with the largest weights. In the bundled ones you can make out spots, stripes and
edges. (ImageNet's show them clearly.)

### 7.2 Feature maps
Where in an image does a channel find its pattern? That is what its feature map shows. With `recording` (3.3) we get the
maps of any layer; `feature_maps` does so by name. In SmallVGG, `features.6`, `features.13` and `features.20` are the
last activations of the three stages. Below are eight channels of each: yellow is high, dark is low.
"""
# %%
def feature_maps(model: nn.Module, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return what the layers of these dotted names give for `float32 [N, C, H, W]`, by name."""
    modules = [model.get_submodule(name) for name in layers]     # names a missing one
    with recording(modules) as outputs, evaluating(model), torch.no_grad():
        model(images)
    return {name: outputs[module] for name, module in zip(layers, modules)}
# %%
if __name__ == "__main__":
    image = standardize(colour.test_images[:1]).to(device)       # [1, 3, 32, 32]
    maps = feature_maps(small_vgg, image, ["features.6", "features.13", "features.20"])
    pictures, titles = [], []
    for stage, of_stage in enumerate(maps.values(), 1):
        print(f"stage {stage}: {list(of_stage.shape)}")
        pictures.append(colour.test_images[0])
        for channel in of_stage[0, :8]:                          # each on a scale of its own
            pictures.append((channel - channel.min()) / (channel.max() - channel.min()))
        titles += [colour.classes[colour.test_labels[0]], f"stage {stage}"] + [""] * 7
    show_figure(plot_images(pictures, titles, columns=9, cmap="viridis",
                            title="SmallVGG: eight channels of each stage"), "7_2_feature_maps")
# %% [markdown]
"""
In stage 1 some maps keep the outline of the object. In stage 3 a map has only 4×4 pixels. It says only roughly where
its pattern is. (How strongly each channel responds cannot be seen here: each has a scale of its own.)

### 7.3 Where did it look?
Which pixels speak for a class, say "ship"? There are many methods. Three of them are widely used. (In the code, skip
what says `inference_mode`: it lets the maps work where a caller has switched gradients off.)

- A *saliency map* (Simonyan et al. 2013) is the gradient of the class's logit with respect to each pixel. It is sharp,
  but noisy.
- *CAM*, the class activation map (Zhou et al. 2016), is for networks that end in global average pooling and one linear
  layer. There the logit is a weighted sum of the averages of the last maps. The maps themselves, summed with the same
  weights, show how much each place adds to the logit.
- *Grad-CAM* (Selvaraju et al. 2017) imitates this for any convolutional network. The weight of a map is the gradient of
  the logit with respect to it, averaged over all places.
"""
# %%
def class_scores(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the logit of each image's label `int64 [N]`, by default of its predicted class."""
    if labels is None:
        labels = logits.argmax(dim=1)
    return logits[torch.arange(len(logits)), labels.clone()]     # for inference_mode


def as_heat(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Apply ReLU to `[N, h, w]`, enlarge to `size`, divide each by its maximum if that is not 0."""
    maps = F.interpolate(maps.relu()[:, None], tuple(size), mode="bilinear", align_corners=False)
    highest = maps.amax(dim=(2, 3), keepdim=True)
    return (maps / torch.where(highest > 0, highest, 1))[:, 0]


def saliency_map(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return `[N, H, W]`: the largest absolute gradient over channels (Simonyan et al. 2013).

    The images are what the model takes, `[N, C, H, W]` on its device.
    """
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        images = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(class_scores(model(images), labels).sum(), images)
    return gradient.abs().amax(dim=1)


def grad_cam(model: nn.Module, images: Tensor, labels: Tensor | None = None,
             layer: nn.Module | str | None = None) -> Tensor:
    """Return Grad-CAM `[N, H, W]`, each map from 0 to 1, its maximum (Selvaraju et al. 2017).

    The images are what the model takes, `[N, C, H, W]` on its device. `layer` is a module of the
    model with outputs `[N, channels, h, w]`, or its dotted name; by default the last one whose
    output is larger than 1×1. Where there is none: a `ValueError`.
    """
    if isinstance(layer, str):
        layer = model.get_submodule(layer)                       # says if it is missing
    watched = model.modules() if layer is None else [layer]
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        with recording(watched) as outputs:
            logits = model(images.detach().clone().requires_grad_())
        maps = [x for x in outputs.values()
                if x.ndim == 4 and (layer is not None or max(x.shape[2:]) > 1)]
        if not maps:
            raise ValueError("grad_cam: expected a layer with outputs [N, channels, h, w]")
        (gradient,) = torch.autograd.grad(class_scores(logits, labels).sum(), maps[-1])
    weights = gradient.mean(dim=(2, 3), keepdim=True)            # [N, channels, 1, 1]
    return as_heat((weights * maps[-1]).sum(dim=1).detach(), images.shape[2:])


def class_activation_map(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return CAM `[N, H, W]` (Zhou et al. 2016), with ReLU and scaled as Grad-CAM is.

    The model must end in global average pooling and one linear layer.
    """
    with recording(model.modules()) as outputs, evaluating(model), torch.no_grad():
        logits = model(images)
    linear = [module for module in outputs if isinstance(module, nn.Linear)]
    large = [x for x in outputs.values() if x.ndim == 4 and max(x.shape[2:]) > 1]
    if linear and large:
        layer, maps = linear[-1], large[-1]
        means = maps.mean(dim=(2, 3))                            # [N, channels]
        if means.shape[1] == layer.in_features and torch.allclose(layer(means), logits, 1e-3, 1e-3):
            labels = logits.argmax(dim=1) if labels is None else labels
            maps = torch.einsum("nchw,nc->nhw", maps, layer.weight[labels]).detach()
            return as_heat(maps, images.shape[2:])
    raise ValueError("class_activation_map: expected a model that ends in global average pooling "
                     "and one linear layer; grad_cam takes any other")


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Lay heat `[H, W]` from 0 to 1 in red over a grey `uint8 [C, H, W]`: `float32 [3, H, W]`."""
    grey = image.float().mean(dim=0, keepdim=True) / 255         # [1, H, W]
    red = torch.tensor([1.0, 0.1, 0.0])[:, None, None]
    heat = 0.75 * heat.cpu().float()
    return grey * (1 - heat) + red * heat
# %% [markdown]
"""
Where both exist, CAM and Grad-CAM should agree. There a logit is a weighted sum of means. So its gradient with respect
to one pixel of a map is the weight of that map, divided by the number of pixels. This factor cancels, because we divide
each result by its maximum. (In our versions, a ReLU drops what speaks against the class.) We test this on colour
digits. There the place of the digit is known, which 7.4 needs. Each digit is moved by up to five pixels, so that fewer
lie in the middle. If SmallVGG was trained on photos, we first train another one on colour digits.
"""
# %%
if __name__ == "__main__":
    from dataclasses import replace

    finder = small_vgg
    if not colour.stand_in:
        settings = RECIPES["SmallVGG on colour digits"] | {"on_epoch": None}
        finder, _, _ = run(SmallVGG, colour_digits(digits), options.seed, device, **settings)
    with seeded(options.seed):
        off_centre = replace(digits, test_images=random_shift(digits.test_images, pixels=5))
    located = colour_digits(off_centre).first(1, MAPS)           # only its test images are used
    images, labels = standardize(located.test_images).to(device), located.test_labels.to(device)
    masks = located.test_masks.to(device)                        # [N, 32, 32]: where the ink is

    by_gradients = grad_cam(finder, images, labels)              # [N, 32, 32]
    by_weights = class_activation_map(finder, images, labels)
    print(f"largest difference of CAM and Grad-CAM: {(by_gradients - by_weights).abs().max():.0e}")
    assert torch.allclose(by_gradients, by_weights, atol=1e-3)
# %% [markdown]
"""
CAM and Grad-CAM agree at the last maps. Grad-CAM can use others, too. Which should it look at? Here are three images,
each with its map at every stage and after the last max-pooling.
"""
# %%
if __name__ == "__main__":
    pictures, titles = [], []
    for index in (3, 5, 8):
        pictures.append(located.test_images[index])
        titles.append("image")
        for layer, title in (("features.6", "stage 1, 16×16"), ("features.13", "stage 2, 8×8"),
                             ("features.20", "stage 3, 4×4"), ("features.21", "max-pooled, 4×4")):
            heat = grad_cam(finder, images[index:index + 1], labels[index:index + 1], layer)
            pictures.append(overlay(located.test_images[index], heat[0]))
            titles.append(title)
    show_figure(plot_images(pictures, titles, columns=5,
                            title="Grad-CAM of three digits at each depth"), "7_3_layers")
# %% [markdown]
"""
Early maps are detailed, but may miss the digit, as stage 2 does for the 8. Late maps are coarse: with 4×4 cells they
mark a region about the digit at best. SmallVGG's last max-pooling spreads each cell over its neighbours, and so blurs
the place. The default of `grad_cam` is the last map larger than 1×1, here that of the max-pooling. If it is as vague
as here, name the layer before it.

### 7.4 Tested on a known answer
A map can convince the eye and still be wrong. Some methods draw much the same for a network with random weights
(Adebayo et al. 2018). Since we know where the ink of each digit is, we can test them. How often does the maximum of a
map, its *peak*, lie on the ink? (Zhang et al. 2016 call this the *pointing game*, and allow the peak to miss by some
pixels.) Three numbers help to judge that:

- *chance*: the share of pixels that are ink. A blind guess would be right that often.
- *another image*: how often the peak lies on the ink of another image (the mean of nine others). Digits lie near the
  middle, and so do many peaks. Only the *lead*, the share on its own ink minus this one, tells something about the
  image.
- *random weights*: the lead that untrained networks get. One network could mislead, so we take five, each for a fifth
  of the images. A lead no larger than theirs need not come from learning.
"""
# %%
def share_of_peaks_on(masks: Tensor, maps: Tensor) -> float:
    """Return how often the maximum of a map `[N, H, W]` lies inside its mask `bool [N, H, W]`."""
    peaks = maps.flatten(1).argmax(dim=1, keepdim=True)          # [N, 1]
    return masks.flatten(1).gather(1, peaks).float().mean().item()


def share_of_peaks_on_others(masks: Tensor, maps: Tensor) -> float:
    """Return how often the maximum lies inside the mask of another image, the mean of nine."""
    shares = [share_of_peaks_on(masks.roll(k, dims=0), maps) for k in range(1, 10)]
    return sum(shares) / len(shares)
# %%
if __name__ == "__main__":
    with seeded(options.seed):
        random_networks = [SmallVGG().to(device) for _ in range(5)]
    methods = {"saliency": saliency_map, "Grad-CAM 4×4": partial(grad_cam, layer="features.20"),
               "Grad-CAM 16×16": partial(grad_cam, layer="features.6")}
    heat_maps = {}
    print(f"peaks on the ink (chance: {masks.float().mean():.0%})\n"
          "                 its own ink   another's    lead   lead with random weights")
    for name, method in methods.items():
        heat_maps[name] = method(finder, images, labels)
        parts = []                                               # a fifth of the images for each
        for network, fifth, its_labels in zip(random_networks, images.chunk(5), labels.chunk(5)):
            parts.append(method(network, fifth, its_labels))
        of_random = torch.cat(parts)
        own = share_of_peaks_on(masks, heat_maps[name])
        another = share_of_peaks_on_others(masks, heat_maps[name])
        random_lead = (share_of_peaks_on(masks, of_random)
                       - share_of_peaks_on_others(masks, of_random))
        print(f"{name:14} {own:11.1%} {another:11.1%} {own - another:9.1%} {random_lead:15.1%}")
        results.add("7.4", name, located, "lead", own - another, quiet=True)
        results.add("7.4", f"{name}, random weights", located, "lead", random_lead, quiet=True)
# %%
if __name__ == "__main__":
    pictures = list(located.test_images[:6])
    titles = ["image"] * 6
    for name, maps in heat_maps.items():
        for image, heat in zip(located.test_images[:6], as_heat(maps[:6], (32, 32))):
            pictures.append(overlay(image, heat))
            titles.append(name)
    figure = plot_images(pictures, titles, columns=6, title="Which peaks (+) lie on the digit?")
    shown = torch.cat([maps[:6] for maps in heat_maps.values()])  # [18, 32, 32]
    peaks = shown.flatten(1).argmax(dim=1).tolist()
    for ax, peak in zip(figure.axes[6:], peaks):                 # after the six images
        ax.plot(peak % 32, peak // 32, "+", color="cyan", markersize=9, markeredgewidth=2)
    show_figure(figure, "7_4_maps")
# %% [markdown]
"""
The lead is what a map knows about its image. A lead that is gone with random weights was learnt. With 200 maps, a lead
has a standard error of about four points.

- Grad-CAM at 4×4 passes both tests: it has a lead, and none with random weights.
- Saliency and Grad-CAM at 16×16 have a lead without training, too. In the notebook's run, that of saliency was even
  larger than its lead with training. (In six draws of five untrained networks, saliency led by 11 to 42 points,
  Grad-CAM at 16×16 by 4 to 18. At 4×4 the lead was −2 to 1.)

In the paper of Adebayo et al., which compares whole maps and not peaks, saliency and Grad-CAM passed. All this tests
whether a map finds the *place*. It does not judge the reasons of the network. What tells a 3 from an 8 is a gap beside
the ink, and a peak there counts as a miss.

**To remember**
- Hooks show what any layer computes; the deeper, the less *where* and the more *what*.
- Where only average pooling and one linear layer follow a map, Grad-CAM is CAM.
- Do not trust a map because it looks right. Test it against known places and random weights.

**Exercises 7.** a) An *occlusion map* (Zeiler & Fergus 2014) needs no gradients: cover each square of 8×8 pixels with
grey, and note how far the probability of the class falls. Write it. b) Compute a logit of SmallVGG from the maps of
`features.21`, without calling its classifier.

<details><summary>Answers</summary>

a) Grey is 0, the mean of standardised images. Here it is tested on a "network" that looks at one corner only.
```python
def occlusion_map(model, image, label, patch=8):                 # [1, C, H, W] to [H / 8, W / 8]
    falls = torch.zeros(image.shape[2] // patch, image.shape[3] // patch)
    before = model(image).softmax(dim=1)[0, label]
    for row in range(falls.shape[0]):
        for column in range(falls.shape[1]):
            covered = image.clone()
            covered[:, :, patch * row:patch * (row + 1), patch * column:patch * (column + 1)] = 0
            falls[row, column] = before - model(covered).softmax(dim=1)[0, label]
    return falls

corner = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 2)).requires_grad_(False)
corner[1].weight.zero_()[1, 0] = 3                               # class 1: the first pixel
falls = occlusion_map(corner, torch.ones(1, 1, 32, 32), label=1)
assert falls.argmax() == 0 and falls[0, 0] > 0 and falls.count_nonzero() == 1
```
b) Average each map, multiply by the weights of the class, add up, and add the bias.
```python
model, image = SmallVGG().eval(), torch.rand(1, 3, 32, 32)
maps = feature_maps(model, image, ["features.21"])["features.21"]
head = model.classifier[-1]
by_hand = maps.mean(dim=(2, 3)) @ head.weight[4] + head.bias[4]
assert torch.allclose(by_hand, model(image)[:, 4], atol=1e-5)
```
</details>

## 8 Practical tips
### 8.1 Five tips, measured
Tips are easy to give. Let us measure five: augmentation, two choices of the learning rate, batch normalisation, and
early stopping. We train with each tip and without it, with the same seeds. So both networks start from the same weights
and get the same batches. In such a *paired* comparison, a lucky or unlucky seed affects both, and cancels in the
difference. What counts is the mean difference over the seeds, compared with how much it scatters.

The last tip, *early stopping*, stops when the validation loss no longer falls, and goes back to the best epoch.
`train_model` does not do this by itself, but an object for `on_epoch` can.
"""
# %%
class EarlyStopping:
    """For `on_epoch`: keep the weights of the lowest validation loss; stop if it falls no more.

    It stops after `patience` epochs without a lower loss. Call `restore` when training is over.
    """

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.model, self.patience = model, patience
        self.lowest, self.best_epoch, self.weights = math.inf, 0, {}

    def __call__(self, row: dict[str, float]) -> bool:
        """Take a row of the history; return whether to stop."""
        if math.isnan(row["val_loss"]):
            raise ValueError("EarlyStopping: expected validation images, as with validation=0.1")
        if row["val_loss"] < self.lowest:
            self.lowest, self.best_epoch = row["val_loss"], row["epoch"]
            self.weights = copy.deepcopy(self.model.state_dict())
        return row["epoch"] - self.best_epoch >= self.patience

    def restore(self) -> None:
        """Put the best weights back."""
        self.model.load_state_dict(self.weights)
# %%
if __name__ == "__main__":
    def train_small(seed: int, count: int = 500, batch_norm: bool = False, patience: int = 0,
                    **settings) -> tuple[float, list[dict[str, float]]]:
        """Train the small network of 2.4 on a few digits; return test accuracy and history."""
        with seeded(seed):
            model = small_network(batch_norm=batch_norm).to(device)
        stopping = EarlyStopping(model, patience) if patience else None
        settings = {"epochs": SHORT, "batch_size": 32, "validation": 0.2} | settings
        history = train_model(model, digits.train_images[:count], digits.train_labels[:count],
                              seed=seed, on_epoch=stopping, **settings)
        if stopping is not None:
            stopping.restore()
        return evaluate(model, digits.test_images, digits.test_labels)[1], history

    few_images = {"count": 200, "epochs": 4 * SHORT, "learning_rate": 5e-3, "one_cycle": False}
    tips = {  # name: (settings without the tip, settings that the tip changes)
        "augment 500 images": ({"epochs": 2 * SHORT}, {"augment": random_affine}),
        "rate 0.003, not 0.0003": ({"learning_rate": 3e-4}, {"learning_rate": 3e-3}),
        "rate 0.003, not 0.03": ({"learning_rate": 3e-2}, {"learning_rate": 3e-3}),
        "BatchNorm at rate 0.1": ({"learning_rate": 0.1}, {"batch_norm": True}),
        "early stopping, 200 images": (few_images, {"patience": SHORT})}
    gains = {}
    for name, (without, tip) in tips.items():
        gains[name] = []
        for seed in range(options.seed, options.seed + SEEDS):
            before, _ = train_small(seed, **without)
            after, _ = train_small(seed, **(without | tip))
            gains[name].append(100 * (after - before))
        results.add_seeds("8.1", name, digits, "points gained", gains[name])
# %% [markdown]
"""
When is such a gain more than chance? Even if a tip has no effect, the gains of three seeds are not zero. By chance
alone, their mean exceeds 2.5 times their spread only once in twenty comparisons (Student's t). So we call a gain below
that "could be chance". The picture shows all gains, and one history of the 200 images.
"""
# %%
if __name__ == "__main__":
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3), width_ratios=[1.3, 1])
    for row, values in enumerate(gains.values()):
        spread = np.std(values, ddof=1) if len(values) > 1 else 0
        beyond_chance = spread > 0 and abs(np.mean(values)) > 2.5 * spread
        left.errorbar(np.mean(values), row, xerr=spread, fmt="o", capsize=3,
                      color="C0" if beyond_chance else "silver")
        left.text(np.mean(values), row - 0.2, f"{np.mean(values):+.1f}", ha="center")
    left.axvline(0, color="black", linewidth=0.6)
    left.set(yticks=range(len(gains)), yticklabels=gains, title="What a tip gains", xlim=(-15, 95),
             ylim=(len(gains) - 0.5, -0.7),
             xlabel="points of accuracy (grey: could be chance)")

    _, history = train_small(options.seed, **few_images)
    epochs = [row["epoch"] for row in history]
    right.plot(epochs, [row["train_loss"] for row in history], label="160 training images")
    right.plot(epochs, [row["val_loss"] for row in history], label="40 validation images")
    right.set(xlabel="epoch", ylabel="loss", title="Few images: memorised")
    right.legend()
    show_figure(figure, "8_1_tips")
# %% [markdown]
"""
What do we learn? Augmentation helps when images are few. A learning rate that is too low costs much in so short a
training. For the rate that is too high, the difference could be chance. With batch normalisation a network can learn at
a rate that is far too high without it: it gains 77 points. Early stopping gains nothing here. In the picture the
validation loss is lowest quite early. Later it is higher, because the network memorises its 160 images. But the
accuracy (not drawn) need not fall. Besides, 40 validation images are few to choose an epoch by. (With `--quick` there
is one seed, so everything is grey.)

### 8.2 Initialisation, schedules, and the other knobs
*Initialisation.* With which random weights does training begin? If they are too small, the signal dies out layer by
layer; if they are too large, it explodes. Kaiming He and others (2015, not the ResNet paper) computed the right spread
for layers with ReLU: √(2 / inputs). "Inputs" are the numbers that feed one output; in the experiment below they are
3·3·64 = 576. This *Kaiming initialisation* keeps the size of the activations about constant. *Xavier initialisation*
was made for tanh. In the experiment, its weights are √2 times smaller than Kaiming's. PyTorch's default for
convolutions and linear layers is smaller still, √6 times less than Kaiming's. It is good enough for our networks,
which are shallow or have batch normalisation. Let us send random numbers through ten layers. (Circular padding puts no
zeros around an image, but pixels from its opposite side.)
"""
# %%
if __name__ == "__main__":
    initialisations = {
        "normal, deviation 0.01": partial(nn.init.normal_, std=0.01),
        "Xavier (Glorot & Bengio 2010)": nn.init.xavier_normal_,
        "Kaiming (He et al. 2015)": partial(nn.init.kaiming_normal_, nonlinearity="relu")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.9))
    for name, initialise in initialisations.items():
        with seeded(options.seed):
            x = torch.randn(8, 64, 16, 16)
            spreads = [x.std().item()]
            for _ in range(10):
                conv = nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular", bias=False)
                initialise(conv.weight)
                x = conv(x).detach().relu()                      # [8, 64, 16, 16]
                spreads.append(x.std().item())
        left.plot(spreads, "o-", label=name)
        results.add("8.2", name, "random numbers", "spread after 10 layers", spreads[-1])
    left.set(yscale="log", xlabel="layers passed", ylabel="spread of the activations",
             title="Kaiming keeps the spread")
    left.legend()

    for name, make in (("one cycle", partial(OneCycleLR, max_lr=1.0, total_steps=100)),
                       ("cosine", partial(CosineAnnealingLR, T_max=100))):
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, rates = make(optimizer), []
        for _ in range(100):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        right.plot(rates, label=name)
    right.set(xlabel="share of the steps in %", ylabel="learning rate / highest",
              title="Two schedules")
    right.legend()
    show_figure(figure, "8_2_initialisation_and_schedules")
# %% [markdown]
"""
Only Kaiming's line stays nearly level. With deviation 0.01 hardly anything is left after ten layers, and so hardly any
gradient comes back. Two things make the choice less important: batch normalisation sets the spread anew after each
layer, and shortcuts pass the signal on unchanged. On the right you see the two schedules used in this tutorial. One
cycle warms up, cosine starts at the highest rate; both end near zero.

*Memory.* The backward pass needs the outputs of most layers, so they are kept until then. How much is that? PyTorch
lets us look at everything that is kept, on any device. (You can skip the code.)
"""
# %%
def activation_bytes(model: nn.Module, images: Tensor) -> int:
    """Return how many bytes a training step on `[N, C, H, W]` keeps for the backward pass."""
    model = copy.deepcopy(model).train()                         # leave the original as it is
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept = {}                                                    # address: memory (kept alive)

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(memory.nbytes() for address, memory in kept.items() if address not in own)
# %%
if __name__ == "__main__":
    for count in (1, 16, 64):
        megabytes = activation_bytes(SmallVGG(), torch.zeros(count, 3, 32, 32)) / 1e6
        print(f"SmallVGG, batch of {count:2}: {megabytes:6.1f} MB kept for the backward pass")
# %% [markdown]
"""
Memory grows with the batch, image for image. If a GPU runs out of memory, make the batch smaller.

| knob | what for | start with |
|---|---|---|
| learning rate | the most important one; find it by a range test (4.4) | AdamW: 0.001 to 0.01 |
| schedule | large steps, then small ones to settle | one cycle, or cosine |
| weight decay | keeps weights small; matters in long trainings | 0.01 to 0.05 with AdamW |
| dropout | many parameters and few images; before the last layer | 0.1 to 0.5; less beside batch normalisation |
| label smoothing | keeps logits from growing without end | 0.05 to 0.1 |
| batch size | fills the processor; memory grows with it | 32 to 256; raise the learning rate along with it |
| channels, layers | more for harder tasks; double the channels when the size halves | 16 to 32 in the first layer |

### 8.3 Using what was trained; saving and resuming; several processors
*Use it.* A trained network is its code and its numbers. `state_dict()` gives all its weights, and the running
statistics of batch normalisation, by name. Save them, make a fresh network later, and load them into it. With
`weights_only=True`, which is the default today, `torch.load` reads tensors and runs no code that is stored in the file.
(Still, prefer files from people you trust.) `save_whole` (6.6) writes a second file and renames that at the end, so a
crash never leaves half a file.
"""
# %%
if __name__ == "__main__":
    weights_file = options.output_dir / "simple_cnn.pt"
    save_whole(simple_cnn.state_dict(), weights_file)

    restored = SimpleCNN()                                       # as another program would later
    restored.load_state_dict(torch.load(weights_file, weights_only=True))
    restored.eval()                                              # no dropout from here on, if any
    one_digit = standardize(mnist.test_images[:1])               # [1, 1, 28, 28]
    with torch.no_grad():
        probabilities = restored(one_digit).softmax(dim=1)[0]    # [10]
    print(f"the digit is a {probabilities.argmax()}, with probability {probabilities.max():.1%}; "
          f"in truth a {mnist.test_labels[0]}")
# %% [markdown]
"""
To use a network without its Python class, *export* it. `torch.export` follows one forward pass and writes down the
operations. We tell it that the first dimension, the batch, may have any size. (`torch.export.load` still needs PyTorch.
Other tools start from such a file: AOTInductor for C++, ExecuTorch for phones.)
"""
# %%
if __name__ == "__main__":
    example = torch.zeros(2, 1, 28, 28)
    any_batch = ({0: torch.export.Dim("batch")},)                # the first dimension is free
    exported = torch.export.export(restored, (example,), dynamic_shapes=any_batch)
    export_file = options.output_dir / "simple_cnn.pt2"
    torch.export.save(exported, export_file)
    loaded = torch.export.load(export_file).module()             # knows nothing of SimpleCNN

    images = standardize(mnist.test_images[:100])
    with torch.no_grad():
        assert torch.allclose(loaded(images), restored(images), atol=1e-4)
# %% [markdown]
"""
*Resume it.* A long training can be interrupted: by you, by a power cut, by a limit of time on a cluster. A *checkpoint*
holds all that is needed to go on: the weights, the state of the optimiser (Adam remembers past gradients) and of the
schedule, and the history. Random numbers need not be saved, because in `train_model` they follow from the seed and the
epoch (4.3). A checkpoint also holds the *recipe*, that is, all settings. If yours differs, an error names the setting.
"""
# %%
def save_checkpoint(path: str | Path, recipe: dict, history: list[dict], **parts) -> None:
    """Save a recipe, a history, and the `state_dict` of each part: model, optimiser, schedule."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save_whole({"recipe": recipe, "history": history, **states}, path)


def load_checkpoint(path: str | Path, recipe: dict, **parts) -> list[dict]:
    """Restore the parts from the file, if there is one, and return its history; else return []."""
    path, advice = Path(path), "delete it, or give another path"
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OSError(f"checkpoint: expected a file in a folder that exists, got '{path}'")
    if not path.exists():
        return []
    try:
        whole = zipfile.ZipFile(path).testzip() is None          # a zip file, with checksums
        saved = torch.load(path, map_location="cpu", weights_only=True) if whole else {}
        theirs = dict(saved["recipe"])
    except Exception as error:                                   # readers of files raise anything
        raise ValueError(f"checkpoint: {path} is damaged, or is none; {advice}") from error
    for key, value in (recipe | theirs).items():
        if theirs.get(key) != recipe.get(key):
            raise ValueError(f"checkpoint: {path} has another {key}: {str(value)[:60]!r}; {advice}")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["history"]
# %%
if __name__ == "__main__":
    def stop_after_two(row: dict[str, float]) -> bool:
        """Return True, which means stop, after epoch 2."""
        return row["epoch"] == 2

    file = options.output_dir / "lenet.checkpoint"
    file.unlink(missing_ok=True)
    images, labels = digits.train_images[:500], digits.train_labels[:500]
    settings = {"epochs": 3, "augment": random_affine, "seed": options.seed}
    undisturbed = LeNet5()
    stopped = copy.deepcopy(undisturbed)                         # begins with the same weights
    resumed = LeNet5()                                           # as another program would have
    train_model(undisturbed, images, labels, **settings, on_epoch=None)
    train_model(stopped, images, labels, **settings, checkpoint=file, on_epoch=stop_after_two)
    train_model(resumed, images, labels, **settings, checkpoint=file)  # goes on with epoch 3
    file.unlink()
    for ours, theirs in zip(resumed.parameters(), undisturbed.parameters()):
        assert torch.equal(ours, theirs)
    print("the resumed training ends with the same bits as the undisturbed one")
# %% [markdown]
"""
The resumed training prints epoch 3 only, and ends with the same weights, to the last bit. (On a GPU, some operations
add up in varying order, so the last bits may differ.)

*Use several processors.* In *data-parallel* training each process has a copy of the network and works on its share of
every batch. PyTorch's `DistributedDataParallel` makes the copies equal at the start. Before each step it averages the
gradients over all processes, so the copies stay equal. The loss is a mean. So for equal shares, the mean of their
gradients is the gradient of the whole batch. Batch normalisation is an exception: each process uses the statistics of
its own share. (`nn.SyncBatchNorm` shares them.)

Now look at `train_model` in 4.3 again. Each process has a number, its *rank*, and `world` is how many there are. All
draw the same order of the images. Process `rank` takes every `world`-th of them, beginning with number `rank`. A
remainder is left out. Augmentation and dropout differ from process to process. Only process 0 shows a bar and writes
checkpoints. They hold the network without its `DistributedDataParallel` around it, so one process can resume them, too.

PyTorch's starter `torchrun` starts the processes, and `train_distributed` connects them: GPUs by the library *nccl*,
CPUs by *gloo*. A notebook cannot do this. So write a file such as this one, and run it with `torchrun
--nproc-per-node=2 my_file.py`:

    from convolutional_neural_networks import SimpleCNN, train_distributed
    from data import load_mnist

    if __name__ == "__main__":
        mnist = load_mnist()
        train_distributed(SimpleCNN(), mnist.train_images, mnist.train_labels, epochs=3)
"""
# %%
def train_distributed(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int,
                      **settings) -> list[dict[str, float]]:
    """Call `train_model` in every process of `torchrun`; the batch is shared among them.

    Process 0 prints the history; an `on_epoch` of yours is called in all of them. Batch
    normalisation uses the statistics of each process's share. To train twice in one program, call
    `dist.init_process_group` yourself before. Without torchrun: a `RuntimeError`.
    """
    if not dist.is_torchelastic_launched():
        raise RuntimeError("train_distributed: start your file by torchrun --nproc-per-node=2 FILE")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if dist.get_node_local_rank() >= torch.cuda.device_count():
            raise RuntimeError("train_distributed: there are more processes than GPUs; start one "
                               "for each GPU, or hide them all by CUDA_VISIBLE_DEVICES=\"\"")
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    alone = not dist.is_initialized()                            # not joined by the caller
    if alone:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if dist.get_rank() > 0:
            settings.setdefault("on_epoch", None)
        last = settings.get("channels_last", True)
        model.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)
        model = DistributedDataParallel(model)
        return train_model(model, images, labels, epochs=epochs, **settings)
    finally:
        if alone:
            dist.destroy_process_group()
# %% [markdown]
"""
On a machine with GPUs, start one process for each of them. On several machines, start the same command on each. The
processes have to find each other, which PyTorch calls the *rendezvous*: one machine is named as the meeting point.

    torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=first-machine:29400 my_file.py

Do more machines pay? That can be estimated on paper. In every step each of two processes sends about as many bytes as
the network's gradients have (four for each parameter), and waits for those of the other. (Some bytes are sent while
`backward` still runs, so this is the worst case.) Two machines save at most half of the computing time. Does sending
take less than that?

| one step | gradients | sent at 1 gigabit a second | computing on one machine, two cores |
|---|---|---|---|
| SimpleCNN, 64 digits | 0.12 MB | 0.001 s | 0.004 s |
| SmallVGG, 128 colour images | 1.2 MB | 0.009 s | 0.032 s |
| ResNet-18, 32 photos of 224×224 | 47 MB | 0.37 s | 0.52 s |

*The computing was measured with bfloat16 on an Intel Xeon with AMX, torch 2.14.1, 2026-11-26 (`python
tests/benchmark.py speed --only roofline`). The bytes and their times are arithmetic.*

For the two small networks, sending takes less time than the largest possible saving. For ResNet-18, a second machine
could save at most 0.26 s of a step, but sending would take 0.37 s. So over this connection it hardly pays, unless the
batch is larger: then there is more to compute, and no more to send. GPUs compute much faster, so they need much faster
connections.

### 8.4 Where to start, and where to go next
| you have | start with |
|---|---|
| photos, fewer than about 1,000 labels | ImageNet weights and feature extraction (6.3), then fine-tuning (6.4) |
| other images (spectra, X-rays), few labels | features of an earlier layer; augmentation that fits |
| 1,000 to 100,000 labels | fine-tuning; or, if images are small, a small network from scratch |
| no GPU | frozen layers that are run once; small images; bfloat16 where it is fast (4.3) |

These are rules of thumb. In any case: look at your data, make the checks of 3.4, keep validation images apart, and
report standard errors.

Topics that come next, with a name to search for each:
- loading data at scale: `torch.utils.data`, torchcodec for video, WebDataset for many files;
- sequences: recurrent networks (LSTM; Hochreiter & Schmidhuber 1997) and transformers (Vaswani et al. 2017);
- an answer for every pixel, *segmentation*: U-Net (Ronneberger et al. 2015), `torchvision.models.segmentation`;
- boxes around objects, *detection*: Faster R-CNN (Ren et al. 2015), `torchvision.models.detection`;
- images without convolutions: vision transformers (Dosovitskiy et al. 2021), `models.vit_b_16`.

**To remember**
- Measure a tip before you believe it: paired, with several seeds, and with its spread.
- Save the `state_dict`; for long trainings use checkpoints that hold all that is needed to go on.
- Several processes train almost as one: the gradients of equal shares are averaged.

**Exercises 8.** a) How many megabytes more does SmallVGG keep for each further image? b) Show that the mean of the
gradients of two halves is the gradient of the whole batch.

<details><summary>Answers</summary>

a) About 0.7, the same for every image. Take two batches that differ by one image, and subtract.
```python
kept = [activation_bytes(SmallVGG(), torch.zeros(n, 3, 32, 32)) for n in (8, 9, 10)]
assert 0.65e6 < kept[1] - kept[0] == kept[2] - kept[1] < 0.75e6
```
b) Compute all three, and compare.
```python
model, images, labels = SimpleCNN(), standardize(digits.train_images[:64]), digits.train_labels[:64]
gradients = []
for part in (slice(0, 32), slice(32, 64), slice(0, 64)):
    loss = F.cross_entropy(model(images[part]), labels[part])
    gradients.append(torch.autograd.grad(loss, model.fc.weight)[0])
assert torch.allclose((gradients[0] + gradients[1]) / 2, gradients[2], atol=1e-6)
```
</details>
"""
# %% [markdown]
"""
## Glossary
| term | meaning | section |
|---|---|---|
| accuracy | share of images that are classified correctly | 0 |
| activation | a non-linear function between layers, such as ReLU; also the numbers that come out of it | 2.2 |
| Adam, AdamW | optimisers that divide each weight's step by the usual size of its gradient | 4.4 |
| augmentation | random changes of training images that keep the label | 4.1 |
| autocast, bfloat16 | computing in a format of 16 bits where that suffices | 4.3 |
| backbone, head | a pretrained network without its last layer; that layer, which is replaced | 6.1 |
| batch | the images that are processed in one step | 0 |
| batch normalisation | gives each channel a learnt mean and spread over the batch | 2.5 |
| bias | a number that a layer adds to a whole map or output | 2.1 |
| channel | one of the grids that an image or a layer's output consists of | 2.1 |
| checkpoint | a file with all that training needs to go on | 8.3 |
| convolution | slides kernels over a grid: multiply, and add up | 2.1 |
| cross-entropy | the loss of classifiers: −ln of the probability of the correct class | 4.2 |
| depthwise separable | filter each channel by itself, then mix channels | 5.7 |
| dilation | the distance between neighbouring cells of a kernel | 1.2 |
| dropout | sets some outputs to zero during training, chosen at random | 2.6 |
| early stopping | ending when the validation loss no longer falls, and going back to its best epoch | 8.1 |
| epoch | one pass through all training images | 0 |
| equivariance | if the input shifts, the output shifts along | 1.3 |
| evaluation mode | how layers work when a network is used and not trained; `model.eval()` | 2.5 |
| feature extraction | training a new head on a frozen backbone | 6.3 |
| feature map | what one kernel finds, place by place | 1.3 |
| fine-tuning | training some layers of a pretrained network, too | 6.4 |
| forward hook | a function that PyTorch calls after a layer's forward pass | 3.3 |
| fully connected (linear) layer | every output depends on every input | 1.1 |
| Grad-CAM, CAM | maps that are meant to show where a class is | 7.3 |
| gradient | how a result changes with each number that it depends on | 2.1, 4.4 |
| invariance | the output stays the same when the input shifts | 1.4 |
| kernel | a small square of weights: the pattern that is looked for | 1.1 |
| label smoothing | asks for a little less than certainty | 4.2 |
| learning rate | the size of the steps against the gradient | 4.4 |
| logits | raw scores, one for each class | 3.1 |
| loss | a number that says how wrong the answers are | 0, 4.2 |
| `meta` device | where tensors have shapes but no numbers | 1.1 |
| overfitting | learning what is accidental in the training images | 2.6 |
| padding | zeros that are put around an image | 1.3 |
| pooling | one number for each neighbourhood | 1.4 |
| receptive field | the part of the input that an output depends on | 1.2 |
| residual block, shortcut | computes x + f(x) | 5.5 |
| schedule | how the learning rate changes during training | 4.3 |
| softmax | turns logits into probabilities | 4.2 |
| standard error | how uncertain an accuracy is because test images are limited | 4.3 |
| `state_dict` | all numbers of a network, by name | 8.3 |
| stride | the step of a kernel from one place to the next | 1.2 |
| transfer learning | starting from a network that was trained on other images | 6.1 |
| unit | one number in a layer's output | 1.2 |
| validation images | put aside from training, to make choices with | 4.3 |
| weight decay | a steady pull of all weights towards zero | 4.4 |

## What this run measured
The file `results.json` in the output folder has these numbers and more, with the settings and versions of this run.
"""
# %%
if __name__ == "__main__":
    results.write(options, device)
