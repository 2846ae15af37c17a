"""Draw the animation of section 2.1, data/figures/convolution.gif: `python tests/make_animation.py`."""

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import PillowWriter
from matplotlib.patches import Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import load_bundled_digits  # noqa: E402

ANIMATION = ROOT / "data" / "figures" / "convolution.gif"
SOBEL = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
ORANGE = (245, 166, 35)
COLOURS = {"cmap": "RdBu_r", "vmin": -4, "vmax": 4}


class SmallWriter(PillowWriter):
    """Writes frames of few colours, the same in all frames, so that only what changes is stored."""

    def finish(self) -> None:
        greys = np.linspace(0, 255, 24).round().repeat(3)
        reds_and_blues = 255 * plt.get_cmap("RdBu_r")(np.linspace(0, 1, 39))[:, :3].flatten()
        palette = Image.new("P", (1, 1))
        palette.putpalette([*greys.astype(int), *reds_and_blues.astype(int), *ORANGE])
        self._frames = [frame.convert("RGB").quantize(palette=palette, dither=0) for frame in self._frames]
        super().finish()


def places(size: int) -> list[tuple[int, int]]:
    """Return (row, column) of the kernel in each frame: two rows step by step, then faster."""
    return [(row, column) for row in range(size) for column in range(0, size, 1 if row < 2 else 5)]


def main(file: Path = ANIMATION) -> None:
    """Draw all frames, and write them to the file."""
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.labelsize": 8.5})
    digit = load_bundled_digits().test_images[5, 0, 4:26, 3:25]
    digit = (digit.float() / 255).round(decimals=1)              # [22, 22], so that the sums come out exactly
    complete = F.conv2d(digit[None, None], SOBEL[None, None])[0, 0].round(decimals=1) + 0  # [20, 20]; no -0
    size = len(complete)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(7, 2.9), layout="constrained")
    for ax in (left, middle, right):
        ax.set(xticks=[], yticks=[])
    left.imshow(digit.numpy(), cmap="gray", vmin=0, vmax=1)
    left.set(title="image, and the kernel over it", xlabel=f"{len(digit)}×{len(digit)} pixels, from 0 to 1")
    frame = {"fill": False, "edgecolor": np.divide(ORANGE, 255), "linewidth": 2.5}
    kernel_frame = left.add_patch(Rectangle((0, 0), 3, 3, **frame))
    middle.set_xlabel("nine products, which are added up")
    cells = middle.imshow(torch.zeros(3, 3).numpy(), **COLOURS)
    texts = [[middle.text(j, i, "", ha="center", va="center") for j in range(3)] for i in range(3)]
    maps = right.imshow(torch.full_like(complete, torch.nan).numpy(), **COLOURS)
    right.set(title="feature map: the sums", facecolor="#e6e6e6",
              xlabel="red: dark to bright, blue: the reverse")
    map_frame = right.add_patch(Rectangle((0, 0), 1, 1, **frame))

    def draw(row: int, column: int) -> None:
        """Put the kernel over one place; all output pixels up to it are there."""
        patch = digit[row:row + 3, column:column + 3]
        cells.set_data((patch * SOBEL).numpy())
        for i in range(3):
            for j in range(3):
                texts[i][j].set_text(f"{patch[i, j]:.1f} × {SOBEL[i, j]:g}".replace("-", "−"))
        middle.set_title(f"pixel × weight, sum {complete[row, column]:.1f}".replace("-", "−"))
        done = torch.arange(size * size).reshape(size, size) <= row * size + column
        maps.set_data(torch.where(done, complete, torch.nan).numpy())
        kernel_frame.set_xy((column - 0.5, row - 0.5))
        map_frame.set_xy((column - 0.5, row - 0.5))

    writer = SmallWriter(fps=8)
    with writer.saving(figure, file, dpi=100):
        for row, column in [*places(size), *[(size - 1, size - 1)] * 16]:  # two seconds of rest at the end
            draw(row, column)
            writer.grab_frame()
    print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
