"""Measurements that take too long for the tutorial itself: `python tests/benchmark.py --help`.

growth: what each step from SimpleCNN to SmallVGG gains on CIFAR-10 (section 5.3), in test accuracy.
speed:  the tutorial against the usual ways, each written anew here: (a) PyTorch's MNIST example,
        (b) its CIFAR-10 tutorial, (c) its transfer tutorial; and how the training loop and its time
        behave. `--only` picks rows. Whole recipes are compared, with their different nets.

All is trained on the CPU, in the formats that `choose_speed` chooses, or in `--precision`.
Choosing takes a second or two for each net. It happens before the training, and is not counted.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from convolutional_neural_networks import (RECIPES, LeNet5, SimpleCNN, SmallVGG,  # noqa: E402
                                           choose_speed, count_parameters, new_head, random_shift, run,
                                           run_frozen, shift_and_flip, split_at, standardize,
                                           train_epoch, train_tail)
from data import (ImageData, colour_digits, load_bundled_digits, load_cifar10, load_mnist,  # noqa: E402
                  load_resnet18)

# ---------------------------------------------------------------------------------------- data


def cifar10(options: argparse.Namespace) -> ImageData:
    """Return CIFAR-10, from disk or the network, under the name that --name gives it."""
    data = load_cifar10(options.data_dir)
    if data.stand_in:
        sys.exit("this measurement needs CIFAR-10: run `python -m data` first")
    return replace(data, name=options.name or data.name)


def full_mnist(options: argparse.Namespace) -> ImageData:
    """Return all of MNIST, from disk."""
    data = load_mnist(options.data_dir, offline=True)
    if data.stand_in:
        sys.exit("this measurement needs the full MNIST: run `python -m data` first")
    return data


# ------------------------------------------------------------------------------ the tutorial's way


def formats(make: Callable[[], nn.Module], data: ImageData, batch_size: int,
            options: argparse.Namespace) -> dict[str, object]:
    """Return precision and memory format for a training, chosen as the tutorial does (4.3).

    Stand-ins are trained in float32. Otherwise --precision decides, or a measurement, which
    `choose_speed` makes once for each net.
    """
    if data.stand_in:
        return {}
    if options.precision != "auto":
        return {"precision": options.precision}
    return choose_speed(make(), data.train_images, data.train_labels, batch_size)


def ours(make: Callable[[], nn.Module], data: ImageData, seed: int, options: argparse.Namespace,
         settings: dict) -> tuple[float, float]:
    """Train a fresh net by a recipe of the tutorial; return seconds and test accuracy."""
    chosen = formats(make, data, settings.get("batch_size", 64), options)
    model, history, accuracy = run(make, data, seed, on_epoch=None, **chosen, **settings)
    seconds = sum(epoch["seconds"] for epoch in history)
    print(f"  {type(model).__name__}: {seconds:.1f} s, {accuracy:.2%}", flush=True)
    return seconds, accuracy


# ------------------------------------------------------------------------------------------ growth


def with_mean_only(**settings) -> SmallVGG:
    """A SmallVGG that averages its last maps without the 3×3 maximum before."""
    model = SmallVGG(**settings)
    del model.features[-1]
    return model


GROWTH = {  # from SimpleCNN to SmallVGG: first the new architecture, then one change at a time
    "SimpleCNN": partial(SimpleCNN, in_channels=3, image_size=32),
    "3×3 stacks": partial(with_mean_only, channels=(16, 32, 64), batch_norm=False,
                          activation=nn.ReLU),
    "BatchNorm": partial(with_mean_only, channels=(16, 32, 64), activation=nn.ReLU),
    "width": partial(with_mean_only, activation=nn.ReLU),
    "SiLU": with_mean_only,
    "maximum": SmallVGG}


def growth(data: ImageData, options: argparse.Namespace) -> list[dict]:
    """Train each step with each seed; all but the last keep the learning rate constant.

    All steps are trained in the formats that suit the net they lead to.
    """
    recipe = RECIPES["SmallVGG on CIFAR-10"] | {"epochs": options.epochs, "on_epoch": None}
    constant = recipe | {"one_cycle": False, "learning_rate": recipe["learning_rate"] / 4}
    steps = {name: (make, constant) for name, make in GROWTH.items()} | {"schedule": (SmallVGG, recipe)}
    chosen = formats(SmallVGG, data, recipe["batch_size"], options)
    print(f"trained with {chosen}")
    rows = []
    for name, (make, settings) in steps.items():
        accuracies, times = [], []
        for seed in range(options.seeds):
            model, history, accuracy = run(make, data, seed, **chosen, **settings)
            accuracies.append(accuracy)
            times.append(sum(epoch["seconds"] for epoch in history))
        parameters = count_parameters(model)
        median, seconds = statistics.median(accuracies), statistics.median(times)
        rows.append({"step": name, "parameters": parameters, "accuracies": accuracies,
                     "seconds": seconds, **chosen})
        print(f"{name:12} {parameters:8,} parameters  median {median:.2%} "
              f"({min(accuracies):.2%} to {max(accuracies):.2%})  {seconds:.0f} s", flush=True)
    return rows


# --------------------------------------------------------------------------------- the usual ways


class MnistExample(nn.Module):
    """The net of PyTorch's MNIST example."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Cifar10Example(nn.Module):
    """The net of PyTorch's CIFAR-10 tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class AsPictures(torch.utils.data.Dataset):
    """Pictures and labels one by one, as torchvision's datasets hand them out."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, mean: list, std: list) -> None:
        self.images, self.labels = images, labels
        self.transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                                     v2.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(v2.functional.to_pil_image(self.images[index])), int(self.labels[index])


def usual_way(model: nn.Module, data: ImageData, optimizer: torch.optim.Optimizer, batch_size: int,
              workers: int, normal: tuple[list, list], epochs: int, gamma: float = 1.0,
              until: float = 1.0) -> list[tuple[float, float]]:
    """Train as the examples do; return (seconds of training so far, test accuracy) after each epoch."""
    train = torch.utils.data.DataLoader(AsPictures(data.train_images, data.train_labels, *normal),
                                        batch_size, shuffle=True, num_workers=workers)
    test = torch.utils.data.DataLoader(AsPictures(data.test_images, data.test_labels, *normal), 1000)
    schedule, seconds, rows = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma), 0.0, []
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            right = sum((model(x).argmax(1) == y).sum().item() for x, y in test)
        rows.append((seconds, right / len(data.test_images)))
        print(f"  usual way: {seconds:.0f} s, {rows[-1][1]:.2%}", flush=True)
        if rows[-1][1] >= until:
            break
    return rows


# ----------------------------------------------------------------------------------- rows of speed


def row(what: str, values: Sequence[float], goal: float | None = None, bound: str = "at least") -> dict:
    """Print and return a row: median, lowest and highest of the values, and what was to be reached."""
    result = {"what": what, "median": statistics.median(values), "lowest": min(values),
              "highest": max(values), "runs": len(values),
              "goal": "" if goal is None else f"{bound} {goal:g}"}
    print("| {what} | {median:.4g} | {lowest:.4g} to {highest:.4g} | {runs} | {goal} |".format(**result),
          flush=True)
    return result


TO_99 = dict(epochs=1, batch_size=64, learning_rate=4e-3, validation=0.01)  # of MNIST, in a moment


def mnist_rows(options: argparse.Namespace) -> list[dict]:
    """Against (a): to 99.0%, and whole recipes against one epoch of it."""
    data = full_mnist(options)
    epoch, to_99 = [], []
    for seed in range(options.usual_runs):
        torch.manual_seed(seed)
        model = MnistExample()
        rows = usual_way(model, data, torch.optim.Adadelta(model.parameters(), 1.0), 64, 0,
                         ([0.1307], [0.3081]), epochs=8, gamma=0.7, until=0.99)
        epoch.append(rows[0][0])
        to_99.append(rows[-1][0])
    result = [row("one epoch of (a), s", epoch), row("(a) to 99.0%, s", to_99)]
    fast = [ours(SimpleCNN, data, seed, options, TO_99) for seed in range(options.runs)]
    result += [row("SimpleCNN, one epoch, s", [seconds for seconds, _ in fast]),
               row("  its test accuracy", [accuracy for _, accuracy in fast]),
               row("MNIST to 99.0%: times sooner than (a)",
                   [statistics.median(to_99) / seconds for seconds, _ in fast], 30)]
    for name, make, goal, share in (("SimpleCNN", SimpleCNN, 0.994, 1.0), ("LeNet-5", LeNet5, 0.993, 0.5)):
        done = [ours(make, data, seed, options, RECIPES[f"{name} on MNIST"])
                for seed in range(options.runs)]
        result += [row(f"{name}, whole recipe: test accuracy", [accuracy for _, accuracy in done], goal),
                   row("  its time, s", [seconds for seconds, _ in done], 60, "at most"),
                   row("  its time, in epochs of (a)",
                       [seconds / statistics.median(epoch) for seconds, _ in done], share, "at most")]
    return result


def cifar_rows(options: argparse.Namespace) -> list[dict]:
    """Against (b): SmallVGG's first epochs to the accuracy where (b) ends."""
    data = cifar10(options)
    times, ends = [], []
    for seed in range(options.usual_runs):
        torch.manual_seed(seed)
        model = Cifar10Example()
        rows = usual_way(model, data, torch.optim.SGD(model.parameters(), 0.001, momentum=0.9), 4, 2,
                         ([0.5] * 3, [0.5] * 3), epochs=2)
        times.append(rows[-1][0])
        ends.append(rows[-1][1])
    settings = RECIPES["SmallVGG on CIFAR-10"] | {"epochs": 1, "learning_rate": 4e-3, "batch_size": 64}
    small = partial(SmallVGG, channels=(16, 32, 64))
    done = [ours(small, data.first(14_000), seed, options, settings) for seed in range(options.runs)]
    return [row("(b), two epochs, s", times), row("  its test accuracy", ends),
            row("small SmallVGG, 14,000 images once, s", [seconds for seconds, _ in done]),
            row("  its test accuracy", [accuracy for _, accuracy in done]),
            row("CIFAR-10 to the accuracy of (b): times sooner",
                [statistics.median(times) / seconds for seconds, _ in done], 25)]


def recipe_rows(options: argparse.Namespace) -> list[dict]:
    """The other recipes that the first lines of the tutorial quote."""
    digits = replace(load_bundled_digits(), stand_in=True)  # as in a run without MNIST
    photos, result = cifar10(options), []
    for make, data, name, goal in ((SimpleCNN, digits, "SimpleCNN on 5,000 digits", 0.975),
                                   (LeNet5, digits, "LeNet-5 on 5,000 digits", 0.97),
                                   (SmallVGG, photos, "SmallVGG on CIFAR-10", 0.86)):
        done = [ours(make, data, seed, options, RECIPES[name]) for seed in range(options.runs)]
        result += [row(f"{name}: test accuracy", [accuracy for _, accuracy in done], goal),
                   row("  its time, s", [seconds for seconds, _ in done],
                       180 if data is photos else 60, "at most")]
    return result


def transfer_rows(options: argparse.Namespace) -> list[dict]:
    """Against (c): frozen features kept, and every epoch through the frozen network."""
    backbone, preprocess, description = load_resnet18(options.data_dir, offline=True)
    print(f"  {description}")
    data, ratios = colour_digits(load_bundled_digits()).first(200, 200), []
    frozen, _ = split_at(new_head(backbone, 10), "fc")
    run_frozen(frozen, data.train_images, preprocess)  # warms up
    for seed in range(options.runs):
        _, head = split_at(new_head(backbone, 10, seed), "fc")
        start = time.perf_counter()
        features = run_frozen(frozen, data.train_images, preprocess)
        train_tail(head, features, data.train_labels, epochs=25, seed=seed)
        kept = time.perf_counter() - start
        _, head = split_at(new_head(backbone, 10, seed), "fc")
        start = time.perf_counter()
        train_tail(nn.Sequential(*frozen, *head), preprocess(data.train_images), data.train_labels,
                   epochs=25, seed=seed)
        ratios.append((time.perf_counter() - start) / kept)
    return [row("frozen features against (c), 25 epochs: times sooner", ratios, 24)]


def seconds_of(call: Callable[..., object], *arguments, **keywords) -> float:
    """Time one call."""
    start = time.perf_counter()
    call(*arguments, **keywords)
    return time.perf_counter() - start


def repeat_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer: torch.optim.Optimizer,
                steps: int) -> None:
    """Train on one batch that already lies there, again and again."""
    model.train()
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def loop_rows(options: argparse.Namespace) -> list[dict]:
    """The training loop against the same step on one resident batch; and time against images.

    What is compared takes turns, in pieces of 30 steps, so that other work on the machine slows all
    alike.
    """
    digits, result = load_bundled_digits(), []
    colour = colour_digits(digits)
    for name, make, data, augment, size in (
            ("SimpleCNN", SimpleCNN, digits, random_shift, 64),
            ("LeNet-5", LeNet5, digits, random_shift, 128),
            ("SmallVGG", SmallVGG, colour, shift_and_flip, 128)):
        model = make().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        images, labels = data.train_images, data.train_labels
        x, y, shares = standardize(images[:size]), labels[:size], []
        for _ in range(options.runs + 1):  # the first run warms up
            resident = loop = 0.0
            for _ in range(4):
                batches = torch.randperm(len(images)).split(size)[:30]
                resident += seconds_of(repeat_step, model, x, y, optimizer, len(batches))
                loop += seconds_of(train_epoch, model, batches, images, labels, optimizer,
                                   augment=augment)
            shares.append(resident / loop)
        result.append(row(f"{name}: training loop against the resident batch", shares[1:], 0.95))
    count = len(digits.train_images)
    images, labels = digits.train_images.repeat(8, 1, 1, 1), digits.train_labels.repeat(8)
    model, unevenness = SimpleCNN().to(memory_format=torch.channels_last), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    for _ in range(options.runs):
        times = dict.fromkeys((1, 2, 4, 8), 0.0)
        turns = [many for many in times for _ in range(16 // many)]  # 64,000 images of each
        for turn in torch.randperm(len(turns)).tolist():
            many = turns[turn]
            batches = torch.randperm(count * many).split(64)
            times[many] += seconds_of(train_epoch, model, batches, images, labels, optimizer)
        unevenness.append(max(times.values()) / min(times.values()) - 1)
    return [*result, row("seconds an image, 1×, 2×, 4×, 8×: largest over smallest, less 1", unevenness,
                         0.1, "at most")]


def step_rate(model: nn.Module, x: torch.Tensor, y: torch.Tensor, precision: str) -> tuple[float, float]:
    """Return operations a second in the best of several training steps, and operations a step."""
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:  # forward and backward
        step()
    step()  # warms up
    best = min(seconds_of(step) for _ in range(10))
    return counter.get_total_flops() / best, counter.get_total_flops()


def roofline_rows(options: argparse.Namespace) -> list[dict]:
    """The rate of one large matrix product, and each network's training step as a share of it."""
    peak, result, side = {}, [], 4096
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
        torch.mm(a, b)  # warms up
        peak[precision] = 2 * side**3 / min(seconds_of(torch.mm, a, b) for _ in range(5))
        result.append(row(f"matrix product of {side}×{side}, {precision}: GFLOP/s",
                          [peak[precision] / 1e9]))
    for name, make, shape in (("SimpleCNN", SimpleCNN, (64, 1, 28, 28)),
                              ("LeNet-5", LeNet5, (128, 1, 28, 28)),
                              ("SmallVGG", SmallVGG, (128, 3, 32, 32)),
                              ("ResNet-18", models.resnet18, (32, 3, 224, 224))):
        x, y = torch.randn(shape).to(memory_format=torch.channels_last), torch.arange(shape[0]) % 10
        for precision in peak:
            rates = [step_rate(make(), x, y, precision) for _ in range(options.runs)]
            best, operations = max(rates)
            result += [row(f"{name}, batch of {shape[0]}, {precision}: milliseconds a step",
                           [1000 * operations / rate for rate, _ in rates]),
                       row("  the best as a share of the matrix product's rate", [best / peak[precision]])]
    return result


CHILD = """
import os, sys, time
sys.path.insert(0, {root!r})
from convolutional_neural_networks import SimpleCNN, random_shift, train_distributed
from data import load_bundled_digits

digits, marks = load_bundled_digits(), []

def augment(images):
    marks.append(time.perf_counter())                            # a mark for each step
    return random_shift(images)

train_distributed(SimpleCNN(), digits.train_images, digits.train_labels, epochs=3, batch_size=128,
                  augment=augment, on_epoch=None)
if os.environ["RANK"] == "0":                                    # the first 30 steps warm up
    print("rate", 128 * (len(marks) - 30) / (marks[-1] - marks[29]))
"""


def process_rows(options: argparse.Namespace) -> list[dict]:
    """Processes of one thread against one of two. (Four on two cores only show that it works.)"""
    all_ratios = {2: [], 4: []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "own.py").write_text(CHILD.format(root=str(ROOT)))
        for _ in range(options.runs):
            rates = {}
            for processes, threads in ((1, 2), (2, 1), (4, 1)):
                done = subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone",
                     f"--nproc-per-node={processes}", "own.py"],
                    cwd=folder, stdout=subprocess.PIPE, text=True, check=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)})
                rates[processes] = float(done.stdout.split("rate")[1])
            for processes, ratios in all_ratios.items():
                ratios.append(rates[processes] / rates[1])
    return [row("two processes of one thread against one of two: images per second", all_ratios[2], 0.95),
            row("four processes of one thread against one of two", all_ratios[4])]


def run_rows(options: argparse.Namespace) -> list[dict]:
    """The whole tutorial without a network, its quick form, and with the data below --data-dir."""
    result, runs = [], [("--quick", 38, ["--quick"]), ("default run", 150, [])]
    if options.data_dir:
        runs.append((f"with the data below {options.data_dir}", 300,
                     ["--data-dir", str(options.data_dir)]))
    for name, goal, arguments in runs:
        times = []
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(ROOT / "convolutional_neural_networks.py"), "--offline",
                           "--output-dir", folder, *arguments]
                times.append(seconds_of(subprocess.run, command, check=True, stdout=subprocess.DEVNULL))
        result.append(row(f"{name}, s", times, goal, "at most"))
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    return [*result, row("its peak memory, GB", [gigabytes], 2.5, "at most")]


SPEED = {"mnist": mnist_rows, "cifar10": cifar_rows, "recipes": recipe_rows, "transfer": transfer_rows,
         "loop": loop_rows, "roofline": roofline_rows, "processes": process_rows, "run": run_rows}


# ------------------------------------------------------------------------------------ command line


def processor() -> str:
    """Return the processor's name, and its instructions for bfloat16, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if not names:
        return platform.processor() or platform.machine()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return ", ".join([f"{len(names)} × {names[0]}", *sorted(flags & {"avx512_bf16", "amx_bf16"})])


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["growth", "speed"])
    add("--only", nargs="+", choices=SPEED, default=list(SPEED), help="rows of speed")
    add("--runs", type=int, default=3, help="of each measurement of speed")
    add("--usual-runs", type=int, default=3, help="of the slow usual ways (a) and (b)")
    add("--seeds", type=int, default=3, help="of growth")
    add("--epochs", type=int, default=RECIPES["SmallVGG on CIFAR-10"]["epochs"], help="of growth")
    add("--train-images", type=int, help="growth: only the first so many")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="auto (default) measures which is faster here")
    add("--data-dir", type=Path, help="where MNIST, and CIFAR-10 or its copy cifar10.npz, lie")
    add("--name", help="what to call CIFAR-10 here, such as 'CIFAR-10 (JPEG copy)'")
    add("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def main() -> None:
    """Measure what the command line asks for."""
    options = parse_options()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__,
                "python": platform.python_version(), "processor": processor(),
                "threads": torch.get_num_threads(),
                "instructions": torch.backends.cpu.get_cpu_capability(), "date": time.strftime("%Y-%m-%d")}
    print(versions)
    name = options.name
    if options.what == "growth":
        data = cifar10(options)
        if options.train_images:
            data = replace(data.first(options.train_images),
                           name=f"{options.train_images:,} of {data.name}")
        name = data.name
        print(name)
        parts = [partial(growth, data)]
    else:
        print("| what | median | lowest to highest | runs | goal |\n|---|---|---|---|---|")
        parts = [SPEED[name_of_rows] for name_of_rows in options.only]
    rows = []
    for part in parts:  # the file is written after each, so that an interruption loses one at most
        rows += part(options)
        if options.json:
            options.json.write_text(json.dumps(
                {"versions": versions, "data": name, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
