"""Which number format and memory format train a model fastest here: measured, not guessed."""

import copy
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHOSEN: dict[tuple, tuple[str, bool]] = {}  # measured once for each model and size of batch


def step_seconds(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> float:
    """Return how long one forward and backward pass takes."""
    start = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    if images.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def choose_speed(model: nn.Module, images: Tensor, labels: Tensor, precision: str = "auto",
                 channels_last: bool | str = "auto", report: bool = True,
                 seconds: float = 0.2) -> tuple[str, bool]:
    """Settle what is "auto" by measuring training steps, within about half a second.

    float32 with `channels_last` is taken unless something else is at least 1.3 times faster: a choice
    that noise could turn would not be repeatable. Where the precision is given, so is the format
    ("auto" is then `channels_last`): the same seed and precision give the same numbers.

    Args:
        images: standardised `float32 [N, C, H, W]`, a batch as in training: what is faster may
            depend on its size. Up to 128 are used.
        labels: `int64`, of these images (and any more).
        seconds: no new round of measurements begins later than this.
    """
    if precision != "auto":
        return precision, channels_last is True or channels_last == "auto"
    images = images[:128]
    labels = labels[:len(images)]
    key = (str(model), images.shape, images.device, channels_last)
    if key not in CHOSEN:
        formats = [True, False] if channels_last == "auto" else [channels_last]
        precisions = ["float32", "bfloat16"]
        plain = precisions[0], formats[0]
        candidates = [plain, *((precisions[0], last) for last in formats[1:]),
                      *((name, formats[0]) for name in precisions[1:])]
        models = {last: copy.deepcopy(model).train().to(memory_format=FORMATS[last])
                  for last in formats}

        def measure(candidate: tuple[str, bool], count: int) -> float:
            name, last = candidate
            return step_seconds(models[last], images[:count], labels[:count], name)

        few = {c: measure(c, 8) for c in candidates}             # this also warms up
        few = {c: min(t, measure(c, 8)) if t < 0.1 else t for c, t in few.items()}
        times, end = {}, time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            for c in candidates:
                if few[c] < 3 * min(few.values()):               # the others are not worth the wait
                    times[c] = min(measure(c, len(images)), times.get(c, math.inf))
        best = plain if plain in times else next(iter(times))
        for c, t in times.items():
            best = c if t * (1.3 if best == plain else 1) < times[best] else best
        CHOSEN[key] = best
        if report:
            rates = [f"{NAMES[c]} " + (f"{len(images) / times[c]:,.0f}" if c in times
                                       else "far fewer") for c in candidates]
            print(f"trains in {NAMES[best]} (images/s here: {', '.join(rates)})")
    return CHOSEN[key]


FORMATS = {True: torch.channels_last, False: torch.contiguous_format}
NAMES = {(precision, last): precision + (" channels_last" if last else "")
         for precision in ("float32", "bfloat16") for last in FORMATS}
