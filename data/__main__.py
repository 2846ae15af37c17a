"""`python -m data`: fetch all that the tutorial can use, for a machine that will be offline.

What is there is kept, what was interrupted is resumed. Slow servers are first left for faster ones;
if all are slow, it waits for them, however long it takes.
"""

import argparse
import math
import sys
from pathlib import Path

from data import HERE, fetch_cifar10, fetch_mnist, fetch_resnet18
from data.fetch import TooSlowError

FETCH = {"MNIST": fetch_mnist, "CIFAR-10": fetch_cifar10, "ResNet-18 weights": fetch_resnet18}


def main(arguments: list[str] | None = None) -> int:
    """Fetch everything; return 0, or 1 if something is missing."""
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=HERE, help="default: data/")
    root = parser.parse_args(arguments).data_dir.expanduser()
    failed = False
    for name, fetch in FETCH.items():
        try:
            try:
                fetch(root)
            except TooSlowError as error:
                print(f"{name}: {error}; trying again without a time limit", flush=True)
                fetch(root, math.inf)
            print(f"{name}: complete below {root}", flush=True)
        except OSError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
