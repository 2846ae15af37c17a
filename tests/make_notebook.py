"""Make the notebook from the script and execute it: `python tests/make_notebook.py --help`."""

import argparse
import base64
import io
import os
import re
import shlex
import tempfile
import textwrap
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "convolutional_neural_networks.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
GUARD = 'if __name__ == "__main__":\n'
MOST_BYTES = 5_000_000                                           # of the notebook

GALLERY = {  # the README's pictures, in data/figures/, and what `show_figure` calls them
    "kernels": "2_1_stride_padding_dilation", "numbers": "2_1_in_numbers", "edges": "2_1_edges",
    "mistakes": "4_5_mistakes", "strip": "4_7_strip", "photo": "4_8_steps",
    "degradation": "5_5_degradation", "architectures": "5_6_architectures",
    "transfer": "6_5_transfer", "layers": "7_3_layers", "maps": "7_4_maps", "tips": "8_1_tips"}

ALT = {  # what each picture shows, for those who cannot see it
    "1_1_convolution_as_matrix":
        "A matrix of 36 rows and 64 columns that is zero except for three bands of three diagonals.",
    "1_2_receptive_fields":
        "Two pyramids of cells: three layers of stride 1 lead down to 7 pixels, three of stride 2 to 15.",
    "1_3_equivariance":
        "A detail of a photo, shifted and convolved in both orders; they differ only near the borders.",
    "2_1_in_numbers":
        "A 5×5 image as numbers, a kernel over two of its places, the nine products, and the output.",
    "2_1_channels":
        "Three channels of an image as numbers, a slice of the kernel for each, the products, and one map.",
    "2_1_stride_padding_dilation":
        "Which pixels two neighbouring outputs read, for four settings of padding, stride and dilation.",
    "2_1_border_pixels":
        "Two grids of counts: without padding a corner is read once, with a padding of 1 four times.",
    "2_1_edges":
        "A portrait photo, its vertical edges, its horizontal edges, and the strength of both.",
    "2_2_relu":
        "Edges of a face in red and blue before ReLU; after ReLU only the red ones are left.",
    "2_3_pooling":
        "A map of edges, its maxima over 8×8 pixels, and its averages, which are much darker.",
    "2_5_batch_norm":
        "Histograms of four channels: they differ before normalisation, mean and spread agree after it.",
    "2_6_overfitting":
        "Training loss falls to zero, the loss on other images rises; less so with dropout, on the right.",
    "2_6_dropout":
        "Six feature maps of a digit: Dropout removes single pixels, Dropout2d turns whole maps black.",
    "3_3_simple_cnn":
        "A digit, eight maps after each layer of SimpleCNN, and the ten logits as bars.",
    "3_4_receptive_field":
        "A digit with the square that a unit sees: 6×6 pixels in block 1, 16×16 pixels in block 2.",
    "4_1_transforms":
        "A digit and a face: as they are, resized, cropped, turned, mirrored, and with other colours.",
    "4_1_one_draw_or_many":
        "RandomCrop moves eight copies of a digit alike, random_shift moves each of them differently.",
    "4_4_optimisers":
        "Training loss of four optimisers against steps: plain SGD falls slowest.",
    "4_4_range_test":
        "Loss against a growing learning rate: it falls, and rises when the rate is too high.",
    "4_5_history":
        "Loss in training and validation, and validation accuracy, epoch by epoch.",
    "4_5_confusion":
        "True against predicted digits: nearly all counts lie on the diagonal, the mistakes are coloured.",
    "4_5_mistakes":
        "The ten digits that the network got most wrong, with their true and their predicted class.",
    "4_5_colour_images":
        "The first sixteen colour images, each with the name of its class.",
    "4_7_accuracy_against_shift":
        "Accuracy against shift: it falls off on both sides, later for the augmented network.",
    "4_7_strip":
        "Five handwritten digits in a row, and below them the probability of each class at every place.",
    "4_8_steps":
        "Six simulated photos of digits; below each the ink, the digit cut out, and the digit as in MNIST.",
    "5_1_lenet":
        "A digit, the maps of four layers of LeNet-5, and the ten logits as bars.",
    "5_2_tanh_and_relu":
        "Training loss against steps for the same network with tanh and with ReLU.",
    "5_4_inception":
        "Boxes and arrows: four branches lead from 192 to 256 channels; two reductions are yellow.",
    "5_5_residual_block":
        "Boxes and arrows: x goes through two convolutions, and on a shortcut around them to a plus sign.",
    "5_5_degradation":
        "Training loss of networks of several depths, plain ones on the left, residual ones on the right.",
    "5_5_gradients":
        "Size of the gradient at each of 16 blocks, and its similarity to that of the last block.",
    "5_6_architectures":
        "ImageNet accuracy against operations of seven networks; a larger dot means more parameters.",
    "6_4_frozen_and_trained":
        "ResNet-18 as a row of boxes: feature extraction trains only the head, fine-tuning also layer4.",
    "6_5_transfer":
        "Test accuracy against labelled images: from scratch, by feature extraction, by fine-tuning.",
    "7_1_filters_simple_cnn":
        "Sixteen 5×5 kernels: noise before training, and many with a red and a blue side after it.",
    "7_1_filters_resnet18":
        "The 16 strongest kernels of ResNet-18 as small colour images: spots, stripes and edges.",
    "7_2_feature_maps":
        "A colour image and eight maps after each stage of SmallVGG, coarser from stage to stage.",
    "7_3_layers":
        "Grad-CAM over three digits at four depths: fine at first, then coarse, at last the same everywhere.",
    "7_4_maps":
        "Digits on patches of a photo, and below each the heat map and its peak by each of three methods.",
    "8_1_tips":
        "What five tips gain, with the spread over seeds, and two losses on few images that move apart.",
    "8_2_initialisation_and_schedules":
        "Spread of activations over ten layers for three initialisations, and two schedules."}


def to_notebook(source: str) -> nbformat.NotebookNode:
    """Turn the script's text into a notebook: the same cells, without the guards."""
    notebook = jupytext.reads(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03}"
        if cell.source.startswith(GUARD):
            cell.source = textwrap.dedent(cell.source.removeprefix(GUARD))
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                        "language": "python"}}
    return notebook


def execute(notebook: nbformat.NotebookNode, options: str) -> None:
    """Run all cells in a fresh kernel, with the tutorial's `options`; outputs go into the notebook."""
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment["CNN_TUTORIAL_ARGS"] = options
    client = NotebookClient(notebook, timeout=1800, coalesce_streams=True,
                            resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)                     # times of day, new at every run
    without_folders(notebook, options)
    for name, output in pictures(notebook).items():
        output.metadata["image/png"] = output.metadata.get("image/png", {}) | {"alt": ALT[name]}


def without_folders(notebook: nbformat.NotebookNode, options: str) -> None:
    """In what was printed, replace the folders of this machine: DIR for --data-dir, and temporary ones."""
    words = shlex.split(options)
    folders = [re.escape(tempfile.gettempdir()) + r"/tmp\w+/"]
    if "--data-dir" in words:
        folders.append(re.escape(words[words.index("--data-dir") + 1]))
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = re.sub(folders[0], "", output.text)
                for folder in folders[1:]:
                    output.text = re.sub(folder, "DIR", output.text)


def names_of_pictures(code: str) -> list[str]:
    """Return the names that a piece of the script gives to its pictures, in order."""
    return re.findall(r'"(\d_\d_\w+)"\)', code)


def pictures(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    """Return the outputs that are pictures, by the names that `show_figure` was given.

    A notebook shows the figures of a cell below it, in the order in which they were made. If a cell
    shows more or fewer pictures than it names, this is a ValueError.
    """
    found = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            names = names_of_pictures(cell.source)
            shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
            if len(names) != len(shown):
                raise ValueError(f"cell {number} shows {len(shown)} pictures, but its names are {names}")
            found |= dict(zip(names, shown))
    return found


def to_image(output: nbformat.NotebookNode) -> Image.Image:
    """Return the picture in an output."""
    return Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")


def with_few_colours(notebook: nbformat.NotebookNode) -> None:
    """Reduce every picture to 256 colours, where that makes it smaller."""
    for output in pictures(notebook).values():
        file = io.BytesIO()
        to_image(output).quantize().save(file, "PNG", optimize=True)
        smaller = base64.b64encode(file.getvalue()).decode()
        output.data["image/png"] = min(output.data["image/png"], smaller, key=len)


def write_gallery(shown: dict[str, nbformat.NotebookNode]) -> None:
    """Write the README's pictures: at most 800 pixels wide, 256 colours."""
    for name, figure in GALLERY.items():
        picture = to_image(shown[figure])
        picture.thumbnail((800, 800))
        picture.quantize().save(ROOT / "data" / "figures" / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", default="--offline",
                        help="for the tutorial (default: %(default)s)")
    options = parser.parse_args().options
    notebook = to_notebook(SCRIPT.read_text(encoding="utf-8"))
    execute(notebook, options)
    write_gallery(pictures(notebook))                            # from the pictures as they were drawn
    if len(nbformat.writes(notebook).encode()) >= MOST_BYTES:
        with_few_colours(notebook)
    beside = NOTEBOOK.with_suffix(".tmp")
    nbformat.write(notebook, beside)
    beside.replace(NOTEBOOK)
    print(f"{NOTEBOOK.name}: {len(notebook.cells)} cells, {NOTEBOOK.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
