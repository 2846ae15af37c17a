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


def pictures(notebook: nbformat.NotebookNode) -> dict[str, bytes]:
    """Return the notebook's pictures as PNG files, by the names that `show_figure` was given."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            names = re.findall(r'"(\d_\d_\w+)"\)', cell.source)
            shown = [output.data["image/png"] for output in cell.outputs
                     if "image/png" in output.get("data", {})]
            found |= dict(zip(names, map(base64.b64decode, shown), strict=True))
    return found


def write_gallery(shown: dict[str, bytes]) -> None:
    """Write the README's pictures: at most 640 pixels wide, 256 colours."""
    for name, figure in GALLERY.items():
        picture = Image.open(io.BytesIO(shown[figure])).convert("RGB")
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
