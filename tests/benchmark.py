"""Measurements that take too long for the tutorial itself: `python tests/benchmark.py --help`.

growth: what each step from SimpleCNN to SmallVGG gains on CIFAR-10 (section 5.3), in test accuracy.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convolutional_neural_networks import (GROWTH, RECIPES, SmallVGG, evaluate,  # noqa: E402
                                           train_model)
from data import ImageData, load_cifar10  # noqa: E402


def cifar10(options: argparse.Namespace) -> ImageData:
    """CIFAR-10 from disk or the network, or from an .npz file with the four arrays of `ImageData`."""
    if options.arrays is None:
        data = load_cifar10(options.data_dir)
        if not data.name.startswith("CIFAR-10"):
            sys.exit("this measurement needs CIFAR-10: run `python -m data` first")
        return data
    with np.load(options.arrays) as arrays:
        images, labels, test_images, test_labels = (torch.from_numpy(arrays[name]) for name in (
            "train_images", "train_labels", "test_images", "test_labels"))
    return ImageData(images, labels.long(), test_images, test_labels.long(), tuple(map(str, range(10))),
                     options.name)


def growth(data: ImageData, options: argparse.Namespace) -> list[dict]:
    """Train each step with each seed; all but the last keep the learning rate constant."""
    recipe = RECIPES["SmallVGG on CIFAR-10"] | {"epochs": options.epochs}
    constant = recipe | {"one_cycle": False, "learning_rate": recipe["learning_rate"] / 4}
    steps = {name: (make, constant) for name, make in GROWTH.items()} | {"schedule": (SmallVGG, recipe)}
    rows = []
    for name, (make, settings) in steps.items():
        accuracies, seconds = [], []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            model = make()
            history = train_model(model, data, seed=seed, progress=False, **settings)
            accuracies.append(evaluate(model, data.test_images, data.test_labels)[1])
            seconds.append(history[-1]["seconds"])
        rows.append({"step": name, "parameters": sum(p.numel() for p in model.parameters()),
                     "accuracies": accuracies, "seconds": statistics.median(seconds)})
        print(f"{name:12} {rows[-1]['parameters']:8,} parameters  median "
              f"{statistics.median(accuracies):.2%} ({min(accuracies):.2%} to {max(accuracies):.2%})  "
              f"{rows[-1]['seconds']:.0f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["growth"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=RECIPES["SmallVGG on CIFAR-10"]["epochs"])
    parser.add_argument("--train-images", type=int, help="only the first so many")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--arrays", type=Path, help="an .npz file in place of CIFAR-10")
    parser.add_argument("--name", default="arrays from a file", help="what these data are")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    data = cifar10(options)
    if options.train_images:
        data = replace(data.first(options.train_images), name=f"{options.train_images:,} of {data.name}")
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__,
                "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    print(data.name, versions)
    rows = growth(data, options)
    if options.json:
        options.json.write_text(json.dumps({"data": data.name, "versions": versions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
