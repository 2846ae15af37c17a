"""The bookkeeping of a run: its options, output folder, headings, pictures and table of results."""

import argparse
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import NoReturn, TextIO

import matplotlib
import matplotlib.pyplot as plt
import torch
import torchvision

from data import (HERE, ImageData, colour_digits, load_bundled_digits, load_cifar10,
                  load_mnist)
from data.fetch import write_whole

STYLE = {"figure.constrained_layout.use": True, "figure.dpi": 140, "savefig.dpi": 140,
         "font.size": 9, "axes.titlesize": 9, "image.cmap": "gray", "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False}


# ------------------------------------------------------------------------------------- options


def usable_device(name: str) -> torch.device:
    """Return the device of that name, or say in one line why it cannot be used here."""
    try:
        torch.ones(1, device=name).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = shorten(str(error).partition(". ")[0], 120)
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here ({reason})") from None
    return torch.device(name)


def seed_number(text: str) -> int:
    """Return the seed that the text gives; every library takes these."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to {2**32 - 1}, got {text!r}")
    return int(text)


def folder_name(text: str) -> Path:
    """Return the path, unless something else than a folder lies there."""
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, but {text!r} is a file")
    return path


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
    add("--data-dir", type=folder_name, default=HERE,
        help="where data are, or are downloaded to (default: data/)")
    add("--output-dir", type=folder_name, default=Path("outputs"),
        help="for pictures and results.json (default: outputs/)")
    add("--device", type=usable_device, help="cpu, cuda, mps, … (default: the best there is)")
    add("--seed", type=seed_number, default=0, help="of all random draws (default: 0)")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the trainings on MNIST and CIFAR-10; auto (default) measures which is faster here")
    add("--show", action="store_true", help="open a window for each picture")
    options = parser.parse_args(arguments)
    options.offline |= options.quick
    if options.show and plt.get_backend().lower() == "agg":
        parser.error("--show: there is no display to open windows on; without it you get PNG files")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir: {options.output_dir} cannot be made ({error.strerror})")
    return options


# ----------------------------------------------------------------------------------- a run begins


def start_run() -> tuple[argparse.Namespace, "Results", Callable[[plt.Figure, str], None]]:
    """Begin a run of the file that calls this, as a script or in a notebook.

    A script reads its command line, prints the headings of its text before what it prints below
    them, and saves its pictures. A notebook reads the environment variable CNN_TUTORIAL_ARGS, and
    shows each picture below its cell.

    Returns:
        The options; an empty table of results; and `show_figure(figure, name)`.
    """
    file = sys._getframe(1).f_globals.get("__file__")
    is_script = file is not None and Path(sys.argv[0]).name == Path(file).name
    if not is_script:
        options = parse_options(shlex.split(os.environ.get("CNN_TUTORIAL_ARGS", "")))
        plt.rcParams.update(STYLE)
        return options, Results(), lambda figure, name: None
    options = parse_options()
    plt.rcParams.update(STYLE)
    if not options.show and "ipykernel" not in sys.modules:  # %run leaves the notebook's backend
        matplotlib.use("Agg")
    sys.excepthook = end_quietly_on_ctrl_c
    results = Results(Headings(sys.stdout, file))

    def show_figure(figure: plt.Figure, name: str) -> None:
        """Save the figure as `name`.png, open a window if that was asked for, and close it."""
        path = options.output_dir / f"{name}.png"
        figure.savefig(path)
        print(f"[picture] {path}")
        if options.show:
            plt.show()
        plt.close(figure)

    return options, results, show_figure


def end_quietly_on_ctrl_c(kind: type[BaseException], error: BaseException,
                          traceback: TracebackType | None) -> None:
    """For `sys.excepthook`: after Ctrl-C one line and exit code 130; a traceback for all else."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    print("\nstopped; the pictures so far are in the output folder", file=sys.stderr)
    raise SystemExit(130)


class Headings(io.TextIOBase):
    """Standard output of a script that prints each heading of its text before what comes below it.

    The headings are the lines of the file that begin with `## ` or `### `. Which have been passed
    is known from the line of the file that is running when something is printed.
    """

    def __init__(self, stream: TextIO, file: str) -> None:
        if isinstance(stream, Headings):                         # of an interrupted %run
            stream = stream.stream
        self.stream, self.file, self.began = stream, file, time.perf_counter()
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        self.ahead = [(number, line) for number, line in enumerate(lines, 1)
                      if re.match("###? ", line)]
        self.ends: dict[str, float] = {}                         # of each section, in seconds
        self.section = ""
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                 # for consoles that lack a letter
        sys.stdout = self

    def write(self, text: str) -> int:
        """Print the headings that have been passed, then the text."""
        frame = sys._getframe(1)
        while frame and not (frame.f_code.co_name == "<module>"
                             and frame.f_code.co_filename == self.file):
            frame = frame.f_back
        while frame and self.ahead and self.ahead[0][0] < frame.f_lineno:
            _, heading = self.ahead.pop(0)
            level, title = heading.split(" ", 1)
            if level == "##":
                self.section = title
                self.stream.write(f"\n\n{title}\n{'=' * len(title)}\n")
            else:
                self.stream.write(f"\n{title}\n{'-' * len(title)}\n")
        self.ends[self.section] = time.perf_counter() - self.began
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush the stream behind it."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Say whether the stream behind it is a terminal."""
        return self.stream.isatty()

    def durations(self) -> dict[str, float]:
        """Return how many seconds each section took, up to the last line that it printed."""
        ends = [0.0, *self.ends.values()]
        return {name: end - begin for name, begin, end in zip(self.ends, ends, ends[1:])}


def load_data(options: argparse.Namespace) -> tuple[ImageData, ImageData, ImageData]:
    """Return the bundled digits, MNIST, and colour images: the real ones where they are available."""
    digits = load_bundled_digits()
    if options.quick:
        print("--quick: some of the bundled digits in place of MNIST, colour digits in place of CIFAR-10")
        few, colour = digits.first(1500, 500), colour_digits(digits.first(1000, 500))
        return (digits, replace(few, stand_in=True),
                replace(colour, stand_in=True, name=f"{colour.name}, a stand-in for CIFAR-10"))
    return (digits, load_mnist(options.data_dir, options.offline),
            load_cifar10(options.data_dir, options.offline))


QUICK_STEPS, DEFAULT_STEPS, MNIST_STEPS, CIFAR10_STEPS = 500, 3000, 1400, 10000


def seconds_of_a_step(device: torch.device, dtype: torch.dtype) -> float:
    """Return how long one training step of a small network takes here: the best of five."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(64 * 8 * 8, 10))
    model.to(device, memory_format=torch.channels_last)
    images = torch.zeros(128, 3, 32, 32, device=device)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model(images).square().mean().backward()
        model[0].weight.grad.sum().item()  # waits for an accelerator
        best = min(best, time.perf_counter() - began)
    return best


def print_expected_time(options: argparse.Namespace, device: torch.device, mnist: ImageData,
                        colour: ImageData) -> None:
    """Print about how long a run takes here, from the time of a few training steps.

    The numbers of such steps are those of runs on a processor with two cores (see the README).
    """
    float32 = seconds_of_a_step(device, torch.float32)
    fastest = min(float32, seconds_of_a_step(device, torch.bfloat16))
    seconds = 15 + QUICK_STEPS * float32 if options.quick else 30 + DEFAULT_STEPS * float32
    if not mnist.stand_in:
        seconds += MNIST_STEPS * fastest
    if not colour.stand_in:
        seconds += CIFAR10_STEPS * fastest
    print(f"Judging by a few training steps here ({1000 * fastest:.0f} ms), "
          f"a whole run takes about {max(1, round(seconds / 60))} min.")


# ------------------------------------------------------------------------------- table of results


def with_error(accuracy: float, n: int) -> str:
    """Return an accuracy measured on `n` images with its standard error √(p(1−p)/n), for reading."""
    return f"{accuracy:.2%} ± {math.sqrt(accuracy * (1 - accuracy) / n):.2%}"


class Results(list[dict]):
    """What a run has measured, a row each."""

    def __init__(self, headings: Headings | None = None) -> None:
        super().__init__()
        self.headings = headings
        self.shown: list[str] = []                               # of each row: its value, for reading

    def add(self, section: str, name: str, data: ImageData | str, metric: str, value: float,
            seconds: float = 0.0, n: int | None = None, quiet: bool = False) -> None:
        """Print a row (unless `quiet`) and keep it.

        Args:
            data: what it was measured on.
            n: how many images an accuracy was measured on; by default all test images.
        """
        self.append({"section": section, "name": name, "data": getattr(data, "name", data),
                     "metric": metric, "value": float(value), "seconds": float(seconds)})
        if "accuracy" in metric:
            shown = with_error(value, n or len(data.test_labels))
        else:
            shown = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        self.shown.append("" if quiet else shown)
        if not quiet:
            print(f"{name:36} {metric} {shown}" + f"  ({seconds:.1f} s)" * (seconds > 0))

    def add_seeds(self, section: str, name: str, data: ImageData | str, metric: str,
                  values: Sequence[float], seconds: float = 0.0) -> None:
        """Keep the mean of what several seeds gave, and print it with its standard deviation."""
        mean = statistics.fmean(values)
        self.append({"section": section, "name": name, "data": getattr(data, "name", data),
                     "metric": metric, "value": mean, "seconds": float(seconds)})
        form = ".1%" if "accuracy" in metric else ".2f"
        spread = (f"± {statistics.stdev(values):{form}} over {len(values)} seeds"
                  if len(values) > 1 else "(one seed: spread unknown)")
        self.shown.append(f"{mean:{form}} {spread}")
        print(f"{name:36} {metric} {self.shown[-1]}" + f"  ({seconds:.1f} s each)" * (seconds > 0))

    def write(self, options: argparse.Namespace, device: torch.device) -> None:
        """Print the rows as a table, but for quiet ones, and write all of them to `results.json`.

        Raises:
            ValueError: a value is not a finite number.
        """
        loud = [(row, shown) for row, shown in zip(self, self.shown) if shown]
        data = list(dict.fromkeys(row["data"] for row, _ in loud))
        for number, name in enumerate(data, 1):
            print(f"[{number}] {name}")
        for row, shown in loud:
            seconds = f"{row['seconds']:6.1f} s" if row["seconds"] else ""
            print(f"{row['section']:4} {row['name']:32} [{data.index(row['data']) + 1}] "
                  f"{row['metric']:22} {shown:28}{seconds}".rstrip())
        for row in self:
            row["seconds"] = round(row["seconds"], 1)
        if not all(math.isfinite(row["value"]) for row in self):
            raise ValueError("a result is not a finite number: see the table above")
        settings = {key: str(value) for key, value in vars(options).items()}
        summary = {
            "settings": settings | {"device": str(device)},
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "torchvision": torchvision.__version__},
            "results": self}
        options.output_dir.mkdir(parents=True, exist_ok=True)
        path = options.output_dir / "results.json"
        write_whole(path, (json.dumps(summary, indent=2) + "\n").encode())
        if self.headings is not None:
            print("\nseconds   section")
            for name, seconds in self.headings.durations().items():
                print(f"{seconds:7.1f}   {name or 'start'}")
            pictures = len(list(options.output_dir.glob("*.png")))
            print(f"\n{pictures} pictures and {path.name} are in {options.output_dir.resolve()}")
