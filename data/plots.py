"""Figures that the tutorial draws often. Each function returns a `Figure` and shows nothing."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor


def plot_images(images: dict[str, Tensor] | Sequence[Tensor], titles: Sequence[str] = (),
                columns: int = 8, size: float = 1.6, grid: bool = False, heading: str = "",
                bar: str = "", **imshow) -> Figure:
    """Draw images `[H, W]`, `[1, H, W]` or `[3, H, W]` in rows, `size` inches wide each.

    Args:
        images: `{title: image}`, or images alone.
        titles: of images that come alone, or of as many as there are.
        grid: draw white lines between the pixels.
        heading: stands above all.
        bar: the name of the scale that all images of one channel share, for a bar beside them.
    """
    if isinstance(images, dict):
        images, titles = list(images.values()), list(images)
    columns, rows = min(columns, len(images)), math.ceil(len(images) / columns)
    height = size * images[0].shape[-2] / images[0].shape[-1] + 0.25  # and room for a title
    wide = size * columns + (0.8 if bar else 0)                  # inches
    high = height * rows + (0.25 if heading else 0)
    top, right = 1 - (high - height * rows + 0.25) / high, 0.99 * size * columns / wide
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(wide, high), layout="none",
        gridspec_kw=dict(left=0.01, right=right, bottom=0.02, top=top, wspace=0.06,
                         hspace=0.27 / (height - 0.25)))
    if heading:
        figure.text(right / 2, 1 - 0.05 / high, heading, ha="center", va="top", fontsize=10)
    for ax in axes.flat:
        ax.axis("off")
    for index, image in enumerate(images):
        image = image.detach().cpu().squeeze().numpy()
        shown = axes.flat[index].imshow(image if image.ndim == 2 else image.transpose(1, 2, 0), **imshow)
        if index < len(titles):
            axes.flat[index].set_title(titles[index])
        if grid:
            axes.flat[index].hlines(np.arange(image.shape[-2] + 1) - 0.5, -0.5, image.shape[-1] - 0.5, "w")
            axes.flat[index].vlines(np.arange(image.shape[-1] + 1) - 0.5, -0.5, image.shape[-2] - 0.5, "w")
    if bar:
        length = min(height * rows - 0.4, 2)
        place = figure.add_axes((right + 0.1 / wide, top - length / high, 0.12 / wide, length / high))
        figure.colorbar(ScalarMappable(shown.norm, shown.cmap), place, label=bar)
    return figure


def plot_maps(images: Sequence[Tensor], titles: Sequence[str], columns: int, heading: str,
              size: float = 1.3) -> Figure:
    """Draw maps from 0 to 1 on one perceptually even scale, and photos among them as they are."""
    return plot_images(images, titles, columns, size, heading=heading, bar="share of highest",
                       cmap="viridis", vmin=0, vmax=1)


def plot_filters(kernels: dict[str, Tensor]) -> Figure:
    """Draw the kernels `[N, C, h, w]` of first layers; each name stands over the first of its kernels.

    Of one channel: all on one scale, red positive, blue negative. Of three: as colours, each kernel
    stretched to its own range, grey for zero.
    """
    titles = [name if index == 0 else "" for name, weight in kernels.items()
              for index in range(len(weight))]
    weights = torch.cat([weight.detach().cpu() for weight in kernels.values()])
    limit = weights.abs().max().item()
    colours = weights.shape[1] == 3
    if colours:
        weights = (1 + weights / weights.abs().amax(dim=(1, 2, 3), keepdim=True)) / 2
    return plot_images(list(weights), titles, columns=16, size=0.6, cmap="RdBu_r", vmin=-limit,
                       vmax=limit, bar="" if colours else "weight",
                       heading="stripes answer to edges, spots to dots")


def plot_feature_maps(rows: Sequence[tuple[Tensor, dict[str, Tensor]]], count: int = 7) -> Figure:
    """Draw images, and beside each the `count` channels of every layer that answer most strongly.

    Each row is an image `uint8 [1, C, H, W]` and what `feature_maps` gave for it; each map has a scale
    of its own.
    """
    pictures, titles = [], []
    for image, found in rows:
        for name, maps in found.items():
            strongest = maps[0].amax(dim=(1, 2)).topk(count).indices
            maps = F.interpolate(maps[:, strongest].cpu(), image.shape[2:])[0]
            pictures += [image[0].float() / 255, *(maps / maps.amax((1, 2), keepdim=True))]
            titles += ["image", *[name] * count]
    return plot_maps(pictures, titles, count + 1, size=1,
                     heading="the image's outlines first; deeper, coarse places of larger patterns")


def plot_channels(batches: dict[str, Tensor]) -> Figure:
    """Draw, for each named batch `[N, C, H, W]`, how the values of every channel are distributed."""
    figure, axes = plt.subplots(1, len(batches), figsize=(8, 2.3), sharex=True)
    for ax, (name, batch) in zip(axes, batches.items()):
        for channel in batch.detach().cpu().unbind(dim=1):
            ax.hist(channel.flatten().numpy(), bins=80, histtype="step", density=True)
        ax.set(title=name, xlabel="value", ylabel="density", yscale="log")
    return figure


def plot_curves(curves: dict[str, Sequence[float] | tuple[Sequence[float], ...]],
                ax: Axes | None = None, smooth: int = 1, marker: str = "", xlabel: str = "step",
                **settings) -> Figure:
    """Draw each named curve: its y values, or x and y values, or also half the length of each bar.

    Args:
        ax: where to draw; by default on a figure of its own.
        smooth: each point is the mean of so many (of a quarter of them, if they are few).
        settings: of the axes, as `Axes.set` takes them.
    """
    ax = plt.subplots(figsize=(6, 2.6))[1] if ax is None else ax
    for name, points in curves.items():
        x, y, *bars = points if isinstance(points, tuple) else (range(len(points)), points)
        width = max(1, min(smooth, len(y) // 4))
        ax.errorbar(x[width - 1:], np.convolve(y, np.ones(width) / width, mode="valid"),
                    *bars, capsize=3, marker=marker, label=name)
    ax.set(xlabel=xlabel, **settings)
    if any(curves):
        ax.legend()
    return ax.figure


def plot_effects(gains: dict[str, Sequence[float]], ax: Axes, beyond: float) -> Figure:
    """Draw the mean of each named list, with its standard deviation as a bar if it has one.

    Means within `beyond` standard deviations of zero are grey.
    """
    for row, values in enumerate(gains.values()):
        spread = np.std(values, ddof=1) if len(values) > 1 else 0
        shown = spread and abs(np.mean(values)) >= beyond * spread
        ax.errorbar(np.mean(values), row, xerr=spread, fmt="o", color="C0" if shown else "lightgrey")
    ax.axvline(0, color="black", lw=0.5)
    ax.set_xscale("symlog", linthresh=10, linscale=2)            # even from -10 to 10
    ax.set(yticks=range(len(gains)), yticklabels=gains, xlabel="effect in points (uneven scale; grey: not shown)",
           xticks=(-10, -5, 0, 5, 10, 100), xticklabels=("-10", "-5", "0", "5", "10", "100"))
    ax.invert_yaxis()
    return ax.figure


def plot_history(history: list[dict[str, float]], title: str = "") -> Figure:
    """Draw losses and validation accuracy against epochs, from what `train_model` returns."""
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4))
    for key, label in (("train_loss", "training"), ("val_loss", "validation")):
        left.plot(epochs, [row[key] for row in history], "o-", label=label)
    left.set(xlabel="epoch", ylabel="loss", title=title)
    left.legend()
    right.plot(epochs, [row["val_accuracy"] for row in history], "o-", color="C1")
    right.set(xlabel="epoch", ylabel="validation accuracy")
    for ax in (left, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_confusion(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Draw how often each true class (row) was taken for each class (column)."""
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    counts.index_put_((labels.cpu(), logits.argmax(dim=1).cpu()), torch.tensor(1), accumulate=True)
    figure, ax = plt.subplots(figsize=(5, 4.4))
    mistakes = counts - counts.diag().diag()
    image = ax.imshow(mistakes.numpy(), cmap="Oranges")
    figure.colorbar(image, label="mistakes", ticks=MaxNLocator(integer=True))
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column]:
            dark = mistakes[row, column] > 0.6 * mistakes.max()
            ax.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7,
                    color="white" if dark and mistakes.max() else "black")
    ax.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="predicted", ylabel="true", title="right answers are on the diagonal")
    return figure


def plot_mistakes(images: Tensor, logits: Tensor, labels: Tensor, classes: Sequence[str],
                  count: int = 8) -> Figure:
    """Draw the images whose true class got the least probability, with both classes."""
    labels, probabilities = labels.cpu(), logits.softmax(dim=1).cpu()
    worst = probabilities[torch.arange(len(labels)), labels].argsort()[:count]
    titles = [f"{classes[labels[i]]}, taken for {classes[probabilities[i].argmax()]} "
              f"({probabilities[i].max():.0%})" for i in worst]
    return plot_images(list(images[worst.to(images.device)]), titles, columns=4, size=1.8)


def plot_architectures(points: dict[str, tuple[float, float, int]]) -> Figure:
    """Draw each named network's (GFLOP, ImageNet accuracy in %, parameters)."""
    figure, ax = plt.subplots(figsize=(6, 3.2))
    for name, (operations, accuracy, parameters) in points.items():
        ax.scatter(operations, accuracy, s=parameters / 2e5, alpha=0.6)
        ax.annotate(f"{name}, {accuracy:.1f}%", (operations, accuracy), LABELS.get(name[:8], (10, -14)),
                    textcoords="offset points")
    ax.set(xscale="log", xlim=(1, 200), ylim=(52, 82), xlabel="GFLOP for one image of 224×224",
           ylabel="ImageNet accuracy in %", title="area of a dot: parameters")
    return figure


LABELS = {"GoogLeNe": (-60, 8), "ResNet50": (10, 5), "VGG16 (2": (14, -14)}  # where dots are close


def plot_strip(strip: Tensor, probabilities: Tensor, centres: range, title: str = "") -> Figure:
    """Draw an image `[H, W]`, and below it the probabilities `[classes, places]` at those columns."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.2), sharex=True, height_ratios=[1, 1.4])
    top.imshow(strip.numpy(), aspect="auto")
    top.set(yticks=[], title=title)
    left, right = centres[0] - centres.step / 2, centres[-1] + centres.step / 2
    bottom.imshow(probabilities.numpy(), cmap="viridis", aspect="auto", vmin=0, vmax=1,
                  extent=(left, right, len(probabilities) - 0.5, -0.5))
    bottom.set(xlabel="middle of the pixels that are read", ylabel="class",
               yticks=range(len(probabilities)), xlim=(-0.5, strip.shape[1] - 0.5))
    return figure
