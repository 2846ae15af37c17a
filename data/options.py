"""How a run of the tutorial starts and ends: options, output folder, table of results."""

import argparse
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Any, NoReturn

import matplotlib
import matplotlib.pyplot as plt
import torch
import torchvision
from torch import Tensor

from data import ImageData, colour_digits, load_bundled_digits, load_cifar10, load_mnist


def usable_device(name: str) -> torch.device:
    """Return the device of that name, or say in one line why it cannot be used here."""
    try:
        return torch.ones(1, device=name).sum().cpu() and torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = shorten(str(error).partition(". ")[0], 120)
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here ({reason})") from None


def seed_number(text: str) -> int:
    """Return the seed that the text gives; every library takes these."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**32 - 1}, got {text!r}")
    return int(text)


def folder_name(text: str) -> Path:
    """Return the path, unless something else than a folder lies there."""
    if Path(text).expanduser().exists() and not Path(text).expanduser().is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, but {text!r} is a file")
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"error: {message} (--help lists the options)\n")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options from `arguments`, by default from the command line."""
    parser = Parser(description="Convolutional networks, explained by running.", allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="the whole tutorial, but small; never downloads")
    add("--offline", action="store_true", help="use what is on disk or bundled, not the network")
    add("--data-dir", type=folder_name, help="where data are, or are downloaded to (default: data/)")
    add("--output-dir", type=folder_name, default=Path("outputs"),
        help="for pictures and results.json (default: outputs/)")
    add("--device", type=usable_device, help="cpu, cuda, mps, … (default: the best there is)")
    add("--seed", type=seed_number, default=0, help="of all random draws (default: 0)")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of training that takes long; auto (default) measures which is faster here, so that two "
             "runs may differ (what is brief, and comparisons, take float32)")
    add("--show", action="store_true", help="open a window for each picture")
    return parser.parse_args(arguments)


def start(in_notebook: bool) -> argparse.Namespace:
    """Read the options, choose how figures appear, and make the output folder.

    In a notebook the options come from the environment variable CNN_TUTORIAL_ARGS.
    """
    arguments = shlex.split(os.environ.get("CNN_TUTORIAL_ARGS", "")) if in_notebook else None
    options = parse_options(arguments)
    options.offline |= options.quick
    if not in_notebook:
        sys.excepthook = errors_in_one_line
        if not options.show:
            matplotlib.use("Agg")
        elif plt.get_backend().lower() == "agg":
            raise OSError("--show: there is no display to open windows on; without it you get PNG files")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output-dir: {options.output_dir} cannot be made ({error.strerror})") from None
    plt.rcParams.update({
        "figure.constrained_layout.use": True, "figure.dpi": 70, "savefig.dpi": 110,
        "font.size": 9, "axes.titlesize": 9, "image.cmap": "gray"})
    return options


def recipe_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the options change in each of the `RECIPES`."""
    changes = {"seed": options.seed}
    if options.precision != "auto":
        changes["precision"] = options.precision
    if options.quick:
        changes["epochs"] = 4
    return changes


def errors_in_one_line(kind: type[BaseException], error: BaseException,
                            traceback: TracebackType | None) -> None:
    """For `sys.excepthook`: end with one line on a file that cannot be had (exit code 2), or on
    Ctrl-C (130)."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{str(error) or 'stopped; the pictures so far are in the output folder'}", file=sys.stderr)
        raise SystemExit(130)
    if not issubclass(kind, OSError):
        return sys.__excepthook__(kind, error, traceback)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def load_data(options: argparse.Namespace) -> tuple[ImageData, ImageData, ImageData]:
    """Return the bundled digits, MNIST, and colour images: the real ones if they can be had."""
    digits = load_bundled_digits()
    if options.quick:
        print("--quick: a part of the bundled digits for MNIST; colour digits, a stand-in for CIFAR-10")
        return digits, digits.first(1500, 500), colour_digits(digits.first(1000, 500))
    mnist = load_mnist(options.data_dir, options.offline)
    photos = load_cifar10(options.data_dir, options.offline)
    if len(photos.train_images) == 50_000:
        print("With CIFAR-10 the whole run takes about 8 minutes on two cores, more on old ones.")
    return digits, mnist, photos


def with_error(accuracy: float, n: int) -> str:
    """Return an accuracy measured on `n` images with its standard error √(p(1−p)/n), for reading."""
    return f"{accuracy:.2%} ± {math.sqrt(accuracy * (1 - accuracy) / n):.2%}"


def print_class_accuracies(right: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Print, for each class, the share of `bool [N]` that is true, with its standard error."""
    for label, name in enumerate(classes):
        of_class = right[labels == label].float()
        print(f"  {name:10} {with_error(of_class.mean().item(), len(of_class))}")


class Results(list[dict]):
    """What a run has measured, a row each."""

    def add(self, section: str, name: str, data: ImageData | str, metric: str, value: float,
            seconds: float = 0.0, n: int | None = None, quiet: bool = False) -> None:
        """Print a row (unless `quiet`) and keep it.

        Args:
            data: what it was measured on.
            n: how many images an accuracy was measured on; by default all test images.
        """
        self.append({"section": section, "name": name, "data": getattr(data, "name", data),
                     "metric": metric, "value": float(value), "seconds": seconds})
        if "accuracy" in metric:
            shown = with_error(value, n or len(data.test_labels))
        else:
            shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        if not quiet:
            print(f"{name}: {metric} {shown}" + f" in {seconds:.1f} s" * (seconds > 0))

    def add_seeds(self, section: str, name: str, data: ImageData | str, metric: str,
                  values: Sequence[float], seconds: float = 0.0,
                  beyond: float = 0.0) -> tuple[float, float]:
        """Keep the mean of what several seeds gave, print it with its spread, return both.

        The spread is the standard deviation; of one seed it is unknown, and 0 is returned.

        Args:
            beyond: an effect (not an accuracy) within so many spreads is said to be not shown.
        """
        mean = sum(values) / len(values)
        self.add(section, name, data, metric, mean, seconds)
        if len(values) == 1:
            print("  one seed: spread unknown" + ", not shown" * (beyond > 0))
            return mean, 0.0
        spread = statistics.stdev(values)
        error = spread / math.sqrt(len(values))
        shown = (f"{spread:.1%}, standard error {error:.1%}" if "accuracy" in metric
                 else f"{spread:.1f}, standard error {error:.1f}")
        print(f"  {len(values)} seeds: spread {shown}" + ", not shown" * (abs(mean) < beyond * spread))
        return mean, spread


def write_results(results: Results, options: argparse.Namespace, device: torch.device) -> None:
    """Print what was measured as a table; write it to `results.json` in the output folder."""
    for row in results:
        row["seconds"] = round(row["seconds"], 1)
        value = f"{row['value']:7.2%}" if "accuracy" in row["metric"] else f"{row['value']:7.3f}"
        print(f"{row['section']:4} {row['name']:48} {row['metric']:20} {value}"
              + (f"{row['seconds']:7.1f} s" if row["seconds"] else " " * 9) + f"  {row['data']}")
    if not all(math.isfinite(row["value"]) for row in results):
        raise ValueError("a result is not a finite number: see the table above")
    summary = {
        "settings": {key: str(value) for key, value in vars(options).items()}
        | {"device": str(device)},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                     "torchvision": torchvision.__version__},
        "results": results}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    beside = options.output_dir / "results.json.tmp"
    try:
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        beside.replace(options.output_dir / "results.json")
    finally:
        beside.unlink(missing_ok=True)
    print(f"results.json is in {options.output_dir}/")
