"""Small tools for any `nn.Module`: hooks and modes that are always put back, a table of layers, checks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this block the model is in evaluation mode; then each module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """Within this block `hook(module, inputs, output)` is called after each forward of the modules."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_table(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """Return a table of the layers, their output shapes and parameters, for a `[C, H, W]` image."""
    rows = []

    def note(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        weights = sum(p.numel() for p in layer.parameters())
        rows.append(f"{type(layer).__name__:18} {str(list(output.shape[1:])):>14} {weights:>10,}")

    layers = [module for module in model.modules() if not list(module.children())]
    with evaluating(model), hooked(layers, note), torch.no_grad():
        model(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    total = sum(p.numel() for p in model.parameters())
    return "\n".join([*rows, f"{'total':33} {total:>10,}"])


def check_labels(labels: Tensor, num_classes: int, count: int | None = None) -> None:
    """Raise a `ValueError` unless labels are `int64 [count]`, each in 0..num_classes - 1."""
    if labels.dtype != torch.int64 or labels.ndim != 1 or count not in (None, len(labels)):
        raise ValueError(f"labels: expected int64 [{'N' if count is None else count}], "
                         f"got {labels.dtype} {list(labels.shape)}")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels: expected 0..{num_classes - 1} (the model has {num_classes} "
                         f"outputs), got {low}..{high}")


def check_images(images: Tensor, model: nn.Module) -> None:
    """Raise a `ValueError` unless images are `float32 [N, C, H, W]` with the C that the model takes."""
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), "C")
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point() or (
            channels not in ("C", images.shape[1])):
        raise ValueError(f"images: expected standardised float32 [N, {channels}, H, W], N > 0, "
                         f"got {images.dtype} {list(images.shape)}")


def find_layer(model: nn.Module, layer: nn.Module | str) -> nn.Module:
    """Return the module of that dotted name, or the module itself if it is a part of the model.

    Raises:
        ValueError: it is not.
    """
    named = dict(model.named_modules())
    if isinstance(layer, str):
        if layer not in named:
            raise ValueError(f"layer: the model has no {layer!r}, but {list(named)[1:]}")
        return named[layer]
    if not any(layer is module for module in named.values()):
        raise ValueError(f"layer: this {type(layer).__name__} is not a part of the model")
    return layer


def activation_bytes(model: nn.Module, images: Tensor) -> int:
    """Return how many bytes a training step on `[N, C, H, W]` keeps for the backward pass."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(images)  # noqa: F841 (alive until all is counted)
    return sum(kept.values())


def share_and_hits(maps: Tensor, masks: Tensor) -> tuple[float, float]:
    """Return the mean share of the maps inside `bool [N, H, W]`, and how often their peak is."""
    total = maps.sum(dim=(1, 2)).clamp(min=1e-12)
    peaks = maps.flatten(1).argmax(dim=1, keepdim=True)
    return (((maps * masks).sum(dim=(1, 2)) / total).mean().item(),
            masks.flatten(1).gather(1, peaks).float().mean().item())
