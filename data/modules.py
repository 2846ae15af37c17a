"""Small tools for any `nn.Module`: hooks and modes that are always put back, counts, tables, checks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return the module that `make` builds, its weights drawn from this seed, as all draws after it."""
    torch.manual_seed(seed)
    return make()


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


@contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Within this block, collect what the modules give: `{module: output}`, the last to finish at the end.

    The network goes on with a copy: layers behind that work in place leave what was collected as it
    was. Outputs that are no tensors are left out.
    """
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        outputs.pop(module, None)
        outputs[module] = output
        return output.clone()

    with hooked(modules, keep):
        yield outputs


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers training may change."""
    return sum(p.numel() for p in model.parameters())


def layer_table(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """Return a table of the layers, their output shapes and parameters, for a `[C, H, W]` image."""
    rows = []

    def note(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        rows.append(f"{type(layer).__name__:18} {str(list(output.shape[1:])):>14} "
                    f"{count_parameters(layer):>10,}")

    layers = [module for module in model.modules() if not list(module.children())]
    with evaluating(model), hooked(layers, note), torch.no_grad():
        model(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    return "\n".join([*rows, f"{'total':33} {count_parameters(model):>10,}"])


def check_shape(model: nn.Module, x: Tensor, *expected: tuple[int, int, int]) -> None:
    """Raise a `ValueError` unless x is `[N, C, H, W]` with one of the expected `(C, H, W)`."""
    if x.ndim != 4 or tuple(x.shape[1:]) not in expected:
        wanted = " or ".join("[N, {}, {}, {}]".format(*shape) for shape in expected)
        raise ValueError(f"{type(model).__name__}: expected {wanted}, got {list(x.shape)}")


def check_labels(labels: Tensor, num_classes: int, count: int | None = None) -> None:
    """Raise a `ValueError` unless labels are `int64 [count]`, each in 0..num_classes - 1."""
    if labels.dtype != torch.int64 or labels.ndim != 1 or count not in (None, len(labels)):
        raise ValueError(f"labels: expected int64 [{'N' if count is None else count}], "
                         f"got {labels.dtype} {list(labels.shape)}")
    if len(labels) == 0:
        raise ValueError("labels: expected at least one image with its label, got none")
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
    if not images.isfinite().all():
        raise ValueError("images: expected finite numbers, got some that are infinite or NaN")


@contextmanager
def differentiable(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Within this block gradients are taken, whatever surrounds it, and the model is in evaluation mode.

    Gives a copy of the images `float32 [N, C, H, W]` to differentiate by; what is no such images raises
    a `ValueError`.
    """
    check_images(images, model)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        yield images.detach().clone().requires_grad_()


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


def class_scores(model: nn.Module, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logit of each image's label (default: the predicted class), and the labels."""
    logits = model(images)
    labels = logits.argmax(dim=1) if labels is None else labels.to(logits.device)
    check_labels(labels, logits.shape[1], len(images))
    return logits.gather(1, labels[:, None])[:, 0], labels


def feature_layer(model: nn.Module, images: Tensor, layer: nn.Module | str | None = None) -> nn.Module:
    """Return the module meant by `layer`: by default the last to finish that gives a map larger than 1×1.

    Raises:
        ValueError: there is none, or what it gives is not `[N, channels, h, w]`.
    """
    if layer is not None:
        layer = find_layer(model, layer)
    with recording(model.modules()) as outputs, torch.no_grad():
        model(images[:1])
    if layer is not None:
        if layer not in outputs or outputs[layer].ndim != 4:
            raise ValueError("layer: expected one whose output is [N, channels, h, w]")
        return layer
    found = [m for m, output in outputs.items() if output.ndim == 4 and max(output.shape[2:]) > 1]
    if not found:
        raise ValueError("expected a model with feature maps [N, C, H, W] larger than 1×1")
    return found[-1]


def pooled_maps_and_linear(model: nn.Module, images: Tensor) -> tuple[nn.Module, nn.Linear]:
    """Return the layers that CAM reads: what gives the last feature maps, and the linear layer.

    Raises:
        ValueError: the model does not end in global average pooling and one linear layer.
    """
    last = feature_layer(model, images)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    with recording([last, *linear]) as outputs, torch.no_grad():
        model(images[:1])
    means = outputs[last].mean(dim=(2, 3))
    if not linear or linear[0].in_features != means.shape[1] or not torch.allclose(
            linear[0](means), outputs[linear[0]], rtol=1e-3, atol=1e-4):
        raise ValueError("class_activation_map: expected a model that ends in global average "
                         "pooling and one linear layer; grad_cam takes any other")
    return last, linear[0]


def patch_places(size: Iterable[int], patch: int, stride: int) -> list[range]:
    """Return, for each axis, where patches begin that lie centred on every cell of `stride` pixels.

    Raises:
        ValueError: the patch is larger than the image, or leaves pixels out.
    """
    size = tuple(size)
    if not 0 < stride <= patch <= min(size):
        raise ValueError("patch: expected stride <= patch <= the image's size, "
                         f"got stride {stride}, patch {patch}")
    return [range((stride - patch) // 2, pixels - patch // 2, stride) for pixels in size]


@contextmanager
def joined_processes() -> Iterator[torch.device]:
    """Within this block the processes of `torchrun` are one group; gives this one's device.

    nccl connects GPUs, gloo processors.

    Raises:
        RuntimeError: the program was started in any other way.
    """
    if not distributed.is_torchelastic_launched():
        raise RuntimeError("train_distributed: start your file by torchrun --nproc-per-node=2 FILE")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", distributed.get_node_local_rank())
        torch.cuda.set_device(device)
    distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def rank_and_world(model: nn.Module) -> tuple[int, int]:
    """Return which process this is, and how many train the model together (`train_distributed`)."""
    group = model.process_group if isinstance(model, DistributedDataParallel) else None
    return (group.rank(), group.size()) if group else (0, 1)


def check_recipe(epochs: int, batch_size: int, precision: str, held_out: int, images: int) -> None:
    """Raise a `ValueError` if nothing could be trained this way."""
    if epochs < 1 or batch_size < 1 or not 0 < held_out < images or precision not in PRECISIONS:
        raise ValueError("train_model: expected epochs and batch_size >= 1, images left to train "
                         f"beside a share of them for validation, precision in {PRECISIONS}; got "
                         f"{epochs}, {batch_size}, {held_out} of {images}, {precision!r}")


PRECISIONS = ("auto", "float32", "bfloat16")


def check_finite(losses: Sequence[Tensor], steps: int, optimizer: torch.optim.Optimizer) -> None:
    """Raise a `FloatingPointError` that names likely causes if the last loss is infinite or not a number.

    It is looked at every 10th step, and after the last of `steps`: each look makes a GPU wait.
    """
    if (len(losses) % 10 == 0 or len(losses) == steps) and not losses[-1].isfinite():
        raise FloatingPointError(
            f"the loss is {losses[-1].item()} after {len(losses)} steps of this epoch, at learning "
            f"rate {optimizer.param_groups[0]['lr']:.2g}: too high a rate (try a tenth), or "
            "weights that were not finite before; the best weights so far are kept")


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
