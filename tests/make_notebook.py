"""Make the notebook from the script and execute it: `python tests/make_notebook.py --help`."""

import argparse
import base64
import io
import os
import re
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
GALLERY = {  # the README's pictures, in data/figures/, and what `show_figure` calls them
    "kernels": "2_1_stride_padding_dilation", "edges": "2_1_edges", "mistakes": "4_5_mistakes",
    "strip": "4_7_strip", "degradation": "5_5_degradation", "architectures": "5_6_architectures",
    "transfer": "6_5_transfer", "layers": "7_3_layers", "maps": "7_4_maps", "tips": "8_1_tips"}

ALT = {  # what each picture shows, for those who cannot see it
    "1_1_convolution_as_matrix": "A matrix that is nearly empty: nine coloured diagonals in three bands",
    "1_3_equivariance": "A patch of a photo, shifted and convolved in both orders; the two differ only at the borders",
    "2_1_stride_padding_dilation": "Which pixels of a 7×7 grid two neighbouring outputs read, by stride, padding, dilation",
    "2_1_edges": "A photo, its vertical and its horizontal edges, and the length of the two",
    "2_2_relu": "Edges of two signs, red and blue, before ReLU; only one sign after it",
    "2_3_pooling": "A feature map, its maxima over 8×8 pixels, and its averages, which are darker",
    "2_5_norm": "How the values of four channels are distributed, before and after batch normalisation",
    "2_6_dropout": "Six feature maps; with Dropout they lose single pixels, with Dropout2d whole maps go black",
    "3_4_receptive_field": "The square of pixels that one unit of block 1 reads, and the larger one of block 2",
    "4_1_transforms": "A digit and a photo: as they are, resized, cropped, turned, mirrored, with other colours",
    "4_1_colour_images": "Sixteen of the colour images with their labels",
    "4_1_one_draw_or_many": "RandomCrop crops a batch of eight equal digits alike; random_shift moves each differently",
    "4_3_optimisers": "Training loss of SGD, Adam and AdamW; loss against a learning rate that grows",
    "4_5_history": "Losses of training and validation, and validation accuracy, epoch by epoch",
    "4_5_confusion": "Confusion matrix: true classes in rows, predicted ones in columns, mistakes coloured",
    "4_5_mistakes": "The eight digits that the network got most wrong, with true and predicted class",
    "4_7_accuracy_against_shift": "Accuracy against shift: it falls off both ways, later with augmentation",
    "4_7_strip": "A strip of five digits, and below it the probability of each class at every place",
    "5_2_tanh_and_relu": "Training loss against steps, with tanh and with ReLU",
    "5_5_degradation": "Training loss of networks of three depths, plain on the left, residual on the right",
    "5_6_architectures": "ImageNet accuracy against operations of five networks; larger dots, more parameters",
    "6_5_transfer": "Test accuracy against labels: from scratch, feature extraction, fine-tuning",
    "7_1_filters_simple_cnn": "Sixteen 5×5 kernels, noise before training, patches of one sign after it",
    "7_1_filters_resnet18": "The first 32 kernels of ResNet-18, as colours",
    "7_2_feature_maps": "Feature maps of a digit and of a colour image, layer by layer: outlines, then coarse spots",
    "7_3_layers": "Grad-CAM of one image at nine depths: outlines first, then coarse spots, one flat colour at 1×1",
    "7_4_maps": "Six images, their masks, and the maps of saliency, CAM, Grad-CAM, occlusion, 16×16 Grad-CAM",
    "8_1_tips": "Effect of five tips with their spread over seeds; losses of a network that learns by heart"}


def to_notebook(source: str) -> nbformat.NotebookNode:
    """Turn the script's text into a notebook: the same cells, without the guards."""
    notebook = jupytext.reads(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
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
        cell.metadata.pop("execution", None)  # times of day, new at every run
    for name, output in pictures(notebook).items():
        output.metadata["image/png"] = output.metadata.get("image/png", {}) | {"alt": ALT[name]}


def pictures(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    """Return the outputs that are pictures, by the names that `show_figure` was given."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            names = re.findall(r'"(\d_\d_\w+)"\)', cell.source)
            shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
            found |= dict(zip(names, shown, strict=True))
    return found


def write_gallery(shown: dict[str, nbformat.NotebookNode]) -> None:
    """Write the README's pictures: at most 640 pixels wide, 256 colours."""
    for name, figure in GALLERY.items():
        picture = Image.open(io.BytesIO(base64.b64decode(shown[figure].data["image/png"]))).convert("RGB")
        picture.thumbnail((640, 640))
        picture.quantize().save(ROOT / "data" / "figures" / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", default="--offline",
                        help="for the tutorial (default: %(default)s)")
    options = parser.parse_args().options
    notebook = to_notebook(SCRIPT.read_text(encoding="utf-8"))
    execute(notebook, options)
    beside = NOTEBOOK.with_suffix(".tmp")
    nbformat.write(notebook, beside)
    beside.replace(NOTEBOOK)
    write_gallery(pictures(notebook))
    print(f"{NOTEBOOK.name}: {len(notebook.cells)} cells, {NOTEBOOK.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
